"""One record -> console, metrics.jsonl, trackers.

``metrics.jsonl`` is the truth; the terminal and the trackers mirror it. Only the main process
speaks. A tracker that fails is left out with one line, and training goes on.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from accelerate import Accelerator
from pydantic import Field
from tqdm import tqdm

from trainlib.config import Options, parse_yaml
from trainlib.schedule import is_time

if TYPE_CHECKING:
    from trainlib.guard import StepRecord
    from trainlib.progress import Progress
    from trainlib.tasks import Task


class LogOptions(Options):
    every: int = Field(10, ge=1)
    """Steps between training records in metrics.jsonl and the trackers."""
    trackers: list[Literal["wandb"]] = ["wandb"]
    """Where records go besides metrics.jsonl; [] for nowhere."""
    project: str = "one-curve"
    """The project's name in the trackers."""
    name: str | None = None
    """The run's name in the trackers; none: the run folder's."""


class RunLog:
    """The records of one run."""

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        options: LogOptions,
        config: str,
        total_steps: int,
        samples_per_step: int,
        num_samples: int,
        first_step: int,
    ):
        self.accelerator, self.device, self.folder = accelerator, accelerator.device, folder
        self.is_main = accelerator.is_main_process
        self.every, self.total_steps, self.samples_per_step = (
            options.every, total_steps, samples_per_step
        )
        self.epochs_per_step = samples_per_step / num_samples
        self._last = (first_step, time.perf_counter())
        self._train_loss = math.nan
        if not self.is_main:
            return
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total_steps, initial=first_step, unit="step", dynamic_ncols=True
            )
        self._tracking = bool(options.trackers) and self._start_trackers(folder, options, config)

    def say(self, line: str | None) -> None:
        """One line on the terminal, from the main process; None is silent."""
        if self.is_main and line is not None:
            with suppress(OSError):  # the terminal, or what read the output, has gone away
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()

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
        """Says how the run has ended, and which weights are its result."""
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

    def close(self) -> None:
        """Ends the bar, the file and the trackers; a second call does nothing."""
        if not self.is_main or self._file.closed:
            return
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        if self._tracking:
            try:
                for tracker in self.accelerator.trackers:
                    tracker.finish()
            except Exception as error:
                self.say(f"tracker: could not finish ({_one_line(error)}); the run is complete")

    def _write(self, step: int, values: dict[str, float]) -> None:
        # JSON has no NaN; null says as much, and bad_steps.jsonl tells the story.
        record = {"step": step, "epoch": step * self.epochs_per_step}
        record |= {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._tracking:
            try:
                self.accelerator.log(values | {"epoch": record["epoch"]}, step=step)
            except Exception as error:
                self._tracking = False
                self.say(f"tracker: stopped ({_one_line(error)}); metrics.jsonl goes on")

    def _start_trackers(self, folder: Path, options: LogOptions, config: str) -> bool:
        settings = {"dir": str(folder), "name": options.name or folder.name}
        settings["settings"] = {"silent": True, "console": "off", "save_code": False,
                                "disable_git": True}
        # Decided before init, which without a key asks for one and waits.
        if not os.environ.get("WANDB_MODE") and not _has_wandb_key():
            settings["mode"] = "offline"
            self.say("wandb: no key found, so this run is logged offline; upload it later with "
                     f"`wandb sync {folder}/wandb/offline-run-*`")
        try:
            self.accelerator.init_trackers(options.project, parse_yaml(config), {"wandb": settings})
        except Exception as error:
            self.say(f"tracker: not started ({_one_line(error)}); metrics.jsonl has everything")
            return False
        if not self.accelerator.trackers:
            self.say(f"tracker: {', '.join(options.trackers)} is not installed; metrics.jsonl has "
                     "everything")
        return bool(self.accelerator.trackers)

    def _peak_gib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        # ru_maxrss counts KiB on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host or host in os.environ.get("WANDB_BASE_URL", "") for host in hosts)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
