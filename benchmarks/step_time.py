"""Microseconds per step of train.py's fence against a bare PyTorch loop.

    python benchmarks/step_time.py [--rounds 200] [--steps 8]

Both sides have the same model, fused AdamW, clipping, indexing, learning rate and batch of 64 in
one micro-batch, on one thread. They alternate in one process, each going first every other round;
the figure is the median over the rounds of the ratio. The fence and the objective are read out of
train.py, not copied.
"""

import argparse
import ast
import os
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["ACCELERATE_USE_CPU"] = "true"

from trainlib import data, models, optim, plan, runtime, shards, tasks  # noqa: E402
from trainlib.augment import Augment  # noqa: E402
from trainlib.batchnorm import BatchStatistics  # noqa: E402
from trainlib.evaluate import model_arguments  # noqa: E402
from trainlib.gradients import StepSums  # noqa: E402
from trainlib.guard import Guard, Readback  # noqa: E402
from trainlib.progress import Progress  # noqa: E402
from trainlib.runtime.watchdog import Watchdog  # noqa: E402
from trainlib.schedule import lr_multiplier  # noqa: E402

BATCH_SIZE = 64
TASKS = tasks.resolve({}, ["digit"], ["digit"])
MODELS = {
    "mlp": models.ModelOptions(),
    "resnet8": models.ModelOptions(name="resnet"),
    "resnet20": models.ModelOptions(name="resnet", args={"depth": 20}),
}


def script_function(script: str, name: str) -> ast.FunctionDef:
    """A function that a script defines, however deep inside, as it stands there."""
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    [found] = (node for node in ast.walk(tree)
               if isinstance(node, ast.FunctionDef) and node.name == name)
    return found


def build(model_options: models.ModelOptions, dataset: data.Dataset):
    task_list = tasks.build_tasks(TASKS, dataset.targets)
    torch.manual_seed(0)
    module = models.build_model(
        models.complete(model_options, dataset.train.inputs.shape[1:], 10)
    )
    return module, optim.build_optimizer(optim.OptimOptions(), module), task_list


def bare_steps(model_options: models.ModelOptions, dataset: data.Dataset):
    module, optimizer, _ = build(model_options, dataset)
    inputs, targets = dataset.train.inputs, dataset.train.targets["digit"]
    parameters = list(module.parameters())
    order = torch.randperm(len(inputs))
    step = 0

    def run(num_steps: int) -> None:
        nonlocal step
        for _ in range(num_steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * lr_multiplier("cosine", step, 10**6, 100)
            start = step * BATCH_SIZE % (len(inputs) - BATCH_SIZE)
            chosen = order[start : start + BATCH_SIZE]
            loss = torch.nn.functional.cross_entropy(module(inputs[chosen]), targets[chosen])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1

    return run


def fence_steps(model_options: models.ModelOptions, dataset: data.Dataset):
    """A function that runs train.py's own step, compiled from its text, so many times."""
    accelerator = runtime.make_accelerator(False, 1)
    module, optimizer, task_list = build(model_options, dataset)
    model, prepared = accelerator.prepare(module, optimizer)
    options = type("Options", (), {"seed": 0, "optim": optim.OptimOptions()})
    batch = data.BatchOptions(global_size=BATCH_SIZE, micro_size=BATCH_SIZE)
    batch_plan = plan.BatchPlan(len(dataset.train), BATCH_SIZE, 0)
    assignments = plan.assign(BATCH_SIZE, BATCH_SIZE, 0, 1)
    batch_statistics = BatchStatistics(module, 1)
    requests = runtime.hold_signals(accelerator, 600)
    sizes = {"loss": 1, "batch_norm": batch_statistics.size, "requests": requests.NUM}
    sums = StepSums(accelerator, model, sizes, True, 1)
    state = Progress()
    sums.watch_layers(module, optim.parameter_layers(module), lambda: state.step)
    items = {task.name: task.items(dataset.train.num_valid[task.name]) for task in task_list}
    source = ast.parse(
        "def run(num_steps):\n"
        "    for _ in range(num_steps):\n        step = state.step\n"
        "        lr = options.optim.lr * peak_share(step)\n        pass\n"
        "        state.step += 1\n        requested = sums['requests']\n"
        "        losses = sums['loss']\n"
        "        for record in readback.push(step, lr, losses, grad_norm, requested, False):\n"
        "            guard.observe(record, state)\n"
        "            requests.take(record.requests)\n"
    )
    # Without its docstring and its return.
    source.body[0].body[0].body[2:3] = script_function("train.py", "train_step").body[1:-1]
    source.body.append(script_function("train.py", "objective"))
    names = {
        "optimizer": prepared.optimizer, "scaler": None, "state": state, "model": model,
        "requests": requests, "accelerator": accelerator, "options": options, "batch": batch,
        "sums": sums,
        "batch_statistics": batch_statistics, "plan": plan,
        "optim": optim, "task_list": task_list, "parameters": list(model.parameters()),
        "max_grad_norm": 1.0, "num_micro_batches": 1, "whole": shards.whole,
        "augment": Augment(), "ema": None,
        "seed_generators": runtime.make_seeder(accelerator.device),
        "reader": data.Reader(dataset.train, batch_plan, assignments, accelerator.device, items),
        "arguments": model_arguments(module, task_list),
        "guard": Guard(prepared.optimizer, accelerator.device, None, lambda step: {}),
        "readback": Readback(accelerator.device),
        # Its thread looks at the clock every few seconds, which is not a step's.
        "watchdog": Watchdog(300, 1800, print),
        "peak_share": lambda step: lr_multiplier("cosine", step, 10**6, 100),
    }
    exec(compile(ast.fix_missing_locations(source), "train.py", "exec"), names)
    return names["run"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = data.DataOptions()
    dataset = data.load(data.open_source(options), options, TASKS)
    print(f"torch {torch.__version__}, batch {BATCH_SIZE} in one micro-batch, one thread, "
          f"{arguments.rounds} rounds of {arguments.steps} steps, medians")
    print(f"{'model':10}{'bare us':>10}{'fence us':>10}{'ratio':>8}")
    for name, model_options in MODELS.items():
        sides = [bare_steps(model_options, dataset), fence_steps(model_options, dataset)]
        times: list[list[float]] = [[], []]
        for side in sides:
            side(arguments.steps)
        for number in range(arguments.rounds):
            for index in (0, 1) if number % 2 else (1, 0):
                start = time.perf_counter()
                sides[index](arguments.steps)
                times[index].append((time.perf_counter() - start) / arguments.steps * 1e6)
        bare, fence = (statistics.median(record) for record in times)
        ratio = statistics.median(f / b for b, f in zip(*times, strict=True))
        print(f"{name:10}{bare:10.0f}{fence:10.0f}{ratio:8.3f}")


if __name__ == "__main__":
    main()
