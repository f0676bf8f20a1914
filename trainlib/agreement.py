"""What all processes have to know or to agree on before they train together.

Plain values travel as JSON and tensors as they are, so nothing that arrives is unpickled. On one
process every function is free of communication.
"""

import hashlib
import json
from typing import Any

import torch
import torch.distributed
from torch import Tensor


def _is_alone() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1


def from_main(value: Any, device: torch.device) -> Any:
    """The main process's JSON value, on every process; what the others give is not looked at."""
    if _is_alone():
        return value
    is_main = torch.distributed.get_rank() == 0
    text = json.dumps(value).encode() if is_main else b""
    size = torch.tensor([len(text)], device=device)
    torch.distributed.broadcast(size, 0)
    if is_main:
        content = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    else:
        content = torch.empty(int(size), dtype=torch.uint8, device=device)
    torch.distributed.broadcast(content, 0)
    return json.loads(content.cpu().numpy().tobytes())


def from_all(value: Any, device: torch.device) -> list[Any]:
    """Every process's JSON value, in the order of the processes, on every process."""
    if _is_alone():
        return [value]
    text = bytearray(json.dumps(value).encode())
    size = torch.tensor([len(text)], device=device)
    sizes = [torch.empty_like(size) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(sizes, size)
    content = torch.zeros(int(max(sizes)), dtype=torch.uint8)
    content[: len(text)] = torch.frombuffer(text, dtype=torch.uint8)
    content = content.to(device)
    contents = [torch.empty_like(content) for _ in sizes]
    torch.distributed.all_gather(contents, content)
    return [json.loads(content[: int(size)].cpu().numpy().tobytes())
            for content, size in zip(contents, sizes, strict=True)]


def tensor_from_main(
    tensor: Tensor | None, dtype: str, shape: list[int], device: torch.device
) -> Tensor:
    """The main process's tensor, on every process and on its device.

    Args:
        tensor: given by the main process.
        dtype: as in ``str(tensor.dtype)``, without ``torch.``.
    """
    if tensor is None:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
    tensor = tensor.to(device, copy=True)  # a tensor of a file would keep the file open
    if not _is_alone():
        torch.distributed.broadcast(tensor, 0)
    return tensor


def is_same_everywhere(text: str, device: torch.device) -> bool:
    """Whether every process gives the same text."""
    if _is_alone():
        return True
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
    # Of the number and of its negative, the largest: one message for both ends of the range.
    ends = torch.tensor([digest, -digest], device=device)
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
    return bool(ends[0] == -ends[1])
