"""train.py --dry_run: what it says is what runs, and nothing is written."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import load, recipes, train
from warm import fork

from train import TrainOptions
from trainlib import config, models, plan, preflight
from trainlib.runtime.lock import RunLock

# A process of its own mind: the last words differ by rank.
MINDS = """import os, runpy, sys
import accelerate
if os.environ["RANK"] == "1":
    {mind}
sys.path.insert(0, {root!r})
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""
ROOT = str(Path(__file__).resolve().parent.parent)


def dry_run(run: Path, *flags: str, processes: int = 1, script: str = "train.py"):
    return fork(["--dry_run", "--run_dir", str(run), *flags], processes, script)


def size(number: int) -> str:
    return f"{number / 2**20:.2f} MiB"


@pytest.mark.parametrize("processes", [1, 3])
def test_it_says_what_would_run_and_writes_nothing(tmp_path, processes):
    flags = ["--batch.global_size", "80", "--batch.micro_size", "16", "--loop.duration", "2 epochs",
             "--optim.ema_half_life", "5 steps"]
    result = dry_run(tmp_path / "a" / "run", *flags, processes=processes)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    lines = dict(re.findall(r"^(\w[\w ]*?)  +(.*)$", result.stdout, re.MULTILINE))
    assert lines["processes"] == f"{processes}, on 1 machine"
    assert lines["backend"] == ("none, one process" if processes == 1 else "gloo")
    own = len(plan.assign(80, 16, 0, processes))
    assert lines["batch"].endswith(f"in 5 micro-batches of 16, {own} on each process")
    num_samples = len(load().train)
    assert lines["steps"] == str(-(-2 * num_samples // 80))
    assert lines["run folder"] == str(tmp_path / "a" / "run")
    assert f"torch {torch.__version__}" in lines["versions"]
    # Closed form: fp32 weights and gradients, AdamW's two moments and a count for each parameter.
    module = models.build_model(models.complete(models.ModelOptions(), (1, 8, 8), 10))
    numbers, count = sum(p.numel() for p in module.parameters()), len(list(module.parameters()))
    wanted = {"parameters": 4 * numbers, "gradients": 4 * numbers, "averaged weights": 4 * numbers,
              "optimizer state": 8 * numbers + 4 * count, "exact sum": 8 * numbers}
    wanted |= {"DDP's buckets": 4 * numbers} if processes > 1 else {}
    for name, number in wanted.items():
        assert f"{name} {size(number)}" in lines["memory"], name
    assert ("DDP" in lines["memory"]) == (processes > 1)
    assert "not counted: activations" in result.stdout


@pytest.mark.parametrize("flags, slots", [
    (["--optim.name", "sgd", "--batch.exact_sum", "false"], 0),
    (["--optim.name", "sgd", "--optim.args.momentum", "0.9", "--batch.micro_size", "64"], 1),
])
def test_the_state_is_that_of_the_optimizer(tmp_path, flags, slots):
    result = dry_run(tmp_path / "run", *flags)
    [memory] = [line for line in result.stdout.splitlines() if line.startswith("memory")]
    assert "exact sum" not in memory and ("optimizer state" in memory) == (slots == 1)
    if slots:
        parts = dict(re.findall(r"(parameters|optimizer state) ([\d.]+ MiB)", memory))
        assert parts["parameters"] == parts["optimizer state"]


def test_versions_that_differ_are_named(tmp_path):
    script = tmp_path / "minds.py"
    script.write_text(MINDS.format(mind='accelerate.__version__ = "9.9"', root=ROOT))
    result = dry_run(tmp_path / "run", processes=2, script=str(script))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search(r"accelerate differs between processes: 1\.\S+ on process 0 \(.*\), 9.9 on "
                     r"process 1 \(", result.stderr), result.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_not_all_see_is_named(tmp_path):
    script, other = tmp_path / "minds.py", tmp_path / "elsewhere"
    other.mkdir()
    script.write_text("import os\nos.chdir(os.path.dirname(__file__))\n"
                      + MINDS.format(mind=f"os.chdir({str(other)!r})", root=ROOT))
    result = dry_run(Path("run"), processes=2, script=str(script))
    assert result.returncode == 2
    assert (f"run_dir: on process 1 {other} is not the folder that process 0 writes to"
            in result.stderr)
    assert {file.name for file in tmp_path.rglob("*")} == {"minds.py", "elsewhere"}


def test_a_run_folder_that_cannot_be_written_is_named():
    result = dry_run(Path("/proc/no/run"), processes=2)
    assert result.returncode == 2
    assert "run_dir: on processes 0 to 1 /proc cannot be written" in result.stderr


def test_a_run_folder_with_files_stays_as_it_is(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    result = dry_run(tmp_path)
    assert result.returncode == 2 and "holds files but no run" in result.stderr
    assert os.listdir(tmp_path) == ["thesis.txt"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_that_the_run_would_refuse_is_refused_in_the_same_words(tmp_path):
    run = train(tmp_path / "run", "--loop.duration", "3 steps")
    flags, before = ["--loop.duration", "3 steps", "--optim.lr", "0.5"], contents(run)
    planned, real = dry_run(run, *flags), fork(["--run_dir", str(run), *flags])
    assert planned.returncode == real.returncode == 2
    assert "holds the run of another recipe: optim.lr" in planned.stderr
    assert planned.stderr == real.stderr
    assert dry_run(run, "--loop.duration", "6 steps", processes=2).returncode == 0
    assert contents(run) == before


def test_a_folder_in_use_is_refused_and_stays_locked(tmp_path):
    lock = RunLock(tmp_path / "run.lock", False, print)
    try:
        before = contents(tmp_path)
        result = dry_run(tmp_path)
        assert result.returncode == 2 and f"{tmp_path} is in use" in result.stderr
        assert dry_run(tmp_path, "--checkpoint.steal_lock").returncode == 0
        assert contents(tmp_path) == before
    finally:
        lock.release()


@pytest.mark.parametrize("mind, words", [
    ('sys.argv += ["--optim.lr", "0.5"]', "the processes were given different options"),
    (f'sys.path.insert(0, {ROOT!r}); from trainlib import data; data.fingerprint = str',
     "the processes see different data"),
], ids=["options", "data"])
def test_processes_that_differ_are_refused(tmp_path, mind, words):
    script = tmp_path / "minds.py"
    script.write_text(MINDS.format(mind=mind, root=ROOT))
    result = dry_run(tmp_path / "run", processes=2, script=str(script))
    assert result.returncode == 2 and words in result.stderr, result.stderr
    assert not (tmp_path / "run").exists()


def test_a_signal_leaves_nothing(tmp_path):
    script = tmp_path / "signalled.py"
    script.write_text(f"""import os, runpy, signal, sys
sys.path.insert(0, {ROOT!r})
from trainlib import data
data.load = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
runpy.run_path({ROOT!r} + "/train.py", run_name="__main__")
""")
    assert dry_run(tmp_path / "run", script=str(script)).returncode == 75
    assert os.listdir(tmp_path) == ["signalled.py"]


def test_mistakes_in_options_are_found_as_in_a_run(tmp_path):
    result = dry_run(tmp_path / "run", "--model.args.classes", "5")
    assert result.returncode == 2 and "task 'digit' needs" in result.stderr


def test_it_is_no_part_of_a_recipe():
    options = config.read(TrainOptions, ["--dry_run", "--recipe", str(recipes()[0])], "")
    assert options.dry_run and "dry_run" not in config.to_yaml(options)


def test_what_does_not_fit_is_said():
    small, large = {"device_bytes": 100}, {"device_bytes": None}
    fits, is_full = {"parameters": 100}, {"parameters": 101}
    assert preflight._misfits([small, large], [fits, is_full]) == []
    assert "process 0," in preflight._misfits([small, large], [is_full, is_full])[0]
    assert "processes 0, 2," in preflight._misfits([large] * 3, [{}, fits, {}])[0]


def test_one_process_without_room_for_gradients_does_not_hold_up_the_others(tmp_path):
    script = tmp_path / "minds.py"
    mind = """import torch
    def full(*_, **__): raise torch.OutOfMemoryError("full")
    torch.zeros_like = full"""
    script.write_text(MINDS.format(mind=mind, root=ROOT))
    result = dry_run(tmp_path / "run", processes=2, script=str(script))
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "model: it does not fit on the device of process 1," in result.stderr


def test_offloaded_parts_are_not_held_against_the_memory_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "small")
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda _: SimpleNamespace(total_memory=100))
    gpu = SimpleNamespace(device=torch.device("cuda"), mixed_precision="no")
    memory = {"parameters": 101}
    for is_offloaded in (False, True):
        world = [preflight._describe_process(gpu, is_offloaded)]
        assert bool(preflight._misfits(world, [memory])) != is_offloaded
        words = preflight._memory_lines(memory, is_offloaded)[0]
        assert ("in host memory" in words) == is_offloaded
