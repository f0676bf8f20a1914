"""A script, which a fault holds up; the environment says by what.

    FAULT="hang step 30 rank 1" python tests/hung_train.py --run_dir ...

Faults: ``hang step N`` (sleeps for ever at the beginning of step N), ``evaluation S`` and
``save S`` (each takes S seconds longer), ``slow S`` (every step does), ``stop step N`` (by SIGSTOP
in the middle of a second that step N takes). ``rank 1`` at the end: on that process only. A run
that has hung once, as RUN_DIR.hung tells, does not hang again. SCRIPT: train, or another one.
"""

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainlib import data, pace, runtime  # noqa: E402
from trainlib.checkpoint import Checkpoints  # noqa: E402

pace.WINDOW_STEPS = 20
script = importlib.import_module(os.environ.get("SCRIPT", "train"))
KIND, *WORDS = os.environ["FAULT"].split()
HUNG = Path(sys.argv[sys.argv.index("--run_dir") + 1] + ".hung")


def sleep_before(owner: object, name: str, seconds: float) -> None:
    function = getattr(owner, name)

    def slow(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    setattr(owner, name, slow)


def stand_still_for_ever() -> None:
    HUNG.touch()
    while True:
        time.sleep(1000)


def stop() -> None:
    HUNG.touch()
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)


def strike_at(step: int, strike: Callable[[], object]) -> None:
    take = data.Reader.take

    def hung(self, number):
        if number == step and not HUNG.exists():
            strike()
        return take(self, number)

    data.Reader.take = hung


if "rank" not in WORDS or WORDS[-1] == os.environ.get("RANK", "0"):
    if KIND in ("hang", "stop"):
        strike_at(int(WORDS[1]), stand_still_for_ever if KIND == "hang" else stop)
    if KIND == "evaluation":
        sleep_before(script, "evaluate", float(WORDS[0]))
    if KIND == "save":
        sleep_before(Checkpoints, "save", float(WORDS[0]))
    if KIND == "slow":
        sleep_before(runtime.Requests, "add_to", float(WORDS[0]))

if __name__ == "__main__":
    runtime.run(script.main)
