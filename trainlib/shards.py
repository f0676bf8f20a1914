"""What FSDP2 has cut over the processes, and what is whole: tensors, modules, the way between.

Every function takes whole tensors and modules, too, and leaves them as they are, without importing
anything of FSDP2.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_asked() -> bool:
    """Whether the accelerate config asks for a sharded model."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds the module: every forward then needs all processes."""
    return hasattr(module, "set_requires_gradient_sync")


def holds_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds the module or any inside it."""
    return any(is_sharded(part) for part in module.modules())


def is_part(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This process's part, in the tensor's own memory."""
    return tensor.to_local() if is_part(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All parts together, on every process, which all have to call this."""
    if not is_part(tensor):
        return tensor
    device = tensor.device_mesh.device_type
    if tensor.device.type != device:  # offloaded to the host, where the processes do not meet
        tensor = tensor.to(device)
    return tensor.full_tensor()


def cut(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, cut as another one is, without a word between the processes."""
    if not is_part(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Writes whole values into a tensor that may be cut."""
    local(tensor).copy_(local(cut(values, tensor)))


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """``module.load_state_dict`` of whole tensors, into a module that may be cut."""
    if not is_sharded(module):
        module.load_state_dict(tensors)
        return
    for name, tensor in module.state_dict(keep_vars=True).items():
        fill(tensor, tensors[name])


def gathered(tensors: Mapping[str, Tensor], keeps: bool) -> dict[str, Tensor]:
    """Whole tensors by name, in host memory where they were cut; all processes have to call this.

    Args:
        keeps: whether this process wants them; the others get none.
    """
    found = {}
    for name, tensor in tensors.items():
        complete = whole(tensor.detach())
        if keeps:
            found[name] = complete.cpu() if is_part(tensor) else complete
    return found


def reshard(module: nn.Module) -> None:
    """Lets go of whole parameters that a forward without backward has left, and that would be
    taken for the current ones in the next forward, whatever has become of the parts."""
    if is_sharded(module):
        for part in module.modules():
            if is_sharded(part):
                part.reshard()


@contextmanager
def unsynced(module: Any) -> Iterator[None]:
    """Within it gradients stay with the process, whole, until a backward outside of it."""
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def fills_unused(module: nn.Module) -> bool:
    """Whether this torch can sum gradients of parameters that only some processes used."""
    return hasattr(module, "set_reduce_scatter_unused_params")


class Reached:
    """Names of the parameters of a cut module that a gradient reached on this process.

    FSDP2's own gradients do not tell: they are sums over the processes, 0 where nobody had one.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]):
        """
        Args:
            names: of the trainable parameters, as ``named_parameters`` has them.
        """
        self.names: set[str] = set()
        self.counts = True
        """Whether the present micro-batch is to be noted; not if it is a repetition."""
        self._wanted = set(names)
        for prefix, part in module.named_modules():
            if is_sharded(part):
                self._watch(prefix, part)

    def _watch(self, prefix: str, part: nn.Module) -> None:
        # In the first forward, after FSDP2's own hook: it gathers the whole parameters, which
        # stay the same objects from then on.
        @torch.compiler.disable
        def hook(module: nn.Module, args: Any) -> None:
            for name, parameter in module.named_parameters(prefix):
                if name in self._wanted and not is_part(parameter):
                    parameter.register_post_accumulate_grad_hook(self._noting(name))
            handle.remove()

        handle = part.register_forward_pre_hook(hook)

    def _noting(self, name: str) -> Any:
        def note(parameter: Tensor) -> None:
            if self.counts:
                self.names.add(name)

        return note
