"""Folders that are written whole or not at all, and that tell when they are damaged.

A folder is written under a temporary name beside its own, brought to the disk and renamed: a
crash at any moment leaves the old version or the new one. ``MANIFEST.json`` holds the size and
sha256 of each file and of itself. That finds accidents, not forgers, who can write it anew; so
nothing that it says is trusted either.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"

_PLAIN_NAME = re.compile(r"[\w-][\w.-]{0,99}", re.ASCII)  # stays in its folder on any system
_REPLACED = ".replaced"
_MAX_MANIFEST_BYTES = 1 << 24  # what is read before it is checked
_NO_FOLDER_SYNC = {errno.EACCES, errno.EINVAL, errno.ENOTSUP}


class Damaged(Exception):
    """A folder is not what was written; the message names the file and the fault."""


def write_text(path: Path, text: str) -> None:
    """Replaces a small file in one go: a reader or a crash meets the old text or the new."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file in one go: a reader or a crash meets the old content or the new."""
    # A watchdog thread may write the same file at the same time.
    temporary = _temporary(path, f".{threading.get_native_id()}")
    try:
        temporary.write_bytes(content)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        _discard(temporary)
    _sync_folder(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """A mapping of JSON; an empty one where the file is missing, damaged or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def as_json(content: Any) -> str:
    """A file of JSON, for people too."""
    return json.dumps(content, indent=1) + "\n"


def write_folder(
    target: Path, writers: Mapping[str, Callable[[Path], object]], with_manifest: bool = True
) -> None:
    """Writes a folder and replaces an earlier one; the rename at the end is the only commit.

    Killed between moving the earlier one away and that rename, it leaves no ``target``;
    ``remove_leftovers`` then brings the earlier one back.

    Args:
        target: its parents are created.
        writers: by file name, what writes the file at the path it is given.
        with_manifest: whether ``verify_folder`` shall vouch for it.

    Raises:
        ValueError: a file name is the manifest's, or not plain.
        OSError: the disk's or a writer's; what stands under ``target`` is whole.
    """
    for name in writers:
        if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST:
            raise ValueError(
                f"a file's name is up to 100 letters, digits, '_', '-' and inner '.', and not "
                f"{MANIFEST}; got {name!r}"
            )
    _make_folder(target.parent)
    temporary = _temporary(target)
    replaced = target.with_name(f".tmp_{target.name}{_REPLACED}")
    _discard(temporary)  # a container's processes get the same id again
    try:
        temporary.mkdir()
        files = {}
        for name, write in writers.items():
            path = temporary / name
            write(path)
            _sync(path)
            if with_manifest:
                files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        if with_manifest:
            (temporary / MANIFEST).write_bytes(_render(files))
            _sync(temporary / MANIFEST)
        _sync_folder(temporary)
        try:
            if os.path.lexists(target):
                _discard(replaced)
                os.rename(target, replaced)
            os.rename(temporary, target)
        except BaseException:
            with suppress(OSError):
                os.rename(replaced, target)
            raise
    finally:
        _discard(temporary)
    _sync_folder(target.parent)
    _discard(replaced)


def verify_folder(folder: Path) -> set[str]:
    """Reads every file that the manifest lists, and returns their names; others are ignored.

    Raises:
        Damaged: the manifest or a file of it is missing, a link, unreadable, or not as written.
    """
    if not stat.S_ISDIR(_status(folder).st_mode):
        raise Damaged(f"{folder.name}: not a folder")
    files = _read_manifest(folder / MANIFEST)
    for name, entry in files.items():
        if not _PLAIN_NAME.fullmatch(name):
            raise Damaged(f"{MANIFEST}: not a plain file name: {name!r:.80}")
        match entry:
            case {"bytes": int(num_bytes), "sha256": str(sha256)}:
                _verify_file(folder / name, num_bytes, sha256)
            case _:
                raise Damaged(f"{MANIFEST}: no size and sha256 of {name}")
    return set(files)


def remove_folder(folder: Path) -> None:
    """Removes a folder as far as possible; never half of it under its own name."""
    removed = _temporary(folder, ".removed")
    _discard(removed)
    with suppress(OSError):
        os.rename(folder, removed)
        _sync_folder(folder.parent)
        _discard(removed)


def remove_leftovers(parent: Path) -> None:
    """Removes what killed writers left in a folder, in which no other may be at work."""
    for path in list(parent.glob(f".tmp_*{_REPLACED}")):
        target = path.with_name(path.name.removeprefix(".tmp_").removesuffix(_REPLACED))
        if not os.path.lexists(target):
            with suppress(OSError):
                os.rename(path, target)
    for path in list(parent.glob(".tmp_*")):
        _discard(path)


def sync_file(path: Path) -> None:
    """Brings a file to the disk, if there is one."""
    with suppress(FileNotFoundError):
        _sync(path)


def _temporary(path: Path, ending: str = "") -> Path:
    return path.with_name(f".tmp_{path.name}.{socket.gethostname()}.{os.getpid()}{ending}")


def _discard(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # Windows and some network file systems cannot
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify_file(path: Path, num_bytes: int, sha256: str) -> None:
    found_bytes = _file_bytes(path)
    if found_bytes != num_bytes:
        raise Damaged(f"{path.name}: {found_bytes:,} bytes, {num_bytes:,} were written")
    try:
        found_sha256 = _sha256(path)
    except OSError as error:
        raise Damaged(f"{path.name}: {error.strerror}") from error
    if found_sha256 != sha256:
        raise Damaged(f"{path.name}: sha256 differs")


def _file_bytes(path: Path) -> int:
    status = _status(path)
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{path.name}: not a regular file")
    return status.st_size


def _status(path: Path) -> os.stat_result:
    try:
        return path.lstat()
    except FileNotFoundError as error:
        raise Damaged(f"{path.name}: missing") from error
    except OSError as error:
        raise Damaged(f"{path.name}: {error.strerror}") from error


def _render(files: object) -> bytes:
    """The only text of a manifest with these entries: no bit of it is without meaning."""
    sha256 = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    text = json.dumps({"files": files, "sha256": sha256}, indent=1, sort_keys=True)
    return f"{text}\n".encode()


def _read_manifest(path: Path) -> dict[str, object]:
    if _file_bytes(path) > _MAX_MANIFEST_BYTES:
        raise Damaged(f"{MANIFEST}: over {_MAX_MANIFEST_BYTES:,} bytes")
    try:
        data = path.read_bytes()
        match json.loads(data.decode()):
            case {"files": dict(files)} if _render(files) == data:
                return files
    except OSError as error:
        raise Damaged(f"{MANIFEST}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST}: {error}") from error
    raise Damaged(f"{MANIFEST}: not the text that was written")
