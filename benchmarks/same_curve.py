"""The sha256 of the final weights for each process count, of ours and of the peers.

    python benchmarks/same_curve.py [--processes 1 2 3] [--steps 60] [--peers] [--picture FILE]

Trains each job with micro size 16 and global batch 64, on CPU processes under torchrun, and ends
with exit code 1 if any two process counts of a job differ in one bit of weights or buffers, or in
any recorded loss.

With ``--peers`` Accelerate's plain loop, Hugging Face's Trainer and Lightning train the two jobs
with AdamW, too, on those process counts that share four micro-batches evenly, as ``peer_curve.py``
says; where a peer is not installed it is left out, which is said. What they differ by is printed
and does not change the exit code. ``--picture`` draws what there is for those two jobs.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.peer_curve import NUM_MICRO_BATCHES  # noqa: E402
from trainlib.plots import paper  # noqa: E402

MLP, RESNET = "mlp, dropout 0.3, adamw", "resnet, BatchNorm, adamw"
JOBS = {
    MLP: [],
    "mlp, dropout 0.3, sgd momentum": [
        "--optim.name", "sgd", "--optim.args.momentum", "0.9", "--optim.lr", "0.05"],
    RESNET: ["--model.name", "resnet"],
    "resnet, BatchNorm, sgd momentum": [
        "--model.name", "resnet", "--optim.name", "sgd", "--optim.args.momentum", "0.9",
        "--optim.lr", "0.05"],
}
OURS = "train.py"
PEERS = {"Accelerate, plain loop": "accelerate", "Hugging Face Trainer": "trainer",
         "Lightning": "lightning"}
MODULES = {"accelerate": "accelerate", "trainer": "transformers", "lightning": "lightning"}
PEER_JOBS = {MLP: "mlp", RESNET: "resnet"}


@dataclass(frozen=True)
class Training:
    """What one training left behind."""

    losses: list[float]
    """Of each step, the mean over the global batch."""
    digest: str
    """sha256 of the final weights and buffers."""
    weights: Mapping[str, Tensor]


Trainings = dict[tuple[str, str], dict[int, Training]]
"""By loop and job, then by the number of processes."""


def start(processes: int, script: str, *arguments: str) -> str:
    """Runs a script under torchrun, whatever its exit code; returns what it said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               str(processes), script, *arguments]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return result.stdout + result.stderr


def read_weights(file: Path) -> tuple[str, dict[str, Tensor]]:
    return hashlib.sha256(file.read_bytes()).hexdigest(), load_file(file)


def train(folder: Path, flags: list[str], processes: int, steps: int) -> Training:
    """A job by ``train.py``."""
    said = start(
        processes, "train.py", "--run_dir", str(folder), "--log.trackers", "[]",
        "--log.every", "1", "--batch.micro_size", "16", "--batch.global_size", "64",
        "--loop.duration", f"{steps} steps", *flags,
    )
    written = folder / "exit.json"
    if not written.exists() or json.loads(written.read_text())["code"] != 0:
        sys.exit(said)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    return Training(losses, *read_weights(folder / "final" / "model.safetensors"))


def train_peer(folder: Path, peer: str, model: str, processes: int, steps: int) -> Training:
    """A job by ``peer_curve.py``, judged by its files: gloo may abort after all is done."""
    said = start(processes, "benchmarks/peer_curve.py", peer, model, str(steps), str(folder))
    files = [folder / f"losses.rank{rank}.json" for rank in range(processes)]
    if not all(file.exists() for file in files):
        sys.exit(said)
    each = [json.loads(file.read_text()) for file in files]
    share = NUM_MICRO_BATCHES // processes  # micro-batches of a process in a step
    losses = [math.fsum(loss for mine in each for loss in mine[step * share : (step + 1) * share])
              / NUM_MICRO_BATCHES for step in range(steps)]
    return Training(losses, *read_weights(folder / "model.safetensors"))


def loss_differences(one: Training, other: Training) -> np.ndarray:
    """[steps] how far the losses lie apart."""
    return np.abs(np.subtract(one.losses, other.losses))


def weight_difference(one: Training, other: Training, statistics: bool = False) -> float:
    """The largest in a weight, or in a running statistic of BatchNorm (nan: there is none)."""
    names = [name for name, value in one.weights.items() if value.is_floating_point()
             and statistics == ("running_" in name)]
    return max((float((one.weights[name].double() - other.weights[name].double()).abs().max())
                for name in names), default=float("nan"))


def is_same(trainings: Trainings) -> bool:
    """Whether ours are equal in every bit on all process counts; peers are not asked."""
    return all(
        (training.digest, training.losses) == (first.digest, first.losses)
        for (loop, _), each in trainings.items() if loop == OURS
        for first in [next(iter(each.values()))] for training in each.values()
    )


def table(trainings: Trainings) -> str:
    """How far each loop and job lies from its first process count, in the worst step or place."""
    lines = [f"{'loop':24}{'job':34}{'processes':>10}{'loss':>10}{'weights':>10}{'BatchNorm':>11}"]
    for (loop, job), each in trainings.items():
        (fewest, first), *others = each.items()
        for processes, other in others:
            statistic = weight_difference(first, other, statistics=True)
            lines.append(
                f"{loop:24}{job:34}{f'{fewest}, {processes}':>10}"
                f"{loss_differences(first, other).max():>10.1e}"
                f"{weight_difference(first, other):>10.1e}"
                + (f"{statistic:>11.1e}" if statistic == statistic else ""))
    return "\n".join(lines)


