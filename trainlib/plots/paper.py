"""How every picture looks: dark ink on white paper, told apart without colour, too."""

from __future__ import annotations

import io
import os
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from trainlib.plots import names

DOTS_PER_INCH = 150
INK, FAINT = "#1a1a1a", "#8a8a8a"
BLUE, RED, GREEN = "#0b4f8a", "#c8501e", "#5aa469"
MONOSPACE_INCHES = 0.602 * 8 / 72  # of a letter of DejaVu Sans Mono at 8 points
SHADES = "Blues"  # white to dark blue, of falling lightness
# Colour, dashes and marker of one line among several: any one of them tells the first four apart.
LINES = [
    (BLUE, "-", "o"), (RED, "--", "s"), (GREEN, "-.", "^"), ("#8f5fa8", ":", "D"),
    ("#1a1a1a", (0, (6, 1, 1, 1, 1, 1)), "v"), ("#d9a514", (0, (8, 2)), "P"),
    ("#3fa7c9", (0, (3, 1)), "X"), ("#8a5a33", (0, (1, 1)), "<"),
]
_THEME = {
    "figure.facecolor": "white", "savefig.facecolor": "white", "axes.facecolor": "white",
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "font.size": 9, "axes.titlesize": 10,
    "axes.titlelocation": "left", "figure.titlesize": 11, "axes.labelsize": 9,
    "legend.fontsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.spines.top": False,
    "axes.spines.right": False, "grid.color": "#d9d9d9", "grid.linewidth": 0.6,
    "axes.axisbelow": True, "lines.linewidth": 1.5, "legend.framealpha": 0.85,
    "hatch.linewidth": 0.6,
    # A dollar sign in the name of a class is no formula.
    "text.parse_math": False,
}
_TITLE_LETTER_INCHES = 0.085


class CannotWrite(OSError):
    """A picture or page cannot be written; ``filename`` is the one that was asked for."""


@contextmanager
def page(file: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, drawn on in the theme and then written as a PNG in one go."""
    theme = _THEME | {"font.family": names.fonts("sans-serif")}
    with matplotlib.style.context(["default", theme]), warnings.catch_warnings():
        # Where no font has a letter, the name's number stands before it.
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure((width, height), DOTS_PER_INCH, layout="constrained")
        yield figure
        content = io.BytesIO()
        figure.savefig(content, format="png")
    write(file, content.getvalue())


def write(file: Path, content: bytes) -> None:
    """Replaces a file in one go, so that who looks at it meets the old or the new one."""
    temporary = file.with_name(f".tmp_{file.name}.{os.getpid()}")
    try:
        try:
            temporary.write_bytes(content)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CannotWrite(error.errno, error.strerror, str(file)) from error


def reason(error: Exception) -> str:
    """Why something is left out, in one line."""
    if isinstance(error, OSError) and error.filename:
        done = "written" if isinstance(error, CannotWrite) else "read"
        return f"{error.filename} cannot be {done}: {error.strerror}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def head(figure: Figure, title: str) -> None:
    """The title of a page, in as many lines as it needs."""
    width = int(figure.get_figwidth() / _TITLE_LETTER_INCHES)
    figure.suptitle("\n".join(textwrap.wrap(title, width)))


def inked_shades() -> LinearSegmentedColormap:
    """Shades of which the lightest still is no paper."""
    shades = matplotlib.colormaps[SHADES](np.linspace(0.25, 1, 256))
    return LinearSegmentedColormap.from_list("inked", shades)


def log_scale(axes: Axes, *, x: bool = False) -> None:
    """A logarithmic y (or x) axis with plain numbers at its ticks."""
    axis = axes.xaxis if x else axes.yaxis
    axes.set_xscale("log") if x else axes.set_yscale("log")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def spans_decades(*values: np.ndarray, ratio: float = 30) -> bool:
    """Whether positive numbers differ so much that a linear axis would show only the largest."""
    together = np.concatenate([np.asarray(some, float) for some in values] or [np.empty(0)])
    together = together[np.isfinite(together)]
    return together.size > 0 and together.min() > 0 and together.max() > ratio * together.min()


def name_ticks(
    set_ticks: Callable[..., object], texts: list[str], most: int, **style: object
) -> None:
    """Ticks 0, 1, ... with their names; of too many only every so many-th."""
    every = -(-len(texts) // most)
    set_ticks(range(0, len(texts), every), texts[::every], **style)
