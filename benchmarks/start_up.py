"""From ``accelerate launch`` to the first update: a part of ``cpu.py``."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import results

ROOT = Path(__file__).resolve().parent.parent
THIRD_PARTY = ("accelerate", "datasets", "filelock", "huggingface_hub", "matplotlib", "numpy",
               "pandas", "PIL", "psutil", "pyarrow", "pydantic", "safetensors", "scipy", "sklearn",
               "torch", "tqdm", "transformers", "wandb", "yaml")
# Tells when the first update begins, and ends the process there.
PROBE = """
import json, os, runpy, sys, time
from torch.optim.optimizer import register_optimizer_step_pre_hook
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
def first(*_):
    with open(os.environ["PROBE_OUT"], "w") as file:
        packages = {name.partition(".")[0] for name in sys.modules}
        json.dump([time.time(), sorted(packages)], file)
    os._exit(0)
register_optimizer_step_pre_hook(first)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MINIMAL = """
import importlib, sys
for name in sys.argv[1].split(","):
    importlib.import_module(name)
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
accelerator = Accelerator()
digits = load_digits()
inputs = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
data = torch.utils.data.TensorDataset(inputs, torch.tensor(digits.target))
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
loader = torch.utils.data.DataLoader(data, 64, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for x, y in loader:
    accelerator.backward(torch.nn.functional.cross_entropy(model(x), y))
    optimizer.step()
    optimizer.zero_grad()
"""


def start_up(rounds: int) -> list[results.Row]:
    with tempfile.TemporaryDirectory() as name:
        folder, number = Path(name), 0
        (folder / "probe.py").write_text(PROBE)
        (folder / "minimal.py").write_text(MINIMAL)

        def launch(script: Path, *flags: str) -> tuple[float, list[str]]:
            nonlocal number
            number += 1
            out = folder / f"out{number}"
            command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch",
                       "--cpu", str(folder / "probe.py"), str(script), *flags]
            begin = time.time()
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                                    env=os.environ | {"PROBE_OUT": str(out)})
            if not out.exists():
                raise RuntimeError(result.stdout + result.stderr)
            end, packages = json.loads(out.read_text())
            return end - begin, packages

        def ours() -> tuple[float, list[str]]:
            return launch(ROOT / "train.py", "--run_dir", str(folder / f"run{number}"),
                          "--log.trackers", "[]")

        _, packages = ours()
        # Of what it has imported, what is no part of Python and not its own.
        third = [each for each in packages if each in THIRD_PARTY]
        calls = {"minimal script": lambda: launch(folder / "minimal.py", ",".join(third))[0],
                 "train.py": lambda: ours()[0]}
        calls["minimal script"]()
        times = results.alternate(calls, max(2, rounds // 5))
        job = f"to the first update, one process, with {', '.join(third)}"
        return results.compared("start-up", job, times, "s", aims={"train.py": "<= 1.3"})
