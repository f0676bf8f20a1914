"""One record -> console, metrics.jsonl, trackers.

``metrics.jsonl`` is the truth; the terminal and the trackers mirror it. Only the main process
speaks. A tracker that fails is left out with one line, and training goes on.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from accelerate import Accelerator
from pydantic import AfterValidator, Field, model_validator
from torch import nn

from trainlib import plots, shards, terminal
from trainlib.config import Options
from trainlib.journal import Journal
from trainlib.plots.records import read_records
from trainlib.schedule import (
    check_duration,
    check_interval,
    duration_steps,
    interval,
    is_time,
)

if TYPE_CHECKING:
    from trainlib.guard import StepRecord
    from trainlib.progress import Progress
    from trainlib.tasks import Task
    from trainlib.trackers import Trackers


_DIVERGED = 3  # exit code of a run whose curves tell why


class LogOptions(Options):
    every: int = Field(10, ge=1)
    """Steps between training records in metrics.jsonl and the trackers."""
    print_every: Annotated[str, AfterValidator(check_interval)] = "30 seconds"
    """Time between lines of training where the output is no terminal, as "30 seconds", "500 steps"
    or "1 epoch"; a terminal has a bar."""
    trackers: list[Literal["wandb", "trackio", "tensorboard"]] = ["wandb"]
    """Where records go besides metrics.jsonl, any number of them; [] for nowhere."""
    project: str = "one-curve"
    """The project's name in the trackers."""
    name: str | None = None
    """The run's name in the trackers; none: the run folder's."""
    group: str | None = None
    """A name that runs of one experiment share in wandb and trackio."""
    job_type: str | None = None
    """What the run does within its group, in wandb."""
    tags: list[str] = []
    """Labels to find the run by, in wandb."""
    notes: str | None = None
    """A description of the run, in wandb."""
    histograms: Annotated[str, AfterValidator(check_duration)] | None = None
    """Time between histograms of parameters and gradients, as "100 steps" or "1 epoch"; each copies
    them to the host. None: no histograms."""
    report: bool = True
    """At the end write predictions.csv of the validation split by the best weights, pictures and
    report.html into the run folder, and hand pictures and tables to the trackers."""
    examples: int = Field(12, ge=0, le=100)
    """How many mistakes, and how many samples drawn at random, of each task the report and the
    trackers show with their inputs; 0: none."""
    upload_model: bool = False
    """Hand final/ and best/ to wandb as versions of a model artifact. Off unless asked for: weights
    are large, and can tell more about the data than a curve does."""

    @model_validator(mode="after")
    def _histograms_are_of_whole_tensors(self) -> LogOptions:
        if self.histograms is not None and shards.is_asked():
            raise ValueError("histograms: are of whole tensors, which FSDP2 cuts over the "
                             "processes; leave it out")
        return self


