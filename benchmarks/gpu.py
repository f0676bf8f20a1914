"""What training takes on a GPU: one table, each figure beside its peers in the same run.

    python benchmarks/gpu.py [--only SECTION ...] [--cifar TRAIN TEST] [--seeds 10] [--rounds 20]
                             [--json FILE] [--against FILE] [--tiny]

speedrun   CIFAR-10 by recipes/cifar10_speedrun.yaml: seconds and accuracy of so many seeds. The
           clock runs from the first step to the end of the only evaluation; compiling is left out,
           as the published record leaves it out, and so is the reading of the data
resnet50   images a second and MFU at 224x224, bf16, channels last, compiled
gpt2       tokens a second and MFU of the shape of GPT-2 124M, bf16, compiled
host       what the host needs to issue a step, beside a bare loop (ours is at most one step
           ahead of the device); the same with the device; steps without a blocking copy or read
exact      the exact sum over 4 micro-batches against torch's own: time and memory
costs      a step of distill.py, a point of a sweep, the stall of a save
equal      sha256 of the final weights of --deterministic runs: again, and on 2 and 4 processes
           of one GPU (gloo) that share the same 4 micro-batches; to rounding of another micro size

MFU counts the multiplications and additions of the net's forward and backward pass (attention
whole, as if it were not causal), against the peak of dense bf16. Each section is a process of its
own, sides alternate within it. --tiny runs everything for a moment, on a CPU if need be and
without compiling, to see that it runs. --cifar takes a folder of parquet files, too.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"WANDB_MODE": "offline", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}

import torch  # noqa: E402

from benchmarks import gpu_runs, jobs, loops, peers, results  # noqa: E402
from benchmarks.gpu_runs import Asked, check, last_line  # noqa: E402
from trainlib import runtime  # noqa: E402

MIB = 2**20
# Dense bf16 of NVIDIA's data sheets, which state twice as much, with sparsity; the first that fits.
PEAK_FLOPS = {"H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12,
              "H100": 989e12, "A100": 312e12}


# ---- throughput ----

def measured(
    section: str, asked: Asked, job: jobs.Job
) -> dict[str, list[float] | results.Row]:
    """By side, the seconds of a step in each round; of a peer that fails, why there is none."""
    accelerator = runtime.make_accelerator(False, 1)
    device, compiles = accelerator.device, not asked.tiny
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    sides = {
        "bare loop": lambda: loops.bare(job, device, dtype, compiles),
        "train.py": lambda: loops.ours(job, accelerator, None, compiles),
        "Accelerate": lambda: peers.plain_accelerate(job, accelerator, compiles),
        "HF Trainer": lambda: peers.trainer(job, device, dtype, compiles),
        "Lightning": lambda: peers.lightning(job, device, dtype, compiles),
    }
    calls, missing = {}, {}

    def attempt(name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            if name in ("bare loop", "train.py"):
                raise
            calls.pop(name, None)
            missing[name] = results.skipped(section, job.name, name, last_line(str(error)))

    def begin(name: str) -> None:
        calls[name] = results.timed(sides[name](), 1 if asked.tiny else job.steps, device)
        calls[name]()

    for name in sides:
        attempt(name, partial(begin, name))
    for name in [*calls]:  # what one library sets for the whole process, the others meet here
        attempt(name, calls[name])
    return results.alternate(calls, asked.rounds) | missing


def throughput(section: str, asked: Asked, job: jobs.Job, unit: str, aim: str) -> list[results.Row]:
    """A row of items a second for each side, and one of its MFU."""
    num_items = job.batch_size
    if job.kind == "language_modeling":
        num_items *= job.dataset.train.inputs.shape[1]
    found = measured(section, asked, job)
    missing = [each for each in found.values() if isinstance(each, results.Row)]
    times = {name: each for name, each in found.items() if not isinstance(each, results.Row)}
    rates = {name: [num_items / seconds for seconds in each] for name, each in times.items()}
    rows = results.compared(section, job.name, rates, unit) + missing
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "this CPU"
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)
    flops = step_flops(job)
    for name, seconds in times.items():
        if peak is None:
            why = f"no peak of {device} is known; {flops:.3g} FLOPs a step"
            rows.append(results.skipped(section, job.name, f"MFU, {name}", why))
            continue
        high, middle, low = (100 * flops / each / peak for each in results.quartiles(seconds))
        rows.append(results.Row(section, job.name, f"MFU, {name}", middle, "%", None, low, high,
                                len(seconds), aim, f"{flops:.4g} FLOPs a step"))
    return rows


def step_flops(job: jobs.Job) -> float:
    """FLOPs of forward and backward over a batch, counted without computing anything."""
    from torch.utils.flop_counter import FlopCounterMode

    meta, samples = torch.device("meta"), 2
    module = job.build(meta)
    inputs, targets = (each[:samples].to(meta) for each in job.tensors(torch.device("cpu")))
    with FlopCounterMode(display=False) as counter:
        job.loss(module(loops.model_inputs(inputs)), targets).backward()
    return counter.get_total_flops() / samples * job.batch_size


def resnet_job(asked: Asked, num_micro_batches: int = 1) -> jobs.Job:
    if not asked.tiny:
        return jobs.resnet50(num_micro_batches=num_micro_batches)
    job = jobs.resnet50(8, 64, num_micro_batches)
    args = {"blocks": [1, 1, 1, 1], "width": 8}
    return replace(job, model=job.model.replaced({"args": args}))


def resnet50(asked: Asked) -> list[results.Row]:
    return throughput("resnet50", asked, resnet_job(asked), "images/s", "")


def gpt2(asked: Asked) -> list[results.Row]:
    job = jobs.gpt2(2, 64, 512, 2, 128) if asked.tiny else jobs.gpt2()
    return throughput("gpt2", asked, job, "tokens/s", ">= 50")


# ---- host, exact ----

def host(asked: Asked) -> list[results.Row]:
    accelerator, rows = runtime.make_accelerator(False, 1), []
    device, steps = accelerator.device, 1 if asked.tiny else 50

    def issued(run: loops.Loop) -> float:
        begin = time.perf_counter()
        run(steps)
        seconds = (time.perf_counter() - begin) / steps
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return seconds

    for job in (jobs.mlp(), *([] if asked.tiny else [jobs.resnet()])):
        bare, ours = loops.bare(job, device, None, False), loops.ours(job, accelerator, None, False)
        for run in (bare, ours):
            run(2 if asked.tiny else 20)
        times = results.alternate({"bare loop": partial(issued, bare),
                                   "train.py": partial(issued, ours)}, asked.rounds)
        rows += results.compared("host", job.name, times, "ms", 1e3)
        shares = [100 * (mine - other) / 5e-3 for mine, other in
                  zip(times["train.py"], times["bare loop"], strict=True)]
        low, middle, high = results.quartiles(shares)
        whole = {name: results.timed(run, steps, device) for name, run in
                 (("bare loop", bare), ("train.py", ours))}
        rows += results.compared("host", f"{job.name}, with the device",
                                 results.alternate(whole, asked.rounds), "ms", 1e3)
        rows.append(results.Row("host", job.name, "the difference, of a step of 5 ms", middle, "%",
                                None, low, high, len(shares), "< 5"))
        what = "steps of 100 before one waits"
        if device.type != "cuda":
            rows.append(results.skipped("host", job.name, what, "a CPU waits for itself"))
            continue
        passed, why = 0, ""
        torch.cuda.set_sync_debug_mode("error")
        try:
            for passed in range(1, 101):  # noqa: B007
                ours(1)
        except RuntimeError as error:
            passed, why = passed - 1, last_line(str(error))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        rows.append(results.Row("host", job.name, what, passed, "steps", aim="100", note=why))
    return rows


def exact(asked: Asked) -> list[results.Row]:
    job, accelerator = resnet_job(asked, 4), runtime.make_accelerator(False, 1)
    device, calls, peaks = accelerator.device, {}, {}
    on_gpu = device.type == "cuda"
    # What the first loop alone would pay, such as the workspaces of libraries, nobody does.
    loops.ours(job, accelerator, False, not asked.tiny)(3)
    for name, is_exact in (("inexact sum", False), ("exact sum", True)):
        if on_gpu:
            before = torch.cuda.memory_allocated(device)
        run = loops.ours(job, accelerator, is_exact, not asked.tiny)
        run(3)  # which compile
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            run(3)
            peaks[name] = [float(torch.cuda.max_memory_allocated(device) - before)]
        calls[name] = results.timed(run, 1 if asked.tiny else job.steps, device)
    rows = results.compared("exact", job.name, results.alternate(calls, asked.rounds), "ms", 1e3,
                            {"exact sum": "<= 1.05"})
    memory = f"{job.name}, peak memory"
    if not on_gpu:
        return [*rows, results.skipped("exact", memory, "both", "a GPU's is asked for")]
    wanted = 8 * sum(p.numel() for p in job.build(torch.device("cpu")).parameters()) / MIB
    return rows + results.compared("exact", memory, peaks, "MiB", 1 / MIB,
                                   {"exact sum": f"+ {wanted:.0f} MiB"})


# Each with the precision of its process.
SECTIONS: dict[str, tuple[Callable[[Asked], list[results.Row]], str]] = {
    "speedrun": (gpu_runs.speedrun, "bf16"), "resnet50": (resnet50, "bf16"),
    "gpt2": (gpt2, "bf16"), "host": (host, "no"), "exact": (exact, "bf16"),
    "costs": (gpu_runs.costs, "no"), "equal": (gpu_runs.equal, "no"),
}


def section(name: str, asked: Asked) -> tuple[list[results.Row], bool]:
    """The rows of a section from a process of its own, and whether that has failed."""
    # One GPU, or HF Trainer takes them all.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    environment = {"ACCELERATE_MIXED_PRECISION": SECTIONS[name][1], "CUDA_VISIBLE_DEVICES": visible,
                   "ACCELERATE_USE_CPU": str(not torch.cuda.is_available()).lower()}
    command = [sys.executable, __file__, "--section", name, json.dumps(asdict(asked))]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        try:
            check([*command, str(out)], **environment)
        except RuntimeError as error:
            if not asked.tiny:
                print(error, file=sys.stderr)
            return [results.skipped(name, "the section", "all", last_line(str(error)))], True
        return [results.Row(**row) for row in json.loads(out.read_text(encoding="utf-8"))], False


def write_section(name: str, asked: str, out: str) -> None:
    """Runs a section here, and ends the process."""
    torch.set_num_threads(1)
    rows = SECTIONS[name][0](Asked(**json.loads(asked)))
    Path(out).write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # the peers' loops stand in threads that never end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--cifar", nargs="+", default=[], help="CIFAR-10 as parquet: train, test")
    parser.add_argument("--seeds", type=int, default=10, help="of the speedrun")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where the figures are kept; benchmarks/gpu.json")
    parser.add_argument("--against", type=Path, help="figures of another time to compare with")
    parser.add_argument("--tiny", action="store_true", help="a moment of everything, on a CPU too")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        print("gpu.py: torch sees no GPU here; --tiny runs a moment of everything on a CPU",
              file=sys.stderr)
        return 2
    asked = Asked(given.tiny, 2 if given.tiny else given.rounds, 1 if given.tiny else given.seeds,
                  [os.path.abspath(each) for each in given.cifar])
    file = given.json or (None if given.tiny else ROOT / "benchmarks" / "gpu.json")
    rows, has_failed = [], False
    print(json.dumps(results.machine()), flush=True)
    for name in given.only:
        found, failed = section(name, asked)
        print(results.table(found), flush=True)
        rows, has_failed = rows + found, has_failed or failed
        if file is not None:  # now, for a section may take longer than one is given
            results.save(file, " ".join(["python", *sys.argv]), rows)
    if given.against:
        print(results.against(given.against, rows))
    return int(has_failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--section"]:
        write_section(*sys.argv[2:])
    sys.exit(main())
