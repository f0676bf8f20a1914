"""Hangs: noticed, written down, ended with code 5 and gone on from; and what is none."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from launching import ROOT, assert_same_run, train
from warm import fork

from trainlib import pace
from trainlib.config import UserError, read
from trainlib.runtime.watchdog import CommunicationOptions, Hang, Watchdog, as_hang, watch

QUIET = ["--loop.duration", "60 steps", "--loop.eval_every", "20 steps", "--log.every", "1",
         "--checkpoint.every", "11 steps", "--log.trackers", "[]", "--log.report", "false",
         "--batch.micro_size", "16"]
SOON = ["--comm.hang_after", "1.5 seconds"]
FROM_DISK = ["--data.in_memory", "false", "--data.workers", "1"]


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


LONG = 1.25 * 1800  # of a collective: a quarter later than the watchdog


def watchdog(**options) -> tuple[Watchdog, Clock, list[float | None]]:
    """One without a thread, of 300 s and 1800 s, its clock, and the timeouts that it has set."""
    clock, timeouts = Clock(), []
    given = {"hang_after_seconds": 300, "start_timeout_seconds": 1800} | options
    watched = Watchdog(**given, on_hang=lambda *_: None, set_timeout=timeouts.append, clock=clock)
    return watched, clock, timeouts


def take_steps(watched: Watchdog, clock: Clock, number: int, seconds: float) -> None:
    for _ in range(number):
        watched.begin("step")
        clock.seconds += seconds


def seconds_until_hang(watched: Watchdog, every_seconds: float = 10) -> float:
    waited = 0.0
    while not watched.look(every_seconds):
        waited += every_seconds
        assert waited < 1e6
    return waited


def test_a_step_may_last_so_long_as_the_option_says_or_twenty_times_the_median():
    watched, clock, _ = watchdog()
    take_steps(watched, clock, 100, 1.0)
    watched.begin("step")
    assert watched.budget_seconds() == 300
    assert 300 <= seconds_until_hang(watched) <= 320
    take_steps(watched, clock, 33, 100.0)  # more than half of the last 64
    watched.begin("step")
    assert watched.budget_seconds() == 2000
    take_steps(watched, clock, 40, 1.0)
    watched.begin("step")
    assert watched.budget_seconds() == 300


def test_the_first_step_has_the_time_of_the_start_and_says_nothing_about_the_others():
    watched, clock, timeouts = watchdog()
    watched.begin("evaluation")
    watched.begin("step")
    assert watched.budget_seconds() == 1800 and timeouts == [LONG, LONG]
    clock.seconds += 1000
    watched.begin("step")
    assert watched.budget_seconds() == 300 and timeouts == [LONG, LONG, None]
    clock.seconds += 1
    watched.begin("step")
    assert watched.budget_seconds() == 300 and watched.num_steps == 2


def test_a_step_after_something_else_may_wait_for_the_main_process():
    watched, clock, timeouts = watchdog()
    take_steps(watched, clock, 3, 1.0)
    watched.begin("save")
    watched.begin("step")
    assert watched.budget_seconds() == 1800 and timeouts == [LONG, None, LONG, LONG]
    clock.seconds += 1000
    watched.begin("step")
    assert watched.budget_seconds() == 300 and timeouts[-1] is None


def test_evaluations_and_saves_have_budgets_of_their_own_kind():
    watched, clock, timeouts = watchdog()
    take_steps(watched, clock, 3, 1.0)
    for phase, seconds in (("evaluation", 600), ("save", 5), ("evaluation", 1), ("end", 0)):
        watched.begin(phase)
        clock.seconds += seconds
    assert watched.budget_seconds() == 20 * 600  # the end evaluates, too
    assert timeouts == [LONG, None, LONG, LONG, 25 * 600, 25 * 600]
    watched.begin("evaluation")
    assert watched.budget_seconds() == 20 * 600
    watched.begin("save")
    assert watched.budget_seconds() == 1800


def test_time_in_which_the_process_itself_was_stopped_does_not_count():
    watched, clock, _ = watchdog()
    take_steps(watched, clock, 3, 1.0)
    assert not watched.look(15)
    for _ in range(5):
        assert not watched.look(100_000)  # each counts as twice 15 s
    assert 150 <= seconds_until_hang(watched, 15) <= 180


def test_what_moves_on_is_never_a_hang():
    watched, clock, _ = watchdog()
    for _ in range(100):
        take_steps(watched, clock, 1, 1.0)
        assert not any(watched.look(29) for _ in range(10))


def test_only_a_wait_in_vain_is_a_hang():
    timed_out = RuntimeError("[unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation "
                             "to complete")
    hang = as_hang(timed_out)
    assert isinstance(hang, Hang) and hang.exit_code == 5
    assert "waited for the others in vain" in str(hang)
    died = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:7553.")
    assert as_hang(died) is died and as_hang(error := ValueError(str(timed_out))) is error


@pytest.mark.parametrize("value", [
    "5", "10 steps", "1 epoch", "0 seconds", "-1 minutes", "5%", "0.9 seconds"])
def test_only_times_by_the_clock_are_taken(value):
    with pytest.raises(UserError, match="30 seconds"):
        read(CommunicationOptions, ["--hang_after", value], "")


def hang(folder: Path, fault: str, *flags: str, processes: int = 1, **environment) -> dict:
    """A run that hangs as tests/hung_train.py says, and its exit.json."""
    result = fork(["--run_dir", str(folder), *QUIET, *flags], processes,
                  script="tests/hung_train.py", FAULT=fault, **environment)
    assert result.returncode == 5 and "Traceback" not in result.stderr, result.stderr
    return json.loads((folder / "exit.json").read_text()) | {"said": result.stderr}


def processes_of(folder: Path) -> list[int]:
    """Living processes that have a file of the folder, or its name among their words."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE:
            if any(str(folder) in word for word in process.info["cmdline"] or []):
                found.append(process.pid)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("undisturbed") / "run", *QUIET)


