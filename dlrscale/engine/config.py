"""DeepSpeed configurations: levers, the user's file, batch sizes, and what the two merge to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlrscale.config import RunConfig
from dlrscale.engine.check import check, parse, without_auto
from dlrscale.engine.devices import device_type
from dlrscale.engine.optimizers import ADAM_TYPES, for_torch, optimizer_faults, schedule_takes, takes_torch_adam
from dlrscale.errors import ConfigError

ADAM = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
# What only the command line or the run decides; a DeepSpeed file need not hold it.
RUN_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

OF_THE_OPTIMIZER = ("optimizer", "scheduler", "gradient_clipping", "torch_autocast", "data_types")


def lever_config(
    zero: int, offload_optimizer: bool, offload_param: bool, optimizer_type: str = "AdamW"
) -> dict[str, Any]:
    """A complete DeepSpeed configuration for some levers, without batch sizes, rate and precision.

    The files in ds_configs/ hold exactly these, with AdamW. `none`: DeepSpeed gets no optimizer.
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
    found: dict[str, Any] = {"optimizer": optimizer, "gradient_clipping": 1.0, "zero_optimization": section}
    if optimizer_type == "none":
        del found["optimizer"], found["gradient_clipping"]
    elif optimizer_type != "AdamW":
        found |= {"optimizer": {"type": optimizer_type, "params": {}}, "zero_allow_untested_optimizer": True}
    return found


