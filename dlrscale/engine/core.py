"""A DeepSpeed engine on one model, with the few verbs that a training loop needs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlrscale import record
from dlrscale.engine.checkpoints import check_layout, checkpoints
from dlrscale.engine.config import file_levers
from dlrscale.errors import JobError

if TYPE_CHECKING:
    import torch
    from torch import nn


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
