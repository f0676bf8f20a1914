"""How near the numbers of a model are: a regression's predictions, a language model's losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter

from trainlib.plots import paper
from trainlib.plots.names import of_classes

MOST_DOTS = 2_000  # beyond it, dots would cover each other
_PANEL_INCHES = 4.6
_MOST_COLUMNS = 8


def draw_regression(
    file: Path, title: str, columns: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> bool:
    """Predicted against true values, and what is left over, as a PNG: a row for each column, or for
    the worst eight.

    Args:
        columns: by name, the targets and the predictions of the samples, in the target's unit; NaN
            where missing.

    Returns:
        Whether there was anything to draw.
    """
    drawn = []
    for name, pair in zip(of_classes(list(columns), 30), columns.values(), strict=True):
        true, predicted = (np.array(numbers, float) for numbers in pair)
        present = np.isfinite(true) & np.isfinite(predicted)
        if present.any():
            drawn.append((name, true[present], predicted[present]))
    if not drawn:
        return False
    if len(drawn) > _MOST_COLUMNS:
        title += (f", the {_MOST_COLUMNS} of {len(drawn)} columns with the largest MAE in standard "
                  "deviations of the target; all are in per_class.csv")
        drawn = sorted(drawn, key=_scaled_error, reverse=True)[:_MOST_COLUMNS]
    with paper.page(file, 2 * _PANEL_INCHES + 1, _PANEL_INCHES * len(drawn) + 0.5) as figure:
        paper.head(figure, title)
        panels = figure.subplots(len(drawn), 2, squeeze=False)
        for (against, left), (name, true, predicted) in zip(panels, drawn, strict=True):
            _draw_column(against, left, true, predicted, name)
    return True


def _scaled_error(column: tuple[str, np.ndarray, np.ndarray]) -> float:
    """Mean absolute error in standard deviations of the target; of a constant one none is worse."""
    _, true, predicted = column
    error, deviation = np.abs(predicted - true).mean(), true.std()
    return error / deviation if deviation > 0 else float("inf") if error > 0 else 0.0


def _draw_column(
    against: Axes, left: Axes, true: np.ndarray, predicted: np.ndarray, name: str
) -> None:
    residual = predicted - true
    low, high = min(true.min(), predicted.min()), max(true.max(), predicted.max())
    margin = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
    ends = (low - margin, high + margin)
    _draw_points(against, true, predicted)
    # Over dark cells; dots would be hidden by it.
    outline = [withStroke(linewidth=3, foreground="white")] if len(true) > MOST_DOTS else []
    against.plot(ends, ends, color=paper.INK, linestyle="--", linewidth=1, path_effects=outline,
                 label="predicted = true")
    against.set_xlim(ends)
    against.set_ylim(ends)
    against.set_aspect("equal")
    against.set_title(f"{name}: MAE {np.abs(residual).mean():.4g}, {len(true):,} samples")
    against.set_xlabel(f"true {name} (in its unit)")
    against.set_ylabel(f"predicted {name} (in its unit)")
    against.legend(loc="upper left")
    _draw_points(left, predicted, residual)
    left.axhline(0, color=paper.INK, linestyle="--", linewidth=1, path_effects=outline)
    left.axhline(residual.mean(), color=paper.RED, linestyle=":", path_effects=outline,
                 label=f"mean residual {residual.mean():.3g}")
    left.set_title("residuals")
    left.set_xlabel(f"predicted {name} (in its unit)")
    left.set_ylabel("predicted − true (in its unit)")
    left.legend(loc="upper right")
    for axes in (against, left):
        axes.grid()


def _draw_points(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    if len(x) <= MOST_DOTS:
        axes.plot(x, y, "o", color=paper.BLUE, alpha=0.5, markersize=4, markeredgewidth=0)
        return
    image = axes.hexbin(x, y, gridsize=45, cmap=paper.inked_shades(), bins="log", mincnt=1,
                        linewidths=0.1)
    axes.figure.colorbar(image, ax=axes, label="samples in a cell", shrink=0.6, pad=0.02,
                         format=FuncFormatter(lambda count, _: f"{count:,.0f}"))


def draw_positions(file: Path, title: str, losses: Sequence[float]) -> None:
    """A language model's loss at each position of its window as a PNG.

    Args:
        losses: nats per token, NaN where no token was.
    """
    values = np.array(losses, float)
    with paper.page(file, 8, 4) as figure:
        axes = figure.add_subplot()
        paper.head(figure, title)
        few = {"marker": "o", "markersize": 3} if len(values) <= 100 else {"linewidth": 1}
        axes.plot(np.arange(1, len(values) + 1), values, color=paper.BLUE, **few)
        present = values[np.isfinite(values)]
        if present.size:
            axes.axhline(present.mean(), color=paper.INK, linestyle="--", linewidth=1,
                         label=f"mean over positions {present.mean():.4g}")
            axes.legend()
        axes.set_xlabel("position in the window (tokens)")
        axes.set_ylabel("loss (nats per token)")
        axes.grid()
