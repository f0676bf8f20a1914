"""train.py, struck by a signal at a named point; the environment says by which, where and when.

    STRIKE="SIGKILL step 37" [SCRIPT=distill] python tests/struck_train.py --run_dir ...

Points: ``start`` (data are being loaded), ``step N`` (at the beginning of step N), ``evaluation N``
(at the process's N-th batch of evaluation), ``save N`` (at the N-th file-system operation of
writing), ``write N`` (0.3 s in the writing of checkpoint N), ``final`` (before final/ is written),
``text N`` (before the N-th small file appears), ``worker`` (every data worker, as soon as it has
been forked; the run itself is not struck). ``rank 1`` at the end strikes that process only. The
moment is written to RUN_DIR.struck. PAUSE: seconds to wait before it.
"""

import importlib
import itertools
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainlib import data, durable, runtime  # noqa: E402
from trainlib.checkpoint import Checkpoints  # noqa: E402

WORDS = os.environ["STRIKE"].split()
NUMBER = int(WORDS[2]) if len(WORDS) > 2 and WORDS[2].isdigit() else None
RANK = WORDS[-1] if "rank" in WORDS else None


def strike() -> None:
    if RANK not in (None, os.environ.get("RANK", "0")):
        return
    folder = sys.argv[sys.argv.index("--run_dir") + 1]
    time.sleep(float(os.environ.get("PAUSE", "0")))
    Path(f"{folder}.struck").write_text(str(time.time()))
    os.kill(os.getpid(), getattr(signal, WORDS[0]))


def before(owner: object, name: str, is_time) -> None:
    """Has a function strike before it does what it does, when it is time."""
    function = getattr(owner, name)

    def struck(*args, **kwargs):
        if is_time(*args, **kwargs):
            strike()
        return function(*args, **kwargs)

    setattr(owner, name, struck)


def batches_struck(self, whole=data.EvalReader.__iter__, counted=itertools.count()):  # noqa: B008
    for batch in whole(self):
        if next(counted) == NUMBER:
            strike()
        yield batch


def main() -> None:
    point = WORDS[1]
    if point == "start":
        before(data, "load", lambda *args: True)
    if point == "step":
        before(data.Reader, "take", lambda reader, step: step == NUMBER)
    if point == "evaluation":
        data.EvalReader.__iter__ = batches_struck
    if point == "save":
        operations = itertools.count()
        for owner, name in ((os, "fsync"), (os, "rename"), (durable, "_sha256"),
                            (durable, "_discard")):
            before(owner, name, lambda *args: next(operations) == NUMBER)
    if point == "write":
        saves, write = itertools.count(), Checkpoints._write

        def struck_write(*arguments):
            if next(saves) == NUMBER:
                strike()
                time.sleep(0.3)
            write(*arguments)

        Checkpoints._write = struck_write
    if point == "worker":
        os.register_at_fork(after_in_child=strike)
    if point == "text":
        texts = itertools.count()
        before(os, "replace", lambda *args: next(texts) == NUMBER)
    if point == "final":
        before(Checkpoints, "export", lambda self, name, *args: name == "final")
    runtime.run(importlib.import_module(os.environ.get("SCRIPT", "train")).main)


if __name__ == "__main__":
    main()
