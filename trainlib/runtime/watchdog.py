"""Hangs: how long processes wait for one another, and who notices that nothing moves any more.

Two nets, since either misses something. A collective has a timeout, which ends the processes that
wait for one that hangs; and a thread of each process watches that its steps end, whatever hangs: a
collective, a read from a lost file server, a library. It writes down where all threads stand and
ends the process with exit code 5, at which a launcher starts the run again.

A main thread that never lets go of the interpreter (a foreign function that holds its lock) stops
this thread, too; then the other processes notice.
"""

import faulthandler
import multiprocessing
import os
import re
import socket
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch.distributed
from accelerate import Accelerator
from pydantic import AfterValidator, Field

from trainlib.config import Options
from trainlib.memory import ended_on_purpose
from trainlib.schedule import check_clock_time, clock_seconds

if TYPE_CHECKING:
    from trainlib.runtime.folder import RunFolder

HANG_FILE = "hang.rank"
_TIMES = 20  # a phase may last so many times as long as what is usual
_LATER = 1.25  # collectives time out so much later than a process counts as hung, and says where
_NUM_STEP_TIMES = 64  # of which the median is taken
_LEAVE_SECONDS = 30.0  # for writing down what is known; the file system may be what hangs
_SHOWN = 200  # characters of torch's own message
ClockTime = Annotated[str, AfterValidator(check_clock_time)]
Phase = Literal["start", "step", "evaluation", "save", "end"]


class Hang(Exception):
    """The processes have waited for one of them in vain."""

    exit_code = 5


class CommunicationOptions(Options):
    start_timeout: ClockTime = "30 minutes"
    """How long the start with the first step, an evaluation, a save, the step after each, and the
    end may last before they count as hung; or 20 times as long as the longest of their kind so far.
    A quarter later a process no longer waits for the others."""
    step_timeout: ClockTime = "10 minutes"
    """How long a process waits for the others in any other step."""
    hang_after: ClockTime | None = "5 minutes"
    """A process counts as hung if no step ends within this time or 20 times the median step,
    whichever is longer; all its stacks are then written down, and it ends with exit code 5. none:
    never, as for a debugger."""
    slow_factor: float = Field(1.5, gt=1)
    """A process is named as slow if its own part of a step takes so many times the median of all
    processes."""


