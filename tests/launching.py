"""Starting scripts as users start them, and reading what they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from warm import fork

from trainlib import checkpoint, data
from trainlib.tasks import TaskOptions

ROOT = Path(__file__).resolve().parent.parent


def recipes() -> list[Path]:
    """The files of recipes/ that are recipes: a W&B sweep, told by its parameters, is none."""
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    return [file for file in files if "parameters" not in yaml.safe_load(file.read_text())]


def load(*targets: str, tasks: dict[str, TaskOptions] | None = None, **options) -> data.Dataset:
    """A data set as the script loads it, with a classification of each target, or with tasks;
    without options, the digits."""
    chosen = data.DataOptions(**options)
    wanted = tasks or {target: TaskOptions(target=target) for target in targets or ["digit"]}
    return data.load(data.open_source(chosen), chosen, wanted)


def launch(
    arguments: list[str], processes: int = 1, script: str = "train.py", **environment: str | None
) -> subprocess.CompletedProcess:
    """Runs a script on so many CPU processes; output captured, exit code not judged.

    gloo may abort at exit after all work is done, so judge by the files that were written.
    A variable given as None is unset.
    """
    command = [sys.executable, script]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node", str(processes), script]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280,
        env={k: v for k, v in (os.environ | environment).items() if v is not None},
    )


def train(folder: Path, *flags: str, processes: int = 1, script: str = "train.py") -> Path:
    """A finished run in ``folder`` without trackers or pictures; fails with the output if it did
    not finish."""
    result = fork(["--run_dir", str(folder), "--log.trackers", "[]", "--log.report", "false",
                   *flags], processes, script)
    written = folder / "exit.json"
    assert written.exists() and json.loads(written.read_text())["code"] == 0, (
        result.stdout + result.stderr
    )
    return folder


def export(folder: Path, module: nn.Module, config: str, labels: dict, results: dict) -> None:
    """A model as a run leaves it in ``best/`` and ``final/``."""
    options = checkpoint.CheckpointOptions()
    identity = {"batch.global_size": 1}
    checkpoints = checkpoint.Checkpoints(
        folder.parent, Accelerator(cpu=True), options, 1, 1, identity, config
    )
    checkpoints.open(print, lambda: None)
    checkpoints.export(folder.name, module, labels, results)
    checkpoints.finish()


def weights(folder: Path, which: str = "final") -> dict:
    return load_file(folder / which / "model.safetensors")


def records(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(folder: Path) -> list[float]:
    return [record["train/loss"] for record in records(folder) if "train/loss" in record]


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, buffers, losses, gradient norms and evaluations are equal bit for bit."""
    left, right = weights(first), weights(second)
    assert left.keys() == right.keys()
    different = [name for name in left if not left[name].equal(right[name])]
    assert different == []
    timing = ("speed/", "memory/")
    for a, b in zip(records(first), records(second), strict=True):
        assert {k: v for k, v in a.items() if not k.startswith(timing)} == {
            k: v for k, v in b.items() if not k.startswith(timing)
        }
