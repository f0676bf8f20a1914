"""Where a table may be written: not over what it was made from, and where there is room for it."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from trainlib.config import UserError


def is_same_source(one: str, other: str) -> bool:
    """Whether two names are one source, however their paths are written."""
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def check_places(
    places: Mapping[str, Path], weights: Path, sources: Sequence[str | float | None]
) -> None:
    """Refuses files that are data, lie in a run, or cannot be written, before any work.

    Args:
        places: by option, the file.
        weights: the folder with the weights of a run.
        sources: whatever is read; what is no path is no matter here.

    Raises:
        UserError: with the option.
    """
    weights = weights.resolve()
    is_in_run = (weights.parent / "metrics.jsonl").is_file()
    run = weights.parent if is_in_run else weights
    for option, place in places.items():
        way_out = f"choose another {option}"
        file = place.resolve()
        for source in sources:
            if isinstance(source, str) and _is_of(file, source):
                raise UserError(f"{option}: {place} belongs to the data that is read, {source}; "
                                f"{way_out}")
        if file.is_relative_to(run):
            raise UserError(f"{option}: {place} lies in the run {run.name}, whose files stay as "
                            f"they are; {way_out}")
        if [each.resolve() for each in places.values()].count(file) > 1:
            raise UserError(f"{option}: {place} is what another option names, too; {way_out}")
        why = _why_not(file)
        if why:
            raise UserError(f"{option}: {place} cannot be written ({why}); {way_out}")


def _is_of(file: Path, source: str) -> bool:
    path = Path(source)
    if path.is_dir():
        return file.is_relative_to(path.resolve())
    files = [source] if path.is_file() else glob.glob(source, recursive=True)
    for each in map(Path, files):
        if each.resolve() == file or (file.exists() and each.exists() and each.samefile(file)):
            return True
    return False


def _why_not(file: Path) -> str | None:
    if file.is_dir():
        return "it is a folder"
    if file.exists():
        return None if os.access(file, os.W_OK) else "no permission"
    if not file.parent.is_dir():
        return f"there is no folder {file.parent}"
    return None if os.access(file.parent, os.W_OK) else "no permission in its folder"


@contextmanager
def told(option: str) -> Iterator[None]:
    """Has an error of writing name the option."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option}: {error.filename or 'it'} cannot be written ({error.strerror}); "
                        f"choose another {option}, or make room") from error
