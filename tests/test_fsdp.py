"""FSDP2: the curve, the checkpoints and the stops of a plain run; real processes, real files.

Accelerate passes its FSDP settings over on CPUs; ``trainlib.sharding`` does not. So the processes
here are given the variables that ``accelerate launch`` makes of a config with ``fsdp_version: 2``,
and run what GPUs run, over gloo; one test launches such a config itself, and one has an Accelerator
that believes in FSDP2, as on GPUs.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from launching import ROOT, assert_same_run, load, losses, records, weights
from safetensors.torch import load_file
from torch import nn
from warm import fork

from trainlib.config import UserError
from trainlib.models import load_model
from trainlib.models.gpt import GPT
from trainlib.models.mlp import MLP
from trainlib.models.resnet import ResNet
from trainlib.sharding import _blocks, repeated_blocks

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
QUIET = ["--log.every", "1", "--log.trackers", "[]", "--log.report", "false"]
MLP_JOB = ["--model.args.dropout", "0", "--batch.micro_size", "16"]
RESNET_JOB = ["--model.name", "resnet", "--model.args.width", "8", "--batch.micro_size", "16"]
GPT_JOB = ["--data.source", "builtin:pydocs", "--data.tokenizer", "bytes", "--data.block_size",
           "32", "--tasks.text.kind", "language_modeling", "--model.name", "gpt",
           "--model.args.width", "16", "--model.args.depth", "2", "--model.args.heads", "2",
           "--batch.global_size", "8", "--batch.micro_size", "2", "--batch.eval_size", "4096"]


def run(folder: Path, steps: int, *flags: str, processes: int = 1, script: str = "train.py",
        code: int = 0, **environment: str) -> Path:
    """A run of so many steps that ended with ``code``."""
    arguments = ["--run_dir", str(folder), "--loop.duration", f"{steps} steps", *QUIET, *flags]
    result = fork(arguments, processes, script, **environment)
    written = folder / "exit.json"
    assert written.exists() and json.loads(written.read_text())["code"] == code, (
        result.stdout + result.stderr)
    if environment.get("ACCELERATE_USE_FSDP"):
        assert f"FSDP2 over {processes} processes" in result.stdout
    return folder


def differences(first: Path, second: Path, key: str) -> list[float]:
    left, right = ([r[key] for r in records(each) if key in r] for each in (first, second))
    return [abs(a - b) for a, b in zip(left, right, strict=True)]


def assert_same_to_rounding(
    first: Path, second: Path, steps: int, tolerance: float = 1e-6, norms: float = 1e-5
) -> None:
    assert len(losses(first)) == steps
    assert max(differences(first, second, "train/loss")) <= tolerance
    assert max(differences(first, second, "eval/loss")) <= tolerance
    # Before clipping; relative.
    for a, b in zip(*([r["train/grad_norm"] for r in records(each) if "train/grad_norm" in r]
                      for each in (first, second)), strict=True):
        assert a == pytest.approx(b, rel=norms)
    left, right = weights(first), weights(second)
    assert {k: v.shape for k, v in left.items()} == {k: v.shape for k, v in right.items()}
    assert all(v.dtype == right[k].dtype for k, v in left.items())


# Of a net whose ReLUs and BatchNorms of few samples make rounding grow; a mistake is larger.
ROUGH = (1e-5, 1e-3)
JOBS = {
    "mlp": (MLP_JOB, {}, 1e-5),
    # Tied embedding; dropout that is recomputed; offloaded. Norms: its terms nearly cancel.
    "gpt": ([*GPT_JOB, "--model.args.dropout", "0.2"],
            {"FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_OFFLOAD_PARAMS": "true"}, 1e-3),
}


@pytest.mark.parametrize("job", JOBS)
def test_two_and_three_processes_have_the_curve_of_one(tmp_path, job):
    flags, environment, norms = JOBS[job]
    flags = [*flags, "--loop.eval_every", "30 steps"]
    plain = run(tmp_path / "plain", 60, *flags)
    assert losses(plain)[-1] < losses(plain)[0]
    for processes in (2, 3):
        cut = run(tmp_path / str(processes), 60, *flags, processes=processes, **FSDP2,
                  **environment)
        assert_same_to_rounding(plain, cut, 60, norms=norms)


def test_repeated_micro_batches_batch_norm_frozen_layers_and_few_batches_to_evaluate(tmp_path):
    # Four micro-batches, the last of two samples, on three processes leave two to repeat; of two
    # batches to evaluate, the third process has none.
    flags = [*RESNET_JOB, "--batch.global_size", "50", "--batch.eval_size", "200",
             "--model.freeze", "[stem*]", "--optim.ema_half_life", "5 steps", "--optim.name", "sgd",
             "--optim.args.momentum", "0.9", "--optim.lr", "0.01", "--optim.max_grad_value", "0.01",
             "--loop.eval_every", "7 steps"]
    plain = run(tmp_path / "plain", 20, *flags)
    cut = run(tmp_path / "cut", 20, *flags, processes=3, **FSDP2)
    assert_same_to_rounding(plain, cut, 20, *ROUGH)
    left, right = weights(plain), weights(cut)  # the averages; SGD leaves rounding as small
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-4, atol=1e-5)
    assert any(name.startswith("stem") for name in left)
    assert any(name.endswith("running_var") for name in left)
    # What was exported evaluates as the run says.
    model, validation = load_model(cut), load().validation
    with torch.no_grad():
        right = model(validation.inputs).argmax(1) == validation.targets["digit"]
    best = json.loads((cut / "best" / "evaluation.json").read_text())["digit"]["accuracy"]
    assert right.double().mean().item() == pytest.approx(best, abs=1e-12)


FORK = """
from torch import nn
class Net(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.one, self.two = nn.Linear(inputs, classes), nn.Linear(inputs, classes)
        self.into, self.out = nn.Linear(inputs, 24), nn.Linear(24, classes)
        self.spare = nn.Linear(3, 2)
    def forward(self, inputs):
        inputs = inputs.flatten(1)
        layers = (self.one, self.two, lambda hidden: self.out(self.into(hidden).relu()))
        return layers[int((inputs.abs() > 0.5).sum()) % 3 if self.training else 0](inputs)
"""


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_processes_may_use_different_parameters_in_a_step(tmp_path, optimizer):
    """Of one size and of others; what nobody uses stays, in spite of moments and decay."""
    (tmp_path / "net.py").write_text(FORK)
    flags = ["--model.name", f"{tmp_path / 'net.py'}:Net", "--batch.micro_size", "32",
             "--batch.global_size", "64", "--optim.name", optimizer, "--optim.lr", "0.01",
             "--optim.weight_decay", "0.1", "--schedule.name", "constant", "--schedule.warmup",
             "0 steps", "--loop.eval_every", "5 steps"]
    plain = run(tmp_path / "plain", 20, *flags)
    cut = run(tmp_path / "cut", 1, *flags, processes=2, **FSDP2)
    run(cut, 20, *flags, processes=2, **FSDP2)  # resumed, where not every parameter has a state
    assert max(differences(plain, cut, "train/loss")) <= 1e-6
    norms = ([r["train/grad_norm"] for r in records(each) if "train/grad_norm" in r]
             for each in (plain, cut))
    for a, b in zip(*norms, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    left, right = weights(plain), weights(cut)
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("job", [MLP_JOB, GPT_JOB], ids=["classes", "text"])
def test_the_report_is_that_of_the_best_weights(tmp_path, job):
    """Three batches on two processes, and forwards for examples, in which all take part."""
    flags = [*job, "--batch.eval_size", "150", "--loop.eval_every", "5 steps", "--log.report",
             "true", "--log.examples", "5", "--optim.lr", "1e-2"]
    cut = run(tmp_path / "cut", 20, *flags, processes=2, **FSDP2)
    plain = run(tmp_path / "plain", 20, *flags)
    results = [json.loads((each / "best" / "evaluation.json").read_text()) for each in (cut, plain)]
    for each, result in zip((cut, plain), results, strict=True):
        with (each / "predictions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        [task] = result
        counts = [int(row["target"].split()[0]) if task == "text" else 1 for row in rows]
        total = sum(n * float(row["loss"]) for n, row in zip(counts, rows, strict=True))
        assert total / sum(counts) == pytest.approx(result[task]["loss"], rel=1e-6)
        assert len(json.loads((each / "examples" / "examples.json").read_text())) == 10
        assert (each / "report.html").exists()


def test_bf16_computes_in_bf16_and_keeps_and_sums_in_fp32(tmp_path):
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    result = fork([], 2, "tests/sharded_parts.py", **FSDP2, **bf16)
    assert result.stdout.count("all holds") == 2, result.stderr
    plain = run(tmp_path / "plain", 20, *RESNET_JOB, **bf16)
    cut = run(tmp_path / "cut", 20, *RESNET_JOB, processes=2, **FSDP2, **bf16)
    fp32 = run(tmp_path / "fp32", 20, *RESNET_JOB)
    assert max(differences(plain, cut, "train/loss")) <= 2**-7  # half of bf16's 8 bits
    assert max(differences(fp32, cut, "train/loss")) > 1e-5  # it is not fp32
    assert {v.dtype for v in weights(cut).values()} == {torch.float32, torch.int64}


KINDS = {"plain": (1, {}), "DDP": (2, {}), "FSDP2 of 2": (2, FSDP2), "FSDP2 of 3": (3, FSDP2)}
# BatchNorm, averages, and moments; a length that may change alters neither rate nor warm-up.
PAIRED = [*RESNET_JOB, "--optim.ema_half_life", "5 steps", "--schedule.name", "constant",
          "--schedule.warmup", "0 steps", "--loop.eval_every", "6 steps"]


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Runs of 12 steps of each kind, and an undisturbed one of 24."""
    folder = tmp_path_factory.mktemp("halves")
    for kind, (processes, environment) in KINDS.items():
        run(folder / kind, 12, *PAIRED, processes=processes, **environment)
    run(folder / "whole", 24, *PAIRED)
    return folder


@pytest.mark.parametrize("after", KINDS)
@pytest.mark.parametrize("before", KINDS)
def test_saved_by_any_kind_of_run_a_checkpoint_is_resumed_by_any_other(
    tmp_path, halves, before, after
):
    resumed = shutil.copytree(halves / before, tmp_path / "run")
    processes, environment = KINDS[after]
    run(resumed, 24, *PAIRED, processes=processes, **environment)
    assert_same_to_rounding(halves / "whole", resumed, 24, *ROUGH)
    for file in ("model.safetensors", "optimizer.safetensors", "ema.safetensors"):
        one, same = ({name: (tensor.shape, tensor.dtype) for name, tensor in load_file(
            halves / kind / "checkpoints/step_00000012" / file).items()}
            for kind in ("plain", before))
        assert one == same  # the one format


@pytest.mark.parametrize("processes", [2, 3])
def test_optimizers_states_and_nets_are_those_of_whole_models(processes):
    result = fork([], processes, "tests/sharded_parts.py", **FSDP2)
    assert result.stdout.count("all holds") == processes, result.stderr


def test_a_poisoned_sample_costs_one_update_and_is_named(tmp_path):
    flags = ["--schedule.name", "constant", "--schedule.warmup", "0 steps", *RESNET_JOB,
             "--loop.eval_every", "10 steps"]
    plain, cut = (
        run(tmp_path / str(n), 10, *flags, processes=n, script="tests/poisoned_train.py", **env)
        for n, env in ((1, {}), (2, FSDP2)))
    bad = [(each / "bad_steps.jsonl").read_text() for each in (plain, cut)]
    assert bad[0] == bad[1] and json.loads(bad[0])["step"] == 8
    for left, right in zip(losses(plain), losses(cut), strict=True):
        assert left == right is None or left == pytest.approx(right, abs=ROUGH[0])
    assert all(v.isfinite().all() for v in weights(cut).values())


def test_a_signal_to_one_process_stops_all_and_loses_no_step(tmp_path):
    flags = [*MLP_JOB, "--loop.eval_every", "7 steps"]
    plain = run(tmp_path / "plain", 40, *flags)
    stopped = run(tmp_path / "stopped", 40, *flags, processes=2, code=75,
                  script="tests/struck_train.py", STRIKE="SIGTERM evaluation 3 rank 1", **FSDP2)
    assert json.loads((stopped / "exit.json").read_text())["step"] < 40
    assert_same_to_rounding(plain, run(stopped, 40, *flags, processes=2, **FSDP2), 40)


def test_a_rate_found_before_the_run_leaves_no_trace(tmp_path):
    auto = run(tmp_path / "auto", 8, *MLP_JOB, "--optim.lr", "auto", processes=2, **FSDP2)
    rate = json.loads((auto / "lr_find.json").read_text())["suggestion"]
    given = run(tmp_path / "given", 8, *MLP_JOB, "--optim.lr", str(rate), processes=2, **FSDP2)
    assert losses(auto) == losses(given)
    assert all(v.equal(weights(given)[k]) for k, v in weights(auto).items())


def test_lr_find_sweeps_a_sharded_model(tmp_path):
    flags = ["--sweep.repeats", "2", "--sweep.steps", "40", "--sweep.verify", "3 steps", *MLP_JOB]
    found = []
    for processes, environment in ((1, {}), (2, FSDP2)):
        folder = tmp_path / str(processes)
        result = fork(["--run_dir", str(folder), *flags], processes, "lr_find.py", **environment)
        assert result.returncode == 0, result.stderr
        found.append(json.loads((folder / "lr_find.json").read_text()))
    for plain, cut in zip(*(one["repeats"] for one in found), strict=True):
        assert cut["losses"][:20] == pytest.approx(plain["losses"][:20], abs=1e-6)
    for plain, cut in zip(*(one["verified"] for one in found), strict=True):
        assert cut["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-2)


DISTILLED = {
    # Projectors are trained inside the student that is cut.
    "features": ([*RESNET_JOB, "--batch.eval_size", "64"],
                 ["--model.args.width", "4", "--optim.ema_half_life", "5 steps",
                  "--distill.features", json.dumps({"blocks.0 -> blocks.0": {"loss": "mse"}})]),
    # The student's head, tied to its embedding, is multiplied outside of its forward pass.
    "tokens": (GPT_JOB, ["--model.args.depth", "1"]),
}


@pytest.mark.parametrize("job", DISTILLED)
def test_a_student_is_cut_and_its_teachers_are_whole(tmp_path, job):
    flags, of_student = DISTILLED[job]
    flags = [*flags, "--loop.eval_every", "8 steps"]
    teacher = run(tmp_path / "teacher", 8, *flags)
    flags += [*of_student, "--distill.teachers", f"[{teacher}]"]
    plain, cut = (run(tmp_path / str(n), 16, *flags, processes=n, script="distill.py", **env)
                  for n, env in ((1, {}), (2, FSDP2)))
    assert_same_to_rounding(plain, cut, 16, *ROUGH)
    assert not any("training_only" in name for name in weights(cut))
    assert (cut / "distillation.json").exists()


def test_the_average_of_a_student_that_is_cut_is_no_teacher(tmp_path):
    result = fork(["--run_dir", str(tmp_path / "run"), *QUIET, "--distill.teachers", "[ema]",
                   "--optim.ema_half_life", "5 steps"], 2, "distill.py", **FSDP2)
    assert result.returncode == 2 and "distill.teachers: ema: a teacher is whole" in result.stderr


def test_an_accelerate_config_switches_it_on(tmp_path):
    config = tmp_path / "fsdp2.yaml"
    config.write_text(yaml.safe_dump({
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "use_cpu": False,
        "num_machines": 1, "num_processes": 2, "machine_rank": 0, "main_process_port": 0,
        "mixed_precision": "no", "fsdp_config": {
            "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_transformer_layer_cls_to_wrap": "BasicBlock", "fsdp_reshard_after_forward": True,
            "fsdp_cpu_ram_efficient_loading": True, "fsdp_state_dict_type": "SHARDED_STATE_DICT"},
    }))
    result = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config),
         "train.py", "--run_dir", str(tmp_path / "run"), "--loop.duration", "4 steps", *QUIET,
         *RESNET_JOB, "--model.args.width", "16", "--model.channels_last", "true"],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )
    assert "FSDP2 over 2 processes: 3 x BasicBlock" in result.stdout, result.stderr
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 0