# ---- the picture ----

COLOURS = 64  # of the palette in the file, a fifth of the bytes of full colour
COUNT_LINES = [{"color": "#74a9d8", "linewidth": 3.2, "linestyle": "-"},
               {"color": paper.RED, "linewidth": 1.3, "linestyle": "-"},
               {"color": paper.INK, "linewidth": 1.2, "linestyle": (0, (1, 2))}]
JOB_LINES = {MLP: {"color": paper.BLUE, "marker": "o", "label": "MLP, dropout 0.3"},
             RESNET: {"color": "#d9a514", "marker": "^", "label": "ResNet-8, BatchNorm"}}


def draw(trainings: Trainings, file: Path) -> None:
    """The losses of the MLP on each process count, and below how far those of the first two lie
    apart, for both nets; a column for each loop."""
    loops = list(dict.fromkeys(loop for loop, _ in trainings))
    counts = list(dict.fromkeys(count for each in trainings.values() for count in each))[:3]
    with paper.page(file, 9.2, 5.0) as figure:
        rows = figure.subplots(2, len(loops), sharex=True, sharey="row", squeeze=False)
        for loop, upper, lower in zip(loops, *rows, strict=True):
            upper.set_title(loop)
            for processes, training in trainings[loop, MLP].items():
                if processes in counts:
                    steps = np.arange(1, len(training.losses) + 1)
                    upper.plot(steps, training.losses, **COUNT_LINES[counts.index(processes)],
                               label=f"{processes} process" + "es" * (processes > 1))
            draw_differences(lower, {job: trainings[loop, job] for job in PEER_JOBS})
            lower.set_xlabel("optimizer step")
            for axes in (upper, lower):
                axes.grid(True)
        rows[0, 0].legend(loc="upper right", frameon=False)
        rows[0, 0].set_ylabel("training loss, MLP (nats)")
        rows[1, 0].set_ylabel(
            f"difference of the losses on\n{counts[0]} and {counts[1]} processes (nats)")
        handles = [rows[1, 0].plot([], [], linestyle="none", markersize=4, **style)[0]
                   for style in JOB_LINES.values()]
        figure.legend(handles, [handle.get_label() for handle in handles], ncols=len(handles),
                      loc="outside lower center", frameon=False)
    with Image.open(file) as image:
        small = image.convert("RGB").quantize(COLOURS)
    small.save(file, optimize=True)


def draw_differences(axes: Axes, jobs: Mapping[str, Mapping[int, Training]]) -> None:
    """Differences of a loop's first two process counts on a logarithmic axis, which has no 0."""
    axes.set_yscale("log")
    axes.set_ylim(1e-9, 1)
    axes.set_yticks([1, 1e-2, 1e-4, 1e-6, 1e-8], ["1", "1e-2", "1e-4", "1e-6", "1e-8"])
    zeros = []
    for job, each in jobs.items():
        one, other = list(each.values())[:2]
        apart = loss_differences(one, other)
        zeros.append(not apart.any())
        axes.plot(np.arange(1, len(apart) + 1), np.where(apart > 0, apart, np.nan),
                  linestyle="none", markersize=3, **JOB_LINES[job])
    if all(zeros):
        axes.text(0.5, 0.5, "exactly 0\nat every step,\nboth nets", ha="center", va="center",
                  transform=axes.transAxes, fontsize=11)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--peers", action="store_true", help="train the peers, too")
    parser.add_argument("--picture", type=Path, help="the PNG to draw")
    arguments = parser.parse_args()
    counts = list(dict.fromkeys(arguments.processes))
    peer_counts = [count for count in counts if NUM_MICRO_BATCHES % count == 0]
    if arguments.picture and len(peer_counts if arguments.peers else counts) < 2:
        parser.error("--picture compares process counts: give --processes two or more, with "
                     f"--peers two or more that divide {NUM_MICRO_BATCHES}")
    trainings: Trainings = {}
    print(f"{'loop':24}{'job':34}{'processes':>10}  {'last loss':22}sha256 of the final weights")

    def keep(loop: str, job: str, processes: int, training: Training) -> None:
        trainings.setdefault((loop, job), {})[processes] = training
        print(f"{loop:24}{job:34}{processes:>10}  {training.losses[-1]!r:22}{training.digest}",
              flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for number, (job, flags) in enumerate(JOBS.items()):
            for processes in counts:
                run = Path(folder) / f"{number}_{processes}"
                keep(OURS, job, processes, train(run, flags, processes, arguments.steps))
        for loop, peer in PEERS.items() if arguments.peers else ():
            if find_spec(MODULES[peer]) is None:
                print(f"{loop:24}left out: {MODULES[peer]} is not installed")
                continue
            for job, model in PEER_JOBS.items():
                for processes in peer_counts:
                    run = Path(folder) / f"{peer}_{model}_{processes}"
                    keep(loop, job, processes,
                         train_peer(run, peer, model, processes, arguments.steps))
    print("\nlargest difference between process counts\n" + table(trainings))
    print("versions: " + ", ".join(f"{name} {version(name)}" for name in
                                   ("torch", *MODULES.values()) if find_spec(name)))
    if arguments.picture:
        draw(trainings, arguments.picture)
    same = is_same(trainings)
    print(f"{OURS}: " + ("all equal, bit for bit" if same else "DIFFERENT"))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
