"""One micro-batch learnt by heart with the job's optimizer: gradients on the way, and its rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from trainlib.diagnosis import baseline
from trainlib.diagnosis.findings import ERROR, Deadline, Finding, Report, number, some
from trainlib.diagnosis.job import Batch, Job
from trainlib.layer_gradients import EXPLODING_NORM, VANISHING_NORM, VANISHING_SHARE

_STEPS, _WARMUP_STEPS = 200, 10
_FEWEST_STEPS = _WARMUP_STEPS + 50  # a rate that is too high shows after some steps at its peak
_EARLY_STEPS = 4  # in which every layer should have had a gradient
# Of the loss at the start: a small net cannot learn a batch by heart, but some of it.
_LEARNT_SHARE, _DOUBTFUL_SHARE, _FAILED_SHARE = 0.2, 0.5, 0.8
_DIVERGED_FACTOR = 10
USUAL_DECAY = 0.01
"""What is advised in place of one that is too high, or less."""
_FELT_DECAY = 0.1  # rate times decay, of all steps
_AHEAD_SHARE = 0.05  # of the best constant's loss on the batch: a net too small may learn no more
EXPLAINING = {
    "inputs not normalised", "one column dominates", "initial loss", "dead units",
    "constant parameters", "constant output", "probabilities as output", "frozen by mistake",
    "non-finite gradients", "exploding gradients", "vanishing gradients",
}
"""What explains that a net learns badly: to be mended before more is said of that."""


@dataclass
class Trial:
    """What came of learning one micro-batch by heart."""

    losses: list[float] = field(default_factory=list)
    first_norms: dict[str, float] = field(default_factory=dict)
    """Of the gradient, by layer, before the first update."""
    largest_norms: dict[str, float] = field(default_factory=dict)
    """Over the first few steps."""
    reached: set[str] = field(default_factory=set)
    spread: float = math.nan
    """Of the outputs between samples after the first few steps, relative to their size."""
    floor: float = 0.0
    reference: float = math.inf
    is_cut: bool = False
    constant: float = math.inf
    """What the best constant output loses on the batch."""

    @property
    def is_ahead(self) -> bool:
        """Whether the loss has fallen to where no constant output comes, as it would with inputs
        that are used, though the net be too small to learn all by heart."""
        end, above = max(self.losses[-3:]), self.constant - self.floor
        return end < self.losses[0] and self.constant - end > _AHEAD_SHARE * above

    @property
    def share(self) -> float:
        """What is left of the loss above its floor."""
        start = self.losses[0] - self.floor
        return (min(self.losses[-3:]) - self.floor) / start if start > 0 else 0.0

    @property
    def has_diverged(self) -> bool:
        limit = _DIVERGED_FACTOR * max(abs(self.losses[0]), self.reference)
        return not all(math.isfinite(loss) and loss <= limit for loss in self.losses)

    @property
    def has_learnt(self) -> bool:
        return not self.has_diverged and self.share <= _LEARNT_SHARE


def learn_by_heart(
    job: Job, batch: Batch, reference: float, factor: float, deadline: Deadline,
    decays: bool = True,
) -> Trial:
    """The job's optimizer on one micro-batch again and again, at a multiple of its rate.

    Args:
        reference: the loss of outputs of 0.
        decays: with the job's weight decay.
    """
    trial = Trial(reference=reference, floor=sum(
        task.weight * baseline.floor(task, batch.targets) for task in job.tasks))
    trained = {name: p for name, p in job.module.named_parameters() if p.requires_grad}
    with job.untouched():
        job.seed(1)
        for step in range(_STEPS):
            loss = job.loss(batch.inputs, batch.targets, [batch.samples])
            trial.losses.append(float(loss.detach()))
            if trial.has_diverged or trial.has_learnt and step >= _FEWEST_STEPS:
                break
            if step > _EARLY_STEPS and deadline.is_over:
                trial.is_cut = True
                break
            loss.backward()
            if step < _EARLY_STEPS:
                _note_gradients(job, trained, trial)
            job.update(factor * min(1.0, (step + 1) / _WARMUP_STEPS), decays)
            if step == _EARLY_STEPS - 1 and len(batch.inputs) > 1:
                trial.spread = _spread(job, batch)
    return trial


def _note_gradients(job: Job, trained: dict, trial: Trial) -> None:
    squares: dict[str, float] = {}
    for name, parameter in trained.items():
        if parameter.grad is not None:
            trial.reached.add(name)
            layer = job.layers[name] or name  # of what the outermost module itself has
            squares[layer] = squares.get(layer, 0.0) + float(parameter.grad.norm()) ** 2
    norms = {layer: math.sqrt(value) for layer, value in squares.items()}
    trial.first_norms = trial.first_norms or norms
    for layer, norm in norms.items():
        trial.largest_norms[layer] = max(norm, trial.largest_norms.get(layer, 0.0))


@torch.no_grad()
def _spread(job: Job, batch: Batch) -> float:
    output = job.logits(batch)
    spreads = []
    for task in job.tasks:
        values = task.pick(output).float()
        spreads.append(float(values.std(0, correction=0).max() / (1e-12 + values.abs().max())))
    return max(spreads)


def check_gradients(job: Job, trial: Trial, report: Report) -> None:
    """Layers whose gradients are too large, too small or not there."""
    norms = trial.first_norms
    ordered = sorted(norms, key=norms.__getitem__)
    if ordered:
        report.fact("gradient norms", f"by layer, least {number(norms[ordered[0]])} ({ordered[0]}),"
                    f" largest {number(norms[ordered[-1]])} ({ordered[-1]})")
    trained = {name for name, p in job.module.named_parameters() if p.requires_grad}
    unreached = [name for name in job.layers if name in trained - trial.reached]
    if unreached:
        report.warning(
            "unreached parameters", f"no gradient comes to {some(unreached)}: the loss does not "
            "depend on them",
            "use them in forward (look for detach, no_grad, an unused head), or name them in "
            f"--model.freeze '[{unreached[0]}]'")
    broken = [layer for layer, norm in norms.items() if not math.isfinite(norm)]
    if broken:
        report.error("non-finite gradients", f"NaN or infinite in {some(broken)} at the first step",
                     "look for a square root, a norm or a logarithm at 0 in the net or the loss")
    large = [f"{layer} {number(norm)}" for layer, norm in norms.items()
             if EXPLODING_NORM < norm < math.inf]
    if large:
        report.error(
            "exploding gradients", f"norms above {EXPLODING_NORM:,.0f} at the first step: "
            f"{some(large)}", "normalise the inputs (--data.normalize true), initialise with "
            "smaller weights, add norms between layers; --optim.max_grad_norm 1.0 at the least")
    # A layer behind one that begins with zeros has a gradient from the second step on.
    largest = max(trial.largest_norms.values(), default=0.0)  # the loss may be scaled
    small = [f"{layer} {number(norm)}" for layer, norm in trial.largest_norms.items()
             if norm < min(VANISHING_NORM, VANISHING_SHARE * largest) or norm == 0]
    if small:
        report.error(
            "vanishing gradients", f"norms below {VANISHING_NORM:g} in the first "
            f"{_EARLY_STEPS} steps: {some(small)}",
            "use ReLU or GELU in place of sigmoid or tanh, norms or shortcuts between layers, or "
            "fewer of them; initialise for the activation (torch.nn.init.kaiming_normal_)")
    if trial.spread < 1e-6:
        report.error("constant output", "the outputs do not depend on the inputs, nor after the "
                     f"first {_EARLY_STEPS} steps",
                     "look for what the net multiplies by 0 or does not use, and for dead units")


def check_learning(
    job: Job, batch: Batch, reference: float, trial: Trial, deadline: Deadline, report: Report
) -> tuple[bool, Finding | None]:
    """Whether the net may be judged on samples that it has not seen, and what there is to say if
    it knows nothing of them either.

    A micro-batch that is not learnt by heart is tried without weight decay and at other rates.
    """
    rate = max(group["lr"] for group in job.optimizer.param_groups)
    steps = len(trial.losses) - 1
    said = (f"from {number(trial.losses[0])} to {number(trial.losses[-1])} in {steps} "
            f"step{'' if steps == 1 else 's'} at a rate of {rate:g}")
    report.fact("one batch by heart", f"loss {said} ({len(batch.samples)} samples)")
    if trial.is_cut and not trial.has_diverged and trial.share > _DOUBTFUL_SHARE:
        report.cut(f"one batch by heart: {len(trial.losses)} of {_STEPS} steps, not judged")
        return trial.share <= _FAILED_SHARE, None
    trial.constant = sum(
        task.weight * baseline.loss_of_constant(
            task, baseline.best_constant(task, batch.targets, prior=1e-3), batch.targets)
        for task in job.tasks)
    if not trial.has_diverged and trial.share <= _DOUBTFUL_SHARE:
        return True, None
    if reasons := report.names & EXPLAINING:
        report.fact("learning", f"not judged: mend first {some(sorted(reasons))}")
        return False, None
    decay = job.weight_decay
    may_matter = decay > USUAL_DECAY or rate * decay * _STEPS > _FELT_DECAY
    if may_matter and not deadline.is_over:
        other = learn_by_heart(job, batch, reference, 1.0, deadline, decays=False)
        if other.has_learnt:
            report.error(
                "weight decay too high", f"the loss on one micro-batch goes {said} with a weight "
                f"decay of {decay:g}; without it, it falls to "
                f"{number(other.losses[-1])}", "--optim.weight_decay "
                f"{min(USUAL_DECAY, decay / 100):g}")
            return False, None
    if not trial.has_diverged and trial.is_ahead:
        return True, None
    lower, higher = [10.0**-k for k in range(1, 8)], [10.0**k for k in range(1, 8)]
    is_stuck = not trial.has_diverged and trial.share > _FAILED_SHARE
    factors = lower if trial.has_diverged else [*lower[:2], *(higher if is_stuck else [])]
    for factor in factors:
        if deadline.is_over:
            report.cut("one batch by heart: not all other rates were tried")
            break
        other = learn_by_heart(job, batch, reference, factor, deadline)
        if other.has_learnt and job.options.optim.lr is None:
            report.fact("learning rate", f"auto; at {rate * factor:g} the loss falls to "
                        f"{number(other.losses[-1])}")
            return False, None
        if other.has_learnt:
            what, how = ("too high", "rises") if trial.has_diverged else (
                "too high" if factor < 1 else "too low", "goes")
            report.error(
                f"learning rate {what}", f"the loss on one micro-batch {how} {said}; at "
                f"{rate * factor:g} it falls to {number(other.losses[-1])}",
                # What one batch bears is more than a run does.
                f"--optim.lr {rate * factor * (0.1 if trial.has_diverged else 1):g}, or have it "
                "found: --optim.lr auto")
            return False, None
    if not (trial.has_diverged or is_stuck):
        return True, None
    if trial.has_diverged:
        report.error("learning rate too high", f"the loss on one micro-batch diverges, {said}, and "
                     "at no lower rate that was tried is it learnt by heart",
                     "--optim.lr auto; then look at the other findings")
        return False, None
    return True, Finding(
        ERROR, "does not learn", f"the loss on one micro-batch goes {said}; it should fall below "
        f"{_FAILED_SHARE:.0%}, and does at no other rate that was tried, nor is the net ahead of "
        "the best constant output on validation samples after a short training",
        "mend the other findings first; then look for detached tensors, a softmax before the "
        "loss, frozen layers, or a net too small")