def test_an_accelerator_that_knows_of_it_changes_no_bit(tmp_path):
    flags = [*MLP_JOB, "--optim.ema_half_life", "5 steps"]
    here, there = (run(tmp_path / Path(script).stem, 10, *flags, processes=2, script=script,
                       **FSDP2) for script in ("train.py", "tests/as_on_gpus.py"))
    assert_same_run(here, there)


REFUSED = {
    "FSDP1": ({"FSDP_VERSION": "1"}, [], 2, "fsdp_version: 2"),
    "Megatron": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, [], 1, "fsdp_version: 2"),
    "more dimensions": ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, [], 1, "fsdp_version: 2"),
    "no launcher": ({}, [], 1, "accelerate launch or torchrun"),
    "fp16": ({"ACCELERATE_MIXED_PRECISION": "fp16"}, [], 2, "set it to bf16 or 'no'"),
    "exact sum": ({}, ["--batch.exact_sum", "true"], 2, "batch.exact_sum: FSDP2 sums gradients"),
    "histograms": ({}, ["--log.histograms", "5 steps"], 2, "log.histograms: are of whole tensors"),
    "rprop": ({}, ["--optim.name", "rprop", "--optim.weight_decay", "0"], 2, "use adamw"),
    "another class": ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "Linaer"}, [], 2, "did you mean 'Linear'"),
    "no blocks": ({"FSDP_AUTO_WRAP_POLICY": "NO_WRAP", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, [],
                  2, "no repeated blocks"),
    "ignored modules": ({"FSDP_IGNORED_MODULES": "head"}, [], 2, "fsdp_ignored_modules"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, case):
    environment, flags, processes, message = REFUSED[case]
    result = fork(["--run_dir", str(tmp_path / "run"), *flags, *QUIET], processes,
                  **(FSDP2 | environment))
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


def names_of(model: nn.Module, blocks: list[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if any(module is b for b in blocks)]


def test_blocks_are_what_repeats_in_a_list_outermost_first():
    model = GPT(11, depth=3, width=8, heads=2)
    assert names_of(model, repeated_blocks(model)) == ["blocks.0", "blocks.1", "blocks.2"]
    model = MLP(4, 3, hidden=[5, 6])
    assert names_of(model, repeated_blocks(model)) == ["1", "4", "7"]
    model = ResNet(1, 10, width=8)
    assert {type(block).__name__ for block in repeated_blocks(model)} == {"BasicBlock"}
    stages = nn.Sequential(*(nn.Sequential(*(nn.Bilinear(2, 2, 2) for _ in range(2)))
                             for _ in range(2)))
    assert names_of(stages, repeated_blocks(stages)) == ["0.0", "0.1", "1.0", "1.1"]
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.ReLU())) == []


def test_what_is_tied_to_something_outside_is_no_block(monkeypatch):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.head = nn.Linear(4, 4)
            self.head.weight = self.layers[1].weight

    model = Tied()
    assert names_of(model, _blocks(model, None)) == ["layers.0", "layers.2"]
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")
    assert _blocks(model, None) == []
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Linear, Tied")
    assert names_of(model, _blocks(model, None)) == ["layers.0", "layers.2"]
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Block")
    with pytest.raises(UserError, match="the model has no 'Block'"):
        _blocks(model, None)
