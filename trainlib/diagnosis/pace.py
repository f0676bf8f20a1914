"""How many samples a diagnosis can afford, by the seconds that each of them takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

READING_SECONDS, FORWARD_SECONDS = 1.0, 0.4  # of one micro-batch at most
_LOOK_SECONDS = 1.5  # of a forward of all held-out samples
_STEP_SECONDS = 1.5
_STEP_FORWARDS = 3  # a backward is about two forwards
_FEWEST = 2  # samples, which a net with BatchNorm needs
GROWTH = 4
"""Of what is tried, as long as there is time for it."""


@dataclass
class Pace:
    """Seconds for each sample, as far as they have been measured."""

    reading: float = 0.0
    forward: float = 0.0

    def micro_size(self, wanted: int) -> int:
        """So many of the wanted samples as a micro-batch can have."""
        most = min(_affordable(READING_SECONDS, self.reading),
                   _affordable(FORWARD_SECONDS, self.forward))
        return int(min(wanted, max(_FEWEST, most)))

    def micro_batches(self, wanted: int, size: int) -> int:
        """So many of the wanted micro-batches as a step can have."""
        seconds = size * (self.reading + _STEP_FORWARDS * self.forward)
        return int(min(wanted, max(1, _affordable(_STEP_SECONDS, seconds))))

    def held_out(self, wanted: int) -> int:
        """So many of the wanted samples as can be read once and be predicted now and then."""
        most = min(_affordable(2 * READING_SECONDS, self.reading),
                   _affordable(_LOOK_SECONDS, self.forward))
        return int(min(wanted, max(1, most)))


def _affordable(seconds: float, each: float) -> float:
    return seconds // each if each > 0 else np.inf
