"""train.py on digits with one sample whose pixels are finite, but overflow in a forward."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from trainlib import data, runtime  # noqa: E402

clean_digits = data.SOURCES["builtin:digits"]


def poisoned_digits() -> data.Dataset:
    dataset = clean_digits()
    dataset.train.inputs[dataset.train.rows == 1461] = 3e38
    return dataset


if __name__ == "__main__":
    data.SOURCES["builtin:digits"] = poisoned_digits
    runtime.run(train.main)
