"""Options of the data, of augmentation and of batches."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from trainlib import shards
from trainlib.config import Options, UserError, nearest
from trainlib.data import builtin


class AugmentOptions(Options):
    rotation: float = Field(0.0, ge=0, le=180)
    """Degrees an image is turned by at most, either way."""
    crop: int = Field(0, ge=0)
    """Pixels an image is shifted by at most, each way; what it leaves is black, and in a mask
    ignored."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability of a mirror image, left to right."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Largest relative change of an image's brightness."""
    contrast: float = Field(0.0, ge=0, le=1)
    """Largest relative change of an image's contrast."""
    function: str | None = None
    """A function of your own, file.py:name, from images [batch, channels, height, width] in 0..1
    to as many; random numbers from torch's default generator are the same on any machine."""
    cutout: int = Field(0, ge=0)
    """Side of a square in pixels that is wiped out in each image."""
    mixup: float = Field(0.0, ge=0)
    """Alpha of MixUp, which blends pairs of samples and of their losses; 0: off."""
    cutmix: float = Field(0.0, ge=0)
    """Alpha of CutMix, which pastes a box of one image into another; 0: off."""


class DataOptions(Options):
    source: str = "builtin:digits"
    """Where the samples come from: builtin:digits, digits_ink, diabetes or pydocs; a parquet, csv,
    tsv, json, arrow or txt file or glob; a folder of images; a folder of save_to_disk;
    file.py:function that returns a datasets.Dataset or DatasetDict; or the id of a data set on the
    Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the Hub."""
    subset: str | None = None
    """Configuration of a data set on the Hub that has several."""
    input: str | list[str] | None = None
    """The column of images, of lists of numbers or of text, or the columns of numbers, that the
    model sees; none: with a tokenizer the only text column, else the only image or list column,
    else all columns of numbers but the targets."""
    channels: Literal[1, 3] | None = None
    """Images in grey (1) or colour (3); none: as the first image of the training split."""
    image_size: int | list[int] | None = None
    """Height and width in pixels, or one number for both: images are scaled to cover it and cut
    about the centre; none: all images have one size."""
    train_split: str = "train"
    """The split to train on, where the source has several."""
    validation_split: float | str | None = None
    """The split or file to validate on, or the share of the training split to hold out, the same
    rows whatever the seed; none: the source's validation split, else 0.1."""
    normalize: bool = True
    """Give the model inputs with mean 0 and deviation 1, by channel or column, as measured on the
    training split; without it integers in lists stay integers, such as token numbers."""
    tokenizer: str | None = None
    """What turns text into token numbers: bytes (built in, 256 of them), or a Hugging Face
    tokenizer as a folder, a tokenizer.json or an id on the Hub."""
    block_size: int = Field(256, ge=1)
    """Tokens of a block of language modelling; of other texts at most so many, from the start."""
    packing: bool = True
    """Language modelling on blocks cut from all texts in a row; without it each text is one block,
    cut or padded."""
    in_memory: Literal["auto", True, False] = "auto"
    """Decode everything once and keep it in memory; auto: if it fits in a quarter of it."""
    workers: int | None = Field(None, ge=0)
    """Processes that decode, for each training process; none: one for each of its CPU cores."""
    augment: AugmentOptions = AugmentOptions()

    @field_validator("source")
    @classmethod
    def _builtin_is_there(cls, source: str) -> str:
        known = builtin.TABLES | builtin.TEXTS
        if source.startswith("builtin:") and source not in known:
            raise ValueError(f"unknown{nearest(source, known)}")
        return source

    @model_validator(mode="before")
    @classmethod
    def _no_streaming(cls, given: Any) -> Any:
        if isinstance(given, dict) and "streaming" in given:
            raise UserError(
                "streaming: a stream cannot be read in the order of the plan, which is what makes "
                "runs equal and resumable; leave it out, and use --data.in_memory false for data "
                "larger than the memory"
            )
        return given

    @field_validator("image_size", mode="before")
    @classmethod
    def _is_a_size(cls, size: Any) -> Any:
        sides = size if isinstance(size, list) else [size]
        is_size = all(isinstance(side, int) and side >= 1 for side in sides)
        if size is not None and not (is_size and len(sides) in (1, 2)):
            raise ValueError("a size is one number of pixels, or [height, width], each >= 1")
        return size

    @field_validator("validation_split")
    @classmethod
    def _is_a_share(cls, split: float | str | None) -> float | str | None:
        if isinstance(split, float) and not 0 < split < 1:
            raise ValueError("a share to hold out lies between 0 and 1; a split has a name")
        return split

    @model_validator(mode="after")
    def _splits_differ(self) -> "DataOptions":
        if self.validation_split == self.train_split:
            raise UserError(
                f"validation_split: {self.train_split!r} is the training split; validate on other "
                "samples, or hold a share out with --data.validation_split 0.1"
            )
        return self

    @property
    def height_and_width(self) -> tuple[int, int] | None:
        """``image_size`` in pixels."""
        if self.image_size is None:
            return None
        sides = [self.image_size] if isinstance(self.image_size, int) else self.image_size
        return sides[0], sides[-1]


class BatchOptions(Options):
    global_size: int = Field(64, ge=1)
    """Samples per optimizer step over all processes; the learning curve depends on it."""
    micro_size: int | Literal["auto"] = 32
    """Samples per forward; equal sizes give bit-equal weights on any number of processes. auto: the
    largest that fits into memory, found before the first step and kept in the run folder; dropout,
    augmentation and BatchNorm then depend on the machine."""
    eval_size: int = Field(256, ge=1)
    """Samples per forward in evaluation."""
    exact_sum: bool | None = None
    """Sum gradients in float64, so that no bit depends on the processes; none: on for CPU only."""

    @field_validator("micro_size", mode="before")
    @classmethod
    def _is_a_size(cls, size: Any) -> Any:
        if size != "auto" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError("a number of samples >= 1, or auto")
        return size

    @model_validator(mode="after")
    def _micro_fits(self) -> "BatchOptions":
        if self.micro_size != "auto" and self.micro_size > self.global_size:
            raise ValueError(
                f"micro_size: {self.micro_size} is more than batch.global_size "
                f"{self.global_size}: a micro-batch is a part of the global batch; "
                "set --batch.micro_size, too"
            )
        if self.exact_sum and shards.is_asked():
            raise ValueError("exact_sum: FSDP2 sums gradients itself, in fp32; leave it out, or "
                             "use a config without FSDP2")
        return self

    @property
    def smallest_micro_batch(self) -> int:
        """Samples of the smallest micro-batch; as long as the size is not known, 2 at most."""
        size = min(2, self.global_size) if self.micro_size == "auto" else self.micro_size
        return (self.micro_size != "auto" and self.global_size % size) or size
