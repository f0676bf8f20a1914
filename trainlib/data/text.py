"""From texts to token numbers, once, in a memory-mapped cache; decoders of blocks and texts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from trainlib.config import UserError, is_first_process
from trainlib.losses import IGNORED
from trainlib.user_code import describe_error, import_package

BYTES = "bytes"  # the tokenizer that is built in
_FORMAT = 1  # of a cached entry; another number makes all entries anew
_BATCH_TEXTS, _BATCH_BYTES = 1000, 2**20  # tokenised at a time, whichever is reached first


class Tokenizer(NamedTuple):
    """What turns texts into numbers from 0 to ``vocab_size - 1``."""

    name: str
    vocab_size: int
    pad_id: int
    end_id: int | None
    """Of the token that ends a text; none: there is no such token."""
    fingerprint: str
    """Hex SHA-256: another for a tokenizer that gives other numbers."""
    encode: Callable[[list[str]], list[np.ndarray]]
    """From texts to the numbers of each, [tokens] integers; nothing is cut off."""
    decode: Callable[[list[int]], str]
    """Back to text, special tokens and all."""
    to_json: Callable[[], str] | None = None
    """Itself as a ``tokenizer.json``; none of bytes."""


def load_tokenizer(name: str, add_special: bool) -> Tokenizer:
    """The tokenizer of that name.

    Args:
        name: ``bytes``: UTF-8, where byte 0 ends a text, which holds none; else of Hugging Face: a
            folder, a ``tokenizer.json``, or an id on the Hub.
        add_special: whether ``encode`` adds its special tokens ([CLS], [SEP]); bytes have none.

    Raises:
        UserError: transformers is not installed; no such tokenizer, or one without a fast form.
    """
    if name == BYTES:
        return Tokenizer(
            name, 256, 0, 0, hashlib.sha256(name.encode()).hexdigest(),
            lambda texts: [np.frombuffer(text.encode(), np.uint8) for text in texts],
            lambda numbers: bytes(numbers).decode(errors="replace"),
        )
    loaded = _load_from_transformers(name)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"data.tokenizer: {name} is a {type(loaded).__name__}, which has no fast "
                        f"form (tokenizer.json); choose one that has, or {BYTES}")
    vocabulary = backend.get_vocab(with_added_tokens=True)
    # From a folder that lacks the vocabulary, transformers makes a tokenizer that knows no word.
    if len(vocabulary.keys() - {*loaded.all_special_tokens, *loaded.added_tokens_encoder}) < 2:
        raise UserError(f"data.tokenizer: {name} has no vocabulary, only {len(vocabulary)} special "
                        "tokens; add its tokenizer.json or vocabulary file")
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = loaded.split_special_tokens
    content = json.dumps([backend.to_str(), add_special, loaded.split_special_tokens])

    def encode(texts: list[str]) -> list[np.ndarray]:
        # The backend itself: transformers gives the same numbers in over twice the time.
        encodings = backend.encode_batch_fast(texts, add_special_tokens=add_special)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    pad, eos, sep = loaded.pad_token_id, loaded.eos_token_id, loaded.sep_token_id
    vocab_size = max(len(loaded), 1 + max(vocabulary.values()))  # more where numbers leave gaps
    # A tokenizer.json alone does not say which token pads.
    named = (vocabulary.get(token) for token in ("[PAD]", "<pad>", "<|pad|>"))
    known = [number for number in (pad, *named, eos) if number is not None]
    if not known:  # a number of its own, for no real token may be taken for padding
        known, vocab_size = [vocab_size], vocab_size + 1
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    return Tokenizer(name, vocab_size, known[0], sep if eos is None else eos, fingerprint, encode,
                     lambda numbers: backend.decode(numbers, skip_special_tokens=False),
                     backend.to_str)


def _load_from_transformers(name: str) -> Any:
    try:
        transformers = import_package("transformers")
    except ValueError as error:
        raise UserError(f"data.tokenizer: {name}: {error}; {BYTES} needs no package") from error
    try:
        if Path(name).is_file():
            return transformers.PreTrainedTokenizerFast(tokenizer_file=name)
        return transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises whatever a broken file makes it
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"data.tokenizer: {name} is neither {BYTES} nor a tokenizer that can be "
                        f"read here or from the Hugging Face Hub: {said}") from error


class Tokens(NamedTuple):
    """The token numbers of all texts, one after another; pickled, it is opened anew, not copied."""

    ids: np.ndarray
    """[tokens] memory-mapped: int16 where the vocabulary fits into it, else int32."""
    ends: np.ndarray
    """[documents] int64: where in ``ids`` each text ends."""
    num_bytes: int
    """Of all texts in UTF-8, and of the end tokens where those are bytes."""
    vocab_size: int
    pad_id: int
    fingerprint: str = ""
    """Hex SHA-256 of all texts and the tokenizer's."""

    @property
    def num_documents(self) -> int:
        return len(self.ends)

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / len(self.ids)

    def rows(self, starts: np.ndarray, counts: np.ndarray, length: int, is_target: bool) -> Tensor:
        """[rows, length] of the type of ``ids``: so many of them from each start, then filling."""
        ids = np.asarray(self.ids)  # a memory map is slow to slice
        rows = np.full((len(starts), length), IGNORED if is_target else self.pad_id, ids.dtype)
        for row, start, count in zip(rows, starts.tolist(), counts.tolist(), strict=True):
            row[:count] = ids[start : start + count]
        return torch.from_numpy(rows)

    def __reduce__(self) -> tuple:
        places = [(array.filename, array.dtype, "r", array.offset, array.shape)
                  if isinstance(array, np.memmap) and not isinstance(array.base, np.ndarray)
                  else np.array(array) for array in self[:2]]  # a part of a map is copied
        return _reopen, (*places, *self[2:])


