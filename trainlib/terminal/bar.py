"""One line that is written over and over: how far a run has come."""

import os
import sys
import time
from collections.abc import Callable, Sequence

from tqdm import tqdm

_DRAW_SECONDS, _NARROWEST_BAR, _USUAL_WIDTH = 0.1, 4, 80


class Bar:
    """A bar on a terminal, with as many of its fields beside it as the width allows."""

    def __init__(self, total: int, first: int = 0, clock: Callable[[], float] = time.perf_counter):
        """
        Args:
            total: steps of the whole; ``first``: of them done before.
        """
        self._clock, self._drawn_seconds = clock, -float("inf")
        self._bar = tqdm(total=total, initial=first, file=sys.stderr, bar_format=" ")

    @staticmethod
    def is_possible() -> bool:
        """Whether a line of the error output can be written over."""
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def is_time(self) -> bool:
        """Whether the last drawing is old enough for the next one."""
        return self._clock() - self._drawn_seconds >= _DRAW_SECONDS

    def draw(self, done: int, fields: Sequence[str]) -> None:
        """Draws the bar after ``done`` steps.

        Args:
            fields: the first ones are the last to go where the terminal is narrow.
        """
        self._drawn_seconds = self._clock()
        bar = self._bar
        # The last column stays free: some terminals go to the next line when it is written to.
        bar.n, bar.ncols = done, max(1, self._width() - 1)
        bar.bar_format = layout(done, bar.total, fields, bar.ncols)
        bar.refresh()

    def close(self) -> None:
        """Leaves the bar as it stands; a second call does nothing."""
        self._bar.close()

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._bar.fp.fileno()).columns or _USUAL_WIDTH
        except OSError:
            return _USUAL_WIDTH


def layout(done: int, total: int, fields: Sequence[str], width: int) -> str:
    """tqdm's ``bar_format``: the position, ``{bar}``, and the fields that there is room for."""
    share = f"{done / total:4.0%}"
    steps = f"{done:>{len(str(total))}}/{total}"
    for kept in range(len(fields), -1, -1):
        text = "  ".join(fields[:kept])
        for left in (f"{share}  {steps}", share):
            if len(left) + len(text) + _NARROWEST_BAR + len(" || ") <= width:
                return f"{left} |{{bar}}| {text}"
    return share[:width]
