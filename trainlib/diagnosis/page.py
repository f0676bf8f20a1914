"""A diagnosis on the terminal: parameters, facts, findings."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

from trainlib.diagnosis.findings import Report
from trainlib.diagnosis.parameters import Row

_GAP = "  "
_NARROWEST, _WIDEST = 60, 120


def page(rows: Sequence[Row], report: Report) -> str:
    """The whole diagnosis, as wide as the terminal is."""
    width = min(max(shutil.get_terminal_size((80, 24)).columns, _NARROWEST), _WIDEST)
    header = Row("parameter", "shape", "mean", "std", "trainable")
    lines = ["diagnosis: nothing is written", "", *_aligned([header, *rows], width), ""]
    lines += _wrapped([("fact", "measured"), *report.facts], width)
    if report.cut_short:
        lines += ["", f"cut short, of the {report.seconds:g} s that a diagnosis has:"]
        lines += [line for cut in report.cut_short for line in textwrap.wrap(
            cut, width, initial_indent=_GAP, subsequent_indent=2 * _GAP)]
    lines.append("")
    if report.findings:
        cells = [("severity", "finding", "what was found, and what to do")]
        for finding in sorted(report.findings, key=lambda one: one.severity):
            cells.append((finding.severity, finding.name,
                          f"{_sentence(finding.found)}\nTo do: {_sentence(finding.advice)}"))
        lines += [*_wrapped(cells, width), ""]
    number = len(report.findings)
    lines.append(
        f"{number or 'no'} finding{'' if number == 1 else 's'}, after {report.spent:.1f} s")
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _aligned(rows: Sequence[Row], width: int) -> list[str]:
    """Rows in columns, of which the first gives way where they are too wide."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rest = sum(widths[1:]) + len(_GAP) * (len(widths) - 1)
    widths[0] = min(widths[0], max(20, width - rest))
    lines = []
    for name, *cells in rows:
        if len(name) > widths[0]:
            half = (widths[0] - 3) // 2
            name = f"{name[: widths[0] - 3 - half]}...{name[-half:]}"
        numbers = [cell.rjust(size) for cell, size in zip(cells, widths[1:], strict=True)]
        lines.append(_GAP.join([name.ljust(widths[0]), *numbers]).rstrip())
    return lines


def _wrapped(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Rows in columns, of which the last is wrapped within itself."""
    leading = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    indent = sum(leading) + len(_GAP) * len(leading)
    lines = []
    for *cells, text in rows:
        begin = "".join(cell.ljust(size) + _GAP
                        for cell, size in zip(cells, leading, strict=True))
        for paragraph in text.split("\n"):
            lines += textwrap.wrap(paragraph, width, initial_indent=begin, break_on_hyphens=False,
                                   subsequent_indent=" " * indent) or [begin.rstrip()]
            begin = " " * indent
    return lines
