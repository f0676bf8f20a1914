"""The cache of teachers' outputs: killed anywhere, on any number of processes, the same bytes."""

import itertools
import json
import os
import pickle
import shutil
import signal
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_durable import survives

from trainlib import durable
from trainlib.config import UserError
from trainlib.distillation.cache import TeacherCache

CPU = torch.device("cpu")
IDENTITY = {"teachers": "ab12", "data": "77ff"}
NUM_SAMPLES, PART_SIZE = 23, 4  # the last part has 3
ALL = np.arange(NUM_SAMPLES)


def make(folder: Path, num_samples=NUM_SAMPLES, part_size=PART_SIZE, **identity) -> TeacherCache:
    return TeacherCache(folder, IDENTITY | identity, num_samples, part_size)


def teacher(samples: np.ndarray) -> dict[str, torch.Tensor]:
    """Logits [n, 3], the classes of the largest two [n, 2], and one number a sample."""
    numbers = torch.from_numpy(samples).float()
    logits = torch.stack([numbers / 7, (numbers * 1.3).sin() * 100, -numbers.sqrt()], 1)
    return {"logits": logits, "classes": logits.topk(2).indices, "size": numbers}


class Counted:
    """The teacher, which notes the first sample of each batch it is given."""

    def __init__(self):
        self.calls = []

    def __call__(self, samples):
        self.calls.append(int(samples[0]))
        return teacher(samples)


def filled(folder: Path, compute=teacher, **options) -> TeacherCache:
    cache = make(folder, **options)
    cache.open(CPU)
    assert cache.fill(compute, 0, 1, lambda line: None)
    return cache


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part_*"))}


