"""DeepSpeed configurations: levers, the user's file, batch sizes, and what the two merge to."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlrscale.config import RunConfig
from dlrscale.engine.devices import device_type
from dlrscale.errors import ConfigError

ADAM = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
# What only the command line or the run decides; a DeepSpeed file need not hold it.
RUN_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def lever_config(zero: int, offload_optimizer: bool, offload_param: bool) -> dict[str, Any]:
    """A complete DeepSpeed configuration for some levers, without batch sizes, rate and precision.

    The files in ds_configs/ hold exactly these.
    """
    section: dict[str, Any] = {"stage": zero}
    if zero:
        section |= {
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_scatter": True,
            "reduce_bucket_size": 500_000_000,
        }
    if zero in (1, 2):
        section["allgather_bucket_size"] = 500_000_000
    if zero == 3:
        section |= {
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
        }
    optimizer: dict[str, Any] = {"type": "AdamW", "params": {**ADAM, "torch_adam": True}}
    if offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        del optimizer["params"]["torch_adam"]  # offloaded states want DeepSpeed's own CPU Adam
    if offload_param:
        section["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {"optimizer": optimizer, "gradient_clipping": 1.0, "zero_optimization": section}


def read_file(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON file.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        ConfigError: If it is missing or no JSON object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"--deepspeed_config {path}: no such file. Name one of ds_configs/ or your own.") from None
    except ValueError as error:
        raise ConfigError(f"--deepspeed_config {path}: no JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"--deepspeed_config {path}: must hold one JSON object.")
    return value


def file_levers(file: Mapping[str, Any]) -> dict[str, Any]:
    """The levers that a DeepSpeed file decides: stage and offloads."""
    section = file.get("zero_optimization") or {}
    on_cpu = {k: (section.get(k) or {}).get("device", "none") != "none" for k in ("offload_optimizer", "offload_param")}
    return {"zero": section.get("stage", 0), **on_cpu}


def file_dtype(file: Mapping[str, Any]) -> str | None:
    """The precision that a DeepSpeed file decides, if it does.

    Args:
        file: The DeepSpeed file's content.

    Returns:
        `bf16` or `fp16`; None where it enables neither.

    Raises:
        ConfigError: If it enables two.
    """
    on = [k for k in ("bf16", "fp16") if (file.get(k) or {}).get("enabled") is True]
    if len(on) > 1:
        raise ConfigError("The DeepSpeed file enables bf16 and fp16 at once (bf16.enabled, fp16.enabled). Keep one.")
    return on[0] if on else None


def resolve_batch(file: Mapping[str, Any], micro: int | None, accumulation: int | None, ranks: int) -> tuple[int, int]:
    """Micro-batch and accumulation from the command line and the file; any two of the three fix the third.

    Args:
        file: The DeepSpeed file's content; empty where there is none.
        micro: Sequences per rank and micro-batch; None where `--micro-batch` was not given.
        accumulation: Micro-batches per step; None where `--accumulation` was not given.
        ranks: The number of ranks.

    Returns:
        Sequences per rank and micro-batch (4 where nothing fixes it), and micro-batches per step (else 1).

    Raises:
        ConfigError: If the file and the command line differ, or the three do not multiply.
    """
    faults = []
    values: dict[str, int | None] = {}
    for key, flag, given in (
        ("train_micro_batch_size_per_gpu", "--micro-batch", micro),
        ("gradient_accumulation_steps", "--accumulation", accumulation),
        ("train_batch_size", None, None),
    ):
        held = None if file.get(key) == "auto" else file.get(key)
        if held is not None and (not isinstance(held, int) or held < 1):
            faults.append(
                f"{key} in the DeepSpeed file is {held!r}: give a whole number of at least 1, or leave it out."
            )
            held = None
        if held is not None and given is not None and held != given:
            faults.append(f"{flag} {given} and {key} {held} in the DeepSpeed file differ. Give one of them.")
        values[key] = given if held is None else held
    micro, accumulation, total = values.values()
    if total is not None and not faults:
        if micro is not None and accumulation is None:
            accumulation, rest = divmod(total, micro * ranks)
        elif micro is None:
            micro, rest = divmod(total, (accumulation or 1) * ranks)
        else:
            rest = total - micro * accumulation * ranks
        if rest or not micro or accumulation == 0:
            fits = total / ((micro or 1) * ranks)
            mend = f" An accumulation of {int(fits)} fits." if fits == int(fits) and fits >= 1 else ""
            faults.append(
                f"train_batch_size {total} in the DeepSpeed file is not micro-batch {micro} x accumulation "
                f"{accumulation} x {ranks} ranks.{mend}"
            )
    if faults:
        raise ConfigError(faults)
    return 4 if micro is None else micro, 1 if accumulation is None else accumulation


def compiler() -> str | None:
    """The C++ compiler that DeepSpeed would build its operators with, if one is there."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def without_auto(value: Any) -> Any:
    """A copy of a DeepSpeed file's content in which "auto" is left to us or to DeepSpeed's own default."""
    if isinstance(value, Mapping):
        return {k: without_auto(v) for k, v in value.items() if v != "auto"}
    return [without_auto(v) for v in value] if isinstance(value, list) else value


def merge(config: RunConfig) -> dict[str, Any]:
    """The configuration that DeepSpeed gets: the user's file or the levers', with batch, rate and precision.

    Where nothing can or need be compiled (no C++ compiler, or a CPU-only job), torch's AdamW takes the place
    of DeepSpeed's own CPU Adam; the record names the class in use.

    Args:
        config: The resolved configuration of the run.

    Returns:
        The DeepSpeed configuration, ready for `deepspeed.initialize`.

    Raises:
        ConfigError: If the user's file contradicts the run's settings.
    """
    if config.deepspeed_config:
        merged = read_file(config.deepspeed_config)
    else:
        merged = lever_config(config.zero, config.offload_optimizer, config.offload_param)
    merged = without_auto(merged)
    for key in RUN_KEYS:
        merged.pop(key, None)
    merged["train_micro_batch_size_per_gpu"] = config.micro_batch
    merged["gradient_accumulation_steps"] = config.accumulation
    merged["train_batch_size"] = config.global_batch
    optimizer = merged.setdefault("optimizer", {"type": "AdamW", "params": {**ADAM, "torch_adam": True}})
    parameters = optimizer.setdefault("params", {})
    parameters["lr"] = config.lr
    offload = file_levers(merged)["offload_optimizer"]
    if optimizer["type"] in ("Adam", "AdamW") and (device_type() == "cpu" or (offload and not compiler())):
        parameters["torch_adam"] = True
        if offload:
            merged["zero_force_ds_cpu_optimizer"] = False
    if config.dtype in ("bf16", "fp16"):
        merged.setdefault(config.dtype, {})["enabled"] = True
    merged.setdefault("steps_per_print", 1_000_000_000)
    return merged
