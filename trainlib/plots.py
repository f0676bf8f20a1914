"""Pictures of a run, drawn without a screen."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

_SIZE_INCHES, _DOTS_PER_INCH = (8, 4.5), 150
_BLOW_UP = 0.5  # of the fall: how far above its top losses are shown


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
    figure = Figure(_SIZE_INCHES, _DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    if list(low) != list(high):
        axes.fill_between(lrs, low, high, alpha=0.2, label="lowest to highest")
    axes.plot(lrs, losses, ".", markersize=3, color="tab:blue", label="loss of a step")
    if fitted is not None:
        axes.plot(*fitted, color="tab:blue", label="local fit")
        top, lowest = max(fitted[1]), min(*fitted[1], *low)
        margin = 0.1 * (top - lowest)
        if max(losses) > top and margin > 0:  # a blow-up would flatten all that matters
            axes.set_ylim(lowest - margin, top + _BLOW_UP * (top - lowest))
    styles = itertools.product(("--", ":", "-."), ("tab:red", "tab:green", "tab:orange"))
    for (name, lr), (style, colour) in zip(marks.items(), styles, strict=False):
        if lr is not None:
            axes.axvline(lr, linestyle=style, color=colour, label=f"{name} {lr:.2g}")
    if answer is not None:
        axes.axvline(answer, color="black", linewidth=2, label=f"answer {answer:.2g}")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.set_title("\n".join(textwrap.wrap(title, 95)), fontsize="medium")
    if lrs:
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(file)
