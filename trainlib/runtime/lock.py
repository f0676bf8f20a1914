"""The lock of a run folder: one run at a time writes there.

On the same machine a lock is judged by its process. From elsewhere only its heart can be seen: the
owner renews the file's time every few seconds, and a newcomer looks whether anything changes. No
two clocks are compared, and no lock of the file system is needed, which network folders often lack.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from trainlib.config import UserError

_WATCHED_BEATS = 4
_SETTLE_SECONDS = 0.2  # in which newcomers who judged alike have replaced one another
# psutil adds the time of boot, which moves when the clock is set: a difference below this is none.
_CLOCK_STEP_SECONDS = 60.0
_FIELDS = {
    "host": str, "pid": int, "pid_started": float, "machine": str, "token": str, "started": str,
}


class RunLock:
    """A run's claim on its folder, kept alive by a thread until it is released or lost."""

    def __init__(
        self, path: Path, steal: bool, on_lost: Callable[[str], object], beat_seconds: float = 5.0
    ):
        """Takes the lock, from an owner that is dead if there is one.

        Args:
            path: RUN/run.lock, in a folder that exists.
            steal: take it whoever holds it.
            on_lost: called once, from the lock's thread, when another run has taken it.
            beat_seconds: between two signs of life; the same for all runs of a folder.

        Raises:
            UserError: another run holds it, or the folder cannot be written.
        """
        self.note: str | None = None
        """A line to print where another's lock was taken over."""
        self._path, self._on_lost, self._beat_seconds = path, on_lost, beat_seconds
        self._pid = os.getpid()
        self._token = uuid.uuid4().hex
        self._machine = _machine()
        self._content = json.dumps({
            "host": socket.gethostname(),
            "pid": self._pid,
            "pid_started": psutil.Process().create_time(),
            "machine": self._machine,
            "token": self._token,
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        }).encode() + b"\n"
        self._stopped = threading.Event()
        try:
            while not (self._create() or self._take_over(steal)):
                time.sleep(_SETTLE_SECONDS / 4)
        except OSError as error:
            raise UserError(
                f"run_dir: {path} cannot be written ({error.strerror}); choose another --run_dir"
            ) from error
        threading.Thread(target=self._beat, name=path.name, daemon=True).start()

    def check(self) -> None:
        """Calls ``on_lost`` if another run has taken the lock."""
        with suppress(OSError):
            self._end_if_taken(_parse(_look(self._path).content))

    def release(self) -> None:
        """Removes the lock if it is still ours; in a forked child, or again, it does nothing."""
        if os.getpid() != self._pid or self._stopped.is_set():
            return
        self._stopped.set()
        with suppress(OSError):
            if _parse(_look(self._path).content).get("token") == self._token:
                self._path.unlink()

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "wb") as file:
                file.write(self._content)
        except BaseException:  # a full disk, say: nobody shall wait for an empty lock
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _take_over(self, steal: bool) -> bool:
        """Replaces a lock; False if it changed under our eyes, so that all starts over."""
        try:
            seen = _look(self._path)
            holder = _parse(seen.content)
            if steal:
                why = "as --checkpoint.steal_lock asks"
            else:
                why = self._why_dead(seen, holder)
                if _look(self._path) != seen:
                    return False
        except FileNotFoundError:
            return False
        temporary = self._path.with_name(f".tmp_{self._path.name}_{self._token}")
        try:
            temporary.write_bytes(self._content)
            os.replace(temporary, self._path)
        finally:
            temporary.unlink(missing_ok=True)
        time.sleep(_SETTLE_SECONDS)
        try:
            winner = _parse(_look(self._path).content)
        except FileNotFoundError:
            return False
        if winner.get("token") != self._token:
            raise self._refusal(winner)
        self.note = f"{self._path.name} of {_owner(holder)}, {why}, was taken over"
        return True

    def _why_dead(self, seen: "_Look", holder: dict[str, Any]) -> str:
        """Words for why the lock may be taken; raises UserError if its owner lives."""
        if holder.get("machine") == self._machine:
            if _is_running(holder["pid"], holder["pid_started"]):
                raise self._refusal(holder)
            return "which has ended"
        watched_seconds = _WATCHED_BEATS * self._beat_seconds
        print(
            f"{self._path.name}: held by {_owner(holder)}; watching for {watched_seconds:g} s "
            "whether it lives", file=sys.stderr, flush=True,
        )
        deadline = time.monotonic() + watched_seconds
        while time.monotonic() < deadline:
            time.sleep(self._beat_seconds / 10)
            now = _look(self._path)
            if now != seen:
                raise self._refusal(_parse(now.content) or holder)
        return f"which gave no sign of life for {watched_seconds:g} s"

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        since = f" (since {holder['started']})" if holder else ""
        return UserError(
            f"run_dir: {self._path.parent} is in use by {_owner(holder)}{since}; wait for it, "
            "choose another --run_dir, or, if you know that it is dead, give "
            "--checkpoint.steal_lock"
        )

    def _beat(self) -> None:  # a forked child has no threads, so it does not beat
        missing_beats = 0
        while not self._stopped.wait(self._beat_seconds):
            try:
                self._end_if_taken(_parse(_look(self._path).content))
                os.utime(self._path)
                missing_beats = 0
            except (FileNotFoundError, NotADirectoryError):
                missing_beats += 1
                if missing_beats == 2:  # once can be a network folder's stale view
                    self._lose(f"{self._path.name} is gone: the file or its folder was removed")
            except Exception:
                missing_beats = 0  # such as a full disk: nothing says that another has taken it

    def _end_if_taken(self, holder: dict[str, Any]) -> None:
        if holder and holder["token"] != self._token:
            self._lose(f"{self._path.name} was taken by {_owner(holder)}")

    def _lose(self, reason: str) -> None:
        if not self._stopped.is_set():
            self._stopped.set()
            self._on_lost(reason)


def may_be_held(path: Path) -> bool:
    """Whether a lock's owner may live; of one on another machine only ``RunLock`` can tell."""
    try:
        holder = _parse(_look(path).content)
    except OSError:
        return False
    is_here = holder.get("machine") == _machine()
    return not is_here or _is_running(holder["pid"], holder["pid_started"])


class _Look(NamedTuple):
    """All of a lock that changes while its owner lives."""

    modified_nanoseconds: int
    inode: int
    content: bytes


def _look(path: Path) -> _Look:
    try:
        with path.open("rb") as file:  # network folders renew what they know of a file they open
            content, status = file.read(4096), os.fstat(file.fileno())
    except PermissionError:
        content, status = b"", path.stat()
    return _Look(status.st_mtime_ns, status.st_ino, content)


def _parse(content: bytes) -> dict[str, Any]:
    """The fields of a lock; empty if the content is not one."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    is_lock = isinstance(fields, dict) and all(
        isinstance(fields.get(name), kind) for name, kind in _FIELDS.items()
    )
    return fields if is_lock else {}


def _owner(holder: dict[str, Any]) -> str:
    return f"pid {holder['pid']} on {holder['host']}" if holder else "an unknown process"


def _machine() -> str:
    """Where a pid means one process: the host, its boot, and the container's pid namespace."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


def _is_running(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        is_same = abs(process.create_time() - started) < _CLOCK_STEP_SECONDS
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError):
        return _is_hidden(pid)


def _is_hidden(pid: int) -> bool:
    """Whether it is another user's process that this machine does not show (hidepid)."""
    if os.name == "posix" and pid > 0:  # elsewhere os.kill ends the process
        try:
            os.kill(pid, 0)
        except PermissionError:
            return True
        except (OSError, OverflowError):
            pass
    return False
