"""The weights a run starts from: loaded, frozen, counted."""

import difflib
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainlib.config import UserError
from trainlib.models.inputs import INPUT_BUFFERS

_SHOWN = 8  # tensors named in a line
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")


def weights_file(path: str | Path) -> Path:
    """The safetensors file that a path means.

    Args:
        path: a file, a run folder (its ``best/`` where that exists, else ``final/``), or a folder
            with a ``model.safetensors``.

    Raises:
        UserError: none lies there.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        return path
    files = [folder / "model.safetensors" for folder in (path / "best", path / "final", path)]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise UserError(f"{path}: no .safetensors file, and no model.safetensors in best/, final/ "
                        "or the folder itself; give the folder of a run that has finished or "
                        "evaluated once")
    return found


def start_weights(
    model: nn.Module, init_from: str | None, freeze: list[str], allow_pickle: bool = False
) -> list[str]:
    """Loads and freezes what the options name.

    Args:
        model: in training mode.
        allow_pickle: whether files of torch.save are read, too, and of these tensors only.

    Returns:
        A line about each, for the log.

    Raises:
        UserError: no file, no tensor that fits, or a pattern that no parameter matches.
    """
    lines = []
    if init_from is not None:
        try:
            is_pickle = Path(init_from).suffix in _PICKLED and Path(init_from).is_file()
            if is_pickle and not allow_pickle:
                raise UserError(f"{init_from} is a pickle, which can run code; convert it to "
                                ".safetensors, or, if it is yours, give --model.allow_pickle, "
                                "which reads tensors only")
            file = Path(init_from) if is_pickle else weights_file(init_from)
            lines += [_load(model, file, _unpickled(file) if is_pickle else _tensors(file))]
        except UserError as error:
            raise UserError(f"model.init_from: {error}") from error
    if freeze:
        lines += [_freeze(model, freeze)]
    return lines


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, under the key that trainers give them, if under one."""
    try:
        # Nothing but tensors and plain containers is built; anything else is refused.
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of whatever the file makes the reader raise
        raise UserError(f"{file} cannot be read as tensors only: {type(error).__name__}; convert "
                        "it to .safetensors where it was made") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise UserError(f"{file} holds a {type(found).__name__}; a state_dict is needed")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()
            if isinstance(tensor, Tensor)}


@torch.no_grad()
def _load(model: nn.Module, file: Path, given: dict[str, Tensor]) -> str:
    # The scale of the inputs is that of the data, whatever the weights were trained on.
    given = {name: t for name, t in given.items() if name not in INPUT_BUFFERS}
    own = {name: t for name, t in model.state_dict().items() if name not in INPUT_BUFFERS}
    fits = [name for name in own if name in given and own[name].shape == given[name].shape]
    if not fits:
        raise UserError(f"none of the {len(given)} tensors in {file} has a name and shape of this "
                        f"model's; the file has {_some(list(given))}; the model has "
                        f"{_some(list(own))}")
    for name in fits:
        own[name].copy_(given[name])
    # A tied tensor is stored once, under one of its names.
    loaded = {own[name].data_ptr() for name in fits}
    reshaped = [f"{name} {list(own[name].shape)} (there {list(given[name].shape)})"
                for name in own if name in given and name not in fits]
    missing = [name for name in own if name not in given and own[name].data_ptr() not in loaded]
    surplus = [name for name in given if name not in own]
    line = f"model: {len(fits)} of {len(own)} tensors from {file}"
    for what, names in (("of another shape", reshaped), ("not there", missing),
                        ("there only", surplus)):
        line += f"; {what}: {_some(names)}" if names else ""
    return line


def _freeze(model: nn.Module, patterns: list[str]) -> str:
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            parts = {name.rsplit(".", depth)[0] for name in names for depth in range(9)}
            near = difflib.get_close_matches(pattern.strip("*."), parts, 1)
            top = list(dict.fromkeys(name.partition(".")[0] for name in names))
            hint = f"did you mean '{near[0]}*'?" if near else f"the model has {_some(top)}"
            raise UserError(f"model.freeze: no parameter matches {pattern!r}; {hint}")
    frozen = 0
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and list(module.parameters()) and not any(
            parameter.requires_grad for parameter in module.parameters()
        ):
            module.eval()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"model.freeze: {', '.join(patterns)} leaves nothing to train")
    return f"model: {frozen:,} parameters frozen by {', '.join(patterns)}"


def parameter_table(model: nn.Module) -> str:
    """Parameters, trainable ones and bytes of each part of a model, as a table.

    What several parts share is counted in the first of them. Bytes are of parameters and buffers.
    """
    parts = {f"{name} ({type(part).__name__})": part for name, part in model.named_children()}
    rows, counted = [], set()
    for name, part in [*parts.items(), ("(own)", model)]:
        new = {id(t): t for t in (*part.parameters(), *part.buffers()) if id(t) not in counted}
        counted |= new.keys()
        parameters = [t for t in new.values() if isinstance(t, nn.Parameter)]
        rows += [(
            name, sum(p.numel() for p in parameters),
            sum(p.numel() for p in parameters if p.requires_grad),
            sum(t.numel() * t.element_size() for t in new.values()),
        )]
    total = [sum(column) for column in list(zip(*rows, strict=True))[1:]]
    rows = [row for row in rows if row[-1]] + [("total", *total)]
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'model':<{width}}  {'parameters':>14}  {'trainable':>14}  {'bytes':>16}"]
    lines += [f"{name:<{width}}  {count:>14,}  {trainable:>14,}  {size:>16,}"
              for name, count, trainable, size in rows]
    return "\n".join(lines)


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
