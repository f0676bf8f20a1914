"""Several runs over each other, and what differs in their options."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from trainlib.plots import paper
from trainlib.plots.curves import (
    Panel,
    choose_panels,
    draw_line,
    finish_panel,
    label,
    set_scale,
    wanted_metrics,
)
from trainlib.plots.names import fonts, shorten, tell_apart
from trainlib.plots.records import Curves, read_config, read_curves

_MOST_ROWS, _MOST_RUNS = 30, 8  # of the table in the picture
_CELL_LENGTH, _OPTION_LENGTH, _RUN_LENGTH = 28, 60, 40  # letters
_UNSET = "(unset)"
_COLUMNS = 2
_WIDTH, _ROW_HEIGHT = 5.5, 3.0  # inches of a panel
_RUN_INCHES = 3.0  # of its name in the legend
_TABLE_POINTS, _LINE_INCHES = 8, 0.158


def overlay(
    runs: Sequence[Path], file: Path, say: Callable[[str], object] = print
) -> dict[str, list[str]]:
    """Draws the curves of several runs over each other, above the table of what differs.

    Args:
        runs: their folders.
        file: the PNG.
        say: is given the table, with nothing cut.

    Returns:
        What differs, as ``differences`` has it.

    Raises:
        NotARun: a folder holds no run.
    """
    runs = [Path(run) for run in runs]
    configs = [read_config(run) for run in runs]  # before any of the long ones is read
    curves = [read_curves(run) for run in runs]
    names = run_names(runs)
    differing = differences(configs)
    say("\n".join(_table(names, differing)))
    shown = _shown_table(names, differing)
    keys = dict.fromkeys(key for one in curves for key in one.lines)
    panels = _panels(configs, list(keys))
    rows = max(-(-len(panels) // _COLUMNS), 1)
    width = max(_WIDTH * _COLUMNS, max(map(len, shown)) * paper.MONOSPACE_INCHES + 0.5)
    beside = max(int(width / _RUN_INCHES), 1)  # names of the legend
    heights = [_ROW_HEIGHT * rows + 0.3 + 0.2 * -(-len(runs) // beside),
               _LINE_INCHES * len(shown) + 0.4]
    with paper.page(file, width, sum(heights)) as figure:
        upper, lower = figure.subfigures(2, 1, height_ratios=heights)
        for number, panel in enumerate(panels):
            axes = upper.add_subplot(rows, _COLUMNS, number + 1)
            _draw_panel(axes, panel, curves)
            finish_panel(axes, panel, max(one.last_step for one in curves))
        if panels:
            handles = [upper.axes[0].plot([], [], color=colour, linestyle=dashes, marker=marker)[0]
                       for _, (colour, dashes, marker) in _styled(names)]
            upper.legend(handles, tell_apart(names, _RUN_LENGTH), loc="outside upper left",
                         ncols=beside, frameon=False)
        lower.text(0.02, 1, "\n".join(shown), family=fonts("monospace"), va="top",
                   fontsize=_TABLE_POINTS, linespacing=1.4)
    return differing


def differences(configs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """By option, its value in each of several runs, where they are not all the same.

    The run folder is left out.
    """
    flat = [_flatten(config) for config in configs]
    found = {}
    for key in dict.fromkeys(key for config in flat for key in config):
        values = [config.get(key, _UNSET) for config in flat]
        if key != "run_dir" and len(set(values)) > 1:
            found[key] = values
    return found


def run_names(runs: Sequence[Path]) -> list[str]:
    """The names of the folders, or their paths where two have one name."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The leaves of nested mappings by dotted path, as text; an empty mapping is a leaf."""
    leaves = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            leaves |= _flatten(value, f"{prefix}{key}.")
        else:
            is_plain = isinstance(value, str) and value == " ".join(value.split())
            leaves[f"{prefix}{key}"] = value if is_plain else json.dumps(
                value, ensure_ascii=False, default=str)
    return leaves


def _table(names: list[str], differing: dict[str, list[str]]) -> list[str]:
    if not differing:
        return ["no option differs"]
    rows = [["option", *names], *([key, *values] for key, values in differing.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows]


def _shown_table(names: list[str], differing: dict[str, list[str]]) -> list[str]:
    """As much of the table as a picture has room for, with cells that differ where they do."""
    shown = list(differing.items())[:_MOST_ROWS]
    options = tell_apart([key for key, _ in shown], _OPTION_LENGTH)
    table = _table(tell_apart(names, _CELL_LENGTH)[:_MOST_RUNS], {
        option: tell_apart(values, _CELL_LENGTH)[:_MOST_RUNS]
        for option, (_, values) in zip(options, shown, strict=True)})
    more = {"options": len(differing) - len(shown), "runs": len(names) - _MOST_RUNS}
    return table + [f"… and {number} more {what}, which are printed"
                    for what, number in more.items() if number > 0 and differing]


def _panels(configs: Sequence[dict[str, Any]], keys: list[str]) -> list[Panel]:
    """One key each: lines of several runs are enough."""
    wanted = ["train/loss", "eval/loss", *wanted_metrics(configs), "train/lr", "train/grad_norm"]
    found = []
    for key in dict.fromkeys(wanted):
        for panel in choose_panels(configs, [key]) if key in keys else ():
            is_named = key in ("train/lr", "train/grad_norm")
            title = panel.title if is_named else label(key)
            smoothed = ", smoothed" if key in ("train/loss", "train/grad_norm") else ""
            found.append(Panel(shorten(title, _RUN_LENGTH) + smoothed, panel.unit, [key]))
    return found


def _styled(runs: Iterable[Any]) -> Iterator[tuple[Any, tuple]]:
    """Runs with colours and dashes of as many as anyone can tell apart, and more."""
    dashes = [line[1] for line in paper.LINES]
    styles = [(colour, dashes[(number + turn) % len(dashes)], marker)
              for turn in range(len(dashes))
              for number, (colour, _, marker) in enumerate(paper.LINES)]
    return zip(runs, cycle(styles), strict=False)


def _draw_panel(axes: Axes, panel: Panel, runs: list[Curves]) -> None:
    key, visible = panel.keys[0], [np.empty(0)]
    for curves, (colour, dashes, marker) in _styled(runs):
        line = curves.smoothed.get(key) or curves.lines.get(key)
        if line is not None:
            steps, values = line.points()
            draw_line(axes, steps, values, color=colour, linestyle=dashes, marker=marker)
            visible.append(values)
    set_scale(axes, panel, visible)
