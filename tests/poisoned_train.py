"""train.py on digits with one sample whose pixels are finite, but overflow in a forward.

It is the sample of draw 517: step 8 of a batch of 64 meets it, and no other step before 22.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

import train  # noqa: E402
from trainlib import data, plan, runtime  # noqa: E402

clean_load = data.load


def poisoned_load(*arguments) -> data.Dataset:
    dataset = clean_load(*arguments)
    # Finite after the model has scaled it, too, but not after its first layer.
    dataset.train.inputs[poisoned_sample(dataset)] = 1e38
    return dataset


def poisoned_sample(dataset: data.Dataset) -> int:
    return int(plan.samples_of(np.array([517]), len(dataset.train), seed=0)[0])


if __name__ == "__main__":
    data.load = poisoned_load
    runtime.run(train.main)
