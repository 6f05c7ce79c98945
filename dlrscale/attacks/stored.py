"""What the levers of `--activation-storage` share: saved tensors kept in another way, each storage or view once."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


class Stored:
    """A context for a forward pass in which tensors saved for backward are kept as `keep` says.

    Parameters and the model's buffers, which are there anyway, stay. `bytes` counts what was kept in that way since the
    context was last entered. `saved`, where set, is called with every tensor that stays on the device after all,
    whether as autograd has it or in a smaller form; it returns what to keep. `on_host`: what it keeps is there.

    Args:
        model: The model.
        attention: The modules in which attention's linear maps lie.
    """

    def __init__(self, model: nn.Module, attention: list[nn.Module]):
        self.model = model
        self.bytes = 0
        self.on_host = False
        self.saved: Callable[[torch.Tensor], torch.Tensor] = _detached
        self._known: dict[Hashable, Any] = {}
        self._alive: dict[int, weakref.ref] = {}
        self.attention = attention

    @abstractmethod
    def keep(self, tensor: torch.Tensor) -> Any:
        """Another form of a tensor for `give`; None: it stays as it is."""

    @abstractmethod
    def give(self, kept: Any) -> torch.Tensor:
        """The tensor again."""

    @abstractmethod
    def key(self, tensor: torch.Tensor) -> Hashable:
        """What of a storage is kept at once."""

    def _pack(self, tensor: torch.Tensor) -> Any:
        base = tensor._base if tensor._base is not None else tensor
        if isinstance(base, nn.Parameter):
            return tensor
        if tensor.dim() == 0:  # a coupling b: a buffer
            return self.saved(tensor)
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._buffers:
            return tensor
        key = (address, tensor._version, self.key(tensor))
        if key in self._known:
            kept = self._known[key]
        else:
            kept = self._known[key] = self.keep(tensor)
            if address not in self._alive:  # an address is used again when its storage has died
                self._alive[address] = weakref.ref(storage, lambda _: self._forget(address))
        return self.saved(tensor) if kept is None else self.view(kept, tensor)

    def view(self, kept: Any, tensor: torch.Tensor) -> Any:
        """What `give` gets for one tensor among those of a key."""
        return kept

    def _forget(self, address: int) -> None:
        self._alive.pop(address, None)
        for key in [key for key in self._known if key[0] == address]:
            del self._known[key]

    def _unpack(self, kept: Any) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else self.give(kept)

    def __enter__(self) -> Stored:
        self.bytes = 0
        self._buffers = {buffer.untyped_storage()._cdata for buffer in self.model.buffers()}
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """An operation's own output would hold itself: its graph could not die without a backward."""
    return tensor.detach()
