"""What every tracker can do, and how trackio and tensorboard do it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainlib import durable
from trainlib.config import flatten

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from trainlib.runlog import LogOptions
    from trainlib.trackers.histograms import Histogram

Record = dict[str, float | None]
"""A line of metrics.jsonl: step, epoch and logged keys."""


class Tracker:
    """One tracker of one run; without more, Accelerate's for numbers, and none of the rest."""

    name: str
    knows_keys = False
    """Whether ``has`` tells, at the last step, what of it is there."""

    def __init__(self, folder: Path, options: LogOptions, first_step: int):
        """
        Args:
            folder: of the run.
            first_step: where the run goes on; 0 at its start.
        """
        self.folder, self.options, self.first_step = folder, options, first_step
        self.project = options.project
        self.run_name = options.name or folder.name
        self.notes: list[str] = []
        """Lines for the terminal."""
        self.step = first_step
        self._last_known = -1

    def settings(self) -> dict[str, Any]:
        """Keywords for Accelerate's tracker."""
        return {}

    def config(self, config: dict) -> dict | None:
        """The run's resolved config, as Accelerate's tracker takes it."""
        return config

    def started(self, tracker: GeneralTracker) -> None:
        """Takes over Accelerate's tracker once it runs."""
        self.tracker = tracker

    def start_again(self, error: Exception) -> bool:
        """Whether another attempt may succeed after this error."""
        return False

    def has(self, record: Record) -> bool:
        """Whether the tracker was given this record before the run was interrupted."""
        return record["step"] <= self._last_known

    def log(self, record: Record) -> None:
        """Adds a record."""
        self.step = record["step"]
        values = {k: v for k, v in record.items() if k != "step" and v is not None}
        self.tracker.log(values, step=self.step)

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Adds histograms by name."""

    def summary(self, values: Mapping[str, float]) -> None:
        """Sets numbers that stand for the whole run."""

    def images(self, images: Mapping[str, Path]) -> None:
        """Adds pictures by name."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
        """Adds a table."""

    def chart(
        self, name: str, kind: str, columns: Sequence[str], rows: Sequence[Sequence]
    ) -> None:
        """Adds a chart that is drawn from a table."""

    def artifact(
        self, name: str, folder: Path, aliases: Sequence[str], metadata: Mapping[str, Any]
    ) -> None:
        """Adds a folder that holds a model."""

    def finish(self, exit_code: int) -> None:
        """Ends the run."""
        self.tracker.finish()


class Trackio(Tracker):
    """trackio, whose runs are files of this machine; ``trackio show`` opens them."""

    name = "trackio"

    def __init__(self, folder: Path, options: LogOptions, first_step: int):
        super().__init__(folder, options, first_step)
        # Runs of one name are one run to trackio: another folder's, or this one's before it was
        # removed, must not be gone on with.
        file = folder / "trackio_run.json"
        former = durable.read_json(file).get("name")
        self.run_name = former or f"{self.run_name}-{secrets.token_hex(3)}"
        if not former:
            durable.write_text(file, json.dumps({"name": self.run_name}) + "\n")

    def settings(self) -> dict[str, Any]:
        return {"name": self.run_name, "group": self.options.group, "resume": "allow",
                "embed": False, "config": self._config}

    def config(self, config: dict) -> None:
        self._config = config  # what Accelerate would set is not what a run reads (trackio 0.43)

    def started(self, tracker: GeneralTracker) -> None:
        super().started(tracker)
        known = getattr(tracker.tracker, "_initial_last_step", None)
        self._last_known = -1 if known is None else known

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        import trackio

        self.tracker.log({name: trackio.Histogram(np_histogram=value)
                          for name, value in histograms.items()}, step=step)

    def images(self, images: Mapping[str, Path]) -> None:
        import trackio

        self.tracker.log({name: trackio.Image(str(file)) for name, file in images.items()},
                         step=self.step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
        import trackio

        table = trackio.Table(columns=list(columns), data=_plain(rows))
        self.tracker.log({name: table}, step=self.step)


class TensorBoard(Tracker):
    """tensorboard, whose files stand in the run folder; what was written after the step where a
    run goes on is purged by tensorboard itself."""

    name = "tensorboard"

    def __init__(self, folder: Path, options: LogOptions, first_step: int):
        super().__init__(folder, options, first_step)
        self.project = "tensorboard"  # to Accelerate the name of a folder in the run's
        logs = folder / self.project
        if logs.is_dir() and any(logs.iterdir()):
            self._last_known = first_step

    def settings(self) -> dict[str, Any]:
        return {"purge_step": self.first_step + 1} if self._last_known >= 0 else {}

    def config(self, config: dict) -> dict[str, Any]:
        plain = (bool, int, float, str)
        return {k: v if isinstance(v, plain) else str(v) for k, v in flatten(config).items()}

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        for name, (counts, edges) in histograms.items():
            centres = (edges[1:] + edges[:-1]) / 2
            self.tracker.tracker.add_histogram_raw(
                name, edges[0], edges[-1], counts.sum(), counts @ centres, counts @ centres**2,
                edges[1:].tolist(), counts.tolist(), step,
            )

    def summary(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.tracker.tracker.add_scalar(f"summary/{name}", value, self.step)

    def images(self, images: Mapping[str, Path]) -> None:
        from PIL import Image

        for name, file in images.items():
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB"))
            self.tracker.tracker.add_image(name, pixels, self.step, dataformats="HWC")

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
        lines = [columns, ["---"] * len(columns), *_plain(rows)]
        text = "\n".join("| " + " | ".join(
            " ".join(str(cell).replace("|", r"\|").split()) for cell in line) + " |"
            for line in lines)
        self.tracker.tracker.add_text(name, text, self.step)


def _plain(rows: Sequence[Sequence]) -> list[list]:
    """Rows with the names of pictures, which these tables do not show."""
    return [[cell.name if isinstance(cell, Path) else cell for cell in row] for row in rows]
