"""A few samples as people see them: pictures, or text, beside what the model says to each."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from trainlib.plan import samples_of
from trainlib.predictions.rows import are_mistakes, as_text, decided_pixels

if TYPE_CHECKING:
    from trainlib.data import Split
    from trainlib.tasks import Task

_SHORTEST_SIDE, _LONGEST_SIDE = 64, 256  # pixels of a picture
_GAP = 4  # pixels between an image and its masks
_MOST_COLUMNS = 12  # of a table's row
_CONTEXT_LETTERS = 240  # of a text before the token that is predicted
_AT_ONCE = 4  # samples that go through the model together


class Inputs(NamedTuple):
    """How inputs are shown."""

    columns: list[str] | None
    """Names of the numbers that are inputs."""
    decode: Callable[[list[int]], str] | None
    """From token numbers to text, where the inputs are tokens."""
    pad_id: int | None
    """The token that fills texts up."""


def choose(task: Task, rows: np.ndarray, num_examples: int) -> list[tuple[int, str]]:
    """Samples to look at, and why: the worst mistakes, then some that the draw names.

    Mistakes of classes and labels are ordered by the confidence in them, others by their loss.

    Args:
        rows: [samples, width] as ``Recorder`` has them.
    """
    by = 1 if task.kind in ("classification", "multilabel") else 0
    there = np.isfinite(rows[:, by])
    if by:
        there &= are_mistakes(rows)
    order = np.argsort(-np.where(there, rows[:, by], -np.inf), kind="stable")
    worst = order[: min(num_examples, int(there.sum()))]
    drawn = samples_of(np.arange(min(num_examples, len(rows))), len(rows), seed=0)
    return [(int(sample), "mistake") for sample in worst] + [
        (int(sample), "sample") for sample in drawn]


@torch.no_grad()
def render(
    task: Task, chosen: Sequence[tuple[int, str]], rows: np.ndarray, split: Split,
    model: nn.Module, shown: Inputs, device: torch.device,
) -> list[tuple[dict[str, Any], bytes | None]]:
    """An entry for each chosen sample, and its picture as a PNG if it has one.

    Args:
        rows: [samples, width] as ``Recorder`` has them.
        model: in eval mode, on the device; asked again where more than numbers is shown.
    """
    found = []
    asks = task.kind in ("segmentation", "language_modeling")
    for first in range(0, len(chosen), _AT_ONCE):
        some = chosen[first : first + _AT_ONCE]
        samples = np.array([sample for sample, _ in some])
        stored, _ = split.read(samples)
        inputs, targets = next(split.batches([samples], device))
        output = model(inputs) if asks else None
        for place, (sample, group) in enumerate(some):
            [line, *others] = as_text(task, int(split.rows[sample]), rows[sample].tolist())
            entry = {"task": task.name, "group": group, "row": line.row, "target": line.target,
                     "prediction": line.prediction}
            if others:  # several numbers
                for name in ("target", "prediction"):
                    entry[name] = ", ".join(
                        f"{column} {getattr(each, name)}"
                        for column, each in zip(task.label_names, (line, *others), strict=True))
            entry |= {"confidence": _plain(line.confidence), "loss": _plain(line.loss)}
            picture = None
            if task.kind == "language_modeling":
                entry |= _next_token(task, output, targets[task.name], place, stored[place],
                                     shown.decode, group)
            elif stored[place].ndim == 3:
                masks = [] if output is None else _masks(task, output, targets[task.name], place)
                picture = _picture(stored[place].cpu(), masks, len(task.label_names))
            else:
                entry["text"] = _as_words(stored[place].cpu(), shown)
            found.append((entry, picture))
    return found


def _plain(number: float) -> float | None:
    return number if np.isfinite(number) else None  # JSON has no NaN


def _next_token(
    task: Task, output: Any, target: Tensor, place: int, inputs: Tensor,
    decode: Callable[[list[int]], str] | None, group: str,
) -> dict[str, Any]:
    """One place of a text: of a mistake the most confident wrong one, else the last."""
    target = target[place]
    logits = task.pick(output)[place].float()
    confidence, said = logits.softmax(1).max(1)
    is_there = target >= 0
    wrong = is_there & (said != target)
    if group == "mistake" and wrong.any():
        at = int(confidence.where(wrong, -1).argmax())
    else:
        at = int(is_there.nonzero()[-1]) if is_there.any() else 0
    as_word = decode or (lambda numbers: " ".join(map(str, numbers)))
    before = as_word(inputs[: at + 1].tolist())
    before = before if len(before) <= _CONTEXT_LETTERS else "…" + before[-_CONTEXT_LETTERS:]
    return {"target": as_word([int(target[at])]) if is_there[at] else "",
            "prediction": as_word([int(said[at])]), "confidence": float(confidence[at]),
            "text": before}


def _masks(task: Task, output: Any, target: Tensor, place: int) -> list[np.ndarray]:
    predicted, _ = decided_pixels(task, output, target)
    return [mask[place].cpu().numpy() for mask in (target, predicted)]


def _picture(stored: Tensor, masks: Sequence[np.ndarray], num_classes: int) -> bytes:
    """The PNG of [channels, height, width] inputs, and beside it of masks of their size."""
    pixels = stored if len(stored) in (1, 3) else stored[:1]
    if pixels.dtype != torch.uint8:
        pixels = pixels.float()
        low, high = min(pixels.min().item(), 0.0), max(pixels.max().item(), 1.0)
        pixels = ((pixels - low) / (high - low) * 255).byte()
    colours = pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()
    gap = np.full((colours.shape[0], _GAP, 3), 255, np.uint8)
    strips = [colours]
    for mask in masks:
        strips += [gap, _in_colours(mask, num_classes)]
    image = Image.fromarray(np.concatenate(strips, 1))
    side = min(colours.shape[:2])
    # Small images are enlarged by whole factors, so that pixels stay squares.
    factor = min(-(-_SHORTEST_SIDE // side), max(1, _LONGEST_SIDE // max(colours.shape[:2])))
    if factor > 1:
        size = (image.width * factor, image.height * factor)
        image = image.resize(size, Image.Resampling.NEAREST)
    most = _LONGEST_SIDE * (1 + len(masks))
    image.thumbnail((most, most))
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def _in_colours(mask: np.ndarray, num_classes: int) -> np.ndarray:
    """[height, width, 3]: greys of rising lightness from class to class; what is ignored is red."""
    levels = np.linspace(0, 255, max(num_classes, 2)).astype(np.uint8)
    grey = levels[np.clip(mask, 0, len(levels) - 1)]
    colours = np.repeat(grey[..., None], 3, 2)
    colours[mask < 0] = (200, 80, 30)
    return colours


def _as_words(inputs: Tensor, shown: Inputs) -> str:
    if shown.decode is not None and inputs.ndim == 1 and not inputs.is_floating_point():
        tokens = inputs.tolist()
        while tokens and tokens[-1] == shown.pad_id:
            tokens.pop()
        return shown.decode(tokens)[: 2 * _CONTEXT_LETTERS]
    values = [f"{value:.4g}" for value in inputs.flatten()[:_MOST_COLUMNS].tolist()]
    names = shown.columns if inputs.ndim == 1 and shown.columns else []
    if len(names) == len(inputs):
        values = [f"{name} {value}" for name, value in zip(names, values, strict=False)]
    more = inputs.numel() - len(values)
    return ", ".join(values) + (f" and {more} more" if more > 0 else "")
