"""Sources, their checks, and the reader."""

import numpy as np
import pytest
import torch

from trainlib import data, plan
from trainlib.config import UserError

DIGITS = data.load(data.DataOptions())


def test_digits_are_split_once_and_for_all_without_overlap():
    train, validation = DIGITS.train, DIGITS.validation
    assert (len(train), len(validation)) == (1437, 360)
    assert not set(train.rows.tolist()) & set(validation.rows.tolist())
    assert DIGITS.input_shape == (1, 8, 8)
    assert train.inputs.min() == 0 and train.inputs.max() == 1
    for split, size in ((train, 1437), (validation, 360)):
        shares = torch.bincount(split.targets["digit"]) / size
        assert shares.min() > 0.09 and shares.max() < 0.11  # stratified


def test_an_unknown_source_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'builtin:digits'"):
        data.load(data.DataOptions(source="builtin:digit"))


def broken(monkeypatch, spoil):
    train = data.Split(
        DIGITS.train.inputs.clone(), {"digit": DIGITS.train.targets["digit"].clone()},
        DIGITS.train.rows,
    )
    dataset = data.Dataset(spoil(train), DIGITS.validation, DIGITS.label_names)
    monkeypatch.setitem(data.SOURCES, "builtin:digits", lambda: dataset)
    with pytest.raises(UserError) as caught:
        data.load(data.DataOptions())
    return str(caught.value)


def test_inputs_that_are_not_finite_are_counted_and_the_first_row_named(monkeypatch):
    def spoil(split):
        split.inputs[5, 0, 3, 3], split.inputs[9, 0, 0, 0] = float("nan"), float("inf")
        return split

    message = broken(monkeypatch, spoil)
    assert "NaN or infinite inputs in 2 of 1437 samples" in message
    assert f"first in row {DIGITS.train.rows[5]}" in message


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_outside_the_classes_are_counted_and_the_first_row_named(monkeypatch, label):
    def spoil(split):
        split.targets["digit"][7] = label
        return split

    message = broken(monkeypatch, spoil)
    assert "labels of 'digit' outside 0..9 in 1 of 1437 samples" in message
    assert f"first in row {DIGITS.train.rows[7]}" in message


def test_an_empty_split_is_refused(monkeypatch):
    empty = data.Split(torch.zeros(0, 1, 8, 8), {"digit": torch.zeros(0, dtype=torch.int64)},
                       torch.zeros(0, dtype=torch.int64))
    assert "training split: is empty" in broken(monkeypatch, lambda split: empty)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_readers_of_all_processes_together_read_the_plan(world_size):
    batch_plan = plan.BatchPlan(len(DIGITS.train), 50, seed=0)
    readers = [
        data.Reader(DIGITS.train, batch_plan, plan.assign(50, 16, rank, world_size),
                    torch.device("cpu"))
        for rank in range(world_size)
    ]
    for step in (0, 81, 80, 200):  # also back into an earlier block
        parts = [part for reader in readers for part in reader.take(step)]
        real = sorted((p for p in parts if p.is_real), key=lambda p: p.number)
        samples = torch.from_numpy(batch_plan.samples(step))
        assert torch.cat([p.inputs for p in real]).equal(DIGITS.train.inputs[samples])
        targets = torch.cat([p.targets["digit"] for p in real])
        assert targets.equal(DIGITS.train.targets["digit"][samples])
        assert [p.is_last for p in readers[0].take(step)].count(True) == 1
        assert readers[-1].rows(step) == DIGITS.train.rows[samples].tolist()


def test_a_data_set_smaller_than_a_batch_is_read_several_times():
    small = data.Split(*(DIGITS.train.inputs[:3], {"digit": DIGITS.train.targets["digit"][:3]},
                         DIGITS.train.rows[:3]))
    reader = data.Reader(small, plan.BatchPlan(3, 8, 0), plan.assign(8, 8, 0, 1),
                         torch.device("cpu"))
    seen = np.concatenate([reader.plan.samples(step) for step in range(3)])
    assert np.bincount(seen).tolist() == [8, 8, 8]
    assert len(reader.take(0)[0].inputs) == 8
