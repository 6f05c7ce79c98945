"""The only door to DeepSpeed: configurations, initialisation, steps, gathering and checkpoints.

torch and deepspeed are imported where they are needed, so that building a configuration stays fast.
"""

from dlrscale.engine.check import without_auto
from dlrscale.engine.checkpoints import Checkpoint, Layout, check_layout, checkpoints, find_checkpoint
from dlrscale.engine.config import (
    file_dtype,
    file_levers,
    lever_config,
    merge,
    read_file,
    resolve_batch,
    resolve_dtype,
    resolve_rates,
)
from dlrscale.engine.core import Engine
from dlrscale.engine.devices import barrier, device, device_count, device_type, start_distributed, stop_distributed
from dlrscale.engine.operators import build_cpu_adam, cpu_adam, cuda_toolkit
from dlrscale.engine.optimizers import compiler

__all__ = [
    "Checkpoint",
    "Engine",
    "Layout",
    "barrier",
    "build_cpu_adam",
    "check_layout",
    "checkpoints",
    "compiler",
    "cpu_adam",
    "cuda_toolkit",
    "device",
    "device_count",
    "device_type",
    "file_dtype",
    "file_levers",
    "find_checkpoint",
    "lever_config",
    "merge",
    "read_file",
    "resolve_batch",
    "resolve_dtype",
    "resolve_rates",
    "start_distributed",
    "stop_distributed",
    "without_auto",
]
