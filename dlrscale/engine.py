"""The only door to DeepSpeed: configurations, initialisation, steps, gathering and checkpoints.

torch and deepspeed are imported where they are needed, so that building a configuration stays fast.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlrscale import record
from dlrscale.config import RunConfig
from dlrscale.errors import ConfigError, JobError

if TYPE_CHECKING:
    import torch
    from torch import nn

ADAM = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
# What only the command line or the run decides; a DeepSpeed file need not hold it.
RUN_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
DISTRIBUTED_TIMEOUT = timedelta(minutes=30)


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


def device_type() -> str:
    """`cuda` or another accelerator's name, or `cpu`; DS_ACCELERATOR decides where it is set."""
    chosen = os.environ.get("DS_ACCELERATOR")
    if chosen:
        return chosen
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_count() -> int:
    """Accelerators of this host, or 1 where there is only a CPU."""
    if device_type() != "cuda":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def start_distributed() -> tuple[int, int]:
    """Join the process group that the DeepSpeed launcher's environment describes.

    Returns:
        This process's rank and the number of ranks; (0, 1) where no launcher was used.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type())
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:
        from dlrscale.launcher import free_port

        os.environ["MASTER_PORT"] = str(free_port())
    import logging

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


def stop_distributed() -> None:
    """Leave the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


