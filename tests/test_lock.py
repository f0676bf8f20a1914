"""One run per folder: who is refused, what is taken over, and who learns of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from trainlib.claim import Claim
from trainlib.config import UserError
from trainlib.runtime import lock as lock_module
from trainlib.runtime.lock import RunLock

ROOT = Path(__file__).resolve().parent.parent
# The module alone, because the package around it imports torch.
LOAD = """
import importlib.util, os, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("lock", "trainlib/runtime/lock.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
HOLD = LOAD + """
lock = module.RunLock(Path(sys.argv[1]), False, lambda reason: print(reason, flush=True), 0.05)
print("held", flush=True)
time.sleep(60)
"""
FORK = LOAD + """
lock = module.RunLock(Path(sys.argv[1]), False, print)
child = os.fork()
if child == 0:
    lock.release()
    os._exit(0)
os.waitpid(child, 0)
print(Path(sys.argv[1]).exists())
lock.release()
print(Path(sys.argv[1]).exists())
"""
RACE = LOAD + """
print("ready", flush=True)
for line in sys.stdin:
    path, start_seconds = line.split()
    time.sleep(max(0, float(start_seconds) - time.time()))
    try:
        lock = module.RunLock(Path(path), False, print)
        print("won", flush=True)
    except ValueError as error:
        print("refused" if "is in use by pid" in str(error) else error, flush=True)
"""


def nobody_minds(reason: str) -> None:
    raise AssertionError(reason)


def take(path: Path, steal: bool = False, on_lost=nobody_minds, beat_seconds: float = 5.0):
    return RunLock(path, steal, on_lost, beat_seconds)


def start(script: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.lock"


@pytest.fixture
def holder(path):
    """A process that holds the lock."""
    with start(HOLD, str(path)) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture
def elsewhere(monkeypatch):
    """Takes a lock as a run on another machine would."""
    def take_there(*arguments, **options) -> RunLock:
        with monkeypatch.context() as patch:
            patch.setattr(lock_module, "_machine", lambda: "another machine")
            patch.setattr(lock_module.socket, "gethostname", lambda: "node8")
            return take(*arguments, **options)
    return take_there


def write(path: Path, **changes) -> None:
    """A lock of this process with other values in it."""
    fields = {
        "host": "node7", "pid": os.getpid(), "pid_started": psutil.Process().create_time(),
        "machine": lock_module._machine(), "token": "0", "started": "2026-01-01T00:00:00+00:00",
    }
    path.write_text(json.dumps(fields | changes))


def ended_pid() -> int:
    with subprocess.Popen(["true"]) as process:
        return process.pid


def until(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_the_lock_says_whom_to_signal_and_goes_with_its_release(path):
    lock = take(path)
    fields = json.loads(path.read_text())
    assert fields["pid"] == os.getpid() and len(fields["token"]) == 32 and lock.note is None
    assert fields.keys() == {"host", "pid", "pid_started", "machine", "token", "started"}
    lock.release()
    assert list(path.parent.iterdir()) == []
    again = take(path)
    lock.release()  # a second call, which must not touch the next run's lock
    assert path.exists() and again.note is None
    again.release()


def test_a_second_run_is_refused_at_once_and_told_the_ways_out(path, holder):
    before = time.monotonic()
    with pytest.raises(UserError) as refused:
        take(path)
    assert time.monotonic() - before < 1
    for part in ("run_dir", f"pid {holder.pid} on", "since", "--run_dir", "steal_lock"):
        assert part in str(refused.value), part
    assert json.loads(path.read_text())["pid"] == holder.pid


def test_two_locks_in_one_process_are_two_runs(path):
    lock = take(path)
    with pytest.raises(UserError, match="in use"):
        take(path)
    lock.release()


def test_a_killed_run_is_followed_at_once(path, holder):
    holder.kill()
    holder.wait()
    before = time.monotonic()
    lock = take(path)
    assert time.monotonic() - before < 1
    assert f"run.lock of pid {holder.pid} on " in lock.note and "which has ended" in lock.note
    assert json.loads(path.read_text())["pid"] == os.getpid()
    lock.release()
    assert list(path.parent.iterdir()) == []


def test_a_zombie_has_ended(path):
    zombie = subprocess.Popen(["sleep", "60"])
    write(path, pid=zombie.pid, pid_started=psutil.Process(zombie.pid).create_time())
    with pytest.raises(UserError, match="in use"):
        take(path)
    zombie.kill()
    assert until(lambda: psutil.Process(zombie.pid).status() == psutil.STATUS_ZOMBIE)
    lock = take(path)
    assert "has ended" in lock.note
    lock.release()
    zombie.wait()


@pytest.mark.parametrize("seconds, is_same", [
    (0, True), (-2, True), (2, True), (-3600, False), (3600, False),
])
def test_a_reused_pid_is_told_by_its_creation_and_a_corrected_clock_is_not_one(
    path, seconds, is_same
):
    write(path, pid_started=psutil.Process().create_time() + seconds)
    if is_same:
        with pytest.raises(UserError, match="in use"):
            take(path)
    else:
        lock = take(path)
        assert "has ended" in lock.note
        lock.release()


@pytest.mark.parametrize("error, is_alive", [
    (PermissionError, True), (ProcessLookupError, False),
])
def test_another_users_process_counts_even_where_it_is_hidden(path, monkeypatch, error, is_alive):
    write(path, pid=ended_pid())

    def kill(pid, number):
        assert number == 0
        raise error
    monkeypatch.setattr(os, "kill", kill)
    if is_alive:
        with pytest.raises(UserError, match="in use"):
            take(path)
    else:
        take(path).release()


def test_of_four_newcomers_exactly_one_wins(tmp_path):
    starters = [start(RACE) for _ in range(4)]
    for starter in starters:
        assert starter.stdout.readline() == "ready\n"
    pid = ended_pid()
    for number in range(12):
        path = tmp_path / str(number) / "run.lock"
        path.parent.mkdir()
        if number < 10:
            write(path, pid=pid)
        begin_seconds = time.time() + 0.05
        for starter in starters:
            starter.stdin.write(f"{path} {begin_seconds}\n")
            starter.stdin.flush()
        results = sorted(starter.stdout.readline().strip() for starter in starters)
        assert results == ["refused"] * 3 + ["won"], number
        assert os.listdir(path.parent) == ["run.lock"]
    for starter in starters:
        starter.communicate()
        assert starter.returncode == 0


def test_a_newcomer_that_was_slower_is_refused(path, monkeypatch):
    write(path, pid=ended_pid())

    def is_running(pid, started):
        monkeypatch.undo()
        write(path, token="of the faster one")
        return False
    monkeypatch.setattr(lock_module, "_is_running", is_running)
    with pytest.raises(UserError, match="in use"):
        take(path)
    assert json.loads(path.read_text())["token"] == "of the faster one"


def test_a_beating_heart_elsewhere_is_respected(path, elsewhere, capfd):
    there = elsewhere(path, beat_seconds=0.1)
    before = time.monotonic()
    with pytest.raises(UserError, match=f"in use by pid {os.getpid()} on node8"):
        take(path, beat_seconds=1.0)
    assert time.monotonic() - before < 2
    assert capfd.readouterr().err == (
        f"run.lock: held by pid {os.getpid()} on node8; watching for 4 s whether it lives\n"
    )
    there.release()


def test_a_stopped_heart_elsewhere_is_taken_over(path, capfd):
    write(path, machine="another machine")  # alive here by its pid, which means nothing there
    before = time.monotonic()
    lock = take(path, beat_seconds=0.1)
    assert time.monotonic() - before >= 0.4
    assert "on node7, which gave no sign of life for 0.4 s, was taken over" in lock.note
    assert "watching" in capfd.readouterr().err
    lock.release()


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"null", b"{}", b'{"pid": 1, "token": 2}', b"[" * 5000],
    ids=["empty", "not text", "null", "no fields", "other types", "deep"],
)
def test_what_is_no_lock_is_watched(path, content, capfd):
    path.write_bytes(content)
    lock = take(path, beat_seconds=0.02)
    assert "run.lock of an unknown process, which gave no sign" in lock.note
    lock.release()


def test_a_lock_that_is_just_being_written_is_respected(path, tmp_path):
    write(tmp_path / "content")
    with path.open("w") as file:
        file.write((tmp_path / "content").read_text())
        writer = threading.Timer(0.1, file.flush)
        writer.start()
        with pytest.raises(UserError, match="in use by pid .* on node7"):
            take(path, beat_seconds=0.5)
        writer.join()


def test_a_lock_that_vanishes_while_it_is_watched_is_free(path):
    write(path, machine="another machine")
    remover = threading.Timer(0.1, path.unlink)
    remover.start()
    lock = take(path, beat_seconds=0.5)
    assert lock.note is None and json.loads(path.read_text())["pid"] == os.getpid()
    lock.release()
    remover.join()


def test_stealing_takes_a_living_lock_and_its_owner_learns_of_it_once(path, holder):
    lock = take(path, steal=True)
    assert f"pid {holder.pid} on" in lock.note and "steal_lock" in lock.note
    lost = holder.stdout.readline()
    assert lost.startswith(f"run.lock was taken by pid {os.getpid()} on ")
    holder.send_signal(signal.SIGKILL)
    assert holder.stdout.read() == ""
    lock.release()


def test_stealing_what_nobody_holds_needs_no_words(path):
    lock = take(path, steal=True)
    assert lock.note is None
    lock.release()


def test_a_robbed_run_leaves_the_thiefs_lock(path, elsewhere):
    reasons = []
    lock = take(path, on_lost=reasons.append, beat_seconds=0.02)
    thief = elsewhere(path, steal=True)
    assert until(lambda: reasons)
    lock.release()
    time.sleep(0.1)
    assert reasons == [f"run.lock was taken by pid {os.getpid()} on node8"]
    assert path.exists()
    thief.release()
    assert not path.exists()


def test_a_removed_lock_is_lost(path):
    reasons = []
    lock = take(path, on_lost=reasons.append, beat_seconds=0.02)
    path.unlink()
    assert until(lambda: reasons) and "is gone" in reasons[0] and len(reasons) == 1
    lock.release()


@pytest.fixture
def away(tmp_path):
    """A lock in a folder of its own, and the lines that it said."""
    folder, said = tmp_path / "run", []
    folder.mkdir()
    lock = RunLock(folder / "run.lock", False, nobody_minds, 0.02, said.append)
    yield lock, folder, said
    lock.release()


def test_a_folder_that_is_moved_away_is_waited_for(away):
    """Nobody else can have taken what is not there: no reason to end a run of a week."""
    lock, folder, said = away
    folder.rename(folder.with_name("elsewhere"))
    assert until(lambda: said) and "is gone (moved" in said[0]
    with pytest.raises(OSError, match="is gone"):
        lock.check()
    assert not folder.exists()  # or it could not be moved back
    time.sleep(0.2)
    folder.with_name("elsewhere").rename(folder)
    assert until(lambda: len(said) == 2) and "there again" in said[1]
    assert lock.check() is False
    beaten = (folder / "run.lock").stat().st_mtime_ns
    assert until(lambda: (folder / "run.lock").stat().st_mtime_ns > beaten)
    assert len(said) == 2


def test_a_folder_that_is_removed_is_made_again_with_its_lock(away):
    lock, folder, said = away
    content = (folder / "run.lock").read_bytes()
    (folder / "run.lock").unlink()
    folder.rmdir()
    assert until(lambda: said) and "is gone (removed)" in said[0]
    assert lock.check() is True and lock.check() is False
    assert (folder / "run.lock").read_bytes() == content
    with pytest.raises(UserError, match="in use"):
        take(folder / "run.lock")
    assert until(lambda: len(said) == 2) and "there again" in said[1]


def test_another_folder_in_its_place_is_left_alone(away):
    lock, folder, said = away
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()
    with pytest.raises(OSError, match="another one stands in its place"):
        lock.check()
    (folder.with_name("elsewhere") / "run.lock").unlink()
    folder.with_name("elsewhere").rmdir()
    (folder / "a file of somebody").touch()
    with pytest.raises(OSError, match="another one stands in its place"):
        lock.check()
    (folder / "a file of somebody").unlink()
    assert lock.check() is True


def test_a_claim_knows_the_folder_wherever_it_is_made_again(away):
    lock, folder, _ = away
    claim = Claim(folder / "run.lock", lock.token)
    claim.check()
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(OSError, match="is gone"):
        claim.check()
    folder.mkdir()
    with pytest.raises(OSError, match="another one stands in its place"):
        claim.check()
    shutil.rmtree(folder.with_name("elsewhere"))
    assert lock.check() is True  # made again
    claim.check()


def test_a_claim_outlives_the_lock_but_not_anothers(away, elsewhere):
    lock, folder, _ = away
    claim = Claim(folder / "run.lock", lock.token)
    lock.release()
    claim.check()
    elsewhere(folder / "run.lock")
    with pytest.raises(OSError):
        claim.check()


def test_a_folder_that_comes_back_with_another_runs_lock_is_lost(tmp_path, elsewhere):
    path = tmp_path / "run" / "run.lock"
    path.parent.mkdir()
    reasons, said = [], []
    lock = RunLock(path, False, reasons.append, 0.02, said.append)
    path.parent.rename(tmp_path / "moved")
    assert until(lambda: said)
    path.parent.mkdir()
    other = elsewhere(path)
    assert until(lambda: reasons) and reasons[0].startswith("run.lock was taken by pid")
    lock.release()
    assert path.exists()
    other.release()


def test_one_missing_beat_is_not_a_loss(path):
    lock = take(path, beat_seconds=0.4)
    content = path.read_bytes()
    beaten = path.stat().st_mtime_ns
    assert until(lambda: path.stat().st_mtime_ns != beaten)
    path.unlink()
    time.sleep(0.5)  # one beat finds nothing
    path.write_bytes(content)
    beaten = path.stat().st_mtime_ns
    assert until(lambda: path.stat().st_mtime_ns > beaten)
    lock.release()
    assert not path.exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()],
                         ids=["disk full", "memory"])
def test_the_heart_survives_what_says_nothing_of_the_owner(path, monkeypatch, error):
    lock = take(path, beat_seconds=0.02)
    failures = []

    def utime(path):
        failures.append(path)
        raise error
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", utime)
        assert until(lambda: len(failures) > 3)
        path.write_bytes(b"")  # half of a write is no evidence either
        assert until(lambda: len(failures) > 6)
    beaten = path.stat().st_mtime_ns
    assert until(lambda: path.stat().st_mtime_ns != beaten)
    lock.release()


def test_a_released_lock_is_not_lost_to_the_next_run(path, elsewhere):
    take(path, beat_seconds=0.02).release()
    next_run = elsewhere(path)
    time.sleep(0.1)  # nobody_minds would fail in the thread
    next_run.release()


def test_a_forked_child_does_not_release(path):
    with start(FORK, str(path)) as process:
        assert process.stdout.read() == "True\nFalse\n"


def test_a_folder_that_is_missing_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="cannot be written .No such file.*choose another"):
        take(tmp_path / "none" / "run.lock")
