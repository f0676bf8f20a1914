"""Reading data against what it costs without us: gathering in memory, decoding into memory.

    python benchmarks/reading.py [--rounds 40] [--images 4000] [--cifar FILE.parquet]

In memory: train.py's reader, inputs and targets of a step, against ``inputs[index]`` and
``targets[index]`` of the same tensors, without and with the drawing of the samples. Decoding: the
pass at the start of a run, with its checks and measurements, against worker processes that only
call PIL on the same bytes and keep the pixels as one array. Both sides alternate; medians, and the
median of the ratios (1 is as fast as bare).
"""

import argparse
import io
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from trainlib import data, plan  # noqa: E402
from trainlib.data import loading, parts  # noqa: E402
from trainlib.data.decoding import ImageDecoder  # noqa: E402

CPU = torch.device("cpu")


def alternate(ours, bare, rounds: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of bare / ours."""
    times: list[list[float]] = [[], []]
    for number in range(rounds):
        for index in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            (ours, bare)[index]()
            times[index].append(time.perf_counter() - start)
    ratio = statistics.median(b / o for o, b in zip(*times, strict=True))
    return statistics.median(times[0]), statistics.median(times[1]), ratio


def gather(shape: tuple[int, ...], dtype: torch.dtype, batch_size: int, rounds: int, plans: bool):
    """Samples a second in memory, ours and bare, and the share of bare.

    Args:
        plans: also pay for drawing the samples; the bare side never does.
    """
    num_samples, steps = 20_000, 64
    inputs = (torch.rand(num_samples, *shape) * 255).to(dtype)
    targets = torch.randint(10, (num_samples,))
    split = data.Split(inputs, {"label": targets}, torch.arange(num_samples))
    batch_plan = plan.BatchPlan(num_samples, batch_size, 0)
    reader = data.Reader(split, batch_plan, plan.assign(batch_size, batch_size, 0, 1), CPU)
    order = torch.randperm(num_samples)
    first = 0

    def ours() -> None:
        nonlocal first
        for step in range(first, first + steps):
            reader.take(step if plans else step % batch_plan.steps_per_block)
        first += steps

    def bare() -> None:
        for step in range(steps):
            index = order[step * batch_size % (num_samples - batch_size) :][:batch_size]
            chosen = inputs[index]
            # What any loop does with bytes before a forward.
            chosen = chosen.float().div_(255) if dtype == torch.uint8 else chosen
            targets[index]

    ours(), bare()
    seconds, bare_seconds, share = alternate(ours, bare, rounds)
    return steps * batch_size / seconds, steps * batch_size / bare_seconds, share


def images(kind: str, side: int, count: int) -> list[bytes]:
    """Encoded images of smooth noise, about as large as photographs' files."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 255, (side // 8, side // 8, 3), np.uint8))
        buffer = io.BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(buffer, kind)
        encoded.append(buffer.getvalue())
    return encoded


def _bare_decode(encoded: list[bytes]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(each)).convert("RGB")) for each in encoded])


def decode(encoded: list[bytes], workers: int, rounds: int):
    """Images a second into memory, ours and bare, and the share of bare."""
    import datasets

    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": each, "path": None} for each in encoded]},
        features=datasets.Features({"image": datasets.Image(decode=False)}),
    ).cast_column("image", datasets.Image())
    rows = np.arange(len(encoded))
    side = np.asarray(Image.open(io.BytesIO(encoded[0]))).shape[0]

    def ours() -> None:
        decoder = ImageDecoder(table, "image", None, None, "benchmark")
        part = parts.Part("benchmark", decoder, rows, {})
        loading._read(part, decoder(rows[:1]), workers, True, loading.Moments(), {}, [0])

    def bare() -> None:
        out = np.empty((len(encoded), side, side, 3), np.uint8)
        chunks = [encoded[start : start + 256] for start in range(0, len(encoded), 256)]
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            for number, pixels in enumerate(pool.imap(_bare_decode, chunks)):
                out[number * 256 : number * 256 + len(pixels)] = pixels

    ours(), bare()
    seconds, bare_seconds, share = alternate(ours, bare, rounds)
    return len(encoded) / seconds, len(encoded) / bare_seconds, share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cifar", help="also the images of a parquet file with an image column")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {arguments.workers} decoding processes, "
          "medians of alternating rounds")
    print(f"{'':34}{'ours /s':>12}{'bare /s':>12}{'share':>8}")
    for plans in (False, True):
        for name, shape, dtype, size in (
            ("64 of 8x8 fp32", (1, 8, 8), torch.float32, 64),
            ("256 of 32 columns", (32,), torch.float32, 256),
            ("128 of 3x32x32 bytes", (3, 32, 32), torch.uint8, 128),
            ("64 of 3x96x96 bytes", (3, 96, 96), torch.uint8, 64),
        ):
            ours, bare, share = gather(shape, dtype, size, arguments.rounds, plans)
            name = f"{'draw and ' if plans else ''}gather {name}"
            print(f"{name:34}{ours:12,.0f}{bare:12,.0f}{share:8.2f}")
    cases = [(f"decode {kind} {side}x{side}", images(kind, side, max(512, count)))
             for kind, side, count in (("PNG", 32, arguments.images * 4),
                                       ("PNG", 96, arguments.images),
                                       ("JPEG", 256, arguments.images // 4))]
    if arguments.cifar:
        import datasets

        table = datasets.Dataset.from_parquet(arguments.cifar).cast_column(
            "image", datasets.Image(decode=False))
        cases.append(("decode " + Path(arguments.cifar).stem,
                      [each["bytes"] for each in table[:20_000]["image"]]))
    for name, encoded in cases:
        ours, bare, share = decode(encoded, arguments.workers, max(5, arguments.rounds // 4))
        print(f"{name:34}{ours:12,.0f}{bare:12,.0f}{share:8.2f}")


if __name__ == "__main__":
    main()
