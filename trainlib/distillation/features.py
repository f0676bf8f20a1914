"""Features of student and teachers, by the path of the module that gives them, and projectors.

Hooks keep what a module returns in the last forward pass. Projectors, which bring the student's
features to the teacher's width, are trained with the student and live in it, under a name that is
left out of its exported weights.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainlib import plan
from trainlib.config import UserError, nearest
from trainlib.kd_losses import FEATURE_TERMS

if TYPE_CHECKING:
    from trainlib.distillation.options import DistillOptions
    from trainlib.distillation.teacher import Teacher

TRAINING_ONLY = "training_only"
_PROJECTORS = 0x70726F6A  # what the seed is mixed with
_NEEDS_WIDTH = ("mse", "cosine")


class FeatureLosses:
    """The feature terms of a run."""

    def __init__(
        self, student: nn.Module, teachers: list[Teacher], options: DistillOptions, seed: int,
        example: Tensor,
    ):
        """
        Args:
            student: on the CPU; its modules get hooks, and itself the projectors that are needed.
            seed: of the projectors' weights, which leave no trace on torch's generator.
            example: inputs of a few samples.

        Raises:
            UserError: a module or a teacher that is not there, or features that cannot be compared.
        """
        self.pairs = options.features
        self.kept: dict[tuple[str, int], Tensor] = {}
        self.terms = [FEATURE_TERMS[pair.loss] for pair in self.pairs.values()]
        self.weights = [pair.weight for pair in self.pairs.values()]
        self.projectors: dict[str, nn.Module] = {}
        for number, (text, pair) in enumerate(self.pairs.items()):
            here, there = (name.strip() for name in text.split("->"))
            where = f"distill.features: {text!r}"
            if pair.teacher >= len(teachers):
                raise UserError(f"{where}: teacher {pair.teacher} of {len(teachers)}, counted from "
                                "0; give another teacher")
            self._keep(student, here, ("student", number), where, "student")
            self._keep(teachers[pair.teacher].module, there, ("teacher", number), where,
                       teachers[pair.teacher].where)
        if self.pairs:
            with torch.random.fork_rng([]):
                deepcopy(student).eval()(example)  # whose hooks are these, and statistics its own
                with torch.no_grad():
                    for teacher in teachers:
                        teacher.module(example)
                # On the CPU, and not the student's own draws once more.
                torch.default_generator.manual_seed(plan.mix(seed, _PROJECTORS))
                self._fit(student)

    def _keep(
        self, net: nn.Module, path: str, key: tuple[str, int], where: str, whose: str
    ) -> None:
        modules = dict(net.named_modules())
        if path not in modules or not path:
            raise UserError(f"{where}: the net of {whose} has no module {path!r}"
                            f"{nearest(path, filter(None, modules))}")

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim < 2:
                raise UserError(f"{where}: {path!r} returns a {type(output).__name__}; features "
                                "are a tensor [samples, ...] of floating point")
            # Of the student in training alone: an evaluation would only fill the memory.
            if key[0] == "teacher" or torch.is_grad_enabled():
                self.kept[key] = output

        modules[path].register_forward_hook(hook)

    def _fit(self, student: nn.Module) -> None:
        for number, (text, pair) in enumerate(self.pairs.items()):
            both = [self.kept.get((whose, number)) for whose in ("student", "teacher")]
            if any(features is None for features in both):
                raise UserError(f"distill.features: {text!r}: not both modules are called in a "
                                "forward pass; choose others")
            here, there = both
            if pair.loss in _NEEDS_WIDTH and here.shape[1:] != there.shape[1:]:
                self.projectors[f"projector_{number}"] = _projector(here, there, text)
            try:
                self.terms[number](self._projected(number, here), there)
            except ValueError as error:
                raise UserError(f"distill.features: {text!r}: {error}") from error
        if self.projectors:
            if hasattr(student, TRAINING_ONLY):
                raise UserError(f"model: the net has an attribute {TRAINING_ONLY!r}, where "
                                "projectors are kept; rename it")
            student.add_module(TRAINING_ONLY, nn.ModuleDict(self.projectors))
        self.kept.clear()

    def _projected(self, number: int, features: Tensor) -> Tensor:
        projector = self.projectors.get(f"projector_{number}")
        return features if projector is None else projector(features.float())

    def losses(self) -> list[Tensor]:
        """By pair, [samples] fp32 for the last micro-batch that student and teachers have seen."""
        losses = [
            term(self._projected(number, self.kept["student", number]),
                 self.kept["teacher", number])
            for number, term in enumerate(self.terms)
        ]
        self.kept.clear()
        return losses


class _Channels(nn.Linear):
    """A linear layer over dimension 1."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.movedim(1, -1)).movedim(-1, 1)


def _projector(here: Tensor, there: Tensor, text: str) -> nn.Module:
    """From the student's features to the teacher's: a linear layer over channels, which are last in
    [samples, tokens, channels] and first elsewhere."""
    if here.ndim == there.ndim == 3:
        if here.shape[1] == there.shape[1]:
            return nn.Linear(here.shape[2], there.shape[2])
    elif here.ndim == there.ndim and here.shape[2:] == there.shape[2:]:
        return _Channels(here.shape[1], there.shape[1])
    shapes = f"{tuple(here.shape[1:])} and {tuple(there.shape[1:])}"
    if math.prod(here.shape[2:]) != math.prod(there.shape[2:]) or here.ndim != there.ndim:
        raise UserError(f"distill.features: {text!r}: features of {shapes} differ in their "
                        "positions, which a projector keeps; choose modules of one resolution, or "
                        "similarity, which compares samples")
    raise UserError(f"distill.features: {text!r}: no projector leads from one of {shapes} to the "
                    "other; choose other modules, or similarity")
