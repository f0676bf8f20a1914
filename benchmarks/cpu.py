"""What correctness costs on a CPU: one table of ratios, each measured in one alternating run.

    python benchmarks/cpu.py [--only SECTION ...] [--rounds 40] [--json FILE] [--against FILE]

step       a step of train.py against a bare loop, and against the loops of the peers
exact      the exact sum over 4 micro-batches against torch's own accumulation
memory     the peak memory of a process that trains, against that of the bare loop
start-up   from ``accelerate launch train.py`` to its first update, against a minimal script that
           imports the same packages
waiting    the share of a step that waits for images which one worker decodes from disk
choices    a step of train.py with other optimizers, layouts and kernels than it takes by itself

One thread. Sides alternate in one process, or in processes of their own for memory and start-up;
figures are medians over the rounds, ratios the medians of the ratios, with quartiles. --tiny runs
everything for a moment, to see that it runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline",
               "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}

import torch  # noqa: E402

from benchmarks import jobs, loops, peers, results  # noqa: E402
from benchmarks.checkpoint_cost import SYNTHETIC  # noqa: E402
from benchmarks.start_up import start_up  # noqa: E402
from trainlib import data, models, runtime, tasks  # noqa: E402

CPU = torch.device("cpu")
MIB = 2**20
# The small ResNet has none: its many small norms show what a toy pays.
STEP_AIMS = {"mlp": "<= 1.12", "small resnet": "", "resnet": "<= 1.01", "gpt": "<= 1.01"}
JOBS = {"mlp": jobs.mlp, "small resnet": jobs.small_resnet, "resnet": jobs.resnet,
        "resnet in 4": partial(jobs.resnet, 4), "gpt": jobs.small_gpt}
PEAK_STEPS = 6


def sides_of(job: jobs.Job, exact: bool | None = None) -> dict[str, Callable[[], loops.Loop]]:
    """By name, what makes each loop; the bare one comes first."""
    accelerator = runtime.make_accelerator(False, 1)
    return {
        "bare loop": lambda: loops.bare(job, CPU, None, False),
        "train.py": lambda: loops.ours(job, accelerator, exact, False),
        "Accelerate": lambda: peers.plain_accelerate(job, accelerator, False),
        "HF Trainer": lambda: peers.trainer(job, CPU, None, False),
        "Lightning": lambda: peers.lightning(job, CPU, None, False),
    }


def in_turns(
    section: str, job: jobs.Job, sides: dict[str, Callable[[], loops.Loop]], rounds: int,
    aims: dict[str, str],
) -> list[results.Row]:
    """A row for each side; of a peer that is not installed, why there is none."""
    calls, missing = {}, []
    for name, make in sides.items():
        try:
            calls[name] = results.timed(make(), job.steps, CPU)
        except ImportError as error:
            missing.append(results.skipped(section, job.name, name, error))
    for call in calls.values():
        call()
    times = results.alternate(calls, rounds)
    return results.compared(section, job.name, times, "ms", 1e3, aims) + missing


def step(rounds: int) -> list[results.Row]:
    rows = []
    for name, aim in STEP_AIMS.items():
        job = JOBS[name]()
        count = rounds * (1 if job.steps == 1 else 6)
        rows += in_turns("step", job, sides_of(job), count, {"train.py": aim})
    return rows


def exact(rounds: int) -> list[results.Row]:
    job = JOBS["resnet in 4"]()
    accelerator = runtime.make_accelerator(False, 1)
    sides = {"inexact sum": lambda: loops.ours(job, accelerator, False, False),
             "exact sum": lambda: loops.ours(job, accelerator, True, False)}
    return in_turns("exact", job, sides, rounds, {"exact sum": "<= 1.05"})


# ---- memory ----

PEAKS = {
    "resnet": {"bare loop": "bare", "train.py": "ours", "HF Trainer": "trainer",
               "Lightning": "lightning"},
    "gpt": {"bare loop": "bare", "train.py": "ours"},
    "resnet in 4": {"inexact sum": "inexact", "exact sum": "exact"},
}


def peak_bytes(job_name: str, side: str) -> int:
    """The most memory that this process has ever held, after some steps."""
    job = JOBS[job_name]()
    accelerator = runtime.make_accelerator(False, 1)
    run = {
        "bare": lambda: loops.bare(job, CPU, None, False),
        "ours": lambda: loops.ours(job, accelerator, None, False),
        "exact": lambda: loops.ours(job, accelerator, True, False),
        "inexact": lambda: loops.ours(job, accelerator, False, False),
        "trainer": lambda: peers.trainer(job, CPU, None, False),
        "lightning": lambda: peers.lightning(job, CPU, None, False),
    }[side]()
    run(PEAK_STEPS)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def memory(rounds: int) -> list[results.Row]:
    rows = []
    for name, sides in PEAKS.items():
        job = JOBS[name]()
        parameters = sum(p.numel() for p in job.build(CPU).parameters())

        def call(name: str, side: str) -> float:
            command = [sys.executable, __file__, "--peak", name, side]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(result.stderr)
            return float(result.stdout.split()[-1])

        calls, missing = {}, []
        for what, side in sides.items():
            if side in ("trainer", "lightning") and not installed(side):
                missing.append(results.skipped("memory", job.name, what, "not installed"))
            else:
                calls[what] = partial(call, name, side)
        aims = {"train.py": "<= 1.03", "exact sum": f"+ {8 * parameters / MIB:.1f} MiB"}
        values = results.alternate(calls, max(2, rounds // 10))
        rows += results.compared("memory", job.name, values, "MiB", 1 / MIB, aims) + missing
    return rows


def installed(side: str) -> bool:
    from importlib.util import find_spec

    return find_spec({"trainer": "transformers"}.get(side, side)) is not None


# ---- waiting ----


def waiting(rounds: int) -> list[results.Row]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "noise.py"
        source.write_text(SYNTHETIC)
        options = data.DataOptions(source=f"{source}:images", in_memory=False, workers=1)

        def load() -> data.Dataset:
            return data.load(data.open_source(options), options,
                             tasks.resolve({}, ["label"], ["label", "image"]))

        job = jobs.Job("CIFAR ResNet-20, batch 128, PNG 32x32 by 1 worker", load,
                       models.ModelOptions(name="resnet", args={"depth": 20, "width": 16}), 128)
        waits = [0.0]
        take = data.Reader.take

        def timed_take(reader: data.Reader, number: int) -> list:
            begin = time.perf_counter()
            batches = take(reader, number)
            waits[-1] += time.perf_counter() - begin
            return batches

        data.Reader.take = timed_take
        try:
            run = loops.ours(job, runtime.make_accelerator(False, 1), None, False)
            run(2)  # while the worker starts
            call, shares, seconds = results.timed(run, 1, CPU), [], []
            for _ in range(rounds):
                waits.append(0.0)
                seconds.append(call())
                shares.append(waits[-1] / seconds[-1])
        finally:
            data.Reader.take = take
    low, middle, high = results.quartiles(shares)
    return [results.Row("waiting", job.name, "share of a step", 100 * middle, "%", None, 100 * low,
                        100 * high, len(shares), "< 2 %",
                        f"a step {1e3 * results.quartiles(seconds)[1]:.0f} ms")]


# ---- choices ----


def choices(rounds: int) -> list[results.Row]:
    accelerator, rows = runtime.make_accelerator(False, 1), []

    def ours(job: jobs.Job, compiles: bool = False) -> Callable[[], loops.Loop]:
        return lambda: loops.ours(job, accelerator, None, compiles)

    mlp, resnet, gpt = JOBS["mlp"](), JOBS["resnet"](), JOBS["gpt"]()
    one_by_one = {"foreach": False, "fused": False}

    def optimizer(job: jobs.Job, **args: bool) -> jobs.Job:
        return replace(job, optimizer=job.optimizer.replaced({"args": args}))

    flat = replace(resnet, model=resnet.model.replaced({"channels_last": True}))
    for job, sides in (
        (mlp, {"fused AdamW": ours(mlp), "foreach": ours(optimizer(mlp, foreach=True)),
               "tensor by tensor": ours(optimizer(mlp, **one_by_one))}),
        (resnet, {"as it is": ours(resnet), "channels last": ours(flat),
                  "compiled": ours(resnet, True), "both": ours(flat, True)}),
        (gpt, {"as it is": ours(gpt), "compiled": ours(gpt, True),
               "attention by matrices": lambda: plain_attention(ours(gpt)())}),
    ):
        rows += in_turns("choices", job, sides, rounds * (1 if job.steps == 1 else 3), {})
    return rows


def plain_attention(run: loops.Loop) -> loops.Loop:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def plain(num_steps: int) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            run(num_steps)

    return plain


SECTIONS = {"step": step, "exact": exact, "memory": memory, "start-up": start_up,
            "waiting": waiting, "choices": choices}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=40, help="of the slow steps; others follow")
    parser.add_argument("--json", type=Path, help="where the figures are kept")
    parser.add_argument("--against", type=Path, help="figures of another time to compare with")
    parser.add_argument("--tiny", action="store_true", help="two rounds of everything")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak_bytes(*arguments.peak))
        return
    torch.set_num_threads(1)
    rows = []
    print(json.dumps(results.machine()), flush=True)
    for name in arguments.only:
        found = SECTIONS[name](2 if arguments.tiny else arguments.rounds)
        print(results.table(found), flush=True)
        rows += found
    if arguments.json:
        results.save(arguments.json, " ".join(["python", *sys.argv]), rows)
    if arguments.against:
        print(results.against(arguments.against, rows))


if __name__ == "__main__":
    main()
