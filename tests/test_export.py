"""Exported models: what the net itself says, at any number of samples, without this repository."""

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from launching import export as write_run
from torch import nn

from trainlib import export, models
from trainlib.card import loading
from trainlib.config import UserError
from trainlib.exported import FILES, loading_snippet
from trainlib.finished import Finished
from trainlib.models import ModelOptions

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
NEEDS_ONNX = pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript or onnxruntime is missing")
FORMATS = ["torch_export", pytest.param("onnx", marks=NEEDS_ONNX)]

SCALE = {"columns": ["price"], "mean": [3.0], "deviation": [2.0]}
CLASSES = ["cat", "dog", "bird"]
JOBS = {
    "mlp": (ModelOptions(), (4,), {"kind": ("classification", CLASSES)}),
    "channels_last": (ModelOptions(name="resnet", channels_last=True), (3, 9, 7),
                      {"kind": ("classification", CLASSES)}),
    "tasks": (ModelOptions(name="resnet"), (1, 8, 8),
              {"kind": ("classification", CLASSES), "price": ("regression", SCALE),
               "tags": ("multilabel", ["rude", "spam"])}),
    "unet": (ModelOptions(name="unet", args={"width": 4}), (1, 9, 7),
             {"mask": ("segmentation", ["paper", "ink"])}),
    "gpt": (ModelOptions(name="gpt", args={"depth": 2, "width": 16, "heads": 2}), (12,),
            {"text": ("language_modeling", [])}),
}


def make_run(folder: Path, job: str = "mlp") -> Path:
    """A net with fresh weights, as a run leaves it."""
    given, shape, tasks = JOBS[job]
    counts = {name: len(labels["columns"] if isinstance(labels, dict) else labels)
              for name, (_, labels) in tasks.items()}
    is_text = job == "gpt"
    options = models.complete(
        given, shape, counts if len(counts) > 1 else next(iter(counts.values())),
        (0, 30) if is_text else None)
    torch.manual_seed(0)
    size = (shape[0], 1, 1)[: len(shape)]
    scale = () if is_text else (torch.rand(size), torch.rand(size) + 0.5)
    config = yaml.safe_dump({
        "model": options.model_dump(), "data": {"tokenizer": "bytes" if is_text else None},
        "tasks": {name: {"kind": kind} for name, (kind, _) in tasks.items()}})
    labels = {name: labels for name, (_, labels) in tasks.items()}
    write_run(folder / "best", models.build_model(options, *scale), config, labels, {})
    return folder


@pytest.mark.parametrize("to", FORMATS)
def test_the_file_says_what_the_net_says_in_an_empty_folder(to, tmp_path):
    program, wanted = "import os, sys\n", {}
    if to == "onnx":  # which may lie where -I does not look
        place = Path(importlib.util.find_spec("onnxruntime").origin).parent.parent
        program += f"sys.path.append({str(place)!r})\n"
    for job in JOBS:
        run = Finished(make_run(tmp_path / "runs" / job, job))
        file = tmp_path / "empty" / job / FILES[to]
        file.parent.mkdir(parents=True)
        export.export(run, to, file)
        assert [path.name for path in file.parent.iterdir()] == [file.name]
        net, shape = models.load_model(tmp_path / "runs" / job), run.model.input_shape
        with torch.no_grad():
            wanted[job] = net(torch.zeros(3, *shape, dtype=getattr(torch, run.model.input_dtype)))
        program += f"os.chdir({job!r})\nprint('JOB')\n{loading_snippet(to, run.kinds)}"
        program += "os.chdir('..')\n"
    program += "assert not [name for name in sys.modules if 'trainlib' in name]\n"
    said = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path / "empty",
                          capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    said = dict(zip(JOBS, said.stdout.split("JOB\n")[1:], strict=True))
    # Zeros are no samples of nothing: the scale of the inputs shows in what is said of them.
    for job in ("mlp", "channels_last"):
        assert str([CLASSES[k] for k in wanted[job].argmax(1)]) in said[job]
    assert str(wanted["gpt"][0, -1].argmax().item()) in said["gpt"]
    price = wanted["tasks"]["price"][0].item() * SCALE["deviation"][0] + SCALE["mean"][0]
    [found, *_] = [line for line in said["tasks"].splitlines() if line.startswith("price")]
    assert float(found.split(":")[1].rstrip("}")) == pytest.approx(price, rel=1e-5)
    assert "tags" in said["tasks"] and "3, 9, 7" in said["unet"]


