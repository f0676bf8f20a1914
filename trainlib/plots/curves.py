"""How a run went: losses, metrics, learning rate and gradient norm over its steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from trainlib.plots import paper
from trainlib.plots.names import shorten, tell_apart
from trainlib.plots.records import Curves, lower_is_better

HEADLINE = {
    "classification": ("accuracy",), "multilabel": ("micro_f1", "macro_f1"),
    "regression": ("mae", "r2"), "segmentation": ("miou", "pixel_accuracy"),
    "language_modeling": ("perplexity", "bits_per_byte"),
}
_UNITS = {
    "loss": "loss", "mae": "absolute error (unit of the target)",
    "rmse": "error (unit of the target)", "r2": "R²",
    "perplexity": "perplexity of a token", "bits_per_byte": "bits per byte of text",
}
_WORDS = {"f1": "F1", "r2": "R²", "mae": "MAE", "rmse": "RMSE", "miou": "mean IoU"}
_WHOLE = ("train/loss", "train/lr", "train/grad_norm")
_WIDTH, _ROW_HEIGHT = 5.5, 3.1  # inches of a panel
_FEW = 60  # points of a line that get a marker each
_MOST_LINES = len(paper.LINES)  # of a panel
_MOST_INSIDE = 5  # lines of a panel whose legend stands among them
_LABEL_LENGTH, _TITLE_LENGTH = 34, 60  # letters
_LEGEND_INCHES = 0.2 * _MOST_LINES / 2 + 0.1  # of one below its panel


@dataclass
class Panel:
    """Lines that share a unit."""

    title: str
    unit: str
    keys: list[str]


def choose_panels(configs: Iterable[dict[str, Any]], keys: Iterable[str]) -> list[Panel]:
    """The panels of runs: losses, what is monitored and the headline metrics, rate and gradient.

    Args:
        configs: of each run.
        keys: that any of them has logged.
    """
    keys, found = list(dict.fromkeys(keys)), []
    losses = [key for key in ("train/loss", "eval/loss") if key in keys]
    found.append(Panel(" and ".join(map(label, losses)), "mean loss", losses))
    parts = [key for key in keys if key.startswith("train/") and key not in _WHOLE]
    if len(parts) > 1:
        found += _split(Panel("parts of the training loss, smoothed", "mean loss", parts))
    metrics: dict[str, Panel] = {}
    for key in wanted_metrics(configs):
        if key in keys and key not in losses:
            name = key.rpartition("/")[2]
            # Metrics with a unit of their own get a panel of their own; the others are shares.
            own = next((unit for unit in _UNITS if name.endswith(unit)), None)
            unit = _UNITS.get(own, "share, 0 to 1")
            metrics.setdefault(key if own else "", Panel("", unit, [])).keys.append(key)
    for panel in metrics.values():
        panel.title = label(panel.keys[0]) if len(panel.keys) == 1 else "validation"
        found += _split(panel)
    found += [Panel("learning rate", "learning rate", ["train/lr"]),
              Panel("gradient norm, before clipping", "norm of the gradient", ["train/grad_norm"])]
    return [panel for panel in found if any(key in keys for key in panel.keys)]


def _split(panel: Panel) -> list[Panel]:
    """Panels of no more lines than can be told apart."""
    number = -(-len(panel.keys) // _MOST_LINES)
    if number == 1:
        return [panel]
    most = -(-len(panel.keys) // number)
    return [Panel(f"{panel.title}, {place + 1} of {number}", panel.unit,
                  panel.keys[place * most : (place + 1) * most]) for place in range(number)]


def wanted_metrics(configs: Iterable[dict[str, Any]]) -> list[str]:
    """The key that each run monitors, and the headline metrics of its tasks, without doubles."""
    wanted = []
    for config in configs:
        wanted.append(monitored(config))
        tasks = kinds(config)
        for task, kind in tasks.items():
            prefix = f"eval/{task}/" if len(tasks) > 1 else "eval/"
            wanted += [prefix + name for name in HEADLINE.get(kind, ())]
    return list(dict.fromkeys(wanted))


def kinds(config: dict[str, Any]) -> dict[str, str]:
    """The kind of each task of a run."""
    tasks = config.get("tasks")
    return {str(name): str(task.get("kind", "")) for name, task in tasks.items()
            if isinstance(task, dict)} if isinstance(tasks, dict) else {}


def monitored(config: dict[str, Any]) -> str:
    """The key that decides which weights are best."""
    loop = config.get("loop")
    return str((loop.get("monitor") if isinstance(loop, dict) else None) or "eval/loss")


def label(key: str) -> str:
    """A logged key as people say it."""
    where, *task, name = key.split("/")
    name = " ".join(_WORDS.get(word, word) for word in name.split("_"))
    return " ".join(["validation" if where == "eval" else "training", *task, name])


def draw_curves(file: Path, title: str, config: dict[str, Any], curves: Curves) -> bool:
    """The curves of one run as a PNG; whether there was any to draw."""
    panels = choose_panels([config], curves.lines)
    if not panels:
        return False
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    monitor = monitored(config)
    best = curves.best(monitor)
    below = {number // columns for number, panel in enumerate(panels)
             if len(panel.keys) > _MOST_INSIDE}
    height = _ROW_HEIGHT * rows + _LEGEND_INCHES * len(below) + 0.6
    with paper.page(file, max(_WIDTH * columns, 7), height) as figure:
        paper.head(figure, title + (
            "" if best is None else f": best {shorten(label(monitor), _TITLE_LENGTH)} "
            f"{best[1]:.4g} at step {best[0]:,.0f}"))
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, number + 1)
            _draw_panel(axes, panel, curves)
            if best is not None:
                axes.axvline(best[0], color=paper.FAINT, linestyle=":", linewidth=1.2, zorder=0)
                if monitor in panel.keys:
                    axes.plot(*best, marker="*", markersize=12, color=paper.INK, linestyle="",
                              markerfacecolor="white", zorder=5, label="best")
            finish_panel(axes, panel, curves.last_step)
            if number < columns:
                show_epochs(axes, curves.epochs_per_step)
    return True


def _draw_panel(axes: Axes, panel: Panel, curves: Curves) -> None:
    visible = []
    names = tell_apart(map(label, panel.keys), _LABEL_LENGTH)
    for key, said, (colour, dashes, marker) in zip(
        panel.keys, names, _styles(panel), strict=False
    ):
        if key not in curves.lines:
            continue
        steps, values = curves.lines[key].points()
        style = {"color": colour, "linestyle": dashes, "marker": marker}
        missing = steps[np.isnan(values)] if key == "train/loss" else np.empty(0)
        if key in curves.smoothed and key in _WHOLE:
            pale = {"color": colour, "alpha": 0.35, "linewidth": 0.9, "marker": "."}
            draw_line(axes, steps, values, **pale, label="training, as recorded")
            visible.append(values)
            steps, values = curves.smoothed[key].points()
            axes.plot(steps, values, color=colour, label="training, smoothed",
                      marker=marker if np.isfinite(values).sum() == 1 else None)
        elif key in curves.smoothed:
            draw_line(axes, *curves.smoothed[key].points(), **style, label=said)
        else:
            said = "validation" if key == "eval/loss" else said
            draw_line(axes, steps, values, **style, label=said if len(panel.keys) > 1 else None)
        visible.append(values)
        if missing.size:
            axes.plot(missing, np.full(len(missing), 0.03), "x", color=paper.INK, markersize=5,
                      transform=axes.get_xaxis_transform(), label="not finite", clip_on=False)
    set_scale(axes, panel, visible)


def set_scale(axes: Axes, panel: Panel, visible: list[np.ndarray]) -> None:
    """A logarithmic axis for losses, errors and norms that span decades."""
    may_be_log = all(lower_is_better(key) or key == "train/grad_norm" for key in panel.keys)
    if may_be_log and paper.spans_decades(*visible):
        paper.log_scale(axes)


def _styles(panel: Panel) -> list[tuple]:
    """The training loss, where there is one, is the first; what is validated looks otherwise."""
    first = 1 if panel.keys[0].startswith("eval/") else 0
    return paper.LINES[first:] + paper.LINES[:first]


def draw_line(axes: Axes, steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """A line with gaps where values are missing, and with markers where points are few."""
    if np.isfinite(values).sum() > _FEW:
        style.pop("marker")
    axes.plot(steps, values, markersize=4, **style)


def finish_panel(axes: Axes, panel: Panel, last_step: float) -> None:
    """Labels, limits, grid and legend of a panel."""
    axes.set_title(shorten(panel.title, _TITLE_LENGTH))
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    margin = 0.02 * max(last_step, 1)
    axes.set_xlim(-margin, max(last_step, 1) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.grid()
    handles, _ = axes.get_legend_handles_labels()
    if len(handles) > _MOST_INSIDE:
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2, borderaxespad=0,
                    fontsize=7, columnspacing=1, handlelength=2.5)
    elif handles:
        axes.legend(loc="best")


def show_epochs(axes: Axes, epochs_per_step: float) -> None:
    """A second axis above, in epochs."""
    if epochs_per_step > 0:
        epochs = axes.secondary_xaxis("top", functions=(
            lambda step: step * epochs_per_step, lambda epoch: epoch / epochs_per_step))
        epochs.set_xlabel("epoch")
