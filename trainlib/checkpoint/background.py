"""Writing beside the training: the loop waits for a copy to host memory, and for nothing else."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Files = dict[str, dict[str, Tensor]]
"""Tensors by name, by file."""


class BackgroundWriter:
    """One thread that writes what it is given, in order, from copies of its own.

    Of each name one copy is held: a second job of that name waits until the first has been written.
    """

    def __init__(self, say: Callable[[str], object]):
        """
        Args:
            say: told in a line of what could not be written, from the thread.
        """
        self.say = say
        self.failures: dict[str, str] = {}
        """By name: what its latest job could not write, and why."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._jobs: dict[str, Future] = {}
        self._latest: dict[str, tuple[str, Callable[[], object]]] = {}
        self._copies: dict[str, dict[tuple[str, str], Tensor]] = {}
        self._copying = threading.Lock()  # other jobs may write a name's copies again

    def submit(
        self, name: str, what: str, files: Files, write: Callable[[Files], object]
    ) -> None:
        """Copies tensors and has them written.

        Args:
            name: of all jobs of this kind.
            what: this one's name, for messages.
            files: may be changed as soon as this returns.
            write: called in the thread with the copies; an ``OSError`` is said, and noted in
                ``failures`` until a later job of that name succeeds. Anything else it raises is
                raised by the next ``submit`` or by ``wait``.
        """
        self._wait_for(name)
        with self._copying:
            self._latest[name] = (what, _refuse)  # should the copy end half-way
            copies = self._copy(name, files)
            self._latest[name] = (what, lambda: write(copies))
        self._jobs[name] = self._thread.submit(self._run, name)

    def retry(self, name: str, is_lost: bool = False) -> None:
        """Writes the latest job of a name again if it has failed; to be called by another job.

        Args:
            is_lost: what it has written, if it has, is there no more.

        Raises:
            OSError: it has failed again.
        """
        with self._copying:
            if name in self.failures or (is_lost and name in self._latest):
                self._latest[name][1]()
                self.failures.pop(name, None)

    def wait(self) -> None:
        """Returns when everything has been written."""
        for name in list(self._jobs):
            self._wait_for(name)

    def _wait_for(self, name: str) -> None:
        if name in self._jobs:
            self._jobs.pop(name).result()

    def _run(self, name: str) -> None:
        what, write = self._latest[name]
        try:
            write()
            self.failures.pop(name, None)
        except OSError as error:
            self.failures[name] = f"{what}: {error.strerror or error}"
            self.say(f"not written: {self.failures[name]}; training goes on")

    @torch.no_grad()
    def _copy(self, name: str, files: Files) -> Files:
        sources = {(file, key): tensor for file, tensors in files.items()
                   for key, tensor in tensors.items()}
        former, held = self._copies.get(name, {}), {}
        for key, source in sources.items():
            copy = former.get(key)
            if copy is None or copy.shape != source.shape or copy.dtype != source.dtype:
                # In the source's own memory order: a copy that need not turn it is faster.
                copy = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
            held[key] = copy.copy_(source, non_blocking=True)
        if any(source.device.type != "cpu" for source in sources.values()):
            torch.accelerator.synchronize()
        self._copies[name] = held
        copies: Files = {file: {} for file in files}
        for (file, key), copy in held.items():
            copies[file][key] = copy
        return copies


def _refuse() -> None:
    raise OSError("its copy in memory was not finished")
