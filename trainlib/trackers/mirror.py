"""All trackers of a run at once; one that fails is left out with one line, and training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from torch import nn

from trainlib.config import parse_yaml
from trainlib.credentials import redact
from trainlib.trackers import finished
from trainlib.trackers.histograms import Histograms
from trainlib.trackers.others import Record, TensorBoard, Tracker, Trackio
from trainlib.trackers.weights_and_biases import WeightsAndBiases

if TYPE_CHECKING:
    from trainlib.runlog import LogOptions

_KINDS: dict[str, type[Tracker]] = {
    kind.name: kind for kind in (WeightsAndBiases, Trackio, TensorBoard)
}
_START_SECONDS, _FINISH_SECONDS = 60, 75  # each above the tracker's own limits


class Trackers:
    """The trackers of one run, on its main process."""

    def __init__(
        self, accelerator: Accelerator, folder: Path, options: LogOptions, config: str,
        first_step: int,
    ):
        """
        Args:
            config: the resolved config, YAML.
            first_step: where the run goes on; 0 at its start.
        """
        self._accelerator, self._folder, self._options = accelerator, folder, options
        self._config, self._first_step = config, first_step
        self._trackers: list[Tracker] = []
        self._histograms: Histograms | None = None
        self.has_abandoned = False
        """Whether one was given up, which may wait without end when the interpreter shuts down."""

    def start(self, say: Callable[[str], None]) -> None:
        """Starts them, which takes a minute each at most, two where there is a second way.

        Args:
            say: prints a line.
        """
        self._say = say
        for name in dict.fromkeys(self._options.trackers):
            try:
                tracker = _KINDS[name](self._folder, self._options, self._first_step)
                is_started = self._start(tracker, parse_yaml(self._config))
            except Exception as error:
                self.has_abandoned = True
                say(f"tracker: {name} not started ({one_line(error)}); metrics.jsonl has "
                    "everything")
                continue
            if is_started:
                self._trackers.append(tracker)
                for line in tracker.notes:
                    say(line)
            else:
                say(f"tracker: {name} is not installed; metrics.jsonl has everything")

    def __len__(self) -> int:
        return len(self._trackers)

    def replay(self, records: Iterable[Record]) -> None:
        """Hands over the records of metrics.jsonl that a tracker has missed: it was added later,
        had failed, or was killed before it wrote what it was given."""
        records = list(records)
        self._each("stopped", lambda tracker: [self._log(tracker, record) for record in records])

    def log(self, record: Record) -> None:
        """Adds a record, where it is not there from before an interruption."""
        self._each("stopped", lambda tracker: self._log(tracker, record))

    def watch(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, every: int, total_steps: int,
        step: Callable[[], int],
    ) -> None:
        """Has histograms taken before an update when it is time, as ``Histograms`` says."""
        if self._trackers:
            self._histograms = Histograms(
                module, optimizer, every, total_steps, step, lambda: self._trackers
            )

    def add_histograms(self, step: int) -> None:
        """Adds those that were taken in the update that led to ``step``, if there are any and they
        are not there from before an interruption."""
        histograms = {} if self._histograms is None else self._histograms.pop(step)
        if not histograms:
            return
        self._add_missing(histograms, lambda tracker: tracker.histograms(step, histograms), step)

    def summary(self, values: Mapping[str, float]) -> None:
        """Sets numbers that stand for the whole run."""
        self._each("stopped", lambda tracker: tracker.summary(values))

    def hand_over(self, pictures: Iterable[Path]) -> None:
        """Adds what the run folder holds beyond its records, at the last step.

        Args:
            pictures: PNGs, named by their files.
        """
        if self:
            finished.hand_over(self, self._folder, pictures)

    def images(self, images: Mapping[str, Path]) -> None:
        """Adds pictures by name, at the last step, where they are not there already."""
        self._add_missing(images, lambda tracker: tracker.images(images))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
        """Adds a table at the last step; a cell may be a number, a text or the path of a PNG."""
        self._add_missing([name], lambda tracker: tracker.table(name, columns, rows))

    def chart(
        self, name: str, kind: str, columns: Sequence[str], rows: Sequence[Sequence]
    ) -> None:
        """Adds a chart that is drawn from a table, ``line`` or ``confusion``, if it has rows (W&B
        only)."""
        if rows:
            self._add_missing([name], lambda tracker: tracker.chart(name, kind, columns, rows))

    def artifact(
        self, name: str, folder: Path, aliases: Sequence[str], metadata: Mapping[str, Any]
    ) -> None:
        """Uploads a folder that holds a model, as the next version under its name (W&B only)."""
        self._each("stopped", lambda tracker: tracker.artifact(name, folder, aliases, metadata))

    def close(self, exit_code: int) -> None:
        """Ends them; none is waited for longer than 75 seconds."""
        self._each("could not finish", lambda tracker: _within(
            _FINISH_SECONDS, lambda: tracker.finish(exit_code)
        ))
        self._trackers = []

    def _start(self, tracker: Tracker, config: dict) -> bool:
        """Whether it runs now; False where its package is not installed."""
        accelerator, running = self._accelerator, self._accelerator.trackers
        accelerator.project_configuration.logging_dir = str(tracker.folder)
        accelerator.log_with = filter_trackers([tracker.name], str(tracker.folder))
        if not accelerator.log_with:
            return False
        shown = tracker.config(config)

        def start() -> None:
            # init_trackers starts all that it finds, so it shall find this one only.
            accelerator.trackers = []
            accelerator.init_trackers(tracker.project, shown, {tracker.name: tracker.settings()})
            # One that was given up may still come, and stand there, too.
            tracker.started(next(t for t in accelerator.trackers if t.name == tracker.name))

        try:
            try:
                _within(_START_SECONDS, start)
            except Exception as error:
                if not tracker.start_again(error):
                    raise
                _within(_START_SECONDS, start)
        except BaseException:
            accelerator.trackers = running
            raise
        accelerator.trackers = [*running, *accelerator.trackers]
        return True

    def _log(self, tracker: Tracker, record: Record) -> None:
        if not tracker.has(record):
            tracker.log(record)

    def _add_missing(
        self, names: Iterable[str], act: Callable[[Tracker], object], step: int | None = None
    ) -> None:
        """Adds what has these names to each tracker that does not have it at that step, or at the
        last one, from before an interruption; what cannot be added costs no more than itself."""
        def add(tracker: Tracker) -> None:
            keys = dict.fromkeys(names, 0.0) | {"step": tracker.step if step is None else step}
            # The end of a run is not part of its records: of it most trackers cannot tell.
            can_tell = step is not None or tracker.knows_keys
            if can_tell and tracker.has(keys):
                return
            try:
                act(tracker)
            except (TypeError, ValueError, LookupError) as error:
                self._say(f"tracker: {tracker.name} does not take {', '.join(names)} "
                          f"({one_line(error)})")

        self._each("stopped", add)

    def _each(self, what: str, act: Callable[[Tracker], object]) -> None:
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                self.has_abandoned = True
                self._say(f"tracker: {what}: {tracker.name} ({one_line(error)}); metrics.jsonl has "
                          "everything")


def one_line(error: Exception) -> str:
    """What an error says, short and without secrets."""
    return redact(" ".join(str(error).split()))[:200] or type(error).__name__


def _within(seconds: float, act: Callable[[], object]) -> None:
    """Runs ``act``, and waits for it so long at most.

    Raises:
        TimeoutError: it goes on, unattended.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if errors:
        raise errors[0]
