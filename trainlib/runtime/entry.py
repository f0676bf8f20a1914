"""A script's entry: signals, exit codes, and one line instead of a traceback."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from trainlib import terminal
from trainlib.config import UserError, is_first_process
from trainlib.memory import OutOfMemory, advised
from trainlib.runtime.folder import RunFolder
from trainlib.runtime.restarts import leave_word, refuse_repetition
from trainlib.runtime.signals import Preempted, Signals
from trainlib.runtime.watchdog import Hang, as_hang


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a script's ``main`` on the command line and ends the process with the right code.

    A mistake of the user, a diverged run or a signal ends in one line without a traceback.
    """
    terminal.listen()
    signals = Signals(lambda reason: RunFolder.leave(Preempted.exit_code, reason))
    try:
        refuse_repetition()
        main(sys.argv[1:])
        signals.end()
        code, reason = 0, "finished"
    except SystemExit as exit_request:
        signals.end()
        is_text = isinstance(exit_request.code, str)
        code, reason = (1, exit_request.code) if is_text else (exit_request.code or 0, None)
        if is_text:
            terminal.end()
            with suppress(OSError):
                print(reason, file=sys.stderr)  # as Python would, which is given the code only
    except (Exception, KeyboardInterrupt) as error:
        signals.end()
        terminal.end()
        folder = RunFolder.current
        recipe, watchdog = (folder.recipe, folder.watchdog) if folder is not None else ({}, None)
        error = advised(as_hang(error), recipe, watchdog.phase if watchdog is not None else "")
        code, reason = getattr(error, "exit_code", 1), str(error)
        if code == 1 and signals.received is not None:
            # A signal to all processes may end another one, or a library, before this one.
            code, reason = Preempted.exit_code, f"{signals.received}, and then: {reason}"
            sys.stderr.write(traceback.format_exc())  # whole, where others write, too
        with suppress(OSError):  # the terminal may have gone away
            if code == 1:
                sys.stderr.write(traceback.format_exc())
            # Each has a memory of its own; and the first may be the one that hangs.
            elif (is_first_process() or code in (Hang.exit_code, OutOfMemory.exit_code)
                  or (code == UserError.exit_code and RunFolder.has_begun())):
                print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
            elif code != Preempted.exit_code:
                time.sleep(3)  # the launcher ends all when one ends: the first has yet to speak
    leave_word(code, str(reason))
    if RunFolder.current is not None:
        RunFolder.current.close(code, reason)
    terminal.end()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # or Python would try again at its end, and change the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    is_distributed = torch.distributed.is_initialized()
    if is_distributed and code == 0:
        torch.distributed.barrier()
    # gloo's threads abort the interpreter's shutdown now and then, long after the work is done
    # (measured: 2 of 15 exits), and one that was given up, such as a tracker's process, is waited
    # for without end. Everything is written; leave without that shutdown.
    if is_distributed or (RunFolder.current is not None and RunFolder.current.has_abandoned):
        os._exit(code)
    sys.exit(code)
