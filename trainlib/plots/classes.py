"""How well each class or label is found: confusion matrices, and bars beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import FuncFormatter

from trainlib.plots import paper
from trainlib.plots.names import fonts, of_classes

MOST_NUMBERED = 20  # classes with a number in each cell
_MOST_TICKS = 25
_MOST_LABELS = 60  # of a multilabel task, a row each
_MOST_CELLS = 400  # along a side: fewer pixels than that would lose some
_NUM_PAIRS = 20
_FULL_NUMBERS = 5  # classes whose cells are wide enough for 1,234,567
_CELL_INCHES, _SIDE_INCHES, _LETTER_INCHES = 0.42, (3.2, 6.6), 0.085
_SIDE_WITHOUT_NUMBERS_INCHES = 4.8


def draw_confusion(
    file: Path, title: str, counts: np.ndarray, names: list[str], unit: str,
    ious: list[float] | None = None,
) -> None:
    """A confusion matrix as a PNG: counts, shares of each true class, and what is beside them.

    Args:
        counts: [classes, classes], rows are true classes.
        unit: what is counted, in the plural.
        ious: intersection over union of each class, which are drawn as bars.
    """
    num_classes = len(counts)
    has_pairs = num_classes > MOST_NUMBERED
    side = float(np.clip(_CELL_INCHES * num_classes, *_SIDE_INCHES))
    side = _SIDE_WITHOUT_NUMBERS_INCHES if has_pairs else side
    names = of_classes(names)
    longest = max(map(len, names))
    label, pair = _LETTER_INCHES * longest, 2 * max(longest, len("predicted")) + 16
    is_upright = label * min(num_classes, _MOST_TICKS) > side
    # Insides of the panels, and what they need around them.
    widths = [side, side] + [2.2] * (ious is not None)
    widths += [pair * paper.MONOSPACE_INCHES] * has_pairs
    around = label * (1 + (ious is not None)) + 1 + (1.5 if has_pairs else 0)
    height = side + 1.3 + (label if is_upright else 0.1)
    supports = counts.sum(1, keepdims=True)
    shares = np.divide(100.0 * counts, supports, out=np.zeros(counts.shape), where=supports > 0)
    with paper.page(file, sum(widths) + around, height) as figure:
        paper.head(figure, title)
        panels = iter(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
        left, right = next(panels), next(panels)
        _draw_matrix(left, counts, names, is_upright, f"number of {unit}", _count_text)
        _draw_matrix(right, shares, names, is_upright, "share of the true class, %", _share_text)
        right.set_yticklabels([])  # those of the left one
        right.set_ylabel("")
        if ious is not None:
            _draw_ious(next(panels), np.array(ious, float), names)
        if has_pairs:
            _list_pairs(next(panels), counts, shares, names)


def _draw_matrix(
    axes: Axes, values: np.ndarray, names: list[str], is_upright: bool, what: str,
    text_of: Callable[[float, int], str],
) -> None:
    num_classes = len(values)
    highest = values.max(initial=0) or 1
    # Mistakes are rare beside what is right: the square root makes them seen.
    image = axes.imshow(
        _pooled(values), paper.SHADES, PowerNorm(0.5, 0, highest), interpolation="nearest",
        extent=(-0.5, num_classes - 0.5, num_classes - 0.5, -0.5))
    for at in np.argwhere(values > 0) if num_classes <= MOST_NUMBERED else ():
        value = values[tuple(at)]
        is_dark = (value / highest) ** 0.5 > 0.64
        axes.text(at[1], at[0], text_of(value, num_classes), ha="center", va="center",
                  fontsize=7 if num_classes > 10 else 8, color="white" if is_dark else paper.INK)
    if num_classes > MOST_NUMBERED:
        axes.figure.colorbar(
            image, cax=axes.inset_axes((1.02, 0, 0.05, 1)),  # as high as the matrix
            format=FuncFormatter(lambda value, _: _count_text(value, num_classes)))
    paper.name_ticks(axes.set_xticks, names, _MOST_TICKS, rotation=90 if is_upright else 0)
    paper.name_ticks(axes.set_yticks, names, _MOST_TICKS)
    axes.spines[:].set_visible(True)
    axes.set_title(f"{what} (shades: square root)")
    axes.set_anchor("N")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")


def _pooled(values: np.ndarray) -> np.ndarray:
    """At most so many cells along a side, each the largest of those that it stands for."""
    every = -(-len(values) // _MOST_CELLS)
    starts = np.arange(0, len(values), every)
    return np.maximum.reduceat(np.maximum.reduceat(values, starts, 0), starts, 1)


def _count_text(count: float, num_classes: int) -> str:
    if num_classes <= _FULL_NUMBERS or count < 1000:
        return f"{count:,.0f}"
    power = 1 if count < 999_500 else 2 if count < 999_500_000 else 3
    number = count / 1000**power
    return f"{number:.1f}{' kMG'[power]}" if number < 9.95 else f"{number:.0f}{' kMG'[power]}"


def _share_text(percent: float, num_classes: int) -> str:
    digits = 1 if num_classes <= _FULL_NUMBERS else 0
    unit = 10.0**-digits
    # Only a class without a mistake has 100.
    if percent < 100 and percent >= 100 - unit / 2:
        return f">{100 - unit:.{digits}f}"
    return f"<{unit:.{digits}f}" if percent < unit / 2 else f"{percent:.{digits}f}"


def _draw_ious(axes: Axes, ious: np.ndarray, names: list[str]) -> None:
    axes.barh(range(len(ious)), ious, color=paper.BLUE, height=0.7)
    if len(ious) <= MOST_NUMBERED:
        for row, iou in enumerate(ious):
            axes.text(min(iou, 1) + 0.02, row, f"{iou:.3f}", va="center", fontsize=8,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # over the line
    mean = float(np.mean(ious))
    axes.axvline(mean, color=paper.INK, linestyle="--", linewidth=1)
    axes.set_title(f"IoU, mean {mean:.3f} (dashed)")
    axes.set_xlabel("intersection over union")
    axes.set_xlim(0, 1.22 if len(ious) <= MOST_NUMBERED else 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_ylim(len(ious) - 0.5, -0.5)
    paper.name_ticks(axes.set_yticks, names, _MOST_TICKS)


def most_confused(counts: np.ndarray, most: int = _NUM_PAIRS) -> list[tuple[int, int]]:
    """Pairs of true and predicted class by how often the one is taken for the other.

    Args:
        counts: [classes, classes], rows are true classes.
    """
    mistakes = counts.copy()
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:most]
    return [(int(place) // len(counts), int(place) % len(counts))
            for place in order if mistakes.flat[place] > 0]


def _list_pairs(
    axes: Axes, counts: np.ndarray, shares: np.ndarray, names: list[str]
) -> None:
    axes.set_axis_off()
    axes.set_title("most often confused")
    width = max(len("predicted"), *map(len, names))
    lines = [f"{'true':<{width}} {'predicted':<{width}} {'count':>6} {'%':>4}"]
    lines += [
        f"{names[true]:<{width}} {names[predicted]:<{width}} "
        f"{_count_text(counts[true, predicted], len(counts)):>6} "
        f"{_share_text(shares[true, predicted], len(counts)):>4}"
        for true, predicted in most_confused(counts)
    ]
    lines += ["no mistakes"] if len(lines) == 1 else []
    axes.text(0, 1, "\n".join(lines), family=fonts("monospace"), fontsize=8, va="top",
              linespacing=1.6, transform=axes.transAxes)


def draw_labels(file: Path, title: str, classes: list[dict], names: list[str]) -> None:
    """Precision, recall and F1 of each label as a PNG; of very many labels only the worst.

    Args:
        classes: precision, recall, f1 and support of each label.
    """
    shown, names = list(range(len(classes))), of_classes(names)
    if len(shown) > _MOST_LABELS:
        shown = sorted(shown, key=lambda k: classes[k]["f1"])[:_MOST_LABELS]
        title += f", the {_MOST_LABELS} of {len(classes)} labels with the least F1"
    rows = np.arange(len(shown))
    has_bars = len(shown) <= MOST_NUMBERED
    scores = {"precision": (paper.BLUE, "", "o"), "recall": ("#8fb8de", "//", "s"),
              "f1": ("#e9e9e9", "..", "^")}
    with paper.page(file, 8, 1.7 + len(shown) * (0.55 if has_bars else 0.19)) as figure:
        paper.head(figure, title)
        axes = figure.add_subplot()
        for place, (name, (colour, hatch, marker)) in enumerate(scores.items()):
            values = [classes[k][name] for k in shown]
            text = "F1" if name == "f1" else name
            if has_bars:
                axes.barh(rows + (place - 1) * 0.27, values, 0.27, color=colour, hatch=hatch,
                          edgecolor=paper.INK, linewidth=0.6, label=text)
            else:
                axes.plot(values, rows, marker, color=colour, markeredgecolor=paper.INK,
                          markersize=6, label=text, linestyle="", clip_on=False)
        axes.set_yticks(rows, [f"{names[k]} ({classes[k]['support']:,})" for k in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.set_xlabel("precision, recall, F1")
        axes.set_ylabel("label (positive samples)")
        axes.grid(axis="x" if has_bars else "both")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
