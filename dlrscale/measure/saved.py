"""Bytes saved for backward: their sum, their peak over time, and the modules that saved them."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import nn

from dlrscale.measure import recompute


class SavedBytes:
    """Count the bytes that autograd saves for backward, once per storage, without parameters and buffers.

    A storage is watched by a weak reference: while it lives it counts once, and when it dies it is no longer alive, so
    that a freed address that is used again counts again. Weights that ZeRO-3 gathers for a moment are known through
    the modules that are running.

    Inside `with` there may be a forward alone, or a forward and its backward: only then does the peak hold what
    activation checkpointing computes again. `total` is what forward saved; `recomputed` what checkpointing saved again
    during backward, summed over its segments; `alive` the bytes of either kind whose storage lives now; `peak` its
    highest value. `by_module` and `recomputed_by_module` give the share of each innermost running module by its path
    ("" is the model itself; a checkpoint's inputs count to the module that calls the checkpointed one); `by_part`
    gives the share of `total` of each module of `parts` with all that runs inside it.

    Args:
        model: The model whose parameters and buffers do not count.
        parts: Modules by label, whose share is counted in `by_part`.
        storage: What keeps saved tensors in another way, if anything does (attacks/stored.py): it has hooks of its own,
            and calls `saved` with what stays on the device.
    """

    def __init__(self, model: nn.Module, parts: dict[str, nn.Module] | None = None, storage: Any = None):
        self.storage = storage
        self.model = model
        self.labels = {id(module): label for label, module in (parts or {}).items()}
        self.total = self.recomputed = self.alive = self.peak = 0
        self.by_part: dict[str, int] = dict.fromkeys(parts or {}, 0)
        self.by_module: dict[str, int] = {}
        self.recomputed_by_module: dict[str, int] = {}
        self._held: dict[int, weakref.ref] = {}
        self._running: list[tuple[set[int], str | None, str]] = []
        self._paths = {id(module): path for path, module in model.named_modules()}
        tensors = [*model.parameters(), *model.buffers()]
        # ZeRO-3 gives its parameters a `ds_id` and an empty or passing storage: these are found while running.
        self._static = {_key(t) for t in tensors if t.numel() and not hasattr(t, "ds_id")}

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        own = {_key(p) for p in module.parameters(recurse=False)}
        self._running.append((own, self.labels.get(id(module)), self._paths[id(module)]))

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def _watch(self, tensor: torch.Tensor) -> int:
        """Count a saved tensor's storage as alive; its bytes, 0 where it is a weight or counts already."""
        key = _key(tensor)
        base = tensor._base if tensor._base is not None else tensor
        static = key in self._static or isinstance(base, nn.Parameter) or any(key in own for own, *_ in self._running)
        if static or key in self._held:
            return 0
        storage = tensor.untyped_storage()
        size = storage.nbytes()

        def died(_: weakref.ref) -> None:
            del self._held[key]
            self.alive -= size

        self._held[key] = weakref.ref(storage, died)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        return size

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        size = self._watch(tensor)
        if size:
            self.total += size
            path = self._running[-1][2] if self._running else ""
            self.by_module[path] = self.by_module.get(path, 0) + size
            for label in {label for _, label, _ in self._running if label is not None}:
                self.by_part[label] += size
        # An operation's own output would hold itself: its graph could not die without a backward.
        return tensor if isinstance(tensor, nn.Parameter) else tensor.detach()

    def _see_again(self, tensor: torch.Tensor) -> None:
        size = self._watch(tensor)
        if size:
            self.recomputed += size
            path = self._running[-1][2] if self._running else ""
            self.recomputed_by_module[path] = self.recomputed_by_module.get(path, 0) + size

    def __enter__(self) -> SavedBytes:
        self._open = contextlib.ExitStack()
        for module in self.model.modules():
            for handle in (
                module.register_forward_pre_hook(self._enter_module),
                module.register_forward_hook(self._leave_module, always_call=True),
            ):
                self._open.callback(handle.remove)
        self._open.enter_context(recompute.watched(saved=self._see_again))
        self._forward = contextlib.ExitStack()
        self._forward.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor))
        if self.storage is not None:
            before, self.storage.saved = self.storage.saved, self._pack
            self._forward.callback(setattr, self.storage, "saved", before)
        return self

    def forward_done(self) -> None:
        """Count as forward what was saved so far, and nothing that is done with the loss before backward."""
        self._forward.close()

    @property
    def on_host_bytes(self) -> int | None:
        """What the storage has put into host memory in the forward that ran last; None where it puts nothing there."""
        return self.storage.bytes if self.storage is not None and self.storage.on_host else None

    def __exit__(self, *error: Any) -> None:
        self._forward.close()
        self._open.close()
        self._held.clear()


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
