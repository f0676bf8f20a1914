"""Weights & Biases: one run, however often it is interrupted.

The run's id is chosen here and saved before the first contact. The x axis is our own step; W&B's
counter is never given, because it refuses to go back. What an interrupted run's records came to is
asked of the server where it knows the run, else of the run's own files: the process that writes
them holds records back for a while and dies with the script (measured: a SIGKILL 0.1 s after 50
records left none of them with the default of 15 s).
"""

from __future__ import annotations

import json
import math
import netrc
import os
import re
import secrets
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainlib import durable
from trainlib.credentials import redact
from trainlib.trackers.others import Record, Tracker

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from trainlib.runlog import LogOptions
    from trainlib.trackers.histograms import Histogram

_ID_FILE = "wandb_run.json"
_ONLINE = (None, "online", "shared")  # modes that need a key
_INIT_SECONDS, _FINISH_SECONDS, _FLUSH_SECONDS, _READ_SECONDS = 20, 60, 1, 120
# W&B's own charts, and what each calls its columns.
_CHARTS = {
    "line": ("wandb/line/v0", ("x", "y", "stroke")),
    "confusion": ("wandb/confusion_matrix/v1", ("Actual", "Predicted", "nPredictions")),
}
_PREEMPTED = 75  # the exit code of a run that goes on when it is started again


class WeightsAndBiases(Tracker):
    """Weights & Biases, online where there is a key, else in files of the run folder."""

    name = "wandb"
    knows_keys = True

    def __init__(self, folder: Path, options: LogOptions, first_step: int):
        super().__init__(folder, options, first_step)
        self._id = _run_id(folder)
        self._mode, self._why = os.environ.get("WANDB_MODE") or None, ""
        # Decided before init, which without a key asks for one and waits.
        if self._mode in _ONLINE and not _has_key():
            self._go_offline("no key found, so ")
        self._is_retry = False
        self._last_keys: set[str] = set()
        try:
            self._last_known, self._last_keys = _last_written(folder, self._id)
        except (OSError, ValueError, subprocess.SubprocessError):
            # Then what stands in metrics.jsonl counts as logged, and is not logged once more.
            self._last_known = first_step + 1

    def settings(self) -> dict[str, Any]:
        if self._is_retry:
            import wandb

            wandb.teardown()  # the former attempt still holds the run's id
        # A service of the program that started this one (W&B's variable is inherited) would outlive
        # a kill, and then the run's id counts as in use.
        os.environ.pop("WANDB_SERVICE", None)
        options, mode = self.options, {} if self._mode is None else {"mode": self._mode}
        return mode | {
            "id": self._id, "resume": "allow", "dir": str(self.folder), "name": self.run_name,
            "group": options.group, "job_type": options.job_type, "tags": options.tags or None,
            "notes": options.notes,
            "settings": {
                "silent": True, "console": "off", "save_code": False, "disable_code": True,
                "disable_git": True,
                # It would hold all of SLURM's variables, tokens among them, and the command line.
                "x_disable_meta": True, "init_timeout": _INIT_SECONDS,
                "finish_timeout": _FINISH_SECONDS,
                "x_transaction_log_flush_interval": _FLUSH_SECONDS,
            },
        }

    def start_again(self, error: Exception) -> bool:
        if self._mode not in _ONLINE or isinstance(error, TimeoutError):
            return False
        self._is_retry = True
        self._go_offline(f"not started ({redact(' '.join(str(error).split()))[:120]}), so ")
        return True

    def started(self, tracker: GeneralTracker) -> None:
        super().started(tracker)
        self.run = tracker.tracker
        if self.run.resumed:
            # A server has what reached it, whatever the files here say.
            self._last_known = self.run.summary.get("step", -1)
        elif not self.run.offline:
            self._last_known = -1
        if self.run.offline:
            logs = shlex.quote(str(self.folder / "wandb"))
            self.notes.append(
                f"wandb: {self._why}this run is logged offline; look at it with `wandb leet {logs}`"
                f", upload it with `wandb sync {logs}/offline-run-*`")
        machine = self.folder / "environment.json"
        if machine.exists():
            self.run.config.update({"environment": json.loads(machine.read_text(encoding="utf-8"))},
                                   allow_val_change=True)
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def has(self, record: Record) -> bool:
        step = record["step"]
        if step != self._last_known:
            return step < self._last_known
        return record.keys() <= self._last_keys

    def log(self, record: Record) -> None:
        self.step = record["step"]
        self.tracker.log({k: math.nan if v is None else v for k, v in record.items()})

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        import wandb

        self.log({"step": step} | {name: wandb.Histogram(np_histogram=value)
                                   for name, value in histograms.items()})

    def summary(self, values: Mapping[str, float]) -> None:
        self.run.summary.update(dict(values))

    def images(self, images: Mapping[str, Path]) -> None:
        import wandb

        self.log({"step": self.step} | {name: wandb.Image(str(file))
                                        for name, file in images.items()})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
        import wandb

        data = [[wandb.Image(str(cell)) if isinstance(cell, Path) else cell for cell in row]
                for row in rows]
        self.log({"step": self.step, name: wandb.Table(columns=list(columns), data=data)})

    def chart(
        self, name: str, kind: str, columns: Sequence[str], rows: Sequence[Sequence]
    ) -> None:
        import wandb

        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        names = dict(zip(_CHARTS[kind][1], columns, strict=True))
        chart = wandb.plot_table(_CHARTS[kind][0], table, names, {"title": name})
        self.log({"step": self.step, name: chart})

    def artifact(
        self, name: str, folder: Path, aliases: Sequence[str], metadata: Mapping[str, Any]
    ) -> None:
        import wandb

        name = re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)  # all that W&B takes
        artifact = wandb.Artifact(name, type="model", metadata=dict(metadata))
        for file in sorted(folder.iterdir()):  # add_dir would print
            artifact.add_file(str(file))
        self.run.log_artifact(artifact, aliases=list(aliases))

    def finish(self, exit_code: int) -> None:
        if exit_code == _PREEMPTED:
            self.run.mark_preempting()
        self.run.finish(exit_code=exit_code)

    def _go_offline(self, why: str) -> None:
        self._mode, self._why = "offline", why


