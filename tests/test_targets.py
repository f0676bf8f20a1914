"""Targets of each kind: what is read from a user's columns, and what is refused in a line."""

from decimal import Decimal
from functools import partial

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from launching import load
from tables import refusal, write

from trainlib import tasks
from trainlib.config import UserError
from trainlib.losses import IGNORED
from trainlib.tasks import TaskOptions

RANDOM = np.random.default_rng(0)
pytestmark = pytest.mark.usefixtures("own_folder")
NAN = float("nan")
NUMBERS = [float(row) ** 2 for row in range(8)]
CLASSES = {"kind": "classification"}
LABELS = {"kind": "multilabel"}
NUMBER = {"kind": "regression"}


def read(given, columns, other=None, **options):
    """The data set of some columns; without other ones, its validation rows are the same."""
    files = {"source": write(columns),
             "validation_split": write(columns if other is None else other, "other")}
    wanted = {name: TaskOptions(**{"target": name} | task) for name, task in given.items()}
    return load(tasks=wanted, **files | options)


told = partial(refusal, read)


def targets(dataset, name="y") -> list:
    """Of all training rows, as the task is given them."""
    stored = dataset.train.read(np.arange(len(dataset.train)))[1]
    return dataset.train.task_targets(stored)[name].tolist()


def same(given, wanted) -> None:
    assert np.array_equal(given, wanted, equal_nan=True)


# ---- classes ----

@pytest.mark.parametrize("column, names", [
    (pyarrow.array([0, 1, None, 1, 0, 0, 1, 0], pyarrow.int8()), ["0", "1"]),
    (pyarrow.array([0, 1, NAN, 1, 0, 0, 1, 0]), ["0", "1"]),
    (pyarrow.array(np.array([-0.0, 1, NAN, 1, 0, 0, 1, 0], np.float16)), ["0", "1"]),
    (pyarrow.array([None if v is None else 2**63 + v for v in (0, 1, None, 1, 0, 0, 1, 0)],
                   pyarrow.uint64()), [str(2**63), str(2**63 + 1)]),
    (pyarrow.array([False, True, None, True, False, False, True, False]), ["False", "True"]),
    (pyarrow.array(["", "a", None, "a", "", "", "a", ""]), ["", "a"]),
    (pyarrow.array(["a", "b", None, "b", "a", "a", "b", "a"]).dictionary_encode(), ["a", "b"]),
    (pyarrow.array([None if v is None else Decimal(v) for v in (0, 1, None, 1, 0, 0, 1, 0)],
                   pyarrow.decimal128(5, 2)), ["0", "1"]),
])
def test_beside_another_task_missing_classes_are_counted_out_and_names_stay(column, names):
    dataset = read({"y": CLASSES, "z": NUMBER}, {"y": column, "z": NUMBERS})
    assert dataset.targets["y"].label_names == names and dataset.targets["y"].may_miss
    assert targets(dataset) == [0, 1, IGNORED, 1, 0, 0, 1, 0]
    assert dataset.train.num_valid["y"].tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
    assert dataset.train.num_valid["z"].tolist() == [1] * 8
    assert not dataset.targets["z"].may_miss and "1 training samples lack y" in dataset.description
    assert "the target 'y' is missing in 1 of 8 rows, first in row 2; mend or remove" in told(
        {"y": CLASSES}, {"y": column, "z": NUMBERS})


def test_class_labels_of_minus_1_and_the_ignored_value_are_missing():
    names = datasets.ClassLabel(names=["a", "b", "unused"])
    table = datasets.Dataset.from_dict({"x": NUMBERS[:4], "z": NUMBERS[:4], "y": [0, -1, 1, None]})
    table = table.cast_column("y", names)
    dataset = read({"y": CLASSES, "z": NUMBER}, table)
    assert targets(dataset) == [0, IGNORED, 1, IGNORED]
    assert dataset.targets["y"].label_names == ["a", "b", "unused"]
    for ignored, column in ((-1, [0, 1, -1, 1]), (255, [0, 1, 255, 1]), (0, [1, 2, 0, 2])):
        dataset = read({"y": CLASSES | {"ignore_index": ignored}},
                       {"y": pyarrow.array(column, pyarrow.int16())})
        assert targets(dataset) == [0, 1, IGNORED, 1] and dataset.targets["y"].may_miss
        assert dataset.train.num_valid["y"].tolist() == [1, 1, 0, 1]
        assert str(ignored) not in dataset.targets["y"].label_names


def test_gaps_of_a_csv_file_are_no_fractions_and_fractions_no_classes():
    both = {"y": CLASSES, "z": NUMBER}
    with open("gaps.csv", "w") as file:
        file.write("x,z,y\n0,1,0\n1,2,\n2,,10\n3,4,2\n")
    dataset = read(both, {"z": [1, 2], "y": [10, 2]}, {"z": [1, 2], "y": [10, 2]},
                   source="gaps.csv")
    assert dataset.targets["y"].label_names == ["0", "2", "10"]
    assert targets(dataset) == [0, IGNORED, 2, 1]
    assert dataset.validation.targets["y"].tolist() == [2, 1]
    assert dataset.train.num_valid["z"].tolist() == [1, 1, 0, 1]
    assert "'y' holds number values; the target of a classification holds class labels" in told(
        both, {"y": [0.5, 1.0, None], "z": NUMBERS[:3]})
    assert "has values that the training split does not have (0.5) in 1 of 2 rows" in told(
        both, {"y": [0, 1], "z": [1, 2]}, {"y": [1.0, 0.5], "z": [1, 2]})


