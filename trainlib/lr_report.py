"""A learning-rate sweep beside its numbers: options, its way to the loss and the terminal, files,
the answer in words."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from trainlib import durable, lr_suggestion, lr_sweep, plots, terminal
from trainlib.config import Options, UserError, to_yaml
from trainlib.lr_suggestion import Suggestion
from trainlib.schedule import check_duration

if TYPE_CHECKING:
    from trainlib.gradients import StepSums
    from trainlib.guard import Guard
    from trainlib.runlog import RunLog
    from trainlib.runtime import Requests


class SweepOptions(Options):
    lr_min: float = Field(lr_sweep.LR_MIN, gt=0)
    """The rate of the first step."""
    lr_max: float = Field(lr_sweep.LR_MAX, gt=0)
    """The rate of the last step; a loss that blows up ends the sweep before."""
    steps: int = lr_sweep.NUM_STEPS
    """Steps from the one to the other."""
    spacing: Literal["exponential", "linear"] = "exponential"
    """Equal factors or equal differences between the rates."""
    repeats: int = Field(1, ge=1)
    """Sweeps, each with its own seed, weights and order; the answer is the median of theirs."""
    verify: Annotated[str, AfterValidator(check_duration)] | None = None
    """Train so long, as "100 steps" or "1 epoch", at rates around the answer, and take the one with
    the least eval/loss; none: trust the sweep."""


def swept_loss(
    train_step: Callable[[int, float], object], sums: StepSums, guard: Guard, requests: Requests
) -> Callable[[int, float], float | None]:
    """A function from step and rate to the mean loss of the step's global batch, which it trains.

    It returns None where only the update failed, and raises ``Preempted`` where the run is to stop.
    """
    def loss_at(step: int, lr: float) -> float | None:
        train_step(step, lr)
        requests.take(sums["requests"].tolist())
        requests.leave_if_stopped()
        loss = sums["loss"].sum().item()
        return loss if guard.healthy or not math.isfinite(loss) else None

    return loss_at


def swept(
    loss_at: Callable[[int, float], float | None], rates: Sequence[float],
    stop_rule: lr_sweep.StopRule,
) -> tuple[list[float], list[float]]:
    """``lr_sweep.drive``, shown on the terminal."""
    count = terminal.Count("sweep", len(rates))

    def shown(number: int, lr: float) -> float | None:
        loss = loss_at(number, lr)
        count.step(number + 1, f"lr {lr:.1e}", "skipped" if loss is None else f"loss {loss:.4f}")
        return loss

    try:
        return lr_sweep.drive(shown, rates, stop_rule)
    finally:
        count.end()


def counted(num_steps: int, what: str) -> Iterator[int]:
    """The numbers of steps, shown on the terminal."""
    count = terminal.Count(what, num_steps)
    try:
        for step in range(num_steps):
            yield step
            count.step(step + 1)
    finally:
        count.end()


def auto_rate(
    run_log: RunLog, train_step: Callable[[int, float], object], sums: StepSums, guard: Guard,
    requests: Requests,
) -> float:
    """Sweeps as lr_find.py does by default, and leaves its files; returns the answer.

    Raises:
        UserError: the sweep has no answer.
    """
    loss_at = swept_loss(train_step, sums, guard, requests)
    found = swept(loss_at, lr_sweep.sweep_rates(), lr_sweep.StopRule())
    suggestion = lr_suggestion.suggest(*found)
    if run_log.is_main:
        try:
            run_log.say(write_report(run_log.folder, [found], suggestion, {}))
        except OSError as error:  # the answer is what the run needs
            run_log.say(f"lr_find: {suggestion.verdict}; its files could not be written "
                        f"({error.strerror or error})")
    if suggestion.answer is None:
        raise UserError(f"optim.lr: auto: {suggestion.verdict}; give a number as --optim.lr, or "
                        "find one with lr_find.py, which has these options")
    return suggestion.answer


def write_report(
    run_dir: Path, runs: list[tuple[list[float], list[float]]], suggestion: Suggestion,
    verified: Mapping[float, float], recipe: Options | None = None,
) -> str:
    """Writes ``lr_find.json``, ``.csv``, ``.png`` and, of a recipe that is given, ``.yaml``.

    Args:
        runs: rates and losses of each sweep.
        verified: by rate, the evaluation loss of a short run.
        recipe: lr_find.py's options, to be written with the answer in them.

    Returns:
        The answer in lines for the terminal.
    """
    (lrs, losses, low, high), _ = lr_suggestion.combine(runs)
    answer, verdict = suggestion.answer, suggestion.verdict
    if verified:
        answer = min(verified, key=verified.get)
        answer = answer if math.isfinite(verified[answer]) else None
        verdict += f"; of short runs the best was at {answer:.2g}" if answer is not None else (
            "; no short run ended with a finite loss")
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "lr_find.yaml").unlink(missing_ok=True)  # of an earlier sweep
    durable.write_text(run_dir / "lr_find.json", durable.as_json({
        "suggestion": answer, "verdict": verdict, "doubt": suggestion.doubt,
        "suggestions": suggestion.by_method,
        "verified": [{"lr": lr, "eval_loss": _plain(loss)} for lr, loss in verified.items()],
        "lrs": lrs, "losses": losses, "low": low, "high": high,
        "repeats": [{"lrs": one, "losses": [_plain(loss) for loss in its]} for one, its in runs],
    }))
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["lr", "loss", "low", "high"])
    rows.writerows(zip(lrs, losses, low, high, strict=True))
    durable.write_text(run_dir / "lr_find.csv", table.getvalue())
    fitted = lr_suggestion.fitted_curve(lrs, losses)
    plots.draw_sweep(run_dir / "lr_find.png", lrs, losses, low, high, fitted,
                     suggestion.by_method, answer, verdict)
    lines = [f"lr_find: {verdict}"]
    lines += [f"  {name:14} {lr:.3g}" for name, lr in suggestion.by_method.items() if lr]
    lines += [f"  after a run at {lr:.3g}: eval/loss {loss:.4f}" for lr, loss in verified.items()]
    lines.append(f"{run_dir}: lr_find.json, lr_find.csv, lr_find.png")
    if answer is None:
        lines.append("no rate is suggested")
        return "\n".join(lines)
    lines.append(f"train with --optim.lr {answer:.2g}")
    if recipe is not None:
        applied = recipe.replaced({"run_dir": str(run_dir), "optim.lr": answer})
        text = to_yaml(applied, leave_out=("apply", "sweep"))
        durable.write_text(run_dir / "lr_find.yaml", text)
        lines[-1] += f", or --recipe {run_dir / 'lr_find.yaml'}"
    return "\n".join(lines)


def _plain(number: float) -> float | None:
    """JSON has no infinity."""
    return number if math.isfinite(number) else None
