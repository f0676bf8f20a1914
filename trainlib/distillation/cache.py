"""What frozen teachers give for each sample, computed once before training and read from disk.

A folder holds ``cache.json``, which says what the outputs depend on, and parts of consecutive
samples in safetensors, fp16 or int32. A part is the same batch wherever it is computed, so its
bytes do not depend on the processes. It is written whole or not at all. When it is opened its
header and length are checked, its numbers are not: that would read the whole cache.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trainlib import agreement, durable
from trainlib.config import UserError, flatten, is_first_process
from trainlib.durable import Damaged

_HEADER, _VERSION = "cache.json", 1
_SAY_EVERY_SECONDS = 30.0
_WAY_OUT = "choose another --distill.cache_dir"


class TeacherCache:
    """The outputs of teachers for the samples of one split; runs may share its folder."""

    def __init__(self, folder: Path, identity: dict[str, str], num_samples: int, part_size: int):
        """Names the folder; nothing is looked at or written before ``open``.

        Args:
            identity: by name, all that the outputs depend on.
            part_size: samples of a part, which ``fill`` computes as one batch.
        """
        self.folder, self.num_samples, self.part_size = folder, num_samples, part_size
        self.num_parts = -(-num_samples // part_size)
        self._header = {"identity": identity, "num_samples": num_samples, "part_size": part_size,
                        "version": _VERSION}
        self._device = torch.device("cpu")
        self._missing: list[int] = []
        self._damaged: list[str] = []
        self._layout: dict[str, list] = {}  # of every part, once one is known
        self._parts: dict[int, dict[str, np.ndarray]] = {}

    def check(self, device: torch.device) -> None:
        """Refuses, on all processes, a folder that ``open`` would refuse for what it holds.

        Raises:
            UserError: as said.
        """
        refusal = None
        if is_first_process() and self.folder.is_dir() and any(self.folder.iterdir()):
            try:
                self._check_header()
            except UserError as error:
                refusal = str(error)
        refusal = agreement.from_main(refusal, device)
        if refusal is not None:
            raise UserError(refusal)

    def open(self, device: torch.device) -> int:
        """Takes or creates the folder on all processes; returns how many parts are missing.

        Damaged parts count as missing. ``device`` is where the processes communicate.

        Raises:
            UserError: the folder holds other outputs or something else, or cannot be written.
        """
        outcome = {}
        if is_first_process():
            try:
                with self._writing():
                    outcome = {"missing": self._take(), "layout": self._layout}
            except UserError as error:
                outcome = {"refused": str(error)}
        outcome = agreement.from_main(outcome, device)
        if "refused" in outcome:
            raise UserError(outcome["refused"])
        self._device, self._layout = device, outcome["layout"]
        self._missing = outcome["missing"]
        return len(self._missing)

    def _take(self) -> list[int]:
        self.folder.mkdir(parents=True, exist_ok=True)
        # One listing: a network folder would remember that a file looked for was not there.
        paths = set(self.folder.iterdir())
        if not all(path.name.startswith(f".tmp_{_HEADER}") for path in paths):
            self._check_header()
        missing = []
        for number in range(self.num_parts):
            try:
                if self._path(number) in paths:
                    self._part(number)
                    continue
            except Damaged as error:
                self._damaged.append(str(error))
            missing.append(number)
        if missing:  # what is complete may be read-only
            durable.remove_leftovers(self.folder)
            durable.write_text(self.folder / _HEADER, durable.as_json(self._header))
        return missing

    def _check_header(self) -> None:
        try:
            found = flatten(json.loads((self.folder / _HEADER).read_bytes()))
        except (FileNotFoundError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"distill.cache_dir: {self.folder} holds files but no teacher outputs "
                            f"({_HEADER}); {_WAY_OUT}") from error
        wanted = flatten(self._header)
        changed = [
            f"{name.removeprefix('identity.')} ({found.get(name, 'unset')} there, "
            f"{wanted.get(name, 'unset')} here)"
            for name in sorted(found | wanted) if found.get(name) != wanted.get(name)
        ]
        if changed:
            raise UserError(f"distill.cache_dir: {self.folder} holds other outputs: "
                            f"{', '.join(changed)}; {_WAY_OUT}, or remove that folder")

    def fill(
        self, compute: Callable[[np.ndarray], dict[str, Tensor]], rank: int, world_size: int,
        say: Callable[[str], object], may_go_on: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Computes the missing parts on all processes and waits for all; False if it was stopped.

        Stopped or killed it leaves whole parts, and the next one computes the others. Numbers
        beyond fp16's range become its largest; -inf, which masks a class, stays.

        Args:
            compute: given [n] consecutive samples, the outputs by name, [n, ...] each.
            may_go_on: asked by all processes equally often, so it may communicate.

        Raises:
            UserError: an output is NaN or inf or of another shape than before; the disk is full.
        """
        for fault in self._damaged:
            say(f"teacher outputs: {fault}; computes that part again")
        if self._missing:
            say(f"teacher outputs: {len(self._missing):,} of {self.num_parts:,} parts to compute")
        said = time.monotonic()
        while self._missing and may_go_on():
            if rank < len(self._missing):
                self._compute(self._missing[rank], compute)
            self._missing = self._missing[world_size:]
            if time.monotonic() - said > _SAY_EVERY_SECONDS:
                said = time.monotonic()
                say(f"teacher outputs: {len(self._missing):,} parts are left")
        agreement.is_same_everywhere("", self._device)  # answered once all have come here
        return not self._missing

    def _compute(self, number: int, compute: Callable[[np.ndarray], dict[str, Tensor]]) -> None:
        samples, path = self._samples(number), self._path(number)
        outputs = {name: _stored(name, output, samples)
                   for name, output in compute(samples).items()}
        layout = _layout(outputs)
        if layout != (self._layout or layout):
            raise UserError(f"distill.cache_dir: outputs need one shape for all samples, got "
                            f"{layout} from sample {samples[0]} on and {self._layout} elsewhere; "
                            f"{_WAY_OUT}, or leave it out")
        self._layout = layout
        content = save(outputs)
        with self._writing():
            try:
                durable.write_bytes(path, content)
            except FileNotFoundError:  # taken for a leftover by a run that just opened the folder
                durable.write_bytes(path, content)

    def read(self, samples: np.ndarray) -> dict[str, Tensor]:
        """The outputs of samples [n] in any order: [n, ...] fp16 or int32 each, on the CPU.

        Raises:
            UserError: a part is missing or damaged although ``fill`` has finished.
        """
        numbers, rows = np.divmod(samples, self.part_size)
        outputs: dict[str, np.ndarray] = {}
        for number in np.unique(numbers).tolist():
            chosen = np.flatnonzero(numbers == number)
            try:
                part = self._part(number)
            except Damaged as error:
                raise UserError(f"distill.cache_dir: {self.folder}: {error}; all machines need the "
                                "same folder, left as it is. Start again to mend it") from error
            for name, stored in part.items():
                if name not in outputs:
                    outputs[name] = np.empty((len(samples), *stored.shape[1:]), stored.dtype)
                outputs[name][chosen] = stored[rows[chosen]]
        return {name: torch.from_numpy(output) for name, output in outputs.items()}

    def _part(self, number: int) -> dict[str, np.ndarray]:
        """One part's outputs, mapped; raises Damaged if the file is not as it was written."""
        if number not in self._parts:
            path, samples = self._path(number), self._samples(number)
            try:
                with safe_open(path, "pt") as file:  # the maps outlive it
                    outputs = {name: file.get_tensor(name) for name in file.keys()}
            except (OSError, SafetensorError) as error:
                raise Damaged(f"{path.name}: {error}") from error
            layout = _layout(outputs)
            if not layout or layout != (self._layout or layout) or any(
                output.dtype not in (torch.float16, torch.int32)
                or output.shape[:1] != samples.shape for output in outputs.values()
            ):
                raise Damaged(f"{path.name}: outputs of another shape or type")
            self._layout = layout
            self._parts[number] = {name: output.numpy() for name, output in outputs.items()}
        return self._parts[number]

    def _samples(self, number: int) -> np.ndarray:
        start = number * self.part_size
        return np.arange(start, min(start + self.part_size, self.num_samples))

    def _path(self, number: int) -> Path:
        return self.folder / f"part_{number:05}.safetensors"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"distill.cache_dir: {self.folder} cannot be written "
                            f"({error.strerror}); make room, or {_WAY_OUT}") from error


