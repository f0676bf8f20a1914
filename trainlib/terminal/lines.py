"""Who says what: from ``listen`` on, all that a process writes through Python goes through here.

Lines of processes other than the main one carry their rank; texts lose their secrets; lines come to
stand above the bar; and log.txt has them, too. What C code writes, such as torch's own warnings
from threads, and what was written before, passes by.
"""

import logging
import os
import shlex
import sys
import threading
import warnings
from collections import deque
from contextlib import nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from trainlib.credentials import redact

if TYPE_CHECKING:
    from trainlib.terminal.bar import Bar

_MOST_PENDING = 1000  # lines from before there is a log.txt
_USUAL_WIDTH = 80


def is_live(stream: TextIO) -> bool:
    """Whether what stands in a line there can be written over."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def width(terminal: TextIO) -> int:
    """Its columns."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns or _USUAL_WIDTH
    except OSError:
        return _USUAL_WIDTH


class Lines:
    """What one process says."""

    current: "Lines | None" = None
    """None where a script's ``main`` is called by other code."""

    def __init__(self, rank: int):
        self.rank, self.bar = rank, None
        """``bar``: what lines are written above of, if anything."""
        self.num_written = 0
        self._lock = threading.RLock()
        self._seen: set[tuple] = set()
        self._log_file: Path | None = None
        self._log: int | None = None
        self._pending: deque[str] = deque(maxlen=_MOST_PENDING)
        self.streams: list[Stream] = []

    def once(self, *what: object) -> bool:
        """Whether this is new."""
        is_new = what not in self._seen
        self._seen.add(what)
        return is_new

    def write(self, stream: "Stream", text: str) -> None:
        """Writes a piece of text: to the terminal, and what lines it ends to log.txt."""
        with self._lock:
            *ended, stream.rest = (stream.rest + text).split("\n")
            # What a bar of another library wrote over is gone.
            stream.rest = stream.rest.rpartition("\r")[2]
            mark = f"[rank {self.rank}] " if self.rank else ""
            lines = [redact(line.rstrip("\r").rpartition("\r")[2]) for line in ended]
            lines = [f"{mark}{line}" if line else "" for line in lines]
            self.num_written += len(lines)
            self._write_log(lines)
            if not self.rank and self.bar is None:
                # Whole lines here, too, among those of other processes.
                whole, end, stream.held = (stream.held + text).rpartition("\n")
                stream.raw.write(redact(whole + end))
            elif lines:
                if self.rank and is_live(stream.raw):
                    # Over the main process's bar, which comes again on the next line.
                    lines = [f"\r{line:{width(stream.raw) - 1}}" for line in lines]
                with nullcontext() if self.bar is None else self.bar.lifted():
                    stream.raw.write("".join(f"{line}\n" for line in lines))
                    stream.raw.flush()

    def flush(self, stream: "Stream") -> None:
        """Writes what is held back of the main process's line, such as a library's bar."""
        with self._lock:
            if not self.rank and self.bar is None and stream.held:
                stream.raw.write(redact(stream.held))
                stream.held = ""
            stream.raw.flush()

    def set_bar(self, bar: "Bar | None") -> None:
        """Has lines come to stand above a bar; none: it has been closed."""
        with self._lock:
            self.end()
            self.bar = bar

    def set_log(self, file: Path | None) -> None:
        """Has lines added to a file, which the main process makes; none: to no file any more."""
        with self._lock:
            self.end()
            if self._log is not None:
                with suppress(OSError):
                    os.fsync(self._log)
                with suppress(OSError):  # where a network folder tells of a full disk
                    os.close(self._log)
            self._log_file, self._log = file, None
            if file is not None and not self.rank:
                now = datetime.now().astimezone().isoformat(" ", "seconds")
                self._pending.appendleft(f"---- {now}  {redact(shlex.join(sys.argv))}")
                self._write_log([])

    def end(self) -> None:
        """Ends lines that were begun, if the terminal is still there."""
        for stream in self.streams:
            with suppress(OSError):
                if stream.rest:
                    stream.write("\n")

    def _write_log(self, lines: list[str]) -> None:
        self._pending.extend(lines)
        if self._log_file is None:
            return
        with suppress(OSError):  # a full disk, say; the terminal has it
            if self._log is None:
                is_made = os.O_CREAT if not self.rank else 0
                self._log = os.open(self._log_file, os.O_WRONLY | os.O_APPEND | is_made, 0o666)
            # One write, at once: it outlives the process, and does not mix with the others'.
            text = "".join(f"{line}\n" for line in self._pending)
            data = text.encode(errors="backslashreplace")
            rest = data[os.write(self._log, data):]
            self._pending.clear()
            # Of a disk that has filled up meanwhile.
            self._pending.extend(rest.decode(errors="replace").splitlines())

    def _forget_in_child(self) -> None:
        """A forked worker has no bar, and no thread of its parent's that could free the lock."""
        self._lock, self.bar = threading.RLock(), None


class Stream:
    """sys.stdout or sys.stderr, of which all but the writing is the original's."""

    def __init__(self, raw: TextIO, lines: Lines):
        self.raw, self._lines = raw, lines
        self.rest = self.held = ""
        """Of a line that has not ended: all that it shows, and what has not been written."""

    def write(self, text: str) -> int:
        self._lines.write(self, text)
        return len(text)

    def writelines(self, texts: list[str]) -> None:
        self.write("".join(texts))

    def flush(self) -> None:
        self._lines.flush(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def listen() -> Lines:
    """From now on everything goes through here; warnings, and records of logging of that level,
    come once each."""
    lines = Lines.current = Lines(int(os.environ.get("RANK", "0")))
    raw = (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = lines.streams = [Stream(one, lines) for one in raw]

    def show_warning(message, category, file_name, line_number, file=None, line=None):
        text = f"{category.__name__}: {message} ({file_name}:{line_number})"
        with suppress(OSError):  # as the one of Python's own
            if file is not None or lines.once(text):
                print(text, file=file or sys.stderr)

    def is_new(record: logging.LogRecord) -> bool:
        what = (record.name, record.levelno, str(record.msg), str(record.args))
        return record.levelno != logging.WARNING or lines.once(*what)

    warnings.showwarning = show_warning
    # Libraries' own handlers hold the streams that were there when they were imported.
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in [one for logger in loggers for one in getattr(logger, "handlers", [])]:
        stream = getattr(handler, "stream", None)
        for one in lines.streams:
            if stream is one.raw:
                handler.setStream(one)
        if stream in (*raw, *lines.streams):
            handler.addFilter(is_new)
    if logging.lastResort is not None:
        logging.lastResort.addFilter(is_new)
        logging.lastResort.setFormatter(logging.Formatter("%(levelname)s: %(name)s: %(message)s"))
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lines._forget_in_child)
    return lines


def say(text: str) -> None:
    """Lines on the terminal, if it is still there."""
    with suppress(OSError):  # the terminal, or what read the output, has gone away
        if Lines.current is None:
            tqdm.write(redact(text), file=sys.stdout)
        else:
            sys.stdout.write(f"{text}\n")  # at once, for log.txt has it where the terminal fails
        sys.stdout.flush()


def num_said() -> int:
    """How many lines this process has written, whoever in it."""
    return 0 if Lines.current is None else Lines.current.num_written


def log_to(file: Path | None) -> None:
    """Has what is said added to a file, which the main process makes; none: to no file any more."""
    if Lines.current is not None:
        Lines.current.set_log(file)


def end() -> None:
    """Ends a bar, and lines that were begun."""
    if Lines.current is not None:
        if Lines.current.bar is not None:
            Lines.current.bar.close()
        Lines.current.end()
