"""Durable folders: killed at every point, every bit flipped, manifests that lie."""

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import stat
import threading
import traceback
import warnings
from itertools import count, groupby
from pathlib import Path

import pytest

from trainlib import durable
from trainlib.durable import (
    MANIFEST,
    Damaged,
    read_json,
    remove_folder,
    remove_leftovers,
    sync_file,
    verify_folder,
    write_bytes,
    write_folder,
    write_text,
)

OLD = {"model.safetensors": b"old weights", "state.json": b'{"step": 1}'}
NEW = {"model.safetensors": b"new and longer weights", "state.json": b'{"step": 22}'}
OPERATIONS = [(os, name) for name in ("mkdir", "open", "fsync", "rename", "replace", "unlink",
                                      "rmdir")] + [(io, "open"), (shutil, "rmtree")]


def writers(contents, halfway=lambda: None):
    def writer(data):
        def write(path):
            with path.open("wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                halfway()
                file.write(data[len(data) // 2 :])
        return write
    return {name: writer(data) for name, data in contents.items()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def leftovers(parent):
    return sorted(parent.glob(".tmp_*"))


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "step_00000075"
    write_folder(target, writers(OLD))
    return target


@pytest.fixture
def no_disk(monkeypatch):
    """SIGKILL spares what the kernel has, so hundreds of kills need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def survives(act, point):
    """Runs ``act(halfway)`` in a child that kills itself at one point.

    Points are counted before and after each file-system operation, and where ``halfway`` is
    called; the child survives when it has fewer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        child = os.fork()
    if not child:
        try:
            passed = count()

            def arrive():
                if next(passed) == point:
                    os.kill(os.getpid(), signal.SIGKILL)

            def counted(function):
                def call(*args, **kwargs):
                    arrive()
                    result = function(*args, **kwargs)
                    arrive()
                    return result
                return call

            for module, name in OPERATIONS:
                setattr(module, name, counted(getattr(module, name)))
            act(arrive)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL)
    return code == 0


def states_after_kills(tmp_path, prepare, act, state):
    """What a kill at each point leaves, without repetitions in a row, and the number of points."""
    states = []
    for point in count():
        parent = tmp_path / str(point)
        parent.mkdir()
        prepare(parent)
        survived = survives(lambda halfway: act(parent, halfway), point)  # noqa: B023
        states.append(state(parent))
        shutil.rmtree(parent)
        if survived:
            return [key for key, _ in groupby(states)], states


def folder_state(parent):
    """The version under the name, once the next writing has been found to succeed as well."""
    target, versions = parent / "runs" / "best", {"old": OLD, "new": NEW}
    state = "absent"
    if os.path.lexists(target):
        verify_folder(target)
        [state] = [name for name, version in versions.items() if contents(target) == version]
    elif leftovers(target.parent):
        for path in leftovers(target.parent):
            if path.name.endswith(".replaced"):
                state = "moved away"
                remove_leftovers(target.parent)  # brings it back
                verify_folder(target)
                assert contents(target) == OLD
                break
    write_folder(target, writers(OLD))
    remove_leftovers(target.parent)
    verify_folder(target)
    assert contents(target) == OLD and os.listdir(target.parent) == ["best"]
    return state


def write_new(parent, halfway):
    write_folder(parent / "runs" / "best", writers(NEW, halfway))


@pytest.mark.usefixtures("no_disk")
def test_killed_anywhere_a_new_folder_is_whole_or_absent(tmp_path):
    seen, points = states_after_kills(tmp_path, lambda parent: None, write_new, folder_state)
    assert seen == ["absent", "new"] and len(points) > 40


@pytest.mark.usefixtures("no_disk")
def test_killed_anywhere_a_replaced_folder_is_old_or_new(tmp_path):
    def prepare(parent):
        write_folder(parent / "runs" / "best", writers(OLD))

    seen, points = states_after_kills(tmp_path, prepare, write_new, folder_state)
    assert seen == ["old", "moved away", "new"] and len(points) > 40
    assert points.count("moved away") == 2  # after the one rename, before the other


@pytest.mark.usefixtures("no_disk")
def test_killed_anywhere_a_removed_folder_is_whole_or_absent(tmp_path):
    def prepare(parent):
        write_folder(parent / "runs" / "best", writers(OLD))

    def act(parent, halfway):
        remove_folder(parent / "runs" / "best")

    def state(parent):
        return folder_state(parent) if (parent / "runs" / "best").exists() else "absent"

    seen, _ = states_after_kills(tmp_path, prepare, act, state)
    assert seen == ["old", "absent"]


@pytest.mark.usefixtures("no_disk")
def test_killed_anywhere_a_text_is_old_or_new(tmp_path):
    seen, _ = states_after_kills(
        tmp_path,
        lambda parent: write_text(parent / "exit.json", "old"),
        lambda parent, halfway: write_text(parent / "exit.json", "new"),
        lambda parent: (parent / "exit.json").read_text(),
    )
    assert seen == ["old", "new"]


@pytest.mark.parametrize("exists", [False, True], ids=["new", "replaced"])
def test_all_is_on_the_disk_before_the_commit_and_the_commit_before_the_end(
    tmp_path, monkeypatch, exists
):
    """Power loss in a test: what counts is the order of the syncs and the rename."""
    target = tmp_path / "runs" / "deep" / "best"
    if exists:
        write_folder(target, writers(OLD))
    synced, events = set(), []
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree

    def recording_fsync(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)
        events.append("sync")

    def recording_rename(source, destination):
        if destination == target:
            paths = [source, *source.iterdir()]
            assert {path.name for path in paths[1:]} == {*NEW, MANIFEST}
            assert {path.stat().st_ino for path in paths} <= synced
            synced.clear()
            events.append("commit")
        rename(source, destination)

    def recording_rmtree(path, **options):
        events.append("remove")
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    monkeypatch.setattr(shutil, "rmtree", recording_rmtree)
    write_folder(target, writers(NEW))
    assert synced == {target.parent.stat().st_ino}
    made_parents = [] if exists else ["sync"] * 2
    end = ["commit", "sync"] + ["remove"] * exists
    assert events == made_parents + ["sync"] * (len(NEW) + 2) + end


def test_a_replaced_text_and_a_removed_folder_stay_so_after_power_loss(folder, monkeypatch):
    events = []

    def recorded(name, function):
        def call(*args, **kwargs):
            is_parent = name == "sync" and os.path.samestat(os.fstat(*args), folder.parent.stat())
            events.append("sync parent" if is_parent else name)
            return function(*args, **kwargs)
        return call

    names = {"fsync": "sync", "rename": "rename", "replace": "rename"}
    for attribute, name in names.items():
        monkeypatch.setattr(os, attribute, recorded(name, getattr(os, attribute)))
    monkeypatch.setattr(shutil, "rmtree", recorded("remove", shutil.rmtree))
    write_text(folder.parent / "exit.json", "{}")
    assert events == ["sync", "rename", "sync parent"]
    events.clear()
    remove_folder(folder)
    assert events == ["rename", "sync parent", "remove"]


def test_the_order_of_the_writers_does_not_matter(tmp_path):
    for number, names in enumerate([list(NEW), list(NEW)[::-1]]):
        write_folder(tmp_path / str(number), writers({name: NEW[name] for name in names}))
        verify_folder(tmp_path / str(number))
    assert (tmp_path / "0" / MANIFEST).read_bytes() == (tmp_path / "1" / MANIFEST).read_bytes()


def test_a_written_folder_verifies_and_holds_what_was_written(folder):
    verify_folder(folder)
    assert contents(folder) == OLD and leftovers(folder.parent) == []
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~_umask()
    (folder / "README.md").write_text("beside the listed files")
    verify_folder(folder)


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_files_of_any_size_verify(tmp_path, size):
    data = os.urandom(size)
    write_folder(tmp_path / "final", {"model.safetensors": lambda path: path.write_bytes(data)})
    verify_folder(tmp_path / "final")
    manifest = json.loads((tmp_path / "final" / MANIFEST).read_text())
    expected = {"bytes": size, "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["files"] == {"model.safetensors": expected}


def test_without_a_manifest_nothing_vouches_for_the_folder(tmp_path):
    write_folder(tmp_path / "final", writers(OLD), with_manifest=False)
    assert contents(tmp_path / "final") == OLD
    with pytest.raises(Damaged, match="^MANIFEST.json: missing$"):
        verify_folder(tmp_path / "final")


@pytest.mark.parametrize("name", [MANIFEST, "state.json"])
def test_every_flipped_bit_is_found(folder, name):
    path = folder / name
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(Damaged, match=f"^{name}: "):
            verify_folder(folder)
    path.write_bytes(data)
    verify_folder(folder)


def replace_by_link(path):
    shutil.copy(path, path.with_suffix(".copy"))
    path.unlink()
    path.symlink_to(path.with_suffix(".copy"))


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


FAULTS = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes"),
    "emptied": (lambda path: os.truncate(path, 0), "0 bytes"),
    "appended": (lambda path: path.write_bytes(path.read_bytes() + b"\n"), "bytes"),
    "missing": (Path.unlink, "missing"),
    "linked": (replace_by_link, "not a regular file"),
    "a folder": (replace_by_folder, "not a regular file"),
    "a pipe": (replace_by_pipe, "not a regular file"),
}


@pytest.mark.parametrize("name", [MANIFEST, "state.json"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_named_with_its_fault(folder, name, fault):
    damage, message = FAULTS[fault]
    damage(folder / name)
    if name == MANIFEST and "bytes" in message:
        message = ""  # nothing says how long it was
    with pytest.raises(Damaged, match=f"^{name}: .*{message}"):
        verify_folder(folder)


def test_the_sizes_are_told(tmp_path):
    write_folder(tmp_path / "final", {"a.bin": lambda path: path.write_bytes(bytes(2345))})
    (tmp_path / "final" / "a.bin").write_bytes(bytes(1234))
    with pytest.raises(Damaged, match="^a.bin: 1,234 bytes, 2,345 were written$"):
        verify_folder(tmp_path / "final")


def test_the_folder_itself_is_a_folder(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").touch()
    for name, fault in {"link": "not a folder", "file": "not a folder", "none": "missing"}.items():
        with pytest.raises(Damaged, match=f"^{name}: {fault}$"):
            verify_folder(tmp_path / name)


@pytest.mark.parametrize("name", [MANIFEST, "state.json"])
def test_a_file_that_cannot_be_read_is_damaged(folder, monkeypatch, name):
    def failing(path, *args, **kwargs):
        if Path(path).name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real_open(path, *args, **kwargs)

    real_open = Path.open
    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(Damaged, match=f"^{name}: Input/output error$"):
        verify_folder(folder)


def manifest_of(name="state.json", **changes):
    """A manifest that is its own canonical text, as a forger would write it."""
    data = OLD["state.json"]
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | changes
    return durable._render({name: entry})


def test_the_forged_manifest_is_accepted_where_it_tells_the_truth(folder):
    """Or else the tests of forged ones would show nothing."""
    (folder / MANIFEST).write_bytes(manifest_of())
    verify_folder(folder)


@pytest.mark.parametrize("name", [
    "", ".", "..", "../step_00000075/state.json", "/etc/hostname", "a/b", "a\\b", "C:state.json",
    "state.json\0", "state.json\n", ".hidden", "\ud800", "\udc80", "é", "n" * 300, "n" * 100_000,
], ids=lambda name: ascii(name)[:30])
def test_a_manifest_names_plain_files_only(folder, name):
    (folder / MANIFEST).write_bytes(manifest_of(name))
    with pytest.raises(Damaged, match="^MANIFEST.json: ") as caught:
        verify_folder(folder)
    assert len(str(caught.value)) < 300


HOSTILE = {
    "null": b"null",
    "a list": b"[]",
    "a number": b"1",
    "no files": b"{}",
    "files of another type": durable._render([]),
    "an entry of another type": durable._render({"state.json": 11}),
    "an empty entry": durable._render({"state.json": {}}),
    "a null entry": durable._render({"state.json": None}),
    "a size as text": manifest_of(bytes="11"),
    "a size as a fraction": manifest_of(bytes=11.0),
    "an infinite size": manifest_of(bytes=float("inf")),
    "a size that is no number": manifest_of(bytes=float("nan")),
    "a negative size": manifest_of(bytes=-1),
    "a huge size": manifest_of(bytes=10**4000),
    "a size that Python refuses": manifest_of().replace(b" 11", b" " + b"9" * 5000),
    "a list as size": manifest_of(bytes=[11]),
    "a digest of another type": manifest_of(sha256=[]),
    "an upper-case digest": manifest_of(sha256=hashlib.sha256(b"").hexdigest().upper()),
    "deep lists": b"[" * 200_000,
    "deep files": b'{"files":' * 100_000 + b"1" + b"}" * 100_000,
    "deep entries": b'{"files":{"a":' + b"[" * 900 + b"]" * 900 + b'},"sha256":""}',
    "a name twice": manifest_of().replace(b'"files"', b'"files": {}, "files"'),
    "another key": manifest_of().replace(b"\n}", b',\n "z": 1\n}'),
    "a byte order mark": b"\xef\xbb\xbf" + manifest_of(),
    "UTF-16": manifest_of().decode().encode("utf-16"),
    "invalid UTF-8": b'{"files": "\xff\xfe"}',
    "zeros": bytes(100),
    "Windows line ends": manifest_of().replace(b"\n", b"\r\n"),
    "a pickle": pickle.dumps(OLD),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_manifest_is_damaged_and_nothing_else(folder, kind):
    (folder / MANIFEST).write_bytes(HOSTILE[kind])
    with pytest.raises(Damaged) as caught:
        verify_folder(folder)
    assert str(caught.value).split(":")[0] in (MANIFEST, "state.json")


def test_a_manifest_too_large_to_parse_is_not_read(folder):
    os.truncate(folder / MANIFEST, 1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(Damaged, match="^MANIFEST.json: over 16,777,216 bytes$"):
        verify_folder(folder)


@pytest.mark.parametrize("name", ["", "..", "a/b", "/a", "a\\b", "a\0", MANIFEST], ids=ascii)
def test_what_could_not_be_verified_is_not_written(tmp_path, name):
    with pytest.raises(ValueError, match="a file's name"):
        write_folder(tmp_path / "runs" / "best", {name: lambda path: None})
    assert os.listdir(tmp_path) == []


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return (open, (self.file, "w"))


@pytest.mark.parametrize("name", [MANIFEST, *OLD])
def test_a_pickle_is_damage_or_plain_bytes(folder, tmp_path, name):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    (folder / name).write_bytes(bomb)
    with pytest.raises(Damaged, match=f"^{name}: "):
        verify_folder(folder)
    write_folder(folder, writers(dict.fromkeys(OLD, bomb)))
    verify_folder(folder)
    assert contents(folder) == dict.fromkeys(OLD, bomb)
    assert not (tmp_path / "exploded").exists()


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_folder_and_nothing_else(folder, tmp_path):
    def write(path):
        path.write_bytes(b"hal")
        full_disk()

    with pytest.raises(OSError, match="No space left"):
        write_folder(folder, writers(NEW) | {"state.json": write})
    with pytest.raises(FileNotFoundError):
        write_folder(folder, {"state.json": lambda path: None})  # a writer that writes nothing
    verify_folder(folder)
    assert contents(folder) == OLD and os.listdir(tmp_path) == [folder.name]


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("number", [0, 1], ids=["first", "second"])
def test_a_failed_rename_leaves_the_old_folder(folder, tmp_path, monkeypatch, failure, number):
    renames, rename = count(), os.rename

    def failing(source, destination):
        if next(renames) == number:
            raise failure
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(failure):
        write_folder(folder, writers(NEW))
    verify_folder(folder)
    assert contents(folder) == OLD and os.listdir(tmp_path) == [folder.name]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_failed_sync_of_a_file_is_raised(folder, tmp_path, monkeypatch, code):
    def failing(descriptor):
        raise OSError(code, os.strerror(code))

    write_text(tmp_path / "exit.json", "old")
    monkeypatch.setattr(os, "fsync", failing)
    for act in (
        lambda: write_folder(folder, writers(NEW)),
        lambda: write_text(tmp_path / "exit.json", "new"),
        lambda: sync_file(tmp_path / "exit.json"),
    ):
        with pytest.raises(OSError) as caught:
            act()
        assert caught.value.errno == code
    assert contents(folder) == OLD and (tmp_path / "exit.json").read_text() == "old"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("code, is_fine", [
    (errno.EINVAL, True), (errno.EACCES, True), (errno.ENOTSUP, True),
    (errno.EIO, False), (errno.ENOSPC, False),
], ids=str)
def test_only_a_file_system_that_cannot_sync_folders_is_forgiven(
    tmp_path, monkeypatch, code, is_fine
):
    def failing(path, *args, **kwargs):
        if os.path.isdir(path):
            raise OSError(code, os.strerror(code))
        return real_open(path, *args, **kwargs)

    real_open = os.open
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        if is_fine:
            write_folder(tmp_path / "runs" / "best", writers(NEW))
        else:
            with pytest.raises(OSError):
                write_folder(tmp_path / "runs" / "best", writers(NEW))
    if is_fine:
        verify_folder(tmp_path / "runs" / "best")


def test_leftovers_of_a_process_of_the_same_number_are_no_obstacle(folder, tmp_path):
    for path in (durable._temporary(folder), durable._temporary(folder, ".removed"),
                 folder.with_name(f".tmp_{folder.name}.replaced")):
        path.mkdir()
        (path / "half").touch()
    for _ in range(2):
        write_folder(folder, writers(NEW))
        assert contents(folder) == NEW
    remove_folder(folder)
    assert os.listdir(tmp_path) == []


def test_a_file_or_link_in_place_of_the_folder_is_replaced(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        write_folder(tmp_path / name, writers(NEW))
        verify_folder(tmp_path / name)
    assert contents(folder) == OLD and leftovers(tmp_path) == []


def test_leftovers_are_removed_and_what_they_point_to_is_not(folder, tmp_path):
    (tmp_path / ".tmp_link_to_folder").symlink_to(folder)
    (tmp_path / ".tmp_link_to_file").symlink_to(folder / "state.json")
    (tmp_path / ".tmp_broken_link").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".tmp_file").touch()
    (tmp_path / ".tmp_folder" / "deep").mkdir(parents=True)
    (tmp_path / ".tmp_folder" / "link").symlink_to(folder)
    (tmp_path / "kept.tmp_").touch()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["kept.tmp_", folder.name]
    verify_folder(folder)
    remove_leftovers(tmp_path / "missing")


def test_removing_never_fails(folder, tmp_path, monkeypatch):
    remove_folder(tmp_path / "missing")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full_disk)
        remove_folder(folder)
    verify_folder(folder)
    (tmp_path / "link").symlink_to(folder)
    remove_folder(tmp_path / "link")
    verify_folder(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", full_disk)
        remove_folder(folder)
    assert not folder.exists() and len(leftovers(tmp_path)) == 1


def test_a_text_is_replaced_and_a_link_is_not_written_through(tmp_path):
    path = tmp_path / "exit.json"
    for text in ("", "zwölf\n"):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    (tmp_path / "link").symlink_to(path)
    write_text(tmp_path / "link", "own")
    assert path.read_text() == "zwölf\n" and not (tmp_path / "link").is_symlink()
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "missing" / "exit.json", "")
    assert sorted(os.listdir(tmp_path)) == ["exit.json", "link"]


def test_bytes_are_replaced_as_they_are(tmp_path):
    for content in (bytes(range(256)) * 5000, b"", b"\r\n"):
        write_bytes(tmp_path / "part.safetensors", content)
        assert (tmp_path / "part.safetensors").read_bytes() == content
        assert os.listdir(tmp_path) == ["part.safetensors"]


def test_json_is_a_mapping_or_an_empty_one(tmp_path):
    path = tmp_path / "exit.json"
    assert read_json(path) == {} and read_json(tmp_path) == {}
    write_text(path, '{"code": 0, "who": "zwölf"}\n')
    assert read_json(path) == {"code": 0, "who": "zwölf"}
    for damaged in (b"", b'{"code": 0', b"[1]", b"null", b'{"who": "\xff"}', b"[" * 100_000):
        path.write_bytes(damaged)
        assert read_json(path) == {}


def test_two_threads_write_the_same_text_without_failing(tmp_path, monkeypatch):
    replace = os.replace

    def overtaken(source, destination):
        monkeypatch.setattr(os, "replace", replace)
        other = threading.Thread(target=write_text, args=(destination, "the watchdog's"))
        other.start()
        other.join()
        replace(source, destination)

    monkeypatch.setattr(os, "replace", overtaken)
    write_text(tmp_path / "exit.json", "the script's")
    assert (tmp_path / "exit.json").read_text() == "the script's"
    assert os.listdir(tmp_path) == ["exit.json"]


def test_syncing_a_file_needs_no_file(tmp_path):
    sync_file(tmp_path / "missing")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    sync_file(tmp_path / "metrics.jsonl")
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
