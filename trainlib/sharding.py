"""FSDP2: a model whose parameters, gradients and optimizer state are cut over the processes.

It is switched on by the accelerate config (``fsdp_version: 2``), which reaches every process as
environment variables. Accelerate reads them on GPUs only and passes over them on CPUs, and its own
way there takes wrong turns that it does not mention (activations recomputed with other dropout,
optimizers that keep state from the start, gradients reduced in bf16). So they are read here, and
torch's ``fully_shard`` is called here: on CPU processes over gloo the tests run what GPUs run.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial, wraps
from itertools import chain
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from trainlib import shards
from trainlib.config import UserError, nearest


def place(module: nn.Module, accelerator: Accelerator, sync_batch_norm: bool) -> list[str]:
    """Puts a module on its device: whole, or cut by FSDP2 if the accelerate config says so.

    Args:
        module: on the CPU; every process has the same.
        sync_batch_norm: let its BatchNorms share the statistics of all processes.

    Returns:
        Lines for the log.

    Raises:
        UserError: a setting of FSDP that is not for this model or not for these scripts, or
            BatchNorms that cannot share.
    """
    notes = _sync_batch_norm(module, accelerator) if sync_batch_norm else []
    if not shards.is_asked():
        module.to(accelerator.device)
        return notes
    return [*notes, _cut(module, accelerator)]


def _cut(module: nn.Module, accelerator: Accelerator) -> str:
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    try:
        plugin = FullyShardedDataParallelPlugin()  # as the environment describes it
    except (ValueError, KeyError) as error:
        raise UserError(f"fsdp_config: {error}") from error
    for setting in ("ignored_modules", "activation_checkpointing_offload"):
        if getattr(plugin, setting):
            raise UserError(f"fsdp_{setting}: is not supported; leave it out of the accelerate "
                            "config")
    blocks = _blocks(module, plugin)
    if plugin.activation_checkpointing:
        if not blocks:
            raise UserError("fsdp_activation_checkpointing: the model has no repeated blocks; name "
                            "their class as fsdp_transformer_layer_cls_to_wrap, or set it to false")
        for block in blocks:
            # Within the block, so that it stays one unit of FSDP2 and keeps its name; with the
            # random state of the first time, so that dropout drops the same.
            block.forward = wraps(block.forward)(partial(_recomputed, block.forward))
    device = accelerator.device
    offloads = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    settings = {"mesh": init_device_mesh(device.type, (accelerator.num_processes,))}
    if offloads:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    in_bf16 = accelerator.mixed_precision == "bf16"
    policy = partial(MixedPrecisionPolicy, cast_forward_inputs=False)
    if in_bf16:
        # Gathered in half the bytes; summed over the processes in fp32. Autocast does the rest, as
        # it does without FSDP2: inputs, positions and losses stay in fp32.
        policy = partial(policy, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        _compute_under_autocast(module, accelerator)
    # Before FSDP2's own hook, which would be added to a parameter anew in every forward.
    module.register_forward_hook(_without_parameters)
    # True of the logits of many nets, and nothing here writes into them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    _start_alike(module, device)
    for parameter in module.parameters():  # channels_last, say, which FSDP2 cannot cut
        parameter.data = parameter.data.contiguous()
    num_parameters = sum(p.numel() for p in module.parameters())
    kinds = Counter(type(block).__name__ for block in blocks)
    if in_bf16:  # whose statistics and scales stay in fp32 under autocast, too
        for part in module.modules():
            if isinstance(part, _BatchNorm) and any(True for _ in part.parameters()):
                full = MixedPrecisionPolicy(cast_forward_inputs=False)
                fully_shard(part, mp_policy=full, **settings)
    for block in blocks:
        fully_shard(block, mp_policy=policy(), **settings,
                    reshard_after_forward=plugin.reshard_after_forward)
    fully_shard(module, mp_policy=policy(output_dtype=torch.float32 if in_bf16 else None),
                **settings)
    if shards.fills_unused(module):
        # Or torch adds one process's gradient of one parameter to another's of the next, where
        # the processes used different ones. For all units at once.
        module.set_reduce_scatter_unused_params(True)
    here = sum(shards.local(p).numel() for p in module.parameters())
    units = " and ".join(f"{number} x {kind}" for kind, number in kinds.items()) or "no blocks"
    extras = [text for is_on, text in (
        (in_bf16, "bf16"), (offloads, "offloaded to the host"),
        (plugin.activation_checkpointing, "activations of blocks recomputed"),
    ) if is_on]
    return (f"FSDP2 over {accelerator.num_processes} processes: {units}, and the rest; {here:,} of "
            f"{num_parameters:,} parameters here{''.join(f', {text}' for text in extras)}")


def _sync_batch_norm(module: nn.Module, accelerator: Accelerator) -> list[str]:
    found = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    if not found:
        raise UserError("model.sync_batch_norm: the net has no BatchNorm; leave it out")
    if accelerator.num_processes == 1:
        return []  # it has all statistics already
    if accelerator.device.type != "cuda":
        raise UserError("model.sync_batch_norm: torch synchronises BatchNorm on GPUs only; leave "
                        "it out, or raise batch.micro_size")
    for part in found:
        if type(part) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise UserError(f"model.sync_batch_norm: {type(part).__name__} does more than torch's "
                            "BatchNorm, which would be lost; leave the option out")
        # As torch's own conversion, but in place, so that hooks stay.
        part.__class__, part.process_group = nn.SyncBatchNorm, None
    return [f"{len(found)} BatchNorms share their statistics over {accelerator.num_processes} "
            "processes: the curve depends on that number"]


def prepare(
    accelerator: Accelerator, module: nn.Module, optimizer: Optimizer
) -> tuple[nn.Module, nn.Module, Optimizer]:
    """``accelerator.prepare``, but for a model that has been cut, which is prepared already.

    Returns:
        The model to call in a step, the module inside any wrapper, and the optimizer itself: its
        wrapper costs a fifth of a small step and hides the scaler.
    """
    if shards.is_sharded(module):
        return module, module, optimizer
    model, prepared = accelerator.prepare(module, optimizer)
    return model, accelerator.unwrap_model(model, keep_torch_compile=False), prepared.optimizer


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The children of one class that repeat in a ``ModuleList``, ``ModuleDict`` or ``Sequential``.

    The outermost ones; containers themselves are looked into.
    """
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    repeated: set[type] = set()
    if isinstance(module, containers):
        numbers = Counter(type(child) for child in children)
        repeated = {kind for kind, number in numbers.items() if number > 1}
    found: list[nn.Module] = []
    for child in children:
        is_block = type(child) in repeated and type(child) not in containers
        found += [child] if is_block else repeated_blocks(child)
    return found


