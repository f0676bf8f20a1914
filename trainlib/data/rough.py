"""Tables that no reader of clean files makes: broken lines, text among numbers, loose images."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from trainlib.config import UserError
from trainlib.data.options import DataOptions
from trainlib.data.tables import _IMAGES, _ending, read_tables

if TYPE_CHECKING:
    import datasets

_NOTHING = {"", "nan", "NaN", "NA", "N/A", "n/a", "null", "NULL", "None", "<NA>", "#N/A"}
_LINES = (".csv", ".tsv", ".json", ".jsonl")


def read_rough(
    options: DataOptions, image_column: str
) -> tuple[dict[str, datasets.Dataset], dict[int, str]]:
    """The tables of a source, and the rows of its only one that are none, with why.

    Args:
        image_column: the name that the column of loose images is given.

    Raises:
        UserError: it cannot be read at all.
    """
    source = options.source
    images = _loose_images(source)
    if images:
        return {"train": _table_of_images(images, image_column)}, {}
    try:
        return read_tables(source, options, "DATA"), {}
    except UserError as error:
        if _ending(source) not in _LINES or "cannot be read" not in str(error):
            raise
        files = [source] if Path(source).is_file() else sorted(glob.glob(source, recursive=True))
        rows, unread = [], {}
        for row, (content, why) in enumerate(_lines(files)):
            rows.append(content)
            if why:
                unread[row] = why
        if len(unread) == len(rows):
            raise
        return {"train": _table_of(rows)}, unread


def _loose_images(source: str) -> list[str]:
    """The images that a file, a glob or a folder without classes names, if it does."""
    path = Path(source)
    if path.is_dir():
        files = sorted(str(file) for file in path.iterdir() if not file.name.startswith("."))
        if any(Path(file).name.startswith("metadata.") for file in files):
            return []
    elif path.is_file():
        files = [source]
    else:
        files = sorted(glob.glob(source, recursive=True))
    images = _images(files)
    if images and path.is_dir():
        _refuse_folders_beside(path, images)
    if not files and glob.has_magic(source) and _images([source]):
        raise UserError(f"DATA: no file matches {source}")
    return images


def _images(files: list[str]) -> list[str]:
    return [file for file in files if Path(file).suffix.lower() in _IMAGES]


def _refuse_folders_beside(folder: Path, images: list[str]) -> None:
    """Refuses loose images beside folders of images, of which one would go unseen."""
    inside = _images(glob.glob("*/**/*", root_dir=folder, recursive=True))
    if inside:
        names = list(dict.fromkeys(Path(file).parts[0] for file in sorted(inside)))
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise UserError(
            f"DATA: {folder} holds {len(images):,} loose images (the first is "
            f"{Path(images[0]).name}) and {len(inside):,} in folders ({shown}); name one of the "
            f"folders, or a glob such as '{folder}/*{Path(images[0]).suffix}', or move the loose "
            "images into a folder")


def _table_of_images(files: list[str], column: str) -> datasets.Dataset:
    import datasets

    feature = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    return datasets.Dataset.from_dict({column: [{"bytes": None, "path": file} for file in files]},
                                      datasets.Features({column: feature}))


def _lines(files: list[str]) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Each row, and what is wrong with it."""
    for file in files:
        opened = gzip.open if file.endswith(".gz") else open
        with opened(file, "rt", encoding="utf-8-sig", errors="replace", newline="") as lines:
            if _ending(file) in (".csv", ".tsv"):
                yield from _fields(lines, "\t" if _ending(file) == ".tsv" else ",")
            else:
                yield from _objects(lines)


def _fields(lines: IO[str], separator: str) -> Iterator[tuple[dict[str, Any], str | None]]:
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the 128 KiB of the default
    reader = csv.reader(lines, delimiter=separator)
    names = next(reader, [])
    for fields in reader:
        if not fields:
            continue
        why = None if len(fields) == len(names) else (
            f"has {len(fields)} fields, the header {len(names)}")
        values = (None if field in _NOTHING else field for field in fields)
        yield dict(zip(names, values, strict=False)), why


def _objects(lines: IO[str]) -> Iterator[tuple[dict[str, Any], str | None]]:
    for line in lines:
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            yield {}, f"is no JSON ({error})"
            continue
        yield (found, None) if isinstance(found, dict) else ({}, "is no JSON object")


def _table_of(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """A table; columns of values of several types, or of what a list should be, become text."""
    import datasets
    import pyarrow

    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            lists = any(isinstance(value, list) for value in values)
            columns[name] = pyarrow.array([
                (value if isinstance(value, list) else None) if lists
                else None if value is None else str(value) for value in values])
    return datasets.Dataset(pyarrow.table(columns))


def image_files(table: datasets.Dataset, column: str) -> list[str] | None:
    """The file of each row's image, where they are known."""
    import datasets

    from trainlib.data.columns import read_column

    if isinstance(table.features[column], datasets.Value):
        return None
    stored = read_column(table.cast_column(column, datasets.Image(decode=False)), column)
    paths = [entry and entry.get("path") for entry in stored.to_pylist()]
    return [path and os.path.normpath(path) for path in paths] if any(paths) else None
