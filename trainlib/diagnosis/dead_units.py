"""Dead units behind a ReLU: where they lie in a tensor, and whether a sample wakes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from trainlib.diagnosis.findings import Report, some

_DEAD_SHARE = 0.8  # nets that learn well may begin with a half
_RELU = {
    functional.relu, functional.relu_, functional.relu6, functional.threshold, torch.relu,
    torch.relu_, Tensor.relu, Tensor.relu_,
}
_CONV = {
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d,
    torch.conv_transpose3d,
}
_MATRIX = {functional.linear, torch.matmul, Tensor.matmul, torch.bmm, Tensor.bmm}
_SWAPS = {"transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims"}


class Alive(TorchFunctionMode):
    """Units behind a ReLU that are not 0 for every sample, be it a module or a function."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, Tensor] = {}
        self._inside: list[str] = []  # names of the modules that are at work
        self._calls: dict[str, int] = {}
        self._units = WeakTensorKeyDictionary()  # by output: the dimension of its units

    @contextmanager
    def seen_in(self, module: nn.Module) -> Iterator[None]:
        def begin(name: str) -> Callable:
            return lambda *_: self._inside.append(name)

        def end(*_: Any) -> None:
            self._inside.pop()
            if not self._inside:
                self._calls = {}

        handles = []
        for name, part in module.named_modules():
            handles += [part.register_forward_pre_hook(begin(name), prepend=True),
                        part.register_forward_hook(end, always_call=True)]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        self._place_units(function, args, output)
        if function in _RELU and self._inside:
            self._look(self._inside[-1] or "the net", output)
        return output

    def _place_units(self, function: Callable, args: tuple, output: Any) -> None:
        """Notes where convolutions and products put their units, and where they are moved to."""
        if not isinstance(output, Tensor):
            return
        if function in _CONV or function in _MATRIX:
            self._units[output] = 1 if function in _CONV else -1
            return
        given = args[0][0] if args and isinstance(args[0], (list, tuple)) and args[0] else (
            args[0] if args else None)
        place = self._units.get(given) if isinstance(given, Tensor) else None
        if place is None or output.ndim < 2:
            return
        if _SWAPS & {getattr(function, "__name__", "")}:
            size = given.shape[place]
            places = [one for one in (1, -1) if output.shape[one] == size and one != place]
            place = places[0] if places else None
        elif output.ndim != given.ndim and output.shape[:2] != given.shape[:2]:
            place = None
        if place is not None:
            self._units[output] = place

    def _look(self, name: str, output: Tensor) -> None:
        call = self._calls[name] = self._calls.get(name, 0) + 1
        # Else they are channels of images, and the last dimension of everything else.
        place = self._units.get(output, 1 if output.ndim > 3 else -1)
        units = output.movedim(place, 0).flatten(1)
        alive, key = (units != 0).any(1), name if call == 1 else f"{name} (ReLU {call})"
        self.seen[key] = alive | self.seen[key] if key in self.seen else alive


def judge_alive(alive: Alive, report: Report) -> None:
    """Layers of which most units are 0 for all samples."""
    if not alive.seen:
        report.fact("dead units", "none to look for: the net has no ReLU")
        return
    dead = {name: float((~units).float().mean()) for name, units in alive.seen.items()}
    report.fact("dead units", ", ".join(f"{name} {share:.0%}" for name, share in
                                        sorted(dead.items(), key=lambda pair: -pair[1])[:4])
                + f" ({len(alive.seen)} layers of ReLU)")
    bad = [f"{share:.0%} of {name}" for name, share in dead.items() if share > _DEAD_SHARE]
    if bad:
        report.error("dead units", f"0 for every one of the first samples, so that nothing passes "
                     f"back: {some(bad)}",
                     "initialise the biases before these layers with 0 and the weights smaller, "
                     "normalise the inputs, or use a leaky activation (nn.LeakyReLU, nn.GELU)")
