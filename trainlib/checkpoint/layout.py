"""What a checkpoint's files are called."""

import re
from pathlib import Path

FORMAT = 1
MODEL, OPTIMIZER, EMA = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
STATE, CONFIG = "state.json", "config.yaml"
# Of a module by this name: what helps to train a model and is no part of it; not exported.
TRAINING_ONLY = "training_only."
_STEP = re.compile(r"step_([0-9]{8,})")


def step_folder(folder: Path, step: int) -> Path:
    """The checkpoint after so many steps."""
    return folder / f"step_{step:08}"


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints that there are, by step."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir()
             if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]
