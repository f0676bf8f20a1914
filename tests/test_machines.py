"""Several machines and elastic restarts: the same bits, whatever is lost on the way.

What was measured of restarts, over gloo, is why the launches here look as they do: with the static
rendezvous none of four recovered, with c10d one of four, with c10d and
``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` all did.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from launching import ROOT, assert_same_run, train
from machines import HERE, PAUSED, RECOVERS, switched_off, two_machines
from warm import fork

from trainlib.runtime import RunFolder
from trainlib.runtime.restarts import NotRestarted

LENGTH = ["--loop.duration", "60 steps", "--log.every", "1", "--checkpoint.every", "11 steps"]
QUIET = ["--log.trackers", "[]", "--log.report", "false"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def reaches_step_30(run: Path) -> None:
    log = run / "metrics.jsonl"
    wait_for(lambda: log.exists() and '{"step": 30,' in log.read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("undisturbed") / "run", *LENGTH)


@pytest.fixture
def paused(tmp_path) -> list[str]:
    """A script that pauses at step 30, and its flags."""
    script = tmp_path / "paused.py"
    script.write_text(PAUSED)
    return [str(script), "--run_dir", str(tmp_path / "run"), *LENGTH, *QUIET]


@pytest.fixture(scope="module")
def machines():
    with two_machines() as both:
        yield both


def assert_restarted_to(run: Path, undisturbed: Path, world_size: int, output: str) -> None:
    assert json.loads((run / "exit.json").read_text())["code"] == 0, output
    assert "resumed at step" in output
    assert json.loads((run / "environment.json").read_text())["world_size"] == world_size
    assert_same_run(run, undisturbed)


def test_a_killed_process_is_restarted_and_goes_on_to_the_same_bits(tmp_path, paused, undisturbed):
    launch = HERE.start(
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "--max_restarts", "1", *paused], **RECOVERS)
    run = tmp_path / "run"
    reaches_step_30(run)
    holder = json.loads((run / "run.lock").read_text())
    os.kill(holder["pid"], 9)
    output = launch.communicate(timeout=200)[0]
    assert_restarted_to(run, undisturbed, 2, output)


def test_a_machine_is_lost_and_the_other_goes_on_alone(tmp_path, paused, undisturbed):
    """The machine at the rendezvous' own address must be the one that stays."""
    port, run = free_port(), tmp_path / "run"
    launches = [HERE.torchrun(HERE, port, "1:2", paused) for _ in range(2)]
    reaches_step_30(run)
    keeper, lost = sorted(launches, key=lambda launch: not listens(launch, port))
    switched_off(lost)
    assert_restarted_to(run, undisturbed, 1, keeper.communicate(timeout=200)[0])


def listens(launch: subprocess.Popen, port: int) -> bool:
    connections = psutil.Process(launch.pid).net_connections()
    return any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in connections)


@pytest.mark.parametrize("code, flags", [
    (3, ["--optim.lr", "1e30", "--schedule.warmup", "0 steps"]),
    (2, ["--optim.lrr", "1"]),  # which ends the run before it has a folder
])
def test_what_would_end_the_same_way_again_is_not_restarted(tmp_path, code, flags):
    run = tmp_path / "run"
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
         "2", "--max_restarts", "2", "train.py", "--run_dir", str(run), *QUIET, *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )
    [ended, *again] = [line for line in result.stderr.splitlines() if line.startswith("train.py:")]
    once_more = ended.replace("train.py: ", "train.py: not restarted, since it ended with exit "
                                            f"code {code}: ")
    assert again == [once_more] * 2
    assert f"exitcode  : {code}" in result.stderr  # of the last attempt, as torchrun saw it
    assert result.stdout.count("data:") == (code == 3)  # the others did not even look at the data
    if code == 3:
        assert json.loads((run / "exit.json").read_text())["code"] == 3
    assert run.exists() == (code == 3)


