"""What a page of HTML is made of: its frame, tables, and pictures within it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from itertools import repeat
from pathlib import Path
from typing import Any

_MOST_ROWS = 40  # of a table that is shown as a whole
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 2rem auto;
       max-width: 72rem; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.lead { color: #444; margin-top: .2rem; }
table { border-collapse: collapse; } th, td { padding: .2rem .7rem; text-align: right;
        border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums;
        overflow-wrap: break-word; }
th { white-space: nowrap; } td { max-width: 36rem; }
th:first-child, td:first-child, td.text, th.text, table.facts td { text-align: left; }
table.facts td:first-child { white-space: nowrap; vertical-align: top; }
div.wide { overflow-x: auto; } img.figure { max-width: 100%; }
div.examples { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; padding: .5rem; border: 1px solid #ddd; max-width: 22rem; }
figure.mistake { border: 2px solid #c8501e; } b.mistake { color: #a8401a; }
figure img { image-rendering: pixelated; max-width: 100%; } figcaption { font-size: .85rem; }
pre { background: #f5f5f5; padding: .8rem; white-space: pre-wrap; font-size: .85rem; }
figure pre { margin: 0 0 .3rem; padding: .4rem; }
div.long { max-height: 40rem; overflow-y: auto; border: 1px solid #ddd; width: fit-content;
           max-width: 100%; }
div.long th { position: sticky; top: 0; background: #fff; }
@media print { div.long { max-height: none; } }
@media (max-width: 40rem) {
  th { white-space: normal; } td { max-width: 14rem; }
  table.facts td:first-child { white-space: normal; }
}
"""


def frame(name: str, lead: str, body: str) -> str:
    """A whole page, of which no part comes from elsewhere and none is run.

    Args:
        name, lead: plain text.
        body: HTML.
    """
    return f"""<!DOCTYPE html>
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
<p class="lead">{escape(lead)}</p>
{body}</body>
</html>
"""


def table(
    header: Sequence[str] | None, rows: Sequence[Sequence[str]], kind: str = "numbers"
) -> str:
    """Cells that are no numbers stand on the left; of a table of facts all do."""
    if not rows:
        return ""

    def cell(tag: str, text: str, below: str) -> str:
        is_number = below[:1].isdigit() or below[:1] in "-.–"
        start = f"<{tag}>" if is_number else f'<{tag} class="text">'
        return f"{start}{escape(text)}</{tag}>"

    # A heading stands above its column, where that starts.
    head = map(cell, repeat("th"), header or (), rows[0])
    body = "".join(f"<tr>{''.join(map(cell, repeat('td'), row, row))}</tr>\n" for row in rows)
    size = "wide long" if len(rows) > _MOST_ROWS else "wide"
    return (f'<div class="{size}"><table class="{kind}"><tr>{"".join(head)}</tr>\n{body}</table>'
            "</div>")


def number(value: Any) -> str:
    """A number as people write it; what is none, as it is."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def numbers(result: Any, prefix: str = "") -> dict[str, float]:
    """The numbers of nested mappings by the words that lead to them."""
    found = {}
    for key, value in result.items() if isinstance(result, dict) else ():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{key} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key.replace("_", " ")] = value
    return found


def mapping(values: Mapping[str, Any]) -> str:
    """Facts, a line each."""
    rows = []
    for key, value in values.items():
        if isinstance(value, list):
            value = " ".join(map(str, value))
        elif isinstance(value, dict):
            value = ", ".join(f"{name} {number(one)}"
                              for name, one in (numbers(value) or value).items())
        rows.append([key.replace("_", " "), number(value)])
    return table(None, rows, "facts")


def inline(file: Path) -> str:
    """A PNG as an address that holds it."""
    try:
        content = file.read_bytes()
    except OSError:
        return "data:,"
    return "data:image/png;base64," + base64.b64encode(content).decode()
