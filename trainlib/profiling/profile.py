"""A profile of some steps of a run: when it begins and ends, and the files that it leaves."""

from __future__ import annotations

import gzip
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.distributed
from pydantic import AfterValidator

from trainlib import durable
from trainlib.profiling.parts import REST, Parts
from trainlib.profiling.trace import Operator, device_parts, operators

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trainlib.batchnorm import BatchStatistics
    from trainlib.data import Reader
    from trainlib.gradients import StepSums
    from trainlib.runtime import RunFolder
    from trainlib.runtime.watchdog import Watchdog

WARMUP_STEPS = 5  # before it, which load and compile
MAX_STEPS = 50  # the trace of more is too large to look at, and to hold
TABLE, TRACE = "profile.txt", "profile.trace.json.gz"
_NUM_OPERATORS = 15
_STEPS = re.compile(r"\s*([0-9]{1,15})\s*steps?\s*", re.IGNORECASE)


def check_steps(text: str) -> str:
    """``text`` itself if it reads like ``"20 steps"``.

    Raises:
        ValueError: it does not, or means none.
    """
    match = _STEPS.fullmatch(text)
    if match is None or int(match[1]) < 1:
        raise ValueError(f'a profile is of one step or more, as "20 steps"; {text!r} is none')
    return text


ProfiledSteps = Annotated[str, AfterValidator(check_steps)] | None


def profile_steps(
    wanted: str | None, folder: RunFolder, watchdog: Watchdog, accelerator: Accelerator,
    sums: StepSums, reader: Reader, batch_statistics: BatchStatistics,
    optimizer: torch.optim.Optimizer, say: Callable[..., object], teachers: Any = None,
) -> None:
    """Has the main process take a profile of steps to come, if one is asked for.

    A profile that it replaces, or of a run that was here before, goes, lest it be taken for one of
    this run when none is written.

    Args:
        wanted: how many, as "20 steps".
        watchdog: is told when a step begins and when it ends.
        teachers: of a distillation.
    """
    if not accelerator.is_main_process:
        return
    if wanted is not None or folder.step == 0:
        for name in (TABLE, TRACE):
            try:
                (folder.path / name).unlink(missing_ok=True)
            except OSError as error:
                say(f"{name}: that of an earlier profile is not removed ({_reason(error)})")
    if wanted is None:
        return
    num_steps = int(_STEPS.fullmatch(wanted)[1])
    if num_steps > MAX_STEPS:
        say(f"profile: {num_steps} steps were asked for, and it holds {MAX_STEPS} at most")

    def mark(parts: Parts) -> None:
        for name in ("item_counts", "take"):
            parts.mark(reader, name, "data", then="augmentation")
        parts.mark(sums, "no_sync", "forward", then="forward")
        if teachers is not None:
            parts.mark(teachers, "teach", "teachers")
        parts.mark(accelerator, "backward", "backward", then=REST)
        parts.mark(sums, "add_gradients", "exact sum", then=REST)
        parts.mark(batch_statistics, "add_to", REST, then="augmentation")
        parts.mark(sums, "reduce", "exact sum", then=REST)
        parts.mark(torch.distributed, "all_reduce", "communication")
        parts.mark(accelerator, "clip_grad_norm_", "clipping", then=REST)
        parts.mark(optimizer, "step", "optimizer", then=REST)

    notes = []
    if sums.is_sharded:
        notes.append("FSDP2 communicates within forward and backward, and counts there on the host")
    elif sums.reduces_elsewhere:
        notes.append("DDP sums gradients within the backward, and counts there on the host")
    Profile(min(num_steps, MAX_STEPS), folder, watchdog, accelerator.device, mark, notes, say)