def read_file(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON file and check all of it.

    Args:
        path: The file.

    Returns:
        Its content; "auto" still stands where `merge` resolves it.

    Raises:
        ConfigError: If it is missing or no JSON object, or with every fault in it.
    """
    file = parse(path)
    faults = check(file)
    if faults:
        raise ConfigError([f"--deepspeed_config {path}:", *faults])
    return file


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


def resolve_dtype(file: Mapping[str, Any], given: str | None) -> str:
    """The precision of a run: the command's, else the DeepSpeed file's, else bf16, on the CPU fp32.

    Args:
        file: The DeepSpeed file's content; empty where there is none.
        given: The value of `--dtype`; None where it was not given.

    Returns:
        `fp32`, `bf16` or `fp16`.

    Raises:
        ConfigError: If both decide and they differ.
    """
    decided = file_dtype(file)
    if decided and given and given != decided:
        raise ConfigError(f"--dtype {given} and {decided}.enabled true in the DeepSpeed file differ. Give one.")
    off = [k for k in ("bf16", "fp16") if (file.get(k) or {}).get("enabled", "auto" if k in file else None) is False]
    if given in off:
        raise ConfigError(f"--dtype {given} and {given}.enabled false in the DeepSpeed file differ. Give one.")
    usual = "fp32" if device_type() == "cpu" or "bf16" in off else "bf16"
    return given or decided or usual


def resolve_rates(
    file: Mapping[str, Any], lr: float | None, warmup_steps: int | None, default: float
) -> tuple[float, int]:
    """Peak rate and warm-up of a run: the command's, else the DeepSpeed file's, else the default rate and 10.

    Args:
        file: The DeepSpeed file's content; empty where there is none.
        lr: The value of `--lr`; None where it was not given.
        warmup_steps: The value of `--warmup-steps`; None where it was not given.
        default: The rate where neither gives one.

    Returns:
        The peak learning rate and the steps of warm-up.

    Raises:
        ConfigError: If both give one and they differ, or the file's schedule would leave one unused.
    """
    faults = []
    held = (file.get("optimizer") or {}).get("params", {}).get("lr")
    held = None if held == "auto" else held
    if held is not None and lr is not None and held != lr:
        faults.append(f"--lr {lr} and optimizer.params.lr {held} in the DeepSpeed file differ. Give one of them.")
    if "scheduler" in file:
        takes = schedule_takes(file["scheduler"])
        for key, flag, value in (("lr", "--lr", lr), ("warmup_steps", "--warmup-steps", warmup_steps)):
            if value is not None and not takes[key]:
                faults.append(
                    f"{flag} {value} and scheduler {file['scheduler']['type']} in the DeepSpeed file: the schedule "
                    f"decides the rate, and {flag} would be without effect. Leave one of them out."
                )
    if faults:
        raise ConfigError(faults)
    peak = lr if lr is not None else default if held is None else held
    return float(peak), 10 if warmup_steps is None else warmup_steps


def resolve_auto(file: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """A copy of a DeepSpeed file's content in which every "auto" is decided.

    Batch sizes, rate and precision are set by `merge` in any case, and are left out here.

    Args:
        file: The content, checked.
        config: The resolved configuration of the run.

    Returns:
        The content without an "auto".
    """
    merged = without_auto(file)
    if file.get("gradient_clipping") == "auto":
        merged["gradient_clipping"] = 1.0
    zero = lever_config(3, False, False)["zero_optimization"] | {
        "allgather_bucket_size": 500_000_000,
        "sub_group_size": 1_000_000_000,
    }
    optimizer = file.get("optimizer") or {}
    decided = {
        ("zero_optimization",): zero,
        ("optimizer", "params"): ADAM if str(optimizer.get("type")).lower() in ADAM_TYPES else {"weight_decay": 0.0},
        ("scheduler", "params"): {
            "total_num_steps": config.steps,
            "warmup_num_steps": max(1, config.warmup_steps),
            "warmup_min_lr": 0.0,
            "warmup_max_lr": config.lr,
        },
        ("bf16",): {"enabled": config.dtype == "bf16"},
        ("fp16",): {"enabled": config.dtype == "fp16"},
    }
    for path, values in decided.items():
        section, target = file, merged
        for key in path:
            section, target = section.get(key, {}), target.get(key, {})
        target |= {key: values[key] for key, value in section.items() if value == "auto" and key in values}
    return without_auto(merged)  # fresh lists


def merge(config: RunConfig) -> dict[str, Any]:
    """The configuration that DeepSpeed gets: the user's file or the levers', with batch, rate and precision.

    Where nothing can or need be compiled (no C++ compiler, or a CPU-only job), torch's Adam or AdamW takes the place
    of DeepSpeed's own with all its parameters; the record names the class in use.

    Args:
        config: The resolved configuration of the run.

    Returns:
        The DeepSpeed configuration, ready for `deepspeed.initialize`; it holds no "auto".

    Raises:
        ConfigError: If something is wrong in the user's file.
    """
    if config.deepspeed_config:
        merged = resolve_auto(read_file(config.deepspeed_config), config)
    else:
        own = lever_config(config.zero, config.offload_optimizer, config.offload_param, config.optimizer)
        if config.optimizer not in ("AdamW", "none"):
            faults = optimizer_faults(own["optimizer"], own)
            if faults:
                raise ConfigError([f"--optimizer {config.optimizer}:", *faults])
        merged = without_auto(own)
    if config.optimizer == "none":
        faults = [
            f"{key} in {config.deepspeed_config}: the strategy updates by itself, without DeepSpeed's optimizer, and "
            f"{key} would be without effect. Take it out."
            for key in OF_THE_OPTIMIZER
            if key in merged
        ]
        if (merged.get("zero_optimization", {}).get("offload_param") or {}).get("device") == "nvme":
            faults.append(
                f"zero_optimization.offload_param.device nvme in {config.deepspeed_config}: the strategy updates "
                "weights by itself, where they lie. Take cpu."
            )
        if faults:
            raise ConfigError(faults)
    for key in RUN_KEYS:
        merged.pop(key, None)
    merged["train_micro_batch_size_per_gpu"] = config.micro_batch
    merged["gradient_accumulation_steps"] = config.accumulation
    merged["train_batch_size"] = config.global_batch
    levers = file_levers(merged)
    offload = levers["offload_optimizer"]
    optimizer: dict[str, Any] = {}
    if config.optimizer != "none":
        optimizer = merged.setdefault("optimizer", lever_config(levers["zero"], offload, False)["optimizer"])
        optimizer.setdefault("params", {})["lr"] = config.lr
    kept = (merged.get("data_types") or {}).get("grad_accum_dtype")
    if kept not in (None, config.dtype) and not levers["zero"]:
        raise ConfigError(
            f"data_types.grad_accum_dtype {kept} in {config.deepspeed_config}: at stage 0 DeepSpeed adds gradients in "
            f"the run's own precision alone, {config.dtype}. Leave it out, or take zero_optimization.stage 1 or more."
        )
    if takes_torch_adam(optimizer, offload):
        optimizer["params"] = for_torch(optimizer["params"])
        if offload:
            merged["zero_force_ds_cpu_optimizer"] = False
    if config.dtype in ("bf16", "fp16"):
        merged.setdefault(config.dtype, {})["enabled"] = True
    merged.setdefault("steps_per_print", 1_000_000_000)
    return merged
