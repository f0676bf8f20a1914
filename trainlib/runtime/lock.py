"""The lock of a run folder: one run at a time writes there.

On the same machine a lock is judged by its process. From elsewhere only its heart can be seen: the
owner renews the file's time every few seconds, and a newcomer looks whether anything changes. No
two clocks are compared, and no lock of the file system is needed, which network folders often lack.
"""

import errno
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
from typing import Any

import psutil

from trainlib.claim import HeldFolder, Look, gone, look, parse
from trainlib.config import UserError

_WATCHED_BEATS = 4
_SETTLE_SECONDS = 0.2  # in which newcomers who judged alike have replaced one another
# psutil adds the time of boot, which moves when the clock is set: a difference below this is none.
_CLOCK_STEP_SECONDS = 60.0


class RunLock:
    """A run's claim on its folder, kept alive by a thread until it is released or lost."""

    def __init__(
        self, path: Path, steal: bool, on_lost: Callable[[str], object], beat_seconds: float = 5.0,
        say: Callable[[str], object] = print,
    ):
        """Takes the lock, from an owner that is dead if there is one.

        Args:
            path: RUN/run.lock, in a folder that exists.
            steal: take it whoever holds it.
            on_lost: called once, from the lock's thread, when another run has taken it.
            beat_seconds: between two signs of life; the same for all runs of a folder.
            say: told in a line, from the lock's thread, when the folder has gone, and come back.

        Raises:
            UserError: another run holds it, or the folder cannot be written.
        """
        self.note: str | None = None
        """A line to print where another's lock was taken over."""
        self._path, self._on_lost, self._beat_seconds = path, on_lost, beat_seconds
        self._say, self._is_away = say, False
        self._pid = os.getpid()
        self.token = uuid.uuid4().hex
        """By which the run's other processes know its folder."""
        self._machine = _machine()
        self._content = json.dumps({
            "host": socket.gethostname(),
            "pid": self._pid,
            "pid_started": psutil.Process().create_time(),
            "machine": self._machine,
            "token": self.token,
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        }).encode() + b"\n"
        self._stopped = threading.Event()
        try:
            while not (self._create() or self._take_over(steal)):
                time.sleep(_SETTLE_SECONDS / 4)
        except OSError as error:
            raise not_writable(path, error) from error
        self._folder = HeldFolder(path.parent)
        threading.Thread(target=self._beat, name=path.name, daemon=True).start()

    def check(self) -> bool:
        """Calls ``on_lost`` if another run has taken the lock; if the folder was removed, makes it
        again, and the lock in it.

        Returns:
            Whether it did, so that the folder lacks all else.

        Raises:
            OSError: the folder is not there, or not this run's, and may come back: it was moved
                away, or the disk that it is on.
        """
        with suppress(OSError):
            self._end_if_taken(parse(look(self._path).content))
            return False
        if not self._folder.is_away():
            return False  # the next beats tell whether the lock is gone
        folder = self._path.parent
        if not self._folder.is_removed() or (folder.exists() and any(folder.iterdir())):
            raise gone(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not self._create():  # another run was faster, and the next beat will tell
            raise OSError(errno.EEXIST, f"the folder {folder} is another run's")
        self._hold_anew()
        return True

    def release(self) -> None:
        """Removes the lock if it is still ours; in a forked child, or again, it does nothing."""
        if os.getpid() != self._pid or self._stopped.is_set():
            return
        self._stopped.set()
        self._folder.close()
        with suppress(OSError):
            if parse(look(self._path).content).get("token") == self.token:
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
            seen = look(self._path)
            holder = parse(seen.content)
            if steal:
                why = "as --checkpoint.steal_lock asks"
            else:
                why = self._why_dead(seen, holder)
                if look(self._path) != seen:
                    return False
        except FileNotFoundError:
            return False
        temporary = self._path.with_name(f".tmp_{self._path.name}_{self.token}")
        try:
            temporary.write_bytes(self._content)
            os.replace(temporary, self._path)
        finally:
            temporary.unlink(missing_ok=True)
        time.sleep(_SETTLE_SECONDS)
        try:
            winner = parse(look(self._path).content)
        except FileNotFoundError:
            return False
        if winner.get("token") != self.token:
            raise self._refusal(winner)
        self.note = f"{self._path.name} of {_owner(holder)}, {why}, was taken over"
        return True

    def _why_dead(self, seen: Look, holder: dict[str, Any]) -> str:
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
            now = look(self._path)
            if now != seen:
                raise self._refusal(parse(now.content) or holder)
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
                self._end_if_taken(parse(look(self._path).content))
                self._note_return()
                missing_beats = 0
                os.utime(self._path)
            except (FileNotFoundError, NotADirectoryError):
                missing_beats += 1
                if missing_beats < 2:  # once can be a network folder's stale view
                    continue
                if self._folder.is_away():  # and nobody else can have it
                    self._note_absence()
                else:
                    self._lose(f"{self._path.name} is gone: the file was removed")
            except Exception:
                missing_beats = 0  # such as a full disk: nothing says that another has taken it

    def _note_absence(self) -> None:
        if not (self._is_away or self._stopped.is_set()):
            self._is_away = True
            why = "removed" if self._folder.is_removed() else "moved, or its disk is not there"
            why += "; another one stands in its place" if self._path.parent.exists() else ""
            self._say(f"{self._path.parent} is gone ({why}); training goes on, and writing is "
                      "tried again with each save")

    def _note_return(self) -> None:
        if self._folder.is_away():  # with our lock: its disk was away, and has another number now
            self._hold_anew()
        if self._is_away:
            self._is_away = False
            self._say(f"{self._path.parent} is there again")

    def _hold_anew(self) -> None:
        self._folder = HeldFolder(self._path.parent)  # a beat may be looking at the former

    def _end_if_taken(self, holder: dict[str, Any]) -> None:
        if holder and holder["token"] != self.token:
            self._lose(f"{self._path.name} was taken by {_owner(holder)}")

    def _lose(self, reason: str) -> None:
        if not self._stopped.is_set():
            self._stopped.set()
            self._on_lost(reason)


def not_writable(path: Path, error: OSError) -> UserError:
    """The error of a folder, or of its lock, that cannot be written."""
    return UserError(f"run_dir: {path} cannot be written ({error.strerror}); choose another "
                     "--run_dir")


def may_be_held(path: Path) -> bool:
    """Whether a lock's owner may live; of one on another machine only ``RunLock`` can tell."""
    try:
        holder = parse(look(path).content)
    except OSError:
        return False
    is_here = holder.get("machine") == _machine()
    return not is_here or _is_running(holder["pid"], holder["pid_started"])


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
