"""How far a run has come and how it does: a bar on a terminal, lines of a table elsewhere."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from trainlib.terminal.bar import Bar
from trainlib.terminal.lines import Lines, is_live, num_said, say
from trainlib.terminal.table import METRIC_WIDTH, Table, duration, metric, rate

_COUNT_SECONDS = 30.0
_SMOOTHING = 0.3  # the weight of the newest rate in the bar, which is drawn often


class RunProgress:
    """What the terminal is shown of a run's steps and evaluations."""

    def __init__(
        self, total_steps: int, first_step: int, samples_per_step: int, epochs_per_step: float,
        eval_every: int, shown: Sequence[str], monitor: str, peak_gib: Callable[[], float],
        every: tuple[int, float | None], clock: Callable[[], float] = time.perf_counter,
    ):
        """
        Args:
            shown: the metrics of an evaluation that its row holds; the monitored one is added.
            every: steps, or seconds, between two lines where there is no bar.
        """
        self._clock = clock
        self._total_steps, self._eval_every, self._monitor = total_steps, eval_every, monitor
        self._samples_per_step, self._epochs_per_step = samples_per_step, epochs_per_step
        self._every_steps, self._every_seconds = every
        self._peak_gib = peak_gib
        self._shown = list(dict.fromkeys([*shown, monitor]))
        numbers = dict.fromkeys(["train/loss", *self._shown], METRIC_WIDTH)
        self._table = Table({
            "step": len(str(total_steps)), "epoch": len(f"{total_steps * epochs_per_step:.2f}"),
            **numbers, "samples/s": 7, "ETA": 6, "GiB": 6, "best": 4,
        }, stacked=list(numbers), to_go=["GiB", "samples/s", "ETA"])
        self._said = -1
        self._loss: float | None = None
        self._metric: float | None = None
        # Of steps alone: (step, seconds without evaluations) at the first step, and since when a
        # rate is measured. The first step of all is no measure of the others.
        self._first = self._since = (first_step, math.nan)
        self._bar_since, self._bar_rate = self._since, math.nan
        self._eval_seconds, self._num_evals = 0.0, 0
        self._line_seconds = -math.inf
        self._bar = Bar(total_steps, first_step, clock) if is_live(sys.stderr) else None
        if self._bar is not None:
            self._bar.draw(first_step, [])

    def step(self, step: int, loss: float, is_logged: bool) -> None:
        """Takes in that ``step`` steps are done.

        Args:
            loss: of the last one.
            is_logged: whether it is recorded; lines that are due after a time wait for that.
        """
        self._loss = loss
        now = self._clock()
        if math.isnan(self._first[1]):
            self._first = self._since = self._bar_since = (step, now - self._eval_seconds)
        if self._bar is not None:
            if self._bar.is_time() or step == self._total_steps:
                self._draw(step, now)
        elif self._is_line_due(step, is_logged, now) and not self._is_evaluated(step):
            self._row(step, {}, "")

    def evaluation(
        self, step: int, metrics: Mapping[str, float], is_best: bool, seconds: float
    ) -> None:
        """Prints the row of an evaluation, which took so many seconds."""
        self._eval_seconds += seconds
        self._num_evals += 1
        self._metric = metrics[self._monitor]
        self._row(step, {name: metric(metrics[name]) for name in self._shown},
                  "best" if is_best else "")
        if self._bar is not None:
            self._draw(step, self._clock())

    def seconds_left(self, step: int) -> float:
        """Until the end, with evaluations and saving at what they have cost since the start."""
        first_step, first_seconds = self._first
        steps, seconds = step - first_step, self._clock() - self._eval_seconds - first_seconds
        if step >= self._total_steps:
            return 0.0
        if not steps > 0 or math.isnan(seconds):
            return math.nan
        num_evals = -(-self._total_steps // self._eval_every) - step // self._eval_every
        per_eval = self._eval_seconds / max(1, self._num_evals)
        return (self._total_steps - step) * seconds / steps + num_evals * per_eval

    def end(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _is_line_due(self, step: int, is_logged: bool, now: float) -> bool:
        if self._every_seconds is None:
            return step % self._every_steps == 0
        return is_logged and now - self._line_seconds >= self._every_seconds

    def _is_evaluated(self, step: int) -> bool:
        """Whether an evaluation follows, whose row says all."""
        return step == self._total_steps or step % self._eval_every == 0

    def _row(self, step: int, numbers: dict[str, str], best: str) -> None:
        self._line_seconds = self._clock()
        speed, self._since = self._speed(step, self._since)
        text = self._table.row({
            "step": str(step), "epoch": f"{step * self._epochs_per_step:.2f}",
            "train/loss": "" if self._loss is None else metric(self._loss), **numbers,
            "samples/s": "" if math.isnan(speed) else rate(speed),
            "ETA": duration(self.seconds_left(step)), "GiB": f"{self._peak_gib():.2f}",
            "best": best,
        }, num_said() != self._said)
        say(text)
        self._said = num_said()

    def _draw(self, step: int, now: float) -> None:
        newest, self._bar_since = self._speed(step, self._bar_since)
        if not math.isnan(newest):
            former = newest if math.isnan(self._bar_rate) else self._bar_rate
            self._bar_rate = former + _SMOOTHING * (newest - former)
        fields = [] if self._loss is None else [f"loss {metric(self._loss)}"]
        if self._metric is not None:
            fields.append(f"{self._monitor.removeprefix('eval/')} {metric(self._metric)}")
        fields.append(f"ETA {duration(self.seconds_left(step))}")
        if not math.isnan(self._bar_rate):
            fields.append(f"{rate(self._bar_rate)} samples/s")
        self._bar.draw(step, [*fields, f"{self._peak_gib():.2f} GiB"])

    def _speed(
        self, step: int, since: tuple[int, float]
    ) -> tuple[float, tuple[int, float]]:
        """Samples a second since a step and a time, both without evaluations, and both now; the
        same as before where no step was done."""
        seconds = self._clock() - self._eval_seconds
        if step == since[0] or math.isnan(since[1]):
            return math.nan, since
        speed = (step - since[0]) * self._samples_per_step / max(seconds - since[1], 1e-9)
        return speed, (step, seconds)


class Count:
    """How far something has come that is no run: a bar on a terminal, or beside the run's, and a
    line now and then elsewhere; from the main process of a script only."""

    def __init__(self, what: str, total: int, clock: Callable[[], float] = time.perf_counter):
        self._what, self._total, self._clock = what, total, clock
        self._line_seconds = clock()
        self._last = (0, [what])
        self._is_shown = Lines.current is not None and Lines.current.rank == 0
        self._bar = Bar(total) if self._is_shown and self._has_room() else None

    def step(self, done: int, *fields: str) -> None:
        """Takes in that so many of all are done."""
        if not self._is_shown:
            return
        bar = Lines.current.bar
        if bar is not None:
            if bar.is_time() or done == self._total:
                whose = [self._what] if bar is self._bar else [f"{self._what} {done}/{self._total}"]
                bar.draw(done if bar is self._bar else 0, [*whose, *fields])
            self._last = (done, [self._what, *fields])
        elif self._clock() - self._line_seconds >= _COUNT_SECONDS:
            self._line_seconds = self._clock()
            say("  ".join([f"{self._what} {done}/{self._total}", *fields]))

    def end(self) -> None:
        """Leaves its bar as it stands."""
        if self._bar is not None:
            self._bar.draw(*self._last)
            self._bar.close()

    def _has_room(self) -> bool:
        return is_live(sys.stderr) and Lines.current.bar is None