def _reopen(*values: np.ndarray | tuple | int) -> Tokens:
    return Tokens(*(np.memmap(*value) if isinstance(value, tuple) else value for value in values))


def default_cache() -> Path:
    """The folder ``one_curve/tokens`` where the user's caches are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "one_curve/tokens"


def tokenize(
    read_texts: Callable[[], Iterable[str]], tokenizer: Tokenizer, where: str, add_end: bool,
    cache: Path,
) -> Tokens:
    """The tokens of all texts, from the cache or into it; of several processes one does the work.

    Args:
        read_texts: gives the same texts each time, one by one; they need not fit in memory.
        where: what the texts are, for messages.
        add_end: whether each text is followed by the end token, if the tokenizer has one.
        cache: a folder of entries, each named by what it was made of, not by file names or dates.

    Raises:
        UserError: there is no text, or one is missing or not Unicode, with its row; the tokenizer
            fails; the cache cannot be written.
    """
    content = _Pass(tokenizer, tokenizer.end_id if add_end else None, where)
    for _ in content.batches(read_texts(), "reading"):
        pass
    entry = cache / content.digest.hexdigest()
    if _open(entry, content) is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{entry}.lock"):
                if _open(entry, content) is None:  # nor has another process made it meanwhile
                    _make(entry, content, read_texts())
        except OSError as error:
            raise UserError(f"{where}: the tokens cannot be kept in {cache}: {error}; "
                            "XDG_CACHE_HOME names another place") from error
    return _open(entry, content)


class _Pass:
    """A pass over the texts, and the fingerprint and size of those that have gone by."""

    def __init__(self, tokenizer: Tokenizer, end_id: int | None, where: str):
        self.tokenizer, self.end_id, self.where = tokenizer, end_id, where
        self.dtype = np.dtype(np.int16 if tokenizer.vocab_size <= 2**15 else np.int32)
        self.digest = hashlib.sha256(json.dumps([_FORMAT, tokenizer.fingerprint, end_id]).encode())
        self.num_documents = self.num_bytes = 0

    def batches(self, texts: Iterable[str], doing: str) -> Iterator[list[str]]:
        batch, size = [], 0
        for text in tqdm(texts, f"{doing} {self.where}", unit=" texts", delay=2, leave=False,
                         disable=None if is_first_process() else True):
            try:
                encoded = text.encode()
            except (AttributeError, UnicodeEncodeError) as error:
                raise UserError(f"{self.where}, row {self.num_documents}: the text is missing or "
                                f"not Unicode ({error}); mend or remove the row") from error
            # With its length, as "ab" and "c" are not "a" and "bc".
            self.digest.update(len(encoded).to_bytes(8, "little") + encoded)
            self.num_documents += 1
            self.num_bytes += len(encoded)
            batch.append(text)
            size += len(encoded)
            if len(batch) == _BATCH_TEXTS or size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def _open(entry: Path, content: _Pass) -> Tokens | None:
    """An entry of the cache; none: it is not there, or damaged."""
    try:
        ids = np.memmap(entry / "ids.bin", content.dtype, "r")
        ends = np.load(entry / "ends.npy", mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    if ends.shape != (content.num_documents,) or ends[-1] != len(ids):
        return None
    tokenizer = content.tokenizer
    num_bytes = len(ids) if tokenizer.name == BYTES else content.num_bytes  # with its ends
    return Tokens(ids, ends, num_bytes, tokenizer.vocab_size, tokenizer.pad_id,
                  content.digest.hexdigest())


def _make(entry: Path, content: _Pass, texts: Iterable[str]) -> None:
    """Tokenises batch by batch into a folder beside the entry, and renames it when complete."""
    tokenizer, end_id, where = content.tokenizer, content.end_id, content.where
    again, num_tokens = _Pass(tokenizer, end_id, where), 0
    end = np.array([] if end_id is None else [end_id], content.dtype)
    part = entry.with_suffix(".part")
    for left_over in (part, entry):  # of a process that was killed; and what is damaged
        shutil.rmtree(left_over, ignore_errors=True)
    part.mkdir()
    try:
        with open(part / "ids.bin", "wb") as ids_file, open(part / "ends.npy", "wb") as ends_file:
            header = {"descr": "<i8", "fortran_order": False, "shape": (content.num_documents,)}
            np.lib.format.write_array_header_1_0(ends_file, header)
            for batch in again.batches(texts, "tokenising"):
                try:
                    encoded = tokenizer.encode(batch)
                except Exception as error:  # tokenizers has no errors of its own
                    raise UserError(f"{where}, at or before row {again.num_documents - 1}: "
                                    f"{tokenizer.name} fails: {describe_error(error)}") from error
                pieces = [piece for ids in encoded for piece in (ids, end)]
                stops = num_tokens + np.cumsum([len(piece) for piece in pieces])
                ids_file.write(np.concatenate(pieces).astype(content.dtype).data)
                ends_file.write(stops[1::2].astype("<i8").data)
                num_tokens = int(stops[-1])
            if again.digest.digest() != content.digest.digest():
                raise UserError(f"{where}: the texts were others when they were read again; a "
                                "source must give the same texts each time")
            if content.num_bytes == 0 or num_tokens == 0:
                raise UserError(f"{where}: there is no text in {content.num_documents} rows, or "
                                f"none that {tokenizer.name} makes a token of; add some")
            about = {"texts": where, "tokenizer": tokenizer.name, "tokens": num_tokens}
            (part / "meta.json").write_text(json.dumps(about))  # for people
            for file in (ids_file, ends_file):
                file.flush()
                os.fsync(file.fileno())
        part.rename(entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class PackedBlocks:
    """Tokens ``start`` to ``stop`` in blocks, to [rows, block_size]; blocks cross texts' borders.

    As inputs or as targets, which are one token ahead: each token but the first is predicted once.
    """

    def __init__(self, tokens: Tokens, start: int, stop: int, block_size: int, is_target: bool):
        self.tokens, self.start, self.stop = tokens, start, stop
        self.block_size, self.is_target = block_size, is_target
        self.num_blocks = -(-(stop - start - 1) // block_size)

    def __call__(self, rows: np.ndarray) -> Tensor:
        starts = self.start + self.is_target + rows * self.block_size
        counts = np.minimum(self.stop - starts, self.block_size)
        return self.tokens.rows(starts, counts, self.block_size, self.is_target)

    def num_valid(self) -> Tensor:
        """[num_blocks] int64: how many targets each block has."""
        starts = np.arange(self.start + 1, self.stop, self.block_size)
        return torch.from_numpy(np.minimum(self.stop - starts, self.block_size))


class PaddedTexts:
    """One text a row, cut or padded, to [rows, length]: its tokens, where ``is_target`` is none.

    Else, for next-token prediction, the inputs (all but its last) or targets (all but its first).
    """

    def __init__(self, tokens: Tokens, length: int, is_target: bool | None):
        self.tokens, self.length, self.is_target = tokens, length, is_target

    def __call__(self, rows: np.ndarray) -> Tensor:
        ends = self.tokens.ends
        starts = np.where(rows > 0, ends[rows - 1], 0) + bool(self.is_target)
        counts = np.clip(ends[rows] - starts - (self.is_target is False), 0, self.length)
        return self.tokens.rows(starts, counts, self.length, bool(self.is_target))

    def num_valid(self) -> Tensor:
        """[documents] int64: how many tokens, or predictions, each row has."""
        lengths = np.diff(self.tokens.ends, prepend=0)
        return torch.from_numpy(np.clip(lengths - (self.is_target is not None), 0, self.length))
