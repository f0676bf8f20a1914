"""The picture of a learning-rate sweep."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainlib.plots import paper

_SIZE_INCHES = (8, 4.5)
_BLOW_UP = 0.5  # of the fall: how far above its top losses are shown
_TITLE_WIDTH = 95  # letters


def draw_sweep(
    file: Path, lrs: Sequence[float], losses: Sequence[float], low: Sequence[float],
    high: Sequence[float], fitted: tuple[Sequence[float], Sequence[float]] | None,
    marks: Mapping[str, float | None], answer: float | None, title: str,
) -> None:
    """The curve of a learning-rate sweep as a PNG.

    Args:
        losses: at each rate, the median over the repeats.
        low, high: the smallest and largest over the repeats.
        fitted: rates and losses of the curve that the marks were read from.
        marks: rates to mark, by name.
        answer: the rate to train with.
    """
    with paper.page(file, *_SIZE_INCHES) as figure:
        axes = figure.add_subplot()
        paper.log_scale(axes, x=True)
        if list(low) != list(high):
            axes.fill_between(lrs, low, high, alpha=0.2, label="lowest to highest")
        axes.plot(lrs, losses, ".", markersize=3, color=paper.BLUE, label="loss of a step")
        if fitted is not None:
            axes.plot(*fitted, color=paper.BLUE, label="local fit")
            top, lowest = max(fitted[1]), min(*fitted[1], *low)
            margin = 0.1 * (top - lowest)
            if max(losses) > top and margin > 0:  # a blow-up would flatten all that matters
                axes.set_ylim(lowest - margin, top + _BLOW_UP * (top - lowest))
        for (name, lr), (colour, dashes, _) in zip(marks.items(), paper.LINES[1:], strict=False):
            if lr is not None:
                axes.axvline(lr, linestyle=dashes, color=colour, label=f"{name} {lr:.2g}")
        if answer is not None:
            axes.axvline(answer, color="black", linewidth=2, label=f"answer {answer:.2g}")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss")
        axes.set_title("\n".join(textwrap.wrap(title, _TITLE_WIDTH)))
        if len(lrs):
            axes.legend()
        axes.grid()
