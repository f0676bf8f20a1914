"""When a checkpoint is taken, what goes into it, and how many are kept."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import accelerate
import torch
from accelerate import Accelerator
from pydantic import AfterValidator, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trainlib import agreement, durable, journal, shards
from trainlib.checkpoint.background import BackgroundWriter, Files
from trainlib.checkpoint.layout import (
    CONFIG,
    EMA,
    FORMAT,
    MODEL,
    OPTIMIZER,
    STATE,
    TRAINING_ONLY,
    step_folder,
    step_folders,
)
from trainlib.checkpoint.start import Start, find_newest
from trainlib.checkpoint.state import describe, model_tensors, optimizer_state
from trainlib.config import Options, UserError
from trainlib.schedule import check_interval, interval, is_time
from trainlib.user_code import describe_error

if TYPE_CHECKING:
    from trainlib.ema import Ema
    from trainlib.progress import Progress

Describe = Callable[[str, dict[str, Any], dict[str, dict]], Callable[[], dict[str, str]]]


class CheckpointOptions(Options):
    every: Annotated[str, AfterValidator(check_interval)] = "5 minutes"
    """Time between checkpoints, as "10 minutes", "1 epoch", "500 steps" or "5%" of the run; one is
    also written at the end and when the run is told to stop."""
    keep: int = Field(2, ge=1)
    """How many checkpoints are kept, the newest ones."""
    steal_lock: bool = False
    """Take the run folder from another process without waiting for a sign of life."""


class SaveFailed(Exception):
    """What the run is for could not be written: exit code 4."""

    exit_code = 4


class Checkpoints:
    """The checkpoints and exports of one run, written by the main process."""

    def __init__(
        self, run_dir: Path, accelerator: Accelerator, options: CheckpointOptions,
        total_steps: int, num_samples: int, identity: dict[str, Any], config: str,
    ):
        """
        Args:
            identity: by option, what must be the same before and after an interruption; ``data``
                is the data's fingerprint.
            config: the resolved options as YAML.
        """
        self.run_dir, self.folder = run_dir, run_dir / "checkpoints"
        self.accelerator = accelerator
        self.is_main, self.keep = accelerator.is_main_process, options.keep
        self.total_steps, self.identity, self.config = total_steps, identity, config
        self.every_steps, self.every_seconds = interval(
            options.every, num_samples, identity["batch.global_size"], total_steps
        )
        self.logs = [run_dir / name for name in ("metrics.jsonl", "bad_steps.jsonl")]
        self.last_step = 0  # of the newest checkpoint, or of the start
        self._damaged: list[Path] = []
        self._writer: BackgroundWriter | None = None

    def find_start(self, module: nn.Module) -> Start:
        """The newest checkpoint that verifies, on every process, if there has been one.

        Args:
            module: which it has to fit.

        Raises:
            UserError: all are damaged, or it belongs to another run; nothing has been touched.
        """
        try:
            tensors = describe(model_tensors(module))
        except ValueError as error:
            raise UserError(f"model: {error}") from error
        found: dict[str, Any] = {}
        if self.is_main:
            found = find_newest(self.folder, self.identity, tensors, self.total_steps)
        found = agreement.from_main(found, self.accelerator.device)
        notes = [f"checkpoints/{name} is damaged and left out: {why}"
                 for name, why in found["damaged"].items()]
        if "refused" in found:
            raise UserError("\n".join([*notes, found["refused"]]))
        if "name" not in found:
            return Start(None, {}, [])
        state = found["state"]
        self.last_step = state["step"]
        self._damaged = [self.folder / name for name in found["damaged"]]
        notes.append(f"resumed at step {self.last_step} of {self.total_steps}, from "
                     f"checkpoints/{found['name']}")
        notes += [
            f"{name}: {before} before, {now} now: the curve may differ from here on"
            for name, now in self._machine().items() if (before := state["machine"][name]) != now
        ]
        return Start(self.folder / found["name"], state, notes)

    def open(
        self, say: Callable[[str], object], check_lock: Callable[[], object],
        describe: Describe | None = None,
    ) -> None:
        """Starts to write.

        Args:
            say: told in a line of what could not be written.
            check_lock: ends the process if the folder is no longer this run's; raises ``OSError``
                where it is not there.
            describe: from the arguments of an export but its module to what makes further files,
                by name, while training goes on.
        """
        self._writer, self._check_lock = BackgroundWriter(say), check_lock
        self._say, self._describe = say, describe

    def is_due(self, step: int, is_asked: bool = False) -> bool:
        """Whether a checkpoint is to be written after ``step`` steps and there is none yet."""
        is_due = is_asked or is_time(step, self.every_steps, self.total_steps)
        return is_due and step > self.last_step

    def save(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, ema: "Ema | None",
        progress: "Progress",
    ) -> None:
        """Takes a checkpoint after ``progress.step`` steps: copies it now, writes it meanwhile.

        Raises:
            UserError: the model or the optimizer keeps what no checkpoint can hold.
        """
        self.last_step = progress.step
        try:  # on all processes, so that all end alike
            optimizer_tensors, packed = optimizer_state(optimizer, module)
            files = {MODEL: model_tensors(module), OPTIMIZER: optimizer_tensors}
        except ValueError as error:
            raise UserError(f"checkpoint: {error}") from error
        if ema is not None:
            files[EMA] = ema.tensors()
        if shards.is_sharded(module):
            files = {file: shards.gathered(each, self.is_main) for file, each in files.items()}
        if not self.is_main:
            return
        state = {
            "format": FORMAT, "step": progress.step, "identity": self.identity,
            "progress": asdict(progress), "optimizer": packed,
            "scaler": scaler.state_dict() if (scaler := self.accelerator.scaler) else {},
            "logs": (log_sizes := {log.name: journal.size(log) for log in self.logs}),
            "machine": self._machine() | {"world_size": self.accelerator.num_processes},
            "tensors": {file: describe(tensors) for file, tensors in files.items()},
        }
        texts = {STATE: json.dumps(state), CONFIG: self.config}
        parameters = {name for name, _ in module.named_parameters()}
        target = step_folder(self.folder, progress.step)
        self._writer.submit(
            "checkpoint", f"checkpoints/{target.name}", files,
            lambda copies: self._write(target, _writers(copies, texts, parameters), log_sizes),
        )

    def export(
        self, name: str, module: nn.Module, labels: dict[str, list[str] | dict],
        results: dict[str, dict],
    ) -> None:
        """Writes what ``load_model`` needs, and how good it is, as ``best`` or ``final``.

        Args:
            module: the module inside any wrapper, with the weights to write.
            labels: by task, the names of classes, or what undoes a regression's scale.
            results: its evaluation by task.
        """
        if not self.is_main and not shards.is_sharded(module):
            return
        parameters = {name for name, _ in module.named_parameters()}
        tensors = {name: tensor for name, tensor in model_tensors(module).items()
                   if not name.startswith(TRAINING_ONLY)}
        if shards.is_sharded(module):
            tensors = shards.gathered(tensors, self.is_main)
        if not self.is_main:
            return
        texts = {CONFIG: self.config, "labels.json": durable.as_json(labels),
                 "evaluation.json": durable.as_json(results)}
        described = self._describe and self._describe(name, labels, results)

        def write(copies: Files) -> None:
            writers = _writers(copies, self._more_texts(described, name) | texts, parameters)
            self._check_lock()
            durable.write_folder(self.run_dir / name, writers, with_manifest=False)

        self._writer.submit(name, f"{name}/", {MODEL: tensors}, write)

    @torch.no_grad()
    def load_best(self, module: nn.Module) -> None:
        """Puts the weights of ``best/``, once it has been written, into the module."""
        file = self.run_dir / "best" / MODEL
        if not agreement.from_main(self.is_main and file.exists(), self.accelerator.device):
            raise SaveFailed(f"{file} is gone: the weights at the end and a checkpoint of them are "
                             "written, the best ones are lost")
        opened = safe_open(file, "pt") if self.is_main else None
        for name, own in model_tensors(module).items():
            if not name.startswith(TRAINING_ONLY):
                shards.fill(own, agreement.tensor_from_main(
                    opened.get_tensor(name) if self.is_main else None,
                    str(own.dtype).removeprefix("torch."), list(own.shape), self.accelerator.device,
                ))

    def wait(self) -> None:
        """Waits until this process has written what it was given."""
        if self._writer is not None:
            self._writer.wait()

    def finish(self) -> None:
        """Waits, on all processes, until everything has been written.

        Raises:
            SaveFailed: something has not.
        """
        self.wait()
        failures = list(self._writer.failures.values()) if self.is_main and self._writer else []
        failures = agreement.from_main(failures, self.accelerator.device)
        if failures:
            raise SaveFailed(f"not written: {'; '.join(failures)}; mend that, and run the same "
                             "command again: what was written before stands")

    def _write(
        self, target: Path, writers: dict[str, Callable[[Path], object]], log_sizes: dict[str, int]
    ) -> None:
        self._check_lock()
        # A checkpoint says which weights are the best: best/ has to hold them before.
        self._writer.retry("best", is_lost=not (self.run_dir / "best").exists())
        durable.remove_leftovers(self.folder)
        for path in self._damaged:
            durable.remove_folder(path)
        self._damaged = []
        for log in self.logs:  # which state.json counts on: no line of them may wait in memory
            journal.flush(log, log_sizes[log.name])
            durable.sync_file(log)
        durable.write_folder(target, writers)
        whole = step_folders(self.folder)  # older ones go only now that a newer one is safe
        for path in whole[: whole.index(target) + 1][: -self.keep]:
            durable.remove_folder(path)

    def _more_texts(
        self, described: Callable[[], dict[str, str]] | None, name: str
    ) -> dict[str, str]:
        """The files that describe an export; whatever is wrong with them costs no weights."""
        try:
            return described() if described is not None else {}
        except Exception as error:
            self._say(f"{name}/README.md: not written ({describe_error(error)})")
            return {}

    def _machine(self) -> dict[str, str]:
        """What may change bits where it changes."""
        return {"precision": self.accelerator.mixed_precision,
                "device": self.accelerator.device.type,
                "torch": torch.__version__, "accelerate": accelerate.__version__}


def _writers(
    files: Files, texts: dict[str, str], parameters: set[str]
) -> dict[str, Callable[[Path], object]]:
    """A writer for each file.

    Raises:
        OSError: a parameter is not finite.
    """
    for tensors in files.values():
        for name, tensor in tensors.items():
            if name in parameters and not tensor.isfinite().all():
                raise OSError(f"{name} is not finite, and worth nothing")

    def writer(content: dict[str, Tensor] | str) -> Callable[[Path], object]:
        if isinstance(content, str):
            return lambda path: path.write_text(content, encoding="utf-8")
        return lambda path: _save_tensors(content, path)

    return {name: writer(content) for name, content in (files | texts).items()}


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        # Copies lie in memory as what they were copied from; a file knows one order.
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # a full disk, say, in other words
        raise OSError(str(error)) from error
