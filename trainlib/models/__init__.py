"""build_model(options), load_model(run): from a name and arguments to a module.

A model is any ``nn.Module`` whose first argument is the inputs and which returns logits. What only
the data knows (numbers of inputs, channels, classes) is filled in where a signature takes it.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import AfterValidator, ValidationError, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model as load_weights
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trainlib.config import Options, UserError, nearest, parse_yaml
from trainlib.models import external
from trainlib.models.external import check_args, check_name
from trainlib.models.inputs import INPUT_BUFFERS, prepare_inputs
from trainlib.models.portable import Portable, portable
from trainlib.models.weights import parameter_table, start_weights, weights_file
from trainlib.user_code import describe_error

__all__ = [
    "ModelOptions", "Portable", "build_model", "complete", "load_model", "parameter_table",
    "portable", "start_weights",
]


class ModelOptions(Options):
    name: Annotated[str, AfterValidator(check_name)] = "mlp"
    """Which net: mlp, resnet, unet, gpt, timm:NAME, torchvision:NAME, transformers:AutoModelFor...,
    or a class or function of your own, file.py:Name or package.module:Name."""
    args: dict[str, Any] = {}
    """Arguments of the net; of transformers: config (a mapping with model_type) or pretrained (an
    id or folder)."""
    init_from: str | None = None
    """Weights to start from: a .safetensors file, or a run or other folder with one; tensors of
    another shape or name are listed and left as they are."""
    allow_pickle: bool = False
    """Let init_from read a file of torch.save (.pt, .pth, .bin, .ckpt): its tensors only."""
    freeze: list[str] = []
    """Patterns such as stem* or blocks.0.*: parameters of these names are not trained, and batch
    norms of which none is trained keep their statistics."""
    compile: str | None = None
    """Backend of torch.compile; true means inductor, none: not compiled."""
    channels_last: bool = False
    """Lay images and kernels out with channels last, which is faster for many nets of convolutions,
    and changes rounding only; a net that flattens by view() refuses it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, the same weights (but
    not where inductor compiles dropout, whose draws then change)."""
    sync_batch_norm: bool = False
    """Let BatchNorm normalise by the micro-batches that run at one time on all GPUs together, not
    each by its own: for micro-batches too small for it. The curve then depends on the number of
    processes."""
    input_shape: list[int] | None = None
    """Shape of one sample as the net is given it; always that of the data, whatever is given, so
    that whoever has the weights has it."""
    input_dtype: Literal["float32", "int64"] | None = None
    """Numbers (float32) or tokens (int64); always that of the data."""

    @field_validator("compile", mode="before")
    @classmethod
    def _is_backend(cls, given: Any) -> Any:
        backend = {True: "inductor", False: None}[given] if isinstance(given, bool) else given
        if backend is not None:
            backend = str(backend)
            known = torch.compiler.list_backends(exclude_tags=())  # imports the compiler: slow
            if backend not in known:
                raise ValueError(f"unknown{nearest(backend, known)}")
        return backend

    @model_validator(mode="after")
    def _net_takes_args(self) -> "ModelOptions":
        check_args(self.name, self.args)
        return self


def complete(
    options: ModelOptions, input_shape: tuple[int, ...], outputs: int | dict[str, int],
    token_range: tuple[int, int] | None = None, pad_id: int | None = None,
) -> ModelOptions:
    """The options with what only the data knows filled in, so that they alone rebuild the model.

    Args:
        input_shape: of one sample, [channels, height, width] for images, [tokens] for text.
        outputs: how many numbers the model gives for an item, by task if there are several.
        token_range: the smallest and the largest of inputs that are tokens.
        pad_id: the token that fills texts up.

    Raises:
        UserError: the net cannot have several tasks, or has no room for all tokens.
    """
    facts = external.facts(input_shape, outputs, token_range, pad_id)
    args = external.complete_args(options.name, options.args, facts)
    if token_range is not None:
        external.check_vocabulary(args, token_range)
    dtype = "float32" if token_range is None else "int64"
    return options.replaced(
        {"args": args, "input_shape": list(input_shape), "input_dtype": dtype})


def build_model(
    options: ModelOptions, mean: Tensor | None = None, deviation: Tensor | None = None
) -> nn.Module:
    """The net that complete options describe, in training mode.

    Args:
        mean, deviation: of the inputs, which the model then scales itself; none: it does not.

    Returns:
        The module with fresh weights from torch's generator, or pretrained ones.

    Raises:
        UserError: the net refuses its arguments, or its code raises.
    """
    try:
        model = external.build(options.name, options.args)
    except (Exception, SystemExit) as error:  # whatever a net of the user's own raises
        hint = ("; of several tasks the number of outputs is a mapping, from task to number"
                if any(isinstance(value, dict) for value in options.args.values())
                and options.name.partition(":")[0] != "transformers" else "")
        raise UserError(f"model: {options.name} refuses {options.args}: "
                        f"{describe_error(error)}{hint}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name: {options.name} returned a {type(model).__name__}, not a "
                        "torch.nn.Module")
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise UserError(f"model.name: {options.name} has lazy layers, which cannot be loaded back; "
                        "give them their sizes, such as inputs or channels, which are filled in")
    prepare_inputs(model, mean, deviation, options.channels_last)
    if options.channels_last:
        _refuse_narrow_shortcuts(model)
        model.to(memory_format=torch.channels_last)
    if options.gradient_checkpointing:
        external.checkpoint_gradients(model, options.name)
    return model.train()


def _refuse_narrow_shortcuts(model: nn.Module) -> None:
    # On CPUs with AVX-512 torch (2.13) writes past its memory there, and every net is tried on one.
    for name, part in model.named_modules():
        if (isinstance(part, nn.Conv2d) and set(part.kernel_size) == {1} and max(part.stride) > 1
                and 1 < part.in_channels // part.groups < 16):
            raise UserError(f"model.channels_last: {name} is a convolution of 1x1 with stride "
                            f"{max(part.stride)} over {part.in_channels} channels, and torch may "
                            "crash on fewer than 16; use more of them, or leave the option out")


def load_model(run: str | Path) -> nn.Module:
    """The trained module of a run, in eval mode on the CPU; it scales its inputs itself.

    Args:
        run: a run folder (its ``best/`` where that exists, else ``final/``), or such a folder.

    Returns:
        The module; ``module.run_config`` holds the run's options as a mapping,
        ``module.label_names`` the class names by task. Its first argument, not a keyword, are
        the inputs; images are given in fp32 from 0 to 1. A net of the user's own is looked for
        by the path that the recipe gave, from the current folder.

    Raises:
        UserError: no trained model lies there, or its net cannot be built.
    """
    file = weights_file(run)
    try:
        config = parse_yaml((file.parent / "config.yaml").read_text(encoding="utf-8"))
        label_names = json.loads((file.parent / "labels.json").read_text(encoding="utf-8"))
        options = ModelOptions.model_validate(config["model"])
    except ValidationError as error:
        mistakes = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
        raise UserError(f"{file.parent}/config.yaml: model: {mistakes}") from error
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{file.parent}: no config.yaml and labels.json of a run beside "
                        f"{file.name}: {describe_error(error)}") from error
    options = options.replaced({"args": external.without_pretrained(options)})
    try:
        with safe_open(file, "pt") as tensors:
            scale = [tensors.get_tensor(name) for name in INPUT_BUFFERS if name in tensors.keys()]
        model = build_model(options, *scale)
        load_weights(model, file)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{file}: these are no weights of {options.name} as its code is now: "
                        f"{describe_error(error)}") from error
    model.run_config, model.label_names = config, label_names
    return model.eval()