def _run_id(folder: Path) -> str:
    """The id of this folder's run: the one that was saved, a sweep's, or a new one."""
    file = folder / _ID_FILE
    former = durable.read_json(file).get("id")
    run_id = former or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    if not former:
        durable.write_text(file, json.dumps({"id": run_id}) + "\n")
    return run_id


def _last_written(folder: Path, run_id: str) -> tuple[int, set[str]]:
    """The last step in the files of the run's earlier sessions, -1 if there is none, and the keys
    that were logged at it, by W&B's own reader.

    A session goes on where the one before it ended: the newest that holds a step tells.

    Raises:
        OSError, ValueError, subprocess.SubprocessError: they cannot be read, or not in two minutes.
    """
    files = folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")
    # By time: run-20261124_... or offline-run-20261124_...
    for file in sorted(files, key=lambda f: f.parent.name.removeprefix("offline-"), reverse=True):
        last, keys = -1, set()
        for item in _history(file):
            if item.get("step", -1) > last:
                last, keys = item["step"], set()
            # A histogram or a picture is shown as several keys, NAME._type and others, a chart as
            # the table NAME_table.
            if item.get("step") == last:
                keys |= {key.removesuffix("._type").removesuffix("_table") for key in item}
        if last >= 0:
            return last, keys
    return -1, set()


def _history(file: Path) -> Iterator[dict[str, Any]]:
    """The records in a file of W&B's, one at a time: there may be millions."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as reader:
        limit = threading.Timer(_READ_SECONDS, reader.kill)
        limit.start()
        try:
            for line in reader.stdout:
                yield json.loads(line).get("history", {}).get("item", {})
        finally:
            limit.cancel()
    if reader.returncode != 0:
        raise subprocess.CalledProcessError(reader.returncode, command)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host or host in os.environ.get("WANDB_BASE_URL", "") for host in hosts)
