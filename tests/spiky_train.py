"""train.py, its first micro-batch far too bright in steps 134 and 150: finite spikes.

Started as struck_train.py is, whose STRIKE it obeys.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import struck_train  # noqa: E402

from trainlib import data  # noqa: E402

clean_take = data.Reader.take


def spiky_take(self, step: int):
    for micro_batch in clean_take(self, step):
        if step in (134, 150) and micro_batch.number == 0:
            micro_batch = micro_batch._replace(inputs=micro_batch.inputs * 3000.0 + 3000.0)
        yield micro_batch


data.Reader.take = spiky_take

if __name__ == "__main__":
    struck_train.main()
