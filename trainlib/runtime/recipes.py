"""Whether it is the same recipe: of the run in a folder and of this one, of all processes."""

import json
from pathlib import Path

import torch
import yaml

from trainlib import agreement
from trainlib.config import UserError, flatten, parse_yaml

# Options that may differ when a run goes on: they change no weight. With these it says so.
_FREE_OPTIONS = ("run_dir", "log.", "data.workers", "data.in_memory", "checkpoint.", "comm.",
                 "distill.cache_dir", "distill.baseline",
                 "model.input_")  # of the data, whose fingerprint covers it; older runs lack it
_LENGTHS = ("loop.duration", "loop.patience")
# Options that may differ between machines of one run: the data's fingerprint covers them.
_LOCAL_OPTIONS = (*_FREE_OPTIONS, "data.source", "data.validation_split")


def change_of_length(folder: Path, config: str) -> str | None:
    """A line if the recipe of the run in a folder differs from ``config`` (YAML) in its length.

    Raises:
        UserError: it differs in more, or there is no run.
    """
    try:
        found = flatten(parse_yaml((folder / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"run_dir: {folder} holds files but no run (config.yaml); choose "
                        "another --run_dir") from error
    wanted = flatten(parse_yaml(config))
    changed = {
        name: f"{name} ({found.get(name, 'unset')} there, {wanted.get(name, 'unset')} here)"
        for name in sorted(found | wanted)
        if found.get(name) != wanted.get(name) and not name.startswith(_FREE_OPTIONS)
    }
    if found.get("optim.lr") == "auto" and not (folder / "checkpoints").exists():
        changed.pop("optim.lr", None)  # its sweep found none, and asked for a number
    refused = [line for name, line in changed.items() if name not in _LENGTHS]
    if refused:
        raise UserError(
            f"run_dir: {folder} holds the run of another recipe: {', '.join(refused)}; "
            "choose another --run_dir, or remove that folder"
        )
    return f"goes on with another length: {', '.join(changed.values())}" if changed else None


def differences_between(config: str, data_fingerprint: str, device: torch.device) -> list[str]:
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
