"""A script whose disk fails for a while: what happens to it, by the step before which it does.

    DISK='{"20": "fill", "60": "free"}' [SCRIPT=distill] python tests/disk_train.py --run_dir ...

``fill`` writes a file beside the run folder until nothing more fits, ``free`` removes it;
``ENOSPC``, ``EROFS``, ``EDQUOT`` and ``EIO`` have every way of writing into the run folder raise
that error, ``records`` only that into metrics.jsonl, until ``mend``; FAIL_AT_END names such an
error that comes when all weights are written; ``move`` renames the run folder, ``back`` renames it
back, ``remove`` removes it, ``replace`` moves it and makes an empty one in its place.
Checkpoints that are under way are waited for, so that nothing depends on time.
"""

import builtins
import errno
import importlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainlib import data, runtime  # noqa: E402
from trainlib.checkpoint import Checkpoints, checkpoints  # noqa: E402

EVENTS = {int(step): event for step, event in json.loads(os.environ["DISK"]).items()}
FOLDER = Path(sys.argv[sys.argv.index("--run_dir") + 1]).resolve()
FILLER, MOVED = FOLDER.with_name("filler"), FOLDER.with_name("moved")
fault: int | None = None
where = FOLDER


def fill() -> None:
    with FILLER.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC


def happens(event: str) -> None:
    global fault, where
    if event == "fill":
        fill()
    elif event == "free":
        FILLER.unlink()
    elif event == "mend":
        fault = None
    elif event == "move":
        FOLDER.rename(MOVED)
    elif event == "back":
        MOVED.rename(FOLDER)
    elif event == "replace":
        FOLDER.rename(MOVED)
        FOLDER.mkdir()
    elif event == "remove":
        shutil.rmtree(FOLDER)
    elif event == "records":
        fault, where = errno.EIO, FOLDER / "metrics.jsonl"
    else:
        fault, where = getattr(errno, event), FOLDER


def is_ours(what: object) -> bool:
    if isinstance(what, int):
        what = os.readlink(f"/proc/self/fd/{what}")
    return Path(os.fspath(what)).absolute().is_relative_to(where)


def failing(owner: object, name: str, writes=lambda *args, **kwargs: True, number: int = 0) -> None:
    """Has a function fail while the disk does, where its argument ``number`` is in the folder."""
    function = getattr(owner, name)

    def perhaps(*args, **kwargs):
        if fault is not None and writes(*args, **kwargs) and is_ours(args[number]):
            raise OSError(fault, os.strerror(fault))
        return function(*args, **kwargs)

    setattr(owner, name, perhaps)


def inject() -> None:
    for name in ("write", "mkdir", "rename", "replace", "unlink", "ftruncate", "fsync", "utime"):
        failing(os, name)
    changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    failing(os, "open", lambda path, flags, *args, **kwargs: flags & changes)
    for owner in (io, builtins):
        failing(owner, "open", lambda file, mode="r", *args, **kwargs: set(mode) & set("wax+"))
    failing(checkpoints, "save_file", number=1)


def main() -> None:
    opened, take, open_checkpoints = [], data.Reader.take, Checkpoints.open

    def noted_open(self, *args):
        opened.append(self)
        open_checkpoints(self, *args)

    def take_after_events(reader, step):
        if step in EVENTS and os.environ.get("RANK", "0") == "0":
            opened[-1].wait()
            happens(EVENTS[step])
        return take(reader, step)

    def finish_and_fail(self):
        finish(self)
        happens(os.environ["FAIL_AT_END"])

    Checkpoints.open, data.Reader.take = noted_open, take_after_events
    if "FAIL_AT_END" in os.environ:
        finish, Checkpoints.finish = Checkpoints.finish, finish_and_fail
    inject()
    runtime.run(importlib.import_module(os.environ.get("SCRIPT", "train")).main)


if __name__ == "__main__":
    main()