def _blocks(module: nn.Module, plugin: Any) -> list[nn.Module]:
    """The modules that are gathered one after the other: found, or named in the config."""
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper()
    names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    if names and policy in ("", "TRANSFORMER_BASED_WRAP"):
        wanted = [name.strip() for name in names.split(",")]
        classes = {type(part).__name__ for part in module.modules()}
        for name in wanted:
            if name not in classes:
                raise UserError(f"fsdp_transformer_layer_cls_to_wrap: the model has no {name!r}"
                                f"{nearest(name, classes)}")
        found = _outermost(module, lambda part: type(part).__name__ in wanted)
    elif policy == "NO_WRAP":
        found = []
    elif policy == "SIZE_BASED_WRAP":
        least = plugin.min_num_params or 0
        found = _outermost(module, lambda part: least < sum(p.numel() for p in part.parameters())
                           and not any(least < sum(p.numel() for p in child.parameters())
                                       for child in part.children()))
    else:
        found = repeated_blocks(module)
    # What is tied to something outside is gathered with it, by the whole module.
    uses = Counter(id(p) for part in module.modules() for p in part._parameters.values()
                   if p is not None)
    return [block for block in dict.fromkeys(found) if block is not module and all(
        number == uses[key] for key, number in Counter(
            id(p) for part in block.modules() for p in part._parameters.values() if p is not None
        ).items())]


def _start_alike(module: nn.Module, device: torch.device) -> None:
    """Gives all processes the main one's tensors, as DDP does: a net may draw its weights from a
    generator of its own."""
    for tensor in chain(module.parameters(), module.buffers()):
        content = tensor.detach().to(device, copy=True).reshape(-1)
        torch.distributed.broadcast(content.view(torch.uint8), 0)
        tensor.data.copy_(content.view(tensor.shape))


def _outermost(module: nn.Module, is_wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    return [block for child in module.children()
            for block in ([child] if is_wanted(child) else _outermost(child, is_wanted))]


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _compute_under_autocast(module: nn.Module, accelerator: Accelerator) -> None:
    forward = module.forward

    @wraps(forward)  # its signature is looked at
    def under_autocast(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    module.forward = under_autocast


def _without_parameters(module: nn.Module, args: Iterable[Any], output: Any) -> Any:
    if not isinstance(output, dict):
        return None
    for name, value in output.items():
        if isinstance(value, nn.Parameter):
            output[name] = value.view_as(value)
    return output
