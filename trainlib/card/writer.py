"""From a run to the files that describe an export."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import numpy as np
import torch
from torch import nn

from trainlib import durable, terminal
from trainlib.card.facts import Export, Facts, public
from trainlib.card.loading import TOKENIZER
from trainlib.card.metadata import front_matter
from trainlib.card.sections import PENDING, card_text, comparison
from trainlib.card.targets import target_lines
from trainlib.config import parse_yaml

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trainlib.data import Dataset
    from trainlib.models import Portable
    from trainlib.progress import Progress

CARD = "README.md"
_MAX_TOKENIZER_BYTES = 20 * 2**20


class ModelCard:
    """Describes the exports of one run."""

    def __init__(
        self, run_dir: Path, accelerator: Accelerator, config: str, dataset: Dataset,
        fingerprint: str, portable: Portable, module: nn.Module, state: Progress,
        metrics_of: Callable[[dict[str, dict]], dict[str, float]], total_steps: int,
    ):
        """
        Args:
            config: the resolved options as YAML.
            module: before it is prepared for several processes.
            state: asked for the step and the learning rate at each export.
            metrics_of: from results by task to what is logged.
        """
        self.run_dir, self.state, self.metrics_of = run_dir, state, metrics_of
        self._dataset, self._tokenizer = dataset, None
        self._is_main = accelerator.is_main_process
        inputs, _ = dataset.example()
        is_encoded = dataset.train.read(np.arange(1))[0].dtype == torch.uint8
        options = parse_yaml(config)
        parameters = list(module.parameters())
        num_training = len(dataset.train)
        self.facts = Facts(
            name=run_dir.resolve().name, config=options, portable=portable,
            num_parameters=sum(p.numel() for p in parameters),
            num_trained=sum(p.numel() for p in parameters if p.requires_grad),
            shape=tuple(inputs.shape[1:]), is_float=inputs.is_floating_point(),
            is_encoded=is_encoded,
            columns=dataset.inputs, token_range=dataset.token_range, pad_id=dataset.pad_id,
            # Of the line for the log, what does not depend on the machine.
            description=dataset.description.removeprefix("data: ").partition(
                f"; {num_training:,} training and ")[0],
            targets=target_lines(dataset, options["tasks"], tuple(inputs.shape[1:])),
            fingerprint=fingerprint, num_training=num_training,
            num_validation=len(dataset.validation), total_steps=total_steps,
            versions=_versions(
                [*portable.packages, *(["pillow"] if is_encoded else [])]),
            device=(torch.cuda.get_device_name(accelerator.device)
                    if accelerator.device.type == "cuda" else accelerator.device.type),
            precision=accelerator.mixed_precision, num_processes=accelerator.num_processes,
            teachers=[_teacher(each) for each in _teachers(options)],
        )

    def texts(
        self, which: str, labels: dict[str, list[str] | dict], results: dict[str, dict]
    ) -> Callable[[], dict[str, str]]:
        """What makes the files of an export, by name, as of now, whenever it is called.

        Args:
            which: best or final.
        """
        step, peak_lr = self.state.step, self.state.peak_lr
        peak_lr = self.facts.config["optim"]["lr"] if peak_lr is None else peak_lr

        def make() -> dict[str, str]:
            environment = durable.read_json(self.run_dir / "environment.json")
            search = durable.read_json(self.run_dir / "lr_find.json")
            tokenizer = self._tokenizer_file()
            is_found = search.get("suggestion") == peak_lr and "verdict" in search
            export = Export(
                which=which, labels=labels, metrics=self.metrics_of(results), step=step,
                peak_lr=peak_lr, lr_search=search if is_found else {},
                starts=environment.get("starts", []), commit=environment.get("git_commit"),
                tokenizer=next(iter(tokenizer), None),
            )
            text = self.facts.public(card_text(self.facts, export))
            card = f"---\n{front_matter(self.facts, export)}\n---\n\n{text}"
            return {CARD: card} | self.facts.portable.files | tokenizer

        return make

    def add_comparison(self, report: dict[str, Any]) -> None:
        """Puts into the card of the best weights how they compare with the teachers, if it can.

        Args:
            report: what stands in ``distillation.json``.
        """
        if not self._is_main:
            return
        file = self.run_dir / "best" / CARD
        try:
            text = file.read_text(encoding="utf-8")
            if PENDING in text:
                durable.write_text(file, text.replace(PENDING, public(comparison(report))))
        except OSError as error:
            terminal.say(f"best/{CARD}: the comparison could not be added "
                         f"({error.strerror or error})")

    def _tokenizer_file(self) -> dict[str, str]:
        """The tokenizer's file, if it has one of a moderate size; read once."""
        if self._tokenizer is None:
            text = self._dataset.tokenizer_json()
            is_small = text is not None and len(text.encode()) <= _MAX_TOKENIZER_BYTES
            self._tokenizer = {TOKENIZER: text} if is_small else {}
        return self._tokenizer


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python and of what computes; of packages only where they are known by these names."""
    found = {"python": platform.python_version(), "torch": torch.__version__,
             "accelerate": accelerate.__version__}
    for package in packages:
        with suppress(metadata.PackageNotFoundError, ValueError):
            found[package] = metadata.version(package)
    return found


def _teachers(options: dict[str, Any]) -> list[dict[str, Any]]:
    chosen = options.get("distill") or {}
    is_asked = chosen.get("kd_weight", 0) > 0 or chosen.get("features")
    return chosen.get("teachers") or [] if is_asked else []


def _teacher(options: dict[str, Any]) -> dict[str, Any]:
    """What a teacher is, and its evaluation if it is a run."""
    if options["ema"]:
        return {"what": "the average of the student's own weights", "metrics": {}}
    if options["run"] is None:
        weights = f" with the weights in `{options['weights']}`" if options["weights"] else ""
        return {"what": f"`{options['model'].get('name')}`{weights}", "metrics": {}}
    folder = Path(options["run"])
    found = next((each for each in (folder / "best", folder / "final", folder)
                  if (each / "model.safetensors").is_file()), folder)
    results = durable.read_json(found / "evaluation.json")
    metrics = {
        f"{task}/{name}" if len(results) > 1 else name: value
        for task, result in results.items() if isinstance(result, dict)
        for name, value in result.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    try:
        net = parse_yaml((found / "config.yaml").read_text(encoding="utf-8"))["model"]["name"]
    except Exception:  # a folder of weights alone, or of another make
        net = None
    return {"what": f"`{options['run']}`" + (f", a `{net}`" if net else ""), "metrics": metrics}
