"""Restarts by an elastic launcher (``torchrun --max_restarts``): which ends are final.

The launcher starts all processes again, whatever has ended them. After a crash or the loss of a
machine they go on from the newest checkpoint; but what ended a run by its own decision would come
again, so a restarted attempt ends at once, with the same code.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

import psutil

from trainlib.credentials import redact

# A mistake of the user, divergence, a failed last save, too little memory.
_FINAL_CODES = (2, 3, 4, 6)
_COUNT, _ERROR_FILE = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_ERROR_FILE"


class NotRestarted(Exception):
    """The attempt before this one has ended for good; ``exit_code`` is its code."""

    def __init__(self, exit_code: int, reason: str):
        super().__init__(f"not restarted, since it ended with exit code {exit_code}: {reason}")
        self.exit_code = exit_code


def leave_word(code: int, reason: str) -> None:
    """Leaves word of a final end beside the launcher's own files, which it makes for each attempt.

    What ends a run before it has a folder, such as an unknown option, stands nowhere else.
    """
    if code in _FINAL_CODES and _ERROR_FILE in os.environ:
        with suppress(OSError):
            word = Path(os.environ[_ERROR_FILE]).with_name("exit.json")
            word.write_text(json.dumps({"code": code, "reason": redact(reason)}), encoding="utf-8")


def refuse_repetition() -> None:
    """Ends an attempt after the first if a process of this machine left word in an earlier one.

    Raises:
        NotRestarted: as said.
    """
    if os.environ.get(_COUNT, "0") == "0" or _ERROR_FILE not in os.environ:
        return
    folder = Path(os.environ[_ERROR_FILE]).parents[2]  # .../attempt_N/RANK/error.json
    for word in sorted(folder.glob("attempt_*/*/exit.json")):
        _refuse_if_final(word)


def refuse_restart(exit_file: Path) -> None:
    """Ends an attempt after the first if an earlier one of the same launch has ended for good.

    An ``exit.json`` is of the same launch if it is younger than the launcher, the parent of each
    process. Should the clock of a file server be that far behind, the run is restarted once more.

    Raises:
        NotRestarted: as said.
    """
    if os.environ.get(_COUNT, "0") == "0":
        return
    try:
        launched_seconds = psutil.Process(os.getppid()).create_time()
        is_of_this_launch = exit_file.stat().st_mtime > launched_seconds
    except (OSError, psutil.Error):
        return
    if is_of_this_launch:
        _refuse_if_final(exit_file)


def _refuse_if_final(file: Path) -> None:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        code, reason = record["code"], str(record["reason"])
    except (OSError, ValueError, LookupError, TypeError):
        return
    if code in _FINAL_CODES:
        raise NotRestarted(code, reason)
