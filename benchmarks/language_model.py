"""Bits per byte of recipes/tinyshakespeare_gpt.yaml next to a 5-gram model of the same text.

    python benchmarks/language_model.py tinyshakespeare.txt [--run_dir runs/tinyshakespeare_gpt]

Trains the recipe unless that run is finished, and fits the 5-gram model to the very bytes that the
recipe trains on. Both are judged on the last tenth of the file.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.five_gram import bits_per_byte  # noqa: E402

BLOCK_SIZE = 256  # the recipe's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--run_dir", default="runs/tinyshakespeare_gpt")
    options = parser.parse_args()
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--recipe",
         str(ROOT / "recipes" / "tinyshakespeare_gpt.yaml"), "--data.source", str(options.file),
         "--run_dir", options.run_dir, "--log.trackers", "[]"],
        check=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    result = json.loads(Path(options.run_dir, "best", "evaluation.json").read_text())["text"]
    text = options.file.read_bytes()
    # As trainlib.data.language cuts it; one more token ends the text.
    cut = int((len(text) + 1) * 0.9) // BLOCK_SIZE * BLOCK_SIZE
    started = time.perf_counter()
    baseline = bits_per_byte(text[:cut], text[cut:])
    print(f"\n{'model':<8}  bits per byte of the last {len(text) - cut:,} bytes")
    print(f"{'gpt':<8}  {result['bits_per_byte']:.4f}")
    print(f"{'5-gram':<8}  {baseline:.4f}  ({time.perf_counter() - started:.1f} s)")


if __name__ == "__main__":
    main()
