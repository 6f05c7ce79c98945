"""Cheaper starts: what the slow imports of a command, of DeepSpeed's launcher and of a rank need not do."""

from __future__ import annotations

import atexit
import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def many() -> Iterator[None]:
    """Import much inside: what modules define is no garbage, so nobody looks for it, now or at the interpreter's end.

    That saves a third of the time that torch, transformers and DeepSpeed take to come and to go.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.freeze)
        if collecting:
            gc.enable()


@contextlib.contextmanager
def without(package: str) -> Iterator[None]:
    """Let a package seem not to be installed inside, for one that takes it where it can get it; it may come later.

    Args:
        package: The package's name; where it is loaded already, nothing changes.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None
    try:
        yield
    finally:
        del sys.modules[package]
