"""How a net is had without this repository: its source, and the lines that build it."""

from __future__ import annotations

import ast
import pprint
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file, load_model
from torch import nn

from trainlib.credentials import redact
from trainlib.models.bundle import bundle
from trainlib.models.external import BUILTIN, without_pretrained
from trainlib.models.inputs import INPUT_BUFFERS, scale_inputs

if TYPE_CHECKING:
    from trainlib.models import ModelOptions

NET = "net.py"
_RENAMED = "own_net.py"
_MAX_BYTES = 2**20  # of a net of the user's own that is copied
_HEADER = """\
# Of One Curve. SPDX-License-Identifier: Apache-2.0
# {what}; needs torch and safetensors only.

"""


def load_weights(model: nn.Module, file: str, channels_last: bool = False) -> nn.Module:
    """The net with the weights of a file, in eval mode; it scales its inputs as in training.

    Args:
        channels_last: lay images and kernels out with channels last, as in training.
    """
    tensors = load_file(file)
    mean, deviation = (tensors.get(name) for name in INPUT_BUFFERS)
    scale_inputs(model, mean, deviation, channels_last)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    load_model(model, file)
    return model.eval()


def pick(output: Any, task: str) -> Any:
    """A task's part of what a net returned: a tensor, a mapping, or an output with logits."""
    for key in (task, "logits", "out"):
        try:
            return output[key]
        except (KeyError, IndexError, TypeError):
            continue
    return output


class Portable(NamedTuple):
    """What builds a net without this repository."""

    files: dict[str, str]
    """By name, sources that lie beside the weights."""
    lines: list[str]
    """Of a program: imports first, and at the end ``model``, in eval mode."""
    pick: str
    """An expression for a task's part of ``output``, with ``{task}`` for its name in quotes."""
    packages: list[str]
    """What has to be installed or found, besides torch and safetensors."""
    notes: list[str]
    """Sentences about what else it takes, or why it cannot be done."""


def portable(options: ModelOptions, module: nn.Module) -> Portable:
    """What builds the net of complete options without this repository.

    Args:
        module: that they have built.
    """
    library, _, name = options.name.partition(":")
    args = without_pretrained(options)
    helpers, after, packages, notes = ["load_weights"], [], [], []
    files: dict[str, str] = {}
    picked, imports = "pick(output, {task})", []
    wanted = [("models.portable", "load_weights"), ("models.portable", "pick")]
    if options.name in BUILTIN:
        net = BUILTIN[options.name]
        wanted = [(net.__module__.partition(".")[2], net.__name__), wanted[0]]
        picked = "output[{task}]" if isinstance(args.get("classes"), dict) else "output"
        helpers = [net.__name__, *helpers]
        build = _call(net.__name__, args)
    elif library == "timm":
        packages, imports, picked = ["timm"], ["import timm"], "output"
        build = _call("timm.create_model", args, repr(name))
    elif library == "torchvision":
        packages, imports = ["torchvision"], ["import torchvision"]
        build = _call("torchvision.models.get_model", args, repr(name))
    elif library == "transformers":
        packages, picked = ["transformers"], "output.logits"
        imports = [f"from transformers import AutoConfig, {name}"]
        build = f"{name}.from_config({_call('AutoConfig.for_model', args['config'])})"
        if any(getattr(hook, "__name__", "") == "mask_padding"
               for hook in module._forward_pre_hooks.values()):
            wanted.append(("models.external", "mask_padding"))
            helpers.append("mask_padding")
            after = ["model.register_forward_pre_hook(mask_padding, with_kwargs=True)"]
    else:
        files, packages, notes = _own(library)
        source = next(iter(files), library).removesuffix(".py")
        imports, build = [f"from {source} import {name}"], _call(name, args)
    if picked.startswith("pick"):
        helpers.append("pick")
    try:
        text = bundle(wanted)
    except (ValueError, SyntaxError, OSError) as error:
        return Portable(files, [], picked, packages, [
            *notes, f"The net's source could not be put together ({error}): use "
            "trainlib.models.load_model."])
    what = (f"The net {options.name!r} of this model" if options.name in BUILTIN else
            "What loads the weights of this model")
    last = ", channels_last=True" if options.channels_last else ""
    files[NET] = _HEADER.format(what=what) + text
    lines = [*imports, *[""] * bool(imports), f"from net import {', '.join(sorted(helpers))}", "",
             f"model = {build}", f'model = load_weights(model, "model.safetensors"{last})', *after]
    return Portable(files, lines, picked, packages, notes)


def _call(function: str, args: dict[str, Any], first: str = "") -> str:
    """A call with keywords, over several lines where one is too long."""
    def text(value: Any, width: int) -> str:
        return pprint.pformat(value, width=width, sort_dicts=False, compact=True)

    given = [first] if first else []
    if all(name.isidentifier() for name in args):
        given += [f"{name}={value!r}" for name, value in args.items()]
        long = [first] * bool(first) + [
            f"{name}=" + text(value, 80).replace("\n", "\n    " + " " * (len(name) + 1))
            for name, value in args.items()]
    else:
        given.append(f"**{args!r}")
        long = [first] * bool(first) + [f"**{text(args, 80)}"]
    line = f"{function}({', '.join(given)})"
    if len(line) <= 90:
        return line
    return f"{function}(\n    " + ",\n    ".join(long) + ",\n)"


def _own(source: str) -> tuple[dict[str, str], list[str], list[str]]:
    """The file of a net of the user's own, what else has to be there, and what is to be said."""
    if not source.endswith(".py"):
        return {}, [source], [f"The net is a class or function of the package {source}, which is "
                              "not part of this folder."]
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError) as error:
        return {}, [path.name], [f"The net's file, {path.name}, could not be read ({error}); it "
                                 "has to lie beside the weights."]
    if len(text) > _MAX_BYTES or redact(text) != text:
        why = (f"is larger than {_MAX_BYTES:,} bytes" if len(text) > _MAX_BYTES else
               "holds what looks like a secret")
        return {}, [path.name], [f"The net's file, {path.name}, {why} and was not copied; it has "
                                 "to lie beside the weights."]
    name, notes = path.name, []
    stem = path.stem
    is_taken = stem in sys.stdlib_module_names or stem in ("torch", "safetensors", "net")
    if is_taken or not (stem.isidentifier() and stem.isascii() and len(stem) < 90):
        name = _RENAMED
        notes.append(f"{_RENAMED} is the file {path.name} of the run, under a name that can be "
                     "imported.")
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." if node.level else (node.module or "").partition(".")[0])
    packages = sorted(imported - sys.stdlib_module_names - {"torch", "safetensors"})
    return {name: text}, packages, notes
