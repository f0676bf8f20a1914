"""A run that has been trained, as programs need it that go on from there.

A run folder, or its ``best/`` or ``final/`` alone, copied anywhere: the net with its weights, and
the options that it was trained with. Of a run of ``distill.py``, too; its teachers are not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import nn

from trainlib.config import Options, UserError
from trainlib.data import BatchOptions, DataOptions
from trainlib.models import ModelOptions, load_model
from trainlib.models.weights import weights_file
from trainlib.tasks import TaskOptions

WEIGHTS = ("best", "final")
_VOCABULARY = ("vocab_size", "num_tokens", "num_embeddings")

_Options = TypeVar("_Options", bound=Options)


class Finished:
    """The net of a run in eval mode, and what the run has written beside it."""

    def __init__(self, run: str | Path, weights: str | None = None, device: str = "cpu"):
        """
        Args:
            run: a run folder, or a folder with model.safetensors, config.yaml and labels.json.
            weights: ``best`` or ``final`` of a run folder; none: the best, if there are such.
            device: of torch.

        Raises:
            UserError: no trained model lies there, its net cannot be built, or there is no such
                device.
        """
        run = Path(run)
        if not run.exists():
            raise UserError(f"{run}: no such folder; give a run folder, or its best/ or final/")
        if weights is not None and not (run / weights / "model.safetensors").is_file():
            if run.resolve().name != weights:
                raise UserError(f"{run}: has no {weights}/model.safetensors; leave --weights out, "
                                "or give the folder of a run that has finished")
            weights = None
        self.device = _device(device)
        self.folder = weights_file(run / weights if weights else run).parent
        module = load_model(self.folder)
        self.module: nn.Module = module.to(self.device)
        self.config: dict[str, Any] = module.run_config
        self.labels: dict[str, list[str] | dict] = module.label_names
        self.model = self._read(ModelOptions, self.config, "model")
        self.kinds: dict[str, str] = {
            name: task.get("kind", "classification")
            for name, task in (self.config.get("tasks") or {}).items()
        }
        """By task."""
        if not isinstance(self.labels, dict) or not all(
                isinstance(names, list | dict) for names in self.labels.values()):
            raise UserError(f"{self.folder}/labels.json: a list of labels by task is needed, as "
                            "the run wrote it")
        if self.kinds.keys() != self.labels.keys():
            raise UserError(f"{self.folder}: config.yaml has the tasks {', '.join(self.kinds)}, "
                            f"labels.json {', '.join(self.labels)}; both belong to one run")
        self._check_labels()

    def _check_labels(self) -> None:
        for name, labels in self.labels.items():
            known = self.model.args.get("classes")
            count = known.get(name) if isinstance(known, dict) else known
            is_binary = self.config["tasks"][name].get("loss") == "bce"
            if isinstance(labels, list) and labels and isinstance(count, int) and not is_binary:
                if len(labels) != count:
                    raise UserError(f"{self.folder}/labels.json: {name} has {len(labels)} labels, "
                                    f"the net {count} outputs; both belong to one run")

    def data(self) -> DataOptions:
        """What the run was trained on."""
        return self._read(DataOptions, self.config, "data")

    def batch(self) -> BatchOptions:
        """The run's batches."""
        return self._read(BatchOptions, self.config, "batch")

    def tasks(self) -> dict[str, TaskOptions]:
        """The run's tasks by name; their losses, be they of the user's own, are imported."""
        options = self.config["tasks"]
        return {name: self._read(TaskOptions, options, name, "tasks.") for name in options}

    @property
    def vocab_size(self) -> int | None:
        """How many tokens the net knows, where its arguments say it."""
        args = self.model.args
        for given in (args, args.get("config")):
            for name in _VOCABULARY if isinstance(given, dict) else ():
                if isinstance(given.get(name), int):
                    return given[name]
        return None

    def _read(
        self, kind: type[_Options], options: dict[str, Any], name: str, prefix: str = ""
    ) -> _Options:
        try:
            return kind.model_validate(options.get(name) or {})
        except ValidationError as error:
            mistakes = "; ".join(
                ".".join(map(str, ("", *e["loc"]))) + ": " + e["msg"].removeprefix("Value error, ")
                for e in error.errors())
            raise UserError(f"{self.folder}/config.yaml: {prefix}{name}{mistakes}") from error


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # torch raises AssertionError, RuntimeError and others
        said = " ".join(str(error).split())[:160]
        raise UserError(f"--device: {name} cannot be used here ({said}); try cpu") from error
    return device
