"""Asked to stop: what a signal does to a run, and how all processes agree on it.

A scheduler, a launcher and a terminal signal one process, some, or all, and often twice. During
start-up a signal ends the process; later it is noted, and the run stops at a step's end, where
nothing is lost. A thread reads the signals too, because Python's own handlers wait for the main
thread, which may be blocked in a collective whose peer has died.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)


class Preempted(KeyboardInterrupt):
    """The run is to stop now and can be run again: exit code 75."""

    exit_code = 75


class Signals:
    """Installed once per process, in the main thread, before a script's own work begins."""

    installed: "Signals | None" = None

    def __init__(
        self,
        leave: Callable[[str], object],
        second_after_seconds: float = 2.0,
        startup_grace_seconds: float = 5.0,
    ):
        """
        Args:
            leave: called, from a thread, with the reason when the process has to go at once.
            second_after_seconds: earlier repeats are one request, because launchers forward a
                Ctrl-C that the terminal has already delivered.
            startup_grace_seconds: from a signal during start-up until ``leave`` is called.
        """
        self.received: str | None = None
        """The first signal's name."""
        self._leave = leave
        self._second_after_seconds = second_after_seconds
        self._startup_grace_seconds = startup_grace_seconds
        self._holds = False
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        self._former_wakeup = signal.set_wakeup_fd(
            self._writer.fileno(), warn_on_full_buffer=False
        )
        Signals.installed = self
        # Under nohup the loss of the terminal is ignored, and stays so.
        self._former = {
            number: signal.signal(number, self._handle) for number in SIGNALS
            if signal.Signals(number).name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN
        }

    def hold(self) -> None:
        """Ends start-up: from now on a signal is only noted.

        Raises:
            Preempted: a library has swallowed the one that start-up raised.
        """
        if self.received is not None:
            raise Preempted(f"{self.received} during start-up")
        self._holds = True

    def release(self) -> None:
        """A next run of this process starts up: until ``hold`` a signal ends it at once again."""
        self._holds = self.received is not None

    def end(self) -> None:
        """The script is at its end, for whatever reason: a signal no longer interrupts it."""
        # torch's handler raises for a data worker that has died, for a second one here, too.
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._holds = True

    def restore(self) -> None:
        """Puts the former handlers and wake-up descriptor back."""
        for number, handler in self._former.items():
            # None: a handler that C code had installed, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._former_wakeup)
        Signals.installed = None
        self._writer.shutdown(socket.SHUT_RDWR)  # closing would not do: children have copies
        self._thread.join()
        self._writer.close()
        self._reader.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            return  # a repeat must not interrupt the clean-up that the first one started
        self.received = signal.Signals(number).name
        if not self._holds:
            raise Preempted(f"{self.received} during start-up")

    def _listen(self) -> None:
        first_seconds, first_name, deadline = 0.0, None, None
        while True:
            wait_seconds = None if deadline is None else max(deadline - time.monotonic(), 0.001)
            self._reader.settimeout(wait_seconds)
            try:
                numbers = self._reader.recv(64)
            except TimeoutError:
                deadline = None
                if not self._holds:
                    return self._leave(f"{first_name} during start-up, which did not end")
                continue
            if not numbers:  # restored
                return None
            now = time.monotonic()
            for number in set(numbers) & set(SIGNALS):  # other handlers' signals come here, too
                name = signal.Signals(number).name
                if first_name is None:
                    first_seconds, first_name = now, name
                    deadline = None if self._holds else now + self._startup_grace_seconds
                elif now - first_seconds >= self._second_after_seconds:
                    return self._leave(f"a second {name}")


def _forget_in_child() -> None:
    """A forked child shares the parent's socket: its signals would be read as the parent's."""
    if Signals.installed is not None:
        Signals.installed = None
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue
            is_interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


class Requests:
    """What one process asks of all at a step's end: to stop (it was signalled), or to save."""

    NUM = 2

    def __init__(
        self, accelerator: "Accelerator", signals: Signals | None, save_every_seconds: float | None
    ):
        """
        Args:
            signals: none where a script's ``main`` is called by other code, which has its own.
            save_every_seconds: by the main process's clock, since clocks differ; None: never.
        """
        self.stop = self.save = False  # agreed by all processes
        self._accelerator, self._signals = accelerator, signals
        self._save_every_seconds = save_every_seconds if accelerator.is_main_process else None
        self.saved()

    def add_to(self, flags: "Tensor") -> None:
        """Adds this process's requests to its [2] sums, which are summed over all processes.

        A flag that is not raised is not touched: on a GPU a write costs a launch.
        """
        if self._is_signalled():
            flags[0].add_(1)
        every_seconds = self._save_every_seconds
        if every_seconds is not None and not self._has_asked:
            if time.monotonic() - self._saved_seconds >= every_seconds:
                flags[1].add_(1)
                self._has_asked = True  # the answer comes a step late, and one save is enough

    def take(self, flags: Sequence[float]) -> None:
        """Takes the [2] sums over all processes, on the host, into ``stop`` and ``save``."""
        self.stop = self.stop or flags[0] > 0
        self.save = self.save or flags[1] > 0

    def agree(self) -> bool:
        """Whether any process was signalled, by a message of its own; all call it equally often."""
        is_signalled = self._is_signalled()
        if self._accelerator.num_processes > 1:
            import torch

            count = torch.tensor(int(is_signalled), dtype=torch.int32,
                                 device=self._accelerator.device)
            torch.distributed.all_reduce(count)
            is_signalled = count.item() > 0
        self.stop = self.stop or is_signalled
        return self.stop

    def leave_if_stopped(self, step: int = 0, total_steps: int = 0) -> None:
        """Raises Preempted where all have agreed to stop and there is nothing left to save.

        Args:
            step: that has been saved, of ``total_steps``; 0: none has been taken.
        """
        if self.stop and step == 0:
            raise Preempted("stopped by a signal before the first step")
        if self.stop:
            raise Preempted(f"stopped by a signal at step {step} of {total_steps}: all is saved; "
                            "run the same command again to go on")

    def saved(self) -> None:
        """Notes that a checkpoint was taken: the clock starts again."""
        self.save = self._has_asked = False
        self._saved_seconds = time.monotonic()

    def _is_signalled(self) -> bool:
        return self._signals is not None and self._signals.received is not None


def release_signals() -> None:
    """Begins the start-up of a next run in this process."""
    if Signals.installed is not None:
        Signals.installed.release()


def hold_signals(accelerator: "Accelerator", save_every_seconds: float | None) -> Requests:
    """Ends start-up: from now on a signal is a request, which all processes meet together.

    Raises:
        Preempted: a library has swallowed a signal of start-up.
    """
    if Signals.installed is not None:
        Signals.installed.hold()
    return Requests(accelerator, Signals.installed, save_every_seconds)
