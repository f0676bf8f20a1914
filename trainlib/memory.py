"""What running out of memory looks like, and what to do about it."""

import re
from collections.abc import Mapping
from typing import Any

import torch

# As torch, its CPU allocator and CUDA's libraries say it in errors without a type of their own.
_SAID = re.compile(
    r"out of memory|DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|CU(BLAS|DNN|SPARSE|SOLVER|FFT)_STATUS_ALLOC_FAILED", re.IGNORECASE,
)
_KILLED = re.compile(r"DataLoader worker \(pid (\d+)\) is killed by signal: Killed")
_OF_THE_HOST = "DefaultCPUAllocator"
ended_on_purpose: set[int] = set()
"""Process ids of data workers that this process has killed itself."""
SHARD = "cut the model over the processes (accelerate_configs/fsdp2.yaml)"


class OutOfMemory(Exception):
    """There is too little memory for this run."""

    exit_code = 6


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's or the machine's memory is full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        _SAID.search(str(error)) is not None or _is_of_a_worker(error) and "MemoryError" in
        _last_line(error) or _is_killed_worker(error))


def advised(
    error: BaseException, recipe: Mapping[str, Any], phase: str = ""
) -> BaseException:
    """The error, or in place of one of memory ``OutOfMemory`` with what to set to which value.

    Args:
        recipe: the run's options by dotted name; empty where it has not begun.
        phase: of the run, as the watchdog names it; empty where it is not known.
    """
    if not is_out_of_memory(error):
        return error
    if phase == "end":
        return OutOfMemory(
            f"{in_one_line(error)}; all steps are done, and what is missing is made from the "
            "weights: run the same command again with --log.report false, or "
            "on a device with more memory")
    if _is_killed_worker(error):
        return OutOfMemory("a data worker was killed, which is what a machine does whose memory is "
                           "full, unless somebody has ended it; "
                           + _in_the_host(recipe, "if it was memory, "))
    if isinstance(error, MemoryError) or _is_of_a_worker(error):
        what = in_one_line(error)
        what = "" if not what or what.endswith("MemoryError") else f" ({what})"
        where = " in a data worker" if _is_of_a_worker(error) else ""
        return OutOfMemory(f"the machine's memory is full{where}{what}; {_in_the_host(recipe)}")
    size, eval_size = recipe.get("batch.micro_size"), recipe.get("batch.eval_size")
    ways = []
    if phase == "evaluation" and isinstance(eval_size, int) and eval_size > 1:
        return OutOfMemory(f"{in_one_line(error)}; it was in an evaluation: begin a run in another "
                           f"--run_dir with --batch.eval_size {eval_size // 2} (now {eval_size})")
    if not isinstance(size, int):
        ways.append("a smaller --batch.micro_size")
    elif size > 1:
        ways.append(f"--batch.micro_size {size // 2} (now {size}; with dropout, augmentation or "
                    "BatchNorm another one is another curve)")
    if not recipe.get("model.gradient_checkpointing"):
        ways.append("--model.gradient_checkpointing, where the net has it")
    advice = [f"begin a run in another --run_dir with {' or '.join(ways)}"] if ways else []
    what = in_one_line(error)
    if _OF_THE_HOST in str(error):
        what = f"the machine's memory is full ({what[-160:]})"
        advice.append("take fewer processes on a machine")
    else:
        advice.append(SHARD)
    return OutOfMemory(f"{what or 'out of memory'}; {', or '.join(advice)}")


def _in_the_host(recipe: Mapping[str, Any], condition: str = "") -> str:
    """What takes less of the machine's memory and changes no weight: the same run goes on."""
    ways, workers = [], recipe.get("data.workers")
    if recipe.get("data.in_memory") is not False:
        ways.append("--data.in_memory false")
    if not isinstance(workers, int):
        ways.append("fewer --data.workers")
    elif workers > 0:
        ways.append(f"--data.workers {workers // 2} (now {workers})")
    ways = [f"run the same command again with {' and '.join(ways)}"] if ways else []
    return condition + ", or ".join([*ways, "take fewer processes on a machine"])


def _is_of_a_worker(error: BaseException) -> bool:
    """Whether torch has brought it from a data worker, with the worker's traceback as its text."""
    return "in DataLoader worker process" in str(error).partition("\n")[0]


def _is_killed_worker(error: BaseException) -> bool:
    """Whether a data worker has met SIGKILL, in whichever of torch's two ways it is told."""
    found = _KILLED.search(f"{error}\n{error.__cause__}")
    return (isinstance(error, RuntimeError) and found is not None
            and int(found[1]) not in ended_on_purpose)


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2]


def in_one_line(error: BaseException) -> str:
    """What it tried; behind that follow lines about the allocator."""
    text = _last_line(error) if _is_of_a_worker(error) else str(error).strip().partition("\n")[0]
    return ". ".join(text.split(". ")[:2]).strip().rstrip(".")
