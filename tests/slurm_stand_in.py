"""sbatch, srun, scontrol and scancel on this machine, by the name under which it is called.

Nodes are tasks of one machine. SLURM is taken at its word where it matters: a step's output goes
to a file of each node, a job's ``--signal`` without ``B:`` and every other signal reach the tasks
themselves and none of their children (as with proctrack/cgroup), and a requeued job starts again
from its script, with the same number. FOLDER holds what happened: ``tasks`` (their pids),
``requeued``, ``environment-N`` (SLURM's and ours, of each task).
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ["FOLDER"])
TASKS, REQUEUED = FOLDER / "tasks", FOLDER / "requeued"


def option(words: list[str], name: str) -> str | None:
    """The last value of ``--name VALUE`` or ``--name=VALUE``."""
    found = re.findall(rf"--{name}[= ](\S+)", " ".join(words))
    return found[-1] if found else None


def sbatch(words: list[str]) -> int:
    """Runs the script until it is not requeued, as ``sbatch [options] SCRIPT [arguments]``."""
    at = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
    header = [line.removeprefix("#SBATCH ") for line in Path(words[at]).read_text().splitlines()
              if line.startswith("#SBATCH ")]
    options = [*header, *words[:at]]
    assert option(options, "signal").split("@")[0] == "USR1" and "--requeue" in options
    nodes = option(options, "nodes")
    variables = {
        "SLURM_JOB_ID": "4200042", "SLURM_JOB_NAME": option(options, "job-name"),
        "SLURM_JOB_NUM_NODES": nodes, "SLURM_JOB_NODELIST": f"node[0-{nodes}]",
        "SLURM_GPUS_ON_NODE": option(options, "gpus-per-node"),
    }
    tries = 0
    while True:
        environment = os.environ | variables
        environment |= {"SLURM_RESTART_COUNT": str(tries)} if tries else {}
        job = subprocess.Popen(["bash", *words[at:]], env=environment)
        (FOLDER / "job").write_text(str(job.pid))
        code = job.wait()
        if not REQUEUED.exists() or len(REQUEUED.read_text().splitlines()) == tries:
            return code
        tries += 1


def srun(words: list[str]) -> int:
    """Runs a command once on each node."""
    at = next(i for i, word in enumerate(words) if not word.startswith("--"))
    tasks = []
    for node in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
        output = option(words[:at], "output").replace("%n", str(node)).replace("%N", f"node{node}")
        environment = os.environ | {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}
        with open(output, "a") as file:
            tasks.append(subprocess.Popen(words[at:], env=environment, stdout=file, stderr=file))
        ours = ("SLURM", "SRUN_", "MAIN_", "NUM_")
        (FOLDER / f"environment-{node}").write_text("\n".join(
            f"{k}={v}" for k, v in sorted(environment.items()) if k.startswith(ours)))
    TASKS.with_suffix(".new").write_text(" ".join(str(task.pid) for task in tasks))
    TASKS.with_suffix(".new").rename(TASKS)
    codes = [task.wait() for task in tasks]
    TASKS.unlink()
    return max(codes, key=abs)


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print("127.0.0.1\nnode1")
    elif words[0] == "requeue":
        with REQUEUED.open("a") as file:
            file.write(words[1] + "\n")
    return 0


def scancel(words: list[str]) -> int:
    """``--signal=NAME JOB``: to the tasks. ``JOB``: the end, to the script as well."""
    name = option(words, "signal") or "TERM"
    pids = [int(pid) for pid in TASKS.read_text().split()]
    if not option(words, "signal"):
        pids.append(int((FOLDER / "job").read_text()))
    for pid in pids:
        os.kill(pid, getattr(signal, f"SIG{name}"))
    return 0


if __name__ == "__main__":
    sys.exit(globals()[Path(sys.argv[0]).name](sys.argv[1:]))
