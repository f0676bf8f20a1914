"""Nothing lost: killed, signalled or damaged, a run goes on to the same bits."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import ROOT, assert_same_run, launch, records, train
from warm import fork

LENGTH = ["--loop.duration", "60 steps", "--loop.eval_every", "7 steps", "--log.every", "1",
          "--checkpoint.every", "11 steps", "--log.trackers", "[]"]
DIGITS = ["--batch.micro_size", "16"]
CONVOLUTION = ["--model.name", "resnet", "--model.args.width", "8", *DIGITS]
GPT = ["--data.source", "builtin:pydocs", "--data.tokenizer", "bytes", "--data.block_size", "32",
       "--tasks.text.kind", "language_modeling", "--model.name", "gpt", "--model.args.width", "16",
       "--model.args.depth", "1", "--model.args.heads", "2", "--batch.global_size", "8",
       "--batch.micro_size", "4", "--batch.eval_size", "2048"]


def struck(folder: Path, strike: str, *flags: str, processes: int = 1) -> dict:
    """A run that is struck as tests/struck_train.py says, and its exit.json, if it wrote one."""
    # Of several that stop by a signal, a fork's fellows would be killed with the first that ends.
    run = fork if strike.startswith("SIGKILL") or processes == 1 else launch
    result = run(["--run_dir", str(folder), *LENGTH, *flags], processes,
                 script="tests/struck_train.py", STRIKE=strike)
    assert folder.with_name(f"{folder.name}.struck").exists(), result.stdout + result.stderr
    file = folder / "exit.json"
    return json.loads(file.read_text()) if file.exists() else {"output": result.stderr}


def steps_of(folder: Path) -> list[int]:
    """The steps of the checkpoints that stand in a run folder."""
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*"))


def processes_of(folder: Path) -> list[str]:
    """The command lines of living processes that name a run folder, data workers included."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if str(folder) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(" ".join(words))
    return found


JOBS = {
    "shuffle and dropout": (DIGITS, 31),
    "augmentation, mixup and two workers": (
        [*CONVOLUTION, "--data.in_memory", "false", "--data.workers", "2",
         "--data.augment.crop", "1", "--data.augment.mixup", "0.2"], 24),
    "accumulation, batch norm, ema": ([*CONVOLUTION, "--optim.ema_half_life", "5 steps"], 45),
    "plateau": ([*DIGITS, "--schedule.name", "plateau", "--schedule.args.patience", "0",
                 "--schedule.args.factor", "0.5", "--optim.lr", "0.05"], 40),
    "channels last": ([*DIGITS, "--model.name", "resnet", "--model.channels_last", "true"], 30),
    "sgd without momentum": ([*DIGITS, "--optim.name", "sgd", "--optim.lr", "0.1"], 37),
    "muon": ([*DIGITS, "--optim.name", "muon"], 52),
    "language model": (GPT, 29),
}


@pytest.mark.parametrize("job", JOBS)
def test_killed_at_a_step_it_goes_on_to_the_same_bits(tmp_path, job):
    flags, step = JOBS[job]
    struck(tmp_path / "killed", f"SIGKILL step {step}", *flags)
    assert step - max(steps_of(tmp_path / "killed")) < 22  # the last one may have been on its way
    assert records(tmp_path / "killed")[-1]["step"] == step
    resumed = train(tmp_path / "killed", *LENGTH, *flags)
    assert_same_run(resumed, train(tmp_path / "undisturbed", *LENGTH, *flags))
    best = [json.loads((tmp_path / run / "best" / "evaluation.json").read_text())
            for run in ("killed", "undisturbed")]
    assert best[0] == best[1]
    assert not [path for path in resumed.rglob(".tmp_*")]
    assert steps_of(resumed) == [55, 60] and not (resumed / "run.lock").exists()


