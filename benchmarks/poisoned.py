"""train.py that meets a sample of NaN in the steps that the environment names (``NAN_STEPS=3,17``),
in the second micro-batch, and compares the processes' pace every few steps.

``benchmarks/faults.py`` runs it.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from trainlib import data, pace, runtime  # noqa: E402

pace.WINDOW_STEPS = 10
STEPS = {int(step) for step in os.environ.get("NAN_STEPS", "").split(",") if step}
take = data.Reader.take


def poisoned(self: data.Reader, step: int):
    for micro_batch in take(self, step):
        if step in STEPS and micro_batch.number == 1:
            inputs = micro_batch.inputs.clone()
            inputs[0] = float("nan")
            micro_batch = micro_batch._replace(inputs=inputs)
        yield micro_batch


if __name__ == "__main__":
    data.Reader.take = poisoned
    runtime.run(train.main)
