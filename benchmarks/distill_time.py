"""What a step of distill.py costs beside one of train.py and the teacher's forward pass.

    python benchmarks/distill_time.py [--rounds 400 100] [--steps 4 1]

The digits are the job of recipes/digits_mlp_from_resnet.yaml (a ResNet-8 teaches an MLP, 64
samples in two micro-batches); of the images, which are random, a ResNet-20 teaches a ResNet-8, 64
samples of 3x32x32 in one micro-batch. All on one thread, with weights as they are drawn. ``train``
is the step of train.py, ``teacher`` a bare forward pass over the inputs of a step, ``live`` the
step of distill.py with the teacher beside it and ``cached`` the one that reads its outputs from
disk. They alternate in one process, each going first in every fourth round, and the order is
turned round every other time; the figures are medians over the rounds of the ratio. Times are the
processor's, so that other work on the machine counts little (on a GPU, for benchmarks/gpu.py, those
of the clock). Fence and objectives are read out of the scripts, not copied.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import distill  # noqa: E402
from benchmarks.loops import script_functions  # noqa: E402
from trainlib import data, distillation, models, optim, plan, runtime, shards, tasks  # noqa: E402
from trainlib.augment import Augment  # noqa: E402
from trainlib.batchnorm import BatchStatistics  # noqa: E402
from trainlib.config import read  # noqa: E402
from trainlib.evaluate import model_arguments  # noqa: E402
from trainlib.gradients import StepSums  # noqa: E402
from trainlib.guard import Guard, Readback  # noqa: E402
from trainlib.progress import Progress  # noqa: E402
from trainlib.runtime.watchdog import Watchdog  # noqa: E402
from trainlib.schedule import lr_multiplier  # noqa: E402

JOBS = {
    "digits": ["--recipe", str(ROOT / "recipes" / "digits_mlp_from_resnet.yaml"),
               "--distill.teachers", "[{model: {name: resnet, args: {depth: 8, width: 16}}}]"],
    # The outputs of 16 batches are a part of the cache: here 16 parts, CIFAR-10 has 13.
    "images": ["--model.name", "resnet", "--model.args", "{depth: 8, width: 16}",
               "--batch.micro_size", "64", "--batch.eval_size", "16",
               "--distill.teachers", "[{model: {name: resnet, args: {depth: 20, width: 16}}}]"],
}
NUM_IMAGES = 4096
SIDES = ("train", "teacher", "live", "cached")
FUNCTIONS = {"train.py": ("objective", "train_step"),
             "distill.py": ("objective", "rise", "train_step")}


def random_images() -> data.Dataset:
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_IMAGES, 3, 32, 32)
    inputs = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    split = data.Split(
        inputs, {"label": torch.randint(10, (NUM_IMAGES,), generator=generator)},
        torch.arange(NUM_IMAGES), num_valid={"label": torch.ones(NUM_IMAGES, dtype=torch.int64)},
    )
    half = torch.full((3, 1, 1), 0.5)
    targets = {"label": data.TargetInfo([str(number) for number in range(10)])}
    return data.Dataset(split, split, targets, half, half, "random images")


class Job:
    """One job, and what its sides share."""

    def __init__(self, name: str, accelerator, requests):
        self.accelerator, self.requests = accelerator, requests
        self.options = read(distill.StudentOptions, JOBS[name], "")
        if name == "digits":
            source = data.open_source(self.options.data)
            task_options = tasks.resolve({}, source.target_candidates, source.columns)
            self.dataset = data.load(source, self.options.data, task_options)
        else:
            task_options = tasks.resolve({}, ["label"], ["label"])
            self.dataset = random_images()
        self.tasks = tasks.build_tasks(task_options, self.dataset.targets)

    def reader(self, items: dict[str, torch.Tensor]) -> data.Reader:
        batch, train = self.options.batch, self.dataset.train
        batch_plan = plan.BatchPlan(len(train), batch.global_size, self.options.seed)
        assignments = plan.assign(batch.global_size, batch.micro_size, 0, 1)
        return data.Reader(train, batch_plan, assignments, self.accelerator.device, items)

    def student(self) -> torch.nn.Module:
        shape = tuple(self.dataset.train.inputs.shape[1:])
        torch.manual_seed(self.options.seed)
        return models.build_model(
            models.complete(self.options.model, shape, tasks.num_outputs(self.tasks)),
            self.dataset.mean, self.dataset.deviation,
        )

    def teachers(self, student: torch.nn.Module) -> list:
        return distillation.build_teachers(
            self.options.distill, None, student, self.dataset, self.tasks, models
        )


def now(device: torch.device) -> float:
    """Seconds of the processor; of the clock where a GPU works, once it has done what it was given.
    """
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def teacher_side(job: Job) -> Callable[[int], float]:
    """Times the teacher alone on the inputs of so many steps, which are read before."""
    reader = job.reader({})
    [teacher] = job.teachers(job.student())
    device = job.accelerator.device
    teacher.to(device)
    first_step = 0

    def run(num_steps: int) -> float:
        nonlocal first_step
        steps = range(first_step, first_step + num_steps)
        first_step += num_steps
        inputs = [micro_batch.inputs for step in steps for micro_batch in reader.take(step)]
        start = now(device)
        with torch.no_grad():
            for one in inputs:
                teacher.module(one)
        return now(device) - start

    return run


def step_side(job: Job, script: str, cache_dir: str | None = None) -> Callable[[int], float]:
    """Times so many steps of a script, with the records that follow each; made as it makes them."""
    options, dataset, task_list, accelerator = job.options, job.dataset, job.tasks, job.accelerator
    batch, chosen, train = options.batch, options.distill, dataset.train
    if cache_dir is not None:
        chosen = chosen.model_copy(update={"cache": "logits", "cache_dir": cache_dir})
    module, state = job.student(), Progress()
    names = {}
    items = {task.name: task.items(train.num_valid[task.name]) for task in task_list}
    arguments, num_parts = model_arguments(module, task_list), len(task_list)
    if script == "distill.py":
        teacher_list = job.teachers(module)
        teachers = distillation.Teachers(teacher_list, task_list, chosen, accelerator)
        names = {
            "teachers": teachers, "distill": chosen, "distillation": distillation,
            "soft_losses": {t.name: distillation.SoftLoss(t, chosen) for t in teachers.tasks},
            "features": distillation.FeatureLosses(module, teacher_list, chosen, options.seed,
                                                   dataset.example()[0]),
            "rise_steps": 0,
        }
        items |= {distillation.kd_items(t): train.num_valid[t.name] for t in teachers.tasks}
        arguments = distillation.student_arguments(module, teachers, arguments)
        num_parts = len(distillation.loss_parts(task_list, teachers.tasks, chosen))
        if cache_dir is not None:
            teachers.stored = distillation.StoredOutputs(
                teachers, chosen, train, "benchmark", batch.eval_size
            )
            teachers.stored.fill(0, 1, lambda line: None)
    model, prepared = accelerator.prepare(module, optim.build_optimizer(options.optim, module))
    num_micro_batches = plan.num_micro_batches(batch.global_size, batch.micro_size)
    batch_statistics = BatchStatistics(module, num_micro_batches)
    sizes = {"loss": num_parts, "batch_norm": batch_statistics.size, "requests": job.requests.NUM}
    sums = StepSums(accelerator, model, sizes, True, num_micro_batches)
    guard = Guard(prepared.optimizer, accelerator.device, None, lambda step: {})
    readback = Readback(accelerator.device)
    names |= {
        "torch": torch, "plan": plan, "optim": optim, "options": options, "batch": batch,
        "accelerator": accelerator, "model": model, "optimizer": prepared.optimizer,
        "parameters": list(model.parameters()), "scaler": None, "ema": None,
        "max_grad_norm": options.optim.max_grad_norm or float("inf"), "whole": shards.whole,
        "watchdog": Watchdog(300, 1800, print),
        "num_micro_batches": num_micro_batches, "task_list": task_list, "arguments": arguments,
        "reader": job.reader(items), "augment": Augment(), "state": state, "sums": sums,
        "batch_statistics": batch_statistics, "guard": guard, "requests": job.requests,
        "seed_generators": runtime.make_seeder(accelerator.device),
    }
    train_step = script_functions(script, FUNCTIONS[script], names)["train_step"]

    def run(num_steps: int) -> float:
        start = now(accelerator.device)
        for _ in range(num_steps):
            lr = 1e-3 * lr_multiplier("cosine", state.step, 10**6, 100)
            grad_norm = train_step(state.step, lr)
            state.step += 1
            requested = sums["requests"]
            for record in readback.push(state.step, lr, sums["loss"], grad_norm, requested, False):
                guard.observe(record, state)
                job.requests.take(record.requests)
        return now(accelerator.device) - start

    return run


def measure(job: Job, num_rounds: int, num_steps: int) -> dict[str, list[float]]:
    """By side, milliseconds a step of each round."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "train": step_side(job, "train.py"), "teacher": teacher_side(job),
            "live": step_side(job, "distill.py"),
            "cached": step_side(job, "distill.py", f"{folder}/cache"),
        }
        for run in sides.values():
            run(max(num_steps, 3))
        times: dict[str, list[float]] = {name: [] for name in SIDES}
        for number in range(num_rounds):
            first = number % len(SIDES)
            order = [*SIDES[first:], *SIDES[:first]]
            for name in order if number // len(SIDES) % 2 else [order[0], *order[:0:-1]]:
                times[name].append(sides[name](num_steps) / num_steps * 1000)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=tuple(JOBS), default=list(JOBS))
    parser.add_argument("--rounds", type=int, nargs="+", default=[400, 100], help="by job")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 1], help="of a round, by job")
    arguments = parser.parse_args()
    accelerator = runtime.make_accelerator(False, 1)
    requests = runtime.hold_signals(accelerator, 600)
    print(f"torch {torch.__version__}, batch 64, one thread, medians")
    for name, rounds, steps in zip(arguments.jobs, arguments.rounds, arguments.steps, strict=False):
        times = measure(Job(name, accelerator, requests), rounds, steps)
        shown = ", ".join(f"{side} {statistics.median(each):.2f}" for side, each in times.items())
        print(f"{name}, {rounds} rounds of {steps} steps: {shown} ms of the processor a step")
        for what, upper, lower in (("live / (train + teacher)", "live", ("train", "teacher")),
                                   ("cached / train", "cached", ("train",))):
            below = [sum(together) for together in zip(*(times[s] for s in lower), strict=True)]
            ratios = [a / b for a, b in zip(times[upper], below, strict=True)]
            print(f"    {what:26}{statistics.median(ratios):.3f} ({min(ratios):.3f} to "
                  f"{max(ratios):.3f})")


if __name__ == "__main__":
    main()
