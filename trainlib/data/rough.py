"""Tables that no reader of clean files makes: broken lines, text among numbers, loose images."""

from __future__ import annotations

import glob
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainlib.config import UserError
from trainlib.data.columns import TEXT, kinds_of, read_column
from trainlib.data.fresh_lines import as_utf8, check_header, is_nothing, read_lines
from trainlib.data.options import DataOptions
from trainlib.data.tables import IMAGE_ENDINGS, ending_of, files_to_read, read_tables

if TYPE_CHECKING:
    import datasets

_SEPARATED = (".csv", ".tsv")
_LINES = (*_SEPARATED, ".json", ".jsonl")
_BROKEN = (OSError, EOFError, zlib.error)  # of a file that is compressed


class Used(NamedTuple):
    """The columns that are read."""

    inputs: list[str]
    targets: list[str]
    is_text: bool
    """Whether the inputs are text."""


def read_rough(
    options: DataOptions, used: Used
) -> tuple[dict[str, datasets.Dataset], dict[int, str]]:
    """The tables of a source, and the rows of its only one that are none, with why.

    Loose images are a column named as the first input.

    Raises:
        UserError: it cannot be read at all.
    """
    source, texts = options.source, used.inputs if used.is_text else []
    images = _loose_images(source)
    if images:
        return {"train": _table_of_images(images, (used.inputs or ["image"])[0])}, {}
    files = []
    if ending_of(source) in _LINES:
        files = [source] if Path(source).is_file() else sorted(glob.glob(source, recursive=True))
    try:
        is_misread = any([check_header(file, used.inputs, used.targets) for file in files])
        if not is_misread:
            tables = read_tables(source, options, "DATA")
            if not files or _is_as_written(tables["train"], used):
                return tables, {}
            if texts and ending_of(source) in _SEPARATED:
                return _read_texts(source, texts), {}
        refused = None
    except _BROKEN as error:
        refused = UserError(f"DATA: {source} cannot be read: {error}")
    except UserError as error:
        if not files or "cannot be read" not in str(error):
            raise
        refused = error
    rows, unread = [], {}
    try:
        for row, (content, why) in enumerate(read_lines(files, used.inputs, texts)):
            rows.append(content)
            if why:
                unread[row] = why
    except _BROKEN as error:
        raise refused or UserError(f"DATA: {source} cannot be read: {error}") from error
    if len(unread) == len(rows):
        first = min(unread, default=None)
        raise UserError(f"DATA: {source}: none of {len(rows):,} rows can be read" + (
            "" if first is None else f"; row {first}: {unread[first]}")) from refused
    return {"train": _table_of(rows)}, unread


def _is_as_written(table: datasets.Dataset, used: Used) -> bool:
    """Whether the reader of clean files took no value for something else."""
    for name, feature in table.features.items():
        if name in used.inputs and used.is_text:
            # Of digits numbers are made, of dates times, and of several types JSON.
            if getattr(feature, "dtype", None) not in ("string", "large_string"):
                return False
            if table.info.builder_name == "csv":  # block by block
                return False
        elif name in [*used.inputs, *used.targets] and type(feature).__name__ == "Json":
            return False
    return True


def _read_texts(source: str, texts: list[str]) -> dict[str, datasets.Dataset]:
    """A csv whose columns of text are taken as they are written."""
    import datasets

    read = dict.fromkeys(texts, _text)
    return dict(datasets.load_dataset(**files_to_read(source), converters=read))


def _text(field: str) -> str | None:
    return None if is_nothing(field) else field


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
    return [file for file in files if Path(file).suffix.lower() in IMAGE_ENDINGS]


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


def _table_of(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """A table; columns of values of several types, or of what a list should be, become text."""
    import datasets
    import pyarrow

    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError):
            there = [isinstance(value, list) for value in values if value is not None]
            lists = 2 * sum(there) > len(there)  # what the most rows have is meant
            columns[name] = pyarrow.array([
                (value if isinstance(value, list) else None) if lists
                else None if value is None else str(value) for value in values])
    return datasets.Dataset(pyarrow.table(columns))


def only_unicode(
    table: datasets.Dataset, inputs: list[str], targets: list[str], unread: dict[int, str]
) -> datasets.Dataset:
    """A table without bytes that are no UTF-8 where text should be; rows of inputs are unread."""
    import datasets
    import pyarrow

    kinds, mended = kinds_of(table), {}
    for name in [*inputs, *targets]:
        if kinds.get(name) != TEXT:
            continue
        column = read_column(table, name)
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid:
            held = column.cast("large_binary").to_pylist()
            texts = [value and value.decode("utf-8", "surrogateescape") for value in held]
            clean = [as_utf8(text) for text in texts]
            mended[name] = pyarrow.array(clean, pyarrow.large_string())
            for row in range(len(clean) if name in inputs else 0):
                if clean[row] != texts[row]:
                    unread.setdefault(row, f"{name!r} is no UTF-8 text; convert it")
    if not mended:
        return table
    return datasets.Dataset(pyarrow.table({
        name: mended[name] if name in mended else read_column(table, name)
        for name in table.column_names if name in (*inputs, *targets)}))


def image_files(table: datasets.Dataset, column: str) -> list[str] | None:
    """The file of each row's image, where they are known."""
    import datasets

    if isinstance(table.features[column], datasets.Value):
        return None
    stored = read_column(table.cast_column(column, datasets.Image(decode=False)), column)
    paths = [entry and entry.get("path") for entry in stored.to_pylist()]
    return [path and os.path.normpath(path) for path in paths] if any(paths) else None
