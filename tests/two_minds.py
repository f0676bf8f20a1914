"""train.py on processes that disagree: each is given another --seed."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from trainlib import runtime  # noqa: E402

if __name__ == "__main__":
    sys.argv += ["--seed", os.environ["RANK"]]
    runtime.run(train.main)
