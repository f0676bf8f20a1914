"""Disks that fill up, fail, become read-only or go away: training goes on, and nothing is lost."""

import errno
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from launching import assert_same_run, train
from warm import fork

from trainlib import durable, journal
from trainlib.checkpoint.layout import step_folders
from trainlib.guard import Guard, StepRecord
from trainlib.journal import Journal
from trainlib.progress import Progress

SCRIPT = "tests/disk_train.py"
FLAGS = ["--loop.duration", "60 steps", "--checkpoint.every", "10 steps", "--log.every", "1",
         "--loop.eval_every", "15 steps"]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("undisturbed") / "run", *FLAGS)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no small tmpfs here, which takes root: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def run(folder: Path, events: dict[int, str], **options) -> subprocess.CompletedProcess:
    """The job on a disk to which that happens; its log.txt need not be there."""
    return fork(["--run_dir", str(folder), "--log.trackers", "[]", "--log.report", "false", *FLAGS],
                script=SCRIPT, DISK=json.dumps(events), **options)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".tmp_")]


def assert_whole(folder: Path, undisturbed: Path) -> None:
    assert_same_run(folder, undisturbed)
    assert json.loads((folder / "exit.json").read_text())["code"] == 0
    assert leftovers(folder) == [] and not (folder / "run.lock").exists()
    assert [path.name for path in step_folders(folder / "checkpoints")] == [
        "step_00000050", "step_00000060"]
    for path in step_folders(folder / "checkpoints"):
        durable.verify_folder(path)
    assert {file.name for file in undisturbed.iterdir()} == {f.name for f in folder.iterdir()}


def test_a_full_disk_that_is_freed_leaves_no_trace(small_disk, undisturbed):
    ended = run(small_disk / "run", {12: "fill", 33: "free"})
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout + ended.stderr
    for step in (20, 30):
        assert lines.count(f"not written: checkpoints/step_000000{step}: ") == 1
    assert "not written: checkpoints/step_00000040" not in lines and "Traceback" not in lines
    assert lines.count("metrics.jsonl: cannot be written (No space left on device); ") == 1
    assert lines.count("metrics.jsonl: can be written again; no record is missing") == 1
    assert_whole(small_disk / "run", undisturbed)


def test_a_disk_that_stays_full_ends_with_4_and_the_run_goes_on_once_it_is_freed(
    small_disk, undisturbed
):
    folder = small_disk / "run"
    ended = run(folder, {33: "fill"})
    assert ended.returncode == 4, ended.stderr
    assert "Traceback" not in ended.stderr and "metrics.jsonl: " in ended.stdout
    if (folder / "exit.json").exists():
        assert json.loads((folder / "exit.json").read_text())["code"] == 4
    else:
        assert "exit.json cannot be written" in ended.stderr
    kept = step_folders(folder / "checkpoints")
    assert [path.name for path in kept] == ["step_00000020", "step_00000030"]
    for path in kept:
        durable.verify_folder(path)
    (small_disk / "filler").unlink()
    train(folder, *FLAGS)
    assert_same_run(folder, undisturbed)
    assert leftovers(folder) == []


@pytest.mark.parametrize("error", ["ENOSPC", "EROFS", "EDQUOT", "EIO"])
def test_whatever_the_error_nothing_is_lost(tmp_path, undisturbed, error):
    ended = run(tmp_path / "run", {12: error, 43: "mend"})
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout.count("training goes on") == 3 + 2  # checkpoints, and best/ of two steps
    assert_whole(tmp_path / "run", undisturbed)


def test_no_checkpoint_counts_on_records_that_wait_in_memory(tmp_path, undisturbed):
    """A resume cuts the file to what the checkpoint says: what was not there would be lost."""
    ended = run(tmp_path / "run", {12: "records", 33: "mend"})
    assert ended.returncode == 0, ended.stderr
    for step in (20, 30):
        assert (f"not written: checkpoints/step_000000{step}: metrics.jsonl: Input/output error; "
                "training goes on") in ended.stdout
    assert_whole(tmp_path / "run", undisturbed)


def test_on_two_processes_both_end_with_4_and_go_on_to_the_same_bits(tmp_path, undisturbed):
    folder = tmp_path / "run"
    ended = run(folder, {33: "EROFS"}, processes=2)
    assert ended.returncode == 4 and "Traceback" not in ended.stderr, ended.stderr
    assert "exit.json cannot be written" in ended.stderr and not (folder / "final").exists()
    for path in step_folders(folder / "checkpoints"):
        durable.verify_folder(path)
    train(folder, *FLAGS)
    assert_same_run(folder, undisturbed)
    assert leftovers(folder) == []


