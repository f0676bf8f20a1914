"""The sections of gpu.py that start scripts or take other benchmarks along, and what all share."""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402
from trainlib import config, runtime  # noqa: E402

PUBLISHED = "published: 2.59 s on an A100 (airbench; method: arXiv:2404.00498)"
NOISE = """
import datasets, numpy
def images():
    pixels = numpy.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), numpy.uint8)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(10))
    columns = {"image": list(pixels), "label": [row % 10 for row in range(200)]}
    return datasets.Dataset.from_dict(columns, features)
"""


@dataclass(frozen=True)
class Asked:
    """What the command line asks of a section."""

    tiny: bool
    rounds: int
    seeds: int
    cifar: list[str]


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no word"])[-1][:200]


def check(command: list[str], **environment: str) -> None:
    """Runs a command at the root.

    Raises:
        RuntimeError: it fails; with what it said.
    """
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                            env=os.environ | environment)
    if result.returncode:
        raise RuntimeError((result.stderr.strip() or result.stdout)[-4000:])


# ---- speedrun ----

def speedrun(asked: Asked) -> list[results.Row]:
    with tempfile.TemporaryDirectory() as name:
        folder, seconds, accuracies = Path(name), [], []
        for seed in range(asked.seeds):
            flags = ["--recipe", "recipes/cifar10_speedrun.yaml", "--seed", str(seed), "--run_dir",
                     str(folder / str(seed)), *cifar_flags(asked.cifar, folder, asked.tiny),
                     "--log.trackers", "[]", "--log.report", "false", "--checkpoint.every",
                     "100 epochs"]
            flags += ["--batch.global_size", "16", "--batch.micro_size", "16", "--loop.duration",
                      "3 steps"] if asked.tiny else ["--model.compile", "inductor"]
            out = folder / f"{seed}.json"
            check([sys.executable, __file__, "--timed-run", str(out), *flags])
            one = json.loads(out.read_text(encoding="utf-8"))
            seconds.append(one["seconds"])
            accuracies.append(100 * one["accuracy"])
    rows, job = [], "CIFAR-10, bf16" + ", compiled" * (not asked.tiny)
    for what, unit, values, aim, note in (
            ("training, mean of the seeds", "s", seconds, "<= 5.2, then 2.59", PUBLISHED),
            ("accuracy, mean of the seeds", "%", accuracies, ">= 94", "")):
        low, _, high = results.quartiles(values)
        rows.append(results.Row("speedrun", job, what, statistics.mean(values), unit, None, low,
                                high, len(values), aim, note))
    return rows


def cifar_flags(given: list[str], folder: Path, tiny: bool) -> list[str]:
    """What names the data: files, those of a folder, else the recipe's own source, or noise."""
    if len(given) == 1 and Path(given[0]).is_dir():
        given = [str(next(iter(sorted(Path(given[0]).glob(f"*{split}*.parquet"))), ""))
                 for split in ("train", "test")]
    if given:
        if len(given) != 2 or not all(Path(file).is_file() for file in given):
            raise FileNotFoundError(f"--cifar: two files are needed, train and test, got {given}")
        return ["--data.source", os.path.abspath(given[0]),
                "--data.validation_split", os.path.abspath(given[1])]
    if tiny:
        (folder / "noise.py").write_text(NOISE)
        return ["--data.source", f"{folder / 'noise.py'}:images", "--data.validation_split", "0.1"]
    return []


def timed_run(out: str, *flags: str) -> None:
    """train.py as it is, and into ``out`` its accuracy and its seconds, without what it compiles.

    ``optim.lr: auto`` trains before the first step and leaves no trace of it, which is the place
    for a warm-up; and the evaluation is run twice.
    """
    import train

    lr, evaluate, begin = config.read(train.TrainOptions, list(flags), "").optim.lr, None, 0.0

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def warm_up(run_log, train_step, sums, guard, requests) -> float:
        nonlocal begin
        for step in range(3):
            train_step(step, lr)
        begin = now()
        return lr

    def evaluated(*given, **named):
        trained = now() - begin
        evaluate(*given, **named)
        again = now()
        found = evaluate(*given, **named)
        content = {"seconds": trained + now() - again, "accuracy": found["label"]["accuracy"]}
        Path(out).write_text(json.dumps(content), encoding="utf-8")
        return found

    evaluate, train.evaluate, train.auto_rate = train.evaluate, evaluated, warm_up
    sys.argv = ["train.py", *flags, "--optim.lr", "auto"]
    runtime.run(train.main)


# ---- costs ----

