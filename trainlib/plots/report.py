"""report.html: a run on one page that needs no network, no script and no other file."""

from __future__ import annotations

import csv
import json
import math
from array import array
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import partial
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from trainlib.plots import page, paper
from trainlib.plots.curves import kinds, monitored
from trainlib.plots.names import shorten, tell_apart
from trainlib.plots.records import Curves, Line, finite, read_config, read_json, read_records

REPORT = "report.html"
_MOST_CLASSES = 100  # rows of the table of classes
_TASK_LENGTH, _CLASS_LENGTH = 48, 100  # letters of a name


def write_report(
    run: Path, say: Callable[[str], object] = print, ended: dict[str, Any] | None = None
) -> Path:
    """Makes ``report.html`` of what stands in a run folder, its pictures included.

    Args:
        say: is told which section a damaged file has cost.
        ended: what ``exit.json`` will say, of a run that draws its own report before it ends.

    Raises:
        NotARun: the folder holds no run.
        CannotWrite: it takes no file.
    """
    config, name = read_config(run), run.resolve().name
    best = read_json(run / "best" / "evaluation.json")
    final = read_json(run / "final" / "evaluation.json")
    ended = read_json(run / "exit.json") or ended or {}
    log = _Log(run, monitored(config))
    groups = {"mistake": "Worst predictions", "sample": "Samples drawn at random"}
    sections = {
        "Metrics of the validation split": lambda: _metrics(best, final, log.best_step),
        "Curves": lambda: _figures(run, ["curves.png"]),
        "Predictions in detail": lambda: _figures(run, sorted(
            file.name for file in run.glob("confusion_matrix*.png"))),
        "Classes": lambda: _classes(run / "per_class.csv"),
        **{title: partial(_examples, run / "examples", group, kinds(config))
           for group, title in groups.items()},
        "Student and teachers": lambda: page.mapping(read_json(run / "distillation.json")),
        "Learning-rate sweep": lambda: _figures(run, ["lr_find.png"]),
        "Starts and times": lambda: _times(run, log, ended),
        "Machine": lambda: page.mapping({
            key: value for key, value in read_json(run / "environment.json").items()
            if key != "starts"}),
        "Options": lambda: f"<pre>{escape(_text(run / 'config.yaml'))}</pre>",
    }
    body = ""
    for title, make in sections.items():
        try:
            content = make()
        except Exception as error:
            why = f"left out ({paper.reason(error)})"
            say(f"{run / REPORT}, {title}: {why}")
            content = f"<p>{escape(why)}</p>"
        body += f"<h2>{escape(title)}</h2>\n{content}\n" if content else ""
    tasks = ", ".join(f"{task} ({kind.replace('_', ' ')})" for task, kind in kinds(config).items())
    html = page.frame(name, f"{tasks}. {_outcome(ended, log)}", body)
    paper.write(run / REPORT, html.encode(errors="replace"))
    return run / REPORT


class _Log:
    """What the page takes from ``metrics.jsonl``, in one pass."""

    def __init__(self, run: Path, monitor: str):
        self.last_step, self.last_epoch, self.peak_gib = 0, 0.0, 0.0
        self.speeds, monitored_values = array("d"), Line()
        for record in read_records(run / "metrics.jsonl"):
            self.last_step = max(self.last_step, record["step"])
            epoch, speed, peak_gib, value = (finite(record.get(key)) for key in (
                "epoch", "speed/samples_per_second", "memory/peak_gib", monitor))
            self.last_epoch = self.last_epoch if math.isnan(epoch) else epoch
            self.peak_gib = max(self.peak_gib, peak_gib)  # which NaN does not change
            if not math.isnan(speed):
                self.speeds.append(speed)
            if monitor in record:
                monitored_values.add(record["step"], value)
        best = Curves({monitor: monitored_values}).best(monitor)
        self.best_step = None if best is None else best[0]
        self.bad_steps = sum(1 for _ in read_records(run / "bad_steps.jsonl"))


def _outcome(ended: Mapping[str, Any], log: _Log) -> str:
    text = f"{log.last_step:,} steps, {log.last_epoch:.4g} epochs. "
    if ended:
        word = "Finished" if ended.get("code") == 0 else f"Ended with code {ended.get('code')}"
        reason = ended.get("reason")
        text += word + (f": {reason}." if ended.get("code") and reason else ".")
    return text