class Engine:
    """A DeepSpeed engine on one model, with the few verbs that the training loop needs.

    Args:
        model: The model; its weights must be final, since the fp32 masters are copied here.
        trainable: The parameters to train.
        ds_config: A merged configuration (`merge`).
    """

    def __init__(self, model: nn.Module, trainable: list[nn.Parameter], ds_config: dict[str, Any]):
        import deepspeed
        import torch
        import torch.distributed as dist

        self.config = ds_config
        self.stage = int(file_levers(ds_config)["zero"])
        self.accumulation = int(ds_config["gradient_accumulation_steps"])
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.own_schedule = "scheduler" in ds_config
        # A bf16 engine casts buffers too; those that the model keeps in fp32 (rotary frequencies) must stay so.
        kept = {name: b.clone() for name, b in model.named_buffers() if b.dtype.is_floating_point and b.numel() > 1}
        self.ds, self.optimizer, _, _ = deepspeed.initialize(
            model=model, model_parameters=trainable, config=json.loads(json.dumps(ds_config))
        )
        self.device = self.ds.device
        # DeepSpeed's half-precision wrappers at stage 0 make the optimizer's states by a step with zero gradients,
        # and Adam counts it: its bias correction would be one step late, unlike at the other stages.
        for state in self._inner_optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"].zero_()
        for name, buffer in kept.items():
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, buffer.to(self.device))

    @property
    def module(self) -> nn.Module:
        """The model inside the engine."""
        return self.ds.module

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        inner = self.optimizer
        while hasattr(inner, "optimizer"):
            inner = inner.optimizer
        return inner

    @property
    def optimizer_class(self) -> str:
        """Class of the optimizer that does the update, inside DeepSpeed's wrappers."""
        inner = self._inner_optimizer
        return f"{type(inner).__module__}.{type(inner).__name__}"

    def set_lr(self, lr: float) -> None:
        """Set the rate of every parameter group, unless the DeepSpeed file brought a schedule of its own."""
        if not self.own_schedule:
            for group in self.optimizer.param_groups:
                group["lr"] = lr

    @property
    def lr(self) -> float:
        """The rate that the optimizer's first group holds."""
        return float(self.optimizer.param_groups[0]["lr"])

    def backward(self, loss: torch.Tensor, scale: float) -> None:
        """Backward of `loss * scale` through DeepSpeed, which divides by the accumulation and averages over ranks."""
        import torch

        with torch.enable_grad():
            self.ds.backward(loss * scale)

    def boundary(self, last: bool) -> None:
        """Say before a micro-batch whether it is the last of its optimizer step."""
        self.ds.set_gradient_accumulation_boundary(last)

    def step(self) -> float:
        """Update the weights, after the last micro-batch.

        Returns:
            The global gradient norm before clipping.
        """
        import torch

        norm = math.nan
        if self.stage == 0:  # DeepSpeed does not tell it there in fp32; the gradients are averaged already
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        self.ds.step()
        told = self.ds.get_global_grad_norm()
        return float(norm if told is None else told)

    @contextlib.contextmanager
    def many_backwards(self) -> Iterator[None]:
        """Several backward passes per micro-batch, over all micro-batches of one optimizer step.

        With ZeRO 1 to 3 DeepSpeed reduces at every backward and keeps only the last, silently; inside this
        context it reduces once, at the end. ZeRO-3 with one micro-batch reduces each parameter as it comes,
        which is right there and keeps no full gradients. `step` must follow.
        """
        if self.stage == 0:
            yield  # the caller's `boundary(True)` before the last micro-batch lets each gradient be averaged
        elif self.stage == 3 and self.accumulation == 1:
            self.boundary(True)
            yield
        else:
            with self.ds.coalesce_grad_reduction():
                yield
            self.boundary(True)

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over ranks, in place."""
        import torch.distributed as dist

        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        import torch.distributed as dist

        if self.world_size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Whole parameters on every rank while inside, at any stage; all ranks must enter."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None, enabled=self.stage == 3):
            yield

    def save(self, folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
        """Write checkpoint `step<N>` so that it appears whole or not at all; the oldest beyond `keep` go.

        Frozen parameters are left out: they come from the model's own folder.
        """
        temporary, name = f"tmp-step{step}", f"step{step}"
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("tmp-*"):
                shutil.rmtree(left)
        self.barrier()
        self.ds.save_checkpoint(
            str(folder),
            tag=temporary,
            client_state={"dlrscale": state},
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        self.barrier()
        if self.rank == 0:
            whole = {"step": step, "world_size": self.world_size, "stage": self.stage, "files": {}}
            for file in sorted((folder / temporary).rglob("*")):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
                    whole["files"][str(file.relative_to(folder / temporary))] = file.stat().st_size
            record.write_atomic(folder / temporary / "whole.json", json.dumps(whole))
            if (folder / name).exists():
                shutil.rmtree(folder / name)
            os.replace(folder / temporary, folder / name)
            for old in checkpoints(folder)[:-keep]:
                shutil.rmtree(folder / f"step{old}")
        self.barrier()

    def load(self, folder: Path, step: int) -> dict[str, Any]:
        """Load checkpoint `step<N>` and return the state that was saved with it.

        Args:
            folder: The folder of the run's checkpoints.
            step: N, the steps that were done when it was saved.

        Returns:
            The state that `save` was given.

        Raises:
            ConfigError: If another number of ranks or another stage wrote it.
            JobError: If DeepSpeed cannot read it.
        """
        check_layout(folder, self.world_size, self.stage)
        path, state = self.ds.load_checkpoint(str(folder), tag=f"step{step}", load_module_strict=False)
        if path is None:
            raise JobError(
                f"DeepSpeed could not load {folder}/step{step}. Delete that folder to go on from an older one."
            )
        return state["dlrscale"]


def checkpoints(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, oldest first."""
    found = []
    for marker in folder.glob("step*/whole.json"):
        try:
            whole = json.loads(marker.read_text(encoding="utf-8"))
            step, sizes = int(whole["step"]), {name: (marker.parent / name).stat().st_size for name in whole["files"]}
        except (OSError, ValueError, KeyError):
            continue
        if sizes == whole["files"]:
            found.append(step)
    return sorted(found)


def check_layout(folder: Path, world_size: int, stage: int) -> None:
    """Refuse to go on from checkpoints of another number of ranks or another ZeRO stage.

    Args:
        folder: The folder of the run's checkpoints; may be missing.
        world_size: The number of ranks now.
        stage: The ZeRO stage now.

    Raises:
        ConfigError: If the newest whole checkpoint has another layout.
    """
    for step in checkpoints(folder)[-1:]:
        whole = json.loads((folder / f"step{step}" / "whole.json").read_text(encoding="utf-8"))
        if (whole["world_size"], whole["stage"]) != (world_size, stage):
            raise ConfigError(
                f"{folder}/step{step} was written by {whole['world_size']} ranks at ZeRO stage {whole['stage']}; this "
                f"run has {world_size} ranks at stage {stage}. Go on with --num-ranks {whole['world_size']} --zero "
                f"{whole['stage']}, or start anew in another --out."
            )
