"""train.py, of which some parts of a step sleep; the environment says how many seconds each time.

    SLEEP='{"data": 0.01}' python tests/slow_train.py --run_dir ...  # and for forward and backward
                                                  --model.name tests/slow_train.py:Net

Parts: ``data`` (once a step), ``forward`` and ``backward`` (of ``Net``, once a micro-batch),
``optimizer`` (once a step). ``rank``: on that process only. What each sleep really took is a line
of RUN_DIR.NAME.slept.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from trainlib import data, runtime  # noqa: E402

SLEEP = json.loads(os.environ["SLEEP"])
if str(SLEEP.get("rank", os.environ.get("RANK", "0"))) != os.environ.get("RANK", "0"):
    SLEEP = {}


def sleep(name: str) -> None:
    if name in SLEEP:
        started = time.perf_counter()
        time.sleep(SLEEP[name])
        seconds = time.perf_counter() - started
        with open(f"{sys.argv[sys.argv.index('--run_dir') + 1]}.{name}.slept", "a") as file:
            file.write(f"{seconds}\n")


class SlowlyBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        sleep("backward")
        return gradient


class Net(nn.Module):
    def __init__(self, inputs: int, classes: int):
        super().__init__()
        self.head = nn.Linear(inputs, classes)

    def forward(self, images):
        if self.training:
            sleep("forward")
        return SlowlyBack.apply(self.head(images.flatten(1)))


def slowly(owner: type, name: str, part: str) -> None:
    function = getattr(owner, name)

    def slow(*args, **kwargs):
        sleep(part)
        return function(*args, **kwargs)

    setattr(owner, name, slow)


if __name__ == "__main__":
    import train

    slowly(data.Reader, "take", "data")
    slowly(torch.optim.AdamW, "step", "optimizer")
    runtime.run(train.main)