def test_a_process_that_hangs_says_where_and_ends_with_code_5(tmp_path, undisturbed):
    run = tmp_path / "run"
    before = set(psutil.pids())
    record = hang(run, "hang step 30", *SOON, *FROM_DISK)
    workers = [pid for pid in set(psutil.pids()) - before if _is_worker(pid)]
    assert not workers, workers
    assert record["code"] == 5 and record["step"] == 30
    assert "step 30 has not ended" in record["reason"]
    assert f"{run}/hang.rank0.txt" in record["said"] and "leaving at once" in record["said"]
    stacks = (run / "hang.rank0.txt").read_text()
    assert socket.gethostname() in stacks and "process 0" in stacks and "step 30" in stacks
    assert "stand_still_for_ever" in stacks and "in train_step" in stacks
    assert_same_run(train(run, *QUIET), undisturbed)
    assert (run / "hang.rank0.txt").read_text() == stacks  # a restart keeps what was seen


def _is_worker(pid: int) -> bool:
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.ppid() == 1
    except psutil.Error:
        return False


def test_who_waits_for_a_process_that_is_stopped_ends_with_code_5(tmp_path, undisturbed):
    run = tmp_path / "run"
    result = fork(["--run_dir", str(run), *QUIET, *SOON], 2, "tests/struck_train.py",
                  STRIKE="SIGSTOP step 30 rank 1")
    assert result.returncode == 5 and "Traceback" not in result.stderr, result.stderr
    assert json.loads((run / "exit.json").read_text())["code"] == 5
    assert [file.name for file in run.glob("hang.*")] == ["hang.rank0.txt"]
    assert "all_reduce" in (run / "hang.rank0.txt").read_text()
    assert_same_run(train(run, *QUIET), undisturbed)


def test_a_collective_that_times_out_ends_with_code_5(tmp_path):
    """Long until the first step has ended, then short; without a watchdog's help."""
    run = tmp_path / "run"
    record = hang(run, "hang step 30 rank 1", "--comm.step_timeout", "1 second", processes=2)
    assert record["code"] == 5 and "waited for the others in vain" in record["reason"]
    assert "Timed out waiting 1000ms" in record["said"] and not list(run.glob("hang.*"))
    record = hang(tmp_path / "first", "hang step 0 rank 1", "--comm.start_timeout", "3 seconds",
                  "--comm.step_timeout", "1 second", processes=2)
    assert record["step"] == 0
    # Either net may be the first: both have the time of the start.
    assert "3000ms" in record["said"] or "has not ended for 3 s" in record["said"]


