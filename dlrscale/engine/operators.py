"""The operator that DeepSpeed compiles for optimizer offload, its CPU Adam: whether it is there, and building it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def cpu_adam() -> Path:
    """Where torch keeps the compiled CPU Adam of this interpreter; it is built if that file exists.

    Returns:
        The path of its shared library, in TORCH_EXTENSIONS_DIR or below the user's cache.
    """
    import torch
    from torch.utils import cpp_extension

    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        root = Path(chosen)
    else:
        kind = f"rocm{torch.version.hip}" if torch.version.hip else f"cu{torch.version.cuda}"
        kind = kind.replace(".", "") if torch.version.hip or torch.version.cuda else "cpu"
        python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
        root = Path(cpp_extension.get_default_build_root()) / f"{python}_{kind}"
    return root / "cpu_adam" / "cpu_adam.so"


def cuda_toolkit() -> str | None:
    """The folder of the CUDA toolkit that torch would build with, if one is there."""
    from torch.utils import cpp_extension

    return cpp_extension.CUDA_HOME


def build_cpu_adam() -> float:
    """Build the CPU Adam, or load it where it was built before, in this process alone.

    Returns:
        Seconds that it took.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder

    start = time.monotonic()
    CPUAdamBuilder().load(verbose=False)
    return time.monotonic() - start
