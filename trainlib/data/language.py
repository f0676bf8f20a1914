"""Text: the splits of language modelling, and the tokens of texts that are inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trainlib.config import UserError, nearest
from trainlib.data.columns import TEXT, kinds_of, read_column, refuse
from trainlib.data.decoding import Decoder
from trainlib.data.options import DataOptions
from trainlib.data.parts import DEFAULT_SHARE, Part, Parts, held_out, refuse_options
from trainlib.data.targets import TargetInfo, columns_of
from trainlib.data.text import (
    PackedBlocks,
    PaddedTexts,
    Tokenizer,
    Tokens,
    default_cache,
    load_tokenizer,
    tokenize,
)

if TYPE_CHECKING:
    import datasets

    from trainlib.tasks import TaskOptions

Stretch = tuple[str, Tokens, tuple[int, int] | None]
"""What a split is, for messages, its tokens, and from where to where; none: all of them."""


def only_language_task(tasks: Mapping[str, TaskOptions], column: str) -> str:
    """The name of the one task of a job of language modelling on a column.

    Raises:
        UserError: there are others, or it predicts another column.
    """
    if len(tasks) > 1:
        raise UserError(f"tasks: language_modeling is a job of its own, got {', '.join(tasks)}")
    [(name, task)] = tasks.items()
    if task.kind != "language_modeling":
        raise UserError(f"tasks.{name}.kind: the source holds text only, which is for "
                        f"language_modeling, got {task.kind}")
    if columns_of(task) != [column]:
        raise UserError(f"tasks.{name}.target: one column of text is needed, got "
                        f"{', '.join(columns_of(task))}")
    return name


def tokenizer_of(options: DataOptions, add_special: bool) -> Tokenizer:
    """The tokenizer that the options name.

    Raises:
        UserError: they name none, or it cannot be had.
    """
    if options.tokenizer is None:
        raise UserError("data.tokenizer: text needs one: --data.tokenizer bytes, or the id or "
                        "folder of a Hugging Face tokenizer")
    return load_tokenizer(options.tokenizer, add_special)


def text_decoders(
    options: DataOptions, tables: Sequence[tuple[str, datasets.Dataset]], column: str
) -> tuple[list[Decoder], int, int]:
    """What gives the tokens of each table's texts, the size of the vocabulary, the padding.

    All are as long as the longest text of the first table, but at most ``data.block_size``.
    """
    tokenizer = tokenizer_of(options, add_special=True)
    for where, table in tables:
        refuse(read_column(table, column).is_null(), where, f"the text {column!r} is missing")
    tokens = [
        tokenize(lambda table=table: texts_of(table, column), tokenizer, where, False,
                 default_cache())
        for where, table in tables
    ]
    longest = int(np.diff(tokens[0].ends, prepend=0).max())
    length = min(options.block_size, longest)
    return ([PaddedTexts(each, length, None) for each in tokens], tokenizer.vocab_size,
            tokenizer.pad_id)


def texts_of(table: datasets.Dataset, column: str) -> Iterator[str]:
    """The texts of a column, a batch in memory at a time; a missing one is empty."""
    for batch in table.select_columns([column]).iter(1000):
        yield from (text or "" for text in batch[column])


def split_language_tables(
    options: DataOptions, tables: list[tuple[str, datasets.Dataset]], kinds: dict[str, str],
    tasks: Mapping[str, TaskOptions],
) -> Parts:
    """The splits of language modelling on a column of text.

    Of a single text the last part is held out, of several texts a keyed sample.
    """
    refuse_options(options, ("channels", "image_size"), "is text")
    column = columns_of(next(iter(tasks.values())))[0]
    name = only_language_task(tasks, column)
    if kinds[column] != TEXT:
        raise UserError(f"tasks.{name}.target: {column!r} holds {kinds[column]} values; "
                        "language_modeling needs a column of text")
    if options.input not in (None, column):
        raise UserError(f"data.input: language_modeling sees the text that it predicts, "
                        f"{column!r}; leave it out")
    (where, table), (other_where, other) = tables[0], tables[-1]
    if len(tables) == 1:
        return split_texts(options, name, where, len(table),
                           lambda rows: texts_of(table.select(rows), column),
                           f"{where}: {len(table):,} texts, {column!r}")
    if kinds_of(other).get(column) != TEXT:
        raise UserError(f"{other_where}: has no column {column!r} of text"
                        f"{nearest(column, other.column_names)}")
    train, validation = (
        (place, tokens_of(options, place, lambda rows=rows: texts_of(rows, column)), None)
        for place, rows in tables
    )
    return parts_of_tokens(
        options, name, train, validation,
        f"{where}: {len(table):,} texts of {column!r}, validation from {other_where}",
    )


def split_texts(
    options: DataOptions, name: str, where: str, num_texts: int,
    read: Callable[[np.ndarray], Iterable[str]], description: str,
) -> Parts:
    """The splits of language modelling on some texts, of which a share is held out.

    Args:
        read: from numbers of texts to these texts.
    """
    share = options.validation_split or DEFAULT_SHARE
    if num_texts == 1:
        if not options.packing:
            raise UserError(f"data.packing: {where} is one text, of which a part is held out; "
                            "leave it out, or give --data.validation_split a file")
        tokens = tokens_of(options, where, lambda: read(np.arange(1)))
        blocks = int(len(tokens.ids) * (1 - share)) // options.block_size
        cut = blocks * options.block_size
        # The first token after the cut is the last that is trained on: it is predicted there.
        return parts_of_tokens(
            options, name, (f"{where}, training part", tokens, (0, cut + 1)),
            (f"{where}, validation part", tokens, (cut, len(tokens.ids))),
            f"{description}; the last {share:.3g} held out for validation",
        )
    is_out = held_out(share, num_texts, [])
    parts = []
    for split, wanted in (("training", False), ("validation", True)):
        rows, place = np.flatnonzero(is_out == wanted), f"{where}, {split} split"
        parts.append((place, tokens_of(options, place, lambda rows=rows: read(rows)), None))
    return parts_of_tokens(
        options, name, *parts, f"{description}; {is_out.sum()} of them held out for validation, "
        "the same whatever the seed",
    )


def tokens_of(options: DataOptions, where: str, texts: Callable[[], Iterable[str]]) -> Tokens:
    """The tokens of texts to model, each followed by the end token if there is one."""
    tokenizer = tokenizer_of(options, add_special=False)
    return tokenize(texts, tokenizer, where, True, default_cache())


def parts_of_tokens(
    options: DataOptions, name: str, train: Stretch, validation: Stretch, description: str
) -> Parts:
    """The splits of language modelling: blocks of their tokens, or a text a row.

    Raises:
        UserError: a stretch is too short for a block.
    """
    parts = []
    for where, tokens, span in (train, validation):
        start, stop = span or (0, len(tokens.ids))
        if stop - start <= options.block_size and options.packing:
            raise UserError(f"{where}: {stop - start:,} tokens are less than one "
                            f"block of {options.block_size} and the next token; give a longer "
                            "text or a smaller --data.block_size")
        if options.packing:
            inputs, targets = (PackedBlocks(tokens, start, stop, options.block_size, is_target)
                               for is_target in (False, True))
            num_rows = inputs.num_blocks
        else:
            inputs, targets = (PaddedTexts(tokens, options.block_size, is_target)
                               for is_target in (False, True))
            num_rows = tokens.num_documents
        parts.append(Part(where, inputs, np.arange(num_rows), {}, {name: targets},
                          {name: targets.num_valid()}))
    tokens = validation[1]
    vocab_size = max(train[1].vocab_size, tokens.vocab_size)
    info = TargetInfo([], vocab_size=vocab_size, bytes_per_token=tokens.bytes_per_token)
    size = f"{'blocks of' if options.packing else 'texts of at most'} {options.block_size}"
    return Parts(*parts, {name: info}, f"{description}; {options.tokenizer} tokens in {size}",
                 None, vocab_size, tokens.pad_id)
