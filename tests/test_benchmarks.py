"""The tables of benchmarks run in a tiny form, without a GPU, too, and count what they say."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, f"benchmarks/{script}.py", *flags], cwd=ROOT,
                          capture_output=True, text=True, timeout=280)


def gpu(*flags: str) -> subprocess.CompletedProcess:
    return run("gpu", *flags)


def test_the_table_of_the_cpu_has_a_row_for_each_loop_or_says_why_not(tmp_path):
    from benchmarks import results

    file = tmp_path / "cpu.json"
    result = run("cpu", "--tiny", "--only", "step", "exact", "--json", str(file))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(file.read_text())["rows"]
    steps = [row for row in rows if row["section"] == "step"]
    names = {"bare loop", "train.py", "Accelerate", "HF Trainer", "Lightning"}
    for job in {row["job"] for row in steps}:
        assert {row["what"] for row in steps if row["job"] == job} == names
    for row in rows:
        assert row["n"] > 1 and row["value"] > 0 or "not measured: No module" in row["note"]
    assert all(row["n"] > 1 for row in steps if row["what"] in ("bare loop", "train.py"))
    said = results.against(file, [results.Row(**row) for row in rows if row["n"] > 0])
    assert len(said.splitlines()) == 1 + sum(row["n"] > 0 for row in rows) and "(+0.0%)" in said


@pytest.mark.parametrize("sections", [
    {"resnet50", "gpt2", "host"}, {"speedrun", "exact", "equal"}, {"costs"},
], ids=lambda names: "_".join(sorted(names)))
def test_every_section_runs_in_its_tiny_form_and_is_kept(tmp_path, sections):
    result = gpu("--tiny", "--only", *sections, "--json", str(tmp_path / "gpu.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["section"] for row in kept["rows"]} == sections
    measured = [row for row in kept["rows"] if row["n"] > 0]
    assert {row["section"] for row in measured} == sections
    assert all("note" in row for row in kept["rows"] if row not in measured)
    for row in measured:
        assert f"{row['section']}: {row['job']}" in result.stdout
        assert row["what"] in result.stdout
    for row in measured:
        if row["section"] == "equal" and row.get("aim") == "1":
            assert row["value"] == 1


def test_a_section_that_fails_is_a_row_with_its_reason_and_ends_in_code_1(tmp_path):
    result = gpu("--tiny", "--only", "speedrun", "--cifar", str(tmp_path), "--json",
                 str(tmp_path / "gpu.json"))
    assert result.returncode == 1 and "Traceback" not in result.stdout + result.stderr
    [row] = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert row["n"] == 0 and "two files are needed" in row["note"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    result = gpu()
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "--tiny" in result.stderr


def test_all_sections_are_tried_here():
    from benchmarks import gpu

    [mark] = test_every_section_runs_in_its_tiny_form_and_is_kept.pytestmark
    assert set.union(*mark.args[1]) == set(gpu.SECTIONS)


def test_flops_are_those_that_one_counts_by_hand():
    from benchmarks import gpu, jobs

    # 4.09 G multiplications forward, twice that backward but for the gradient of the images.
    multiplications = 3 * 4.089e9 - 0.118e9
    assert gpu.step_flops(jobs.resnet50(2)) == pytest.approx(2 * 2 * multiplications, rel=5e-3)
    length, width, depth, vocabulary = 64, 128, 2, 512
    weights = depth * 12 * width**2 + vocabulary * width
    attention = depth * 2 * length * width  # of a token: scores, and their sum of values
    assert gpu.step_flops(jobs.gpt2(2, length, vocabulary, depth, width)) == pytest.approx(
        2 * length * 6 * (weights + attention), rel=1e-6)


def test_the_speedruns_net_starts_from_a_rotation_and_sees_mirrors_alike():
    from recipes.speedrun_net import SpeedNet

    torch.manual_seed(0)
    net = SpeedNet(3, 10, widths=(32, 32, 32))
    kernels = net.kernels.flatten(1)
    assert torch.allclose(kernels @ kernels.T, torch.eye(12), atol=1e-6)
    images = torch.rand(8, 3, 32, 32)
    net(images)
    net.eval()
    assert torch.allclose(net(images), net(images.flip(3)), atol=1e-6)
    assert not torch.allclose(net._logits(images), net._logits(images.flip(3)), atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler on torch.jit
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_speedruns_net_has_gradients_compiled_in_bf16(tmp_path, monkeypatch):
    """A maximum that is looked for again in the backward pass may not be found there."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    from recipes.speedrun_net import SpeedNet

    torch.manual_seed(0)
    net = SpeedNet(3, 10, widths=(16, 16, 16)).to(memory_format=torch.channels_last)
    net.compile(dynamic=False)
    with torch.autocast("cpu", torch.bfloat16):
        output = net(torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    output.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
