"""Live bytes of all tensors per phase, exactly, also on a CPU where no allocator counts.

PyTorch's MemTracker counts in a dispatch mode, by weak references on storages. That part of it is used here. The
other parts are left out because a DeepSpeed engine does not fit them: it tracks modules by hooks that refuse a
second forward in one step (accumulation) and expect whole parameters with gradients of their own (ZeRO partitions
both), and optimizers by torch's own hook (DeepSpeed's wrappers step inner optimizers, or none).
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.utils._python_dispatch import TorchDispatchMode

TOTAL = "Total"


class LiveBytes(MemTracker):
    """Bytes of every storage that lives, and their peak per phase; each operator is some times slower inside.

    Memory that an operator takes inside itself and gives back is not seen, nor a tensor that no operator has made and
    `held` does not hold. A tensor on the host and one on the device count together.

    Args:
        held: Tensors that lived before; None: all that Python knows of.
    """

    def __init__(self, held: Iterable[torch.Tensor] | None = None):
        super().__init__()
        self._fake_mode_on_entry = None
        self.peaks: dict[str, int] = {}
        for tensor in all_tensors() if held is None else held:
            self._track(_MemRefType.OTH, tensor)

    @property
    def now(self) -> int:
        """Bytes that live now."""
        return sum(snapshot[TOTAL] for snapshot in self._curr_mem_snap.values())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Take the peak of what runs inside as part of a phase; of one that comes again the highest."""
        self._peak = self.now
        try:
            yield
        finally:
            self.peaks[name] = max(self.peaks.get(name, 0), self._peak)

    def _update_peak_stats(self, peak_state: object) -> None:
        self._peak = max(self._peak, self.now)

    def __enter__(self) -> LiveBytes:
        self._peak = self.now
        self._track_resize()  # ZeRO-3 frees a gathered parameter by resizing its storage
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *error: object) -> None:
        TorchDispatchMode.__exit__(self, *error)
        self._restore_resize()


def all_tensors() -> list[torch.Tensor]:
    """Every tensor with memory that Python knows of, gradients too."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of objects that warn when they are looked at
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and thing.layout is torch.strided and thing.device.type != "meta":
                found += [t for t in (thing, thing.grad if thing.is_leaf else None) if t is not None]
    return found
