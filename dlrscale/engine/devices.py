"""The accelerator of this host, and the process group of its ranks."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from dlrscale.launcher import free_port, imports

if TYPE_CHECKING:
    import torch

DISTRIBUTED_TIMEOUT = timedelta(minutes=30)


def device_type() -> str:
    """`cuda` or another accelerator's name, or `cpu`; DS_ACCELERATOR decides where it is set."""
    chosen = os.environ.get("DS_ACCELERATOR")
    if chosen:
        return chosen
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device() -> torch.device:
    """The device of this rank."""
    import torch

    if device_type() == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def device_count() -> int:
    """Accelerators of this host, or 1 where there is only a CPU."""
    if device_type() != "cuda":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def import_deepspeed() -> None:
    """Import DeepSpeed without what it takes along for parts of it that are not used here, half of its time.

    Its autotuner imports MLflow where that is installed. Its ZeRO imports its Muon, which a file may not ask for here
    (`optimizers.REFUSED_TYPES`), and which loads torch's compiler for three functions as soon as it is imported.
    """
    with imports.many(), imports.without("mlflow"):
        import deepspeed.runtime.compiler as compiler

        compile_, compiler.compile = compiler.compile, lambda: lambda function: function
        try:
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
        finally:
            compiler.compile = compile_


def start_distributed() -> tuple[int, int]:
    """Join the process group that the DeepSpeed launcher's environment describes.

    Returns:
        This process's rank and the number of ranks; (0, 1) where no launcher was used.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type())
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    import logging

    import_deepspeed()
    import deepspeed
    import torch.distributed as dist

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if os.environ["DS_ACCELERATOR"] == "cpu":
        # Its shared-memory collective would be compiled at the first use; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if os.environ["DS_ACCELERATOR"] == "cuda":
        import torch

        # Before the first collective: NCCL takes the current device, and the engine comes later.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        deepspeed.init_distributed(timeout=DISTRIBUTED_TIMEOUT, verbose=False)
    return dist.get_rank(), dist.get_world_size()


def barrier() -> None:
    """Wait for all ranks."""
    import torch.distributed as dist

    if dist.get_world_size() > 1:
        dist.barrier()


def stop_distributed() -> None:
    """Leave the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