def test_what_stands_in_the_file(tmp_path):
    run = Finished(make_run(tmp_path, "tasks"))
    export.export(run, "torch_export", tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as parts:
        held = {name: parts.read(name) for name in parts.namelist()}
    assert not [name for name, part in held.items() if str(export.__file__).encode() in part
                or b"stack_trace" in part or b"site-packages" in part]
    extra = {"about.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    about = json.loads(extra["about.json"])
    assert about["input"]["shape"] == [1, 8, 8] and about["input"]["dtype"] == "float32"
    assert about["tasks"]["kind"]["labels"] == CLASSES
    assert about["tasks"]["price"]["labels"] == SCALE
    inputs = torch.rand(7, 1, 8, 8)
    with torch.no_grad():
        wanted, found = run.module(inputs), program.module()(inputs)
    assert all(found[name].equal(wanted[name]) for name in wanted)


def refusal(capsys, *arguments) -> str:
    assert export.main(list(map(str, arguments))) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


def test_a_file_that_differs_is_not_left_there(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run")
    monkeypatch.setitem(export.TOLERANCE, "torch_export", -1.0)
    said = refusal(capsys, run, "--to", "torch_export", "--out", tmp_path / "x.pt2")
    assert "differs from the net by" in said
    assert list(tmp_path.iterdir()) == [run]


NETS = """
import torch
from torch import nn

class Mixes(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.layer = nn.Linear(inputs, classes)
    def forward(self, x):
        if x.shape[0] == 2:
            return self.layer(x)
        return self.layer(x) * 2
"""


def test_a_net_that_looks_at_the_batch_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    monkeypatch.setitem(JOBS, "own", (ModelOptions(name="nets.py:Mixes"), *JOBS["mlp"][1:]))
    run = make_run(tmp_path / "run", "own")
    assert "cannot be exported for any number of samples" in refusal(
        capsys, run, "--to", "torch_export")


def test_mistakes_are_told_in_one_line(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run")
    assert "no such folder" in refusal(capsys, tmp_path / "none", "--to", "torch_export")
    assert "has no final/model.safetensors" in refusal(
        capsys, run, "--to", "torch_export", "--weights", "final")
    assert "ends with .pt2" in refusal(capsys, run, "--to", "torch_export", "--out", "x.onnx")
    assert "cannot take inputs" in refusal(capsys, run, "--to", "torch_export", "--shape", "[5]")
    for shape in ("[4", "[]", "[true]"):
        assert "--shape: a list" in refusal(capsys, run, "--to", "torch_export", "--shape", shape)
    assert "cannot be written" in refusal(
        capsys, run, "--to", "torch_export", "--out", tmp_path / f"{'x' * 300}.pt2")
    monkeypatch.setattr(export, "_ONNX_PACKAGES", ("onnx", "no_such_package"))
    assert "pip install" in (said := refusal(capsys, run, "--to", "onnx"))
    assert "no_such_package" in said


def test_labels_that_are_fewer_than_the_outputs_are_refused(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    labels = run / "best" / "labels.json"
    labels.write_text(json.dumps({"kind": CLASSES[:2]}))
    assert "2 labels, the net 3 outputs" in refusal(capsys, run, "--to", "torch_export")
    for wrong in ([], {"kind": 3}):
        labels.write_text(json.dumps(wrong))
        assert "labels.json: a list of labels" in refusal(capsys, run, "--to", "torch_export")


def test_an_older_run_needs_the_shape(tmp_path):
    config = make_run(tmp_path) / "best" / "config.yaml"
    options = yaml.safe_load(config.read_text())
    del options["model"]["input_shape"], options["model"]["input_dtype"]
    config.write_text(yaml.safe_dump(options))
    with pytest.raises(UserError, match="--shape"):
        export.export(Finished(tmp_path), "torch_export", tmp_path / "x.pt2")
    export.export(Finished(tmp_path / "best", "best"), "torch_export", tmp_path / "x.pt2", [4])
    assert (tmp_path / "x.pt2").is_file()


def test_outputs_are_picked_as_tasks_pick_them():
    net = export._Outputs(nn.Identity(), ["kind"])
    given = torch.ones(1)
    for output in (given, {"kind": given, "rest": 0}, {"logits": given}, {"out": given}):
        assert net(output) is given
    both = export._Outputs(nn.Identity(), ["kind", "other"])
    for output in (given, {"logits": given}):
        assert all(both(output)[name].equal(given) for name in ("kind", "other"))


def test_the_card_beside_the_weights_shows_the_program(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    card = run / "best" / "README.md"
    assert export.main([str(run), "--to", "torch_export"]) == 0
    assert "README.md: not changed" in capsys.readouterr().err  # of an older run: no card
    card.write_text(f"# A net\n\n{loading.EXPORTS}\n\nThe end.\n")
    for _ in range(2):
        assert export.main([str(run), "--to", "torch_export"]) == 0
    text = card.read_text()
    assert text.count("### model.pt2") == 1 and text.endswith("The end.\n")
    shown = text.split("```python\n")[1].split("```")[0]
    said = subprocess.run([sys.executable, "-I", "-c", shown], cwd=run / "best",
                          capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.startswith("kind ["), said.stderr
    before = card.read_text()
    assert export.main([str(run), "--to", "torch_export", "--out", str(tmp_path / "a.pt2")]) == 0
    assert card.read_text() == before
