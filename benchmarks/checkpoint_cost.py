"""What checkpoints cost: the stall of a save, the time of a run, the seek of a resume.

    python benchmarks/checkpoint_cost.py [--cifar FILE.parquet]

Medians of sides that alternate in one run, on CPUs.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | os.environ

from trainlib import data, models, optim, plan, runtime  # noqa: E402
from trainlib.checkpoint import CheckpointOptions, Checkpoints  # noqa: E402
from trainlib.checkpoint.state import model_tensors, optimizer_state  # noqa: E402
from trainlib.progress import Progress  # noqa: E402

HIDDEN = [3610, 3610]  # 13.3 M parameters
CIFAR_STEPS, CIFAR_PAIRS, CIFAR_BATCH_SIZE = 400, 3, 32
SYNTHETIC = """import datasets, numpy
def images():
    pixels = numpy.random.default_rng(0).integers(0, 256, (5000, 32, 32, 3), numpy.uint8)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(10))
    columns = {"image": list(pixels), "label": [number % 10 for number in range(5000)]}
    return datasets.Dataset.from_dict(columns, features)
"""


def alternate(rounds: int, *sides: Callable[[], object]) -> list[float]:
    """Median seconds of each side."""
    times: list[list[float]] = [[] for _ in sides]
    for number in range(rounds):
        for index in sorted(range(len(sides)), reverse=number % 2 == 1):
            started = time.perf_counter()
            sides[index]()
            times[index].append(time.perf_counter() - started)
    return [statistics.median(each) for each in times]


@dataclass(frozen=True)
class SaveCost:
    """Of a save, in seconds; medians, but for the first."""

    num_bytes: int
    stall: float
    copied: float
    """One copy of the same tensors into host memory at hand."""
    cloned: float
    """One into new memory where they are."""
    whole: float
    """With the writing beside the loop."""
    first: float
    """The stall of the first save."""


def save_cost(folder: Path, hidden: list[int] = HIDDEN, rounds: int = 21) -> SaveCost:
    """The stall of a save against one host copy of the same tensors."""
    accelerator = runtime.make_accelerator(False, 1)
    options = models.ModelOptions(args={"hidden": hidden})
    module = models.build_model(models.complete(options, (1, 8, 8), 10)).to(accelerator.device)
    is_on_gpu = accelerator.device.type == "cuda"
    optimizer = optim.build_optimizer(optim.OptimOptions(), module)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    sources = [*model_tensors(module).values(), *optimizer_state(optimizer, module)[0].values()]
    copies = [torch.empty_like(source, device="cpu", pin_memory=is_on_gpu) for source in sources]
    checkpoints = Checkpoints(folder, accelerator, CheckpointOptions(every="1 step"), 10**6, 64,
                              {"batch.global_size": 64}, "")
    checkpoints.open(print, lambda: None)
    progress, stalls = Progress(), []

    def save() -> None:
        progress.step += 1
        finish()
        started = time.perf_counter()
        checkpoints.save(module, optimizer, None, progress)
        stalls.append(time.perf_counter() - started)
        checkpoints.wait()

    def finish() -> None:
        if is_on_gpu:
            torch.cuda.synchronize()

    def copy() -> None:
        for target, source in zip(copies, sources, strict=True):
            target.copy_(source)

    def clone() -> None:
        kept = [source.clone() for source in sources]
        finish()
        del kept

    save()
    whole, copied, cloned = alternate(rounds, save, copy, clone)
    return SaveCost(sum(source.nbytes for source in sources), statistics.median(stalls[1:]),
                    copied, cloned, whole, stalls[0])


def say_save_cost(cost: SaveCost) -> None:
    print(f"a save of {cost.num_bytes / 1e6:.0f} MB stalls the loop for {cost.stall * 1e3:.1f} ms: "
          f"{cost.stall / cost.copied:.2f} of a copy into memory at hand, "
          f"{cost.stall / cost.cloned:.2f} of one into new memory (aim: 1.2);\n  the first save "
          f"{cost.first * 1e3:.0f} ms; with the writing beside the loop {cost.whole * 1e3:.0f} ms")


def run_cost(folder: Path, source: str) -> None:
    """Training with a checkpoint every 100 steps against training without."""
    flags = ["--recipe", "recipes/cifar10_resnet.yaml", "--data.source", source,
             "--data.validation_split", "0.02", "--loop.duration", f"{CIFAR_STEPS} steps",
             "--batch.global_size", str(CIFAR_BATCH_SIZE), "--batch.micro_size",
             str(CIFAR_BATCH_SIZE), "--log.trackers", "[]", "--log.every", "10"]
    seconds: dict[str, list[float]] = {"100 steps": [], "9999 steps": []}
    for pair in range(CIFAR_PAIRS):
        for every in sorted(seconds, reverse=pair % 2 == 1):
            run = folder / f"{every} {pair}"
            command = [sys.executable, "train.py", "--run_dir", str(run), *flags,
                       "--checkpoint.every", every]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            # After the first 100 steps, which warm everything up and hold no save but their last.
            seconds[every].append(sum(
                10 * CIFAR_BATCH_SIZE / record["speed/samples_per_second"]
                for record in records if "train/loss" in record and record["step"] > 100))
    pairs = zip(*seconds.values(), strict=True)
    ratios = sorted(saved / bare for saved, bare in pairs)
    print(f"{CIFAR_STEPS - 100} steps of a ResNet-20 with a checkpoint every 100 steps: "
          f"{statistics.median(ratios):.3f} of the time without (aim: 1.03), pairs "
          f"{', '.join(f'{ratio:.3f}' for ratio in ratios)}")


def plan_cost() -> None:
    """The first batch at step 10^9 of 10^9 samples against that at step 0."""
    num_samples = 10**9
    # One sample under 10^9 numbers: no memory.
    split = data.Split(torch.zeros(1, 64).expand(num_samples, 64),
                       {"label": torch.zeros(1, dtype=torch.uint8).expand(num_samples)},
                       torch.zeros(1, dtype=torch.int64).expand(num_samples))

    def first_batch(places: Iterator[int]) -> None:
        batch_plan = plan.BatchPlan(num_samples, 64, 0)
        reader = data.Reader(split, batch_plan, plan.assign(64, 32, 0, 1), torch.device("cpu"))
        reader.take(next(places))

    # Around each: how often a draw is sent on depends on where it lies, up to a fifth of the time.
    fresh, resumed = (partial(first_batch, itertools.count(step, 64)) for step in (0, 10**9))
    fresh_seconds, resumed_seconds = alternate(301, fresh, resumed)
    print(f"the first batch at step 10^9 of 10^9 samples takes {resumed_seconds * 1e3:.2f} ms: "
          f"{resumed_seconds / fresh_seconds:.3f} of that at step 0 (aim: 1.0)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", help="a parquet file; without it the images are noise")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "noise.py").write_text(SYNTHETIC)
        say_save_cost(save_cost(folder / "save"))
        plan_cost()
        run_cost(folder / "runs", options.cifar or f"{folder / 'noise.py'}:images")


if __name__ == "__main__":
    main()