class RunLog:
    """The records of one run."""

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        options: LogOptions,
        trackers: Trackers,
        total_steps: int,
        samples_per_step: int,
        num_samples: int,
        first_step: int,
        eval_every: int,
        shown: list[str],
        monitor: str,
    ):
        """
        Args:
            first_step: where the run goes on; 0 at its start.
            shown: the metrics that the terminal shows, besides the one that decides.
        """
        self.device, self.folder, self.options = accelerator.device, folder, options
        self.is_main = accelerator.is_main_process
        self.every, self.total_steps, self.samples_per_step = (
            options.every, total_steps, samples_per_step
        )
        self.epochs_per_step, self._num_samples = samples_per_step / num_samples, num_samples
        self._last = (first_step, time.perf_counter())
        self.trackers = trackers
        if not self.is_main:
            return
        self._journal = Journal(folder / "metrics.jsonl", self.say)
        every = interval(options.print_every, num_samples, samples_per_step, total_steps)
        self._progress = terminal.RunProgress(
            total_steps, first_step, samples_per_step, self.epochs_per_step, eval_every, shown,
            monitor, self._peak_gib, every,
        )
        self.trackers.start(self.say)
        if self.trackers:
            self.trackers.replay(read_records(self._journal.path))  # of former starts

    def say(self, *lines: str | None) -> None:
        """Lines on the terminal, from the main process; None is silent."""
        for line in lines:
            if self.is_main and line is not None:
                terminal.say(line)

    def watch(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], int]
    ) -> None:
        """Has histograms taken before an update when it is time, if there are to be any.

        Args:
            optimizer: unwrapped.
            step: how many steps have been taken so far.
        """
        if self.is_main and self.options.histograms is not None:
            every = duration_steps(self.options.histograms, self._num_samples,
                                   self.samples_per_step, self.total_steps)
            self.trackers.watch(module, optimizer, max(1, every), self.total_steps, step)

    def training(
        self, record: StepRecord, losses_of: Callable[[StepRecord], dict[str, float]]
    ) -> None:
        """Takes a step in, and records it when it is time.

        Args:
            losses_of: the parts of a step's loss by the key under which they are logged.
        """
        if not self.is_main:
            return
        step, now = record.step + 1, time.perf_counter()
        train_loss, is_logged = sum(record.losses), is_time(step, self.every, self.total_steps)
        self._progress.step(step, train_loss, is_logged)
        self.trackers.add_histograms(step)
        if not is_logged:
            return
        (last_step, last_time), self._last = self._last, (step, now)
        rate = (step - last_step) * self.samples_per_step / (now - last_time)
        self._write(step, {"train/loss": train_loss} | losses_of(record) | {
            "train/lr": record.lr, "train/grad_norm": record.grad_norm,
            "speed/samples_per_second": rate, "memory/peak_gib": self._peak_gib(),
        })

    def evaluation(
        self, step: int, metrics: dict[str, float], is_best: bool, seconds: float
    ) -> None:
        """Records an evaluation and prints its row.

        Args:
            seconds: what it took, kept out of the training speed.
        """
        if not self.is_main:
            return
        self._last = (self._last[0], self._last[1] + seconds)
        self._write(step, metrics)
        if is_best:
            self.trackers.summary(_best(step, metrics))
        self._progress.evaluation(step, metrics, is_best, seconds)

    def results(self, step: int, values: dict[str, float]) -> None:
        """Records what is known of a run at its end."""
        if self.is_main:
            self._write(step, values)

    def summary(
        self, state: Progress, tasks: list[Task], monitor: str, patience: int | None
    ) -> None:
        """Says how the run has ended, and which weights are its result, on the terminal and in the
        trackers."""
        if not self.is_main:
            return
        self._progress.end()
        self._hand_over(state)
        if self.options.report:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._draw({"code": 0, "time": now})
        for task in tasks:
            if state.best_results:
                self.say(f"\n{task.name}, validation, best weights (step {state.best_step}):\n"
                         + task.report(state.best_results[task.name]))
        if state.step < self.total_steps:
            self.say(f"\nstopped early at step {state.step} of {self.total_steps}: {monitor} has "
                     f"not improved {patience} times in a row. The best weights, of step "
                     f"{state.best_step}, are the result.")
        if not state.best_results:
            self.say(f"\nno evaluation gave a finite {monitor}: there is no best/")
        else:
            self.say(
                f"\n{self.folder}: best/ holds the weights with the best {monitor} "
                f"({state.best_value:.6g}, step {state.best_step}), final/ those at the end. Load "
                f'them with trainlib.models.load_model("{self.folder}").'
            )

    def close(self, exit_code: int = 0) -> bool:
        """Ends the bar, the file and the trackers, and says where all is and what comes next; a
        second call does nothing.

        Args:
            exit_code: with which the process will end.

        Returns:
            Whether a tracker was given up, which may yet hold the process back.
        """
        if self.is_main and not self._journal.is_closed:
            self._progress.end()
            self._journal.close()
            if exit_code == _DIVERGED and self.options.report:
                self._draw()
            self.trackers.close(exit_code)
            with suppress(OSError):
                self.say(f"\n{terminal.ending(self.folder, exit_code)}")
        return self.trackers.has_abandoned

    def _write(self, step: int, values: dict[str, float]) -> None:
        # JSON has no NaN; null says as much, and bad_steps.jsonl tells the story.
        record = {"step": step, "epoch": step * self.epochs_per_step}
        record |= {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._journal.append(record)
        self.trackers.log(record)

    def _hand_over(self, state: Progress) -> None:
        """Gives the trackers what stands for the run: the best evaluation and, if asked for, the
        models. The best may be from before an interruption."""
        if not self.trackers or not state.best_results:
            return
        best = {name: value for record in read_records(self._journal.path)
                if record["step"] == state.best_step
                for name, value in record.items() if name.startswith("eval/")}
        self.trackers.summary(_best(state.best_step, best))
        if self.options.upload_model:
            name = f"{self.options.name or self.folder.name}-model"
            self.trackers.artifact(name, self.folder / "final", ["final"], {"step": state.step})
            self.trackers.artifact(name, self.folder / "best", ["best"],
                                   {"step": state.best_step} | best)

    def _draw(self, ended: dict[str, Any] | None = None) -> None:
        """Draws what stands in the folder; no run fails for want of a picture."""
        try:
            files = plots.draw_run(self.folder, self.say, ended)
            self.trackers.hand_over(file for file in files if file.suffix == ".png")
        except Exception as error:
            self.say(f"pictures: not drawn ({' '.join(str(error).split())[:200]}); to try again: "
                     f"python -m trainlib.plots {self.folder}")

    def _peak_gib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        # ru_maxrss counts KiB on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _best(step: int, metrics: dict[str, float]) -> dict[str, float]:
    return {"best/step": step} | {f"best/{name}": value for name, value in metrics.items()}
