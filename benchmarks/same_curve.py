"""The sha256 of the final weights for each process count.

    python benchmarks/same_curve.py [--processes 1 2 3] [--steps 60]

Trains each job with micro size 16 and global batch 64, on CPU processes under torchrun, and ends
with exit code 1 if any two process counts of a job differ in one bit of weights or buffers, or in
any recorded loss.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
JOBS = {
    "mlp, dropout 0.3, adamw": [],
    "mlp, dropout 0.3, sgd momentum": [
        "--optim.name", "sgd", "--optim.args.momentum", "0.9", "--optim.lr", "0.05"],
    "resnet, BatchNorm, adamw": ["--model.name", "resnet"],
    "resnet, BatchNorm, sgd momentum": [
        "--model.name", "resnet", "--optim.name", "sgd", "--optim.args.momentum", "0.9",
        "--optim.lr", "0.05"],
}


def train(folder: Path, flags: list[str], processes: int, steps: int) -> tuple[str, list[float]]:
    """Trains a job; returns the weights' sha256 (buffers included) and all losses."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
        str(processes), "train.py", "--run_dir", str(folder), "--log.trackers", "[]",
        "--log.every", "1", "--batch.micro_size", "16", "--batch.global_size", "64",
        "--loop.duration", f"{steps} steps", *flags,
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    written = folder / "exit.json"
    if not written.exists() or json.loads(written.read_text())["code"] != 0:
        sys.exit(result.stdout + result.stderr)
    digest = hashlib.sha256((folder / "final" / "model.safetensors").read_bytes()).hexdigest()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    return digest, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    is_same = True
    print(f"{'job':34}{'processes':>10}  {'last loss':22}sha256 of the final weights")
    with tempfile.TemporaryDirectory() as folder:
        for number, (job, flags) in enumerate(JOBS.items()):
            results = []
            for processes in arguments.processes:
                run = Path(folder) / f"{number}_{processes}"
                digest, losses = train(run, flags, processes, arguments.steps)
                results.append((digest, losses))
                print(f"{job:34}{processes:>10}  {losses[-1]!r:22}{digest}", flush=True)
            is_same &= all(result == results[0] for result in results)
    print("all equal, bit for bit" if is_same else "DIFFERENT")
    sys.exit(0 if is_same else 1)


if __name__ == "__main__":
    main()
