"""train.py with a W&B that fails at init, or with FAIL_AT=log at the first record."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import accelerate.tracking  # noqa: E402

import train  # noqa: E402
from trainlib import runtime  # noqa: E402


def fail(*arguments, **options):
    raise ConnectionError("no such server")


if __name__ == "__main__":
    tracker = accelerate.tracking.WandBTracker
    if os.environ.get("FAIL_AT") == "log":
        tracker.log = fail
    else:
        tracker.start = fail
    runtime.run(train.main)
