"""Which process holds the others up.

All wait for each other in every step, so a step takes the same time everywhere; what tells is how
long a process takes until it begins to wait. These times ride in the step's own all-reduce, each
in a slot of its process: there is no further message, and on a GPU nobody waits for the device.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

WINDOW_STEPS = 100  # over which times are averaged
MIN_EXCESS_SECONDS = 0.005  # a step; small jobs differ by chance
REPEAT_WINDOWS = 10  # after which a process that is still slow is named again


class Pace:
    """The times of all processes, added up over a window of steps, and compared by the main one.

    A process's time runs from the beginning of a step to where it first waits for the others: to
    the all-reduce, or where DDP sums the gradients to the last micro-batch's backward. It holds
    the reading of data, and on a GPU the device's own time.
    """

    def __init__(
        self, rank: int, hosts: list[str], on_gpu: bool, slow_factor: float,
        say: Callable[[str], object], clock: Callable[[], float] = time.perf_counter,
    ):
        """
        Args:
            hosts: by process, this one's at ``rank``.
            slow_factor: times the median of all, above which a process is slow. Of an even number
                the lower of the two in the middle: of two processes, the faster one.
            say: told in a line of a slow process.
        """
        self._slow_factor, self._say, self._clock = slow_factor, say, clock
        self._rank, self._hosts, self._on_gpu = rank, hosts, on_gpu
        self._num_begun = self._num_taken = 0
        self._began: float | torch.cuda.Event = 0.0
        self._end: float | torch.cuda.Event | None = None
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # not read yet
        self._total: Tensor | None = None
        self._arriving: tuple[Tensor, torch.cuda.Event] | None = None
        self._named: dict[int, int] = {}  # by process: for how many windows it has been slow

    def begin(self) -> None:
        """Begins a step."""
        self._num_begun += 1
        self._began = self._event() if self._on_gpu else self._clock()
        self._end = None

    def mark(self) -> None:
        """From here on this process may wait for the others; the last call of a step counts."""
        if self._on_gpu:
            self._end = self._event()
        else:
            self._end = self._clock()

    def add_to(self, slots: Tensor) -> None:
        """Adds this process's time to its slot of [world_size] sums, in seconds.

        On a GPU those of former steps that the device has ended by now. The first step is left out:
        it compiles and loads.
        """
        if self._num_begun == 1 or self._end is None:
            return
        seconds = 0.0
        if self._on_gpu:
            self._events.append((self._began, self._end))
            while self._events and self._events[0][1].query():
                began, ended = self._events.pop(0)
                seconds += began.elapsed_time(ended) / 1000
        else:
            seconds = self._end - self._began
        if seconds > 0:
            slots[self._rank].add_(seconds)

    def take(self, slots: Tensor) -> None:
        """Takes the [world_size] sums over all processes; after a window the slow ones are named,
        on a GPU a few steps later, when its values have come to the host by themselves."""
        if self._rank != 0:
            return
        if self._total is None:
            self._total = torch.zeros_like(slots)
        self._total += slots
        self._num_taken += 1
        if self._arriving is not None and self._arriving[1].query():
            values, self._arriving = self._arriving[0], None
            self.compare(values.tolist())
        if self._num_taken % WINDOW_STEPS:
            return
        if self._on_gpu:
            values, event = self._total.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
            self._arriving = (values, event)
        else:
            self.compare(self._total.tolist())
        self._total.zero_()

    def compare(self, seconds: list[float]) -> None:
        """Names the slow processes of a window.

        Args:
            seconds: by process, of all steps together.
        """
        median = statistics.median_low(seconds)
        for rank, own in enumerate(seconds):
            excess = (own - median) / WINDOW_STEPS
            if not (own > self._slow_factor * median and excess > MIN_EXCESS_SECONDS):
                self._named.pop(rank, None)
                continue
            windows = self._named.get(rank, 0)
            self._named[rank] = windows + 1
            if windows % REPEAT_WINDOWS == 0:
                self._say(
                    f"process {rank} on {self._hosts[rank]} is slow: in each of the last "
                    f"{WINDOW_STEPS} steps it took {own / WINDOW_STEPS:.3g} s of its own, where "
                    f"the median process takes {median / WINDOW_STEPS:.3g} s, and all wait for it"
                )

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