def refusal(folder: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        make(folder, **options).open(CPU)
    return str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An undisturbed cache; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    filled(folder)
    return folder


@pytest.fixture
def cache_copy(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def no_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# ---- what is read is what the teacher gave ----

@pytest.mark.parametrize("samples", [
    ALL, [22], [0, 0, 0], [5, 22, 3, 5, 4, 22, 0], np.random.default_rng(0).permutation(ALL),
], ids=str)
def test_any_samples_in_any_order_are_what_the_teacher_gives_rounded_to_fp16(whole, samples):
    cache = make(whole)
    assert cache.open(CPU) == 0
    samples = np.array(samples)
    read, given = cache.read(samples), teacher(samples)
    assert read.keys() == given.keys()
    for name in ("logits", "size"):
        assert read[name].dtype == torch.float16 and read[name].equal(given[name].half())
    assert read["classes"].dtype == torch.int32
    assert read["classes"].equal(given["classes"].int())


@pytest.mark.parametrize("num_samples", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("part_size", [1, 4, 1000])
def test_any_size_and_any_part_size(tmp_path, num_samples, part_size):
    size = {"num_samples": num_samples, "part_size": part_size}
    compute = Counted()
    filled(tmp_path / "deep" / "cache", compute, **size)
    assert compute.calls == list(range(0, num_samples, part_size))
    cache = make(tmp_path / "deep" / "cache", **size)
    assert cache.open(CPU) == 0 and cache.num_parts == len(compute.calls)
    samples = np.arange(num_samples)[::-1]
    assert cache.read(samples)["logits"].equal(teacher(samples.copy())["logits"].half())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16],
                         ids=str)
def test_numbers_beyond_fp16_are_its_largest_and_a_masked_class_stays_masked(tmp_path, dtype):
    wide = [-torch.inf, -1e38, -65520.0, 1e-8, 65504.0, 65519.0, 65520.0, 1e38]
    row = torch.tensor([wide[:1] + [-1.0, 1.0] if dtype == torch.float16 else wide], dtype=dtype)
    read = filled(tmp_path, lambda samples: {"a": row}, num_samples=1).read(np.array([0]))["a"]
    assert read[0, 0] == -torch.inf and read[0, 1:].isfinite().all()
    wanted = row[:, 1:].double().clamp(-65504, 65504).half()
    assert read[:, 1:].equal(wanted)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_output_that_is_not_finite_is_refused_with_its_sample(tmp_path, bad, dtype):
    def compute(samples):
        logits = torch.zeros(len(samples), 3, 2, dtype=dtype)
        logits[samples == 13, 1, 1] = bad
        return {"logits": logits}

    cache = make(tmp_path)
    cache.open(CPU)
    with pytest.raises(UserError, match="'logits' for sample 13 is not finite"):
        cache.fill(compute, 0, 1, lambda line: None)
    assert len(parts(tmp_path)) == 3 and make(tmp_path).open(CPU) == 3


def test_outputs_may_be_views_of_one_another_and_need_no_gradient(tmp_path):
    def compute(samples):
        table = torch.arange(40.0, requires_grad=True).reshape(10, 4).T
        whole = table.int().contiguous()
        return {"a": table, "b": table, "c": table[:, 1], "d": whole, "e": whole, "f": table.half(),
                "g": table.int()}

    read = filled(tmp_path, compute, num_samples=4).read(np.array([1, 0]))
    assert read["a"].equal(read["b"]) and read["a"].equal(read["f"])
    assert read["d"].equal(read["e"]) and read["d"].equal(read["g"])
    assert read["a"][0].tolist() == list(range(1, 40, 4)) == read["d"][0].tolist()
    assert read["c"].tolist() == [5, 4]


def test_outputs_of_changing_shape_are_refused(tmp_path):
    cache = make(tmp_path)
    cache.open(CPU)
    with pytest.raises(UserError, match="one shape for all samples, got .* from sample 4 on"):
        cache.fill(lambda samples: {"a": torch.zeros(len(samples), 1 + samples[0])}, 0, 1, print)
    for wrong in (torch.zeros(3), torch.tensor(0.0)):
        with pytest.raises(ValueError, match="4 samples come first, got "):
            cache.fill(lambda samples: {"a": wrong}, 0, 1, print)  # noqa: B023


# ---- whose folder it is ----

@pytest.mark.parametrize("change, named", [
    ({"teachers": "cd34"}, "teachers (ab12 there, cd34 here)"),
    ({"temperature": "4"}, "temperature (unset there, 4 here)"),
    ({"num_samples": 24}, "num_samples (23 there, 24 here)"),
    ({"part_size": 8, "data": "0"}, "data (77ff there, 0 here), part_size (4 there, 8 here)"),
], ids=str)
def test_other_outputs_are_refused_by_the_name_of_what_differs(whole, change, named):
    before = sorted(path.name for path in whole.iterdir())
    text = refusal(whole, **change)
    assert text == (f"distill.cache_dir: {whole} holds other outputs: {named}; choose another "
                    "--distill.cache_dir, or remove that folder")
    assert sorted(path.name for path in whole.iterdir()) == before


@pytest.mark.parametrize("name, content", [
    ("weights.bin", b"precious"), (".tmp_precious", b""), ("part_00000.safetensors", b""),
    ("cache.json", b""), ("cache.json", b"[1]"), ("cache.json", b"\xff\xfe"),
    ("cache.json", b"[" * 200_000), ("cache.json", pickle.dumps(IDENTITY)),
], ids=lambda value: repr(value)[:20])
def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert "holds files but no teacher outputs (cache.json)" in refusal(tmp_path)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == content


def test_what_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"{path} cannot be written (" in refusal(path)


def test_a_full_or_read_only_disk_is_refused_unless_nothing_is_missing(
    cache_copy, tmp_path, monkeypatch
):
    def fails(path, content):
        raise OSError(28, "No space left on device")

    cache = make(tmp_path / "new")
    cache.open(CPU)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_bytes", fails)
        assert make(cache_copy).open(CPU) == 0
        (cache_copy / "part_00001.safetensors").unlink()
        for folder in (cache_copy, tmp_path / "other"):
            assert f"{folder} cannot be written (No space left on device)" in refusal(folder)
        with pytest.raises(UserError, match="cannot be written .No space left"):
            cache.fill(teacher, 0, 1, lambda line: None)

    def breaks(samples):
        raise OSError("a broken image")

    with pytest.raises(OSError, match="a broken image"):  # is not the folder's fault
        cache.fill(breaks, 0, 1, lambda line: None)


# ---- damage ----

def replaced(**tensors):
    def act(path):
        save_file(load_file(path) | tensors, path)
    return act


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "header alone": lambda path: os.truncate(path, 40),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "another type": replaced(size=torch.zeros(4, dtype=torch.bfloat16)),
    "fp32": replaced(size=torch.zeros(4)),
    "too few samples": replaced(size=torch.zeros(3, dtype=torch.float16)),
    "no samples": replaced(size=torch.tensor(0, dtype=torch.float16)),
    "another shape": replaced(size=torch.zeros(4, 2, dtype=torch.float16)),
    "another output": replaced(more=torch.zeros(4, dtype=torch.float16)),
    "no output": lambda path: save_file({}, path),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(IDENTITY)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a broken link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_part_is_named_and_computed_again(whole, cache_copy, kind):
    # The outputs' shapes are learned from the first part that is whole.
    number = 2 if kind in ("another shape", "another output") else 0
    name = f"part_{number:05}.safetensors"
    DAMAGE[kind](cache_copy / name)
    cache, compute, lines = make(cache_copy), Counted(), []
    assert cache.open(CPU) == 1
    with pytest.raises(UserError, match=f"{name}: .*same folder"):
        cache.read(ALL)
    if kind == "a folder":
        with pytest.raises(UserError, match="cannot be written"):
            cache.fill(teacher, 0, 1, print)
        (cache_copy / name).rmdir()
    assert cache.fill(compute, 0, 1, lines.append) and compute.calls == [number * PART_SIZE]
    assert len(lines) == 2 and f"{name}: " in lines[0]
    assert lines[1] == "teacher outputs: 1 of 6 parts to compute"
    assert parts(cache_copy) == parts(whole)
    assert cache.read(ALL)["size"].equal(torch.arange(23.0).half())


def test_what_killed_writers_left_is_removed(cache_copy):
    (cache_copy / ".tmp_part_00001.safetensors.host.1").touch()
    (cache_copy / "part_00001.safetensors").unlink()
    make(cache_copy).open(CPU)
    assert not list(cache_copy.glob(".tmp_*"))


def test_runs_may_fill_one_folder_at_the_same_time(whole, tmp_path, monkeypatch):
    """One opens the folder while the other writes, whose file looks like a leftover."""
    first, second = make(tmp_path / "new"), make(tmp_path / "new")
    first.open(CPU)
    fsync, compute = os.fsync, Counted()

    def interrupted(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        assert second.open(CPU) == 6
        assert second.fill(teacher, 0, 1, lambda line: None)

    monkeypatch.setattr(os, "fsync", interrupted)
    assert first.fill(compute, 0, 1, lambda line: None)
    assert parts(tmp_path / "new") == parts(whole) and len(compute.calls) == 6


# ---- killed, stopped, on several processes ----

@pytest.mark.usefixtures("no_disk")
def test_killed_anywhere_the_next_fill_computes_what_is_missing_and_nothing_else(tmp_path):
    """Between parts, in the middle of writing one, and while the folder is being made."""
    size = {"num_samples": 7}
    undisturbed = parts(filled(tmp_path / "undisturbed", **size).folder)
    counts = []
    for point in itertools.count():
        folder = tmp_path / str(point)

        def act(halfway, folder=folder):
            def slow_teacher(samples):
                halfway()
                return teacher(samples)

            filled(folder, slow_teacher, **size)

        survived = survives(act, point)
        counts.append(len(parts(folder)))
        cache, compute = make(folder, **size), Counted()
        assert cache.open(CPU) == 2 - counts[-1]
        assert cache.fill(compute, 0, 1, lambda line: None)
        assert compute.calls == [0, 4][counts[-1]:]
        assert parts(folder) == undisturbed
        assert sorted(os.listdir(folder)) == ["cache.json", *undisturbed]
        if survived:
            break
    assert counts == sorted(counts) and set(counts) == {0, 1, 2} and len(counts) > 30


def on_processes(world_size: int, act, scratch: Path) -> list:
    """What ``act(rank)`` returns in each of some forked processes that can communicate."""
    children = []
    for rank in range(world_size):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
            child = os.fork()
        if not child:
            code = 1
            try:
                os.environ["RANK"] = str(rank)
                torch.distributed.init_process_group(
                    "gloo", f"file://{scratch}/store", rank=rank, world_size=world_size)
                (scratch / f"{rank}.json").write_text(json.dumps(act(rank)))
                torch.distributed.barrier()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * world_size
    (scratch / "store").unlink(missing_ok=True)
    return [json.loads((scratch / f"{rank}.json").read_text()) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_stopped_and_resumed_on_any_number_of_processes_the_bytes_are_the_same(
    whole, tmp_path, world_size
):
    folder = tmp_path / "cache"

    def act(rank, num_processes, rounds):
        cache, compute, asked = make(folder), Counted(), []

        def may_go_on():
            asked.append(rank)
            return len(asked) <= rounds

        missing = cache.open(CPU)
        if rank == num_processes - 1:
            time.sleep(0.1)  # the others must wait for what this one writes
        is_done = cache.fill(compute, rank, num_processes, lambda line: None, may_go_on)
        sizes = cache.read(ALL)["size"].tolist() if is_done else None
        return [missing, is_done, compute.calls, len(asked), sizes, cache.fill(
            compute, rank, num_processes, lambda line: None, lambda: is_done)]

    stopped = on_processes(2, lambda rank: act(rank, 2, 1), tmp_path)
    assert stopped == [[6, False, [0], 2, None, False], [6, False, [4], 2, None, False]]
    assert len(parts(folder)) == 2
    went_on = on_processes(world_size, lambda rank: act(rank, world_size, 100), tmp_path)
    rounds = -(-4 // world_size)
    for rank, result in enumerate(went_on):
        mine = [8, 12, 16, 20][rank::world_size]
        assert result == [4, True, mine, rounds, ALL.tolist(), True]
    assert parts(folder) == parts(whole)


def test_all_processes_refuse_what_the_first_refuses(whole, tmp_path):
    refused = on_processes(3, lambda rank: refusal(whole, teachers="cd34"), tmp_path)
    assert len(set(refused)) == 1 and "teachers (ab12 there, cd34 here)" in refused[0]


def test_a_process_killed_beside_others_loses_its_part_alone(whole, tmp_path):
    def act(rank):
        def compute(samples):
            if samples[0] == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            return teacher(samples)

        cache = make(tmp_path / "cache")
        cache.open(CPU)
        cache.fill(compute, rank, 2, lambda line: None)

    with pytest.raises((AssertionError, FileNotFoundError)):
        on_processes(2, act, tmp_path)
    assert sorted(parts(tmp_path / "cache"))[:3] == [f"part_{n:05}.safetensors" for n in (0, 1, 2)]
    (tmp_path / "store").unlink(missing_ok=True)
    compute = Counted()
    filled(tmp_path / "cache", compute)
    assert 12 in compute.calls and parts(tmp_path / "cache") == parts(whole)


# ---- cost ----

def test_opening_and_reading_load_only_what_is_asked_for(tmp_path):
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("resident memory is read from /proc")

    def resident_mib(kind):
        return int(status.read_text().split(f"{kind}:")[1].split()[0]) // 1024

    num_samples, part_size, classes = 2**17, 2**13, 1024
    make(tmp_path, num_samples, part_size).open(CPU)
    size = part_size * classes * 2
    for number in range(num_samples // part_size):  # holes: 256 MiB that take no room on the disk
        header = json.dumps({"a": {"dtype": "F16", "shape": [part_size, classes],
                                   "data_offsets": [0, size]}}).encode()
        path = tmp_path / f"part_{number:05}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + size)
    samples = np.random.default_rng(0).integers(0, num_samples, 64)
    before = resident_mib("RssAnon"), resident_mib("VmRSS")
    descriptors = len(os.listdir("/proc/self/fd"))
    cache = make(tmp_path, num_samples, part_size)
    assert cache.open(CPU) == 0
    assert cache.read(samples)["a"].shape == (64, classes)
    assert resident_mib("RssAnon") - before[0] < 16  # memory that is not the system's cache
    assert resident_mib("VmRSS") - before[1] < 200  # a page may come with up to 2 MiB around it
    assert len(os.listdir("/proc/self/fd")) == descriptors
