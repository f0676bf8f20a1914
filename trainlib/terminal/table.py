"""Rows under one header, aligned however far apart they are printed."""

import math
from collections.abc import Mapping, Sequence

WIDTH = 80  # columns, which the narrowest of common terminals and most viewers of logs have
_ROWS_PER_HEADER = 30
_GAP = "  "


class Table:
    """Formats rows, of which each comes with the header where a reader would look for it."""

    def __init__(self, widths: Mapping[str, int], stacked: Sequence[str], to_go: Sequence[str]):
        """
        Args:
            widths: of each column's values, by its name.
            stacked: names of which, where they make the table too wide, each part between slashes
                is written on a line of its own.
            to_go: the columns that are left out, in this order, where it is still too wide.
        """
        self._header = {name: [name] for name in widths}
        if self._total(widths) > WIDTH:
            self._header |= {name: name.split("/") for name in stacked}
        for name in to_go:
            if self._total(widths) > WIDTH:
                del self._header[name]
        self._widths = self._column_widths(widths)
        self._rows_left = 0

    def row(self, values: Mapping[str, str], is_apart: bool) -> str:
        """The line of a row, the header's lines above it where it is time.

        Args:
            values: by column; a column without one is empty.
            is_apart: whether something else was printed since the last row.
        """
        text = self._line({name: values.get(name, "") for name in self._header})
        if is_apart or self._rows_left == 0:
            self._rows_left = _ROWS_PER_HEADER
            text = f"{self._head()}\n{text}"
        self._rows_left -= 1
        return text

    def _head(self) -> str:
        height = max(map(len, self._header.values()))
        lines = [{name: ([""] * height + parts)[-height:][level]
                  for name, parts in self._header.items()} for level in range(height)]
        return "\n".join(map(self._line, lines))

    def _line(self, cells: Mapping[str, str]) -> str:
        return _GAP.join(cells[name].rjust(width) for name, width in self._widths.items()).rstrip()

    def _column_widths(self, widths: Mapping[str, int]) -> dict[str, int]:
        return {name: max(widths[name], *map(len, parts)) for name, parts in self._header.items()}

    def _total(self, widths: Mapping[str, int]) -> int:
        columns = self._column_widths(widths).values()
        return sum(columns) + len(_GAP) * (len(columns) - 1)


METRIC_WIDTH = 8


def metric(value: float) -> str:
    """A metric in ``METRIC_WIDTH`` letters, if it is not below zero."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size == 0 or 1e-3 <= size < 999.99995:  # what rounds to 1000.0000 has a letter more
        return f"{value:.4f}"
    return f"{value:.1f}" if 1e3 - 1 < size < 999_999.95 else f"{value:.2e}"


def rate(value: float) -> str:
    """So many a second."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """A time in at most 6 letters: 4:05 (minutes and seconds), 5h04m, 12d."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{seconds:02}"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours < 100 else f"{hours // 24}d"