def test_a_folder_that_is_moved_away_and_back_is_gone_on_with(tmp_path, undisturbed):
    ended = run(tmp_path / "run", {12: "move", 43: "back"})
    assert ended.returncode == 0, ended.stderr
    assert f"step_00000020: the folder {tmp_path / 'run'} is gone; training goes on" in ended.stdout
    assert not (tmp_path / "moved").exists()
    assert_whole(tmp_path / "run", undisturbed)


def test_a_folder_that_stays_away_is_not_made_again(tmp_path, undisturbed):
    ended = run(tmp_path / "run", {33: "move"})
    assert ended.returncode == 4 and not (tmp_path / "run").exists()
    (tmp_path / "moved").rename(tmp_path / "run")
    train(tmp_path / "run", *FLAGS)
    assert_same_run(tmp_path / "run", undisturbed)


def test_another_folder_in_its_place_stays_as_it_is(tmp_path):
    """Somebody has moved the run's folder away and made one of that name."""
    ended = run(tmp_path / "run", {33: "replace"})
    assert ended.returncode == 4 and "Traceback" not in ended.stderr, ended.stderr
    assert not list((tmp_path / "run").iterdir())
    words = f"{tmp_path / 'run'} is not this run's folder any more"
    assert f"step_00000040: {words}" in ended.stdout
    assert f"exit.json cannot be written: [Errno 2] {words}" in ended.stderr
    assert not (tmp_path / "moved" / "exit.json").exists()


@pytest.mark.parametrize("step", [12, 47])
def test_a_folder_that_is_removed_is_made_again_with_all_that_can_be_known(
    tmp_path, undisturbed, step
):
    """Its records are read from the open file, the best weights from the last copy of them."""
    folder = tmp_path / "run"
    ended = run(folder, {step: "remove"})
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    assert f"{folder}: was removed, and is made again" in ended.stdout
    assert_same_run(folder, undisturbed)
    assert {f.name for f in folder.iterdir()} == {f.name for f in undisturbed.iterdir()}
    config = (undisturbed / "config.yaml").read_text().replace(str(undisturbed), str(folder))
    assert (folder / "config.yaml").read_text() == config
    for name in ("best", "final"):
        assert (folder / name / "model.safetensors").read_bytes() == (
            undisturbed / name / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "final")
    (folder / "exit.json").unlink()
    train(folder, *FLAGS)  # from its last checkpoint
    assert_same_run(folder, undisturbed)


def test_the_report_that_does_not_fit_costs_a_line_and_not_the_run(tmp_path):
    """Weights and checkpoint are written; only then does the disk fail."""
    folder = tmp_path / "run"
    ended = fork(["--run_dir", str(folder), "--log.trackers", "[]", *FLAGS],
                 script=SCRIPT, DISK="{}", FAIL_AT_END="ENOSPC")
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    assert "predictions: not written (No space left on device)" in ended.stdout
    assert (folder / "final" / "model.safetensors").exists()
    assert not (folder / "predictions.csv").exists()


# ---- the journal by itself ----


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def path(tmp_path):
    yield tmp_path / "metrics.jsonl"
    journal.close_all()


def lines(path: Path) -> list[dict]:
    content = path.read_bytes()
    assert content == b"" or content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


class Disk:
    """Takes so many bytes, and no more; ``truncates`` tells whether half a line can be cut off."""

    def __init__(self, patch, room: int | None = None, truncates: bool = True):
        self.room, self.truncates = room, truncates
        self._write, self._truncate = os.write, os.ftruncate
        patch.setattr(os, "write", self.write)
        patch.setattr(os, "ftruncate", self.truncate)

    def write(self, descriptor, data):
        if self.room is None:
            return self._write(descriptor, data)
        if self.room == 0:
            raise FULL
        written = self._write(descriptor, data[: self.room])
        self.room -= written
        return written

    def truncate(self, descriptor, size):
        if not self.truncates:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._truncate(descriptor, size)


RECORDS = [{"step": step, "loss": "x" * (7 * step % 11)} for step in range(6)]


@pytest.mark.parametrize("truncates", [True, False])
def test_whatever_byte_a_write_ends_at_each_record_is_there_once(
    tmp_path, monkeypatch, said, truncates
):
    total = sum(len(json.dumps(record)) + 1 for record in RECORDS)
    for room in range(total + 1):
        path = tmp_path / f"{room}.jsonl"
        said.clear()
        with monkeypatch.context() as patch:
            disk = Disk(patch, room, truncates)
            log = Journal(path, said.append)
            for record in RECORDS:
                log.append(record)
            assert log.size == total
            if truncates:  # at each moment whole lines, the first ones
                assert lines(path) == RECORDS[: len(lines(path))]
            disk.room, disk.truncates = None, True
            log.append({"step": 6})
            assert lines(path) == [*RECORDS, {"step": 6}]
            log.close()
        assert len(said) == (2 if room < total else 0), (room, said)
        assert log.size == path.stat().st_size