def test_an_infinite_number_is_no_class():
    assert "'y' holds number values" in told(
        {"y": CLASSES, "z": NUMBER}, {"y": [0, 1, None, float("inf")], "z": NUMBERS[:4]})


def test_validation_classes_that_training_lacks_are_refused():
    both, numbers = {"y": CLASSES, "z": NUMBER}, {"z": NUMBERS[:3]}
    message = told(both, numbers | {"y": ["a", None, "b"]}, numbers | {"y": ["a", "c", None]})
    assert "other.parquet: 'y' has values that the training split does not have ('c') in 1 of 3 " \
           "rows, first in row 1; mend or remove" in message
    dataset = read(both, numbers | {"y": ["a", None, "b"]}, numbers | {"y": ["b", None, "a"]})
    assert dataset.validation.targets["y"].tolist() == [1, IGNORED, 0]


# ---- labels ----

@pytest.mark.parametrize("column", [
    [[0, 1, None], [1, 1, 0], [0, 0, 1]], [[0.0, 1.0, NAN], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    [[False, True, None], [True, True, False], [False, False, True]],
    pyarrow.array([[0, 1, None], [1, 1, 0], [0, 0, 1]], pyarrow.list_(pyarrow.int8(), 3)),
])
def test_labels_come_from_columns_and_lists_alike(column):
    wanted = [[0, 1, NAN], [1, 1, 0], [0, 0, 1]]
    dataset = read({"y": LABELS}, {"y": column})
    same(targets(dataset), wanted)
    assert dataset.train.targets["y"].dtype == torch.float32
    assert dataset.targets["y"].label_names == ["y[0]", "y[1]", "y[2]"]
    assert dataset.train.num_valid["y"].tolist() == [2, 3, 3]
    named = read({"y": LABELS | {"label_names": ["p", "q", "r"]}}, {"y": column})
    assert named.targets["y"].label_names == ["p", "q", "r"]
    rows = column.to_pylist() if isinstance(column, pyarrow.Array) else column
    columns = dict(zip("abc", (list(each) for each in zip(*rows, strict=True)), strict=True))
    dataset = read({"y": LABELS | {"target": ["a", "b", "c"]}}, columns)
    same(targets(dataset), wanted)
    assert dataset.targets["y"].label_names == ["a", "b", "c"]
    filled = [[-1 if value is None or value != value else int(value) for value in row]
              for row in rows]
    same(targets(read({"y": LABELS | {"ignore_index": -1}}, {"y": filled})), wanted)


def class_lists(rows, names):
    return datasets.Dataset.from_dict({"x": NUMBERS[:len(rows)], "y": rows}, datasets.Features(
        x=datasets.Value("float64"), y=datasets.List(datasets.ClassLabel(names=names))))


def test_labels_come_from_lists_of_names():
    rows = [["q", "p"], [], ["r"], None, ["q", "q"]]
    wanted = [[1, 1, 0], [0, 0, 0], [0, 0, 1], [NAN] * 3, [0, 1, 0]]
    dataset = read({"y": LABELS, "z": NUMBER}, {"y": rows, "z": NUMBERS[:5]})
    same(targets(dataset), wanted)
    assert dataset.targets["y"].label_names == ["p", "q", "r"]
    assert dataset.train.num_valid["y"].tolist() == [3, 3, 3, 0, 3]
    assert "the target 'y' is missing in 1 of 5 rows, first in row 3" in told(
        {"y": LABELS}, {"y": rows})
    numbered = class_lists([[1, 0], [], [2]], ["p", "q", "r", "unused"])
    dataset = read({"y": LABELS}, numbered)
    same(targets(dataset), [[1, 1, 0, 0], [0] * 4, [0, 0, 1, 0]])
    assert dataset.targets["y"].label_names == ["p", "q", "r", "unused"]
    assert "other.parquet: 'y' has labels that the training split does not have" in told(
        {"y": LABELS}, {"y": [["a"], ["b"]]}, {"y": [["b"], ["c"]]})


def test_lists_of_class_labels_are_matched_by_name():
    swapped = read({"y": LABELS}, class_lists([[0], [1]], ["p", "q"]),
                   class_lists([[0], [1]], ["q", "p"]))
    assert swapped.validation.targets["y"].tolist() == [[0, 1], [1, 0]]


def listed(column, **more) -> str:
    return told({"y": LABELS | more}, {"y": column})


def test_labels_that_are_none_are_refused():
    assert "'y' has values other than 0 and 1 in 1 of 3 rows, first in row 1; mend" in listed(
        [[0, 1], [0, 2], [1, 1]])
    assert "has values other than 0 and 1" in listed([[0.0, 0.5]])
    assert "'a', 'b' has values other than 0 and 1 in 1 of 2 rows, first in row 0" in told(
        {"y": LABELS | {"target": ["a", "b"]}}, {"a": [-1, 0], "b": [0, 1]})
    assert "'y' has lists of another length than 2, the first one's, in 2 of 3 rows" in listed(
        [[0, 1], [1], []])
    assert "'y' has 2 labels a row, label_names gives 1" in listed([[0, 1]], label_names=["a"])
    assert "'y' has no label in any row" in listed(pyarrow.array([[], []], pyarrow.list_(
        pyarrow.string())))
    assert "'y' holds text values; the target of a multilabel task is several" in listed(
        ["a", "b"])
    assert "'b' holds text values; a label of a multilabel task is a column of 0 and 1" in told(
        {"y": LABELS | {"target": ["a", "b"]}}, {"a": [0, 1], "b": ["0", "1"]})


def test_a_missing_name_in_a_list_is_refused():
    assert "'y'" in listed([["a"], ["b", None]])


@pytest.mark.parametrize("kind, row", [
    (kind, row) for kind in (LABELS, NUMBER) for row in ([[0, 1], [1, 0]], [[0], [1]])])
def test_lists_of_lists_of_labels_or_numbers_are_refused(kind, row):
    assert "'y' holds" in told({"y": kind}, {"y": [row, (1 - np.array(row)).tolist()]})


def test_label_names_that_mean_nothing_are_refused():
    assert "label_names" in listed([["a"], ["b"]], label_names=["q", "p"])
    assert "label_names" in told({"y": LABELS | {"target": ["a", "b"], "label_names": ["q", "p"]}},
                                 {"a": [0, 1], "b": [1, 0]})


def test_a_loss_of_the_users_own_is_not_shown_what_is_missing():
    with open("own.py", "w") as file:
        file.write("import torch\n"
                   "def loss(output, target):\n"
                   "    assert target.isfinite().all()\n"
                   "    return torch.nn.functional.binary_cross_entropy_with_logits(\n"
                   "        output, target, reduction='none')\n")
    own = TaskOptions(kind="multilabel", target="y", loss="own.py:loss")
    dataset = load(tasks={"y": own}, source=write({"y": [[0, None], [1, 0]]}),
                   validation_split=write({"y": [[0, None], [1, 0]]}, "other"))
    assert dataset.targets["y"].may_miss
    [task] = tasks.build_tasks({"y": own}, dataset.targets)
    losses = task.losses(torch.zeros(2, 2), dataset.train.targets)
    assert losses[0, 1] == 0 and losses.isfinite().all()


# ---- several tasks ----

def test_tasks_that_share_no_row_or_lack_a_split_are_refused():
    both = {"y": CLASSES, "z": NUMBER}
    full = {"y": ["a", "b"] * 2, "z": NUMBERS[:4]}
    apart = {"y": ["a", "b", None, None], "z": [None, None, 1.0, 2.0]}
    assert "tasks: no training row has a target of both 'y' and 'z'; tasks of one job" in told(
        both, apart, full)
    dataset = read(both, full, apart)  # in validation they need not
    assert dataset.validation.num_valid["z"].tolist() == [0, 0, 1, 1]
    nothing = pyarrow.array([None] * 4, pyarrow.float64())
    for kind in (NUMBER, LABELS):
        given = {"y": CLASSES, "z": kind}
        column = full | {"z": [0.0, 1.0, 0.0, 1.0]}
        assert "tasks.z: no validation sample has this target" in told(
            given, column, full | {"z": nothing})
        assert "tasks.z: no training sample has" in told(
            given, full | {"z": nothing}, column)
    texts = pyarrow.array([None] * 4, pyarrow.string())
    assert "tasks.y: no validation sample has this target" in told(both, full, full | {"y": texts})
    assert "'y' has one class only ()" in told(both, full | {"y": texts}, full)


def test_targets_that_are_not_there_are_named_with_the_nearest():
    given = {"y": TaskOptions(target="lable")}
    with pytest.raises(UserError, match=r"tasks.y.target: no column 'lable'; did you mean 'label'"):
        tasks.resolve(given, ["label"], ["x", "label"])
    assert "other.parquet: has no column 'label'; did you mean 'labels'?" in told(
        {"label": CLASSES}, {"label": ["a", "b"]}, {"labels": ["a", "b"]})
    for name, kind, right in (("ink", "classification", "regression"),
                              ("digit", "regression", "classification"),
                              ("quadrants", "regression", "multilabel")):
        with pytest.raises(UserError, match=f"'{name}' of builtin:digits is for {right}, got"):
            load(tasks={"t": TaskOptions(target=name, kind=kind)})
    with pytest.raises(UserError, match="'ink' comes second; a column of builtin:digits is a"):
        load(tasks={"t": TaskOptions(target=["ink", "ink"], kind="regression")})
