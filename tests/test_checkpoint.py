"""What a checkpoint holds, which one is trusted, how many are kept; without starting a script."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from trainlib.checkpoint import CheckpointOptions, Checkpoints, SaveFailed, checkpoints
from trainlib.config import UserError
from trainlib.ema import Ema
from trainlib.progress import Progress

IDENTITY = {"seed": 0, "batch.global_size": 4, "batch.micro_size": 2, "data": "ab12"}


class Job:
    """A small net under training, and the checkpoints of its run folder."""

    def __init__(self, folder: Path, seed: int = 0, width: int = 3, identity=None, **options):
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        self.optimizer = torch.optim.AdamW(self.module.parameters())
        self.ema = Ema(self.module, 3)
        self.progress, self.said = Progress(), []
        self.accelerator = Accelerator(cpu=True)
        self.checkpoints = Checkpoints(
            folder, self.accelerator, CheckpointOptions(**options), 100, 10,
            IDENTITY | (identity or {}), "seed: 0\n",
        )

    def find(self):
        return self.checkpoints.find_start(self.module)

    def resume(self):
        start = self.find()
        start.restore(self.accelerator, self.module, self.optimizer, self.ema)
        self.progress = Progress(**start.progress)
        self.open()
        return start

    def open(self):
        self.checkpoints.open(self.said.append, lambda: None)
        return self

    def train(self, *steps: int):
        """Trains to each of these steps and takes a checkpoint there."""
        for step in steps:
            while self.progress.step < step:
                draws = torch.Generator().manual_seed(self.progress.step)
                self.module(torch.randn(8, 2, generator=draws)).square().sum().backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.ema.update(self.progress.step, True)
                self.progress.step += 1
            self.checkpoints.save(self.module, self.optimizer, self.ema, self.progress)
            self.checkpoints.wait()
        return self

    def tensors(self):
        return self.module.state_dict() | {f"ema {n}": t for n, t in self.ema.tensors().items()}


@pytest.fixture
def folder(tmp_path):
    """A run folder with the checkpoints of steps 4 and 6."""
    Job(tmp_path / "run").open().train(2, 4, 6)
    return tmp_path / "run"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_checkpoint_is_tensors_and_json(folder):
    assert names(folder) == ["step_00000004", "step_00000006"]  # two are kept
    newest = folder / "checkpoints" / "step_00000006"
    assert {path.name for path in newest.iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json",
        "config.yaml", "MANIFEST.json",
    }
    state = json.loads((newest / "state.json").read_text())
    assert state["step"] == 6 and state["identity"] == IDENTITY
    assert state["machine"]["torch"] == torch.__version__ and state["machine"]["world_size"] == 1
    assert (newest / "config.yaml").read_text() == "seed: 0\n"
    assert "0.weight|exp_avg" in load_file(newest / "optimizer.safetensors")


def test_what_is_resumed_goes_on_to_the_same_bits(folder, tmp_path):
    undisturbed = Job(tmp_path / "other").open().train(20)
    resumed = Job(folder, seed=1)
    start = resumed.resume()
    assert start.notes == ["resumed at step 6 of 100, from checkpoints/step_00000006"]
    resumed.train(20)
    assert all(t.equal(undisturbed.tensors()[n]) for n, t in resumed.tensors().items())
    assert resumed.progress == undisturbed.progress


def test_without_a_checkpoint_a_run_starts_at_zero(tmp_path):
    start = Job(tmp_path / "run").find()
    assert (start.path, start.progress, start.log_sizes, start.notes) == (None, {}, {}, [])


FILES = ["model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json",
         "config.yaml", "MANIFEST.json"]
DAMAGES = {
    "a flipped bit": lambda file, content: file.write_bytes(
        content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]),
    "truncated": lambda file, content: file.write_bytes(content[:-1]),
    "empty": lambda file, content: file.write_bytes(b""),
    "missing": lambda file, content: file.unlink(),
    "a pickle": lambda file, content: file.write_bytes(evil_pickle(file.parent / "EVIL")),
    "a link": lambda file, content: (file.rename(file.parent.parent / "aside"),
                                     file.symlink_to(file.parent.parent / "aside")),
}


def evil_pickle(proof: Path) -> bytes:
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(proof),))

    return pickle.dumps(Evil())


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_found_named_and_the_one_before_taken(folder, file, damage):
    newest = folder / "checkpoints" / "step_00000006"
    DAMAGES[damage](newest / file, (newest / file).read_bytes())
    job = Job(folder, seed=1)
    start = job.resume()
    assert start.path.name == "step_00000004"
    assert start.notes[0].startswith(f"checkpoints/step_00000006 is damaged and left out: {file}:")
    assert not (newest / "EVIL").exists()
    job.train(6, 8)  # over the ruin
    assert names(folder) == ["aside"] * (damage == "a link") + ["step_00000006", "step_00000008"]
    assert Job(folder).find().notes == ["resumed at step 8 of 100, from checkpoints/step_00000008"]


def test_a_damaged_one_never_costs_a_whole_one(folder):
    """Of keep=2, the ruin is not one; it goes with the next checkpoint."""
    (folder / "checkpoints" / "step_00000006" / "state.json").write_text("{}")
    job = Job(folder)
    job.resume()
    assert names(folder) == ["step_00000004", "step_00000006"]  # nothing touched by looking
    job.train(5)
    assert names(folder) == ["step_00000004", "step_00000005"]


def test_if_all_are_damaged_the_run_does_not_start(folder):
    for name in names(folder):
        (folder / "checkpoints" / name / "MANIFEST.json").write_text("{}")
    with pytest.raises(UserError, match="(?s)step_00000006.*step_00000004.*fresh start would"):
        Job(folder).find()


@pytest.mark.parametrize("change, message", [
    ({"seed": 1}, "seed: 0 in the run so far, 1 here"),
    ({"batch.global_size": 8}, "batch.global_size: 4 in the run so far, 8 here"),
    ({"batch.micro_size": 4}, "batch.micro_size: 2 in the run so far, 4 here"),
    ({"data": "ff"}, "data.source: these are not the data that the run was trained on"),
], ids=["seed", "global size", "micro size", "data"])
def test_the_checkpoint_of_another_run_is_refused(folder, change, message):
    with pytest.raises(UserError, match=message):
        Job(folder, identity=change).find()


def test_the_checkpoint_of_another_model_is_refused_by_tensor(folder):
    with pytest.raises(UserError, match=r"model: .*0.weight is \['float32', \[3, 2\]\] there"):
        Job(folder, width=4).find()


def test_a_shorter_run_and_a_newer_format_are_refused(folder, monkeypatch):
    job = Job(folder)
    job.checkpoints.total_steps = 5
    with pytest.raises(UserError, match="loop.duration: the run stands at step 6"):
        job.find()
    monkeypatch.setattr(checkpoints, "FORMAT", 2)
    writer = Job(folder)
    writer.resume()
    writer.train(7)
    with pytest.raises(UserError, match="has format 2, this code reads up to 1"):
        Job(folder).find()


def test_what_may_change_bits_is_said(folder, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert "torch: 2." in Job(folder).find().notes[1]
    assert "9.9 now: the curve may differ from here on" in Job(folder).find().notes[1]


def test_weights_that_are_not_finite_are_never_saved(folder):
    job = Job(folder)
    job.resume()
    with torch.no_grad():
        job.module[2].bias.fill_(float("nan"))
    job.progress.step = 8
    job.train(8)
    assert names(folder) == ["step_00000004", "step_00000006"]
    assert job.said == ["not written: checkpoints/step_00000008: 2.bias is not finite, and worth "
                        "nothing; training goes on"]
    with pytest.raises(SaveFailed, match="checkpoints/step_00000008: 2.bias is not finite"):
        job.checkpoints.finish()
    assert SaveFailed.exit_code == 4


def test_a_buffer_may_hold_infinity(tmp_path):
    job = Job(tmp_path / "run").open()
    job.module.register_buffer("mask", torch.tensor([-torch.inf]))
    job.train(1)
    assert not job.said and names(tmp_path / "run") == ["step_00000001"]


def test_a_save_that_fails_leaves_the_others_and_is_tried_again(folder, monkeypatch):
    job = Job(folder)
    job.resume()
    real = checkpoints.save_file

    def full(tensors, path):
        path.write_bytes(b"half")
        raise checkpoints.SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    job.train(8)
    assert names(folder) == ["step_00000004", "step_00000006"] and len(job.said) == 1
    monkeypatch.setattr(checkpoints, "save_file", real)
    job.train(10)
    job.checkpoints.finish()
    assert names(folder) == ["step_00000006", "step_00000010"]


def test_no_checkpoint_speaks_of_best_weights_that_are_not_there(folder, monkeypatch):
    job = Job(folder)
    job.resume()
    real, fails = checkpoints.save_file, []

    def full(tensors, path):
        if "best" in str(path) and fails:
            raise checkpoints.SafetensorError("No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    fails.append(True)
    job.checkpoints.export("best", job.module, {}, {})
    job.train(8)
    assert names(folder) == ["step_00000004", "step_00000006"] and len(job.said) == 2
    fails.clear()
    job.train(9)  # which writes best/ first, as it was
    job.checkpoints.finish()
    assert names(folder) == ["step_00000006", "step_00000009"]
    best = load_file(folder / "best" / "model.safetensors")["0.weight"]
    assert not best.equal(job.module[0].weight)


def test_best_weights_that_are_gone_are_written_again_by_the_next_checkpoint(folder):
    """As where the run folder was removed: from the copy, for training has gone on."""
    job = Job(folder)
    job.resume()
    job.checkpoints.export("best", job.module, {}, {})
    job.checkpoints.wait()
    best = folder / "best" / "model.safetensors"
    written = best.read_bytes()
    shutil.rmtree(folder / "best")
    job.train(8)
    assert best.read_bytes() == written
    shutil.rmtree(folder / "best")
    with pytest.raises(SaveFailed, match="best.* is gone"):
        job.checkpoints.load_best(job.module)


def test_leftovers_go_with_the_next_save(folder):
    half = folder / "checkpoints" / ".tmp_step_00000008.host.1"
    shutil.copytree(folder / "checkpoints" / "step_00000006", half)
    job = Job(folder)
    job.resume()
    assert half.exists()
    job.train(7)
    assert names(folder) == ["step_00000006", "step_00000007"]


@pytest.mark.parametrize("every, steps, seconds", [
    ("40 steps", [40, 80, 100], None), ("1 epoch", [*range(3, 100, 3), 100], None),
    ("50%", [50, 100], None), ("1 minute", [100], 60.0), ("0.5 hours", [100], 1800.0),
])
def test_checkpoints_are_due_by_steps_epochs_or_the_clock(tmp_path, every, steps, seconds):
    job = Job(tmp_path / "run", every=every)
    assert [s for s in range(101) if job.checkpoints.is_due(s, False)] == steps
    assert job.checkpoints.every_seconds == seconds


def test_a_checkpoint_is_asked_for_once(tmp_path):
    job = Job(tmp_path / "run").open()
    assert job.checkpoints.is_due(3, True) and not job.checkpoints.is_due(0, True)
    job.train(3)
    assert not job.checkpoints.is_due(3, True) and job.checkpoints.is_due(4, True)


@pytest.mark.parametrize("every", ["0 steps", "often", "5 days", "-1 minutes", ""])
def test_a_time_that_is_none_is_refused(every):
    with pytest.raises(ValueError, match="an interval reads like"):
        CheckpointOptions(every=every)


def test_exports_replace_one_another_and_are_said_if_they_fail(tmp_path):
    job = Job(tmp_path / "run").open()
    for value in (1.0, 2.0):
        with torch.no_grad():
            job.module[0].bias.fill_(value)
        job.checkpoints.export("best", job.module, {"task": ["a"]}, {"task": {"loss": value}})
        job.checkpoints.wait()
        best = tmp_path / "run" / "best"
        assert load_file(best / "model.safetensors")["0.bias"].tolist() == [value] * 3
        assert json.loads((best / "evaluation.json").read_text()) == {"task": {"loss": value}}
    assert os.listdir(tmp_path / "run") == ["best"]
    best.rename(tmp_path / "run" / "elsewhere")
    (tmp_path / "run").rename(tmp_path / "gone")
    (tmp_path / "run").write_text("a file")
    job.checkpoints.export("best", job.module, {}, {})
    with pytest.raises(SaveFailed, match="best/"):
        job.checkpoints.finish()
