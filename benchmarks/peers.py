"""The loops of the peers on the jobs that are timed, as ``loops`` has the bare one and ours.

They take their data as their users do, from a ``DataLoader``; they log nothing, save nothing and
show nothing.
"""

import sys
import tempfile
import threading
from collections.abc import Callable
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
from benchmarks.loops import (  # noqa: E402
    MAX_NORM,
    PEAK_LR,
    TOTAL_STEPS,
    WARMUP_STEPS,
    Loop,
    peak_share,
    plain_loss,
)
from trainlib import optim  # noqa: E402
from trainlib.data.reading import model_inputs  # noqa: E402


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
