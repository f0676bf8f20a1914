"""Parameters that no gradient reaches are named, and BatchNorms that share their statistics."""

import json
from types import SimpleNamespace

import pytest
import torch
from launching import assert_same_run, train
from torch import nn
from warm import fork

from trainlib.config import UserError
from trainlib.models.resnet import ResNet
from trainlib.sharding import place

SHORT = ["--loop.duration", "6 steps", "--log.every", "1", "--batch.micro_size", "16",
         "--log.trackers", "[]", "--log.report", "false"]
NET = """
from torch import nn
class Net(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.used = nn.Linear(inputs, classes)
        self.spare = nn.Linear(3, 2)
    def forward(self, inputs):
        return self.used(inputs.flatten(1))
"""
WAYS = {
    "one process, one micro-batch": (1, ["--batch.micro_size", "64"], {}),
    "one process": (1, [], {}),
    "exact sum": (2, [], {}),
    "FSDP2": (2, [], {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
}


@pytest.fixture
def net(tmp_path) -> list[str]:
    """Flags for a net with a layer that nothing uses."""
    (tmp_path / "net.py").write_text(NET)
    return ["--model.name", f"{tmp_path / 'net.py'}:Net"]


@pytest.mark.parametrize("way", WAYS)
def test_a_parameter_without_gradient_is_named_once_and_stays(tmp_path, net, way):
    processes, flags, environment = WAYS[way]
    run = tmp_path / "run"
    result = fork(["--run_dir", str(run), *SHORT, *net, *flags], processes, **environment)
    assert json.loads((run / "exit.json").read_text())["code"] == 0, result.stderr
    line = "no gradient reached spare.weight, spare.bias in the first step"
    assert result.stdout.count(line) == 1
    assert "--model.freeze '[spare.weight, spare.bias]'" in result.stdout


def test_frozen_as_the_line_says_nothing_more_is_said(tmp_path, net):
    frozen = ["--model.freeze", "[spare.weight, spare.bias]"]
    for processes, flags in ((1, []), (2, ["--batch.exact_sum", "false"])):
        run = tmp_path / str(processes)
        result = fork(["--run_dir", str(run), *SHORT, *net, *frozen, *flags], processes)
        assert result.returncode == 0 and "no gradient" not in result.stdout


def test_where_ddp_would_wait_for_it_the_run_ends_with_what_to_do(tmp_path, net):
    result = fork(["--run_dir", str(tmp_path / "run"), *SHORT, *net, "--batch.exact_sum", "false"],
                  2)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    for part in ("no gradient reached spare.weight, spare.bias, and DDP waits", "--model.freeze",
                 "--batch.exact_sum true"):
        assert part in result.stderr


FIRST = """
from torch import nn
class Net(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.used, self.extra = nn.Linear(inputs, classes), nn.Linear(inputs, classes)
        self.number = 0
    def forward(self, inputs):
        self.number += 1
        out = self.used(inputs.flatten(1))
        return out + self.extra(inputs.flatten(1)) if self.number % 2 else out
"""


def test_a_parameter_that_the_last_micro_batch_leaves_out_is_as_unused_to_ddp(tmp_path):
    (tmp_path / "net.py").write_text(FIRST)
    flags = [*SHORT, "--model.name", f"{tmp_path / 'net.py'}:Net", "--batch.exact_sum", "false"]
    result = fork(["--run_dir", str(tmp_path / "run"), *flags], 2)  # 2 x 2 micro-batches
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "no gradient reached extra.weight, extra.bias, and DDP waits" in result.stderr
    result = fork(["--run_dir", str(tmp_path / "all"), *SHORT, "--batch.exact_sum", "false"], 2)
    assert json.loads((tmp_path / "all" / "exit.json").read_text())["code"] == 0, result.stderr


RESNET = ["--model.name", "resnet", "--model.args.width", "8", "--model.sync_batch_norm", "true"]


def test_one_process_has_all_statistics_already(tmp_path):
    assert_same_run(train(tmp_path / "sync", *SHORT, *RESNET),
                    train(tmp_path / "plain", *SHORT, *RESNET[:-2]))


def test_several_processes_on_cpus_cannot_share_them(tmp_path):
    result = fork(["--run_dir", str(tmp_path / "run"), *SHORT, *RESNET], 2)
    assert result.returncode == 2 and "synchronises BatchNorm on GPUs only" in result.stderr
    assert not (tmp_path / "run").exists()
    result = fork(["--run_dir", str(tmp_path / "run"), *SHORT, "--model.sync_batch_norm", "true"])
    assert result.returncode == 2 and "the net has no BatchNorm" in result.stderr


def test_batch_norms_are_torchs_synchronised_ones_with_their_state_and_hooks(monkeypatch):
    # Two processes with GPUs, by name only: the net stays where it is.
    gpus = SimpleNamespace(device=torch.device("cuda"), num_processes=2)
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)
    model, reference = ResNet(1, 10, width=4), ResNet(1, 10, width=4)
    reference.load_state_dict(model.state_dict())
    calls = []
    model.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    [line] = place(model, gpus, True)
    assert "share their statistics over 2 processes: the curve depends" in line
    torchs = nn.SyncBatchNorm.convert_sync_batchnorm(reference)
    for (name, ours), (other, theirs) in zip(
        model.named_modules(), torchs.named_modules(), strict=True
    ):
        assert name == other and type(ours) is type(theirs)
        if isinstance(ours, nn.SyncBatchNorm):
            assert vars(ours).keys() >= {"process_group", "momentum", "eps"}
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(model.eval()(images), torchs.eval()(images))
    assert calls == [1]


def test_a_batch_norm_that_does_more_is_refused():
    class WithActivation(nn.BatchNorm2d):
        def forward(self, images):
            return super().forward(images).relu()

    gpus = SimpleNamespace(device=torch.device("cuda"), num_processes=2)
    with pytest.raises(UserError, match="WithActivation does more than torch's"):
        place(nn.Sequential(WithActivation(3)), gpus, True)
