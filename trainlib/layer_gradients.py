"""Which layers' gradients explode, vanish, or do not come at all.

The norms are looked at every few steps, as they are before clipping. On a GPU they travel to the
host by themselves and are read at a later step, so that nobody waits for the device.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

EXPLODING_NORM = 1000.0  # of a layer's gradient
VANISHING_NORM = 1e-6
VANISHING_SHARE = 1e-3  # of the largest norm of a layer, or all fade, as at the end of a run
EVERY_STEPS = 100  # between looks, which cost little: a norm of each parameter
FIRST_STEPS = (1, 2, 5, 10, 20, 50)
LOOKS_IN_A_ROW = 3  # before something small is named: a head may have no target in a step
WELL_LOOKS = 10  # in a row, after which a layer that was named may be named again
_SHOWN = 5  # layers in a line

_SAID = {
    "exploding": f"exploding gradients (norm above {EXPLODING_NORM:g} before clipping) in {{}}; "
                 "lower --optim.lr, warm up for longer, or look at the scale of inputs and targets",
    "vanishing": f"vanishing gradients (norm below {VANISHING_NORM:g}, where other layers have a "
                 "thousand times more) in {}: they hardly learn; look at what lies above them, "
                 "such as saturated activations or too small weights",
    "zero": "gradients of exactly 0 in {}: nothing there depends on the loss any more; look for "
            "dead units, or for a target that is always missing",
    "missing": "no gradient reaches {} any more: what gets none stays as it is",
}


def faults(norms: Mapping[str, float | None]) -> dict[str, str]:
    """What is wrong with the layers' gradients, by layer: "exploding", "vanishing", "zero" or
    "missing"; nothing where a norm is not finite, which is another fault than these.

    Args:
        norms: of each layer's gradient in one step, before clipping; none: no gradient reached it.
    """
    known = [norm for norm in norms.values() if norm is not None]
    if not all(map(math.isfinite, known)):
        return {}
    found, largest = {}, max(known, default=0.0)
    for layer, norm in norms.items():
        if norm is None:
            found[layer] = "missing"
        elif norm > EXPLODING_NORM:
            found[layer] = "exploding"
        elif norm == 0 < largest:
            found[layer] = "zero"
        elif norm < VANISHING_NORM and norm < VANISHING_SHARE * largest:
            found[layer] = "vanishing"
    return found


class Faults:
    """Which faults are new: each layer is named once, and again when it has been well since."""

    def __init__(self) -> None:
        self._ill: dict[str, tuple[str, int]] = {}  # by layer: its fault, for how many looks
        self._named: dict[str, int] = {}  # for how many looks it has been well since
        self._is_first = True

    def take(self, norms: Mapping[str, float | None]) -> list[str]:
        """A line for each kind of fault that is to be told at this look.

        Args:
            norms: of ``faults``.
        """
        if not all(norm is None or math.isfinite(norm) for norm in norms.values()):
            return []
        now = faults(norms)
        if self._is_first:  # what gets none from the start has been told by ``StepSums``
            self._is_first = False
            self._named |= {layer: 0 for layer, fault in now.items() if fault == "missing"}
        told: dict[str, list[str]] = {}
        for layer, norm in norms.items():
            fault = now.get(layer)
            if fault is None:
                self._ill.pop(layer, None)
                if layer in self._named:
                    self._named[layer] += 1
                    if self._named[layer] >= WELL_LOOKS:
                        del self._named[layer]
                continue
            former, looks = self._ill.get(layer, (fault, 0))
            self._ill[layer] = (fault, looks + 1 if former == fault else 1)
            if layer in self._named:
                self._named[layer] = 0
            elif fault == "exploding" or self._ill[layer][1] >= LOOKS_IN_A_ROW:
                self._named[layer] = 0
                name = layer or "the net's own parameters"
                told.setdefault(fault, []).append(f"{name} ({norm:.2g})" if norm else name)
        return [_SAID[fault].format(_listed(layers)) for fault, layers in told.items()]


class LayerGradients:
    """Looks at the gradients of a run's steps, every few of them."""

    def __init__(
        self, layers: Sequence[str], step: Callable[[], int], say: Callable[[str], object],
        scaler: torch.amp.GradScaler | None = None,
    ):
        """
        Args:
            layers: the layer of each trainable parameter, in the order of ``look``.
            step: how many steps have been taken before this one.
            say: told in a line of layers that are not well.
            scaler: of fp16, by whose scale the gradients are too large.
        """
        self._layers, self._step, self._say, self._scaler = list(layers), step, say, scaler
        self._num_seen = 0
        self._faults = Faults()
        self._arriving: tuple[int, list[bool], Tensor, Any] | None = None

    def look(self, parameters: Sequence[Tensor]) -> None:
        """Takes note of a step, whose gradients are summed over all processes and not clipped."""
        self._num_seen += 1
        if self._arriving is not None and self._arriving[3].query():
            self._judge()
        is_due = self._num_seen in FIRST_STEPS or self._num_seen % EVERY_STEPS == 0
        if not is_due or self._arriving is not None:
            return
        gradients = [parameter.grad for parameter in parameters]
        values = [_dense(gradient) for gradient in gradients if gradient is not None]
        if not values:
            return
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(values)])
        if self._scaler is not None:  # asking for its scale would wait for the device
            norms = norms / self._scaler.scale(torch.ones((), device=norms.device))
        norms, event = _sent(norms)
        self._arriving = (self._step(), [g is not None for g in gradients], norms, event)
        if event is None:
            self._judge()

    def _judge(self) -> None:
        step, reached, norms, _ = self._arriving
        self._arriving = None
        parts = iter(norms.tolist())
        by_layer: dict[str, list[float]] = {layer: [] for layer in self._layers}
        for layer, has_one in zip(self._layers, reached, strict=True):
            if has_one:
                by_layer[layer].append(next(parts))
        lines = self._faults.take(
            {layer: math.hypot(*found) if found else None for layer, found in by_layer.items()}
        )
        for line in lines:
            self._say(f"step {step}: {line}")


def _sent(norms: Tensor) -> tuple[Tensor, Any]:
    """On their way to the host, and what says when they are there; none: they are."""
    if norms.device.type != "cuda":
        return norms, None
    norms, event = norms.to("cpu", non_blocking=True), torch.cuda.Event()  # into pinned memory
    event.record()
    return norms, event


def _dense(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _listed(layers: list[str]) -> str:
    more = f" and {len(layers) - _SHOWN} more" * (len(layers) > _SHOWN)
    return ", ".join(layers[:_SHOWN]) + more
