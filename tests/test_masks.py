"""Masks: what is read from a user's images or lists of class numbers, and what is refused."""

import io
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from tables import read, refusal

from trainlib.augment import Augment
from trainlib.losses import IGNORED

RANDOM = np.random.default_rng(0)
told = partial(refusal, read)
pytestmark = pytest.mark.usefixtures("own_folder")
NAN = float("nan")
IMAGES = RANDOM.integers(0, 256, (8, 4, 6, 3), dtype=np.uint8)


def everything(split) -> tuple[torch.Tensor, torch.Tensor]:
    """All inputs and targets, as the task is given them."""
    inputs, stored = split.read(np.arange(len(split)))
    return inputs, split.task_targets(stored)["y"]


def encode(pixels, mode=None, form="PNG") -> bytes:
    """A file of an image, or of class numbers in one of Pillow's modes."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if mode == "P":  # whose palette has nothing to do with the numbers
        image = Image.new("P", image.size)
        image.putdata(pixels.flatten().tolist())
        image.putpalette([(7 * place) % 256 for place in range(3 * 256)])
    elif mode is not None:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def drawn(values, shape=(8, 4, 6), dtype=np.uint8) -> np.ndarray:
    """Masks that have each of these values."""
    pool = np.resize(values, shape).reshape(shape[0], -1)
    return RANDOM.permuted(pool, axis=1).reshape(shape).astype(dtype)


def table(masks, images=IMAGES) -> dict:
    masks = masks.tolist() if isinstance(masks, np.ndarray) else masks
    return {"x": [encode(image) for image in images[:len(masks)]], "y": masks}


def segment(masks, other=None, images=IMAGES, options=None, function=read, **more):
    """What is read of masks, as lists or files."""
    return function({"kind": "segmentation"} | (options or {}), table(masks, images),
                    table(masks if other is None else other, images), **more)


def refused(masks, other=None, options=None, **more) -> str:
    return segment(masks, other, options=options, function=told, **more)


@pytest.mark.parametrize("mode, form, dtype", [
    (None, None, np.uint8), (None, None, np.int64), (None, None, bool), ("L", "PNG", np.uint8),
    ("L", "BMP", np.uint8), ("P", "PNG", np.uint8), ("P", "GIF", np.uint8), ("1", "PNG", np.uint8),
    ("I;16", "PNG", np.uint16), ("I", "TIFF", np.int32),
])
@pytest.mark.parametrize("options", [{}, {"in_memory": False, "workers": 2}])
def test_masks_are_class_numbers_in_whatever_they_lie(mode, form, dtype, options):
    masks = drawn([0, 1] if dtype is bool or mode == "1" else [0, 1, 2], dtype=dtype)
    given = masks if mode is None else [encode(
        mask * 255 if mode == "1" else mask, None if mode[0] == "I" else mode, form)
        for mask in masks]
    dataset = segment(given, **options)
    inputs, targets = everything(dataset.train)
    assert targets.dtype == torch.int64 and np.array_equal(targets, masks)
    assert np.array_equal(inputs.permute(0, 2, 3, 1), IMAGES)
    assert dataset.targets["y"].label_names == [str(number) for number in range(masks.max() + 1)]
    assert dataset.train.num_valid["y"].tolist() == [24] * 8


def test_masks_in_memory_and_from_disk_are_the_same():
    files = [encode(mask) for mask in drawn([0, 1, 3, 255])]
    kept, streamed = (
        segment(files, options={"ignore_index": 255}, in_memory=in_memory, workers=workers)
        for in_memory, workers in ((True, 0), (False, 2)))
    samples = [np.array([3, 1]), np.array([7]), np.array([2, 2, 0])]
    batches = [split.batches(samples, torch.device("cpu"))
               for split in (kept.train, streamed.train)]
    for (inputs, targets), (others, other_targets) in zip(*batches, strict=True):
        assert inputs.equal(others) and targets["y"].equal(other_targets["y"])
    assert everything(kept.train)[1].unique().tolist() == [IGNORED, 0, 1, 3]
    assert kept.train.num_valid["y"].equal(streamed.train.num_valid["y"])
    assert kept.train.num_valid["y"].tolist() == [18] * 8
    assert kept.mean.equal(streamed.mean) and kept.targets == streamed.targets


def test_masks_of_0_and_255_have_two_classes():
    masks = drawn([0, 255])
    for given in (masks, [encode(mask) for mask in masks]):
        dataset = segment(given, options={"label_names": ["paper", "ink"]})
        assert np.array_equal(everything(dataset.train)[1], masks // 255)
        assert dataset.targets["y"].label_names == ["paper", "ink"]
    assert "other.parquet, row 0: the mask of task 'y' has the value 1, which no training" in (
        refused(masks, drawn([0, 1])))
    three = segment(drawn([0, 1, 255]), options={"ignore_index": 255})  # unless 255 is ignored
    assert three.targets["y"].label_names == ["0", "1"]
    assert "the class 0 only" in refused(masks, options={"ignore_index": 255})
    assert np.array_equal(everything(segment(masks, masks[:1] * 0).validation)[1], masks[:1] * 0)


@pytest.mark.parametrize("ignored, dtype", [(255, np.uint8), (0, np.uint8), (-1, np.int64),
                                            (-100, np.int64)])
def test_ignored_pixels_do_not_count(ignored, dtype):
    masks = drawn([1, 2, ignored], dtype=dtype)
    masks[5] = ignored
    dataset = segment(masks, options={"ignore_index": ignored})
    wanted = np.where(masks == ignored, IGNORED, masks.astype(np.int64))
    assert np.array_equal(everything(dataset.train)[1], wanted)
    assert dataset.train.num_valid["y"].tolist() == [0 if row == 5 else 16 for row in range(8)]
    assert "tasks.y: no validation sample has this target" in refused(
        masks, np.full_like(masks, ignored), options={"ignore_index": ignored})


def test_masks_with_ignored_pixels_miss_some():
    assert segment(drawn([0, 1, 255]), options={"ignore_index": 255}).targets["y"].may_miss


@pytest.mark.parametrize("ignored, value", [(-100, 156), (-2, 254), (300, 44)])
def test_bytes_are_not_taken_for_an_ignored_number_outside_them(ignored, value):
    files = [encode(mask) for mask in drawn([0, 1, value])]
    dataset = segment(files, options={"ignore_index": ignored})
    assert dataset.train.num_valid["y"].tolist() == [24] * 8


@pytest.mark.parametrize("bad", [0.5, NAN])
def test_fractions_are_no_classes(bad):
    assert "'y'" in refused(drawn([0, 1, bad], dtype=np.float64))


def test_masks_that_are_none_are_refused():
    binary = drawn([0, 1])
    files = [encode(mask) for mask in binary]
    assert "row 0: 'y' has an image of mode RGB; a mask holds one class number a pixel" in refused(
        [encode(image) for image in IMAGES])
    assert "mode RGB" in refused([encode(image) for image in IMAGES], image_size=4)
    assert "have 5x6 pixels, the images 4x6; both have one size" in refused(
        drawn([0, 1], (8, 5, 6)))
    odd = [*files[:5], encode(binary[5].T), *files[6:]]
    assert "train.parquet, row 5: the mask has 6x4 pixels, the first one 4x6; bring" in refused(odd)
    assert "other.parquet, row 5: the mask has 6x4 pixels" in refused(files, odd)
    assert "row 1: 'y' has a list of 6, the first row has 4" in refused(
        [mask.T.tolist() if row == 1 else mask.tolist() for row, mask in enumerate(binary)])
    assert "train.parquet, row 3: the image is missing" in refused([*files[:3], None, *files[4:]])
    assert "row 0: class numbers of a mask lie in 0..255, this one has 0..300" in refused(
        [encode(mask) for mask in drawn([0, 300], dtype=np.uint16)])
    for value in (-1, 256, 2**32 + 1):
        assert f"has the value {value}; class numbers of a mask lie in 0..255" in refused(
            drawn([0, 1, value], dtype=np.int64))
    assert "train.parquet: the masks of task 'y' have the class 0 only" in refused(binary * 0)
    for given in (binary, files):
        assert "other.parquet, row 0: the mask of task 'y' has the value 2, which no training" in (
            refused(given, drawn([0, 1, 2]) if given is binary else
                    [encode(mask) for mask in drawn([0, 1, 2])]))
    assert "tasks.y.label_names: 2 names, the masks have class numbers up to 3" in refused(
        drawn([0, 3]), options={"label_names": ["a", "b"]})
    named = segment(binary, drawn([0, 1, 2]), options={"label_names": ["a", "b", "c"]})
    assert named.targets["y"].label_names == ["a", "b", "c"]  # which training has not, but is known
    assert "or lists of them without data.image_size" in refused(binary, image_size=4)
    assert "'y' holds text values; the target of a segmentation holds images" in refused(["a"] * 8)
    assert "a segmentation task has one target column, got y, y" in refused(
        binary, options={"target": ["y", "y"]})


@pytest.mark.parametrize("size", [4, [4, 6], [8, 4], 16])
def test_images_and_masks_are_brought_to_one_size_alike(size):
    small = drawn([0, 1], (6, 4, 8))
    masks = small.repeat(4, 1).repeat(4, 2)  # at a quarter the kernel's weight of a block is 3/4
    images = np.stack([masks * 255] * 3, 3)
    dataset = segment([encode(mask) for mask in masks], images=images, image_size=size)
    inputs, targets = everything(dataset.train)
    height, width = (size, size) if isinstance(size, int) else size
    assert inputs.shape == (6, 3, height, width) and targets.shape == (6, height, width)
    assert set(targets.unique().tolist()) == {0, 1}
    is_plain = (inputs[:, 0] < 64) | (inputs[:, 0] > 191)
    agrees = (inputs[:, 0] > 127) == targets.bool()
    assert agrees[is_plain].all() and agrees.float().mean() > 0.9
    if size == 4:  # covers the height, cut about the centre
        assert np.array_equal(targets, small[:, :, 2:6]) and agrees.all()


@pytest.mark.parametrize("options", [{"crop": 2}, {"flip": 0.5}, {"crop": 1, "flip": 0.5}])
def test_crop_and_flip_move_masks_along_with_their_pixels(options):
    torch.manual_seed(0)
    images = (torch.arange(1, 1 + 16 * 5 * 7).view(16, 1, 5, 7) / 1000).repeat(1, 3, 1, 1)
    classes = torch.randint(0, 250, (16, 5, 7))
    classes[torch.rand(16, 5, 7) < 0.2] = IGNORED
    place = {"first": classes, "second": (classes + 1).clamp(min=0), "other": torch.arange(16)}
    augment = Augment(**options, brightness=0.1, cutout=2, masks=("first", "second"),
                      ignored=IGNORED)
    _, moved, _ = augment(images, place)
    plain = Augment(**options, masks=("first", "second"), ignored=IGNORED)
    torch.manual_seed(7)
    inputs, targets, _ = plain(images, place)
    origin = (inputs[:, 0] * 1000).round().long()  # 0 behind a crop, else a pixel's number
    assert (origin == 0).any() == bool(options.get("crop")) and not inputs.equal(images)
    for name in ("first", "second"):
        numbers = torch.cat([torch.tensor([IGNORED]), place[name].flatten()])
        assert targets[name].equal(numbers[origin]) and targets[name].dtype == torch.int64
        assert moved[name].shape == targets[name].shape
    assert targets["other"] is place["other"]
    torch.manual_seed(7)
    assert Augment(**options)(images, place)[0].equal(inputs)  # masks change no image


def test_255_above_a_gap_is_asked_about():
    message = refusal(segment, [encode(mask) for mask in drawn([0, 1, 2, 255])])
    assert "have the values 0, 1, 2 and 255" in message and "--tasks.y.ignore_index 255" in message
