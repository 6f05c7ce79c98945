"""The lever `--activation-storage host`: what the layers keep for backward goes to host memory and comes back.

Every saved storage is copied once, whole, however many views of it are saved; parameters stay. So as many bytes go to
the host as plain autograd saves on the device: without checkpointing all that the layers save (`act-offload`), with it
their inputs (`ckpt-offload`). torch's own `save_on_cpu` copies every view, and the weights with them. Copies are queued
behind the work that made the tensor, on the same stream, into pinned memory.

Source: ZeRO-Infinity, arXiv 2104.07857; torch.autograd.graph.saved_tensors_hooks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dlrscale.attacks.stored import Stored


@dataclass(frozen=True)
class OnHost:
    """A tensor whose storage lies in host memory."""

    host: torch.Tensor
    device: torch.device
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Storage(Stored):
    """Keeps whole storages in host memory; see `Stored`."""

    def __init__(self, model: nn.Module, attention: list[nn.Module]):
        super().__init__(model, attention)
        self.on_host = True

    def key(self, tensor: torch.Tensor) -> None:
        """One for all views of a storage."""

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The bytes of the tensor's whole storage, on the host."""
        storage = tensor.untyped_storage()
        here = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=tensor.is_cuda)
        host.copy_(here, non_blocking=True)
        self.bytes += storage.nbytes()
        return host

    def view(self, kept: torch.Tensor, tensor: torch.Tensor) -> OnHost:
        """What of the storage a tensor is."""
        return OnHost(kept, tensor.device, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def give(self, kept: OnHost) -> torch.Tensor:
        """The tensor on its device again."""
        there = kept.host.to(kept.device, non_blocking=True)
        return torch.empty(0, dtype=kept.dtype, device=kept.device).set_(
            there.untyped_storage(), kept.offset, kept.size, kept.stride
        )
