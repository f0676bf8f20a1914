"""The loops that are timed: a bare one, ours, and those of the peers, on the same job.

Each is a function that takes so many optimizer steps and comes back. All have the same net, the
same fused AdamW, clipping to norm 1, a cosine schedule with warm-up, and the same batch. Ours is
the text of ``train.py`` itself, read out of the file and not copied. Peers take their data as
their users do, from a ``DataLoader``; they log nothing, save nothing and show nothing.
"""

import ast
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

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


# ---- peers ----

def plain_accelerate(job: Job, accelerator: Accelerator, compiles: bool) -> Loop:
    """The loop of Accelerate's own examples, with one ``DataLoader``.

    Args:
        accelerator: as ours has it, so that precision and device are the same.
    """
    module = job.build(accelerator.device)
    optimizer = optim.build_optimizer(job.optimizer, module)
    loader = DataLoader(TensorDataset(*job.tensors(torch.device("cpu"))), job.micro_size,
                        shuffle=True, drop_last=True,
                        pin_memory=accelerator.device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, peak_share)
    loss_of = plain_loss(job, compiles)
    if compiles:
        module.compile(dynamic=False)
    model, optimizer, loader, schedule = accelerator.prepare(module, optimizer, loader, schedule)

    def loop(tick: Callable[[], None]) -> None:
        micro_step = 0
        while True:
            for inputs, targets in loader:
                if micro_step % job.num_micro_batches == 0:
                    tick()
                micro_step += 1
                is_last = micro_step % job.num_micro_batches == 0
                with nullcontext() if is_last else accelerator.no_sync(model):
                    with accelerator.autocast():
                        output = model(model_inputs(inputs))
                    accelerator.backward(
                        loss_of(output, targets) / job.num_micro_batches)
                if is_last:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()

    return _stepwise(loop)


def trainer(job: Job, device: torch.device, dtype: torch.dtype | None, compiles: bool) -> Loop:
    """Hugging Face's Trainer.

    Raises:
        ImportError: transformers is not installed.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    loss_of = plain_loss(job, compiles)

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = job.build(device)
            if compiles:  # not torch_compile, which sets precisions for the whole process
                self.inner.compile(dynamic=False)

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            output = self.inner(model_inputs(inputs))
            return {"loss": loss_of(output, labels)}

    class Rows(torch.utils.data.Dataset):
        def __init__(self):
            self.inputs, self.targets = job.tensors(torch.device("cpu"))

        def __len__(self) -> int:
            return len(self.inputs)

        def __getitem__(self, row: int) -> dict[str, Tensor]:
            return {"inputs": self.inputs[row], "labels": self.targets[row]}

    def loop(tick: Callable[[], None]) -> None:
        class Tick(transformers.TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                tick()

        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder, max_steps=TOTAL_STEPS, per_device_train_batch_size=job.micro_size,
                gradient_accumulation_steps=job.num_micro_batches, optim="adamw_torch_fused",
                learning_rate=PEAK_LR, lr_scheduler_type="cosine", warmup_steps=WARMUP_STEPS,
                weight_decay=job.optimizer.weight_decay, max_grad_norm=MAX_NORM,
                logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
                use_cpu=device.type == "cpu", bf16=dtype == torch.bfloat16,
                dataloader_pin_memory=device.type == "cuda",
                dataloader_drop_last=True, remove_unused_columns=False,
            )
            transformers.Trainer(WithLoss(), arguments, train_dataset=Rows(),
                                 callbacks=[Tick()]).train()

    return _stepwise(loop)


def lightning(job: Job, device: torch.device, dtype: torch.dtype | None, compiles: bool) -> Loop:
    """Lightning's Trainer with automatic optimization.

    Raises:
        ImportError: lightning is not installed.
    """
    import logging
    import warnings

    import lightning as pl

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # That a loader has no workers: nor have the others.
    warnings.filterwarnings("ignore", module="lightning")
    loss_of = plain_loss(job, compiles)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = job.build(device)
            if compiles:
                self.inner.compile(dynamic=False)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            inputs, targets = batch
            return loss_of(self.inner(model_inputs(inputs)), targets)

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            if dtype is not None:  # in mixed precision Lightning clips for no fused optimizer
                nn.utils.clip_grad_norm_(self.parameters(), MAX_NORM)

        def configure_optimizers(self) -> dict:
            optimizer = optim.build_optimizer(job.optimizer, self.inner)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, peak_share)
            return {"optimizer": optimizer,
                    "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def loop(tick: Callable[[], None]) -> None:
        class Tick(pl.Callback):
            def on_train_batch_start(self, _: Any, __: Any, ___: Any, index: int) -> None:
                if index % job.num_micro_batches == 0:
                    tick()

        loader = DataLoader(TensorDataset(*job.tensors(torch.device("cpu"))), job.micro_size,
                            shuffle=True, drop_last=True, pin_memory=device.type == "cuda")
        pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, max_epochs=-1,
            precision="bf16-mixed" if dtype == torch.bfloat16 else 32, logger=False,
            gradient_clip_val=MAX_NORM if dtype is None else None,
            accumulate_grad_batches=job.num_micro_batches,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[Tick()],
        ).fit(Module(), loader)

    return _stepwise(loop)


def _stepwise(loop: Callable[[Callable[[], None]], None]) -> Loop:
    """Turns a loop that never ends into one that takes so many steps: it runs in a thread of its
    own, and waits where it calls ``tick``, at the beginning of each step."""
    go, done = threading.Semaphore(0), threading.Semaphore(0)
    left, failure, threads = 0, [], torch.get_num_threads()

    def tick() -> None:
        nonlocal left
        if left == 0:
            done.release()
            go.acquire()
            torch.set_num_threads(threads)  # which libraries set as they like
        left -= 1

    def work() -> None:
        try:
            loop(tick)
            raise RuntimeError("a loop has ended")
        except BaseException as error:
            failure.append(error)
            done.release()

    def run(num_steps: int) -> None:
        nonlocal left
        left = num_steps
        go.release()
        done.acquire()
        if failure:
            raise failure[0]

    threading.Thread(target=work, daemon=True).start()
    done.acquire()  # at the beginning of the first step
    if failure:
        raise failure[0]
    return run
