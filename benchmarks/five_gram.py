"""Bits per byte of a byte-level 5-gram model, which a language model should beat.

    python benchmarks/five_gram.py FILE [--share 0.1] [--orders 3 4 5 6 7]

Interpolated Kneser-Ney smoothing with three discounts for each order, estimated from the training
text. Training is the first floor(length * (1 - share) / 256) * 256 bytes, the test all that follow.

Source: Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling",
TR-10-98, section 3 (modified Kneser-Ney).
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NUM_BYTES = 256
MAX_ORDER = 8  # an n-gram is one uint64


@dataclass
class Counts:
    """Of one order: what its n-grams keep after discounting, and what their contexts give down."""

    grams: np.ndarray  # sorted codes
    kept: np.ndarray  # max(count - discount, 0)
    contexts: np.ndarray  # sorted codes
    totals: np.ndarray  # counts of all that follows the context
    given: np.ndarray  # sum of the discounts


def encode(text: bytes, order: int) -> np.ndarray:
    """Codes [bytes - order + 1] of all n-grams; the last byte is the lowest."""
    values = np.frombuffer(text, np.uint8).astype(np.uint64)
    num_grams = max(len(values) - order + 1, 0)
    codes = np.zeros(num_grams, np.uint64)
    for offset in range(order):
        codes = (codes << np.uint64(8)) | values[offset : offset + num_grams]
    return codes


def fit(train: bytes, order: int) -> list[Counts]:
    """The counts of orders 1 to ``order``.

    Raises:
        ValueError: the order is not from 1 to 8.
    """
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f"orders are 1 to {MAX_ORDER}, got {order}")
    tables = []
    grams, counts = np.unique(encode(train, order), return_counts=True)
    for length in range(order, 0, -1):
        discounted = np.minimum(discounts(counts)[np.minimum(counts, 3)], counts)
        contexts, inverse = np.unique(grams >> np.uint64(8), return_inverse=True)
        totals = np.bincount(inverse, counts, len(contexts))
        given = np.bincount(inverse, discounted, len(contexts))
        tables.append(Counts(grams, counts - discounted, contexts, totals, given))
        # Below the highest order an n-gram counts once for each different byte before it.
        shorter = grams & np.uint64((1 << 8 * (length - 1)) - 1)
        grams, counts = np.unique(shorter, return_counts=True)
    return tables[::-1]


def discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken from counts 0, 1, 2, 3 and more: [4]."""
    num = [np.count_nonzero(counts == count) for count in range(1, 5)]
    if 0 in num:  # too few n-grams to estimate from, as for single bytes
        return np.array([0, 0.5, 0.5, 0.5])
    share = num[0] / (num[0] + 2 * num[1])
    estimates = [count - (count + 1) * share * num[count] / num[count - 1] for count in (1, 2, 3)]
    return np.clip([0, *estimates], 0, None)


def probabilities(tables: list[Counts], codes: np.ndarray) -> np.ndarray:
    """Of each n-gram's last byte after the bytes before it; codes of the highest order."""
    result = np.full(len(codes), 1 / NUM_BYTES)
    for length, table in enumerate(tables, 1):
        mask = np.uint64((1 << 8 * length) - 1)
        grams = codes & mask
        kept = look_up(table.grams, table.kept, grams)
        totals = look_up(table.contexts, table.totals, grams >> np.uint64(8))
        given = look_up(table.contexts, table.given, grams >> np.uint64(8))
        is_known = totals > 0
        result[is_known] = (kept + given * result)[is_known] / totals[is_known]
    return result


def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key; 0 where there is none."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0.0)


def bits_per_byte(train: bytes, test: bytes, order: int = 5) -> float:
    """Mean of -log2 of each test byte's probability, ``test`` being what follows ``train``.

    Args:
        order: longest n-grams, 1 to 8 bytes; one fewer is the context.

    Raises:
        ValueError: another order, a training text shorter than that, or no test.
    """
    if len(train) < order or not test:
        raise ValueError(f"{order} bytes to train on and one to test are needed, got {len(train)} "
                         f"and {len(test)}")
    tables = fit(train, order)
    codes = encode(train[len(train) - order + 1 :] + test, order)
    return float(-np.log2(probabilities(tables, codes)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--orders", type=int, nargs="+", default=[5])
    arguments = parser.parse_args()
    text = arguments.file.read_bytes()
    num_train = math.floor(len(text) * (1 - arguments.share) / 256) * 256
    print(f"{arguments.file.name}: {num_train:,} bytes to train on, {len(text) - num_train:,} to "
          "test")
    for order in arguments.orders:
        start = time.perf_counter()
        bits = bits_per_byte(text[:num_train], text[num_train:], order)
        print(f"order {order}: {bits:.4f} bits per byte, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
