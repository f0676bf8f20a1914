"""The loops that are timed: a bare one and ours, on the same job; ``peers`` has the others.

Each is a function that takes so many optimizer steps and comes back. All have the same net, the
same fused AdamW, clipping to norm 1, a cosine schedule with warm-up, and the same batch. Ours is
the text of ``train.py`` itself, read out of the file and not copied.
"""

import ast
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.jobs import Job  # noqa: E402
from trainlib import data, optim, plan, runtime, shards  # noqa: E402
from trainlib.augment import Augment  # noqa: E402
from trainlib.batchnorm import BatchStatistics  # noqa: E402
from trainlib.data.reading import model_inputs  # noqa: E402
from trainlib.evaluate import model_arguments  # noqa: E402
from trainlib.gradients import StepSums  # noqa: E402
from trainlib.guard import Guard, Readback  # noqa: E402
from trainlib.progress import Progress  # noqa: E402
from trainlib.runtime.watchdog import Watchdog  # noqa: E402
from trainlib.schedule import lr_multiplier  # noqa: E402

PEAK_LR, MAX_NORM, WARMUP_STEPS, TOTAL_STEPS = 1e-3, 1.0, 100, 10**6
Loop = Callable[[int], None]


def peak_share(step: int) -> float:
    return lr_multiplier("cosine", step, TOTAL_STEPS, WARMUP_STEPS)


def plain_loss(job: Job, compiles: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The job's loss for a plain loop, compiled where its net is: ours of a GPT is a part of it."""
    return torch.compile(job.loss, dynamic=False) if compiles else job.loss


def script_functions(script: str, names: tuple[str, ...], given: Mapping[str, Any]) -> dict:
    """Functions that a script defines, however deep inside, over other surroundings.

    Args:
        given: by name, what they use of the script's; it is not changed.
    """
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    found = {node.name: node for node in ast.walk(tree)
             if isinstance(node, ast.FunctionDef) and node.name in names}
    surroundings = dict(given)
    exec(compile(ast.Module([found[name] for name in names], []), script, "exec"), surroundings)
    return surroundings


def bare(job: Job, device: torch.device, dtype: torch.dtype | None, compiles: bool) -> Loop:
    """What one would write for this job alone: indexing, forward, backward, clipping, step.

    Args:
        dtype: of autocast; none: fp32.
    """
    module = job.build(device)
    optimizer = optim.build_optimizer(job.optimizer, module)
    inputs, targets = job.tensors(device)
    parameters, order = list(module.parameters()), torch.randperm(len(inputs)).to(device)
    loss_of = plain_loss(job, compiles)
    if compiles:
        module.compile(dynamic=False)
    step, size, parts = 0, job.micro_size, job.num_micro_batches

    def run(num_steps: int) -> None:
        nonlocal step
        for _ in range(num_steps):
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * peak_share(step)
            start = step * job.batch_size % (len(inputs) - job.batch_size + 1)
            for part in range(parts):
                chosen = order[start + part * size : start + (part + 1) * size]
                with torch.autocast(device.type, dtype) if dtype else nullcontext():
                    output = module(model_inputs(inputs[chosen]))
                    loss = loss_of(output, targets[chosen]) / parts
                loss.backward()
            nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            step += 1

    return run


def ours(job: Job, accelerator: Accelerator, exact: bool | None, compiles: bool) -> Loop:
    """The step of ``train.py`` with the records that follow each.

    Args:
        accelerator: of ``runtime.make_accelerator``.
        exact: as ``batch.exact_sum``.
    """
    device, dataset = accelerator.device, job.dataset
    module = job.build(device)
    optimizer = optim.build_optimizer(job.optimizer, module)
    model, prepared = accelerator.prepare(module, optimizer)
    optimizer, task_list = prepared.optimizer, job.tasks
    options = type("Options", (), {"seed": 0, "optim": job.optimizer})
    batch = data.BatchOptions(global_size=job.batch_size, micro_size=job.micro_size)
    batch_plan = plan.BatchPlan(len(dataset.train), job.batch_size, 0)
    assignments = plan.assign(job.batch_size, job.micro_size, 0, 1)
    batch_statistics = BatchStatistics(module, job.num_micro_batches)
    if compiles:
        module.compile(dynamic=False)
    requests = runtime.hold_signals(accelerator, 600)
    sizes = {"loss": 1, "batch_norm": batch_statistics.size, "requests": requests.NUM}
    sums = StepSums(accelerator, model, sizes, exact, len(assignments))
    state = Progress()
    sums.watch_layers(module, optim.parameter_layers(module), lambda: state.step)
    items = {task.name: task.items(dataset.train.num_valid[task.name]) for task in task_list}
    guard = Guard(optimizer, device, None, lambda step: {})
    readback = Readback(device)
    train_step = script_functions("train.py", ("objective", "train_step"), {
        "torch": torch, "plan": plan, "optim": optim, "options": options, "batch": batch,
        "accelerator": accelerator, "model": model, "optimizer": optimizer, "sums": sums,
        "parameters": list(model.parameters()), "scaler": None, "ema": None, "whole": shards.whole,
        "max_grad_norm": MAX_NORM, "num_micro_batches": job.num_micro_batches, "guard": guard,
        "task_list": task_list, "batch_statistics": batch_statistics, "requests": requests,
        "augment": Augment(), "arguments": model_arguments(module, task_list),
        "seed_generators": runtime.make_seeder(device),
        "reader": data.Reader(dataset.train, batch_plan, assignments, device, items),
        # Its thread looks at the clock every few seconds, which is not a step's.
        "watchdog": Watchdog(300, 1800, print),
    })["train_step"]

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            lr = PEAK_LR * peak_share(state.step)
            grad_norm = train_step(state.step, lr)
            state.step += 1
            for record in readback.push(state.step - 1, lr, sums["loss"], grad_norm,
                                        sums["requests"], False):
                guard.observe(record, state)
                requests.take(record.requests)

    return run
