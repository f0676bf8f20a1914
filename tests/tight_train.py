"""A script whose memory is too small for large micro-batches of the model that it trains.

The environment says how small. LIMIT: a forward in training of more samples raises CUDA's error.
EVAL_LIMIT: so does one in evaluation. AFTER: so does every forward in training from this number on.
ONLY: the rank that this happens to; all, if it is not set. HOST_MIB: the process's address space
may grow by so much during the search, and the CPU allocator's own error is what is met. WORKER:
what a data worker meets at its second read, MemoryError, numpy's own, or kill. AT_END: every
forward fails once all weights are written. SCRIPT: train, or another one.
"""

import importlib
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainlib import models, runtime  # noqa: E402
from trainlib.checkpoint import Checkpoints  # noqa: E402
from trainlib.data import workers  # noqa: E402

LIMIT, AFTER, EVAL_LIMIT = (
    int(os.environ.get(name, 10**9)) for name in ("LIMIT", "AFTER", "EVAL_LIMIT"))
IS_TIGHT = os.environ.get("ONLY") in (None, os.environ.get("RANK", "0"))
BEGUN: list[int] = []  # the search: what comes before is not on the device
ENDED: list[int] = []  # all weights are written
ERROR = ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 9.00 GiB. "
         "And so on.")
finish = Checkpoints.finish
build_model, read, calls = models.build_model, workers.Rows.read, []


def build_tight_model(*arguments) -> torch.nn.Module:
    module = build_model(*arguments)
    module.register_forward_pre_hook(refuse)
    return module


def refuse(module: torch.nn.Module, arguments: tuple) -> None:
    if ENDED and IS_TIGHT:
        raise torch.OutOfMemoryError(ERROR)
    if IS_TIGHT and BEGUN and not module.training and len(arguments[0]) > EVAL_LIMIT:
        raise torch.OutOfMemoryError(ERROR)
    if not (IS_TIGHT and BEGUN and module.training and torch.is_grad_enabled()):
        return
    calls.append(1)
    if len(arguments[0]) > LIMIT or len(calls) > AFTER:
        raise torch.OutOfMemoryError(ERROR)


def read_in_little_memory(rows_of, rows):
    is_worker = torch.utils.data.get_worker_info() is not None
    calls.extend([1] * is_worker)
    if is_worker and len(calls) > 1:
        if os.environ["WORKER"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["WORKER"] == "numpy":
            np.empty(2**50)
        raise MemoryError
    return read(rows_of, rows)


def finish_and_fail(checkpoints):
    finish(checkpoints)
    ENDED.append(1)


def main() -> None:
    if "AT_END" in os.environ:
        Checkpoints.finish = finish_and_fail
    if "WORKER" in os.environ:
        workers.Rows.read = read_in_little_memory
    script = importlib.import_module(os.environ.get("SCRIPT", "train"))
    models.build_model, settle = build_tight_model, script.settle_micro_size

    def settle_in_little_memory(*arguments):
        BEGUN.append(1)
        if "HOST_MIB" in os.environ:
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            taken = psutil.Process().memory_info().vms
            room = taken + int(os.environ["HOST_MIB"]) * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (room, hard))
        try:
            return settle(*arguments)
        finally:
            if "HOST_MIB" in os.environ:
                resource.setrlimit(resource.RLIMIT_AS, (hard, hard))

    script.settle_micro_size = settle_in_little_memory
    runtime.run(script.main)


if __name__ == "__main__":
    main()
