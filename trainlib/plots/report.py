"""report.html: a run on one page that needs no network, no script and no other file."""

from __future__ import annotations

import base64
import csv
import json
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from trainlib.plots import paper
from trainlib.plots.curves import kinds, monitored
from trainlib.plots.records import read_config, read_json, read_records

REPORT = "report.html"
_MOST_CLASSES = 100  # rows of the table of classes
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 2rem auto;
       max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.lead { color: #444; margin-top: .2rem; }
table { border-collapse: collapse; } th, td { padding: .2rem .7rem; text-align: right;
        border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, td.text, table.facts td { text-align: left; }
div.wide { overflow-x: auto; } img.figure { max-width: 100%; }
div.examples { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; padding: .5rem; border: 1px solid #ddd; max-width: 22rem; }
figure img { image-rendering: pixelated; max-width: 100%; } figcaption { font-size: .85rem; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; }
figure pre { white-space: pre-wrap; margin: 0 0 .3rem; padding: .4rem; }
"""


def write_report(run: Path) -> Path:
    """Makes ``report.html`` of what stands in a run folder, its pictures included.

    Raises:
        NotARun: the folder holds no run.
    """
    config, name = read_config(run), run.resolve().name
    best = read_json(run / "best" / "evaluation.json")
    final = read_json(run / "final" / "evaluation.json")
    log = _Log(run, monitored(config))
    sections = [
        ("Metrics of the validation split", _metrics(best, final)),
        ("Curves", _figures(run, ["curves.png"])),
        ("Predictions in detail", _figures(run, sorted(
            file.name for file in run.glob("confusion_matrix*.png"))) + _classes(
            run / "per_class.csv")),
        *_examples(run / "examples"),
        ("Student and teachers", _mapping(read_json(run / "distillation.json"))),
        ("Learning-rate sweep", _figures(run, ["lr_find.png"])),
        ("Starts and times", _times(run, log)),
        ("Machine", _mapping({key: value for key, value in
                              read_json(run / "environment.json").items() if key != "starts"})),
        ("Options", f"<pre>{escape(_text(run / 'config.yaml'))}</pre>"),
    ]
    tasks = ", ".join(f"{task} ({kind.replace('_', ' ')})" for task, kind in kinds(config).items())
    page = "".join(f"<h2>{escape(title)}</h2>\n{body}\n" for title, body in sections if body)
    html = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(name)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(name)}</h1>
<p class="lead">{escape(tasks)}. {escape(_outcome(run, log))}</p>
{page}</body>
</html>
"""
    paper.write(run / REPORT, html.encode())
    return run / REPORT


class _Log:
    """What the page takes from ``metrics.jsonl``, in one pass."""

    def __init__(self, run: Path, monitor: str):
        self.monitor, self.last_step, self.last_epoch, self.peak_gib = monitor, 0, 0.0, 0.0
        self.speeds = array("d")
        for record in read_records(run / "metrics.jsonl"):
            self.last_step = max(self.last_step, record["step"])
            self.last_epoch = record.get("epoch") or self.last_epoch
            speed = record.get("speed/samples_per_second")
            if isinstance(speed, int | float) and math.isfinite(speed):
                self.speeds.append(speed)
            self.peak_gib = max(self.peak_gib, record.get("memory/peak_gib") or 0.0)
        self.bad_steps = sum(1 for _ in read_records(run / "bad_steps.jsonl"))


def _outcome(run: Path, log: _Log) -> str:
    ended = read_json(run / "exit.json")
    text = f"{log.last_step:,} steps, {log.last_epoch:.4g} epochs. "
    if ended:
        word = "Finished" if ended.get("code") == 0 else f"Ended with code {ended.get('code')}"
        reason = ended.get("reason")
        text += word + (f": {reason}." if ended.get("code") and reason else ".")
    return text


def _metrics(best: Mapping[str, Any], final: Mapping[str, Any]) -> str:
    """The numbers of each task, of both weights; lists and tables stand elsewhere."""
    rows = []
    for task in best or final:
        columns = [_numbers(results.get(task)) for results in (best, final)]
        for key in dict.fromkeys(key for column in columns for key in column):
            prefix = f"{task}: " if len(best or final) > 1 else ""
            rows.append([prefix + key, *(_number(column.get(key)) for column in columns)])
    return _table(["", "best weights", "final weights"], rows)


def _numbers(result: Any, prefix: str = "") -> dict[str, float]:
    found = {}
    for key, value in result.items() if isinstance(result, dict) else ():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{key} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key.replace("_", " ")] = value
    return found


def _classes(file: Path) -> str:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            header, *rows = csv.reader(lines)
    except (OSError, ValueError):
        return ""
    shown = [[_number(cell) for cell in row] for row in rows[:_MOST_CLASSES]]
    more = len(rows) - len(shown)
    return _table(header, shown) + (f"<p>and {more:,} more in per_class.csv</p>" if more else "")


def _examples(folder: Path) -> list[tuple[str, str]]:
    """Mistakes and drawn samples, a section each."""
    try:
        entries = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    titles = {"mistake": "Worst predictions", "sample": "Samples drawn at random"}
    sections = []
    for group, title in titles.items():
        shown = [_example(folder, entry) for entry in entries if entry.get("group") == group]
        sections.append((title, f'<div class="examples">{"".join(shown)}</div>' if shown else ""))
    return sections


def _example(folder: Path, entry: Mapping[str, Any]) -> str:
    body = ""
    if entry.get("image"):
        body = f'<img src="{_inline(folder / Path(entry["image"]).name)}" alt="">'
    elif entry.get("text") is not None:
        body = f"<pre>{escape(str(entry['text']))}</pre>"
    said = [f"{name} {entry[name]!r}" if name != "task" else entry[name]
            for name in ("task", "target", "prediction")]
    said += [f"{name} {_number(entry[name])}" for name in ("confidence", "loss")
             if entry.get(name) is not None]
    said.append(f"row {entry['row']}")
    return f"<figure>{body}<figcaption>{'<br>'.join(map(escape, said))}</figcaption></figure>"


def _times(run: Path, log: _Log) -> str:
    starts = read_json(run / "environment.json").get("starts") or []
    ended = read_json(run / "exit.json").get("time")
    rows = [[start.get("time", ""), _number(start.get("step")), _number(start.get("processes"))]
            for start in starts]
    facts = {}
    if starts and ended:
        facts["from first start to end"] = _span(starts[0].get("time"), ended)
    if log.speeds:
        facts["training speed, median"] = f"{median(log.speeds):,.0f} samples/s"
    if log.peak_gib:
        facts["peak memory of the main process"] = f"{log.peak_gib:.3g} GiB"
    if log.bad_steps:
        facts["steps that were skipped"] = f"{log.bad_steps:,} (bad_steps.jsonl)"
    return _table(["started (UTC)", "at step", "processes"], rows) + _mapping(facts)


def _span(first: Any, last: Any) -> str:
    try:
        seconds = (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()
    except (TypeError, ValueError):
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours} h " if hours else "") + f"{minutes} min {seconds} s"


def _figures(run: Path, names: Iterable[str]) -> str:
    return "\n".join(f'<p><img class="figure" src="{_inline(run / name)}" alt="{escape(name)}"></p>'
                     for name in names if (run / name).is_file())


def _inline(file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError:
        return "data:,"
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _mapping(values: Mapping[str, Any]) -> str:
    rows = []
    for key, value in values.items():
        if isinstance(value, list):
            value = " ".join(map(str, value))
        elif isinstance(value, dict):
            value = ", ".join(f"{name} {_number(one)}" for name, one in _numbers(value).items())
        rows.append([key.replace("_", " "), _number(value)])
    return _table(None, rows, "facts")


def _table(
    header: Sequence[str] | None, rows: Sequence[Sequence[str]], kind: str = "numbers"
) -> str:
    """Cells that are no numbers stand on the left; of a table of facts all do."""
    if not rows:
        return ""

    def cell(text: str) -> str:
        is_number = text[:1].isdigit() or text[:1] in "-.–"
        start = "<td>" if is_number else '<td class="text">'
        return f"{start}{escape(text)}</td>"

    head = "" if header is None else f"<tr>{''.join(f'<th>{escape(t)}</th>' for t in header)}</tr>"
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in rows)
    return f'<div class="wide"><table class="{kind}">{head}\n{body}</table></div>'


def _number(value: Any) -> str:
    """A number as people write it; of a text the number that it is, or itself."""
    if value is None:
        return "–"
    if isinstance(value, str):
        try:
            value = float(value) if "." in value or "e" in value else int(value)
        except ValueError:
            return value
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