def _metrics(
    best: Mapping[str, Any], final: Mapping[str, Any], best_step: float | None
) -> str:
    """The numbers of each task, of both weights; lists and tables stand elsewhere."""
    rows = []
    short = _short(best or final)
    for task in best or final:
        columns = [page.numbers(results.get(task)) for results in (best, final)]
        for key in dict.fromkeys(key for column in columns for key in column):
            prefix = f"{short[task]}: " if len(best or final) > 1 else ""
            rows.append([prefix + key, *(page.number(column.get(key)) for column in columns)])
    at = "" if best_step is None else f" (step {best_step:,.0f})"
    return page.table(["", "best weights" + at, "final weights"], rows)


def _short(tasks: Iterable[str]) -> dict[str, str]:
    tasks = list(tasks)
    return dict(zip(tasks, tell_apart(tasks, _TASK_LENGTH), strict=True))


def _classes(file: Path) -> str:
    if not file.exists():
        return ""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines))
    header, rows = rows[0] if rows else [], rows[1:]
    # The class "007" is a name and no number.
    lengths = {"task": _TASK_LENGTH, "class": _CLASS_LENGTH}
    shown = [[shorten(text, lengths[column]) if column in lengths else _rounded(text)
              for column, text in zip(header, row, strict=False)] for row in rows[:_MOST_CLASSES]]
    more = len(rows) - len(shown)
    return page.table(header, shown) + (
        f"<p>and {more:,} more in per_class.csv</p>" if more else "")


def _rounded(text: str) -> str:
    try:
        return page.number(int(text) if text.isdigit() else float(text))
    except ValueError:
        return text


def _examples(folder: Path, group: str, kind_of: Mapping[str, str]) -> str:
    """The samples of a group, with a mark on the mistakes among those that were drawn."""
    if not (folder / "examples.json").exists():
        return ""
    entries = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    shown = [_example(folder, entry, _mark(kind_of.get(entry["task"], ""), entry)
                      if group == "sample" else "")
             for entry in entries if entry["group"] == group]
    return f'<div class="examples">{"".join(shown)}</div>' if shown else ""


def _mark(kind: str, entry: Mapping[str, Any]) -> str:
    """What is wrong with a prediction; of numbers and pixels that is a question of how much."""
    if entry["prediction"] == entry["target"]:
        return ""
    if kind == "multilabel":
        return "not the target"  # of which labels may be missing
    is_mistake = kind in ("classification", "language_modeling") and entry["target"] != ""
    return "mistake" if is_mistake else ""


def _example(folder: Path, entry: Mapping[str, Any], mark: str) -> str:
    body = ""
    if entry.get("image"):
        body = f'<img src="{page.inline(folder / Path(entry["image"]).name)}" alt="">'
    elif entry.get("text") is not None:
        text = "".join(c for c in str(entry["text"]) if c.isprintable() or c in "\n\t")
        body = f"<pre>{escape(text)}</pre>"
    said = [shorten(entry["task"], _TASK_LENGTH),
            *(f"{name} {entry[name]!r}" for name in ("target", "prediction"))]
    said += [f"{name} {page.number(entry[name])}" for name in ("confidence", "loss")
             if entry.get(name) is not None]
    lines = [*map(escape, [*said, f"row {entry['row']}"])]
    start = "<figure>"
    if mark:
        start, lines = '<figure class="mistake">', [f'<b class="mistake">{mark}</b>', *lines]
    return f"{start}{body}<figcaption>{'<br>'.join(lines)}</figcaption></figure>"


def _times(run: Path, log: _Log, ended: Mapping[str, Any]) -> str:
    starts = read_json(run / "environment.json").get("starts") or []
    rows = [[str(start.get("time", "")),
             *(page.number(start.get(key)) for key in ("step", "processes"))] for start in starts]
    facts = {}
    if starts and ended.get("time"):
        facts["from first start to end"] = _span(starts[0].get("time"), ended["time"])
    if log.speeds:
        facts["training speed, median"] = f"{median(log.speeds):,.0f} samples/s"
    if log.peak_gib:
        facts["peak memory of the main process"] = f"{log.peak_gib:.3g} GiB"
    if log.bad_steps:
        facts["steps that were skipped"] = f"{log.bad_steps:,} (bad_steps.jsonl)"
    return page.table(["started (UTC)", "at step", "processes"], rows) + page.mapping(facts)


def _span(first: Any, last: Any) -> str:
    try:
        seconds = (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()
    except (TypeError, ValueError):
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours} h " if hours else "") + f"{minutes} min {seconds} s"


def _figures(run: Path, names: Iterable[str]) -> str:
    return "\n".join(
        f'<p><img class="figure" src="{page.inline(run / name)}" alt="{escape(name)}"></p>'
        for name in names if (run / name).is_file())


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
