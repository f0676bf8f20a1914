"""Machines to launch on: this one, or two network namespaces with names and addresses.

A program in a namespace sees another host name, other addresses and no other machine's loopback;
the file system is shared, as between nodes of a cluster. It takes root, or is skipped with the
reason.
"""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from launching import ROOT

# What makes a restart find the others again (tests/test_machines.py), and quick.
RECOVERS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
QUICKLY = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
# Runs train.py, which pauses at step 30 in the first attempt, so that the test can strike.
PAUSED = """import os, runpy
first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
os.environ |= {"STRIKE": "SIGCONT " + ("step 30" if first else "never"), "PAUSE": "4",
               "SCRIPT": "train"}
runpy.run_path("tests/struck_train.py", run_name="__main__")
"""


class Machine(NamedTuple):
    address: str
    prefix: list[str]
    """Words before a command that runs there."""
    environment: dict[str, str]

    def start(self, words: list[str], **environment: str) -> subprocess.Popen:
        """Runs a Python program there."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
        return subprocess.Popen(
            [*self.prefix, sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE,
            env=clean | {"ACCELERATE_USE_CPU": "true"} | self.environment | environment,
            stderr=subprocess.STDOUT, text=True,
        )

    def torchrun(
        self, first: "Machine", port: int, nodes: str, words: list[str], **environment: str
    ) -> subprocess.Popen:
        """One process there, under an elastic launcher that meets the others at ``first``."""
        options = ["--nnodes", nodes, "--nproc_per_node", "1", "--max_restarts", "3",
                   "--rdzv_backend", "c10d", "--rdzv_endpoint", f"{first.address}:{port}",
                   "--rdzv_id", "machines", "--rdzv_conf", QUICKLY]
        return self.start(["-m", "torch.distributed.run", *options, *words],
                          **RECOVERS | environment)


HERE = Machine("127.0.0.1", [], {})


def switched_off(launch: subprocess.Popen) -> str:
    """Kills a launcher and all that it has started, as the loss of its machine would.

    Returns what it has said.
    """
    launcher = psutil.Process(launch.pid)
    for process in [launcher, *launcher.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return launch.communicate(timeout=30)[0]


@contextmanager
def two_machines() -> Iterator[list[Machine]]:
    """Two namespaces joined by a cable, gone at the end."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need the programs ip and unshare")
    mark = uuid.uuid4().hex[:6]
    names = [f"curve{mark}{number}" for number in (1, 2)]
    hosts = "127.0.0.1 localhost\n" + "".join(
        f"10.9.0.{number} machine{number}\n" for number in (1, 2))
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add v{mark}1 netns {names[0]} type veth "
                    f"peer name v{mark}2 netns {names[1]}")
    for number, name in enumerate(names, start=1):
        commands += [f"ip -n {name} addr add 10.9.0.{number}/24 dev v{mark}{number}",
                     f"ip -n {name} link set v{mark}{number} up", f"ip -n {name} link set lo up"]
    try:
        for command in commands:
            made = subprocess.run(command.split(), capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {command}: {made.stderr.strip()}")
        for name in names:  # ip lays it over /etc/hosts there
            Path("/etc/netns", name).mkdir(parents=True)
            Path("/etc/netns", name, "hosts").write_text(hosts)
        yield [
            Machine(f"10.9.0.{number}",
                    ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c",
                     f'hostname machine{number}; exec "$@"', "sh"],
                    {"GLOO_SOCKET_IFNAME": f"v{mark}{number}"})
            for number, name in enumerate(names, start=1)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)
        with suppress(OSError):
            Path("/etc/netns").rmdir()