@pytest.mark.parametrize("code, count, age_seconds, is_refused", [
    *((code, "1", 0, True) for code in (2, 3, 4, 6)),
    *((code, "2", 0, False) for code in (0, 1, 5, 75)),
    (3, "0", 0, False), (3, "1", 10**6, False),
], ids=str)
def test_which_ends_are_final(tmp_path, monkeypatch, code, count, age_seconds, is_refused):
    """A hang, a crash and a stop are not; nor is what an earlier launch has left."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    file = tmp_path / "exit.json"
    file.write_text(json.dumps({"code": code, "reason": "why", "step": 3}))
    os.utime(file, (time.time() - age_seconds,) * 2)
    if not is_refused:
        RunFolder(tmp_path)
        return
    with pytest.raises(NotRestarted, match=f"exit code {code}: why") as caught:
        RunFolder(tmp_path)
    assert caught.value.exit_code == code


@pytest.mark.parametrize("text", [None, "", "[]", '{"code": 3}', '{"code": [3], "reason": 1}'])
def test_without_a_readable_word_a_run_is_restarted(tmp_path, monkeypatch, text):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    if text is not None:
        (tmp_path / "exit.json").write_text(text)
    RunFolder(tmp_path)


# ---- two machines: network namespaces with names and addresses of their own ----


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_machines_give_the_bits_of_one_process(tmp_path, machines, undisturbed, rendezvous):
    run = tmp_path / "run"
    launches = [
        machine.start(
            ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
             "accelerate_configs/multi_node.yaml", "--rdzv_backend", rendezvous,
             "--num_processes", "4", "--mixed_precision", "no", "--main_process_ip",
             machines[0].address, "--machine_rank", str(rank), "train.py", "--run_dir", str(run),
             *LENGTH, *QUIET], **RECOVERS)
        for rank, machine in enumerate(machines)
    ]
    output = "".join(launch.communicate(timeout=200)[0] for launch in launches)
    assert json.loads((run / "exit.json").read_text())["code"] == 0, output
    assert json.loads((run / "environment.json").read_text())["world_size"] == 4
    assert_same_run(run, undisturbed)


def test_a_machine_is_lost_and_replaced(tmp_path, machines, paused, undisturbed):
    run = tmp_path / "run"
    first, second = (machine.torchrun(machines[0], 29500, "2", paused) for machine in machines)
    reaches_step_30(run)
    said = switched_off(second)
    replacement = machines[1].torchrun(machines[0], 29500, "2", paused)
    output = first.communicate(timeout=200)[0] + replacement.communicate(timeout=60)[0]
    assert_restarted_to(run, undisturbed, 2, said + output)


# The second process alone finds its memory full, in a call of one method of torch's modules.
FULL = """import os, runpy, sys
import torch
calls, method = [], torch.nn.{method}
def full(*arguments, **named):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) > {calls}:
        raise {error}
    return method(*arguments, **named)
torch.nn.{method} = full
sys.path.insert(0, {root!r})
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""
CUDA_ERROR = ('torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a '
              'total capacity of 9.00 GiB. See documentation for Memory Management")')


@pytest.mark.parametrize("error, method, calls, words", [
    (CUDA_ERROR, "Linear.forward", 60,
     "CUDA out of memory. Tried to allocate 2.50 GiB; begin a run in another"),
    (CUDA_ERROR, "Module.to", 0,
     "CUDA out of memory. Tried to allocate 2.50 GiB; begin a run in another"),
    ("MemoryError()", "Linear.forward", 60,
     "the machine's memory is full; run the same command again with --data.in_memory false"),
])
def test_too_little_memory_on_one_process_ends_with_code_6_and_advice(
    tmp_path, error, method, calls, words
):
    script, run = tmp_path / "full.py", tmp_path / "run"
    script.write_text(FULL.format(error=error, method=method, calls=calls, root=str(ROOT)))
    result = fork(["--run_dir", str(run), *LENGTH, *QUIET], 2, str(script))
    assert result.returncode == 6, result.stderr
    assert f"[rank 1] train.py: {words}" in result.stderr and "Management" not in result.stderr
    if calls:
        end = json.loads((run / "exit.json").read_text())
        assert end["code"] == 6 and end["reason"].startswith(words)
    else:  # before the run has taken its folder
        assert not run.exists()
