"""The guard: no step with a non-finite loss or gradient changes anything, and no spike if asked.

Its verdict rests on values that all processes share, so all skip alike. On a CPU it is a host
read; on an accelerator the fused optimizers read a device flag, and the host learns of a skipped
step one step late, so that a normal step never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trainlib import shards, spikes, terminal
from trainlib.journal import Journal

if TYPE_CHECKING:
    from trainlib.progress import Progress

MAX_BAD_STEPS_IN_A_ROW = 10


class Diverged(Exception):
    """Training cannot go on: exit code 3."""

    exit_code = 3


class StepRecord(NamedTuple):
    """What one step reported, on the host."""

    step: int
    lr: float
    losses: list[float]
    """By task: its weight times its mean loss."""
    grad_norm: float
    requests: list[float]
    """How many processes asked to stop, and to save."""

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, [*self.losses, self.grad_norm]))


class Readback:
    """Brings each step's values to the host: at once on a CPU, one step late elsewhere."""

    def __init__(self, device: torch.device):
        self.is_late = device.type == "cuda"
        self._pending: list[tuple[int, float, list[int], Tensor, torch.cuda.Event]] = []

    def push(
        self, step: int, lr: float, losses: Tensor, grad_norm: Tensor, requests: Tensor, flush: bool
    ) -> list[StepRecord]:
        """Hands a step's values over.

        Args:
            losses: [tasks]; grad_norm: scalar; requests: [2].
            flush: wait for this very step, too; so do requests, which are for a checkpoint.

        Returns:
            The records that are on the host now, oldest first.
        """
        if not self.is_late:
            return [StepRecord(step, lr, losses.tolist(), grad_norm.item(), requests.tolist())]
        values = torch.cat([losses, requests, grad_norm.to(losses).view(1)])
        sizes = [len(losses), len(requests), 1]
        values = values.to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((step, lr, sizes, values, event))
        records: list[StepRecord] = []
        while self._pending and (
            flush or len(self._pending) > 1 or any(any(r.requests) for r in records)
        ):
            step, lr, sizes, values, event = self._pending.pop(0)
            event.synchronize()
            losses, requests, norm = values.split(sizes)
            records.append(
                StepRecord(step, lr, losses.tolist(), norm.item(), requests.tolist())
            )
        return records


class Guard:
    """Decides each step's update, keeps the list of bad steps, and ends a diverged run."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        scaler: torch.amp.GradScaler | None,
        inspect_step: Callable[[int], dict],
        bad_steps_file: Path | None = None,
        recent: spikes.Recent | None = None,
    ):
        """
        Args:
            optimizer: unwrapped.
            scaler: of fp16, whose search for a scale skips steps that are nobody's fault.
            inspect_step: names the samples of a step, for the list.
            bad_steps_file: the list, written by the process that has one.
            recent: the run's steps by which spikes are judged and skipped, kept up to date here;
                None: spikes pass.
        """
        self.optimizer, self.scaler = optimizer, scaler
        self.bad_steps_file, self.inspect_step = bad_steps_file, inspect_step
        self.recent = recent
        self._bad_steps = None if bad_steps_file is None else Journal(bad_steps_file, terminal.say)
        owned = (p for group in optimizer.param_groups for p in group["params"])
        parts = [p for p in owned if shards.is_part(p)]
        self.is_sharded = bool(parts)
        # Optimizers that are not fused ignore found_inf or raise on it: for them the host reads,
        # as it does for the scaler, which reads on the host itself.
        is_fused = all(group.get("fused") for group in optimizer.param_groups)
        is_offloaded = any(part.device.type == "cpu" for part in parts)
        self.on_device = device.type == "cuda" and is_fused and scaler is None and not is_offloaded
        self.healthy: bool | Tensor = True

    def allows(self, step: int, losses: Tensor, grad_norm: Tensor) -> bool:
        """Whether the script may call ``optimizer.step()``; ``healthy`` holds the verdict.

        With the flag on the device the answer is always yes, and the optimizer itself skips.

        Args:
            losses: [parts], whose sum is the step's loss.
        """
        limits = [level.limit for level in self._levels(step)]
        if not self.on_device:
            values = [sum(losses.tolist()), grad_norm.item()]
            self.healthy = all(map(math.isfinite, values)) and not _exceeds(values, limits)
            return self.healthy
        self.healthy = losses.isfinite().all() & grad_norm.isfinite()
        for value, limit in zip((losses.sum(), grad_norm.double()), limits, strict=False):
            self.healthy = self.healthy & (value <= limit)
        self.optimizer.found_inf = (~self.healthy).float()
        self.optimizer.grad_scale = None
        return True

    def observe(self, record: StepRecord, progress: Progress) -> str | None:
        """Takes note of a step, and in ``progress`` of how many in a row were not finite.

        Returns:
            A line about a skipped step, for the log.

        Raises:
            Diverged: too many steps in a row that were not finite.
        """
        if record.is_finite:
            progress.bad_steps_in_a_row = 0
            return self._observe_spike(record)
        if self._is_scale_search(record):
            return None
        progress.bad_steps_in_a_row += 1
        in_a_row = progress.bad_steps_in_a_row
        what = "loss" if not all(map(math.isfinite, record.losses)) else "gradient"
        line = f"step {record.step}: the {what} is not finite; update skipped on all processes"
        line += self._list(record.step, {"reason": what})
        if in_a_row >= MAX_BAD_STEPS_IN_A_ROW:
            raise Diverged(
                f"{line}. {in_a_row} steps in a row: training has diverged; lower --optim.lr, or "
                "look at the samples named there"
            )
        return line

    def _levels(self, step: int) -> list[spikes.Level]:
        return [] if self.recent is None else spikes.levels(self.recent, step)

    def _observe_spike(self, record: StepRecord) -> str | None:
        if self.recent is None:
            return None
        values, levels = [sum(record.losses), record.grad_norm], self._levels(record.step)
        spikes.remember(self.recent, record.step, *values)
        for what, value, level in zip(("loss", "gradient norm"), values, levels, strict=False):
            if value > level.limit:
                sigmas = (value - level.mean) / level.deviation
                return (
                    f"step {record.step}: the {what} {value:.4g} lies {sigmas:.1f} sigma above the "
                    f"mean {level.mean:.4g} of {spikes.WINDOW} steps; update skipped on all "
                    "processes" + self._list(record.step, {
                        "reason": f"spike of the {what}", "value": value, "mean": level.mean,
                        "deviation": level.deviation,
                    })
                )
        return None

    def _list(self, step: int, entry: dict) -> str:
        """Adds a step and its samples to the list of bad ones; returns the end of a line."""
        # A model that is cut runs forward on all processes or on none.
        if self.bad_steps_file is not None or self.is_sharded:
            details = self.inspect_step(step)
        if self.bad_steps_file is None:
            return ""
        self._bad_steps.append({"step": step} | entry | details)
        ending = ""
        if details["suspects"]:
            shown = ", ".join(map(str, details["suspects"][:5]))
            more = len(details["suspects"]) - 5
            ending = f"; non-finite loss in row {shown}" + (f" and {more} more" * (more > 0))
        return f"{ending} ({self.bad_steps_file.name})"

    def _is_scale_search(self, record: StepRecord) -> bool:
        """Whether fp16's scaler overflowed on its way to a fitting scale (below 1, none fits)."""
        losses_are_finite = all(map(math.isfinite, record.losses))
        return self.scaler is not None and losses_are_finite and self.scaler.get_scale() >= 1


def _exceeds(values: list[float], limits: list[float]) -> bool:
    return any(value > limit for value, limit in zip(values, limits, strict=False))
