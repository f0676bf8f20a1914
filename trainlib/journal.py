"""A file of JSON lines that outlives a full disk: what cannot be written now waits in memory.

The file holds whole lines only, each once, in order. An outage costs one line when it begins and
one when it ends, whatever its reason: a full disk, a quota, a disk that has become read-only, a
folder that is gone. Who counts on the lines, as a checkpoint does, asks first (``flush``).
"""

import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_open: dict[Path, "Journal"] = {}


class Journal:
    """One file, which one thread appends to and any thread may flush."""

    check: Callable[[], object] | None = None
    """Called before a file that is gone is made again; may end the process, or raise OSError where
    the folder is not the run's."""

    def __init__(self, path: Path, say: Callable[[str], object]):
        """
        Args:
            path: made with the first record; what it holds already stays.
            say: told in a line of an outage, of its end, and of what is lost at the end.
        """
        self.path, self._say = path, say
        self._size = _size_of(path)  # of the whole lines in the file
        self._descriptor: int | None = None
        self._waiting: list[bytes] = []
        self._error: OSError | None = None
        self._lock = threading.RLock()
        self.is_closed = False
        _open[path] = self

    @property
    def size(self) -> int:
        """Bytes of the file once everything has been written."""
        with self._lock:
            return self._size + sum(map(len, self._waiting))

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line, and those that wait, or has it wait with them."""
        with self._lock:
            self._waiting.append(json.dumps(record).encode() + b"\n")
            self._try()

    def flush(self, size: int) -> None:
        """Has the file hold its first ``size`` bytes.

        Raises:
            OSError: why they cannot be written.
        """
        with self._lock:
            self._try()
            if self._error is not None and self._size < size:
                raise OSError(
                    self._error.errno, f"{self.path.name}: {_reason(self._error)}"
                ) from self._error

    def close(self) -> None:
        """Tries once more, and says what is lost; a second call does nothing."""
        with self._lock:
            if self.is_closed:
                return
            self._try()
            self.is_closed = True
            if self._waiting:
                self._say(f"{self.path.name}: {_records(len(self._waiting))} could not be written "
                          f"({_reason(self._error)}) and will be missing, unless the run goes on "
                          "from a checkpoint, which writes them again")
            self._let_go()
            if _open.get(self.path) is self:
                del _open[self.path]

    def _try(self) -> None:
        if self.is_closed:
            return
        try:
            if self._waiting or self._error is not None:
                self._prepare()
            if self._waiting:
                self._write(b"".join(self._waiting))
        except OSError as error:
            if self._error is None:
                num = len(self._waiting)
                self._say(f"{self.path.name}: cannot be written ({_reason(error)}); "
                          f"{_records(num)} {'wait' if num != 1 else 'waits'} in memory, and all "
                          "is tried again with the next one")
            self._error = error
            return
        if self._error is not None:
            self._error = None
            self._say(f"{self.path.name}: can be written again; no record is missing")

    def _prepare(self) -> None:
        """Has the descriptor be that of the file at the path, which holds whole lines."""
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            there = None
        if self._descriptor is None and (there is not None or self._size == 0):
            self._take(_open_file(self.path))
        elif self._descriptor is None or there is None or not _is_same(there, self._descriptor):
            self._bring_back(there is not None)
        found = os.fstat(self._descriptor).st_size
        if found > self._size:  # half of a line, which could not be cut off at the time
            os.ftruncate(self._descriptor, self._size)
        elif found < self._size:  # somebody has cut the file
            content = _read(self._descriptor, found)
            whole = content.rfind(b"\n") + 1
            os.ftruncate(self._descriptor, whole)
            self._say(f"{self.path.name}: was cut from outside by {self._size - whole:,} bytes")
            self._size = whole

    def _bring_back(self, is_replaced: bool) -> None:
        """Makes the file again, which was removed or replaced, with all that it held."""
        if Journal.check is not None:
            Journal.check()
        content = None
        if self._descriptor is not None:
            with suppress(OSError):  # of a file server that was gone for a while
                content = _read(self._descriptor, self._size)
        if content is None or len(content) < self._size:
            if not is_replaced:
                self._say(f"{self.path.name}: is gone, and what it held")
                self._size = 0
            self._take(_open_file(self.path))
            return
        temporary = self.path.with_name(f".tmp_{self.path.name}.{os.getpid()}")
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        descriptor = _open_file(temporary)
        try:
            _write_all(descriptor, content)
            os.fsync(descriptor)
            os.replace(temporary, self.path)
        except BaseException:
            os.close(descriptor)
            with suppress(OSError):
                os.unlink(temporary)
            raise
        self._take(descriptor)

    def _write(self, data: bytes) -> None:
        """Writes lines; of what ends within a line nothing stays."""
        written = 0
        try:
            while written < len(data):
                num_bytes = os.write(self._descriptor, data[written:])
                if num_bytes == 0:
                    raise OSError("nothing was written")
                written += num_bytes
        finally:
            whole = data.rfind(b"\n", 0, written) + 1
            self._size += whole
            del self._waiting[: data.count(b"\n", 0, whole)]
            if whole < written:
                with suppress(OSError):  # tried again before the next line
                    os.ftruncate(self._descriptor, self._size)

    def _take(self, descriptor: int) -> None:
        self._let_go()
        self._descriptor = descriptor

    def _let_go(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


def size(path: Path) -> int:
    """Bytes of a file once everything that was appended to its journal has been written."""
    return _open[path].size if path in _open else _size_of(path)


def flush(path: Path, size: int) -> None:
    """Has a file, if it is a journal's, hold its first ``size`` bytes.

    Raises:
        OSError: why they cannot be written.
    """
    if path in _open:
        _open[path].flush(size)


def close_all() -> None:
    """Closes all that are open."""
    for journal in list(_open.values()):
        journal.close()


def _size_of(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _open_file(path: Path) -> int:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, 0o666)


def _is_same(there: os.stat_result, descriptor: int) -> bool:
    try:
        held = os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)


def _read(descriptor: int, num_bytes: int) -> bytes:
    parts = []
    os.lseek(descriptor, 0, os.SEEK_SET)
    while num_bytes and (part := os.read(descriptor, num_bytes)):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data):]


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _records(number: int) -> str:
    return f"{number} record" + "s" * (number != 1)
