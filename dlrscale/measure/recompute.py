"""Knowing when activation checkpointing runs a part of the forward again during backward.

`torch.utils.checkpoint` (non-reentrant) puts saved-tensor hooks of its own on top of all others while it runs a
segment again, so hooks from outside see nothing of it. Here its hooks tell, while a context is open and not longer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import _recomputation_hook


def _nothing(*args: object) -> None:
    pass


@contextlib.contextmanager
def watched(
    *,
    entered: Callable[[], None] = _nothing,
    left: Callable[[], None] = _nothing,
    saved: Callable[[torch.Tensor], None] = _nothing,
) -> Iterator[None]:
    """Call back on every recomputation while inside; on any thread, since CUDA's backward has one of its own.

    Args:
        entered: Called before a segment runs again; nested segments are one.
        left: Called after it.
        saved: Called with every tensor that the segment saves for backward.
    """
    enter, leave = saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__
    depth = 0

    def enter_and_tell(hooks: saved_tensors_hooks) -> None:
        nonlocal depth
        if isinstance(hooks, _recomputation_hook):
            depth += 1
            if depth == 1:
                entered()
            own = hooks.pack_hook

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                saved(tensor)
                return own(tensor)

            hooks.pack_hook = pack
        return enter(hooks)

    def leave_and_tell(hooks: saved_tensors_hooks, *error: object) -> None:
        nonlocal depth
        leave(hooks, *error)
        if isinstance(hooks, _recomputation_hook):
            depth -= 1
            if depth == 0:
                left()

    saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__ = enter_and_tell, leave_and_tell
    try:
        yield
    finally:
        saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__ = enter, leave
