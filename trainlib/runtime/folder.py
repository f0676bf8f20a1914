"""The folder of one run: whose it is, and what stands in it besides checkpoints and models."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from trainlib import agreement, durable, terminal
from trainlib.config import UserError, flatten, is_first_process, parse_yaml
from trainlib.credentials import redact
from trainlib.runtime.lock import RunLock, may_be_held
from trainlib.runtime.machine import describe_machine, now, read_json
from trainlib.runtime.restarts import refuse_restart
from trainlib.runtime.signals import Preempted

_EXIT, _LOCK, _LOG, _ENVIRONMENT = "exit.json", "run.lock", "log.txt", "environment.json"
_OF_THE_END = ("predictions.csv", "loss_by_position.csv", "report.html")
OUT_OF_MEMORY = 6  # the exit code
_CODES_OF_ANY_PROCESS = (UserError.exit_code, Preempted.exit_code, OUT_OF_MEMORY)
# Options that may differ when a run goes on: they change no weight. With these it says so.
_FREE_OPTIONS = ("run_dir", "log.", "data.workers", "data.in_memory", "checkpoint.",
                 "distill.cache_dir", "distill.baseline")
_LENGTHS = ("loop.duration", "loop.patience")
# Options that may differ between machines of one run: the data's fingerprint covers them.
_LOCAL_OPTIONS = (*_FREE_OPTIONS, "data.source", "data.validation_split")


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
        self.notes: list[str] = []
        """Lines for the log."""
        self.at_exit: list[Callable[[], object]] = []
        """Called, in order, before the process ends for whatever reason; one that answers yes has
        left something that may hold the process back."""
        self.has_abandoned = False
        self._lock: RunLock | None = None
        self._is_new = self._is_open = False
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
        differences = _differences(config, data_fingerprint, device)
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
        differences = _differences(config, data_fingerprint, accelerator.device)
        return differences if found is None else [*differences, found]

    def _take(self, config: str, steal_lock: bool) -> dict[str, str]:
        try:
            finished = self._check(config)
            if finished is not None:
                return {"finished": finished}
            self._is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.path / _LOCK, steal_lock, self._lose)
        except OSError as error:
            raise UserError(f"run_dir: {self.path} cannot be written ({error.strerror}); choose "
                            "another --run_dir") from error
        self.notes += [self._lock.note] if self._lock.note else []
        durable.remove_leftovers(self.path)
        (self.path / _EXIT).unlink(missing_ok=True)
        return {}

    def _check(self, config: str) -> str | None:
        """A line if this very run has finished here; raises UserError if it is another's folder."""
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise UserError(f"run_dir: {self.path} is a file; choose another --run_dir")
        if self._is_blank():
            return None
        try:
            found = flatten(parse_yaml((self.path / "config.yaml").read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
            raise UserError(f"run_dir: {self.path} holds files but no run (config.yaml); choose "
                            "another --run_dir") from error
        wanted = flatten(parse_yaml(config))
        changed = {
            name: f"{name} ({found.get(name, 'unset')} there, {wanted.get(name, 'unset')} here)"
            for name in sorted(found | wanted)
            if found.get(name) != wanted.get(name) and not name.startswith(_FREE_OPTIONS)
        }
        if found.get("optim.lr") == "auto" and not (self.path / "checkpoints").exists():
            changed.pop("optim.lr", None)  # its sweep found none, and asked for a number
        refused = [line for name, line in changed.items() if name not in _LENGTHS]
        if refused:
            raise UserError(
                f"run_dir: {self.path} holds the run of another recipe: {', '.join(refused)}; "
                "choose another --run_dir, or remove that folder"
            )
        if changed:
            self.notes.append(f"goes on with another length: {', '.join(changed.values())}")
            return None
        if self._former_exit().get("code") != 0:
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
        """
        self.step = step
        if not self.is_main:
            terminal.log_to(self.path / _LOG)
            return
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
        durable.write_text(self.path / "config.yaml", config)
        machine = describe_machine(accelerator)
        start = {"time": now(), "step": step, "processes": machine["world_size"]}
        machine["starts"] = [*read_json(self.path / _ENVIRONMENT).get("starts", []), start]
        self.write(_ENVIRONMENT, machine)
        terminal.log_to(self.path / _LOG)

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Writes a file of JSON into the folder."""
        if self.is_main:
            durable.write_text(self.path / name, json.dumps(content, indent=1) + "\n")

    def check_lock(self) -> None:
        """Ends the process at once if another run has taken the folder."""
        if self._lock is not None:
            self._lock.check()

    def close(self, code: int, reason: str | None) -> None:
        """Writes ``exit.json``, if there is a reason to tell, and ends what is still going on."""
        self.exit_code = code
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
        terminal.log_to(None)
        if self._lock is not None:
            self._lock.release()
        if self._is_new and self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    @classmethod
    def leave(cls, code: int, reason: str) -> None:
        """Ends the process at once, whatever it is doing; what was written whole stays."""
        try:
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
        """
        file = self.path / _EXIT
        if self._is_open:
            may_write = not file.exists() and (self.is_main or code in _CODES_OF_ANY_PROCESS)
        else:
            may_write = code == Preempted.exit_code and self._may_leave_word()
        if may_write:
            self.path.mkdir(parents=True, exist_ok=True)
            entry = {"code": code, "reason": redact(reason), "step": self.step, "time": now()}
            durable.write_text(file, json.dumps(entry) + "\n")

    def _may_leave_word(self) -> bool:
        """Whether a run that is stopped before it begins may say so: the folder is new, or that of
        a run that nobody goes on with at the moment and that has not finished."""
        if self._is_dry_run:
            return False
        if not self.path.exists():
            return True
        is_locked = self._lock is None and may_be_held(self.path / _LOCK)
        is_run = self._is_blank() or (self.path / "config.yaml").exists()
        return is_run and not is_locked and self._former_exit().get("code") != 0

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
        return all(file.name in (_EXIT, _LOCK) or file.name.startswith((".tmp_", "lr_find."))
                   for file in self.path.iterdir())

    def _former_exit(self) -> dict[str, Any]:
        return read_json(self.path / _EXIT)


def _differences(config: str, data_fingerprint: str, device: torch.device) -> list[str]:
    """A line each if the processes have been given different recipes, and different data."""
    lines = []
    if not agreement.is_same_everywhere(_shared_options(config), device):
        lines.append("the processes were given different options; start all with one recipe and "
                     "the same flags")
    if not agreement.is_same_everywhere(data_fingerprint, device):
        lines.append("data.source: the processes see different data; every machine needs the same "
                     "rows in the same order")
    return lines


def _shared_options(config: str) -> str:
    """The options that must be the same on all processes."""
    options = flatten(parse_yaml(config))
    shared = {k: v for k, v in options.items() if not k.startswith(_LOCAL_OPTIONS)}
    return json.dumps(shared, sort_keys=True)
