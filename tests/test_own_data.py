"""A user's own parquet of images: in memory or from disk, on any number of processes, one curve."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT, assert_same_run, launch, losses, records, train

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


def test_a_broken_image_that_one_process_alone_reads_is_named(tmp_path):
    import datasets
    from PIL import Image

    def encoded(number: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.full((64, 64), number % 256, np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    images = [{"bytes": encoded(number), "path": None} for number in range(1400)]
    columns = {"image": images, "label": [number % 2 for number in range(1400)]}
    datasets.Dataset.from_dict(columns, features).to_parquet(str(tmp_path / "train.parquet"))
    # Not among the 1,024 that the data's fingerprint reads, and in a batch of the second process.
    seen = {number * 1399 // 1023 for number in range(1024)}
    row = next(number for number in range(1400) if number not in seen and number // 2 % 2)
    images[row] = {"bytes": images[row]["bytes"][:40], "path": None}
    datasets.Dataset.from_dict(columns, features).to_parquet(str(tmp_path / "validation.parquet"))
    result = launch(
        ["--run_dir", str(tmp_path / "run"), "--log.trackers", "[]", "--loop.duration", "2 steps",
         "--data.source", str(tmp_path / "train.parquet"), "--data.validation_split",
         str(tmp_path / "validation.parquet"), "--data.in_memory", "false", "--data.workers", "0",
         "--data.normalize", "false", "--batch.eval_size", "2", "--batch.micro_size", "16"],
        processes=2,
    )
    assert f"validation.parquet, row {row}: not an image that can be decoded" in result.stderr
    record = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert record["code"] == 2 and f"row {row}" in record["reason"]
