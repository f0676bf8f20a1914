"""What a card is made of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainlib.credentials import redact

if TYPE_CHECKING:
    from trainlib.models import Portable

_HOME = re.compile(r"(?<![\w.~-])(?:/home/|/Users/|[A-Za-z]:[\\/]Users[\\/])[^/\\\s'\"`]+"
                   r"|(?<![\w.~/-])/root(?![\w.-])")
_FILES = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".arrow", ".txt", ".py")
_HUB_ID = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Facts:
    """What is known of a run from its start."""

    name: str
    config: dict[str, Any]
    """The resolved options."""
    portable: Portable
    num_parameters: int
    num_trained: int
    shape: tuple[int, ...]
    """Of one sample."""
    is_float: bool
    is_encoded: bool
    """Whether the samples were files of images, or such in a column."""
    columns: list[str] | None
    token_range: tuple[int, int] | None
    pad_id: int | None
    description: str
    """What was read and how it was split."""
    targets: list[str]
    """What the training split holds of each."""
    fingerprint: str
    num_training: int
    num_validation: int
    total_steps: int
    versions: dict[str, str]
    """Of packages, by name."""
    device: str
    precision: str
    num_processes: int
    teachers: list[dict[str, Any]]
    """Each with what it is, and its metrics by task if they are known."""

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """The options of each task."""
        return self.config["tasks"]

    @property
    def data(self) -> dict[str, Any]:
        """The options of the data."""
        return self.config["data"]

    @property
    def net(self) -> str:
        """The net's name; of the user's own without the folders of its file."""
        return plain_name(self.config["model"]["name"])

    @property
    def form(self) -> str:
        """What the inputs are: image, text, tokens or numbers."""
        if self.data["tokenizer"] is not None:
            return "text"
        if not self.is_float:
            return "tokens"
        # Lists of lists of lists are not known to be images, nor from 0 to 1.
        is_image = self.is_encoded or len(self.shape) == 3 and self.columns is None
        return "image" if is_image else "numbers"

    def public(self, text: str) -> str:
        """The text without credentials, and without the folders that the options name.

        Arguments of the net stay as they are, for the program needs them.
        """
        args = self.config["model"]["args"]
        loaded = [args.get("pretrained"), args.get("weights")]
        given = {**self.config, "model": self.config["model"] | {"args": loaded}}
        for path in sorted(_absolute_paths(given), key=len, reverse=True):
            text = re.sub(rf"(?<![\w.~-]){re.escape(path)}(?![\w-])",
                          lambda _, path=path: Path(path).name, text)
        return public(text)

    @property
    def is_language_model(self) -> bool:
        """Whether the only task is to predict the next token."""
        return any(task["kind"] == "language_modeling" for task in self.tasks.values())


@dataclass(frozen=True)
class Export:
    """What is known of one export."""

    which: str
    """best or final."""
    labels: dict[str, list[str] | dict]
    metrics: dict[str, float]
    """By logged key."""
    step: int
    peak_lr: float | None
    lr_search: dict[str, Any]
    """What ``lr_find.json`` says, if it says this rate."""
    starts: list[dict[str, Any]]
    """Of each session, ``step`` and ``processes``."""
    commit: str | None
    tokenizer: str | None
    """Name of the file that holds it."""


def plain_name(name: str) -> str:
    """A name in the user's own file without the folders of that file."""
    return Path(name).name if ".py:" in name else name


def _absolute_paths(options: Any) -> set[str]:
    """The options that are absolute paths, of files, folders or objects in files."""
    if isinstance(options, dict | list):
        parts = options.values() if isinstance(options, dict) else options
        return set().union(*map(_absolute_paths, parts))
    is_path = isinstance(options, str) and Path(options).is_absolute() and Path(options).name
    return {options} if is_path else set()


def as_code(name: Any) -> str:
    """A name from the data in Markdown, on one line."""
    return f"`{' '.join(str(name).split()).replace('`', chr(39))}`"


def public(text: str) -> str:
    """The text without credentials and without the names of home directories."""
    text, home = redact(text), str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    return _HOME.sub("~", text)


def hub_id(name: str | None) -> str | None:
    """``name`` if it can only be an id on the Hugging Face Hub."""
    if name is None or not _HUB_ID.fullmatch(name) or name.endswith(_FILES) or Path(name).exists():
        return None
    return name