def test_many_kills_in_one_run_change_nothing(tmp_path):
    """Before the first checkpoint, in the writing of one, where an epoch ends, after the end."""
    run, epoch = tmp_path / "killed", -(-1437 // 64)
    for point in ("text 0", "start", "text 1", "step 3", "save 20", f"step {epoch}", "save 7",
                  "save 4", "evaluation 5", "final"):
        assert "output" in struck(run, f"SIGKILL {point}", *DIGITS)
    assert steps_of(run)[-1] >= 55 and not (run / "final").exists()
    resumed = train(run, *LENGTH, *DIGITS)
    assert_same_run(resumed, train(tmp_path / "undisturbed", *LENGTH, *DIGITS))
    assert not list(run.rglob(".tmp_*"))


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    flags = [*CONVOLUTION, "--optim.ema_half_life", "5 steps"]
    reference = train(tmp_path / "reference", *LENGTH, *flags)
    for before, after in ((2, 1), (1, 2), (3, 2)):
        run = tmp_path / f"{before} to {after}"
        struck(run, "SIGKILL step 40", *flags, processes=before)
        assert steps_of(run)
        assert_same_run(train(run, *LENGTH, *flags, processes=after), reference)


STRIKES = [
    ("SIGTERM step 30", 1), ("SIGUSR1 step 30 rank 1", 2), ("SIGINT evaluation 5", 1),
    ("SIGTERM evaluation 3 rank 1", 2), ("SIGUSR2 write 1", 1), ("SIGINT write 1 rank 0", 2),
    ("SIGUSR1 start", 1), ("SIGTERM start rank 1", 2), ("SIGINT final", 1),
]


WORKERS = [*DIGITS, "--batch.eval_size", "64", "--data.in_memory", "false", "--data.workers", "1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("undisturbed") / "run", *LENGTH, *WORKERS)


@pytest.mark.parametrize("strike, processes", STRIKES, ids=[strike for strike, _ in STRIKES])
def test_a_signal_stops_all_processes_and_loses_no_step(tmp_path, undisturbed, strike, processes):
    run = tmp_path / "run"
    record = struck(run, strike, *WORKERS, processes=processes)
    struck_at = float((tmp_path / "run.struck").read_text())
    assert time.time() - struck_at < 10 and not processes_of(run)
    name = strike.split()[0]
    if "start" in strike:
        assert record.pop("time") and record == {
            "code": 75, "reason": f"{name} during start-up", "step": 0}
        assert [file.name for file in run.iterdir()] == ["exit.json"]
    else:
        assert record["code"] == 75 and "run the same command again" in record["reason"]
        assert steps_of(run)[-1] == record["step"] > 0
        assert records(run)[-1]["step"] == record["step"]
        # Where the run was over already, the pass for its report is what is missing.
        assert (run / "final").exists() == strike.endswith("final")
        assert not (run / "report.html").exists() and not (run / "run.lock").exists()
    assert_same_run(train(run, *LENGTH, *WORKERS), undisturbed)


def test_a_signal_to_all_processes_does_not_take_the_data_workers(tmp_path, undisturbed):
    assert struck(tmp_path / "run", "SIGTERM worker", *WORKERS)["code"] == 0
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_signal_at_the_start_of_a_run_that_was_killed_before_leaves_word(tmp_path):
    run = tmp_path / "run"
    assert "output" in struck(run, "SIGKILL step 13", *DIGITS)
    assert (run / "run.lock").exists()
    assert struck(run, "SIGTERM start", *DIGITS)["code"] == 75


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was stopped at step 40, with two checkpoints."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    assert struck(run, "SIGTERM step 39", *DIGITS)["step"] == 40
    assert steps_of(run) == [33, 40]
    return run


def test_what_is_damaged_is_named_and_the_one_before_it_taken(stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    file = run / "checkpoints" / "step_00000040" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    result = fork(["--run_dir", str(run), *LENGTH, *DIGITS])
    assert result.returncode == 0
    assert ("checkpoints/step_00000040 is damaged and left out: optimizer.safetensors: sha256 "
            "differs") in result.stdout
    assert "resumed at step 33 of 60" in result.stdout
    assert_same_run(run, train(tmp_path / "undisturbed", *LENGTH, *DIGITS))
    assert steps_of(run) == [55, 60]


def test_if_all_are_damaged_nothing_is_overwritten(stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "checkpoints" / "step_00000040" / "state.json").write_text("")
    (run / "checkpoints" / "step_00000033" / "model.safetensors").unlink()
    before = files_of(run)
    result = fork(["--run_dir", str(run), *LENGTH, *DIGITS])
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "step_00000040 is damaged and left out: state.json: 0 bytes" in result.stderr
    assert "step_00000033 is damaged and left out: model.safetensors: missing" in result.stderr
    assert "a fresh start would overwrite what is left" in result.stderr
    assert json.loads((run / "exit.json").read_text())["code"] == 2
    assert files_of(run) | {"exit.json": b""} == before | {"exit.json": b""}


@pytest.mark.parametrize("flags, message", [
    (["--seed", "1"], "seed (0 there, 1 here)"),
    (["--batch.global_size", "32"], "batch.global_size (64 there, 32 here)"),
    (["--batch.micro_size", "32"], "batch.micro_size (16 there, 32 here)"),
    (["--model.args.hidden", "[64]"], "model.args.hidden"),
    (["--optim.lr", "1"], "optim.lr"),
    (["--loop.duration", "39 steps"], "the run stands at step 40 and would end at step 39"),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_another_run_is_refused_by_the_option_that_differs(stopped, tmp_path, flags, message):
    run = shutil.copytree(stopped, tmp_path / "run")
    before = files_of(run)
    result = fork(["--run_dir", str(run), *LENGTH, *DIGITS, *flags])
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert files_of(run) | {"exit.json": b""} == before | {"exit.json": b""}


def test_a_longer_run_goes_on_from_the_end_and_says_so(tmp_path):
    run = train(tmp_path / "run", *LENGTH, *DIGITS)
    again = fork(["--run_dir", str(run), *LENGTH, *DIGITS])
    assert again.returncode == 0 and "this run has finished" in again.stdout
    longer = fork(["--run_dir", str(run), *LENGTH, *DIGITS, "--loop.duration", "80 steps"])
    assert "goes on with another length: loop.duration (60 steps there, 80 steps here)" in (
        longer.stdout)
    assert "resumed at step 60 of 80" in longer.stdout
    ended = json.loads((run / "exit.json").read_text())
    assert ended.pop("time") and ended == {"code": 0, "reason": "finished", "step": 80}
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 60]
    assert [r["step"] for r in records(run) if "train/loss" in r] == list(range(1, 81))


def test_a_second_run_on_the_same_folder_is_refused(tmp_path):
    command = [sys.executable, "train.py", "--run_dir", str(tmp_path / "run"), *LENGTH, *DIGITS,
               "--loop.duration", "100000 steps"]
    started = [first := subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)]
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.1)
        lock = json.loads((tmp_path / "run" / "run.lock").read_text())
        assert lock["pid"] == first.pid
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert second.returncode == 2 and f"in use by pid {first.pid}" in second.stderr
        assert first.poll() is None
        # The impatient take it: the first then ends by itself, and writes nothing more.
        stolen = subprocess.Popen([*command, "--checkpoint.steal_lock"], cwd=ROOT,
                                  stdout=subprocess.PIPE, text=True)
        started.append(stolen)
        assert first.wait(60) == 2
        written = len(records(tmp_path / "run"))
        while len(records(tmp_path / "run")) <= written:
            assert stolen.poll() is None
            time.sleep(0.1)
        stolen.send_signal(signal.SIGTERM)
        output, _ = stolen.communicate(timeout=60)
        assert stolen.returncode == 75 and "as --checkpoint.steal_lock asks" in output
        assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 75
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_processes_that_were_given_different_jobs_do_not_train(tmp_path):
    result = launch(["--run_dir", str(tmp_path / "run"), *LENGTH], 2, script="tests/two_minds.py")
    assert "the processes were given different options" in result.stderr
    source = tmp_path / "rows.py"
    source.write_text(
        "import os, datasets\n"
        "def rows():\n"
        "    last = 40 + int(os.environ.get('RANK', 0))\n"
        "    return datasets.Dataset.from_dict({'x': [float(i) for i in range(last)],\n"
        "                                       'y': [i % 2 for i in range(last)]})\n"
    )
    result = launch(["--run_dir", str(tmp_path / "run"), "--data.source", f"{source}:rows",
                     "--tasks.y.target", "y", *LENGTH], 2)
    assert "data.source: the processes see different data" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_terminal_that_goes_away_does_not_end_the_run(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "train.py", "--run_dir", str(run), *LENGTH, *DIGITS]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
    assert process.returncode == 0
    assert f"\nin {run}: best/, final/" in (run / "log.txt").read_text()
    assert_same_run(run, train(tmp_path / "undisturbed", *LENGTH, *DIGITS))


def test_a_final_save_that_fails_ends_with_code_4(stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("in the way")
    result = fork(["--run_dir", str(run), *LENGTH, *DIGITS])
    assert result.returncode == 4 and "Traceback" not in result.stderr
    assert result.stdout.count("not written: checkpoints/step_") == 6  # and training went on
    assert json.loads((run / "exit.json").read_text())["code"] == 4
    assert (run / "final" / "model.safetensors").exists()


def test_checkpoints_by_the_clock_are_agreed_by_all_processes(tmp_path):
    flags = ["--checkpoint.every", "0.0001 minutes", "--checkpoint.keep", "100"]  # 6 ms
    run = train(tmp_path / "run", *LENGTH, *DIGITS, *flags, processes=2)
    assert len(steps_of(run)) >= 3 and steps_of(run)[-1] == 60
    assert_same_run(run, train(tmp_path / "undisturbed", *LENGTH, *DIGITS))
