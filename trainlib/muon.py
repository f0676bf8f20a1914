"""Muon for hidden matrices and AdamW for everything else, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class MuonWithAdamW(Optimizer):
    """Muon for the groups marked ``use_muon`` and AdamW for the others, with one learning rate.

    One rate serves both because Muon's updates are scaled to the size that AdamW's have.

    Source: Jordan 2024, kellerjordan.github.io/posts/muon; the scaling: Liu et al. 2025,
    arXiv:2502.16982, section 2.2.
    """

    def __init__(
        self,
        params: list[dict],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool | None = None,
    ):
        """
        Args:
            params: groups with the key ``use_muon``; where it is true, of matrices only.
            momentum, nesterov, ns_steps: Muon's; the last is its Newton-Schulz iterations.
            betas, eps, fused: AdamW's.

        Raises:
            ValueError: an argument out of its range.
        """
        self._algorithms: dict[bool, Optimizer] = {}
        matrices = [group for group in params if group["use_muon"]]
        others = [group for group in params if not group["use_muon"]]
        # Each writes its defaults into its groups, which are ours as well.
        if matrices:
            self._algorithms[True] = torch.optim.Muon(
                matrices, lr, weight_decay, momentum, nesterov, ns_steps=ns_steps,
                adjust_lr_fn="match_rms_adamw",
            )
        if others:
            self._algorithms[False] = torch.optim.AdamW(
                others, lr, betas, eps, weight_decay, fused=fused
            )
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; returns what the closure, called first, returns."""
        result = closure() if closure is not None else None
        for use_muon, algorithm in self._algorithms.items():
            # Loading a state replaces both, so they are handed over each time.
            algorithm.state = self.state
            algorithm.param_groups = [g for g in self.param_groups if g["use_muon"] == use_muon]
            algorithm.step()
        return result