def test_random_outages_lose_and_double_nothing(path, monkeypatch, said):
    disk, chance = Disk(monkeypatch), random.Random(0)
    log = Journal(path, said.append)
    for step in range(500):
        disk.room = chance.choice([None, None, 0, chance.randrange(40)])
        disk.truncates = chance.random() < 0.5
        log.append({"step": step})
    disk.room, disk.truncates = None, True
    log.close()
    assert [record["step"] for record in lines(path)] == list(range(500))
    assert [line.split(": ")[1].split()[0] for line in said] == ["cannot", "can"] * (len(said) // 2)


def test_an_outage_is_said_once_and_so_is_its_end(path, monkeypatch, said):
    disk = Disk(monkeypatch, 0)
    log = Journal(path, said.append)
    for step in range(3):
        log.append({"step": step})
    assert said == ["metrics.jsonl: cannot be written (No space left on device); 1 record waits in "
                    "memory, and all is tried again with the next one"]
    disk.room = None
    log.flush(log.size)  # as a checkpoint does
    assert said[1:] == ["metrics.jsonl: can be written again; no record is missing"]
    assert len(lines(path)) == 3
    disk.room = 0
    log.append({"step": 3})
    log.close()
    log.close()
    assert len(said) == 4 and "1 record could not be written (No space left" in said[3]


def test_a_checkpoint_counts_only_on_what_is_written(path, monkeypatch, said):
    log = Journal(path, said.append)
    log.append({"step": 0})
    before = log.size
    disk = Disk(monkeypatch, 0)
    log.append({"step": 1})
    journal.flush(path, before)
    with pytest.raises(OSError, match="metrics.jsonl: No space left"):
        journal.flush(path, journal.size(path))
    disk.room = None
    journal.flush(path, journal.size(path))
    assert path.stat().st_size == journal.size(path) == log.size


def test_a_removed_file_is_made_again_with_all_it_held(path, said):
    log = Journal(path, said.append)
    log.append({"step": 0})
    path.unlink()
    log.append({"step": 1})
    assert [r["step"] for r in lines(path)] == [0, 1] and said == []
    (path.parent / "x").write_text("what an editor has put in its place\n")
    (path.parent / "x").replace(path)
    log.append({"step": 2})
    assert [r["step"] for r in lines(path)] == [0, 1, 2]
    assert os.listdir(path.parent) == [path.name]


def test_a_file_is_made_again_only_in_a_folder_that_is_still_the_runs(path, monkeypatch, said):
    def refuse():
        raise OSError(errno.ENOENT, "the folder is gone")

    log = Journal(path, said.append)
    log.append({"step": 0})
    monkeypatch.setattr(Journal, "check", staticmethod(refuse))
    path.unlink()
    log.append({"step": 1})
    assert not path.exists() and "the folder is gone" in said[0]
    monkeypatch.setattr(Journal, "check", None)
    log.append({"step": 2})
    assert [r["step"] for r in lines(path)] == [0, 1, 2]


def test_a_file_that_was_cut_from_outside_goes_on_with_whole_lines(path, said):
    log = Journal(path, said.append)
    for step in range(3):
        log.append({"step": step})
    os.truncate(path, path.stat().st_size - 4)
    log.append({"step": 3})
    assert [r["step"] for r in lines(path)] == [0, 1, 3] and "cut from outside" in said[0]


def test_former_records_stay(path, said):
    path.write_text('{"step": 0}\n')
    log = Journal(path, said.append)
    assert log.size == 12
    log.append({"step": 1})
    assert [r["step"] for r in lines(path)] == [0, 1]


def test_bad_steps_wait_too(tmp_path, monkeypatch):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    file, progress = tmp_path / "bad_steps.jsonl", Progress()
    guard = Guard(optimizer, torch.device("cpu"), None, lambda step: {"suspects": []}, file)
    disk = Disk(monkeypatch, 5)
    for step in range(4):
        bad = StepRecord(step, 0.1, [float("nan")], 1.0, [0.0, 0.0])
        assert "skipped" in guard.observe(bad, progress) and lines(file) == []
    disk.room = None
    journal.close_all()
    assert [entry["step"] for entry in lines(file)] == [0, 1, 2, 3]
