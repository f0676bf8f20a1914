"""From rows of a table to tensors of inputs: images and numbers."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trainlib.config import UserError

if TYPE_CHECKING:
    import datasets
    import PIL.Image
    import pyarrow

Decoder = Callable[[np.ndarray], Tensor]
"""From rows [n] of a source to what they hold: inputs [n, ...], uint8 for images and otherwise fp32
or int64, or targets that are read along with them, such as masks."""

_GREY_MODES = ("1", "L", "LA")
# Where Pillow keeps what says which side of an image is up; TIFF files it turns by itself.
_ORIENTED = {"exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp"}


class ImageDecoder:
    """A column of encoded images, to [rows, channels, height, width] uint8."""

    def __init__(
        self,
        table: datasets.Dataset,
        column: str,
        channels: int | None,
        size: tuple[int, int] | None,
        where: str,
    ):
        """
        Args:
            channels: 1 or 3; none: as the first image, and colour after grey is an error.
            size: height and width that images are brought to; none: the first image's, and
                another is an error.
            where: what the table is, for messages.

        Raises:
            UserError: Pillow is not installed, or the first image cannot be decoded.
        """
        try:
            import PIL.Image  # noqa: F401
        except ModuleNotFoundError as error:
            raise UserError(f"{where}: images need the package Pillow, which is not installed: "
                            "pip install pillow") from error
        self.column, self.channels, self.size = column, channels, size
        self.must_be_grey = self.must_fit = False
        self._attach(table, where)
        if channels is None or size is None:
            first = self._open(self._encoded(np.zeros(1, np.int64))[0], 0)
            self.channels = channels or (1 if first.mode in _GREY_MODES else 3)
            self.size = size or (first.height, first.width)
            self.must_be_grey = channels is None and self.channels == 1
            self.must_fit = size is None

    def _attach(self, table: datasets.Dataset, where: str) -> None:
        import datasets

        if not isinstance(table.features[self.column], datasets.Value):  # bytes and path
            table = table.cast_column(self.column, datasets.Image(decode=False))
        self.table, self.where = table.select_columns([self.column]).with_format("arrow"), where

    def on(self, table: datasets.Dataset, where: str) -> ImageDecoder:
        """The decoder of another table's images, to the shape of this one's."""
        other = copy.copy(self)
        other._attach(table, where)
        return other

    def __call__(self, rows: np.ndarray) -> Tensor:
        images = np.empty((len(rows), *self.size, self.channels), np.uint8)
        for place, encoded in enumerate(self._encoded(rows)):
            pixels = self._pixels(encoded, int(rows[place]))
            images[place] = pixels if self.channels == 3 else pixels[:, :, None]
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def _encoded(self, rows: np.ndarray) -> list[dict | bytes | None]:
        return _read_rows(self.table, rows)[self.column].to_pylist()

    def _open(self, encoded: dict | bytes | None, row: int) -> PIL.Image.Image:
        """The decoded image, upright, in one of Pillow's modes of 8 bits."""
        from PIL import Image, ImageOps, UnidentifiedImageError

        path = encoded.get("path") if isinstance(encoded, dict) else None
        content = encoded.get("bytes") if isinstance(encoded, dict) else encoded
        place = f"{self.where}, row {row}" + (f" ({path})" if path else "")
        if content is None and path is None:
            raise UserError(f"{place}: the image is missing; remove the row")
        image = None
        try:
            image = Image.open(path if content is None else io.BytesIO(content))
            image.load()
            if _ORIENTED & image.info.keys():  # asking Pillow costs as much as a small image
                ImageOps.exif_transpose(image, in_place=True)
        except Exception as error:  # Pillow's readers raise whatever a broken file makes them
            if image is not None:
                image.close()
            reason = ("in no format that Pillow knows" if isinstance(error, UnidentifiedImageError)
                      else " ".join(str(error).split()))
            raise UserError(f"{place}: not an image that can be decoded ({reason}); mend or remove "
                            "it") from error
        self._check(image, place)
        return image

    def _check(self, image: PIL.Image.Image, place: str) -> None:
        if image.mode[0] in "IF":
            raise UserError(f"{place}: pixels of mode {image.mode} have more than 8 bits a "
                            "channel; convert the images to 8 bits")
        if self.must_be_grey and image.mode not in _GREY_MODES:
            raise UserError(f"{place}: in colour, the first image is grey; choose for all with "
                            "--data.channels 1 or 3")
        if self.must_fit and (image.height, image.width) != self.size:
            height, width = self.size
            raise UserError(f"{place}: {image.height}x{image.width} pixels, the first image has "
                            f"{height}x{width}; bring all to one size with --data.image_size")

    def _pixels(self, encoded: dict | bytes | None, row: int) -> np.ndarray:
        from PIL import Image, ImageOps

        image = self._open(encoded, row)
        if image.mode == "P":
            image = image.convert("RGBA")  # Pillow warns of a transparent palette otherwise
        image = image.convert("L" if self.channels == 1 else "RGB")
        if (image.height, image.width) != self.size:
            image = ImageOps.fit(image, self.size[::-1], Image.Resampling.BILINEAR)
        return np.asarray(image)


