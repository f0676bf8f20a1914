"""What the README says is there: each item of its table, and the names in it."""

import importlib
import re
from pathlib import Path

import pytest

from distill import StudentOptions
from train import TrainOptions
from trainlib import config
from trainlib.losses import LOSSES
from trainlib.optim import OPTIMIZERS
from trainlib.schedule import SHAPES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ITEMS = """training loop; validation; history; early stopping; curves;
SGD, Adam, AdamW, RMSprop, Adagrad; learning-rate finder;
MSE, cross entropy, BCE, L1, focal; own losses by name; multi-task with weights;
step, cosine, exponential, plateau, one-cycle; warm-up, warm-up + cosine;
accumulation with its last incomplete window; mixed precision with scaler and clipping;
distillation (alpha, temperature);
accuracy, confusion matrix, precision, recall, F1, report;
plots of loss, accuracy, learning rate, gradient norm, confusion heatmap; parameter statistics;
first-batch outputs; exploding and vanishing gradients"""
TABLE = README.split("\n## What is where\n")[1].split("\n## ")[0]
ROWS = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", TABLE, re.MULTILINE))
OPTIONS = {name.replace("<name>", "NAME") for options in (TrainOptions, StudentOptions)
           for name, *_ in config.describe_options(options)}
VALUES = {"--optim.name": OPTIMIZERS, "--tasks.NAME.loss": LOSSES, "--schedule.name": SHAPES}


def test_the_table_has_a_row_for_each_item_and_no_other():
    assert list(ROWS) == [" ".join(item.split()) for item in ITEMS.split(";")]


@pytest.mark.parametrize("item", ROWS)
def test_what_the_table_names_is_there(item):
    quoted = re.findall(r"`([^`]+)`", ROWS[item])
    names = [name for name in quoted if name.startswith("--")]
    for name in names:
        option = name.split()[0]
        assert option.removeprefix("--") in OPTIONS, name
    for name in quoted:
        if name.startswith("trainlib."):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name
        elif re.fullmatch(r"[\w/]+\.(py|yaml)", name):
            assert (ROOT / name).is_file(), name
    if option := next((name for name in names if f"`{name}`: `" in ROWS[item]), None):
        values = re.findall(r"`(\w+)`", ROWS[item].split(f"`{option}`: ")[1])
        assert values and set(values) <= set(VALUES[option])
        assert len(values) >= len(item.split(","))
