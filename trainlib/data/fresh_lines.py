"""Lines of text files that no reader of clean files takes: each is a row, or why it is none."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator
from typing import IO, Any

from trainlib.config import UserError
from trainlib.data.tables import ending_of

_NOTHING = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND",
            "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_MARKS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16

Row = tuple[dict[str, Any], str | None]


def is_nothing(field: str) -> bool:
    """Whether a field of a csv means that its value is missing."""
    return field in _NOTHING


def as_utf8(value: Any) -> Any:
    """A value whose texts are Unicode, with a mark in place of each byte that was none."""
    if isinstance(value, str) and not value.isascii():
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, list):
        return [as_utf8(each) for each in value]
    if isinstance(value, dict):
        return {as_utf8(key): as_utf8(each) for key, each in value.items()}
    return value


def read_lines(
    files: Iterable[str], inputs: Collection[str], texts: Collection[str]
) -> Iterator[Row]:
    """Each row of some files, and what is wrong with it.

    Args:
        inputs: the columns that must be UTF-8; in others a byte that is none becomes a mark.
        texts: the columns that are text, exactly as written, whatever they look like.
    """
    for file in files:
        with _opened(file) as lines:
            if ending_of(file) in _SEPARATORS:
                rows = _fields(lines, _SEPARATORS[ending_of(file)])
            else:
                rows = _objects(lines, texts)
            for row, why in rows:
                clean = as_utf8(row)
                bad = next((name for name in inputs if clean.get(name) != row.get(name)), None)
                yield clean, why or (None if bad is None else f"{bad!r} is no UTF-8 text; to "
                                     f"convert the file: iconv -f latin1 -t utf-8 {file}")


def check_header(file: str, inputs: Collection[str], targets: Collection[str]) -> bool:
    """Whether a reader of clean files would take fields for those of other columns.

    Of rows with one field more than the header, the first is the name of the row, as R writes it;
    with more, or where the last is empty, it is not.

    Raises:
        UserError: a column that is used stands there twice, or bytes that are no UTF-8 hide one.
    """
    with _opened(file, "rb") as start:
        mark = start.read(2)
    if mark in _MARKS:
        raise UserError(f"DATA: {file} is UTF-16; convert it: iconv -f utf-16 -t utf-8 {file}")
    if ending_of(file) not in _SEPARATORS:
        return False
    with _opened(file) as lines:
        rows = (fields for fields, _ in _records(lines, _SEPARATORS[ending_of(file)]) if fields)
        names, first = next(rows, []), next(rows, [])
    doubled = [name for name in [*inputs, *targets] if names.count(name) > 1]
    if doubled:
        raise UserError(f"DATA: {file} has {names.count(doubled[0])} columns {doubled[0]!r}, of "
                        "which one would be read and the others go unseen; rename or remove them")
    if as_utf8(names) != names and not set(inputs) <= set(names):
        raise UserError(f"DATA: {file}: the header is no UTF-8 text; convert the file: "
                        f"iconv -f latin1 -t utf-8 {file}")
    surplus = len(first) - len(names)
    return surplus > 1 or (surplus == 1 and not first[-1])


def _opened(file: str, mode: str = "rt") -> IO:
    opened = gzip.open if file.endswith(".gz") else open
    if mode == "rb":
        return opened(file, mode)
    return opened(file, mode, encoding="utf-8-sig", errors="surrogateescape", newline="")


class _Lines:
    """Lines for a reader that joins several to a record, and may have to give them back."""

    def __init__(self, lines: Iterable[str]):
        self.lines, self.taken, self.is_at_end = iter(lines), [], False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.is_at_end = True
        line = next(self.lines)
        self.is_at_end = False
        self.taken.append(line)
        return line

    def give_back(self) -> None:
        """All but the first of a record's lines."""
        self.lines, self.is_at_end = itertools.chain(self.taken[1:], self.lines), False


def _records(lines: Iterable[str], separator: str) -> Iterator[tuple[list[str], str | None]]:
    """The fields of each record, and why it has none."""
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the 128 KiB of the default
    given = _Lines(lines)
    reader = csv.reader(given, delimiter=separator)
    while True:
        given.taken = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield [], f"is no line of a table: {error}"
            continue
        if given.is_at_end:  # within a record: all the rest of the file would be in its quotes
            given.give_back()
            yield [], "has a quote that is opened and never closed"
        elif fields:
            yield fields, None


def _fields(lines: IO[str], separator: str) -> Iterator[Row]:
    records = _records(lines, separator)
    names, _ = next(records, ([], None))
    for fields, why in records:
        if len(fields) == len(names) + 1 and not fields[-1]:
            fields = fields[:-1]  # a separator at the end of the line
        if why is None and len(fields) != len(names):
            why = f"has {len(fields)} fields, the header {len(names)}"
        values = (None if is_nothing(field) else field for field in fields)
        yield dict(zip(names, values, strict=False)), why


def _objects(lines: IO[str], texts: Collection[str]) -> Iterator[Row]:
    """Of a file of objects, one in a line, or of a list of them."""
    start = next((line for line in lines if line.strip()), "")
    if start.lstrip().startswith("["):
        whole = start + lines.read()
        try:
            found, exact = json.loads(whole), _exact(whole)
        except ValueError:
            pass
        else:
            if any(isinstance(row, dict) for row in found):
                for row, written in zip(found, exact, strict=True):
                    yield _object(row, written, texts)
                return
        lines = whole.splitlines()
        start = ""
    for line in itertools.chain([start], lines):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield {}, f"is no JSON ({error})"
            continue
        yield _object(found, _exact(line) if texts else found, texts)


def _exact(text: str) -> Any:
    """JSON with each number as it is written."""
    return json.loads(text, parse_int=str, parse_float=str, parse_constant=str)


def _object(found: Any, written: Any, texts: Collection[str]) -> Row:
    if not isinstance(found, dict):
        return {}, "is no JSON object"
    why = None
    for name in texts:
        value = written.get(name)
        if isinstance(value, bool):
            value = json.dumps(value)
        if isinstance(value, list | dict):
            value, why = None, f"{name!r} is a {type(value).__name__}, no text"
        if name in found:
            found[name] = value
    return found, why
