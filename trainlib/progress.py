"""How long a run is, where it stands, and when it has stopped improving."""

import math
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from trainlib import spikes
from trainlib.config import Options, UserError, nearest
from trainlib.schedule import Duration, duration_steps

_LOWER_IS_BETTER = ("loss", "mae", "rmse", "perplexity", "bits_per_byte", "calibration_error")


class LoopOptions(Options):
    duration: Duration = "60 epochs"
    """Length of the run, as "20 epochs" or "500 steps"."""
    eval_every: Duration = "5%"
    """Time between evaluations, as "1 epoch", "100 steps" or "5%" of the run; also at the end."""
    monitor: str | None = None
    """The logged key that decides which weights are best; none: of a single task its accuracy,
    micro_f1 or miou, if it has one, else eval/loss."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations without a new best; none: never."""
    on_spike: Literal["ignore", "skip"] = "ignore"
    """What to do with an update whose loss or gradient norm lies more than 6 standard deviations
    above the mean of 128 steps before it: nothing, or leave it out and list it in
    bad_steps.jsonl."""


@dataclass
class Progress:
    """Where a run stands: all that early stopping, the choice of the best weights, the guard and
    the reductions of the plateau schedule rest on, as plain data for a checkpoint's JSON."""

    step: int = 0
    evaluated_step: int = 0
    bad_steps_in_a_row: int = 0
    results: dict[str, dict] = field(default_factory=dict)  # of the last evaluation, by task
    best_results: dict[str, dict] = field(default_factory=dict)
    best_value: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    peak_lr: float | None = None  # where optim.lr is auto, what the sweep has found
    lr_factor: float = 1.0  # on top of lr_multiplier; 1 for every schedule but plateau
    plateau_best: float | None = None
    plateau_bad_evaluations: int = 0
    plateau_cooldown_left: int = 0
    recent: spikes.Recent = field(default_factory=list)  # where loop.on_spike is skip

    def observe(self, value: float, lower_is_better: bool, results: dict[str, dict]) -> bool:
        """Takes an evaluation in and says whether it is the best so far.

        Args:
            value: of the monitored metric.
            results: of each task.
        """
        self.results, self.evaluated_step = results, self.step
        improved = math.isfinite(value) and (
            self.best_value is None
            or (value < self.best_value if lower_is_better else value > self.best_value)
        )
        self.evaluations_since_best = 0 if improved else self.evaluations_since_best + 1
        if improved:
            self.best_value, self.best_step, self.best_results = value, self.step, results
        return improved

    def reduce_on_plateau(
        self, value: float, lower_is_better: bool, *, final_fraction: float, factor: float,
        patience: int, threshold: float, cooldown: int,
    ) -> None:
        """Multiplies ``lr_factor`` by ``factor``, not below ``final_fraction``, after more than
        ``patience`` evaluations in a row without a relative improvement above ``threshold``.

        He et al. 2016 (ResNet), section 3.4; the same as torch's ReduceLROnPlateau, ``rel``, but
        right for a negative best value, too. A value that is not finite is no improvement. The
        ``cooldown`` evaluations after a reduction are not counted.
        """
        best = self.plateau_best
        if math.isfinite(value) and (
            best is None
            or (value < best - threshold * abs(best) if lower_is_better else
                value > best + threshold * abs(best))
        ):
            self.plateau_best = value
            self.plateau_bad_evaluations = 0
        else:
            self.plateau_bad_evaluations += 1
        if self.plateau_cooldown_left > 0:
            self.plateau_cooldown_left -= 1
            self.plateau_bad_evaluations = 0
        if self.plateau_bad_evaluations > patience:
            self.lr_factor = max(self.lr_factor * factor, final_fraction)
            self.plateau_bad_evaluations = 0
            self.plateau_cooldown_left = cooldown

    def is_over(self, total_steps: int, patience: int | None) -> bool:
        """Whether the run is at its end, or so many evaluations in a row brought no new best; not
        before the weights after its last step have been evaluated."""
        is_out_of_patience = patience is not None and self.evaluations_since_best >= patience
        is_last = self.step >= total_steps or is_out_of_patience
        return is_last and self.evaluated_step == self.step


def check_monitor(monitor: str, names: list[str]) -> bool:
    """Whether less of the monitored key is better.

    Raises:
        UserError: no evaluation logs that key.
    """
    if monitor not in names:
        raise UserError(f"loop.monitor: unknown key {monitor!r}{nearest(monitor, names)}")
    return monitor.endswith(_LOWER_IS_BETTER)


def plan_steps(
    loop: LoopOptions, warmup: str, num_samples: int, global_size: int
) -> tuple[int, int, int]:
    """The run's length, the time between evaluations, and the warm-up, all in steps.

    Raises:
        UserError: a run without a step, or a warm-up as long as the run.
    """
    try:
        total_steps = duration_steps(loop.duration, num_samples, global_size)
    except ValueError as error:
        raise UserError(f"loop.duration: {error}") from error
    if total_steps < 1:
        raise UserError(f"loop.duration: {loop.duration!r} is less than one step")
    eval_every = max(1, duration_steps(loop.eval_every, num_samples, global_size, total_steps))
    warmup_steps = duration_steps(warmup, num_samples, global_size, total_steps)
    if warmup_steps >= total_steps:
        raise UserError(f"schedule.warmup: {warmup!r} is {warmup_steps} steps, the whole run has "
                        f"{total_steps}; warm up for less")
    return total_steps, eval_every, warmup_steps
