"""Restarts by an elastic launcher (``torchrun --max_restarts``): which ends are final.

The launcher starts all processes again, whatever has ended them. After a crash or the loss of a
machine they go on from the newest checkpoint; but what ended a run by its own decision would come
again, so a restarted attempt ends at once, with the same code.
"""

import json
import os
from pathlib import Path

import psutil

# A mistake of the user, divergence, a failed last save, too little memory.
_FINAL_CODES = (2, 3, 4, 6)


class NotRestarted(Exception):
    """The attempt before this one has ended for good; ``exit_code`` is its code."""

    def __init__(self, exit_code: int, reason: str):
        super().__init__(f"not restarted, since it ended with exit code {exit_code}: {reason}")
        self.exit_code = exit_code


def refuse_restart(exit_file: Path) -> None:
    """Ends an attempt after the first if an earlier one of the same launch has ended for good.

    An ``exit.json`` is of the same launch if it is younger than the launcher, the parent of each
    process. Should the clock of a file server be that far behind, the run is restarted once more.

    Raises:
        NotRestarted: as said.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return
    try:
        launched_seconds = psutil.Process(os.getppid()).create_time()
        is_of_this_launch = exit_file.stat().st_mtime > launched_seconds
        record = json.loads(exit_file.read_text(encoding="utf-8"))
        code, reason = record["code"], str(record["reason"])
    except (OSError, ValueError, LookupError, TypeError, psutil.Error):
        return
    if is_of_this_launch and code in _FINAL_CODES:
        raise NotRestarted(code, reason)
