"""What a launch would run, and the mistakes that only show where all processes are: ``--dry_run``.

It comes after everything that reads options, data and model has been done for real. The only files
that it writes are probes in the run folder, or in the nearest folder above it, and it removes them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import numpy
import torch
from torch import Tensor, nn

from trainlib import agreement, plan, shards
from trainlib.config import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trainlib.runtime import RunFolder

_CODE = Path(__file__).resolve().parent
_PROBE_SECONDS = 5.0  # in which a network folder shows what another machine has written


def stop_if_dry_run(
    options: Any, accelerator: Accelerator, folder: RunFolder, config: str, data_fingerprint: str,
    module: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int,
) -> None:
    """Where ``options.dry_run`` is set, prints what would run and ends the process.

    Args:
        options: a script's; ``dry_run``, ``batch``, ``optim`` and ``checkpoint`` are read.
        folder: of the run; it is not opened.
        config: the run's, as YAML.
        module: on its device, whole or cut, not prepared yet; its gradients are overwritten.
        optimizer: takes a step with gradients of 0, which makes its state.

    Raises:
        SystemExit: nothing is wrong; exit code 0.
        UserError: the mistakes, a line each.
    """
    if not options.dry_run:
        return
    device = accelerator.device
    is_offloaded = all(parameter.device.type != device.type for parameter in module.parameters())
    world = agreement.from_all(_describe_process(accelerator, is_offloaded), device)
    mistakes = [*_differences(world), *_probe_folder(folder.path, device)]
    steal_lock = options.checkpoint.steal_lock
    mistakes += folder.examine(accelerator, config, data_fingerprint, steal_lock)
    memory = _memory(options, accelerator, module, optimizer)
    mistakes += _misfits(world, agreement.from_all(memory, device))
    if accelerator.is_main_process:
        lines = [*_launch_lines(accelerator, world), *_batch_lines(options, accelerator),
                 f"steps       {total_steps}", f"run folder  {folder.path}",
                 *_memory_lines(memory, is_offloaded)]
        print("\n".join(["dry run: nothing is trained", *lines]), flush=True)
    if mistakes:
        raise UserError("\n".join(mistakes))
    raise SystemExit(0)


def _describe_process(accelerator: Accelerator, is_offloaded: bool) -> dict[str, Any]:
    """
    Args:
        is_offloaded: nothing that is counted lies on the device.
    """
    device = accelerator.device
    is_cuda = device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "device_bytes": torch.cuda.get_device_properties(device).total_memory
        if is_cuda and not is_offloaded else None,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "accelerate": accelerate.__version__, "numpy": numpy.__version__,
            "CUDA": torch.version.cuda, "code": _code_digest(),
            "precision": accelerator.mixed_precision,
        },
    }


def _code_digest() -> str:
    """Of the script and of ``trainlib``, short."""
    digest = hashlib.sha256()
    for file in [Path(sys.argv[0]), *sorted(_CODE.rglob("*.py"))]:
        with suppress(OSError):  # such as an interpreter without a script
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _differences(world: list[dict]) -> list[str]:
    """A line for each version that is not the same on all processes."""
    lines = []
    for name in world[0]["versions"]:
        found: dict[str, list[int]] = {}
        for rank, process in enumerate(world):
            found.setdefault(str(process["versions"][name]), []).append(rank)
        if len(found) > 1:
            parts = [f"{value} on {_processes(ranks)} ({world[ranks[0]]['host']})"
                     for value, ranks in found.items()]
            lines.append(f"{name} differs between processes: {', '.join(parts)}; give all machines "
                         "the same")
    return lines


def _processes(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"process {ranks[0]}"
    is_run = ranks[-1] - ranks[0] == len(ranks) - 1
    return "processes " + (f"{ranks[0]} to {ranks[-1]}" if is_run else ", ".join(map(str, ranks)))


def _probe_folder(run_dir: Path, device: torch.device) -> list[str]:
    """Lines for processes that cannot write to the run folder, or have another one.

    Each process writes a probe and looks for the main process's.
    """
    folder = run_dir.absolute()
    exists = [path.is_dir() for path in (folder, *folder.parents)]
    # As many levels up on all processes: where they lead to different places, that is to be seen.
    levels, token = agreement.from_main([exists.index(True), uuid.uuid4().hex], device)
    probe_folder = (folder, *folder.parents)[levels]
    rank = int(os.environ.get("RANK", "0"))
    probe = probe_folder / f".tmp_probe_{token}_{rank}"
    trouble = None
    try:
        try:
            probe.write_text(token)
        except OSError as error:
            trouble = f"cannot be written ({error.strerror})"
        trouble_of_main = agreement.from_all(trouble, device)[0]  # by now all have written
        of_main = probe_folder / f".tmp_probe_{token}_0"
        deadline = time.monotonic() + _PROBE_SECONDS
        while trouble is None and trouble_of_main is None and not of_main.exists():
            if time.monotonic() > deadline:
                trouble = "is not the folder that process 0 writes to"
            time.sleep(0.05)
        found = agreement.from_all([trouble, str(probe_folder), socket.gethostname()], device)
    finally:
        with suppress(OSError):
            probe.unlink()
    by_trouble: dict[str, list[int]] = {}
    for rank, (trouble, path, host) in enumerate(found):
        if trouble is not None:
            by_trouble.setdefault(f"{path} {trouble} ({host})", []).append(rank)
    return [f"run_dir: on {_processes(ranks)} {trouble}; choose a --run_dir that all machines see "
            "and may write to" for trouble, ranks in by_trouble.items()]


def _memory(
    options: Any, accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, int]:
    """Bytes that this process holds of what grows with the model; empty where there is no room."""
    world_size, batch = accelerator.num_processes, options.batch
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # the state of any optimizer is known when it is there
    except torch.OutOfMemoryError:
        for parameter in trained:
            parameter.grad = None  # the words with the other processes need some
        return {}
    gradients = sum(p.grad.nbytes for p in trained)
    state = sum(value.nbytes for slots in optimizer.state.values() for value in slots.values()
                if isinstance(value, Tensor))
    is_sharded = shards.is_sharded(module)  # whose tensors say the size of the whole
    parts = world_size if is_sharded else 1
    held = sum(p.nbytes for p in module.parameters())
    memory = {
        "parameters": held // parts, "gradients": gradients // parts,
        "optimizer state": state // parts,
        "buffers": sum(buffer.nbytes for buffer in module.buffers()),
    }
    is_exact = batch.exact_sum if batch.exact_sum is not None else accelerator.device.type == "cpu"
    micro_steps = -(-plan.num_micro_batches(batch.global_size, batch.micro_size) // world_size)
    if is_exact and not is_sharded and (world_size > 1 or micro_steps > 1):
        memory["exact sum"] = 8 * sum(p.numel() for p in trained)
    if world_size > 1 and not is_sharded:
        memory["DDP's buckets"] = gradients
    if options.optim.ema_half_life is not None:
        memory["averaged weights"] = held // parts
    return memory


def _misfits(world: list[dict], memories: list[dict[str, int]]) -> list[str]:
    """A line if what is counted does not fit on the device of each process."""
    small = [
        rank for rank, (process, memory) in enumerate(zip(world, memories, strict=True))
        if not memory or (process["device_bytes"] or float("inf")) < sum(memory.values())
    ]
    if not small:
        return []
    return [f"model: it does not fit on the device of {_processes(small)}, activations not "
            "counted; shard it (accelerate_configs/fsdp2.yaml) or take a smaller one"]


def _launch_lines(accelerator: Accelerator, world: list[dict]) -> list[str]:
    places: dict[tuple[str, str], list[int]] = {}
    for rank, process in enumerate(world):
        places.setdefault((process["host"], process["device"]), []).append(rank)
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    backend = torch.distributed.get_backend() if is_distributed else "none, one process"
    versions = ", ".join(f"{name} {value}" for name, value in world[0]["versions"].items()
                         if value is not None and name != "precision")
    num_machines = len({process["host"] for process in world})
    return [
        f"processes   {len(world)}, on {num_machines} machine{'s' * (num_machines > 1)}",
        *(f"            {_processes(ranks)}: {host}, {device}"
          for (host, device), ranks in places.items()),
        f"kind        {accelerator.distributed_type.value}", f"backend     {backend}",
        f"precision   {accelerator.mixed_precision}", f"versions    {versions}",
    ]


def _batch_lines(options: Any, accelerator: Accelerator) -> list[str]:
    batch, world_size = options.batch, accelerator.num_processes
    total = plan.num_micro_batches(batch.global_size, batch.micro_size)
    lines = [f"batch       {batch.global_size} samples a step, in {total} micro-batches of "
             f"{batch.micro_size}, {-(-total // world_size)} on each process"]
    idle = plan.idle_warning(batch.global_size, batch.micro_size, world_size)
    return lines if idle is None else [*lines, f"            {idle}"]


def _memory_lines(memory: dict[str, int], is_offloaded: bool) -> list[str]:
    if not memory:
        return ["memory      more than there is"]
    parts = ", ".join(f"{name} {_size(number)}" for name, number in memory.items() if number)
    where = "in host memory for each process" if is_offloaded else "on each process"
    return [f"memory      {_size(sum(memory.values()))} {where}: {parts}",
            "            not counted: activations, data kept in memory, libraries, fragmentation"]


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.2f} MiB"
