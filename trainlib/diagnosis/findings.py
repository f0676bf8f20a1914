"""What a diagnosis has found, and the time that it has."""

from __future__ import annotations

import time
from typing import NamedTuple

ERROR, WARNING = "error", "warning"


class Finding(NamedTuple):
    """One thing that is wrong with a job."""

    severity: str
    """``ERROR``: the run would be in vain; ``WARNING``: worth a look before it begins."""
    name: str
    found: str
    """With the numbers."""
    advice: str
    """Which option, which value."""


class Report:
    """Measured facts, findings, and what there was no time for."""

    def __init__(self, seconds: float):
        self.seconds, self._start = seconds, time.perf_counter()
        self.facts: list[tuple[str, str]] = []
        self.findings: list[Finding] = []
        self.cut_short: list[str] = []

    @property
    def names(self) -> set[str]:
        """Of the findings."""
        return {finding.name for finding in self.findings}

    @property
    def spent(self) -> float:
        """Seconds since the diagnosis began."""
        return time.perf_counter() - self._start

    def deadline(self, most: float) -> Deadline:
        """So many seconds from now, within what is left of all."""
        return Deadline(max(0.0, min(most, self.seconds - self.spent)))

    def fact(self, what: str, value: str) -> None:
        self.facts.append((what, value))

    def error(self, name: str, found: str, advice: str) -> None:
        self.findings.append(Finding(ERROR, name, found, advice))

    def warning(self, name: str, found: str, advice: str) -> None:
        self.findings.append(Finding(WARNING, name, found, advice))

    def cut(self, what: str) -> None:
        """Says what was not done, or not to its end, for want of time."""
        self.cut_short.append(what)


class Deadline:
    """A moment to be done by."""

    def __init__(self, seconds: float):
        self._end = time.perf_counter() + seconds

    @property
    def is_over(self) -> bool:
        return self.left < 0

    @property
    def left(self) -> float:
        """Seconds; below 0 when it is over."""
        return self._end - time.perf_counter()


def number(value: float) -> str:
    """Four digits of a number."""
    return f"{value:.4g}"


def some(names: list[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
