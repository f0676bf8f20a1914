"""What a sweep costs beside plain training: a ratio of steps, from one alternating run.

    python benchmarks/lr_sweep_time.py [--recipe digits_resnet] [--rounds 5] [--points 100]

Each script is run with a few steps and with so many more; the difference is that of the steps
alone, without imports, data and the end of a run. No evaluation and no checkpoint falls between.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FEW = 20


def seconds(script: str, recipe: str, flags: list[str]) -> float:
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | os.environ
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, "--recipe", f"recipes/{recipe}.yaml", "--run_dir",
                   f"{folder}/run", *flags]
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        return time.perf_counter() - started


def costs(recipe: str, points: int) -> dict[str, float]:
    """Seconds of so many points of a sweep and of as many training steps, by script."""
    # Rates at which nothing blows up, which would end the sweep before its time.
    sweep = ["--sweep.lr_min", "1e-6", "--sweep.lr_max", "1e-3", "--sweep.steps"]
    train = ["--log.trackers", "[]", "--log.every", "1000000", "--loop.eval_every", "1000000 steps",
             "--checkpoint.every", "1000000 steps", "--loop.duration"]
    cost = {}
    for script, flags, unit in (("lr_find.py", sweep, ""), ("train.py", train, " steps")):
        few, many = (seconds(script, recipe, [*flags, f"{count}{unit}"])
                     for count in (FEW, FEW + points))
        cost[script] = many - few
    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits_resnet")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--points", type=int, default=100)
    options = parser.parse_args()
    ratios, per_point = [], []
    for _ in range(options.rounds):
        cost = costs(options.recipe, options.points)
        ratios.append(cost["lr_find.py"] / cost["train.py"])
        per_point.append(1000 * cost["lr_find.py"] / options.points)
    print(f"{options.points} points of a sweep over {options.recipe}: "
          f"{statistics.median(ratios):.3f} of as many training steps "
          f"({min(ratios):.3f} to {max(ratios):.3f}, {options.rounds} rounds); "
          f"{statistics.median(per_point):.1f} ms a point")


if __name__ == "__main__":
    main()
