"""Nets by name: built in, from timm, torchvision and transformers, and of the user's own."""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainlib.config import UserError, nearest
from trainlib.models.gpt import GPT
from trainlib.models.headless import offer_hidden
from trainlib.models.mlp import MLP
from trainlib.models.resnet import ResNet
from trainlib.models.unet import UNet
from trainlib.user_code import describe_error, import_object, import_package, is_object_spec

if TYPE_CHECKING:
    from trainlib.models import ModelOptions

BUILTIN: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP, "resnet": ResNet, "unet": UNet, "gpt": GPT,
}
_FORMS = ("timm:NAME", "torchvision:NAME", "transformers:AutoModelFor...", "file.py:Name",
          "package.module:Name")
# Each library, and its arguments that load weights.
_LIBRARIES = {
    "timm": ("pretrained", "checkpoint_path"), "torchvision": ("weights", "weights_backbone"),
    "transformers": ("pretrained",),
}
_ONE_TASK = ("unet", "gpt")
_LANGUAGE_MODELS = ("AutoModelForCausalLM",)
# What people call the numbers that only the data knows.
_NAMES = {
    "inputs": ("inputs", "num_inputs", "input_size", "input_dim", "in_features"),
    "channels": ("channels", "num_channels", "in_channels", "in_chans"),
    "classes": ("classes", "num_classes", "num_labels", "out_features"),
    "image_size": ("image_size", "img_size"),
    "vocab_size": ("vocab_size", "num_tokens", "num_embeddings"),
    "pad_id": ("pad_id", "pad_token_id", "padding_idx"),
}


def check_name(name: str) -> str:
    """``name`` itself if it names a net; its library, or the user's own code, is imported here.

    Raises:
        ValueError: it does not, or the import fails.
    """
    library, _, rest = name.partition(":")
    if name in BUILTIN:
        return name
    if library in _LIBRARIES and rest:
        known = _library_names(library)
        # timm: a tag of weights follows a dot, the id of a repository a second colon.
        if rest.partition(".")[0] not in known and ":" not in rest:
            raise ValueError(f"{library} has no {rest!r}{_nearest_few(rest, known)}")
        return name
    if not is_object_spec(name):
        raise ValueError(f"unknown{nearest(name, (*BUILTIN, *_FORMS))}")
    found = import_object(name)
    if not callable(found) or isinstance(found, nn.Module):
        raise ValueError(f"this is a {type(found).__name__}; give a class or function that makes a "
                         "torch.nn.Module")
    return name


def _library_names(library: str) -> list[str]:
    package = import_package(library)
    if library == "transformers":
        return [name for name in dir(package) if name.startswith("AutoModel")]
    return (package.models if library == "torchvision" else package).list_models()


def _nearest_few(name: object, known: Iterable[str]) -> str:
    """For lists that are too long to show."""
    return f"; nearest: {', '.join(difflib.get_close_matches(str(name), known, cutoff=0))}"


def check_args(name: str, args: dict[str, Any]) -> None:
    """Refuses arguments that a net does not take, where that can be told before it is built.

    Raises:
        UserError: with the nearest name.
    """
    if name.startswith("transformers:"):
        return _check_transformers(args)
    takes = _signature(name)
    if takes is None or any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return
    for key in args:
        if key not in takes:
            raise UserError(f"args: {name} does not take {key!r}{nearest(key, takes)}")


def _check_transformers(args: dict[str, Any]) -> None:
    for key in args:
        if key not in ("config", "pretrained"):
            raise UserError(f"args: transformers takes config or pretrained, not {key!r}; options "
                            "of the model stand inside config")
    config, pretrained = args.get("config", {}), args.get("pretrained")
    if not isinstance(config, dict):
        raise UserError(f"args.config: a mapping with model_type is needed, got {config!r}")
    if pretrained is not None:
        if not isinstance(pretrained, str):
            raise UserError(f"args.pretrained: an id or folder is needed, got {pretrained!r}")
    elif "model_type" not in config:
        raise UserError("args: give config, a mapping with model_type (such as vit or bert), or "
                        "pretrained, an id or folder")
    else:
        known = import_package("transformers").CONFIG_MAPPING.keys()
        if config["model_type"] not in known:
            raise UserError(f"args.config.model_type: unknown {config['model_type']!r}"
                            f"{_nearest_few(config['model_type'], known)}")


