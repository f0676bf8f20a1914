"""Whose a run's folder is, as its lock and the folder itself tell."""

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

_FIELDS = {
    "host": str, "pid": int, "pid_started": float, "machine": str, "token": str, "started": str,
}


class HeldFolder:
    """A folder that is known again wherever it goes."""

    def __init__(self, path: Path):
        """
        Args:
            path: where it stands now.
        """
        self.path = path
        self._descriptor: int | None = None
        with suppress(OSError):  # Windows, where an open folder could not go away either
            self._descriptor = os.open(path, os.O_RDONLY)

    def is_away(self) -> bool:
        """Whether it does not stand at its place: removed, moved, or its disk is not there."""
        try:
            there = os.stat(self.path)
            descriptor = self._descriptor
            held = there if descriptor is None else os.fstat(descriptor)
        except OSError:
            return True
        return (there.st_dev, there.st_ino) != (held.st_dev, held.st_ino)

    def is_removed(self) -> bool:
        """Whether nothing leads to it any more, so that it cannot come back."""
        descriptor = self._descriptor
        with suppress(OSError):
            return descriptor is not None and os.fstat(descriptor).st_nlink == 0
        return False

    def close(self) -> None:
        """Lets it go; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)


class Claim:
    """What any process of a run knows its folder by, also where it is not the one that locks."""

    def __init__(self, path: Path, token: str):
        """
        Args:
            path: of the lock, which is held.
            token: of the lock.
        """
        self._path, self._token, self._folder = path, token, HeldFolder(path.parent)

    def check(self) -> None:
        """Raises ``OSError`` where what stands there is not this run's folder any more.

        Without a lock, which the main process may have released, the folder itself has to be the
        same; with it, it may be another: made again, or on a disk that is there again.
        """
        token = None
        with suppress(OSError):
            token = parse(look(self._path).content).get("token")
        if self._folder.is_away() if token is None else token != self._token:
            raise gone(self._path.parent)


def gone(folder: Path) -> OSError:
    """The error of a run's folder that is not at its place."""
    if folder.exists():
        return OSError(errno.ENOENT, f"{folder} is not this run's folder any more, which was moved "
                       "away or is on a disk that is not there: another one stands in its place")
    return OSError(errno.ENOENT, f"the folder {folder} is gone")


class Look(NamedTuple):
    """All of a lock that changes while its owner lives."""

    modified_nanoseconds: int
    inode: int
    content: bytes


def look(path: Path) -> Look:
    """A lock as it is now; raises ``OSError``."""
    try:
        with path.open("rb") as file:  # network folders renew what they know of a file they open
            content, status = file.read(4096), os.fstat(file.fileno())
    except PermissionError:
        content, status = b"", path.stat()
    return Look(status.st_mtime_ns, status.st_ino, content)


def parse(content: bytes) -> dict[str, Any]:
    """The fields of a lock; empty if the content is not one."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    is_lock = isinstance(fields, dict) and all(
        isinstance(fields.get(name), kind) for name, kind in _FIELDS.items()
    )
    return fields if is_lock else {}
