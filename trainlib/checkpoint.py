"""Writing trained models: tensors in safetensors, the rest in text, never a pickle."""

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import save_model
from torch import nn


def export(
    folder: Path, model: nn.Module, config: str, labels: dict[str, list[str] | dict],
    results: dict[str, dict],
) -> None:
    """Writes what ``load_model`` needs and how good it is; complete, it replaces an earlier one.

    Args:
        folder: ``best/`` or ``final/`` of a run.
        model: the module inside any wrapper.
        config: the resolved options as YAML.
        labels: by task, the names of classes, or what undoes a regression's scale.
        results: the last evaluation by task, for ``evaluation.json``.
    """
    new, old = (folder.with_name(f".{state}_{folder.name}") for state in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    save_model(model, str(new / "model.safetensors"))
    (new / "config.yaml").write_text(config, encoding="utf-8")
    (new / "labels.json").write_text(json.dumps(labels, indent=1) + "\n", encoding="utf-8")
    (new / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)
