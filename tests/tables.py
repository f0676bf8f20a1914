"""Tables with a target column, and what reading them says."""

import datasets
import pyarrow
import pytest
from launching import load
from pyarrow import parquet

from trainlib.config import UserError
from trainlib.tasks import TaskOptions


def write(columns, name="train") -> str:
    """The file of some columns, to which a column x of inputs is added, if there is none."""
    if isinstance(columns, datasets.Dataset):
        columns.to_parquet(f"{name}.parquet")
    else:
        count = len(next(iter(columns.values())))
        table = pyarrow.table({"x": [float(row) for row in range(count)]} | columns)
        parquet.write_table(table, f"{name}.parquet")
    return f"{name}.parquet"


def read(given, columns, other=None, **options):
    """The data set of some columns with one task on y; without other ones a tenth is held out."""
    files = {"source": write(columns)}
    if other is not None:
        files["validation_split"] = write(other, "other")
    task = TaskOptions(**{"target": "y"} | given)
    return load(tasks={"y": task}, **files | options)


def refusal(function, *arguments, **options) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