class MaskDecoder(ImageDecoder):
    """A column of images of class numbers, to [rows, height, width] uint8."""

    def __call__(self, rows: np.ndarray) -> Tensor:
        return super().__call__(rows).squeeze(1)

    def _check(self, image: PIL.Image.Image, place: str) -> None:
        if image.mode not in ("1", "L", "P", "I", "I;16"):
            raise UserError(f"{place}: {self.column!r} has an image of mode {image.mode}; a mask "
                            "holds one class number a pixel: grey, a palette or integers")
        if self.must_fit and (image.height, image.width) != self.size:
            height, width = self.size
            raise UserError(f"{place}: the mask has {image.height}x{image.width} pixels, the first "
                            f"one {height}x{width}; bring images and masks to one size with "
                            "--data.image_size")

    def _pixels(self, encoded: dict | bytes | None, row: int) -> np.ndarray:
        from PIL import Image, ImageOps

        image = self._open(encoded, row)
        if image.mode == "I;16":  # which Pillow cannot scale
            image = image.convert("I")
        if (image.height, image.width) != self.size:
            image = ImageOps.fit(image, self.size[::-1], Image.Resampling.NEAREST)
        numbers = np.asarray(image)  # of a palette, too: its places
        if numbers.dtype != np.uint8 and not 0 <= numbers.min() <= numbers.max() <= 255:
            raise UserError(f"{self.where}, row {row}: class numbers of a mask lie in 0..255, this "
                            f"one has {numbers.min()}..{numbers.max()}")
        return numbers.astype(np.uint8)


class NumberDecoder:
    """Columns of numbers, to [rows, columns], or one column of equal lists, to [rows, ...]."""

    def __init__(
        self, table: datasets.Dataset, columns: list[str], keep_integers: bool, where: str,
        sizes: list[int] | None = None,
    ):
        """
        Args:
            keep_integers: lists of integers become int64; everything else is fp32.
            where: what the table is, for messages.
            sizes: of the lists, from the outermost; none: the first row's.
        """
        import pyarrow
        import pyarrow.types as types

        self.columns = columns
        self._attach(table, where)
        self.depth, number_type = nesting(table, columns[0])
        keeps = keep_integers and self.depth > 0 and types.is_integer(number_type)
        self.type = pyarrow.int64() if keeps else pyarrow.float32()
        if sizes is not None and self.depth:
            if len(sizes) != self.depth:
                raise UserError(f"{where}: {columns[0]!r} holds lists {self.depth} deep, in "
                                f"training they were {len(sizes)} deep")
            self.sizes = list(sizes)
            return
        self.sizes: list[int] = []  # of the lists, from the outermost
        first = _storage(self.table[:1][columns[0]])[0].as_py()
        for _ in range(self.depth):
            if not first:
                raise UserError(f"{where}, row 0: {columns[0]!r} has no list or an empty one; "
                                "lists of an input have one length, given by the first row")
            self.sizes.append(len(first))
            first = first[0]

    def _attach(self, table: datasets.Dataset, where: str) -> None:
        self.table, self.where = table.select_columns(self.columns).with_format("arrow"), where

    def on(self, table: datasets.Dataset, where: str) -> NumberDecoder:
        """The decoder of another table's rows, to the shape and type of this one's.

        Raises:
            UserError: its lists are nested otherwise, or hold fractions where these hold integers.
        """
        import pyarrow.types as types

        depth, number_type = nesting(table, self.columns[0])
        if depth != self.depth or self.type == "int64" and not types.is_integer(number_type):
            raise UserError(f"{where}: {self.columns[0]!r} holds lists of {number_type}, {depth} "
                            f"deep; in training they hold {self.type}, {self.depth} deep")
        other = copy.copy(self)
        other._attach(table, where)
        return other

    def __call__(self, rows: np.ndarray) -> Tensor:
        chunk = _read_rows(self.table, rows)
        numbers = []
        for name in self.columns:
            values = self._flat(_storage(chunk[name]), rows, name)
            if self.type == "int64" and values.null_count:
                wrong = int(np.flatnonzero(np.asarray(values.is_null()))[0])
                row = rows[wrong // math.prod(self.sizes)]
                raise UserError(f"{self.where}, row {row}: {name!r} lacks a number in its list; "
                                "mend or remove the row")
            # Arrow's missing numbers become NaN, which whoever reads everything counts.
            values = values.cast(self.type, safe=False).to_numpy(zero_copy_only=False)
            numbers.append(torch.from_numpy(values.copy()).view(len(rows), *self.sizes))
        return numbers[0] if self.depth else torch.stack(numbers, 1)

    def _flat(self, values: pyarrow.Array, rows: np.ndarray, name: str) -> pyarrow.Array:
        """The numbers of all lists, each of which must be as long as the first row's."""
        import pyarrow.compute as compute

        lists_per_row = 1
        for size in self.sizes:
            lengths = compute.list_value_length(values).fill_null(-1).to_numpy(zero_copy_only=False)
            wrong = np.flatnonzero(lengths != size)
            if len(wrong):
                row, length = rows[wrong[0] // lists_per_row], lengths[wrong[0]]
                given = "no list" if length < 0 else f"a list of {length}"
                raise UserError(f"{self.where}, row {row}: {name!r} has {given}, the first row has "
                                f"{size}; lists of an input have one length")
            lists_per_row *= size
            values = values.flatten()
        return values


def nesting(table: datasets.Dataset, column: str) -> tuple[int, pyarrow.DataType]:
    """How deep the lists of a column are nested, and the type of what they hold."""
    type_, depth = table.features.arrow_schema.field(column).type, 0
    type_ = getattr(type_, "storage_type", type_)  # of Array2D and its kin
    while hasattr(type_, "value_type"):
        type_, depth = type_.value_type, depth + 1
    return depth, type_


def _storage(column: pyarrow.ChunkedArray) -> pyarrow.Array:
    """A column as one array of Arrow's own types."""
    column = column.combine_chunks()
    return getattr(column, "storage", column)


def _read_rows(table: datasets.Dataset, rows: np.ndarray) -> pyarrow.Table:
    """Rows in Arrow's format; neighbours come out of a slice, which is many times faster."""
    first, last = int(rows.min()), int(rows.max())
    if last - first < 16 * len(rows):
        return table[first : last + 1].take(rows - first)
    return table[rows.tolist()]