class Profile:
    """Follows the phases of a run, and takes the profile when it is time."""

    def __init__(
        self, num_steps: int, folder: RunFolder, watchdog: Watchdog, device: torch.device,
        mark: Callable[[Parts], None], notes: Sequence[str], say: Callable[..., object],
    ):
        """
        Args:
            mark: puts marks around what a step uses.
            notes: lines below the table.
        """
        self._num_wanted, self._folder, self._device = num_steps, folder, device
        self._mark, self._notes, self._say = mark, list(notes), say
        self._parts, self._profiler = Parts(), None
        self._num_seen = self._num_taken = self._first_step = 0
        self._watchdog, self._begin = watchdog, watchdog.begin
        watchdog.begin = self._follow

    def _follow(self, phase: str, step: int | None = None) -> None:
        """In the place of ``Watchdog.begin``."""
        try:
            self._parts.enter(None)
            if phase == "end" or self._num_taken == self._num_wanted:
                self._watchdog.begin = self._begin
                self._begin("save")  # which may take a while
                self._finish()
            elif phase == "step":
                self._begin_step()
        except Exception as error:  # no run fails for want of a profile
            self._give_up(error)
        self._begin(phase, step)

    def _begin_step(self) -> None:
        self._num_seen += 1
        if self._num_seen <= WARMUP_STEPS:
            return
        if self._profiler is None:
            self._begin("save")  # CUPTI takes seconds to load
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
            self._mark(self._parts)
            self._first_step = self._folder.step
        self._num_taken += 1
        self._parts.enter(REST)

    def _give_up(self, error: Exception) -> None:
        self._watchdog.begin = self._begin
        self._parts.unmark()
        self._say(f"profile: failed ({_reason(error)}); training goes on without it")

    def _finish(self) -> None:
        if self._profiler is None:
            self._say(f"profile: the run has ended within the {WARMUP_STEPS} steps before a "
                      "profile begins")
            return
        self._parts.unmark()
        profiler, self._profiler = self._profiler, None  # which holds all events
        profiler.stop()
        if self._num_taken < self._num_wanted:
            self._say(f"profile: the run has ended after {self._num_taken} of the "
                      f"{self._num_wanted} steps that were asked for")
        written, events = [], []
        try:
            content = _chrome_trace(profiler)
            events = json.loads(content)["traceEvents"]
            self._folder.check_lock()
            durable.write_bytes(self._folder.path / TRACE, gzip.compress(content, 6))
            written.append(f"{TRACE} (for ui.perfetto.dev)")
        except (OSError, ValueError, RuntimeError) as error:
            self._say(f"{TRACE}: not written ({_reason(error)})")
        last = self._first_step + self._num_taken
        seconds = sum(self._parts.seconds.values()) / self._num_taken
        head = (f"profile of {self._num_taken} steps ({self._first_step} to {last}), "
                f"{1000 * seconds:.4g} ms each, on {self._device.type}")
        shares = part_lines(self._parts.seconds, device_parts(events), self._num_taken)
        below = operator_lines(operators(events), self._num_taken)
        try:
            self._folder.check_lock()
            lines = [head, "", *shares, *self._notes, "", *below]
            durable.write_text(self._folder.path / TABLE, "\n".join(lines) + "\n")
            written.insert(0, f"{TABLE} with the operators")
        except OSError as error:
            self._say(f"{TABLE}: not written ({_reason(error)})")
        where = f"{self._folder.path}: {', '.join(written)}" if written else None
        self._say("\n".join(["", head, *shares, *self._notes]), where)


def part_lines(
    seconds: Mapping[str, float], device: Mapping[str, float], num_steps: int
) -> list[str]:
    """A table of the parts of a step, whose shares add up to 100 %.

    Args:
        seconds: by part, on the host over all steps.
        device: by part, microseconds on the device; empty without one.
    """
    rows = {part: [value, device.get(part, 0) / 1e6] for part, value in seconds.items()
            if value or part != "teachers"}
    host = sum(seconds.values())
    if device:  # it may lag behind, and work on when the last step has ended on the host
        rows["idle"] = [0.0, max(0.0, host - sum(device.values()) / 1e6)]
    totals = [max(sum(row[column] for row in rows.values()), 1e-12) for column in (0, 1)]
    columns = (("host", 0), ("device", 1)) if device else (("", 0),)
    lines = ["part of a step" + "".join(
        f"{(name + ' ms').strip():>13}{'share':>9}" for name, _ in columns)]
    for part, row in [*rows.items(), ("all", totals)]:
        lines.append(f"{part:14}" + "".join(
            f"{1000 * row[column] / num_steps:13.3f}{row[column] / totals[column]:9.1%}"
            for _, column in columns))
    return lines


def operator_lines(found: Sequence[Operator], num_steps: int) -> list[str]:
    """A table of the operators that take most time: of the device where one works, else of the
    host, over all threads."""
    has_device = any(operator.device for operator in found)
    totals = [max(sum(operator.host for operator in found), 1e-12),
              max(sum(operator.device for operator in found), 1e-12)]
    top = sorted(found, reverse=True, key=lambda one: one.device if has_device else one.host)
    heads = f"{'calls':>10}{'self ms':>10}{'share':>8}"
    heads += f"{'device ms':>11}{'share':>8}" if has_device else ""
    lines = [f"{'operator, in a step':48}{heads}"]
    for one in top[:_NUM_OPERATORS]:
        line = (f"{one.name[:47]:48}{one.calls / num_steps:10.4g}"
                f"{one.host / 1000 / num_steps:10.3f}{one.host / totals[0]:8.1%}")
        if has_device:
            line += f"{one.device / 1000 / num_steps:11.3f}{one.device / totals[1]:8.1%}"
        lines.append(line)
    return lines


def _chrome_trace(profiler: Any) -> bytes:
    """The trace as JSON, which torch writes to a file only, and does not say if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(os.fspath(file))
        return file.read_bytes()


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]
