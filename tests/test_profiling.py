"""The profile says where the time of a step goes, adds up, and changes nothing."""

import gzip
import json
import statistics
from types import SimpleNamespace

import pytest
import torch
from launching import assert_same_run, train
from torch import nn
from warm import fork

from trainlib.profiling import parts, profile, trace

SHORT = ("--loop.duration", "40 steps", "--log.trackers", "[]", "--log.report", "false",
         "--batch.global_size", "64")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without a profile."""
    return train(tmp_path_factory.mktemp("plain") / "run", *SHORT)


def table(folder) -> tuple[int, dict[str, tuple[float, float]], list[str]]:
    """Steps, milliseconds and percent by part, and the operators."""
    text = (folder / "profile.txt").read_text()
    steps = int(text.split(" steps")[0].removeprefix("profile of "))
    _, shares, operators = text.split("\n\n")
    rows = {line[:14].strip(): line[14:].split() for line in shares.splitlines()[1:]
            if line.endswith("%")}
    return (steps, {name: (float(ms), float(share.rstrip("%"))) for name, (ms, share)
                    in rows.items()},
            [line[:48].strip() for line in operators.splitlines()[1:]])


def read_trace(folder) -> list[dict]:
    with gzip.open(folder / "profile.trace.json.gz") as file:
        return json.load(file)["traceEvents"]


def said(folder) -> str:
    return (folder / "log.txt").read_text()


# ---- the parts of a step ----


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Machine:
    def __init__(self, clock):
        self.clock = clock

    def work(self, seconds, *calls):
        self.clock.now += seconds
        for call in calls:
            call()
        return seconds

    inner = outer = work


def test_each_moment_counts_once_and_the_parts_add_up():
    clock = Clock()
    machine, found = Machine(clock), parts.Parts(clock)
    found.mark(machine, "outer", "exact sum", then="rest")
    found.mark(machine, "inner", "communication")
    machine.outer(100)  # outside of a step
    found.enter("data")
    clock.now += 1
    assert machine.outer(2, lambda: machine.inner(4), lambda: machine.work(8)) == 2
    clock.now += 16
    found.enter(None)
    machine.outer(100)
    wanted = {"data": 1, "exact sum": 2 + 8, "communication": 4, "rest": 16}
    assert {name: value for name, value in found.seconds.items() if value} == wanted


def test_marks_leave_no_trace_and_survive_an_error():
    clock = Clock()
    machine, found = Machine(clock), parts.Parts(clock)
    before = dict(vars(machine))
    reduce = torch.distributed.all_reduce
    found.mark(machine, "outer", "data", then="rest")
    found.mark(torch.distributed, "all_reduce", "communication")
    found.enter("rest")
    with pytest.raises(ZeroDivisionError):
        machine.outer(1, lambda: 1 / 0)
    found.enter(None)
    assert found.seconds["data"] == 1
    found.unmark()
    assert vars(machine) == before and torch.distributed.all_reduce is reduce


# ---- what a trace says ----


def test_operators_have_the_times_that_torchs_own_table_has(tmp_path):
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
    optimizer, found = torch.optim.AdamW(net.parameters()), parts.Parts()
    net(torch.randn(4, 64)).sum().backward()
    values = torch.zeros(100)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        found.enter("forward")
        loss = net(torch.randn(64, 64)).square().sum()
        found.enter("backward")
        loss.backward()
        found.enter("optimizer")
        optimizer.step()
        found.enter(None)
        values.cosh_()  # outside of a step
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    wanted = {row.key: row for row in profiler.key_averages()}
    operators = {operator.name: operator for operator in trace.operators(events)}
    assert {"aten::addmm", "aten::mm"} <= operators.keys() and "aten::cosh_" not in operators
    for name, operator in operators.items():
        assert operator.calls == wanted[name].count
        # Of both the times are rounded to a nanosecond for each event.
        assert operator.host == pytest.approx(wanted[name].self_cpu_time_total, rel=0.01, abs=5)


def gpu_event(kind, name, start, length, correlation, thread=1):
    return {"cat": kind, "name": name, "ts": start, "dur": length, "pid": 1, "tid": thread,
            "args": {"correlation": correlation} if correlation else {}}


GPU_STEP = [
    gpu_event("user_annotation", "part: forward", 0, 10, None),
    gpu_event("user_annotation", "part: backward", 10, 20, None),
    gpu_event("cpu_op", "aten::mm", 1, 3, None),
    gpu_event("cuda_runtime", "cudaLaunchKernel", 2, 1, 1),
    gpu_event("kernel", "gemm", 5, 10, 1, 7),  # ends in the backward, and was launched before it
    gpu_event("cpu_op", "aten::mm", 12, 6, None, 2),  # autograd's thread
    gpu_event("cuda_runtime", "cudaLaunchKernel", 13, 1, 2, 2),
    gpu_event("kernel", "gemm", 15, 20, 2, 7),  # ends after the step
    gpu_event("cuda_driver", "cuLaunchKernel", 20, 1, 3, 2),
    gpu_event("kernel", "ncclDevKernel_AllReduce", 30, 10, 3, 8),  # 5 of it hidden
    gpu_event("cuda_runtime", "cudaLaunchKernel", 50, 1, 4),
    gpu_event("kernel", "of an evaluation", 51, 10, 4, 7),
]


def test_kernels_belong_to_the_part_that_launched_them():
    found = trace.device_parts(GPU_STEP)
    assert {name: value for name, value in found.items() if value} == {
        "forward": 10, "backward": 20, "communication": 5}
    multiply, = trace.operators(GPU_STEP)
    assert (multiply.calls, multiply.host, multiply.device) == (2, 9, 30)
    assert trace.device_parts(GPU_STEP[:3]) == {}
    lines = profile.part_lines({"forward": 40e-6, "backward": 60e-6}, {"forward": 25.0}, 1)
    assert [line.split() for line in lines[1:]] == [
        ["forward", "0.040", "40.0%", "0.025", "25.0%"], ["backward", "0.060", "60.0%", "0.000",
                                                          "0.0%"],
        ["idle", "0.000", "0.0%", "0.075", "75.0%"], ["all", "0.100", "100.0%", "0.100", "100.0%"]]


# ---- runs ----


def slow(folder, sleeps, *flags, processes=1):
    result = fork(["--run_dir", str(folder), *SHORT, "--model.name", "tests/slow_train.py:Net",
                   "--profile", "20 steps", *flags], processes, "tests/slow_train.py",
                  SLEEP=json.dumps(sleeps))
    assert json.loads((folder / "exit.json").read_text())["code"] == 0, result.stderr
    return table(folder)


def test_a_part_that_sleeps_is_found_with_its_seconds(tmp_path):
    sleeps = {"data": 0.02, "forward": 0.005, "backward": 0.02, "optimizer": 0.005}
    steps, rows, _ = slow(tmp_path / "run", sleeps)
    assert steps == 20
    assert sum(share for name, (_, share) in rows.items() if name != "all") == pytest.approx(
        100, abs=0.6)  # of ten rounded shares
    assert sum(ms for name, (ms, _) in rows.items() if name != "all") == pytest.approx(
        rows["all"][0], abs=0.01)
    for part, calls in (("data", 1), ("forward", 2), ("backward", 2), ("optimizer", 1)):
        slept = [1000 * float(line) for line in
                 (tmp_path / f"run.{part}.slept").read_text().split()]
        assert calls * 1000 * sleeps[part] <= rows[part][0] <= 2 * calls * statistics.mean(slept)
    assert max(list(rows)[:-1], key=lambda name: rows[name][0]) == "backward"
    events = read_trace(tmp_path / "run")
    found = trace.ranges(events)
    assert all(one.end <= following.start + 1 for one, following in
               zip(found, found[1:], strict=False))
    assert sum(one.part == "optimizer" for one in found) == 20


def test_waiting_for_a_slow_process_is_communication(tmp_path):
    _, rows, _ = slow(tmp_path / "run", {"data": 0.03, "rank": 1}, processes=2)
    assert max(list(rows)[:-1], key=lambda name: rows[name][0]) == "communication"
    assert rows["communication"][0] > 15 and rows["data"][0] < 15


def test_the_multiplications_of_a_large_layer_are_the_top_operator(tmp_path):
    folder = train(tmp_path / "run", *SHORT[:2], "--model.args.hidden", "[1024, 1024]",
                   "--batch.global_size", "512", "--batch.micro_size", "256",
                   "--loop.duration", "10 steps", "--profile", "3 steps")
    assert {*table(folder)[2][:2]} == {"aten::mm", "aten::addmm"}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_profile_changes_no_weight(tmp_path, processes, plain):
    profiled = train(tmp_path / "profiled", *SHORT, "--profile", "10 steps", processes=processes)
    assert_same_run(plain, profiled)
    assert "\nprofile:" not in (profiled / "config.yaml").read_text()
    assert (profiled / "profile.txt").exists() and not (plain / "profile.txt").exists()


def test_a_run_may_be_shorter_than_its_profile_and_go_on(tmp_path):
    flags = [*SHORT[2:], "--profile", "20 steps", "--loop.duration"]
    run = train(tmp_path / "run", *flags, f"{profile.WARMUP_STEPS} steps")
    assert "the run has ended within the 5 steps" in said(run)
    assert not (run / "profile.txt").exists()
    train(run, *flags, "18 steps")
    assert table(run)[0] == 8
    assert "after 8 of the 20 steps" in said(run)
    first = (run / "profile.txt").read_text()
    train(run, *SHORT[2:], "--loop.duration", "20 steps")
    assert (run / "profile.txt").read_text() == first


@pytest.mark.parametrize("wanted", ["0 steps", "-3 steps", "20", "20 epochs", "5%", "2.5 steps"])
def test_what_is_no_number_of_steps_is_refused(tmp_path, wanted):
    result = fork(["--run_dir", str(tmp_path / "run"), *SHORT, f"--profile={wanted}"])
    assert result.returncode == 2 and "Traceback" not in result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.strip()]
    assert 'profile' in line and '"20 steps"' in line and wanted in line
    assert list(tmp_path.iterdir()) == []


def test_a_profile_of_an_earlier_run_is_not_left_for_another(tmp_path):
    folder, said_lines = tmp_path, []

    def start(wanted, step):
        for name in (profile.TABLE, profile.TRACE):
            (folder / name).write_text("of an earlier run")
        parts_of_a_run = [SimpleNamespace(begin=None)] * 7
        accelerator = SimpleNamespace(is_main_process=True, device=torch.device("cpu"))
        sums = SimpleNamespace(is_sharded=False, reduces_elsewhere=False)
        profile.profile_steps(wanted, SimpleNamespace(path=folder, step=step), parts_of_a_run[0],
                              accelerator, sums, *parts_of_a_run[:3], said_lines.append)
        return {file.name for file in folder.iterdir()}

    both = {profile.TABLE, profile.TRACE}
    assert start(None, 10) == both  # it is this run's, which goes on
    assert start(None, 0) == set()
    assert start("3 steps", 10) == set()  # which may fail, or come too late
    assert start("3 steps", 0) == set() and said_lines == []


def test_a_signal_ends_the_profile_and_the_run_goes_on(tmp_path, plain):
    run, flags = tmp_path / "run", [*SHORT, "--profile", "20 steps"]
    result = fork(["--run_dir", str(run), *flags], 1, "tests/struck_train.py",
                  STRIKE="SIGTERM step 12")
    assert json.loads((run / "exit.json").read_text())["code"] == 75, result.stderr
    assert 1 <= table(run)[0] <= 13 - profile.WARMUP_STEPS
    assert_same_run(train(run, *flags), plain)
    assert table(run)[0] == 20


def test_a_full_disk_costs_the_profile_and_not_the_run(tmp_path, plain):
    run = tmp_path / "run"
    result = fork(["--run_dir", str(run), *SHORT, "--profile", "10 steps"], 1,
                  "tests/disk_train.py", DISK='{"10": "ENOSPC", "30": "mend"}')
    assert json.loads((run / "exit.json").read_text())["code"] == 0, result.stderr
    for name in (profile.TRACE, profile.TABLE):
        assert f"{name}: not written (No space left on device)" in said(run)
        assert not (run / name).exists()
    assert "backward" in said(run)  # the table
    assert_same_run(run, plain)


def test_a_profiler_that_fails_costs_a_line(tmp_path, monkeypatch):
    class Watchdog:
        phases = []

        def begin(self, phase, step=None):
            self.phases.append(phase)

    def fails():
        raise RuntimeError("no\nprofiler")

    lines, watchdog = [], Watchdog()
    monkeypatch.setattr(torch.profiler.profile, "start", lambda self: fails())
    profile.Profile(3, None, watchdog, torch.device("cpu"), lambda parts: None, [], lines.append)
    for _ in range(10):
        watchdog.begin("step")
    assert lines == ["profile: failed (no profiler); training goes on without it"]
    assert watchdog.phases.count("step") == 10

