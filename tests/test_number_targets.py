"""Numbers as targets: what is read from a user's columns, their scale, and what is refused."""

from decimal import Decimal
from functools import partial

import numpy as np
import pyarrow
import pytest
import torch
from tables import read, refusal

RANDOM = np.random.default_rng(0)
told = partial(refusal, read)
pytestmark = pytest.mark.usefixtures("own_folder")
NAN = float("nan")
NUMBER = {"kind": "regression"}
LABELS = {"kind": "multilabel"}


def everything(split) -> torch.Tensor:
    """All targets, as the task is given them."""
    return split.task_targets(split.read(np.arange(len(split)))[1])["y"]


@pytest.mark.parametrize("large", [0.0, 1e9, -1e10])
def test_numbers_are_standardised_by_the_training_rows_alone(large):
    rows = RANDOM.normal(size=(200, 3)) * [0.1, 1e3, 1] + large
    rows[3, 1], rows[0, 2] = NAN, NAN
    train, other = rows[:150], rows[150:]
    # Relative to the deviation: a few roundings of the numbers themselves.
    tolerance = 1e-12 + 8 * 2.0**-52 * abs(large) / 0.1
    mean, deviation = np.nanmean(train - large, 0), np.nanstd(train - large, 0)
    for given, form in ((NUMBER, lambda rows: {"y": list(rows)}),
                        (NUMBER | {"target": ["a", "b", "c"]}, lambda rows: {
                            name: pyarrow.array(column, from_pandas=True)
                            for name, column in zip("abc", rows.T, strict=True)})):
        dataset = read(given, form(train), form(other))
        info, known = dataset.targets["y"], dataset.train.targets["y"]
        assert known.dtype == dataset.validation.targets["y"].dtype == torch.float64
        np.testing.assert_allclose(info.deviation, deviation, rtol=tolerance)
        np.testing.assert_allclose(known.nanmean(0), 0, atol=tolerance)
        np.testing.assert_allclose(np.nanstd(known.numpy(), 0), 1, rtol=tolerance)
        for split, part in ((dataset.train, train), (dataset.validation, other)):
            wanted = (part - large - mean) / deviation
            np.testing.assert_allclose(split.targets["y"], wanted, atol=10 * tolerance, rtol=1e-9)
        assert dataset.train.num_valid["y"].tolist() == (~np.isnan(train)).sum(1).tolist()
    held = read(NUMBER, {"y": rows[:, 0]})
    chosen = rows[held.train.rows.numpy(), 0] - large
    np.testing.assert_allclose(held.targets["y"].deviation, chosen.std(), rtol=tolerance)


@pytest.mark.parametrize("column", [
    pyarrow.array([0, 1, 0, 4], pyarrow.uint8()), pyarrow.array([False, True, False, True]),
    pyarrow.array([Decimal("0.5"), Decimal("1.25"), Decimal(0), Decimal(-3)]),
    pyarrow.array(np.array([0.5, 1, 0, -2], np.float16)), pyarrow.array([0.5, 1, 0, -2]),
    pyarrow.array([-(2**62), 2**62, 0, 1]), [[0.5], [1.0], [0.0], [2.0]],
])
def test_numbers_of_every_type_are_read(column):
    dataset = read(NUMBER, {"y": column}, {"y": column})
    info = dataset.targets["y"]
    values = column.to_pylist() if isinstance(column, pyarrow.Array) else column
    np.testing.assert_allclose(everything(dataset.train).numpy() * info.deviation + info.mean,
                               np.array(values, np.float64).reshape(4, 1), rtol=1e-12, atol=1e-12)
    assert info.label_names == (["y"] if isinstance(column, pyarrow.Array) else ["y[0]"])


def test_numbers_that_are_none_are_refused():
    def numbers(column, other=None):
        return told(NUMBER, {"y": column}, {"y": column if other is None else other})

    assert "the target 'y' is missing in 2 of 4 rows, first in row 1" in numbers([1, None, 2, NAN])
    assert "other.parquet: the target 'y' is missing in 1 of 2" in numbers([1, 2], [1.0, None])
    assert "the target 'y' is missing in 1 of 3 rows" in numbers([[1.0], [2.0], None])
    assert "other.parquet: the target 'y' is infinite in 1 of 2 rows, first in row 1" in numbers(
        [1, 2], [1.0, -float("inf")])
    for constant in (0.0, 0.1, -1e9, 1e100):
        assert "tasks.y: 'y' has one value only in the training rows" in numbers([constant] * 7)
    assert "'y' has lists of another length than 2, the first one's, in 1 of 2 rows" in numbers(
        [[1.0, 2.0], [1.0]])
    assert "'y' holds text values; the target of a regression holds numbers" in numbers(["1", "2"])
    both = NUMBER | {"target": ["a", "b"]}
    assert "'b' holds list values" in told(
        both, {"a": [1, 2], "b": [[1], [2]]})
    assert "needs two or more" in told(both, {"a": [1, 2], "b": [3, 3]}, {"a": [1, 2], "b": [3, 3]})


def test_numbers_of_one_column_do_not_make_another_constant():
    dataset = read(
        NUMBER | {"target": ["a", "b"]}, ab := {"a": [1e-3, 2e-3], "b": [1e12, 3e12]}, ab)
    np.testing.assert_allclose(everything(dataset.train), [[-1, -1], [1, 1]], rtol=1e-12)


@pytest.mark.parametrize("kind", [NUMBER, LABELS])
def test_validation_numbers_that_are_text_are_refused(kind):
    assert "other.parquet" in told(kind, {"y": [0, 1]}, {"y": ["0", "unknown"]})


def test_numbers_too_large_for_their_squares_are_refused_or_scaled():
    dataset = read(NUMBER, {"y": [1e200, 3e200]}, {"y": [2e200]})
    np.testing.assert_allclose(everything(dataset.train), [[-1], [1]], rtol=1e-12)



def test_a_row_alone_cannot_be_held_out():
    assert "train.parquet" in (message := told(NUMBER, {"y": [1.0]}))
    assert "class" not in message