def test_torchrun_starts_a_run_that_hung_again_and_it_goes_on(tmp_path, undisturbed):
    run = tmp_path / "run"
    started = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", "2",
         "--max_restarts", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0",
         "tests/hung_train.py", "--run_dir", str(run), *QUIET, *SOON],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
        env=os.environ | {"FAULT": "hang step 30 rank 1", "ACCELERATE_USE_CPU": "true",
                          "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )
    assert json.loads((run / "exit.json").read_text())["code"] == 0, started.stderr
    assert "has not ended for" in started.stderr
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert len(starts) == 2 and starts[1]["step"] > 0
    assert_same_run(run, undisturbed)
    assert not processes_of(run)


@pytest.mark.parametrize("fault", ["evaluation 2.5 rank 1", "save 2.5 rank 0"])
def test_a_long_evaluation_or_save_is_no_hang(tmp_path, fault):
    """Nor is it one to wait for the main process, which alone writes and logs."""
    run = tmp_path / "run"
    rare = ["--checkpoint.every", "60 steps", "--loop.eval_every", "60 steps"]
    rare[1 if "save" in fault else 3] = "40 steps"
    flags = [*QUIET, *rare, "--comm.step_timeout", "1 second"]
    result = fork(["--run_dir", str(run), *flags, *SOON], 2, "tests/hung_train.py",
                  FAULT=fault)
    assert json.loads((run / "exit.json").read_text())["code"] == 0, result.stderr
    assert not list(run.glob("hang.*"))


@pytest.mark.parametrize("script", ["train", "lr_find"])
def test_a_hang_in_a_sweep_is_noticed(tmp_path, script):
    run = tmp_path / "run"
    flags = ["--optim.lr", "auto"] if script == "train" else []
    result = fork(["--run_dir", str(run), *QUIET, *flags, "--comm.hang_after", "1 second"], 1,
                  "tests/hung_train.py", FAULT="hang step 30", SCRIPT=script)
    assert result.returncode == 5 and "step 30" in result.stderr, result.stderr
    # A sweep alone has no folder before its end.
    stacks = (run / "hang.rank0.txt").read_text() if script == "train" else result.stderr
    assert "stand_still_for_ever" in stacks and "in loss_at" in stacks


def test_a_debugger_may_stand_still_for_long(tmp_path):
    options = read(CommunicationOptions, ["--hang_after", "null"], "")
    assert options.hang_after is None
    threads = {thread.name for thread in threading.enumerate()}
    folder = SimpleNamespace(path=tmp_path, step=0)
    watch(folder, options, SimpleNamespace(num_processes=1, process_index=0))
    assert {thread.name for thread in threading.enumerate()} == threads
    watch(folder, CommunicationOptions(), SimpleNamespace(num_processes=1, process_index=0))
    assert "watchdog" in {thread.name for thread in threading.enumerate()}
    folder.watchdog.stop()


def test_a_process_that_was_stopped_and_continued_goes_on(tmp_path, undisturbed):
    run = tmp_path / "run"
    started = subprocess.Popen(
        [sys.executable, "tests/hung_train.py", "--run_dir", str(run), *QUIET, *SOON], cwd=ROOT,
        env=os.environ | {"FAULT": "stop step 30"}, stderr=subprocess.PIPE, text=True,
    )
    try:
        while psutil.Process(started.pid).status() != psutil.STATUS_STOPPED:
            assert started.poll() is None, started.stderr.read()
            time.sleep(0.05)
        time.sleep(2)
        started.send_signal(signal.SIGCONT)
        said = started.communicate(timeout=60)[1]
    finally:
        started.kill()
    assert started.returncode == 0, said
    assert_same_run(run, undisturbed)


def test_a_slow_process_is_named_with_its_host(tmp_path, undisturbed):
    run = tmp_path / "run"
    result = fork(["--run_dir", str(run), *QUIET], 2, "tests/hung_train.py",
                  FAULT="slow 0.05 rank 1")
    log = (run / "log.txt").read_text()
    lines = [line for line in log.splitlines() if "is slow" in line]
    assert len(lines) == 1, result.stdout  # in three windows
    assert f"process 1 on {socket.gethostname()} is slow" in lines[0]
    assert_same_run(run, undisturbed)


def compared(windows: list[list[float]], factor: float = 1.5) -> list[list[str]]:
    """What the main process says after each window of the processes' seconds a step."""
    said: list[list[str]] = []
    one = pace.Pace(0, ["here"] * len(windows[0]), False, factor,
                    lambda line: said[-1].append(" ".join(line.split()[:4])))
    for window in windows:
        said.append([])
        for _ in range(pace.WINDOW_STEPS):
            one.take(torch.tensor(window, dtype=torch.float64))
    return said


def test_who_is_slow_is_told_by_the_median_and_not_again_and_again():
    fine, slow = [1.0, 1.1, 0.9, 1.2], [1.0, 1.1, 0.9, 1.7]
    assert compared([fine, slow, slow, fine, slow]) == [
        [], ["process 3 on here"], [], [], ["process 3 on here"]]
    for_long = compared([slow] * 21)
    assert [number for number, lines in enumerate(for_long) if lines] == [0, 10, 20]
    assert compared([[1.6, 1.0], [1.4, 1.0]]) == [["process 0 on here"], []]
    assert compared([[2.0, 2.0]]) == [[]]
    assert compared([[1.0, 2.0]], factor=2.5) == [[]]
    assert compared([[0.002, 0.006]]) == [[]]  # a few milliseconds a step are chance


def test_an_own_time_is_that_from_the_beginning_to_the_wait():
    clock = Clock()
    one = pace.Pace(1, ["a", "b"], False, 1.5, print, clock)
    for expected in (0.0, 3.0):  # the first step compiles
        slots = torch.zeros(2, dtype=torch.float64)
        one.begin()
        clock.seconds += 2
        one.mark()
        clock.seconds += 1
        one.mark()
        clock.seconds += 5  # waiting
        one.add_to(slots)
        assert slots.tolist() == [0.0, expected]
