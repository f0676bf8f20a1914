"""accelerate_configs/slurm.sbatch, rehearsed: only SLURM is not real (tests/slurm_stand_in.py)."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from launching import ROOT, assert_same_run, train

SBATCH = "accelerate_configs/slurm.sbatch"
LENGTH = ["--loop.duration", "60 steps", "--log.every", "1", "--checkpoint.every", "1000 steps"]
PAUSED = """import os, runpy
os.environ |= {"STRIKE": "SIGCONT step 30", "PAUSE": "4", "SCRIPT": "train"}
runpy.run_path("tests/struck_train.py", run_name="__main__")
"""
PORT = 10000 + 4200042 % 20000

# Instead of accelerate: leaves WORD in exit.json, if there is one, and ends; without a word in the
# second try, which else would end like the first, for ever.
LAUNCHER = """#!/bin/sh
[ ! -e "$FOLDER/requeued" ] || exit 1
for word; do run_dir=$word; done
[ -z "$KILLED" ] || { rm -f "$run_dir/exit.json"; exit 137; }
echo "$@" >> "$FOLDER/launched"
mkdir -p "$run_dir"
[ -z "$WORD" ] || echo '{"code": '$WORD', "reason": "", "step": 3}' > "$run_dir/exit.json"
[ -z "$HANGS" ] || python "$HANGS"
exit 1
"""
# Instead of accelerate: is always stopped, after so many tries that have saved something.
STOPPED = """#!/bin/sh
for word; do run_dir=$word; done
echo try >> "$FOLDER/tries"
tries=$(wc -l < "$FOLDER/tries")
mkdir -p "$run_dir/checkpoints"
[ "$tries" -gt "$SAVING" ] || mkdir -p "$run_dir$BESIDE/checkpoints/step_0000000$tries"
[ "$tries" -lt 9 ] || exit 1
rm -f "$run_dir/exit.json"
echo '{"code": 75, "reason": "", "step": '$tries'}' > "$run_dir/exit.json"
exit 1
"""
# A process behind a launcher that ignores signals: so does a child until it says otherwise.
PROCESS = """import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(os.environ["FOLDER"] + "/runs", "w")
time.sleep(30)
"""


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """The environment of someone who may submit jobs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    stand_in = f"#!{sys.executable}\n{(ROOT / 'tests/slurm_stand_in.py').read_text()}"
    for name in ("sbatch", "srun", "scontrol", "scancel"):
        program(programs / name, stand_in)
    python = Path(sys.executable).parent
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "SLURM_"))}
    return clean | {
        "PATH": f"{programs}:{python}:{os.environ['PATH']}", "FOLDER": str(tmp_path),
        "RUN_DIR": str(tmp_path / "run"),
    }


@pytest.fixture
def submit() -> Iterator[Callable[..., subprocess.Popen]]:
    """Submits a job; what is left of it at the test's end is killed."""
    jobs = []

    def start(cluster: dict[str, str], nodes: int, gpus: int, *flags: str) -> subprocess.Popen:
        jobs.append(subprocess.Popen(
            ["sbatch", "--nodes", str(nodes), "--gpus-per-node", str(gpus), "--job-name",
             "rehearsal", SBATCH, *flags],
            cwd=ROOT, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        ))
        return jobs[-1]

    yield start
    for job in jobs:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.communicate()


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def signalled(cluster: dict[str, str], *flags: str) -> None:
    subprocess.run(["scancel", *flags, "4200042"], cwd=ROOT, env=cluster, check=True)


def times_requeued(folder: Path) -> int:
    file = folder / "requeued"
    jobs = file.read_text().split() if file.exists() else []
    assert set(jobs) <= {"4200042"}
    return len(jobs)


@pytest.mark.parametrize("nodes, gpus", [(1, 2), (2, 1)])
def test_a_job_that_runs_out_of_time_is_queued_again_and_goes_on_to_the_same_bits(
    tmp_path, cluster, submit, nodes, gpus
):
    """Through accelerate launch, which by itself would kill 30 seconds after the signal.

    Two launchers whose ``--machine_rank`` was expanded outside of srun would both be machine 0.
    """
    (tmp_path / "paused.py").write_text(PAUSED)
    job = submit(
        cluster | {"ACCELERATE_USE_CPU": "true", "SCRIPT": str(tmp_path / "paused.py"),
                   "CONFIG": "accelerate_configs/cpu_multi.yaml"},
        nodes, gpus, *LENGTH, "--log.trackers", "[]", "--log.report", "false",
    )
    run = tmp_path / "run"
    wait_for(lambda: (run / "metrics.jsonl").exists())
    wait_for(lambda: '{"step": 30,' in (run / "metrics.jsonl").read_text())
    assert times_requeued(tmp_path) == 0
    signalled(cluster, "--signal=USR1")
    output = job.communicate(timeout=200)[0]
    logs = {file.name: file.read_text() for file in (tmp_path / "run-logs").iterdir()}
    assert job.returncode == 0, output + "".join(logs.values())
    assert times_requeued(tmp_path) == 1
    assert "restart 0: exit code 75" in output and "restart 1: exit code 0" in output
    assert sorted(logs) == [f"node-{node}-node{node}.log" for node in range(nodes)]
    assert "resumed at step 31 of 60" in logs["node-0-node0.log"]  # not one step was lost
    assert json.loads((run / "environment.json").read_text())["world_size"] == nodes * gpus
    for node in range(nodes):
        environment = (tmp_path / f"environment-{node}").read_text().splitlines()
        assert f"SLURM_NODEID={node}" in environment and f"MAIN_PORT={PORT}" in environment
    assert_same_run(run, train(tmp_path / "undisturbed", *LENGTH))


