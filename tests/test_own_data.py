"""A user's own CIFAR-10 parquet: in memory or from disk, on any number of processes, one curve."""

from pathlib import Path

import pytest
from launching import ROOT, assert_same_run, losses, records, train

CIFAR = ROOT.parent / "shared" / "data" / "cifar10-train.parquet"
AUGMENT = "{crop: 4, flip: 0.5, mixup: 0.2}"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """2,000 of the images, since each run decodes them anew."""
    if not CIFAR.exists():
        pytest.skip(f"CIFAR-10 as parquet is not at {CIFAR}")
    import datasets

    file = tmp_path_factory.mktemp("cifar") / "my_images.parquet"
    datasets.Dataset.from_parquet(str(CIFAR)).select(range(2000)).to_parquet(str(file))
    return file


def flags(images: Path, *more: str) -> list[str]:
    return ["--data.source", str(images), "--data.augment", AUGMENT, "--model.name", "resnet",
            "--batch.global_size", "32", "--batch.micro_size", "16", "--loop.duration", "60 steps",
            "--log.every", "1", "--optim.lr", "3e-3", *more]


def test_in_memory_and_from_disk_on_one_and_two_processes_give_the_same_bits(images, tmp_path):
    in_memory = train(tmp_path / "memory", *flags(images))
    curve = losses(in_memory)
    assert len(curve) == 60 and sum(curve[-10:]) < sum(curve[:10]) - 1  # labels are mixed
    accuracy = [r["eval/accuracy"] for r in records(in_memory) if "eval/accuracy" in r]
    assert max(accuracy) > 0.2  # twice that of a guess
    assert_same_run(in_memory, train(tmp_path / "memory_2", *flags(images), processes=2))
    for workers in (0, 2):
        for processes in (1, 2):
            from_disk = train(
                tmp_path / f"disk_{workers}_{processes}",
                *flags(images, "--data.in_memory", "false", "--data.workers", str(workers)),
                processes=processes,
            )
            assert_same_run(in_memory, from_disk)