class Watchdog:
    """Knows which phase of a run its process is in, and when that has lasted too long.

    A step ends when the host begins something else. On a GPU the host runs ahead of the device,
    but by two steps at most, for it waits for each step's values one step later: so a device that
    stands still soon stops the host, and nothing here has to ask the device.
    """

    def __init__(
        self, hang_after_seconds: float, start_timeout_seconds: float,
        on_hang: Callable[[str, float], object],
        set_timeout: Callable[[float | None], object] = lambda seconds: None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """
        Args:
            on_hang: called once, from the thread, with the phase and its seconds so far.
            set_timeout: called by ``begin``: with none where steps follow steps, else with the
                seconds that a collective may take.
        """
        self._hang_after_seconds, self._start_timeout_seconds = (
            hang_after_seconds, start_timeout_seconds
        )
        self._on_hang, self._set_timeout, self._clock = on_hang, set_timeout, clock
        self.phase: Phase = "start"
        """What is going on."""
        self.step: int | None = None
        self._since = clock()
        self.num_steps = 0
        """How many have ended."""
        self._is_usual = False
        self._step_seconds: list[float] = []  # a ring
        self._longest_seconds: dict[str, float] = {}
        self._mark, self._seen_mark, self._counted_seconds = 0, -1, 0.0
        # Often enough to be late by a twentieth.
        self._every_seconds = min(hang_after_seconds, start_timeout_seconds) / 20
        self._stopped = threading.Event()

    def start(self) -> "Watchdog":
        """Starts the thread."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()

    def begin(self, phase: Phase, step: int | None = None) -> None:
        """Ends what was going on, be it a step, and begins something; costs a microsecond.

        Args:
            step: that begins, of the run or of a sweep.
        """
        self.step = step
        now, former = self._clock(), self.phase
        seconds = now - self._since
        if not self._is_usual:
            self._longest_seconds[former] = max(seconds, self._longest_seconds.get(former, 0.0))
        elif len(self._step_seconds) < _NUM_STEP_TIMES:
            self._step_seconds.append(seconds)
        else:
            self._step_seconds[self.num_steps % _NUM_STEP_TIMES] = seconds
        self.num_steps += former == "step"
        # The first step loads and compiles. In one after something else the others may still wait
        # for the main process, which alone writes, draws and logs.
        is_usual = phase == former == "step"
        was_usual, self._is_usual = self._is_usual, is_usual
        self.phase, self._since = phase, now
        self._mark += 1
        if not is_usual:
            self._set_timeout(_LATER * self.budget_seconds())
        elif not was_usual:
            self._set_timeout(None)

    def budget_seconds(self) -> float:
        """How long the phase that has begun may last."""
        if not self._is_usual:
            of_kind = self._longest_seconds
            if self.phase == "end":  # which evaluates and saves, too
                longest = max(of_kind.values(), default=0.0)
            else:
                longest = of_kind.get(self.phase, 0.0)
            return max(self._start_timeout_seconds, _TIMES * longest)
        times = self._step_seconds.copy()
        median = statistics.median(times) if times else 0.0
        return max(self._hang_after_seconds, _TIMES * median)

    def look(self, slept_seconds: float) -> bool:
        """Whether the phase has lasted too long.

        Args:
            slept_seconds: since the last look. Of a sleep that was much longer than asked for, only
                a part counts: the process was stopped, or its machine asleep.
        """
        mark = self._mark
        if mark != self._seen_mark:
            self._seen_mark, self._counted_seconds = mark, 0.0
            return False
        self._counted_seconds += min(slept_seconds, 2 * self._every_seconds)
        return self._counted_seconds > self.budget_seconds() and mark == self._mark

    def _watch(self) -> None:
        before = self._clock()
        while not self._stopped.wait(self._every_seconds):
            now = self._clock()
            if self.look(now - before):
                self._on_hang(self.phase, self._counted_seconds)
                return
            before = now


def watch(folder: "RunFolder", options: CommunicationOptions, accelerator: Accelerator) -> Watchdog:
    """Watches over this process until its run's folder is closed, and from now on sets the timeout
    of collectives: the shorter one where steps follow steps, else that of the start."""
    start_seconds, step_seconds = map(clock_seconds, (options.start_timeout, options.step_timeout))
    is_alone = accelerator.num_processes == 1
    rank = accelerator.process_index

    def on_hang(phase: str, seconds: float) -> None:
        leaving = threading.Thread(target=leave, args=(phase, seconds), daemon=True)
        leaving.start()
        leaving.join(_LEAVE_SECONDS)
        os._exit(Hang.exit_code)

    def leave(phase: str, seconds: float) -> None:
        for child in multiprocessing.active_children():  # data workers
            ended_on_purpose.add(child.pid)
            child.kill()
        file = folder.path / f"{HANG_FILE}{rank}.txt"
        is_step = phase == "step"
        what = f"step {folder.watchdog.step}" if is_step else f"{phase}, after step {folder.step}"
        where = f"process {rank} on {socket.gethostname()}"
        where += f": {what} has not ended for {seconds:.0f} s"
        folder.leave(Hang.exit_code, f"{where}; {_write_stacks(file, where)}")

    def set_timeout(seconds: float | None) -> None:
        if not is_alone:
            set_collective_timeout(step_seconds if seconds is None else seconds)

    hang_after_seconds = clock_seconds(options.hang_after or "1 hour")
    folder.watchdog = Watchdog(hang_after_seconds, start_seconds, on_hang, set_timeout)
    return folder.watchdog if options.hang_after is None else folder.watchdog.start()


def set_collective_timeout(seconds: float) -> None:
    """Sets the timeout of every later collective, in all groups that there are.

    DDP, FSDP2's mesh of all processes and everything here share the default group. gloo and NCCL
    look at it when an operation is begun. Where torch has no such function, the first stays.
    """
    from torch.distributed import distributed_c10d

    function = getattr(distributed_c10d, "_set_pg_timeout", None)
    groups = list(getattr(getattr(distributed_c10d, "_world", None), "pg_map", {}))
    if function is None or not torch.distributed.is_initialized():
        return
    with warnings.catch_warnings(), suppress(ValueError, RuntimeError, AttributeError):
        warnings.simplefilter("ignore")  # about another backend than these two
        for group in groups or [None]:
            function(timedelta(seconds=seconds), group)


def as_hang(error: BaseException) -> BaseException:
    """The error, or ``Hang`` in place of that of a process that has waited for another one in vain.

    Told by gloo's words; with NCCL torch ends the process itself, by SIGABRT. A process that has
    died is told by other words ("Connection closed by peer").
    """
    words = re.search(r"(Timed out waiting \d+ *ms[^\n]*|[^\n]*collective operation timeout[^\n]*)",
                      str(error))
    if words is None or not isinstance(error, RuntimeError):
        return error
    return Hang(f"process {os.environ.get('RANK', '0')} on {socket.gethostname()} has waited for "
                f"the others in vain ({words[1][:_SHOWN].strip()}): one of them hangs")


def _write_stacks(file: Path, where: str) -> str:
    """Where all threads of this process stand, into a file; returns words for where it is."""
    try:
        with file.open("a", encoding="utf-8") as stacks:  # behind those of an earlier hang
            stacks.write(f"{where}\n{time.strftime('%Y-%m-%dT%H:%M:%S%z')}, pid {os.getpid()}\n\n")
            stacks.flush()
            faulthandler.dump_traceback(stacks, all_threads=True)
        return f"where it stands: {file}"
    except OSError as error:  # the folder of another machine, say
        with suppress(OSError, ValueError, AttributeError):  # a stream that is no file
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        return f"{file.name} cannot be written ({error.strerror}): where it stands is said above"
