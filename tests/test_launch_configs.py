"""accelerate_configs/: what Accelerate itself makes of each file, and the launches a CPU can do.

The traps of launching (what Accelerate 1.15 and torch 2.13 do by themselves), and what shuts them:

unknown keys in a file are an error, keys of the wrong engine are ignored
    each file through the validator and the FSDP plugin (here)
``--cpu --num_processes 2`` and ``use_cpu: true`` start one process
    cpu_multi.yaml (here)
a config for GPUs without GPUs: each process trains alone, as process 0 of 1
    refused (here)
DeepSpeed, an accumulation count in the environment, fp16 on a CPU: another curve
    refused (test_scripts.py)
the launcher sets OMP_NUM_THREADS, by which sums change
    ``cpu_threads`` is the recipe's (test_same_curve.py)
``num_processes`` is that of all machines; a rest of the division is dropped
    the files (here); slurm.sbatch multiplies (test_slurm.py); ``--dry_run`` shows the number
a fixed port: a second run on the machine meets the first
    port 0 on one machine (here), a job's own under SLURM (test_slurm.py)
port 0 on several machines: each takes another
    the files for several name one (here)
``rdzv_backend`` and ``same_network`` in a file are ignored, their flags have defaults
    in no file (here); given as flags (test_machines.py)
restarts with the static rendezvous, or with the agents' shared store, do not recover
    the settings that do (test_machines.py)
every failure is restarted, a mistake of the user, too
    exit codes that are final (test_machines.py)
launchers replace a script's exit code by 1
    exit.json (test_resume.py), read by slurm.sbatch (test_slurm.py)
``accelerate launch`` of one process drops TERM, torchrun kills 30 s after it
    slurm.sbatch signals the processes (test_slurm.py)
machines with other versions or code, or without the run folder
    ``--dry_run`` (test_preflight.py)
gloo aborts at exit, after all work is done
    files are judged, not exit codes (launching.py)
"""

import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from launching import ROOT, assert_same_run, train

from train import TrainOptions

FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
FSDP_FILES = [file for file in FILES if "fsdp" in file.stem]
QUICK = ["--loop.duration", "20 steps", "--log.every", "5"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def start(config: str, run: Path, *flags: str, **environment: str) -> subprocess.Popen:
    """A launch by a config of ours, from an environment without any word to Accelerate."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    return subprocess.Popen(
        [*ACCELERATE, "--config_file", f"accelerate_configs/{config}.yaml", *flags, "train.py",
         *QUICK, "--run_dir", str(run), "--log.trackers", "[]", "--log.report", "false"],
        cwd=ROOT, env=clean | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )


def ended(*launches: subprocess.Popen) -> str:
    """What the launches have said, once all have ended."""
    return "".join(launch.communicate(timeout=200)[0] for launch in launches)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("one") / "run", *QUICK)


def environment_of(file: Path) -> dict[str, str]:
    """What Accelerate hands to the processes that it starts by this file."""
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    if arguments.multi_gpu or arguments.use_fsdp:
        return prepare_multi_gpu_env(arguments)
    return prepare_simple_launcher_cmd_env(arguments)[1]


def test_there_is_a_file_for_each_topology():
    assert {file.stem for file in FILES} == {
        "cpu", "cpu_multi", "single_gpu", "multi_gpu", "fsdp2", "multi_node", "multi_node_fsdp2"
    }


@each_file
def test_every_key_stands_under_a_comment(file):
    above = ""
    for line in file.read_text().splitlines():
        text = line.strip()
        if text and not text.startswith("#"):  # at most three share one comment
            assert above.count("\n") < 3 and above.startswith("#"), line
            above += "\n"
        else:
            above = text
    keys = yaml.safe_load(file.read_text())
    assert not set(keys) & set(TrainOptions.model_fields)  # where and what share no key


@each_file
def test_accelerate_accepts_the_file_and_hands_on_what_it_says(file, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    keys = yaml.safe_load(file.read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment = environment_of(file)
    assert environment["ACCELERATE_MIXED_PRECISION"] == keys["mixed_precision"]
    is_sharded = environment.get("ACCELERATE_USE_FSDP") == "true"
    assert is_sharded == (file in FSDP_FILES)
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in environment
    assert keys["num_processes"] % keys["num_machines"] == 0
    # One machine takes a free port, several have to agree on one.
    assert not {"rdzv_backend", "same_network", "max_restarts"} & set(keys)
    if keys["num_processes"] > 1:
        assert (keys["main_process_port"] == 0) == (keys["num_machines"] == 1)


def test_accelerate_ignores_how_machines_meet_where_a_file_says_so(tmp_path):
    """Should this fail, the two keys may stand in the files."""
    text = (ROOT / "accelerate_configs/multi_node.yaml").read_text()
    (tmp_path / "config.yaml").write_text(f"{text}rdzv_backend: c10d\nsame_network: true\n")
    words = ["--config_file", str(tmp_path / "config.yaml"), "train.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (arguments.rdzv_backend, arguments.same_network) == ("static", False)
    assert arguments.num_processes == 16  # what has no default is heard


@pytest.mark.parametrize("file", FSDP_FILES, ids=lambda file: file.stem)
def test_accelerates_plugin_reads_the_fsdp2_files_without_a_warning(file, monkeypatch):
    """Left out, ``fsdp_version`` is 1 and ``fsdp_cpu_ram_efficient_loading`` is on."""
    for name, value in environment_of(file).items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugin = FullyShardedDataParallelPlugin()
    keys = yaml.safe_load(file.read_text())["fsdp_config"]
    assert plugin.fsdp_version == keys["fsdp_version"] == 2
    assert plugin.reshard_after_forward is keys["fsdp_reshard_after_forward"]
    assert plugin.activation_checkpointing is keys["fsdp_activation_checkpointing"]
    assert plugin.cpu_ram_efficient_loading is keys["fsdp_cpu_ram_efficient_loading"] is False
    assert type(plugin.cpu_offload).__name__ == "OffloadPolicy"  # which keeps them on the GPU
    assert keys["fsdp_offload_params"] is False
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.transformer_cls_names_to_wrap is None  # found in the model


@pytest.mark.parametrize("config, flags, processes, environment", [
    ("cpu", [], 1, {}),
    ("cpu_multi", [], 2, {"ACCELERATE_USE_CPU": "true"}),
    ("multi_gpu", ["--num_processes", "3", "--mixed_precision", "no"], 3,
     {"ACCELERATE_USE_CPU": "true"}),
    ("single_gpu", ["--mixed_precision", "no"], 1, {"ACCELERATE_USE_CPU": "true"}),
])
def test_the_configs_launch_on_a_cpu(tmp_path, one_process, config, flags, processes, environment):
    output = ended(start(config, tmp_path / "run", *flags, **environment))
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 0, output
    written = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert written["world_size"] == processes and written["device"] == "cpu"
    assert_same_run(tmp_path / "run", one_process)


def test_two_launchers_of_the_config_for_several_machines_make_one_run(tmp_path, one_process):
    """On one machine, over loopback; as two machines: tests/test_machines.py."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    run = tmp_path / "run"
    flags = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", port]
    output = ended(*(
        start("multi_node", run, *flags, "--machine_rank", str(rank), ACCELERATE_USE_CPU="true")
        for rank in range(2)
    ))
    assert json.loads((run / "exit.json").read_text())["code"] == 0, output
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert_same_run(run, one_process)


def test_a_multi_gpu_config_without_gpus_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    launch = start("multi_gpu", tmp_path / "run", "--num_processes", "2", "--mixed_precision", "no")
    output = ended(launch)
    assert launch.returncode != 0 and not (tmp_path / "run").exists()
    assert "2 processes were launched, but each sees 1" in output
