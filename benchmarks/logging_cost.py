"""What logging costs: steps with W&B offline against steps without a tracker, and a whole command.

    python benchmarks/logging_cost.py [--cifar FILE.parquet] [--pairs 40] [--commands 5]

One run of the CIFAR ResNet-20, batch 128 as in its recipe, a record every 10 steps. Blocks of ten
steps, each with its record, alternate between trackers and none, each going first every other
pair; the figure is the median over the pairs of the ratio. Beside it stand the main process's own
time in the call that logs, which says more on a busy machine, and the processor time of W&B's
process, which runs on another core. Before that the default command, from the start of ``accelerate
launch`` to its end.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}

from checkpoint_cost import SYNTHETIC  # noqa: E402

import train  # noqa: E402
from trainlib.runlog import RunLog  # noqa: E402

BLOCK_STEPS, WARM_UP_BLOCKS = 10, 4


def is_logged(block: int) -> bool:
    """Whether a block has trackers: the order within a pair changes from pair to pair."""
    return block % 4 in (1, 2)


class Times(NamedTuple):
    """Seconds of a block of steps."""

    wall: float
    processor: float
    call: float  # in the call that logs, processor time
    service: float  # of W&B's processes, processor time


def service_seconds() -> float:
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(each.user + each.system for each in times)


def block_times(folder: Path, source: str, num_blocks: int) -> list[Times]:
    stamps: list[tuple[float, float, float, float]] = []
    training, started, spent = RunLog.training, [], [0.0]

    def timed_training(run_log: RunLog, record, losses_of) -> None:
        if not started:
            started.extend(run_log.trackers._trackers)
            assert started, "W&B has not started"
        before = time.thread_time()
        training(run_log, record, losses_of)
        spent[0] += time.thread_time() - before
        if (record.step + 1) % BLOCK_STEPS == 0:
            stamps.append((time.perf_counter(), time.process_time(), spent[0], service_seconds()))
            run_log.trackers._trackers = list(started) if is_logged(len(stamps)) else []

    RunLog.training = timed_training
    # One more block: of the first there is no stamp at its start.
    train.main([
        "--recipe", str(ROOT / "recipes" / "cifar10_resnet.yaml"), "--run_dir", str(folder),
        "--data.source", source, "--data.validation_split", "0.02", "--loop.duration",
        f"{(num_blocks + 1) * BLOCK_STEPS} steps", "--loop.eval_every", "100%", "--log.every",
        str(BLOCK_STEPS), "--log.trackers", "[wandb]", "--log.report", "false",
        "--checkpoint.every", "100%",
    ])
    return [Times(*(after - before for before, after in zip(start, end, strict=True)))
            for start, end in zip(stamps, stamps[1:], strict=False)]


def describe(ratios: list[float]) -> str:
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{statistics.median(ratios):.4f} (quartiles {low:.4f} to {high:.4f})"


def step_cost(folder: Path, source: str, num_pairs: int) -> None:
    times = block_times(folder, source, WARM_UP_BLOCKS + 2 * num_pairs)
    # The stamp that begins block n was the n-th.
    blocks = list(enumerate(times, start=1))[WARM_UP_BLOCKS:]
    ratios: list[list[float]] = [[], []]
    for (first, one), (_, other) in zip(blocks[::2], blocks[1::2], strict=True):
        logged, bare = (one, other) if is_logged(first) else (other, one)
        for kind in (0, 1):
            ratios[kind].append(logged[kind] / bare[kind])
    bare, logged = (
        Times(*map(statistics.median, zip(*(one for number, one in blocks
                                            if is_logged(number) == wanted), strict=True)))
        for wanted in (False, True)
    )
    whole_service = sum(one.service for _, one in blocks) / num_pairs
    print(f"ResNet-20, batch 128, {num_pairs} pairs of {BLOCK_STEPS} steps, a step "
          f"{bare.wall / BLOCK_STEPS * 1e3:.0f} ms, {bare.processor / BLOCK_STEPS * 1e3:.0f} ms of "
          f"processor: with W&B offline {describe(ratios[0])} of the time without trackers (aim: "
          f"1.01), {describe(ratios[1])} of the processor time;\n  the call that logs takes "
          f"{logged.call * 1e3:.2f} ms in {BLOCK_STEPS} steps against {bare.call * 1e3:.2f}: "
          f"{(logged.call - bare.call) / bare.processor:.3%} of them; W&B's own process "
          f"{whole_service * 1e3:.1f} ms, {whole_service / bare.processor:.2%}")


def command_cost(folder: Path, num_commands: int) -> None:
    seconds = []
    for number in range(num_commands):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "train.py",
             "--run_dir", str(folder / str(number))],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        seconds.append(time.perf_counter() - started)
    print(f"accelerate launch train.py, W&B offline: {statistics.median(seconds):.1f} s, "
          f"{min(seconds):.1f} to {max(seconds):.1f} s in {num_commands} runs (aim: 25)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", help="a parquet file; without it the images are noise")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--commands", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "noise.py").write_text(SYNTHETIC)
        command_cost(folder / "commands", options.commands)
        step_cost(folder / "run", options.cifar or f"{folder / 'noise.py'}:images", options.pairs)


if __name__ == "__main__":
    main()
