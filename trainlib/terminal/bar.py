"""One line that is written over and over: how far a run has come."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from tqdm import tqdm

from trainlib.terminal.lines import Lines, width

_DRAW_SECONDS, _NARROWEST_BAR = 0.1, 4


class Bar:
    """A bar on a terminal, with as many of its fields beside it as the width allows."""

    def __init__(self, total: int, first: int = 0, clock: Callable[[], float] = time.perf_counter):
        """
        Args:
            total: steps of the whole; ``first``: of them done before.
        """
        self._clock, self._drawn_seconds = clock, -float("inf")
        self._lines = Lines.current
        error_output = sys.stderr if self._lines is None else self._lines.streams[1].raw
        self._bar = tqdm(total=total, initial=first, file=error_output, bar_format=" ")
        if self._lines is not None:
            self._lines.set_bar(self)

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
        bar.n, bar.ncols = done, max(1, width(bar.fp) - 1)
        bar.bar_format = layout(done, bar.total, fields, bar.ncols)
        bar.refresh()

    def close(self) -> None:
        """Leaves the bar as it stands; a second call does nothing."""
        with suppress(OSError):  # the terminal has gone away
            self._bar.close()
        if self._lines is not None and self._lines.bar is self:
            self._lines.set_bar(None)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Takes the bar away while something is written in its place."""
        with tqdm.get_lock():
            self._bar.clear(nolock=True)
            yield
            self._bar.refresh(nolock=True)


def layout(done: int, total: int, fields: Sequence[str], num_columns: int) -> str:
    """tqdm's ``bar_format``: the position, ``{bar}``, and the fields that there is room for."""
    share = f"{done / total:4.0%}"
    steps = f"{done:>{len(str(total))}}/{total}"
    for kept in range(len(fields), -1, -1):
        text = "  ".join(fields[:kept])
        for left in (f"{share}  {steps}", share):
            if len(left) + len(text) + _NARROWEST_BAR + len(" || ") <= num_columns:
                return f"{left} |{{bar}}| {text}"
    return share[:num_columns]
