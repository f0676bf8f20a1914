"""Which sample is drawn when, and by which process: pure functions of (seed, step).

A run is an endless sequence of draws. Draw ``d`` belongs to epoch ``d // N`` and is sample
``permute(d % N)`` under that epoch's key; global batch ``k`` is the draws [kB, (k+1)B). Every
batch is therefore full, shapes never change, and the only position of a run is one integer.
No tensor and no state that could need saving live here.
"""

from typing import NamedTuple

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_ROUNDS = 6
_ORDER, _FORWARD = 1, 2  # what a key is for, so that no two purposes share one
_DRAWS_PER_BLOCK = 16384  # planning so many draws at once hides numpy's cost per call


def mix(*words: int) -> int:
    """A 64-bit key of some integers: the seed of whatever those integers identify.

    Source: the finaliser of SplitMix64 (Steele, Lea & Flood 2014, figure 1), one round a word.
    """
    key = 0
    for word in words:
        key = (key + word + _GOLDEN) & _MASK
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK
        key ^= key >> 31
    return key


def forward_seed(seed: int, step: int, micro_batch: int) -> int:
    """The seed of everything random in one forward: the same wherever the micro-batch runs."""
    return mix(seed, _FORWARD, step, micro_batch)


def permute(positions: np.ndarray, size: int, round_keys: np.ndarray) -> np.ndarray:
    """Where a keyed bijection of [0, size) sends each position, in O(1) memory.

    Args:
        positions: [n] integers in [0, size).
        size: the number of samples, >= 1.
        round_keys: [n, rounds] uint64, or [1, rounds] for all; positions with equal keys share
            one permutation.

    Returns:
        [n] int64.

    Source: a Feistel network with halves of alternating width (Black & Rogaway 2002, "Ciphers
    with Arbitrary Finite Domains", sections 4 and 5: cycle walking and generalised Feistel).
    """
    bits = max(size - 1, 1).bit_length()  # the smallest power of two >= size: a domain < 2 * size
    out = _feistel(positions.astype(np.uint64), bits, round_keys)
    walking = np.flatnonzero(out >= size)
    while len(walking):
        keys = round_keys if len(round_keys) == 1 else round_keys[walking]
        out[walking] = moved = _feistel(out[walking], bits, keys)
        walking = walking[moved >= size]
    return out.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, round_keys: np.ndarray) -> np.ndarray:
    low_bits = bits // 2
    high_bits = bits - low_bits
    for key in round_keys.T:
        # The low half moves up unchanged; the high half is masked by it and moves down. The
        # halves' widths change places each round, so no bit of an odd width is lost.
        low = values & np.uint64((1 << low_bits) - 1)
        noise = (low + key) * np.uint64(0xBF58476D1CE4E5B9)
        noise ^= noise >> np.uint64(32)
        noise *= np.uint64(0x94D049BB133111EB)
        noise >>= np.uint64(32)  # the upper bits are the well-mixed ones; a half has at most 32
        masked = (values >> np.uint64(low_bits)) ^ (noise & np.uint64((1 << high_bits) - 1))
        values = (low << np.uint64(high_bits)) | masked
        low_bits, high_bits = high_bits, low_bits
    return values


def samples_of(draws: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """The sample of each draw.

    Args:
        draws: [n] int64, >= 0 and ascending; epochs follow one another without a gap.
        num_samples: samples in the data set, >= 1.
        seed: the run's seed.

    Returns:
        [n] int64 in [0, num_samples); each epoch holds every sample exactly once.
    """
    epochs, positions = np.divmod(draws, num_samples)
    distinct, which = np.unique(epochs, return_inverse=True)
    table = np.array(
        [[mix(seed, _ORDER, int(e), number) for number in range(_ROUNDS)] for e in distinct],
        dtype=np.uint64,
    )
    return permute(positions, num_samples, table if len(table) == 1 else table[which])


class Assignment(NamedTuple):
    """One micro-batch of every step, as one process sees it."""

    micro_batch: int  # its number in the global batch, the same on any number of processes
    slots: slice  # its part of the global batch
    is_real: bool  # False: this process has none left and repeats another's, uncounted


def num_micro_batches(global_size: int, micro_size: int) -> int:
    """Micro-batches of one global batch, on all processes together; the last may be smaller."""
    return -(-global_size // micro_size)


def assign(global_size: int, micro_size: int, rank: int, world_size: int) -> list[Assignment]:
    """The micro-batches of one process: number ``j`` runs on process ``j % world_size``.

    Every process gets the same number, since DDP and FSDP communicate in each; the list holds
    for every step, because batches are always full.
    """
    total = num_micro_batches(global_size, micro_size)
    assignments = []
    for micro_step in range(-(-total // world_size)):
        number = micro_step * world_size + rank
        is_real = number < total
        number %= total
        stop = min((number + 1) * micro_size, global_size)
        assignments.append(Assignment(number, slice(number * micro_size, stop), is_real))
    return assignments


class BatchPlan:
    """The samples of every global batch, planned in blocks of a few thousand draws."""

    def __init__(self, num_samples: int, global_size: int, seed: int):
        self.num_samples, self.global_size, self.seed = num_samples, global_size, seed
        self.steps_per_block = max(1, _DRAWS_PER_BLOCK // global_size)

    def block(self, number: int) -> np.ndarray:
        """[steps_per_block, global_size] samples of the steps from number * steps_per_block."""
        return self._samples(number * self.steps_per_block, self.steps_per_block)

    def samples(self, step: int) -> np.ndarray:
        """[global_size] samples of one step's global batch."""
        return self._samples(step, 1)[0]

    def _samples(self, first_step: int, num_steps: int) -> np.ndarray:
        """[num_steps, global_size]."""
        first, last = first_step * self.global_size, (first_step + num_steps) * self.global_size
        draws = np.arange(first, last, dtype=np.int64)
        return samples_of(draws, self.num_samples, self.seed).reshape(num_steps, self.global_size)


def idle_warning(global_size: int, micro_size: int, world_size: int) -> str | None:
    """One line where processes idle: fewer micro-batches than processes, or > 10 % idle slots."""
    total = num_micro_batches(global_size, micro_size)
    micro_steps = -(-total // world_size)
    idle = 1 - total / (micro_steps * world_size)
    if total >= world_size and idle <= 0.1:
        return None
    return (
        f"{idle:.0%} of the processes' time is idle: a batch of {global_size} in micro-batches of "
        f"{micro_size} makes {total} for {world_size} processes. The result is the "
        f"same; for speed choose a --batch.global_size with a multiple of {world_size} of them."
    )
