"""A rank's share of the training state, copied to host memory: all that training waits for while it is saved."""

from collections.abc import Mapping

import torch
from torch import Tensor

# Copies on the host, by kind of file and name. They are reused from one save to the next: new memory costs a page fault
# for every 4 KiB, pinned memory far more.
Buffers = dict[str, dict[str, Tensor]]


def take(shares: Mapping[str, Mapping[str, Tensor]], buffers: Buffers) -> None:
    """Copy tensors into `buffers`, which take the shares' names; done when this returns.

    Args:
        shares: by kind of file (weights, optimizer), this rank's tensors by name, on any device.
        buffers: those of an earlier snapshot, or empty. Reused where shape and dtype fit; pinned for tensors on a GPU.
    """
    for kind in buffers.keys() - shares.keys():
        del buffers[kind]
    streams = set()
    for kind, tensors in shares.items():
        copies = buffers.setdefault(kind, {})
        for name in copies.keys() - tensors.keys():
            del copies[name]
        for name, tensor in tensors.items():
            copy = copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = copies[name] = _host_tensor(tensor)
            copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            if tensor.is_cuda:
                streams.add(torch.cuda.current_stream(tensor.device))
    for stream in streams:
        stream.synchronize()


def _host_tensor(tensor: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the same shape and dtype in host memory."""
    if tensor.is_cuda:
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        except RuntimeError:  # the limit on locked memory (ulimit -l) is lower: slower copies, but copies
            pass
    return torch.empty(tensor.shape, dtype=tensor.dtype)
