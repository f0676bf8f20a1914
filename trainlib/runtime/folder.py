"""The folder of one run: whose it is, and what stands in it besides checkpoints and models."""

import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from trainlib import agreement, durable, journal, terminal
from trainlib.claim import Claim
from trainlib.config import UserError, flatten, is_first_process, parse_yaml
from trainlib.credentials import redact
from trainlib.memory import OutOfMemory
from trainlib.runtime.lock import RunLock, may_be_held, not_writable
from trainlib.runtime.machine import describe_machine, now
from trainlib.runtime.recipes import change_of_length, differences_between
from trainlib.runtime.restarts import refuse_restart
from trainlib.runtime.signals import Preempted
from trainlib.runtime.watchdog import HANG_FILE, Hang, Watchdog

_EXIT, _LOCK, _LOG, _ENVIRONMENT = "exit.json", "run.lock", "log.txt", "environment.json"
_OF_THE_END = ("predictions.csv", "loss_by_position.csv", "report.html")
_CODES_OF_ANY_PROCESS = (
    UserError.exit_code, Preempted.exit_code, Hang.exit_code, OutOfMemory.exit_code
)


class RunFolder:
    """The folder of one run, opened by all processes and written by the main one."""

    current: "RunFolder | None" = None

    def __init__(self, path: Path, is_dry_run: bool = False):
        """Names the folder; nothing is written before ``open``.

        Args:
            is_dry_run: it is not opened; a signal then leaves nothing there either.

        Raises:
            NotRestarted: an elastic launcher starts a run again that has ended for good.
        """
        refuse_restart(path / _EXIT)
        self.path, self.is_main, self._is_dry_run = path, is_first_process(), is_dry_run
        self.step = self.exit_code = 0
        self.recipe: dict[str, Any] = {}
        """The run's options by dotted name, once it is open."""
        self.notes: list[str] = []
        """Lines for the log."""
        self.at_exit: list[Callable[[], object]] = []
        """Called, in order, before the process ends for whatever reason; one that answers yes has
        left something that may hold the process back."""
        self.has_abandoned = False
        self.watchdog: Watchdog | None = None
        self.on_behalf_of: RunFolder | None = None
        """Of the run that needs this one first; where a launcher looks for the end's code."""
        self._lock: RunLock | None = None
        self._claim: Claim | None = None
        self._is_new = self._is_open = False
        self._of_the_start: dict[str, str] = {}
        self._checking = threading.Lock()
        RunFolder.current = self

    def open(
        self, accelerator: Accelerator, config: str, data_fingerprint: str, steal_lock: bool
    ) -> None:
        """Takes the folder for the run that ``config`` (YAML) describes.

        Should another run take it later, the process ends at once with exit code 2.

        Raises:
            UserError: the folder holds another recipe's run, is in use, or is not a run folder; or
                the processes have been given different recipes or data.
            SystemExit: this very run has finished there; exit code 0.
        """
        device = accelerator.device
        differences = differences_between(config, data_fingerprint, device)
        if differences:
            raise UserError("\n".join(differences))
        outcome: dict[str, Any] = {}
        if self.is_main:
            try:
                outcome = self._take(config, steal_lock)
            except UserError as error:
                outcome = {"refused": str(error)}
        outcome = agreement.from_main(outcome, device)
        if "refused" in outcome:
            raise UserError(outcome["refused"])
        if "finished" in outcome:
            if self.is_main:
                print(outcome["finished"])
            raise SystemExit(0)
        self.recipe = flatten(parse_yaml(config))
        self._claim = Claim(self.path / _LOCK, outcome["token"])
        self._is_open = True

    def examine(
        self, accelerator: Accelerator, config: str, data_fingerprint: str, steal_lock: bool
    ) -> list[str]:
        """A line for each thing that ``open`` would refuse; nothing is taken or written.

        A lock of another machine counts as held: only ``open`` watches whether its owner lives.
        """
        found = None
        if self.is_main:
            try:
                self._check(config)
                if not steal_lock and may_be_held(self.path / _LOCK):
                    found = (f"run_dir: {self.path} is in use ({_LOCK}); wait for that run, choose "
                             "another --run_dir, or, if you know that it is dead, give "
                             "--checkpoint.steal_lock")
            except UserError as error:
                found = str(error)
            except OSError as error:
                found = f"run_dir: {self.path} cannot be read ({error.strerror})"
        found = agreement.from_main(found, accelerator.device)
        differences = differences_between(config, data_fingerprint, accelerator.device)
        return differences if found is None else [*differences, found]

    def _take(self, config: str, steal_lock: bool) -> dict[str, str]:
        try:
            finished = self._check(config)
            if finished is not None:
                return {"finished": finished}
            self._is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.path / _LOCK, steal_lock, self._lose, say=terminal.say)
        except OSError as error:
            raise not_writable(self.path, error) from error
        self.notes += [self._lock.note] if self._lock.note else []
        durable.remove_leftovers(self.path)
        (self.path / _EXIT).unlink(missing_ok=True)
        return {"token": self._lock.token}

    def _check(self, config: str) -> str | None:
        """A line if this very run has finished here; raises UserError if it is another's folder."""
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise UserError(f"run_dir: {self.path} is a file; choose another --run_dir")
        if self._is_blank():
            return None
        change = change_of_length(self.path, config)
        if change is not None:
            self.notes.append(change)
            return None
        if durable.read_json(self.path / _EXIT).get("code") != 0:
            return None
        return (f"{self.path}: this run has finished. To go on, give a longer --loop.duration; for "
                "another run, choose another --run_dir or remove that folder.")

    def start(
        self, accelerator: Accelerator, config: str, step: int, log_sizes: dict[str, int]
    ) -> None:
        """Writes what a run writes at its start, and cuts the logs back to where it goes on.

        Args:
            step: 0, or that of the checkpoint.
            log_sizes: bytes of each log at that step; what follows will be written again.

        Raises:
            UserError: the folder cannot be written.
        """
        self.step = step
        if self.is_main:
            try:
                self._start(accelerator, config, step, log_sizes)
            except OSError as error:
                raise not_writable(self.path, error) from error
            journal.Journal.check = self.check_lock
        terminal.log_to(self.path / _LOG)

    def _start(
        self, accelerator: Accelerator, config: str, step: int, log_sizes: dict[str, int]
    ) -> None:
        for name in ("metrics.jsonl", "bad_steps.jsonl"):
            file, size = self.path / name, log_sizes.get(name, 0)
            if size == 0:
                file.unlink(missing_ok=True)
            elif file.exists():
                # A new file: what a run that was robbed of this folder adds goes into the old one.
                # A line that a power cut has torn goes, or the next one would be glued to it.
                whole = file.read_bytes()[:size].rpartition(b"\n")
                durable.write_bytes(file, whole[0] + whole[1])
        for name in _OF_THE_END:  # of a run that was shorter, about weights that will be gone
            (self.path / name).unlink(missing_ok=True)
        durable.remove_folder(self.path / "examples")
        machine = describe_machine(accelerator)
        start = {"time": now(), "step": step, "processes": machine["world_size"]}
        machine["starts"] = [*durable.read_json(self.path / _ENVIRONMENT).get("starts", []), start]
        self._of_the_start = {"config.yaml": config, _ENVIRONMENT: durable.as_json(machine)}
        for name, text in self._of_the_start.items():
            durable.write_text(self.path / name, text)

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Writes a file of JSON into the folder; says so if it cannot."""
        if self.is_main:
            try:
                durable.write_text(self.path / name, durable.as_json(content))
            except OSError as error:
                terminal.say(f"{name}: not written ({error.strerror or error})")

    def check_lock(self) -> None:
        """Ends the process at once if another run has taken the folder; if it was removed, makes it
        again, with what a resume needs besides checkpoints.

        Raises:
            OSError: the folder is not there.
        """
        if self._lock is None:
            return
        with self._checking:  # by who writes checkpoints, and by who writes records
            if self._lock.check():
                for name, text in self._of_the_start.items():
                    durable.write_text(self.path / name, text)
                terminal.log_to(self.path / _LOG)
                terminal.say(f"{self.path}: was removed, and is made again")

    def close(self, code: int, reason: str | None) -> None:
        """Writes ``exit.json``, if there is a reason to tell, and ends what is still going on."""
        self.exit_code = code
        if self.watchdog is not None:
            self.watchdog.begin("end")
        try:
            if reason is not None:
                self._record(code, reason)
        except OSError as error:
            print(f"exit.json cannot be written: {error}", file=sys.stderr)
        for action in self.at_exit:
            try:
                self.has_abandoned |= bool(action())
            except Exception as error:  # the end of one thing must not be that of the others
                print(f"at exit: {error}", file=sys.stderr)
        if self.watchdog is not None:
            self.watchdog.stop()
        journal.close_all()
        journal.Journal.check = None
        terminal.log_to(None)
        if self._lock is not None:
            self._lock.release()
        with suppress(OSError):
            if self._claim is not None:
                self._claim.check()
            if self._is_new and self.path.is_dir() and not any(self.path.iterdir()):
                self.path.rmdir()

    @classmethod
    def leave(cls, code: int, reason: str) -> None:
        """Ends the process at once, whatever it is doing; what was written whole stays."""
        try:
            with suppress(OSError):  # the reason is said all the same
                if cls.current is not None:
                    cls.current._record(code, reason)
            script = Path(sys.argv[0]).name
            print(f"{script}: {reason}: leaving at once", file=sys.stderr, flush=True)
        finally:
            os._exit(code)

    @classmethod
    def has_begun(cls) -> bool:
        """Whether this process has taken its run's folder."""
        return cls.current is not None and cls.current._is_open

    def _lose(self, reason: str) -> None:
        self._is_open = False  # it is the other's exit.json now
        self.leave(UserError.exit_code, reason)

    def _record(self, code: int, reason: str) -> None:
        """Writes ``exit.json``, since launchers replace a script's own exit code by 1.

        What one process alone has met, such as a broken image or a signal at start-up, is written
        by that one; the others, which miss it in their communication, do not write over it.

        Raises:
            OSError: it cannot be written, or what stands there is not this run's folder any more.
        """
        file = self.path / _EXIT
        if self._is_open:
            self._claim.check()
            may_write = not file.exists() and (self.is_main or code in _CODES_OF_ANY_PROCESS)
        else:
            may_write = code in (Preempted.exit_code, Hang.exit_code) and self._may_leave_word()
        if may_write:
            if not self._is_open:  # nor is a folder made where an opened one has gone
                self.path.mkdir(parents=True, exist_ok=True)
            entry = {"code": code, "reason": redact(reason), "step": self.step, "time": now()}
            durable.write_text(file, json.dumps(entry) + "\n")
        if self.on_behalf_of is not None:
            self.on_behalf_of._record(code, reason)

    def _may_leave_word(self) -> bool:
        """Whether a run that is stopped before it begins may say so: the folder is new, or that of
        a run that nobody goes on with at the moment and that has not finished."""
        if self._is_dry_run:
            return False
        if not self.path.exists():
            return True
        is_locked = self._lock is None and may_be_held(self.path / _LOCK)
        is_run = self._is_blank() or (self.path / "config.yaml").exists()
        return is_run and not is_locked and durable.read_json(self.path / _EXIT).get("code") != 0

    def check_free(self) -> None:
        """Refuses a folder that holds a run or other files, though not those of a sweep.

        Raises:
            UserError: as said.
        """
        if self.path.exists() and not (self.path.is_dir() and self._is_blank()):
            raise UserError(f"run_dir: {self.path} holds a run or other files; choose another "
                            "--run_dir for the sweep")

    def _is_blank(self) -> bool:
        """Whether there is nothing but the traces of a run that ended before it began."""
        traces = (".tmp_", "lr_find.", HANG_FILE)
        return all(file.name in (_EXIT, _LOCK) or file.name.startswith(traces)
                   for file in self.path.iterdir())
