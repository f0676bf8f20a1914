"""The tables of a source by split: files, folders, functions of the user's own, and the Hub.

Tables are those of Hugging Face ``datasets``, which reads the formats and keeps its own cache of
what it has converted.
"""

from __future__ import annotations

import glob
import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trainlib.config import UserError
from trainlib.data.options import DataOptions
from trainlib.user_code import describe_error, import_object, import_package, is_object_spec

if TYPE_CHECKING:
    import datasets

_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json",
             ".jsonl": "json", ".arrow": "arrow", ".txt": "text"}
IMAGE_ENDINGS = {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
                 ".ppm", ".tif", ".tiff", ".webp"}
_SAVED = ("state.json", "dataset_dict.json")  # in a folder of save_to_disk


def read_tables(source: str, options: DataOptions, option: str) -> dict[str, datasets.Dataset]:
    """The tables of a source by the names of their splits.

    Args:
        option: the option that names the source, for messages.

    Raises:
        UserError: it cannot be read, or is not made of tables.
    """
    try:
        datasets = import_package("datasets")
    except ValueError as error:
        raise UserError(f"{option}: {source}: {error}") from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error says it all
    try:
        tables = _call(source) if is_object_spec(source) else _load(source, options)
        if isinstance(tables, datasets.Dataset | datasets.IterableDataset):
            tables = {"train": tables}
        for table in tables.values() if isinstance(tables, dict) else [tables]:
            if isinstance(table, datasets.IterableDataset):
                raise ValueError(f"{source} is a stream, which cannot be read in the order of the "
                                 "plan; load it without streaming, --data.in_memory false reads "
                                 "what is larger than the memory")
            if not isinstance(table, datasets.Dataset):
                raise ValueError(f"{source} gives a {type(table).__name__}; return a "
                                 "datasets.Dataset, or a DatasetDict of them")
            if table.format["type"] == "custom":
                raise ValueError(f"{source} has a transform (set_transform), which nobody would "
                                 "carry out here; use map, which stores its result")
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error
    return {str(split): table for split, table in tables.items()}


def is_hub_id(source: str) -> bool:
    """Whether a source, being nothing on this machine, reads like a data set's id on the Hub."""
    is_local = (is_object_spec(source) or glob.has_magic(source) or ending_of(source) in _BUILDERS
                or Path(source).exists())
    return not is_local and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None


def _call(source: str) -> object:
    function = import_object(source)
    try:
        return function()
    except Exception as error:  # whatever a user's function raises
        raise ValueError(f"{source} failed: {describe_error(error)}") from error


def _load(source: str, options: DataOptions) -> object:
    import datasets

    path, where = Path(source), source
    if path.is_dir() and any((path / name).is_file() for name in _SAVED):
        if not any(path.rglob("*.arrow")):
            raise ValueError(f"{source} has no rows")
        read = partial(datasets.load_from_disk, source)
    elif path.is_dir():
        tables = _class_folders(path)
        if tables:
            return tables
        read = partial(datasets.load_dataset, source)
    elif path.is_file() or glob.has_magic(source):
        read = partial(datasets.load_dataset, **files_to_read(source))
    elif is_hub_id(source):
        where += " is no file or folder here, and as a data set of the Hugging Face Hub it"
        read = partial(datasets.load_dataset, source, options.subset, revision=options.revision)
    else:
        raise ValueError(f"there is no file or folder {source}")
    try:
        return read()
    except Exception as error:  # datasets wraps what its many readers raise
        while error.__cause__:
            error = error.__cause__
        if "corresponds to no data" in str(error):
            raise ValueError(f"{source} has no rows") from error
        raise ValueError(f"{where} cannot be read: {type(error).__name__}: "
                         f"{' '.join(str(error).split())}") from error


def files_to_read(source: str) -> dict:
    """What ``load_dataset`` is given for a file or a glob.

    Raises:
        ValueError: an ending that no reader knows, or no file with anything in it.
    """
    ending = ending_of(source)
    if ending not in _BUILDERS:
        given = f"the ending {ending} is unknown" if ending else "the name has no ending"
        raise ValueError(f"{source}: {given}; known are {', '.join(_BUILDERS)}")
    files = [source] if Path(source).is_file() else sorted(glob.glob(source, recursive=True))
    if not files:
        raise ValueError(f"no file matches {source}")
    files = [glob.escape(file) for file in files if Path(file).stat().st_size]
    if not files:
        raise ValueError(f"{source} is empty")
    arguments = {"path": _BUILDERS[ending], "data_files": files}
    if ending == ".tsv":
        arguments["sep"] = "\t"
    if ending == ".txt":
        arguments["sample_by"] = "document"  # a file is a row
    if ending == ".parquet":  # else as many rows as the first row group, which may have none
        arguments["batch_size"] = 1000
    return arguments


def ending_of(source: str) -> str:
    """``.csv`` of ``x.csv`` and of ``x.csv.gz``."""
    endings = [suffix.lower() for suffix in Path(source).suffixes]
    if endings and endings[-1] in (".gz", ".zst"):
        endings.pop()
    return endings[-1] if endings else ""


def _class_folders(folder: Path) -> dict[str, datasets.Dataset] | None:
    """Tables of images in CLASS or SPLIT/CLASS folders, by split; none if there are none such.

    ``datasets`` reads such folders as well, but takes each file and folder with a word like
    "test" in its name for that split, and then leaves out what has no such word.
    """
    import datasets

    found = sorted(glob.glob("**/*", root_dir=folder, recursive=True))
    if not found:
        raise ValueError(f"the folder {folder} is empty")
    places = [name.split(os.sep) for name in found
              if os.path.splitext(name)[1].lower() in IMAGE_ENDINGS]
    is_told_otherwise = any(os.path.basename(name).startswith("metadata.") for name in found)
    if is_told_otherwise or all(len(place) == 1 for place in places):
        return None
    depth = len(places[0])
    for place in places:
        if len(place) != depth or depth > 3:
            raise ValueError(f"{folder} holds {os.path.join(*places[0])} and "
                             f"{os.path.join(*place)}; all images must lie in CLASS folders, or "
                             "all in SPLIT/CLASS folders")
    file = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    tables = {}
    for split in dict.fromkeys(place[0] if depth == 3 else "train" for place in places):
        chosen = [place for place in places if depth == 2 or place[0] == split]
        classes = {name: number for number, name in enumerate(sorted({c[-2] for c in chosen}))}
        tables[split] = datasets.Dataset.from_dict(
            {"image": [{"bytes": None, "path": os.path.join(folder, *place)} for place in chosen],
             "label": [classes[place[-2]] for place in chosen]},
            datasets.Features(image=file, label=datasets.ClassLabel(names=list(classes))),
        )
    return tables
