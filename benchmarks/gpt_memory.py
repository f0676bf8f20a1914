"""Peak memory of a training step of the GPT, losses inside the net against logits outside.

    python benchmarks/gpt_memory.py [--vocab 32000] [--width 128] [--batch 8] [--length 256]

One forward and backward pass in fp32, each side in a fresh process, after a small one that loads
what torch loads late. On a GPU the figure is the most that torch's allocator held above what it
held before the step; on a CPU how far the resident memory of the process rose (Linux: VmHWM).
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainlib.models.gpt import GPT  # noqa: E402

SIDES = ("logits", "losses")
BYTES_IN_MIB = 2**20


def step(model: GPT, tokens: torch.Tensor, targets: torch.Tensor, side: str) -> None:
    if side == "losses":
        losses = model(tokens, targets)["losses"]
    else:
        losses = functional.cross_entropy(
            model(tokens).flatten(0, 1), targets.flatten(), reduction="none"
        )
    losses.mean().backward()


def resident_bytes(name: str) -> int:
    """VmRSS, held now, or VmHWM, the most since the mark was last set back."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024


def growth(run: Callable[[], object], device: str) -> tuple[int, float]:
    """Bytes by which the peak memory rose in a call, and its seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM = VmRSS
        before = resident_bytes("VmRSS")
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resident_bytes("VmHWM")
    return peak - before, time.perf_counter() - start


def measure(arguments: argparse.Namespace) -> tuple[int, float]:
    """Bytes and seconds of one step of the side asked for."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(arguments.vocab, depth=arguments.depth, width=arguments.width).to(device)
    shape = (2, arguments.batch, arguments.length)
    tokens, targets = torch.randint(arguments.vocab, shape, device=device)
    step(model, tokens[:1, :8], targets[:1, :8], arguments.side)
    model.zero_grad()
    return growth(lambda: step(model, tokens, targets, arguments.side), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("vocab", 32000), ("depth", 4), ("width", 128), ("batch", 8),
                          ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side", choices=SIDES, help="measure this one in this process")
    arguments = parser.parse_args()
    if arguments.side:
        print(*measure(arguments))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    print(f"torch {torch.__version__}, {device}; vocabulary {arguments.vocab:,}, depth "
          f"{arguments.depth}, width {arguments.width}, batch {arguments.batch} x "
          f"{arguments.length} tokens, fp32")
    figures = {}
    for side in SIDES:
        command = [sys.executable, *sys.argv, "--side", side]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr}")
        num_bytes, seconds = result.stdout.split()
        figures[side] = int(num_bytes)
        print(f"{side:8}{int(num_bytes) / BYTES_IN_MIB:8.0f} MiB{float(seconds):8.2f} s")
    print(f"ratio   {figures['losses'] / figures['logits']:8.3f}")


if __name__ == "__main__":
    main()
