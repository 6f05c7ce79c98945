"""Optimizer and scheduler of a DeepSpeed file: the class that DeepSpeed takes, and whether it takes the parameters."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

from dlrscale.engine.devices import device_type

# Where "auto" may stand: what the command line, the run or DeepSpeed's own default decides.
AUTO = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "bf16.enabled", "fp16.enabled",
    "optimizer.params.lr", "optimizer.params.betas", "optimizer.params.eps", "optimizer.params.weight_decay",
    "scheduler.params.total_num_steps", "scheduler.params.warmup_num_steps", "scheduler.params.warmup_min_lr",
    "scheduler.params.warmup_max_lr",
    "zero_optimization.reduce_bucket_size", "zero_optimization.allgather_bucket_size",
    "zero_optimization.sub_group_size", "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold", "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance", "data_types.keep_in_fp32_modules",
})  # fmt: skip

DEEPSPEED_OWN = ("adam", "adamw", "adagrad", "lamb", "lion")
ADAM_TYPES = ("adam", "adamw")
# What DeepSpeed itself takes out of the parameters before the class sees them.
ADAM_KEYS = {"torch_adam": False, "adam_w_mode": True, "fp32_optimizer_states": True, "foreach": None}
REFUSED_TYPES = {
    "muon": "it has groups with rates of their own, and dlrscale sets one rate",
    "muadam": "it scales rates by width, and dlrscale sets one rate",
    "muadamw": "it scales rates by width, and dlrscale sets one rate",
    "musgd": "it scales rates by width, and dlrscale sets one rate",
    "lbfgs": "it evaluates the loss several times per step",
    "sparseadam": "it takes sparse gradients only",
    "optimizer": "it is no optimizer but their base",
}


def compiler() -> str | None:
    """The C++ compiler that DeepSpeed would build its operators with, if one is there."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def nearest(key: str, valid: Iterable[str]) -> str:
    """A hint at the valid name that looks most like one that is not."""
    close = difflib.get_close_matches(key, sorted(valid), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def takes_torch_adam(optimizer: Mapping[str, Any], offload: bool) -> bool:
    """Whether torch's Adam does the update in the place of DeepSpeed's own, which cannot or need not be built here."""
    return str(optimizer.get("type")).lower() in ADAM_TYPES and (device_type() == "cpu" or (offload and not compiler()))


def optimizer_class(name: str, params: Mapping[str, Any], offload: bool) -> type | None:
    """The class that DeepSpeed makes for an optimizer's type; None where there is none of that name."""
    import torch

    own = name.lower()
    if own in ADAM_TYPES:
        if params.get("torch_adam") or takes_torch_adam({"type": name}, offload):
            torchs = own == "adamw" or params.get("adam_w_mode", True)
            return torch.optim.AdamW if torchs else torch.optim.Adam
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        return DeepSpeedCPUAdam if offload else FusedAdam
    if own == "adagrad":
        from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad

        return DeepSpeedCPUAdagrad if offload else torch.optim.Adagrad
    if own == "lion":
        from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

        return DeepSpeedCPULion if offload else FusedLion
    if own == "lamb":
        from deepspeed.ops.lamb import FusedLamb

        return FusedLamb
    found = getattr(torch.optim, name, None)
    return found if inspect.isclass(found) and issubclass(found, torch.optim.Optimizer) else None


def parameter_names(cls: type) -> dict[str, Any]:
    """The settings that a class takes besides what it works on, with their defaults."""
    skipped = ("self", "params", "model_params", "optimizer", "last_batch_iteration", "max_grad_norm", "adamw_mode")
    return {k: p.default for k, p in inspect.signature(cls.__init__).parameters.items() if k not in skipped}


def optimizer_faults(section: Mapping[str, Any], file: Mapping[str, Any]) -> list[str]:
    """What is wrong with the `optimizer` section of a DeepSpeed file.

    Args:
        section: The section.
        file: The whole file, for the stage and the offload.

    Returns:
        A sentence or two for each fault.
    """
    import torch

    zero = file.get("zero_optimization") or {}
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    name, params = section.get("type"), section.get("params", {})
    classes = [n for n, c in vars(torch.optim).items() if inspect.isclass(c) and n not in ("Optimizer", "Muon")]
    if name is None:
        return ["optimizer.type: missing; nothing would be trained. Write AdamW, or take the section out."]
    if name.lower() in REFUSED_TYPES:
        return [f"optimizer.type {name}: {REFUSED_TYPES[name.lower()]}. Take another, such as AdamW."]
    cls = optimizer_class(name, params, offload)
    if cls is None:
        hint = nearest(name, [*classes, "Lamb", "Lion"]) or " Take one of torch.optim, Lamb or Lion."
        return [f"optimizer.type {name}: DeepSpeed has no optimizer of that name.{hint}"]
    found = cannot_run(name, cls, offload)
    tested = name.lower() in DEEPSPEED_OWN and name.lower() != "lamb"
    if zero.get("stage") and not tested and not file.get("zero_allow_untested_optimizer"):
        found.append(
            f"optimizer.type {name}: DeepSpeed has not tested it with ZeRO and would stop in every rank. Set "
            "zero_allow_untested_optimizer true, or take AdamW."
        )
    valid = parameter_names(cls) | (ADAM_KEYS if name.lower() in ADAM_TYPES else {})
    return found + parameter_faults("optimizer.params", params, valid) + adam_faults(name, params, cls)


def cannot_run(name: str, cls: type, offload: bool) -> list[str]:
    """Why a class of DeepSpeed's own cannot run on this machine, if it cannot."""
    if not cls.__module__.startswith("deepspeed"):
        return []
    if cls.__name__.startswith("Fused") and device_type() == "cpu":
        mend = f"Offload the optimizer for {name} on the CPU" if name.lower() == "lion" else "Take AdamW"
        return [f"optimizer.type {name}: {cls.__name__} needs an accelerator. {mend}, or train on one."]
    if not compiler():
        return [f"optimizer.type {name}: {cls.__name__} needs a C++ compiler. Install g++, or take AdamW."]
    return []


def adam_faults(name: str, params: Mapping[str, Any], cls: type) -> list[str]:
    """What contradicts itself in the parameters of an Adam, or gets lost where torch's takes its place."""
    found = []
    if name.lower() == "adamw" and params.get("adam_w_mode") is False:
        found.append("optimizer.params.adam_w_mode false: AdamW ignores it. Write the type Adam, or take it out.")
    if name.lower() in ADAM_TYPES and cls.__module__.startswith("torch") and params.get("bias_correction") is False:
        found.append(
            "optimizer.params.bias_correction false: torch's Adam, which this run uses, always corrects. Take it out."
        )
    return found


def parameter_faults(path: str, params: Mapping[str, Any], valid: Mapping[str, Any]) -> list[str]:
    """Keys that a class does not take, and values of another kind than its defaults."""
    found = []
    replaced = ("bias_correction", "set_grad_none")  # of DeepSpeed's Adams alone; see `for_torch`
    for key, value in params.items():
        own, default = f"{path}.{key}", valid.get(key)
        text = json.dumps(value, default=str)
        if value == "auto" and own in AUTO and key in valid:
            continue
        if key == "max_grad_norm":
            found.append(f"{own}: DeepSpeed refuses it. Write gradient_clipping at the top.")
        elif key not in valid and not (key in replaced and "torch_adam" in valid):
            hint = nearest(key, valid) or f" It takes {', '.join(sorted(valid))}."
            found.append(f"{own}: no such key.{hint}")
        elif value == "auto":
            found.append(f'{own}: dlrscale does not resolve "auto" there. Give a value, or leave it out.')
        elif key == "betas":
            whole = isinstance(value, list) and len(value) == 2 and all(is_number(v) and 0 <= v < 1 for v in value)
            if not whole:
                found.append(f"{own} is {text}: two numbers of at least 0 and less than 1.")
        elif key in ("lr", "eps", "weight_decay"):
            if not is_number(value) or value < 0:
                found.append(f"{own} is {text}: must be a number, 0 or more.")
        elif isinstance(default, bool):
            if not isinstance(value, bool):
                found.append(f"{own} is {text}: must be true or false.")
        elif isinstance(default, (int, float)) and not is_number(value):
            found.append(f"{own} is {text}: must be a number.")
    return found


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def scheduler_faults(section: dict[str, Any]) -> list[str]:
    """What is wrong with the `scheduler` section of a DeepSpeed file, which gets `params` where it has none."""
    import torch
    from deepspeed.runtime import lr_schedules

    name, params = section.get("type"), section.setdefault("params", {})
    known = lr_schedules.VALID_LR_SCHEDULES
    if name not in known:
        hint = nearest(str(name), known) or f" Take one of {', '.join(known)}."
        return [f"scheduler.type {name}: no schedule of DeepSpeed's own, which alone work with ZeRO.{hint}"]
    cls = getattr(lr_schedules, name)
    valid = parameter_names(cls)
    found = parameter_faults("scheduler.params", params, valid)
    missing = [k for k, default in valid.items() if default is inspect.Parameter.empty and k not in params]
    found += [f"scheduler.params.{key}: missing. {name} needs it." for key in missing]
    for key, value in params.items():
        fault = None
        if value == "auto" or key not in valid or key in ("cycle_momentum", "lr_range_test_staircase"):
            continue
        if key == "warmup_type":
            fault = None if value in ("log", "linear") else "one of log, linear"
        elif value is None:
            fault = "must be a number; or leave it out" if valid[key] is not None else None
        elif not is_number(value) or (value < 0 and key != "decay_lr_rate"):
            fault = "must be a number, 0 or more"
        elif key.endswith(("_steps", "_step_size", "_stair_count")):
            low = 0 if key.endswith("stair_count") or key == "decay_step_size" else 1
            if value != int(value) or value < low:
                fault = f"must be a whole number of at least {low}"
            else:
                params[key] = int(value)
        if fault:
            shown = json.dumps(value, default=str)
            found = [f for f in found if not f.startswith(f"scheduler.params.{key} ")]
            found.append(f"scheduler.params.{key} is {shown}: {fault}.")
    if not found:
        given = {k: 1 if v == "auto" else v for k, v in params.items()}
        try:
            cls(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]), **given)
        except Exception as error:  # whatever it refuses, it would refuse in every rank
            found.append(f"scheduler.params: {name} refuses them: {error}.")
    return found


