"""What trusting a sweep costs: the best rate of a grid against the one that lr_find.py suggests.

    python benchmarks/lr_regret.py [--recipes digits_mlp csv ...] [--optimizers sgd adamw]
                                   [--seeds N] [--set loop.duration="5 epochs" ...]

For each recipe and optimizer: a sweep, a run at each of 9 rates (half a decade apart), and a run at
the answer of each rule on the very curve of that sweep. Regret is the best value of the monitored
metric on the grid minus the one at the answer: in points for shares such as accuracy, in percent of
the best for losses. A rule that gives no rate is charged the grid's median. Hours on a CPU.

The rules of others, with their smoothing, written anew from their sources: fastai 2.8
``schedule.py`` (valley), Lightning 2.6 ``lr_finder.py``, pytorch-lr-finder. They see the very
curve of ours, so its range and its stop, and they always answer.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainlib.config import parse_yaml  # noqa: E402
from trainlib.lr_suggestion import DEFAULT  # noqa: E402
from trainlib.progress import check_monitor  # noqa: E402

OPTIMIZERS = {
    "sgd": (["--optim.name", "sgd", "--optim.args", "{momentum: 0.9}"], np.logspace(-3, 1, 9)),
    "adamw": (["--optim.name", "adamw", "--optim.args", "{}"], np.logspace(-5, -1, 9)),
}
RECIPES = ["digits_mlp", "digits_resnet", "digits_multitask", "digits_multilabel",
           "digits_segmentation", "diabetes_regression", "pydocs_gpt"]


NUM_STEPS = 100  # of a whole sweep, from which fastai counts what it skips


def moving_mean(
    losses: list[float], beta: float, start: float, correction: int | None
) -> np.ndarray:
    """An exponential mean, divided by 1 - beta^(number + correction) if there is one."""
    means, mean = [], start
    for number, loss in enumerate(losses):
        mean = beta * mean + (1 - beta) * loss
        means.append(mean / (1 - beta ** (number + correction)) if correction else mean)
    return np.array(means)


def fastai_valley(lrs: np.ndarray, losses: list[float]) -> float:
    """About the middle of the longest strictly decreasing subsequence."""
    skipped = NUM_STEPS // 10
    values = moving_mean(losses, 0.98, 0.0, 1)[skipped:-5]
    lengths = np.ones(len(values), dtype=int)
    for end in range(len(values)):
        before = [lengths[start] + 1 for start in range(end) if values[start] > values[end]]
        lengths[end] = max([lengths[end], *before])
    end = int(lengths.argmax())
    start = end - lengths[end] if lengths[end] > 1 else 0
    section = (end - start) / 3
    return float(lrs[skipped:-5][start + int(section) + int(section / 2)])


def lightning(lrs: np.ndarray, losses: list[float]) -> float:
    """The steepest fall over lr; its correction counts one step too many, as in the source."""
    values = moving_mean(losses, 0.98, 0.0, 2)
    return float(lrs[10:-1][np.gradient(values[10:-1], lrs[10:-1]).argmin()])


def pytorch_lr_finder(lrs: np.ndarray, losses: list[float]) -> float:
    """The steepest fall over the index, of a mean that starts at the first loss."""
    values = moving_mean(losses, 0.95, losses[0], None)
    return float(lrs[10:-5][np.gradient(values[10:-5]).argmin()])


OTHERS = {"fastai valley": fastai_valley, "Lightning": lightning,
          "pytorch-lr-finder": pytorch_lr_finder}


def run(script: str, folder: Path, flags: list[str]) -> None:
    command = [sys.executable, script, "--run_dir", str(folder), "--log.trackers", "[]", *flags]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode not in (0, 3):  # 3: diverged, which counts as it stands
        sys.exit(result.stdout + result.stderr)


def trained(folder: Path, lr: float, flags: list[str], num_seeds: int) -> float:
    """The best value of the monitored metric at a rate, the mean over seeds; losses are negative,
    so that more is better."""
    best = []
    for seed in range(num_seeds):
        run_dir = folder / str(seed)
        run("train.py", run_dir, [*flags, "--seed", str(seed), "--optim.lr", repr(float(lr))])
        monitor = parse_yaml((run_dir / "config.yaml").read_text())["loop"]["monitor"]
        sign = -1 if check_monitor(monitor, [monitor]) else 1
        records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        values = [sign * r[monitor] for r in records if r.get(monitor) is not None]
        best.append(max(values, default=-np.inf))
    return statistics.mean(best)


def regrets(
    recipe: str, optimizer: str, flags: list[str], folder: Path, num_seeds: int
) -> tuple[str, dict[str, float]]:
    """The unit, and by rule what its answer loses against the best of the grid."""
    optimizer_flags, grid = OPTIMIZERS[optimizer]
    flags = ["--recipe", f"recipes/{recipe}.yaml", *optimizer_flags, *flags]
    run("lr_find.py", folder / "sweep", flags)
    found = json.loads((folder / "sweep" / "lr_find.json").read_text())
    lrs, losses = np.array(found["lrs"]), found["losses"]
    answers = {"ours": found["suggestion"]} | {
        name: rule(lrs, losses) for name, rule in OTHERS.items()
    } | {name: rate for name, rate in found["suggestions"].items() if name != DEFAULT}
    on_grid = [trained(folder / f"grid {lr:.3g}", lr, flags, num_seeds) for lr in grid]
    best = max(on_grid)
    unit = "points" if best > 0 else "% of the loss"
    lost = {}
    for name, lr in answers.items():
        value = statistics.median(on_grid)
        if lr is not None:
            value = trained(folder / name, lr, flags, num_seeds)
        lost[name] = 100 * (best - value) / (1 if best > 0 else -best)
    shown = ", ".join(f"{name} {value:.2f} ({answers[name] or 0:.2g})"
                      for name, value in lost.items())
    print(f"{recipe} {optimizer}: best {abs(best):.4f} at {grid[int(np.argmax(on_grid))]:.2g}; "
          f"lost, in {unit}: {shown}", flush=True)
    return unit, lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, default=1, help="runs at each rate")
    parser.add_argument("--set", nargs="*", default=[], help="further options, as name=value")
    options = parser.parse_args()
    flags = [word for pair in options.set for word in ("--" + pair).split("=", 1)]
    table: dict[tuple[str, str], list[float]] = {}
    for recipe in options.recipes:
        for optimizer in options.optimizers:
            with tempfile.TemporaryDirectory() as folder:
                unit, lost = regrets(recipe, optimizer, flags, Path(folder), options.seeds)
                for name, value in lost.items():
                    table.setdefault((unit, name), []).append(value)
    print(f"{'rule':20}{'mean':>8}{'worst':>10}{'jobs':>6}")
    for (unit, name), lost in sorted(table.items(), key=lambda item: item[0][0]):
        print(f"{name:20}{statistics.mean(lost):>8.2f}{max(lost):>10.2f}{len(lost):>6}  {unit}")


if __name__ == "__main__":
    main()
