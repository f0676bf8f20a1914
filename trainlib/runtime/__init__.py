"""Where a run runs: the Accelerator (``machine``), the run's folder (``folder``), its lock
(``lock``) and whose recipe it holds (``recipes``), restarts by a launcher (``restarts``), signals
and what processes ask of one another (``signals``), hangs (``watchdog``), the exit (``entry``)."""

from trainlib.runtime.entry import run
from trainlib.runtime.folder import RunFolder
from trainlib.runtime.machine import make_accelerator, make_seeder
from trainlib.runtime.signals import Preempted, Requests, hold_signals, release_signals
from trainlib.runtime.watchdog import CommunicationOptions, watch

__all__ = [
    "CommunicationOptions", "Preempted", "Requests", "RunFolder", "hold_signals",
    "make_accelerator", "make_seeder", "release_signals", "run", "watch",
]
