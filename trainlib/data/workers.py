"""Processes that decode while the model trains."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainlib.config import UserError
from trainlib.data.decoding import Decoder

_SIGNALS = [getattr(signal, name)
            for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
            if hasattr(signal, name)]  # Windows has two of them


def decoded(
    decode: Decoder, row_lists: Iterable[np.ndarray], workers: int, pin_memory: bool = False,
    target_decoders: Mapping[str, Decoder] | None = None, is_forgiving: bool = False,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Inputs and decoded targets of each list of rows, in order, by worker processes if any.

    Args:
        is_forgiving: give a UserError in place of rows, and go on.
    """
    rows_of = Rows(decode, target_decoders or {})
    if workers == 0:
        yield from map(rows_of.__getitem__ if is_forgiving else rows_of.read, row_lists)
        return
    loader = DataLoader(
        rows_of, sampler=row_lists, batch_size=None, num_workers=workers,
        pin_memory=pin_memory, generator=torch.Generator(),  # not the run's
        worker_init_fn=_ignore_signals,
    )
    # Without a name: in a traceback's frame it would keep the workers alive after an error.
    for read in _start(loader):
        if isinstance(read, UserError) and not is_forgiving:
            raise read
        yield read


def _ignore_signals(worker: int) -> None:
    """Leaves the end of a worker to the main process alone.

    Schedulers and terminals signal all processes of a run, and a worker that died of it would take
    from the main process the samples that it needs to come to a checkpoint.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _start(loader: DataLoader) -> Iterator:
    """Starts the workers while signals wait, which they have yet to learn to ignore."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return iter(loader)
    former = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


@atexit.register  # later than multiprocessing's own, so that it runs before
def _end_workers() -> None:
    """Kills what is left of workers: multiprocessing asks by SIGTERM and waits without end."""
    if hasattr(signal, "SIGCHLD"):  # torch's handler would call it an error
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class Rows(Dataset):
    """What a worker runs: a list of rows in, their inputs and targets out."""

    def __init__(self, decode: Decoder, target_decoders: Mapping[str, Decoder]):
        self.decode, self.target_decoders = decode, target_decoders

    def read(self, rows: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        return self.decode(rows), {name: decode(rows)
                                   for name, decode in self.target_decoders.items()}

    def __getitem__(self, rows: np.ndarray) -> tuple[Tensor, dict[str, Tensor]] | UserError:
        try:
            return self.read(rows)
        except UserError as error:  # as a value: raised here, it would arrive as a traceback
            return error
