"""The sources that come with the packages: real data, no download. Their splits are fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trainlib.data.decoding import Decoder


class Column(NamedTuple):
    """A possible target of a builtin source."""

    kind: str
    """The kind of task that it is for."""
    label_names: list[str]
    values: Tensor
    """[rows, ...] as ``targets.Encoder`` gives them."""


class Table(NamedTuple):
    """A builtin source of inputs and targets."""

    decode: Decoder
    train_rows: np.ndarray
    validation_rows: np.ndarray
    columns: dict[str, Column]
    description: str


class Texts(NamedTuple):
    """A builtin source of text to model."""

    texts: list[str]
    description: str


def _split(labels: np.ndarray | None, num_rows: int, num_validation: int) -> list[np.ndarray]:
    from sklearn.model_selection import train_test_split

    rows = np.arange(num_rows)
    return [np.sort(part) for part in train_test_split(
        rows, test_size=num_validation, stratify=labels, random_state=0)]


def _digits() -> Table:
    """UCI "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998), as in scikit-learn.

    Inputs are [1, 8, 8] in [0, 1]. ``ink`` is their sum; of ``quadrants`` those have ink whose
    mean is over 1/4.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16  # 16 grey levels
    quarters = functional.avg_pool2d(images, 4).flatten(1)
    columns = {
        "digit": Column("classification", [str(name) for name in bunch.target_names],
                        torch.tensor(bunch.target, dtype=torch.int64)),
        "ink": Column("regression", ["ink"], images.double().sum((1, 2, 3))[:, None]),
        "quadrants": Column("multilabel", ["top left", "top right", "bottom left", "bottom right"],
                            (quarters > 0.25).float()),
    }
    return Table(images.__getitem__, *_split(bunch.target, len(images), 360), columns,
                 "builtin:digits: 1,797 images of handwritten digits")


def _digits_ink() -> Table:
    """The digits at [1, 32, 32], in blocks of 4x4 pixels; where their smooth enlargement has ink.

    The ``mask`` is 1 where the bicubic enlargement is over 1/2, 0 where it is below, and 255,
    to be ignored, within 0.05 of it.
    """
    digits = _digits()
    images = digits.decode(np.arange(len(digits.columns["ink"].values)))
    smooth = functional.interpolate(images, scale_factor=4, mode="bicubic").squeeze(1)
    masks = torch.where((smooth - 0.5).abs() < 0.05, 255, (smooth > 0.5).long()).to(torch.uint8)
    large = functional.interpolate(images, scale_factor=4, mode="nearest")
    return digits._replace(
        decode=large.__getitem__,
        columns={"mask": Column("segmentation", ["paper", "ink"], masks)},
        description="builtin:digits_ink: 1,797 images of handwritten digits",
    )


def _diabetes() -> Table:
    """442 patients (Efron et al. 2004, "Least Angle Regression"), as in scikit-learn, unscaled.

    Inputs are [10]: age, sex, body mass index, blood pressure and six blood values; the target is
    the progression of the disease after a year.
    """
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    inputs = torch.tensor(bunch.data, dtype=torch.float32)
    progression = torch.tensor(bunch.target, dtype=torch.float64)[:, None]
    return Table(inputs.__getitem__, *_split(None, len(inputs), 88),
                 {"progression": Column("regression", ["progression"], progression)},
                 "builtin:diabetes: 442 patients")


def _pydocs() -> Texts:
    """The prose of Python's own reference, as its ``help()`` has it; it grows with each version."""
    import platform
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    return Texts(texts, f"builtin:pydocs: {len(texts)} topics of the reference of Python "
                        f"{platform.python_version()}")


TABLES: dict[str, Callable[[], Table]] = {
    "builtin:digits": _digits, "builtin:digits_ink": _digits_ink, "builtin:diabetes": _diabetes,
}
TEXTS: dict[str, Callable[[], Texts]] = {"builtin:pydocs": _pydocs}
