"""Pictures of a run, drawn without a screen."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

_SIZE_INCHES, _DOTS_PER_INCH = (8, 4.5), 150
_HIGHEST = 1.5  # of the fall: how far above the start a blow-up is shown


def draw_sweep(
    file: Path, lrs: Sequence[float], losses: Sequence[float], low: Sequence[float],
    high: Sequence[float], smoothed: Sequence[float], marks: Mapping[str, float | None], title: str,
) -> None:
    """The curve of a learning-rate sweep as a PNG.

    Args:
        losses: at each rate, the median over the repeats.
        low, high: the smallest and largest over the repeats.
        marks: rates to mark, by name.
    """
    figure = Figure(_SIZE_INCHES, _DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    if list(low) != list(high):
        axes.fill_between(lrs, low, high, alpha=0.2, label="lowest to highest")
    axes.plot(lrs, losses, ".", markersize=3, color="tab:blue", label="loss of a step")
    axes.plot(lrs, smoothed, color="tab:blue", label="smoothed")
    colours = ("tab:red", "tab:green", "tab:orange", "tab:purple")
    for (name, lr), colour in zip(marks.items(), colours, strict=False):
        if lr is not None:
            axes.axvline(lr, linestyle="--", color=colour, label=f"{name} {lr:.2g}")
    first, lowest = smoothed[0], min(smoothed)
    if max(losses) > first > lowest:  # a blow-up would flatten all that matters
        margin = 0.1 * (first - lowest)
        axes.set_ylim(min(*losses, lowest) - margin, first + (_HIGHEST - 1) * (first - lowest))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.set_title(title, fontsize="medium")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(file)
