"""What a Chrome trace of torch's profiler says about the steps in it: pure functions of its events.

Times in a trace are microseconds.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from trainlib.profiling.parts import COMMUNICATION, PARTS, PREFIX

_OF_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
Event = Mapping[str, Any]


class Range(NamedTuple):
    """When the main thread was in a part of a step."""

    start: float
    end: float
    part: str


@dataclass
class Operator:
    """An operator of torch, over all steps and threads."""

    name: str
    calls: int = 0
    host: float = 0.0
    """Microseconds in itself, without the operators that it calls."""
    device: float = 0.0
    """Microseconds of the kernels and copies that it has launched itself."""


def ranges(events: Iterable[Event]) -> list[Range]:
    """The parts of all steps in the order of time; they do not overlap."""
    return sorted(
        Range(event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(PREFIX))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)
    )


class _Lookup:
    """In which part of a step a moment lies."""

    def __init__(self, found: Sequence[Range]):
        self._ranges, self._starts = found, [one.start for one in found]

    def part(self, moment: float) -> str | None:
        index = bisect_right(self._starts, moment) - 1
        if index < 0 or moment >= self._ranges[index].end:
            return None
        return self._ranges[index].part


def operators(events: Sequence[Event]) -> list[Operator]:
    """The operators that ran within steps, each with its own time only."""
    lookup = _Lookup(ranges(events))
    device: dict[int, float] = {}
    for event in events:
        if event.get("cat") in _OF_DEVICE and "correlation" in event.get("args", {}):
            launch = event["args"]["correlation"]  # of one kernel, or of a whole CUDA graph
            device[launch] = device.get(launch, 0.0) + event["dur"]
    threads: dict[tuple, list[Event]] = {}
    for event in events:
        if event.get("cat") in ("cpu_op", *_LAUNCHES) and lookup.part(event["ts"]) is not None:
            threads.setdefault((event["pid"], event["tid"]), []).append(event)
    found: dict[str, Operator] = {}
    for thread in threads.values():
        running: list[tuple[float, Operator]] = []  # innermost last, each with its end
        for event in sorted(thread, key=lambda one: (one["ts"], -one["dur"])):
            while running and running[-1][0] <= event["ts"]:
                running.pop()
            caller = running[-1][1] if running else None
            if event["cat"] in _LAUNCHES:
                if caller is not None:
                    caller.device += device.get(event.get("args", {}).get("correlation"), 0.0)
                continue
            operator = found.setdefault(event["name"], Operator(event["name"]))
            operator.calls += caller is not operator  # aten::sum of all calls aten::sum
            operator.host += event["dur"]
            if caller is not None:
                caller.host -= event["dur"]
            running.append((event["ts"] + event["dur"], operator))
    return list(found.values())


def device_parts(events: Sequence[Event]) -> dict[str, float]:
    """By part of a step, the microseconds in which the device worked for it; empty without one.

    What runs belongs to the part in which the host has launched it, on whichever thread, but
    kernels of NCCL are communication. Of what runs at the same time the computation counts: so
    communication is what nothing hides, and no moment counts twice.
    """
    lookup = _Lookup(ranges(events))
    launched = {event["args"]["correlation"]: event["ts"] for event in events
                if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})}
    work: list[tuple[float, float, str]] = []
    for event in events:
        if event.get("cat") not in _OF_DEVICE:
            continue
        moment = launched.get(event.get("args", {}).get("correlation"))
        part = None if moment is None else lookup.part(moment)
        if part is None:
            continue  # of an evaluation, say
        is_nccl = "nccl" in event["name"].lower()
        work.append((event["ts"], event["ts"] + event["dur"],
                     COMMUNICATION if is_nccl else part))
    if not work:
        return {}
    totals = dict.fromkeys(PARTS, 0.0)
    changes = sorted([(start, 1, index) for index, (start, _, _) in enumerate(work)]
                     + [(end, 0, index) for index, (_, end, _) in enumerate(work)])
    running: dict[int, str] = {}  # in the order of their start
    for (moment, begins, index), (following, *_) in pairwise(changes):
        if begins:
            running[index] = work[index][2]
        else:
            running.pop(index, None)
        if running and following > moment:
            first = next((part for part in running.values() if part != COMMUNICATION),
                         COMMUNICATION)
            totals[first] += following - moment
    return totals