def costs(asked: Asked) -> list[results.Row]:
    from benchmarks import checkpoint_cost, distill_time, lr_sweep_time

    accelerator, tiny = runtime.make_accelerator(False, 1), asked.tiny
    job = distill_time.Job("digits" if tiny else "images", accelerator,
                           runtime.hold_signals(accelerator, 600))
    times = distill_time.measure(job, asked.rounds, 1 if tiny else 20)
    times["train.py and teacher"] = [sum(both) for both in
                                     zip(times["train"], times["teacher"], strict=True)]
    name, rows = ("ResNet-8 teaches an MLP, digits" if tiny else
                  "ResNet-20 teaches ResNet-8, 64 of 3x32x32"), []
    for what, first, second, aim in (
            ("distill.py", "train.py and teacher", "live", "<= 1.03"),
            ("distill.py, stored outputs", "train", "cached", "<= 1.05")):
        names = {"train": "train.py"}.get(first, first), what
        sides = dict(zip(names, (times[first], times[second]), strict=True))
        rows += results.compared("costs", name, sides, "ms", 1.0, {what: aim})
    # Whole processes, of which few and many points are compared: rounds of a minute.
    points, rounds = (2, 1) if tiny else (2000, 5)
    each = [lr_sweep_time.costs("digits_resnet", points) for _ in range(rounds)]
    steps = {script: [1e3 * one[script] / points for one in each]
             for script in ("train.py", "lr_find.py")}
    rows += results.compared("costs", f"{points} points of a sweep, digits_resnet", steps, "ms")
    with tempfile.TemporaryDirectory() as folder:
        cost = checkpoint_cost.save_cost(Path(folder), [64] if tiny else checkpoint_cost.HIDDEN,
                                         2 if tiny else 21)
    stalls = {"one copy to the host": [cost.copied], "the stall of a save": [cost.stall]}
    return rows + results.compared("costs", f"a checkpoint of {cost.num_bytes / 1e6:.0f} MB",
                                   stalls, "ms", 1e3, {"the stall of a save": "<= 1.2"})


# ---- equal ----

def over_gloo(*flags: str) -> None:
    """train.py on processes that share a GPU, which NCCL refuses."""
    import train

    torch.distributed.init_process_group("gloo")
    # Or Accelerate would hand DDP a GPU of each process's own.
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
    sys.argv = ["train.py", *flags]
    runtime.run(train.main)


def equal(asked: Asked) -> list[results.Row]:
    steps = 4 if asked.tiny else 60
    with tempfile.TemporaryDirectory() as folder:
        def trained(name: str, processes: int, *flags: str) -> tuple[str, list[float]]:
            run = Path(folder) / name
            launcher = ["train.py"] if processes == 1 else [
                "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
                __file__, "--over-gloo"]
            gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
            check([sys.executable, *launcher, "--run_dir", str(run), "--deterministic",
                   "--batch.exact_sum", "true", "--batch.global_size", "64", "--batch.micro_size",
                   "16", "--loop.duration", f"{steps} steps", "--log.every", "1",
                   "--log.trackers", "[]", "--log.report", "false", *flags],
                  CUDA_VISIBLE_DEVICES=gpu)
            weights = (run / "final" / "model.safetensors").read_bytes()
            records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            return hashlib.sha256(weights).hexdigest(), [
                record["train/loss"] for record in records if "train/loss" in record]

        rows, nets = [], {"MLP, dropout": [], "ResNet-8, BatchNorm": ["--model.name", "resnet"]}
        for net in list(nets)[:1 if asked.tiny else None]:
            job = f"{net}, {steps} steps of 4 micro-batches of 16"
            first = trained(net, 1, *nets[net])
            for processes, layout in ((1, "once more"), (2, "2 on each of 2 processes"),
                                      (4, "1 on each of 4 processes"))[1 if asked.tiny else 0:
                                                                       2 if asked.tiny else None]:
                other = trained(f"{net} {processes}", processes, *nets[net])
                rows.append(results.Row("equal", job, f"{layout}, equal", int(other == first),
                                        "in all bits", aim="1",
                                        note=f"sha256 {first[0][:16]}, {other[0][:16]}"))
        plain = ["--model.args.dropout", "0"]
        curves = [trained(f"size {size}", 1, *plain, "--batch.micro_size", str(size))[1]
                  for size in (16, 64)]
        apart = max(abs(one - other) for one, other in zip(*curves, strict=True))
        return [*rows, results.Row("equal", f"MLP without dropout, {steps} steps, a loss at most",
                                   "1 micro-batch against 4", apart, "nats", aim="<= 1e-6")]


if __name__ == "__main__":
    {"--timed-run": timed_run, "--over-gloo": over_gloo}[sys.argv[1]](*sys.argv[2:])
