"""One record -> console, metrics.jsonl, trackers.

``metrics.jsonl`` is the truth; the terminal and the trackers mirror it. Only the main process
speaks. A tracker that fails is left out with one line, and training goes on.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from accelerate import Accelerator
from pydantic import AfterValidator, Field, model_validator
from torch import nn
from tqdm import tqdm

from trainlib import plots, shards
from trainlib.config import Options
from trainlib.credentials import redact
from trainlib.schedule import check_duration, duration_steps, is_time

if TYPE_CHECKING:
    from trainlib.guard import StepRecord
    from trainlib.progress import Progress
    from trainlib.tasks import Task
    from trainlib.trackers import Trackers


class LogOptions(Options):
    every: int = Field(10, ge=1)
    """Steps between training records in metrics.jsonl and the trackers."""
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
    pictures: bool = True
    """Draw curves, confusion matrices and their tables into the run folder at the end, and hand the
    pictures to the trackers."""
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
    ):
        self.device, self.folder, self.options = accelerator.device, folder, options
        self.is_main = accelerator.is_main_process
        self.every, self.total_steps, self.samples_per_step = (
            options.every, total_steps, samples_per_step
        )
        self.epochs_per_step, self._num_samples = samples_per_step / num_samples, num_samples
        self._last = (first_step, time.perf_counter())
        self._train_loss = math.nan
        self.trackers = trackers
        if not self.is_main:
            return
        self._path = folder / "metrics.jsonl"
        self._file = self._path.open("a", encoding="utf-8")
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total_steps, initial=first_step, unit="step", dynamic_ncols=True
            )
        self.trackers.start(self.say)
        if self.trackers:
            self.trackers.replay(self._records())

    def say(self, line: str | None) -> None:
        """One line on the terminal, from the main process; None is silent."""
        if self.is_main and line is not None:
            with suppress(OSError):  # the terminal, or what read the output, has gone away
                tqdm.write(redact(line), file=sys.stdout)
                sys.stdout.flush()

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
        self._train_loss = sum(record.losses)
        self.trackers.add_histograms(step)
        if not is_time(step, self.every, self.total_steps):
            return
        (last_step, last_time), self._last = self._last, (step, now)
        rate = (step - last_step) * self.samples_per_step / (now - last_time)
        self._write(step, {"train/loss": self._train_loss} | losses_of(record) | {
            "train/lr": record.lr, "train/grad_norm": record.grad_norm,
            "speed/samples_per_second": rate, "memory/peak_gib": self._peak_gib(),
        })
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {self._train_loss:.4f}, lr {record.lr:.2e}")
            self._bar.update(step - self._bar.n)

    def evaluation(
        self, step: int, metrics: dict[str, float], shown: list[str], is_best: bool, seconds: float
    ) -> None:
        """Records an evaluation and prints its line.

        Args:
            shown: the metrics that are printed.
            seconds: what it took, kept out of the training speed.
        """
        if not self.is_main:
            return
        self._last = (self._last[0], self._last[1] + seconds)
        self._write(step, metrics)
        if is_best:
            self.trackers.summary(_best(step, metrics))
        numbers = {"train/loss": self._train_loss} | {name: metrics[name] for name in shown}
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())
        self.say(f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  "
                 f"epoch {step * self.epochs_per_step:.2f}  {numbers}{'  best' if is_best else ''}")

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
        self._end_bar()
        self._hand_over(state)
        if self.options.pictures:
            self._draw()
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

    def close(self, exit_code: int = 0) -> None:
        """Ends the bar, the file and the trackers; a second call does nothing.

        Args:
            exit_code: with which the process will end.
        """
        if not self.is_main or self._file.closed:
            return
        self._end_bar()
        self._file.close()
        self.trackers.close(exit_code)

    def _write(self, step: int, values: dict[str, float]) -> None:
        # JSON has no NaN; null says as much, and bad_steps.jsonl tells the story.
        record = {"step": step, "epoch": step * self.epochs_per_step}
        record |= {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self.trackers.log(record)

    def _records(self) -> list[dict]:
        """Those of before an interruption."""
        lines = self._path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _hand_over(self, state: Progress) -> None:
        """Gives the trackers what stands for the run: the best evaluation and, if asked for, the
        models. The best may be from before an interruption."""
        if not self.trackers or not state.best_results:
            return
        records = [record for record in self._records() if record["step"] == state.best_step]
        best = {name: value for record in records for name, value in record.items()
                if name.startswith("eval/")}
        self.trackers.summary(_best(state.best_step, best))
        if self.options.upload_model:
            name = f"{self.options.name or self.folder.name}-model"
            self.trackers.artifact(name, self.folder / "final", ["final"], {"step": state.step})
            self.trackers.artifact(name, self.folder / "best", ["best"],
                                   {"step": state.best_step} | best)

    def _draw(self) -> None:
        """Draws what stands in the folder; no run fails for want of a picture."""
        try:
            files = plots.draw_run(self.folder, say=lambda line: None)
        except Exception as error:
            self.say(f"pictures: not drawn ({' '.join(str(error).split())[:200]}); to try again: "
                     f"python -m trainlib.plots {self.folder}")
            return
        self.trackers.images({file.stem: file for file in files if file.suffix == ".png"})

    def _peak_gib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        # ru_maxrss counts KiB on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _best(step: int, metrics: dict[str, float]) -> dict[str, float]:
    return {"best/step": step} | {f"best/{name}": value for name, value in metrics.items()}