def for_torch(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of DeepSpeed's Adam for torch's, which does the same update.

    `bias_correction` true is what torch always does, and `set_grad_none` says nothing of the update.
    """
    kept = {k: v for k, v in params.items() if k not in ("bias_correction", "set_grad_none")}
    return {"weight_decay": 0.0} | kept | {"torch_adam": True}  # torch's own default for AdamW is 0.01


def schedule_takes(scheduler: Mapping[str, Any]) -> dict[str, bool]:
    """Whether a file's schedule leaves `lr` and `warmup_steps` to the command line."""
    params = scheduler.get("params", {})
    free = {"WarmupLR": "warmup_max_lr" not in params, "WarmupCosineLR": True}.get(scheduler.get("type"), False)
    return {
        "lr": free or params.get("warmup_max_lr") == "auto",
        "warmup_steps": params.get("warmup_num_steps") == "auto",
    }


def scatter_faults(file: Mapping[str, Any], section: Mapping[str, Any]) -> list[str]:
    """Scalings of the gradient that DeepSpeed asserts against while it scatters, and a bucket that it cannot cut."""
    stage, found = section.get("stage") or 0, []
    if stage >= 2 and section.get("reduce_scatter", True):
        for key, usual in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
            if file.get(key, usual) not in (usual, "auto"):
                found.append(
                    f"{key} {file[key]!r}: DeepSpeed cannot do it at stage {stage} with "
                    "zero_optimization.reduce_scatter. Leave it out, or set reduce_scatter to false."
                )
    size = section.get("allgather_bucket_size", 2)
    if stage in (1, 2) and isinstance(size, (int, float)) and size % 2:
        found.append(f"zero_optimization.allgather_bucket_size {size!r}: DeepSpeed wants an even number.")
    return found


def cpu_adam_faults(file: Mapping[str, Any], section: Mapping[str, Any]) -> list[str]:
    """What only DeepSpeed's own CPU Adam can do, where another optimizer will be in use."""
    place = section.get("offload_optimizer") or {}
    offload = place.get("device", "none") != "none"
    optimizer = file.get("optimizer") or {"type": "AdamW"}
    if offload and str(optimizer.get("type")).lower() in ADAM_TYPES and not takes_torch_adam(optimizer, offload):
        return []
    asked = [f"{k}.{k}_master_weights_and_grads" for k in ("bf16", "fp16")]
    asked = [path for path in asked if (file.get(path[:4]) or {}).get(path[5:]) is True]
    if offload and isinstance(place.get("ratio", 1.0), (int, float)) and place.get("ratio", 1.0) < 1:
        asked.append("zero_optimization.offload_optimizer.ratio")
    if (optimizer.get("params") or {}).get("fp32_optimizer_states") is False:
        asked.append("optimizer.params.fp32_optimizer_states")
    return [
        f"{path}: needs offload_optimizer and DeepSpeed's own CPU Adam, which this run does not use. Leave it out."
        for path in asked
    ]


def has_async_io() -> bool:
    """Whether DeepSpeed's operator for files beside the training can be built here."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))
