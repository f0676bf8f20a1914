"""Out of memory: the micro-batch that fits is found without a trace, and the end gives advice."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from launching import assert_same_run, launch, train, weights
from torch import nn
from warm import fork

from trainlib import memory, micro_size, optim
from trainlib.data import BatchOptions

TIGHT = "tests/tight_train.py"
QUIET = ["--log.trackers", "[]", "--log.report", "false"]
SHORT = [*QUIET, "--loop.duration", "6 steps", "--log.every", "1"]
# Dropout, BatchNorm and augmentation: all that depends on the micro size.
RESNET = [*SHORT, "--model.name", "resnet", "--model.args.width", "8", "--data.augment.flip", "0.5",
          "--optim.ema_half_life", "3 steps"]
MLP = [*SHORT, "--schedule.name", "constant", "--schedule.warmup", "0 steps"]
AUTO = ["--batch.micro_size", "auto"]


def tight(run: Path, *flags: str, processes: int = 1, code: int = 0, **environment: str):
    result = fork(["--run_dir", str(run), *flags], processes, TIGHT, **environment)
    assert result.returncode == code, result.stdout + result.stderr
    return result


def size_in(run: Path) -> int:
    return yaml.safe_load((run / "config.yaml").read_text())["batch"]["micro_size"]


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory):
    """The run that is given the number from the start."""
    return train(tmp_path_factory.mktemp("given") / "run", *RESNET, "--batch.micro_size", "16")


@pytest.mark.parametrize("processes", [1, 2])
def test_the_search_leaves_no_trace(tmp_path, sixteen, processes):
    run = tmp_path / "run"
    only = {"ONLY": "1"} if processes > 1 else {}  # all follow the one with the least memory
    tight(run, *RESNET, *AUTO, processes=processes, LIMIT="20", **only)
    assert size_in(run) == 16
    assert_same_run(run, sixteen)
    too_large = "64, 32" if processes == 1 else "32"
    assert (f"batch.micro_size auto: 16, the first that fits; {too_large} did not; with BatchNorm "
            "and augmentation the curve depends on it") in (run / "log.txt").read_text()


def test_a_run_that_goes_on_keeps_the_number(tmp_path):
    run, given = tmp_path / "run", train(tmp_path / "given", *MLP, "--batch.micro_size", "16")
    tight(run, *MLP, *AUTO, "--loop.duration", "3 steps", LIMIT="20")
    tight(run, *MLP, *AUTO)  # all would fit now
    assert size_in(run) == 16
    assert "batch.micro_size auto: 16, as found before" in (run / "log.txt").read_text()
    assert all(w.equal(weights(given)[name]) for name, w in weights(run).items())
    result = tight(run, *MLP, "--batch.micro_size", "64", code=2)
    assert "batch.micro_size (16 there, 64 here)" in result.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_where_nothing_fits_it_ends_with_code_6_and_advice(tmp_path, processes):
    result = tight(tmp_path / "run", *MLP, *AUTO, processes=processes, code=6, LIMIT="0", ONLY="0")
    assert ("batch.micro_size auto: a micro-batch of 1 does not fit" in result.stderr
            and "accelerate_configs/fsdp2.yaml" in result.stderr)
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


def test_a_process_that_runs_out_later_ends_all_and_names_the_option_and_its_value(tmp_path):
    run = tmp_path / "run"
    result = launch(["--run_dir", str(run), *MLP, *AUTO], 2, TIGHT, LIMIT="20", AFTER="9", ONLY="1")
    assert result.returncode != 0  # the launcher has ended the other one
    end = json.loads((run / "exit.json").read_text())
    assert end["code"] == 6 and end["step"] > 0
    assert end["reason"].startswith("CUDA out of memory. Tried to allocate 2.50 GiB; begin a run "
                                    "in another --run_dir with --batch.micro_size 8 (now 16;")
    assert "--model.gradient_checkpointing" in end["reason"] and "fsdp2.yaml" in end["reason"]


def test_an_evaluation_that_runs_out_names_its_own_option(tmp_path):
    result = tight(tmp_path / "run", *MLP, "--batch.eval_size", "100", code=6, EVAL_LIMIT="60")
    assert "--batch.eval_size 50 (now 100)" in result.stderr and "micro_size" not in result.stderr


def test_distilling_tries_the_teachers_too(tmp_path):
    teacher = train(tmp_path / "teacher", *SHORT)
    flags = [*MLP, "--distill.teachers", f"[{teacher}]"]
    given = train(tmp_path / "given", *flags, "--batch.micro_size", "16", script="distill.py")
    run = tmp_path / "run"
    tight(run, *flags, *AUTO, SCRIPT="distill", LIMIT="20")
    assert size_in(run) == 16
    assert_same_run(run, given)


def test_two_students_to_compare_have_one_micro_size(tmp_path):
    result = tight(tmp_path / "run", *MLP, *AUTO, "--distill.teachers", "[runs/none]",
                   "--distill.baseline", SCRIPT="distill", code=2)
    assert "distill.baseline" in result.stderr and "give both the number" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_sweep_and_a_dry_run_find_it_too(tmp_path):
    sweep = ["--sweep.steps", "20", "--batch.global_size", "64"]
    for name, size in (("given", "16"), ("found", "auto")):
        ended = tight(tmp_path / name, *sweep, "--batch.micro_size", size, SCRIPT="lr_find",
                      LIMIT="20")
    assert "batch.micro_size auto: 16, the first that fits; 64, 32 did not" in ended.stdout
    given, found = (json.loads((tmp_path / name / "lr_find.json").read_text())["losses"]
                    for name in ("given", "found"))
    assert given == found
    result = tight(tmp_path / "run", *AUTO, "--dry_run", LIMIT="20")
    assert "in 4 micro-batches of 16" in result.stdout and not (tmp_path / "run").exists()


def test_the_cpu_allocators_own_error_counts(tmp_path):
    # Outputs of 64 KiB a sample, kept by each of linear layer, ReLU and dropout: 4,096 samples need
    # 768 MiB of the 600.
    flags = [*MLP, "--loop.duration", "1 steps", "--batch.global_size", "8192",
             "--model.args.hidden", "[16384]"]
    tight(tmp_path / "run", *flags, *AUTO, HOST_MIB="600")
    assert 1 < size_in(tmp_path / "run") <= 2048
    assert "; 8192, 4096" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("flags, environment, what", [
    ([], {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP2"),
    (["--model.name", "resnet", "--model.sync_batch_norm"], {}, "model.sync_batch_norm"),
])
def test_models_that_communicate_in_their_forward_want_a_number(tmp_path, flags, environment, what):
    processes = 2 if environment else 1
    result = tight(tmp_path / "run", *SHORT, *AUTO, *flags, processes=processes, code=2,
                   **environment)
    assert f"batch.micro_size: auto does not go with {what}" in result.stderr
    assert "give a number" in result.stderr


def real_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)  # bytes beyond any address space
    return caught.value


def test_what_counts_as_out_of_memory():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."), torch.cuda.OutOfMemoryError(), MemoryError(),
        real_error(), RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ):
        assert memory.is_out_of_memory(error), error
        assert isinstance(memory.advised(error, {}), memory.OutOfMemory)
    for error in (RuntimeError("shape '[3]' is invalid"), ValueError("out of memory"),
                  RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), KeyboardInterrupt()):
        assert not memory.is_out_of_memory(error) and memory.advised(error, {}) is error


def test_the_advice_names_what_can_still_be_set():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")
    recipe = {"batch.micro_size": 1, "model.gradient_checkpointing": True}
    assert str(memory.advised(error, recipe)) == (
        f"CUDA out of memory. Tried to allocate 2.50 GiB; {memory.SHARD}")
    recipe["batch.micro_size"] = 24
    assert "--batch.micro_size 12 (now 24;" in str(memory.advised(error, recipe))
    assert "processes on a machine" in str(memory.advised(real_error(), recipe))


@pytest.mark.parametrize("happens, words", [
    ("MemoryError", "the machine's memory is full in a data worker; run"),
    ("numpy", "is full in a data worker (numpy"),  # whose error torch cannot make again
    ("kill", "a data worker was killed, which is what a machine does whose memory is full, unless"),
])
def test_a_data_worker_without_memory_ends_the_run_with_the_values_to_set(
    tmp_path, happens, words
):
    run = tmp_path / "run"
    flags = [*MLP, "--data.in_memory", "false", "--data.workers", "2"]
    result = tight(run, *flags, WORKER=happens, code=6)
    reason = json.loads((run / "exit.json").read_text())["reason"]
    assert words in reason and "again with --data.workers 1 (now 2)" in reason
    assert "\n" not in reason and "in_memory" not in reason
    assert "Traceback" not in result.stderr


def test_a_worker_that_a_watchdog_has_killed_says_nothing_of_memory(monkeypatch):
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert memory.is_out_of_memory(error)
    monkeypatch.setattr(memory, "ended_on_purpose", {7})
    assert not memory.is_out_of_memory(error)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", ["train", "distill"])
def test_memory_that_does_not_suffice_for_the_report_costs_a_line_and_not_the_run(
    tmp_path, processes, script
):
    run = tmp_path / "run"
    teachers = ["--distill.teachers", f"[{train(tmp_path / 'teacher', *SHORT)}]"]
    flags = [*MLP, "--log.report", "true", *(teachers if script == "distill" else [])]
    only = {"ONLY": str(processes - 1)}  # of two, one: the other is not left waiting
    result = tight(run, *flags, processes=processes, AT_END="1", SCRIPT=script, **only)
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    lines = 2 if script == "distill" else 1  # what the teachers say, and the predictions
    assert result.stdout.count("CUDA out of memory. Tried to allocate 2.50 GiB") == lines
    assert "weights and metrics are written" in result.stdout
    assert (run / "final" / "model.safetensors").exists() and (run / "curves.png").exists()
    assert not (run / "predictions.csv").exists() and "Traceback" not in result.stderr


def test_advice_for_the_machine_names_only_what_is_not_set_yet():
    in_memory = {"data.in_memory": True, "data.workers": 0}
    assert "again with --data.in_memory false, or" in str(memory.advised(MemoryError(), in_memory))
    least = {"data.in_memory": False, "data.workers": 0}
    assert str(memory.advised(MemoryError(), least)) == (
        "the machine's memory is full; take fewer processes on a machine")


@pytest.mark.parametrize("global_size", [1, 2, 3, 5, 50, 64, 1000, 1025])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_sizes_fall_to_1_and_leave_no_sample_alone(global_size, world_size):
    sizes = micro_size.candidates(global_size, world_size)
    assert sizes[-1] == 1 and sizes == sorted(set(sizes), reverse=True)
    assert all(size == 1 or global_size % size != 1 for size in sizes)
    if global_size % (largest := -(-global_size // world_size)) != 1:
        assert sizes[0] == largest


class Needy(nn.Module):
    """Takes so many samples at a time, and no fewer than 2, as BatchNorm does."""

    def __init__(self, most: int):
        super().__init__()
        self.linear, self.norm, self.most = nn.Linear(3, 4), nn.BatchNorm1d(4), most
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs):
        hidden = self.dropout(self.norm(self.linear(inputs)))
        if len(inputs) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden


def settle(model: Needy, optimizer: torch.optim.Optimizer, run_dir: Path) -> int:
    options = SimpleNamespace(
        batch=BatchOptions(global_size=16, micro_size="auto"), optim=optim.OptimOptions(),
        model=SimpleNamespace(sync_batch_norm=False), data=SimpleNamespace(augment=0),
    )
    options.replaced = lambda values: SimpleNamespace(batch=SimpleNamespace(
        micro_size=values["batch.micro_size"]))
    found, _ = micro_size.settle_micro_size(
        options, run_dir, Accelerator(cpu=True), model, optimizer,
        (torch.tensor([[1.0, 2, 3], [0, 5, 1]]), {"y": torch.ones(2)}),
        lambda *both: (*both, None), lambda targets: {}, lambda output, *_: [output],
    )
    return found.batch.micro_size


@pytest.mark.parametrize("name", ["adamw", "sgd", "adagrad", "rprop", "asgd", "adafactor", "muon"])
def test_weights_buffers_state_and_random_numbers_are_as_before(tmp_path, name):
    torch.manual_seed(0)
    model = Needy(5)
    model = nn.Sequential(model, nn.Linear(4, 4), nn.Linear(4, 2)) if name == "muon" else model
    decay = 0.0 if name == "rprop" else 0.1
    optimizer = optim.build_optimizer(optim.OptimOptions(name=name, weight_decay=decay), model)
    groups = optimizer.state_dict()["param_groups"]
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"],
                            torch.get_rng_state()))
    assert settle(model, optimizer, tmp_path) == 4
    after = (model.state_dict(), optimizer.state_dict()["state"], torch.get_rng_state())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == groups
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_a_net_refuses_below_what_fits_is_said(tmp_path):
    model = Needy(1)
    optimizer = optim.build_optimizer(optim.OptimOptions(), model)
    with pytest.raises(memory.OutOfMemory, match="Expected more than 1 value per channel"):
        settle(model, optimizer, tmp_path)


def test_an_error_that_is_not_of_memory_passes(tmp_path):
    model = Needy(99)
    model.dropout = nn.Linear(5, 5)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        settle(model, optim.build_optimizer(optim.OptimOptions(), model), tmp_path)