def _layout(outputs: dict[str, Tensor]) -> dict[str, list]:
    """By name, in order: the dtype, and the shape of one sample's output."""
    return {name: [str(output.dtype).removeprefix("torch."), list(output.shape[1:])]
            for name, output in sorted(outputs.items())}


def _stored(name: str, output: Tensor, samples: np.ndarray) -> Tensor:
    """An output in fp16 or int32 on the CPU; a copy that no other name shares."""
    if output.shape[:1] != samples.shape:
        raise ValueError(f"{name}: {len(samples)} samples come first, got {list(output.shape)}")
    output = output.detach()
    if not output.is_floating_point():
        return output.to("cpu", torch.int32, copy=True).contiguous()
    output = output.to(torch.promote_types(output.dtype, torch.float32))  # bf16 has no 65504
    is_bad = (output.isnan() | output.isposinf()).reshape(len(samples), -1).any(1)
    if is_bad.any():
        raise UserError(f"the teacher's output {name!r} for sample {samples[is_bad.tolist()][0]} "
                        "is not finite; take another teacher, or run this one in bf16 or fp32")
    largest = torch.finfo(torch.float16).max
    stored = output.clamp(-largest, largest).masked_fill(output.isneginf(), -torch.inf)
    return stored.half().cpu().contiguous()