@pytest.mark.parametrize("word", ["75", "0", "2", "3", "4", "5", "6", "1"])
def test_only_what_a_new_try_may_mend_is_queued_again(tmp_path, cluster, submit, word):
    program(tmp_path / "bin" / "accelerate", LAUNCHER)
    job = submit(cluster | {"WORD": word}, 2, 4)
    output = job.communicate(timeout=60)[0]
    assert times_requeued(tmp_path) == (word in ("75", "5")), output
    assert job.returncode == (1 if word in ("75", "5") else int(word))


def test_an_exit_code_of_an_earlier_try_does_not_count(tmp_path, cluster, submit):
    program(tmp_path / "bin" / "accelerate", LAUNCHER)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit.json").write_text('{"code": 75, "reason": "", "step": 3}\n')
    job = submit(cluster | {"WORD": ""}, 1, 1)  # as if it had been killed before it began
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 1 and times_requeued(tmp_path) == 0, output


def test_a_run_that_is_killed_after_it_has_begun_ends_with_the_launchers_code(
    tmp_path, cluster, submit
):
    """It takes the exit.json of an earlier try away when it opens its folder."""
    program(tmp_path / "bin" / "accelerate", LAUNCHER)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit.json").write_text('{"code": 75, "reason": "", "step": 3}\n')
    job = submit(cluster | {"WORD": "", "KILLED": "yes"}, 1, 1)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 137 and times_requeued(tmp_path) == 0, output
    assert "exit code 137" in output


@pytest.mark.parametrize("saving, script", [(0, "train.py"), (2, "train.py"), (2, "distill.py")])
def test_a_run_that_saves_nothing_is_not_queued_again_for_ever(
    tmp_path, cluster, submit, saving, script
):
    program(tmp_path / "bin" / "accelerate", STOPPED)
    variables = {"SCRIPT": script, "BESIDE": "_alone" if script == "distill.py" else ""}
    for _ in range(2):  # a job that is submitted anew has all its tries again
        job = submit(cluster | variables | {"SAVING": str(saving)}, 1, 1)
        output = job.communicate(timeout=60)[0]
        tries = (tmp_path / "tries").read_text().count("try")
        assert job.returncode == 75 and tries == saving + 3, output
        assert times_requeued(tmp_path) == tries - 1
        assert output.count("not queued again: 3 tries in a row") == 1
        for file in ("tries", "requeued"):
            (tmp_path / file).unlink()
        saving = 0


@pytest.mark.parametrize("words", [["--run_dir", "{}/mine"], ["--run_dir={}/mine"]])
def test_a_run_dir_among_the_flags_counts_and_tasks_of_an_array_have_one_each(
    tmp_path, cluster, submit, words
):
    program(tmp_path / "bin" / "accelerate", LAUNCHER)
    words = [word.format(tmp_path) for word in words]
    variables = {"WORD": "0", "SLURM_ARRAY_TASK_ID": "7", "SLURM_CPUS_PER_TASK": "12"}
    job = submit(cluster | variables, 1, 1, *words)
    assert job.wait(timeout=60) == 0
    assert (tmp_path / "launched").read_text().endswith(f" --run_dir {tmp_path}/mine-7\n")
    assert (tmp_path / "mine-7" / "exit.json").exists() and not (tmp_path / "run").exists()
    assert (tmp_path / "mine-7-logs" / "node-0-node0.log").exists()
    assert "SRUN_CPUS_PER_TASK=12" in (tmp_path / "environment-0").read_text()


@pytest.mark.parametrize("flags, requeued", [([], 0), (["--signal=USR1"], 1)])
def test_a_cancelled_job_is_not_queued_again(tmp_path, cluster, submit, flags, requeued):
    program(tmp_path / "bin" / "accelerate", LAUNCHER)
    (tmp_path / "process.py").write_text(PROCESS)
    job = submit(cluster | {"WORD": "75", "HANGS": str(tmp_path / "process.py")}, 1, 1)
    wait_for(lambda: (tmp_path / "runs").exists() and (tmp_path / "tasks").exists())
    signalled(cluster, *flags)
    output = job.communicate(timeout=20)[0]  # the process was reached, behind its launcher
    assert times_requeued(tmp_path) == requeued, output


def test_environments_containers_and_arguments_with_spaces(tmp_path, cluster, submit):
    environment = tmp_path / "environment" / "bin"
    environment.mkdir(parents=True)
    (environment / "activate").write_text(f'PATH="{environment}:$PATH"\n')
    program(environment / "accelerate", LAUNCHER)
    container = '#!/bin/sh\necho "$1 $SLURM_NODEID" >> "$FOLDER/contained"\nshift\nexec "$@"\n'
    program(tmp_path / "bin" / "container", container)
    job = submit(
        cluster | {"WORD": "0", "VENV": str(tmp_path / "environment"), "SRUN": "--mem=0",
                   "CONTAINER": "container image.sif", "SCRIPT": "distill.py"},
        2, 4, "--data.source", "my data.csv", "--tasks.a.target", "$HOME",
    )
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 0, output
    assert sorted((tmp_path / "contained").read_text().splitlines()) == [
        "image.sif 0", "image.sif 1"]
    launched = sorted((tmp_path / "launched").read_text().splitlines())
    assert launched == [
        f"launch --config_file accelerate_configs/multi_node.yaml --num_machines 2 "
        f"--num_processes 8 --machine_rank {rank} --main_process_ip 127.0.0.1 "
        f"--main_process_port {PORT} distill.py --data.source my data.csv --tasks.a.target $HOME "
        f"--run_dir {tmp_path / 'run'}" for rank in range(2)
    ]
