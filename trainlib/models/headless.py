"""Causal language models of transformers that give hidden states where logits would be large."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn


def offer_hidden(model: nn.Module) -> None:
    """Lets a causal language model take ``hidden_only``, as the built-in gpt does, where it can.

    It can where its logits are what goes into its head times a matrix and nothing else, such as a
    bias, a cap or a scale. Of another net nothing changes.
    """
    head, given = model.get_output_embeddings(), type(model)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return
    # What the head says is large and arbitrary here: whatever is done to it afterwards shows.
    said = torch.linspace(-1e4, 1e4, head.out_features).expand(1, 2, -1)
    head.forward = lambda hidden: said
    was_training = model.training
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            logits = model.eval()(torch.zeros(1, 2, dtype=torch.int64)).logits
    finally:
        del head.forward
        model.train(was_training)
    if logits.equal(said):
        # A class, not an attribute of the object, which would stay bound to it when it is copied.
        model.__class__ = _headless(given)


@functools.cache
def _headless(given: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, hidden_only: bool = False, **options: Any) -> Any:
        if not hidden_only:
            return given.forward(self, *args, **options)
        head = self.get_output_embeddings()
        head.forward = _unchanged  # the object's own, before that of its class
        try:
            hidden: Tensor = given.forward(self, *args, **options).logits
        finally:
            del head.forward
        return {"hidden": hidden, "head": head.weight}

    own = inspect.signature(given.forward)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    rest = [p for p in own.parameters.values() if p.kind is p.VAR_KEYWORD]
    added = inspect.Parameter("hidden_only", inspect.Parameter.KEYWORD_ONLY, default=False)
    forward.__signature__ = own.replace(parameters=[*parameters, added, *rest])
    return type(given.__name__, (given,), {"forward": forward, "__module__": given.__module__})


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden
