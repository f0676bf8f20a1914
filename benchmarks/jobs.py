"""The jobs that are timed: nets, data that lie in memory, batch sizes, and their losses."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainlib import data, models, optim, tasks  # noqa: E402

NUM_CLASSES = 10


def random_images(number: int, size: int = 32, num_classes: int = NUM_CLASSES) -> data.Dataset:
    """Bytes [number, 3, size, size] and classes by chance: a step takes as long as with real ones.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(256, (number, 3, size, size), dtype=torch.uint8, generator=generator)
    classes = torch.randint(num_classes, (number,), generator=generator)
    half = torch.full((3, 1, 1), 0.5)
    return _in_memory(inputs, "label", classes,
                      data.TargetInfo([str(name) for name in range(num_classes)]), half)


def random_tokens(number: int, length: int, vocabulary: int) -> data.Dataset:
    """Blocks [number, length] of tokens by chance, each token's target the one after it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (number, length + 1), generator=generator)
    info = data.TargetInfo([], vocab_size=vocabulary, bytes_per_token=1.0)
    return _in_memory(tokens[:, :-1].contiguous(), "text", tokens[:, 1:].contiguous(), info, None)


def digits() -> data.Dataset:
    """The job of ``accelerate launch train.py``."""
    options = data.DataOptions()
    return data.load(data.open_source(options), options, tasks.resolve({}, ["digit"], ["digit"]))


def _in_memory(
    inputs: Tensor, task: str, targets: Tensor, info: data.TargetInfo, scale: Tensor | None
) -> data.Dataset:
    each = targets[0].numel() if targets.ndim > 1 else 1
    split = data.Split(inputs, {task: targets}, torch.arange(len(inputs)),
                       num_valid={task: torch.full((len(inputs),), each)})
    return data.Dataset(split, split, {task: info}, scale, scale, "made by chance")


@dataclass(frozen=True)
class Job:
    """What all loops are given alike."""

    name: str
    """With what matters of it, for tables."""
    make_dataset: Callable[[], data.Dataset]
    model: models.ModelOptions
    batch_size: int
    kind: str = "classification"
    num_micro_batches: int = 1
    optimizer: optim.OptimOptions = optim.OptimOptions()
    steps: int = 1
    """Between two looks at the clock."""

    @cached_property
    def dataset(self) -> data.Dataset:
        return self.make_dataset()

    @property
    def task(self) -> str:
        """Of its only task, the name."""
        return next(iter(self.dataset.targets))

    @property
    def tasks(self) -> list[tasks.Task]:
        given = {self.task: tasks.TaskOptions(kind=self.kind, target=self.task)}
        return tasks.build_tasks(tasks.resolve(given, [self.task], [self.task]),
                                 self.dataset.targets)

    @property
    def micro_size(self) -> int:
        return self.batch_size // self.num_micro_batches

    def build(self, device: torch.device) -> nn.Module:
        """The net with fresh weights, the same each time."""
        inputs, _ = self.dataset.example()
        torch.manual_seed(0)
        vocabulary = self.dataset.targets[self.task].vocab_size
        outputs = tasks.num_outputs(self.tasks)
        token_range = (0, vocabulary - 1) if vocabulary else None
        options = models.complete(self.model, inputs.shape[1:], outputs, token_range)
        module = models.build_model(options, self.dataset.mean, self.dataset.deviation)
        return module.to(device)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """All inputs and targets of the training split, as they are stored."""
        split = self.dataset.train
        return split.inputs.to(device), split.targets[self.task].to(device)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Of a plain loop, from the net's logits."""
        output = output.float()
        if self.kind == "language_modeling":
            return functional.cross_entropy(output.flatten(0, 1), targets.flatten())
        return functional.cross_entropy(output, targets)


def mlp() -> Job:
    return Job("default MLP, batch 64", digits, models.ModelOptions(), 64, steps=8)


def resnet(num_micro_batches: int = 1) -> Job:
    name = "CIFAR ResNet-20, batch 128"
    name += f" in {num_micro_batches} micro-batches" if num_micro_batches > 1 else ""
    options = models.ModelOptions(name="resnet", args={"depth": 20, "width": 16})
    return Job(name, lambda: random_images(4096), options, 128,
               num_micro_batches=num_micro_batches)


def small_resnet() -> Job:
    return Job("ResNet-8 on 1x8x8, batch 64", digits, models.ModelOptions(name="resnet"), 64,
               steps=4)


def small_gpt() -> Job:
    options = models.ModelOptions(name="gpt", args={"depth": 2, "width": 96, "heads": 3})
    return Job("GPT (2 x 96), batch 32 x 128 bytes", lambda: random_tokens(2048, 128, 256),
               options, 32, "language_modeling")


def resnet50(batch_size: int = 256, size: int = 224, num_micro_batches: int = 1) -> Job:
    name = f"ResNet-50, {size}x{size}, batch {batch_size}"
    name += f" in {num_micro_batches} micro-batches" if num_micro_batches > 1 else ""
    options = models.ModelOptions(name=f"{ROOT}/benchmarks/nets.py:ResNet50", channels_last=True)
    return Job(name, lambda: random_images(4 * batch_size, size, 1000), options, batch_size,
               num_micro_batches=num_micro_batches, steps=10)


def gpt2(
    batch_size: int = 32, length: int = 1024, vocabulary: int = 50304, depth: int = 12,
    width: int = 768,
) -> Job:
    """The shape of GPT-2 124M, unless told otherwise, with the vocabulary rounded up."""
    name = f"GPT ({depth} x {width}), batch {batch_size} x {length} of {vocabulary} tokens"
    args = {"depth": depth, "width": width, "heads": width // 64}
    options = models.ModelOptions(name="gpt", args=args)
    return Job(name, lambda: random_tokens(8 * batch_size, length, vocabulary), options,
               batch_size, "language_modeling", steps=10)
