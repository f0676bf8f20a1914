"""Figures: measured in turns, each with its spread, kept as JSON with where they come from."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "accelerate", "numpy", "datasets", "transformers", "lightning")


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    section: str
    job: str
    what: str
    """The side, or what was counted."""
    value: float
    unit: str
    ratio: float | None = None
    """To the first side of its job in the same run, the median over the rounds."""
    low: float | None = None
    """Quartiles of the ratio, or of the value where there is none."""
    high: float | None = None
    n: int = 1
    aim: str = ""
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.section, self.job, self.what


def skipped(section: str, job: str, what: str, why: object) -> Row:
    """A line for what could not be measured here, with the reason."""
    return Row(section, job, what, float("nan"), "", n=0, note=f"not measured: {why}")


def alternate(
    sides: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """What each side says of itself, one call a round; who begins changes from round to round, and
    so does the order."""
    names = list(sides)
    values: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        order = [*names[first:], *names[:first]]
        for name in order if number // len(names) % 2 == 0 else order[::-1]:
            values[name].append(sides[name]())
    return values


def timed(run: Callable[[int], None], num_steps: int, device: torch.device) -> Callable[[], float]:
    """A call that takes so many steps and returns the seconds of one."""
    def call() -> float:
        begin = time.perf_counter()
        run(num_steps)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / num_steps

    return call


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def compared(
    section: str, job: str, values: Mapping[str, Sequence[float]], unit: str, factor: float = 1.0,
    aims: Mapping[str, str] | None = None,
) -> list[Row]:
    """A line for each side of ``alternate``, with its ratio to the first, round by round.

    Args:
        factor: from what the sides return to ``unit``.
    """
    rows, first = [], next(iter(values.values()))
    for index, (name, each) in enumerate(values.items()):
        spread = (None, None, None) if index == 0 else quartiles(
            [one / other for one, other in zip(each, first, strict=True)])
        rows.append(Row(section, job, name, statistics.median(each) * factor, unit, spread[1],
                        spread[0], spread[2], len(each), (aims or {}).get(name, "")))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The lines as text, by section and job."""
    lines, seen = [], None
    for row in rows:
        if (row.section, row.job) != seen:
            seen = row.section, row.job
            lines += ["", f"{row.section}: {row.job}"]
        if row.n == 0:
            lines.append(f"  {row.what:34}{row.note}")
            continue
        line = f"  {row.what:34}{row.value:>12,.4g} {row.unit:12}"
        if row.ratio is not None:
            line += f"{row.ratio:8.3f}  ({row.low:.3f} to {row.high:.3f})"
        elif row.low is not None:
            line += f"{'':8}  ({row.low:.4g} to {row.high:.4g})"
        line += f"  n {row.n}" if row.n > 1 else ""
        line += f"  aim {row.aim}" if row.aim else ""
        lines.append(line + (f"  {row.note}" if row.note else ""))
    return "\n".join(lines[1:])


def save(path: Path, command: str, rows: Sequence[Row]) -> None:
    """Writes the lines with date, commit, machine and versions."""
    content = {"command": command, "date": datetime.now(UTC).isoformat(timespec="seconds"),
               "commit": _commit(), "machine": machine(), "versions": _versions(),
               "rows": [{name: value for name, value in asdict(row).items()
                         if value not in (None, "") and value == value} for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def against(path: Path, rows: Sequence[Row]) -> str:
    """The lines that a file of ``save`` has, too, each beside what stood there."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    before = {(row["section"], row["job"], row["what"]): row for row in kept["rows"]}
    lines = [f"against {path.name} of {kept['date']}, commit {kept['commit']}:"]
    for row in rows:
        old = before.get(row.key)
        if old is None or row.n == 0 or old.get("n") == 0:
            continue
        now, then, what = ((row.value, old["value"], row.unit) if row.ratio is None else
                           (row.ratio, old["ratio"], "ratio"))
        lines.append(f"  {row.section}: {row.job}: {row.what}: {now:.4g} {what}, was {then:.4g}"
                     + (f" ({now / then - 1:+.1%})" if then else ""))
    return "\n".join(lines)


def machine() -> dict[str, object]:
    """Processor, threads, load and GPU."""
    found: dict[str, object] = {
        "processor": _processor(), "cores": os.cpu_count(), "system": platform.platform(),
        "python": platform.python_version(), "threads": torch.get_num_threads(),
        "load": [round(each, 2) for each in os.getloadavg()],
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")),
                platform.machine())


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    try:
        def git(*words: str) -> str:
            return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True,
                                  text=True).stdout.strip()

        return git("rev-parse", "--short", "HEAD") + (" and changes" * bool(
            git("status", "--porcelain", "--untracked-files=no")))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
