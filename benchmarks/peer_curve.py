"""One training of a peer on the processes of this launch, for ``same_curve.py``.

    torchrun --nproc_per_node 2 benchmarks/peer_curve.py accelerate mlp 60 FOLDER

Each peer trains our net with our fused AdamW, clipping to norm 1 and the same learning rates, from
the same weights, in the loop that its users write; and each is set as a careful user would set it
to get one curve on any number of processes:

- all: micro-batches of 16 on each process, so many to a step that the global batch stays 64; the
  same seed on every process, deterministic algorithms, the learning rate a function of the
  optimizer's steps (never stepped by the number of processes); and 1,408 = 22 x 64 samples, so
  that no epoch ends in a batch that has to be padded, dropped or weighed in another way.
- accelerate: ``accumulate``, and the seedable sampler, without which the order depends on the
  number of processes.
- trainer: Hugging Face's, ``full_determinism``; the seedable sampler is its default.
- lightning: strategy "ddp" on one process, too, because only then the sampler is the same.

Each process writes the loss of each of its micro-batches, the first the final weights, too.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import jobs  # noqa: E402
from trainlib import models, optim  # noqa: E402
from trainlib.data.reading import model_inputs  # noqa: E402
from trainlib.schedule import lr_multiplier  # noqa: E402

CPU = torch.device("cpu")
SEED, MICRO_SIZE, MAX_NORM, WARMUP = 0, 16, 1.0, 0.05
NUM_MICRO_BATCHES = 4
"""In the global batch, on all processes together."""
NUM_SAMPLES = 22 * NUM_MICRO_BATCHES * MICRO_SIZE
Loss = Callable[[Tensor, Tensor], Tensor]


def job(model: str) -> jobs.Job:
    """The digits, and a net of the options of ``train.py``."""
    return replace(jobs.mlp(), model=models.ModelOptions(name=model),
                   num_micro_batches=NUM_MICRO_BATCHES)


def samples(job: jobs.Job) -> TensorDataset:
    """What a model is given, and the targets."""
    inputs, targets = job.tensors(CPU)
    return TensorDataset(model_inputs(inputs[:NUM_SAMPLES]), targets[:NUM_SAMPLES])


def optimizer_of(job: jobs.Job, module: nn.Module, steps: int) -> tuple[Optimizer, LambdaLR]:
    """Those of the job, for so many steps."""
    optimizer = optim.build_optimizer(job.optimizer, module)
    warmup = round(WARMUP * steps)
    return optimizer, LambdaLR(optimizer, lambda k: lr_multiplier("cosine", k, steps, warmup))


def accelerate(job: jobs.Job, loss_of: Loss, steps: int, accumulated: int) -> nn.Module:
    """The loop of Accelerate's examples."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, set_seed

    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=accumulated,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=SEED))
    module = job.build(CPU)
    set_seed(SEED, deterministic=True)
    optimizer, schedule = optimizer_of(job, module, steps)
    loader = DataLoader(samples(job), MICRO_SIZE, shuffle=True)
    # Not the schedule, which would be stepped once for each process.
    model, optimizer, loader = accelerator.prepare(module, optimizer, loader)
    done = 0
    for epoch in count():
        loader.set_epoch(epoch)
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model(inputs), targets))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                schedule.step()
                done += 1
            if done == steps:
                return module


def trainer(job: jobs.Job, loss_of: Loss, steps: int, accumulated: int) -> nn.Module:
    """Hugging Face's Trainer, given the optimizer and the schedule."""
    import transformers

    transformers.logging.set_verbosity_error()

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = job.build(CPU)

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": loss_of(self.inner(inputs), labels)}

    class Rows(Dataset):
        def __init__(self):
            self.samples = samples(job)

        def __len__(self) -> int:
            return len(self.samples)

        def __getitem__(self, row: int) -> dict[str, Tensor]:
            inputs, targets = self.samples[row]
            return {"inputs": inputs, "labels": targets}

    arguments = transformers.TrainingArguments(
        "unused", max_steps=steps, per_device_train_batch_size=MICRO_SIZE,
        gradient_accumulation_steps=accumulated, max_grad_norm=MAX_NORM, use_cpu=True, seed=SEED,
        data_seed=SEED, full_determinism=True, logging_strategy="no", save_strategy="no",
        report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        remove_unused_columns=False)
    module = WithLoss()
    transformers.Trainer(module, arguments, train_dataset=Rows(),
                         optimizers=optimizer_of(job, module.inner, steps)).train()
    return module.inner


def lightning(job: jobs.Job, loss_of: Loss, steps: int, accumulated: int) -> nn.Module:
    """Lightning's Trainer with automatic optimization."""
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = job.build(CPU)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            inputs, targets = batch
            return loss_of(self.inner(inputs), targets)

        def configure_optimizers(self) -> dict:
            optimizer, schedule = optimizer_of(job, self.inner, steps)
            return {"optimizer": optimizer,
                    "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = Module()
    pl.seed_everything(SEED, workers=True)
    pl.Trainer(
        accelerator="cpu", devices=NUM_MICRO_BATCHES // accumulated, strategy="ddp",
        deterministic=True, max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulated,
        gradient_clip_val=MAX_NORM, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, DataLoader(samples(job), MICRO_SIZE, shuffle=True))
    return module.inner


PEERS = {"accelerate": accelerate, "trainer": trainer, "lightning": lightning}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=tuple(PEERS))
    parser.add_argument("model", help="mlp or resnet")
    parser.add_argument("steps", type=int)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if NUM_MICRO_BATCHES % processes:
        parser.error(f"{NUM_MICRO_BATCHES} micro-batches cannot be dealt to {processes} processes")
    torch.set_num_threads(1)
    this_job, losses = job(arguments.model), []

    def loss_of(output: Tensor, targets: Tensor) -> Tensor:
        loss = this_job.loss(output, targets)
        losses.append(loss.item())
        return loss

    module = PEERS[arguments.peer](this_job, loss_of, arguments.steps,
                                   NUM_MICRO_BATCHES // processes)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        save_file(module.state_dict(), arguments.folder / "model.safetensors")
    (arguments.folder / f"losses.rank{rank}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