def _signature(name: str) -> dict[str, inspect.Parameter] | None:
    """The parameters of a net's constructor; none: known only to its library."""
    if name not in BUILTIN and name.partition(":")[0] in _LIBRARIES:
        return None
    function = BUILTIN[name] if name in BUILTIN else import_object(name)
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C
        return None


def facts(
    input_shape: tuple[int, ...], outputs: int | dict[str, int],
    token_range: tuple[int, int] | None, pad_id: int | None,
) -> dict[str, Any]:
    """What only the data knows, by the keys of ``_NAMES``; the arguments are as in ``complete``."""
    known: dict[str, Any] = {"inputs": math.prod(input_shape), "classes": outputs}
    if len(input_shape) == 3:
        channels, height, width = input_shape
        known |= {"channels": channels,
                  "image_size": height if height == width else [height, width]}
    known |= {} if token_range is None else {"vocab_size": token_range[1] + 1}
    return known | ({} if pad_id is None else {"pad_id": pad_id})


def complete_args(name: str, args: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The arguments with what only the data knows filled in, where the net takes it.

    Args:
        known: as from ``facts``.

    Raises:
        UserError: transformers does not know the model, or the model not its config; or the net
            has one task only.
    """
    has_one_task = name in _ONE_TASK or (
        name not in BUILTIN and name.partition(":")[0] in _LIBRARIES)
    if isinstance(known["classes"], dict) and has_one_task:
        raise UserError(f"model.name: {name} returns one tensor, the tasks are "
                        f"{', '.join(known['classes'])}; use mlp or resnet, or a net of your own "
                        "that returns a mapping from task to tensor")
    return _filled(name, args, known)


def check_vocabulary(args: dict[str, Any], token_range: tuple[int, int]) -> None:
    """Refuses complete arguments of a net that has no room for all tokens.

    Args:
        token_range: the smallest and the largest token.

    Raises:
        UserError: with both ranges.
    """
    for where, given in (("model.args", args), ("model.args.config", args.get("config"))):
        for parameter in _NAMES["vocab_size"]:
            room = given.get(parameter) if isinstance(given, dict) else None
            if not isinstance(room, int) or 0 <= token_range[0] <= token_range[1] < room:
                continue
            raise UserError(f"{where}.{parameter}: the net has room for tokens 0 to {room - 1}, "
                            f"those of the data reach from {token_range[0]} to {token_range[1]}; "
                            "mend the data, or give another number or tokenizer")


def _filled(name: str, args: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    library, _, rest = name.partition(":")
    if library == "transformers":
        return _complete_transformers(rest, args, known)
    if library == "timm":
        facts = import_package("timm").get_pretrained_cfg(rest.partition(".")[0])
        takes = {"in_chans", "num_classes"}
        # Only nets with position embeddings and the like take a size (checked for all of timm's).
        takes |= {"img_size"} if facts and facts.fixed_input_size else set()
    elif library == "torchvision":
        takes = {"num_classes"}
    else:
        takes = set(_signature(name) or ())
    filled = {parameter: known[meaning] for meaning, names in _NAMES.items() if meaning in known
              for parameter in names if parameter in takes}
    return filled | args


def _complete_transformers(
    auto_class: str, args: dict[str, Any], known: dict[str, Any]
) -> dict[str, Any]:
    transformers = import_package("transformers")
    given, source, loaded = args.get("config", {}), args.get("pretrained"), {}
    if source is not None:
        try:
            default = transformers.AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            what = "cannot be read" if Path(source).is_dir() else (
                "is no folder, and no id on the Hugging Face Hub that can be read")
            raise UserError(f"model.args.pretrained: {source} {what}: "
                            f"{' '.join(str(error).split())}") from error
        # The classes are the data's here, and weights are trained in fp32.
        leave_out = ("id2label", "label2id", "dtype", "architectures", "transformers_version")
        loaded = {key: value for key, value in json.loads(default.to_json_string()).items()
                  if key not in leave_out}
    else:
        default = transformers.AutoConfig.for_model(given["model_type"])
    takes = {*vars(default), *default.attribute_map, "num_labels", "attn_implementation"}
    takes = {key for key in takes if not key.startswith("_")} - {"dtype"}
    for key in given:
        if key not in takes | {"model_type"}:
            raise UserError(f"model.args.config: {default.model_type} does not take {key!r}"
                            f"{_nearest_few(key, takes)}")
    filled = {} if auto_class in _LANGUAGE_MODELS else {"num_labels": known["classes"]}
    if source is None:  # pretrained weights are for channels, a size and tokens of their own
        filled |= {key: known[meaning] for key, meaning in
                   (("num_channels", "channels"), ("image_size", "image_size"),
                    ("vocab_size", "vocab_size"), ("pad_token_id", "pad_id"))
                   if key in takes and meaning in known}
    return args | {"config": loaded | filled | given}


def build(name: str, args: dict[str, Any]) -> Any:
    """What the named net's constructor returns for complete arguments; raises what it raises."""
    library, _, rest = name.partition(":")
    if library == "timm":
        return import_package("timm").create_model(rest, **args)
    if library == "torchvision":
        return _build_torchvision(rest, args)
    if library == "transformers":
        transformers = import_package("transformers")
        auto_class = getattr(transformers, rest)
        config = transformers.AutoConfig.for_model(**args["config"])
        if args.get("pretrained") is None:
            model = auto_class.from_config(config)
        else:  # left alone, weights saved in half precision would be trained in it, too
            model = auto_class.from_pretrained(args["pretrained"], config=config,
                                               dtype=torch.float32, ignore_mismatched_sizes=True)
        takes = inspect.signature(model.forward).parameters
        if "attention_mask" in takes and rest not in _LANGUAGE_MODELS:
            model.register_forward_pre_hook(mask_padding, with_kwargs=True)
        if rest in _LANGUAGE_MODELS:
            offer_hidden(model)
        return model
    function = BUILTIN[name] if name in BUILTIN else import_object(name)
    return function(**args)


def mask_padding(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Lets no token look at the padding, where the inputs are tokens.

    A causal language model needs no such mask: its padding comes last.
    """
    pad_id = getattr(model.config, "pad_token_id", None)
    if pad_id is None or args[0].is_floating_point():
        return args, kwargs
    mask = args[0] != pad_id
    mask[:, 0] = True  # of an empty text, whose attention were a division of 0 by 0
    return args, {"attention_mask": mask.long()} | kwargs


def _build_torchvision(name: str, args: dict[str, Any]) -> nn.Module:
    """A net whose number of classes may differ from that of its pretrained weights."""
    get_model = import_package("torchvision").models.get_model
    if args.get("weights") is None:
        return get_model(name, **args)
    pretrained = get_model(name, **{k: v for k, v in args.items() if k != "num_classes"})
    model = get_model(name, **(args | {"weights": None}))
    own = model.state_dict()
    fits = {k: v for k, v in pretrained.state_dict().items() if v.shape == own[k].shape}
    model.load_state_dict(fits, strict=False)
    return model


def without_pretrained(options: ModelOptions) -> dict[str, Any]:
    """The arguments for a net whose weights are about to be loaded from elsewhere."""
    loads = _LIBRARIES.get(options.name.partition(":")[0], ())
    return {key: None if key in loads else value for key, value in options.args.items()}


def checkpoint_gradients(model: nn.Module, name: str) -> None:
    """Makes the model recompute its activations in the backward pass.

    Raises:
        UserError: it has no method for that, or the method raises.
    """
    enable = getattr(model, "set_grad_checkpointing", None)  # timm, and the nets here
    # transformers; the second is the older name.
    for method in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if enable is None and hasattr(model, method):
            enable = partial(getattr(model, method), {"use_reentrant": False})
    if enable is None:
        raise UserError(f"model.gradient_checkpointing: {name} has no method "
                        "set_grad_checkpointing() for it; give your net one, or leave the option "
                        "out")
    try:
        enable()
    except Exception as error:  # not every net of a library can, and a user's own may fail
        raise UserError(f"model.gradient_checkpointing: {name}: {describe_error(error)}") from error
