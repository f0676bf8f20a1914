"""The Accelerator's set-up and refusals, the seeding of its device, and a description of all that.

What can go wrong before a run starts is refused here in one line each, because Accelerate lets
each of these pass in silence and trains something else than was asked for.
"""

import ctypes
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import accelerate
import torch
import torch.distributed
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from trainlib import shards
from trainlib.config import UserError
from trainlib.credentials import redact
from trainlib.runtime.watchdog import CommunicationOptions
from trainlib.schedule import clock_seconds

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, malloc.h


def make_accelerator(
    deterministic: bool, cpu_threads: int, comm: CommunicationOptions | None = None
) -> Accelerator:
    """The Accelerator, after the refusals.

    Args:
        deterministic: only algorithms that give the same bits each time; on a GPU slower.
        cpu_threads: of this process, whatever the launcher set.
        comm: how long collectives may take, until ``watch`` sets that.

    Raises:
        UserError: a launch that Accelerate would carry out as something else.
    """
    start_seconds = clock_seconds((comm or CommunicationOptions()).start_timeout)
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {accumulation}, which would divide every "
            "gradient again: unset it (or gradient_accumulation_steps in the accelerate config); "
            "accumulation follows from batch.global_size and batch.micro_size"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "DeepSpeed divides and accumulates gradients its own way, so the curve would change: "
            "use a config without it, such as accelerate_configs/multi_gpu.yaml, or for models "
            "larger than a GPU FSDP2 (distributed_type: FSDP with fsdp_version: 2)"
        )
    for variable, what in (("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
                           ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism_config")):
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(f"{what} is not supported; to shard a model over all processes set "
                            "distributed_type: FSDP and fsdp_version: 2 in the accelerate config")
    if shards.is_asked():
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("FSDP1 is not supported; set fsdp_version: 2 in the accelerate config "
                            "(accelerate to-fsdp2 converts a config)")
        # For transformers, which would leave the weights of all processes but one empty: here
        # each builds the whole model, and FSDP2 cuts it.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    # What torch 2.13 calls otherwise, but Accelerate 1.15 does not know by its new name.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=1,
            # Buffers are the same everywhere by construction; broadcasting would cost a message.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(seconds=start_seconds)),
            ],
        )
    except ValueError as error:  # such as fp8 without its packages, bf16 without support
        raise UserError(f"Accelerate refuses this launch: {error}") from error
    torch.set_num_threads(cpu_threads)  # after Accelerate, which sets a number of its own
    if accelerator.device.type == "cpu":
        _keep_freed_memory()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched, but each sees {accelerator.num_processes}, so "
            "they would train separately and overwrite each other: this machine has no GPU for "
            "that config; for several CPU processes set ACCELERATE_USE_CPU=true"
        )
    if shards.is_asked() and not torch.distributed.is_initialized():
        raise UserError("FSDP2 needs processes that know of each other, be it one: start them with "
                        "accelerate launch or torchrun")
    if shards.is_asked() and accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(f"mixed_precision {accelerator.mixed_precision} does not go with FSDP2; "
                        "set it to bf16 or 'no'")
    if accelerator.mixed_precision.lower() == "fp16" and accelerator.scaler is None:
        raise UserError(
            f"mixed_precision fp16 needs a GPU; on {accelerator.device.type} Accelerate would "
            "train in fp32 without a word: set mixed_precision to bf16 or 'no'"
        )
    return accelerator


def _keep_freed_memory() -> None:
    """Has glibc keep what is freed, up to 32 MiB a block, instead of giving it back to the system.

    A step frees its activations and takes them again: each time thousands of pages were faulted in
    anew, a fifth of the time of a ResNet's step (benchmarks/README.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that it takes
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def make_seeder(device: torch.device) -> Callable[[int], object]:
    """A function that seeds the generators a forward draws from.

    It seeds the device's own generator and the CPU's; ``torch.manual_seed`` seeds every device
    there is and costs 50 times as much.
    """
    if device.type == "cuda":
        generators = [torch.cuda.default_generators[device.index or 0], torch.default_generator]
        return lambda seed: [generator.manual_seed(seed) for generator in generators]
    if device.type == "cpu":
        return torch.default_generator.manual_seed
    return torch.manual_seed


def describe_machine(accelerator: Accelerator) -> dict:
    """Command, code, versions and devices of a run, for ``environment.json``."""
    folder = Path(__file__).resolve().parents[2]
    try:
        command = ["git", "rev-parse", "HEAD"]
        git = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        git = ""
    device = accelerator.device
    return {
        "command": [Path(sys.argv[0]).name, *map(redact, sys.argv[1:])],
        "git_commit": git or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "world_size": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def now() -> str:
    """The time in UTC, as ISO 8601 has it, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
