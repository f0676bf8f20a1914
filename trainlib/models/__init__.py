"""build_model(spec), load_model(run): from a name and arguments to a module.

A model is any ``nn.Module`` that maps inputs to logits. Arguments that only the data knows
(``inputs``, ``channels``, ``classes``) are filled in where the net's signature takes them.
"""

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import model_validator
from torch import nn

from trainlib.config import Options, UserError, nearest, one_of, parse_yaml
from trainlib.models.mlp import mlp
from trainlib.models.resnet import ResNet

BUILTIN: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "resnet": ResNet}


class ModelOptions(Options):
    name: Annotated[str, one_of(BUILTIN)] = "mlp"
    """Which net: mlp or resnet."""
    args: dict[str, Any] = {}
    """Arguments of the net: hidden and dropout of the mlp, depth and width of the resnet."""

    @model_validator(mode="after")
    def _net_takes_args(self) -> "ModelOptions":
        takes = list(inspect.signature(BUILTIN[self.name]).parameters)
        for name in self.args:
            if name not in takes:
                raise UserError(f"args: {self.name} does not take {name!r}{nearest(name, takes)}")
        return self


def complete(
    options: ModelOptions, input_shape: tuple[int, ...], num_classes: int
) -> ModelOptions:
    """The options with what only the data knows filled in, so that they alone rebuild the model.

    Args:
        input_shape: of one sample, [channels, height, width] for images.
    """
    takes = inspect.signature(BUILTIN[options.name]).parameters
    known = {
        "inputs": math.prod(input_shape), "channels": input_shape[0], "classes": num_classes
    }
    filled = {name: value for name, value in known.items() if name in takes}
    return options.model_copy(update={"args": filled | options.args})


def build_model(options: ModelOptions) -> nn.Module:
    """The net that complete options describe, with fresh weights from torch's generator.

    Raises:
        UserError: the net refuses its arguments.
    """
    try:
        return BUILTIN[options.name](**options.args)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"model.args: {options.name} refuses {options.args}: {error}") from error


def load_model(run: str | Path) -> nn.Module:
    """The trained module of a run, in eval mode on the CPU.

    Args:
        run: a run folder (its ``best/`` where that exists, else ``final/``), or such a folder.

    Returns:
        The module; ``module.run_config`` holds the run's options as a mapping,
        ``module.label_names`` the class names by task.

    Raises:
        UserError: no trained model lies there.
    """
    from safetensors.torch import load_model as load_weights

    folders = [Path(run) / "best", Path(run) / "final", Path(run)]
    folder = next((f for f in folders if (f / "model.safetensors").is_file()), None)
    if folder is None:
        raise UserError(f"{run}: no model.safetensors in best/, final/ or the folder itself; give "
                        "the folder of a run that has finished or evaluated once")
    config = parse_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
    model = build_model(ModelOptions.model_validate(config["model"]))
    load_weights(model, folder / "model.safetensors")
    model.run_config = config
    model.label_names = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    return model.eval()
