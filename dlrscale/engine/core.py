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
from dlrscale.engine import bare
from dlrscale.engine.checkpoints import WHOLE, Checkpoint, Layout, checkpoints, convert, files_of, read_whole, sha256
from dlrscale.engine.config import file_levers
from dlrscale.engine.devices import barrier
from dlrscale.engine.held import held
from dlrscale.errors import ConfigError, JobError

if TYPE_CHECKING:
    import torch
    from torch import nn


NOT_TOLD = ("params", "lr", "step")  # of an optimizer's group: what is no setting


class Engine:
    """A DeepSpeed engine on one model, with the few verbs that the training loop needs.

    Where the configuration has no optimizer, the gradient method updates by itself: it writes into the `share` of each
    trained parameter and calls `drop_gathered` after it; `step` is not for it, nor a forward through `ds` that is
    followed by a backward (`module` is).

    Args:
        model: The model; its weights must be final, since the fp32 masters are copied here.
        trainable: The parameters to train.
        ds_config: A merged configuration (`merge`).
        checkpoint: The checkpoint that `load` will go on from, if there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: list[nn.Parameter],
        ds_config: dict[str, Any],
        checkpoint: Checkpoint | None = None,
    ):
        import deepspeed
        import torch
        import torch.distributed as dist

        self.config = ds_config
        self.stage = int(file_levers(ds_config)["zero"])
        self.accumulation = int(ds_config["gradient_accumulation_steps"])
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.own_schedule = "scheduler" in ds_config
        self.checkpoint = checkpoint
        self.layout = Layout(self.world_size, self.stage)
        self._trained = {id(p) for p in trainable}
        passed = json.loads(json.dumps(ds_config))
        self.updates = "optimizer" in passed
        self._lr = 0.0
        if self.updates and checkpoint is not None and self.layout.reads(checkpoint.written) == "universal":
            passed["checkpoint"] = passed.get("checkpoint", {}) | {"load_universal": True}
        # A bf16 engine casts buffers too; those that the model keeps in fp32 (rotary frequencies) must stay so.
        kept = {name: b.clone() for name, b in model.named_buffers() if b.dtype.is_floating_point and b.numel() > 1}
        # DeepSpeed's half-precision wrappers at stage 0 make the optimizer's states by a step with zero gradients: it
        # would decay the weights, and Adam counts it, so that its bias correction would be one step late.
        parameters = (passed.get("optimizer") or {}).get("params") or {}
        decay = parameters.get("weight_decay") if self.stage == 0 else None
        if decay:
            parameters["weight_decay"] = 0.0
        self.ds, self.wrapper, _, _ = deepspeed.initialize(model=model, model_parameters=trainable, config=passed)
        self.optimizer = self.wrapper if self.updates else None
        self.device = self.ds.device
        self._accumulators = [] if self.updates else bare.accumulators(self, trainable)
        for group in self._inner_optimizer.param_groups if decay else ():
            group["weight_decay"] = decay
        for state in self._inner_optimizer.state.values() if self.updates else ():
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
        """Class of the optimizer that does the update, inside DeepSpeed's wrappers; `none` where there is none."""
        if not self.updates:
            return "none"
        inner = self._inner_optimizer
        return f"{type(inner).__module__}.{type(inner).__name__}"

    def describe(self) -> dict[str, Any]:
        """What is really in use, for the record: optimizer, its groups, precisions, and what this rank has offloaded.

        Bytes are those of master weights and optimizer states (`offloaded_optimizer_bytes`) and of this rank's
        share of the parameters (`offloaded_param_bytes`) in host memory; 0 where nothing is offloaded.
        """
        import torch

        inner, levers = self._inner_optimizer, file_levers(self.config)
        groups, states, held = inner.param_groups if self.updates else [], [], []
        if self.updates:
            held = [p for group in groups for p in group["params"]]
            held = held or list(self.optimizer.fp32_partitioned_groups_flat)  # stage 3 gives them to it in a step alone
            states = [v for state in inner.state.values() for v in state.values() if torch.is_tensor(v)]
        trained = [p for p in self.module.parameters() if id(p) in self._trained]
        shards = [getattr(p, "ds_tensor", None) for p in self.module.parameters()]

        def on_host(tensors: list[torch.Tensor | None]) -> int:
            return sum(t.numel() * t.element_size() for t in tensors if t is not None and t.device.type == "cpu")

        return {
            "optimizer_class": self.optimizer_class,
            "optimizer_groups": [
                {k: v for k, v in group.items() if isinstance(v, (bool, int, float, list, tuple)) and k not in NOT_TOLD}
                for group in groups
            ],
            "parameter_dtype": _names(trained),
            "master_dtype": _names(held),
            "offloaded_optimizer_bytes": on_host(held + states) if levers["offload_optimizer"] else 0,
            "offloaded_param_bytes": on_host(shards) if levers["offload_param"] else 0,
        }

    def held(self) -> dict[str, dict[str, int]]:
        """Bytes of the model states that this rank holds now, by name; see `engine.held`."""
        return held(self)

    def gather(self, values: Any) -> list[Any]:
        """The value of every rank, on every rank; all must call it."""
        import torch.distributed as dist

        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, values)
        return found

    def set_lr(self, lr: float) -> None:
        """Set the rate of every parameter group, unless the DeepSpeed file brought a schedule of its own."""
        self._lr = lr
        if self.updates and not self.own_schedule:
            for group in self.optimizer.param_groups:
                group["lr"] = lr

    @property
    def lr(self) -> float:
        """The rate that the optimizer's first group holds; without an optimizer, the one that was set."""
        if not self.updates:
            return self._lr
        return float(self._inner_optimizer.param_groups[0]["lr"])

    def backward(self, loss: torch.Tensor, scale: float) -> None:
        """Backward of `loss * scale` through DeepSpeed, which divides by the accumulation and averages over ranks.

        Without an optimizer it is plain autograd's: nothing is divided, and gradients are each rank's own.
        """
        import torch

        with torch.enable_grad():
            if self.updates:
                self.ds.backward(loss * scale)
            else:
                (loss * scale).backward()

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

    def of_first_rank(self, values: torch.Tensor) -> torch.Tensor:
        """Give every rank the first one's tensor, in place: what all must have the same, to the bit."""
        import torch.distributed as dist

        if self.world_size > 1:
            dist.broadcast(values, src=0)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        barrier()

    def share(self, parameter: nn.Parameter) -> tuple[torch.Tensor, int, int]:
        """This rank's share of a parameter, flat; the number of its first element; the elements of the whole."""
        return bare.share(self, parameter)

    def drop_gathered(self) -> None:
        """Say that shares have been written, so that whole copies of them are of no use any more."""
        bare.drop_gathered(self)

    @contextlib.contextmanager
    def gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Whole parameters on every rank while inside, at any stage; all ranks must enter."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None, enabled=self.stage == 3):
            yield

    def close(self) -> None:
        """Take DeepSpeed off the model and let go of all that it holds, so that another engine can follow."""
        self.ds.destroy()
        del self.ds, self.optimizer

    @property
    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that this engine trains with their names, in the model's order."""
        return [(name, p) for name, p in self.module.named_parameters() if id(p) in self._trained]

    @property
    def trained_names(self) -> list[str]:
        """The names of the parameters that this engine trains, sorted."""
        return sorted(name for name, _ in self.trained)

    @contextlib.contextmanager
    def every_gradient(self) -> Iterator[None]:
        """Check that a gradient reaches every trained parameter while inside; a run that it does not is no attack.

        Raises:
            JobError: On leaving, with the names of the parameters that none has reached.
        """
        reached: set[str] = set()
        named = self.trained
        handles = [p.register_hook(lambda _, name=name: reached.add(name)) for name, p in named]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        missed = [name for name, _ in named if name not in reached]
        if missed:
            raise JobError(
                f"No gradient reaches {len(missed)} of {len(named)} trained parameters, such as "
                f"{', '.join(missed[:3])}: the run would not be the training that it claims. Please report it with the "
                "configuration."
            )

    def save(self, folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
        """Write checkpoint `step<N>` so that it appears whole or not at all; the oldest beyond `keep` go.

        Frozen parameters are left out: they come from the model's own folder.
        """
        import torch.distributed as dist

        temporary, name = folder / f"tmp-step{step}", f"step{step}"
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("tmp-*"):
                shutil.rmtree(left)
        self.barrier()
        if self.updates:
            self.ds.save_checkpoint(
                str(folder),
                tag=temporary.name,
                client_state={"dlrscale": state},
                save_latest=False,
                exclude_frozen_parameters=True,
            )
        else:
            bare.save(self, temporary, state)
        self.barrier()
        shares: list[dict[str, tuple[int, str]]] = [{}] * self.world_size
        dist.all_gather_object(shares, _on_disk(temporary, files_of(temporary)[self.rank :: self.world_size]))
        if self.rank == 0:
            whole = {"step": step, "world_size": self.world_size, "stage": self.stage, "trained": self.trained_names}
            whole["files"] = {file: entry for share in shares for file, entry in share.items()}
            record.write_atomic(temporary / WHOLE, json.dumps(whole))
            if (folder / name).exists():
                shutil.rmtree(folder / name)
            os.replace(temporary, folder / name)
            for old in checkpoints(folder)[:-keep]:
                shutil.rmtree(folder / f"step{old}")
            for converted in folder.glob("universal-*"):
                shutil.rmtree(converted)
        self.barrier()

    def load(self) -> dict[str, Any]:
        """Load the checkpoint that this engine was made for, converting it where another layout wrote it.

        Returns:
            The state that `save` was given.

        Raises:
            ConfigError: If it trains other parameters, or cannot be converted.
            JobError: If DeepSpeed cannot read it.
        """
        import torch.distributed as dist

        folder, step = self.checkpoint.folder, self.checkpoint.step
        name = f"step{step}"
        if read_whole(folder / name)["trained"] != self.trained_names:
            raise ConfigError(
                f"{folder}/{name} holds other parameters than this run trains. Start it in another --out."
            )
        if not self.updates:
            return bare.load(self, folder / name, self.checkpoint.written.ranks)
        if self.layout.reads(self.checkpoint.written) == "universal":
            told: list[Any] = [None]
            if self.rank == 0:
                try:
                    told = [convert(folder, step)]
                except ConfigError as error:
                    told = [error]
            dist.broadcast_object_list(told, src=0)
            if isinstance(told[0], ConfigError):
                raise told[0]
            name = told[0]
        path, state = self.ds.load_checkpoint(str(folder), tag=name, load_module_strict=False)
        if path is None:
            raise JobError(f"DeepSpeed could not load {folder}/{name}. Delete that folder to go on from an older one.")
        schedule = self.ds.lr_scheduler
        if self.own_schedule and schedule.last_batch_iteration >= 0:
            # DeepSpeed restores the schedule's step, but sets its rate only after the next one.
            for group, lr in zip(self._inner_optimizer.param_groups, schedule.get_lr(), strict=True):
                group["lr"] = lr
        return state["dlrscale"]


def _names(tensors: list[torch.Tensor]) -> str:
    """The dtypes of some tensors in words."""
    return ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))


def _on_disk(folder: Path, names: list[str]) -> dict[str, tuple[int, str]]:
    """Force files to the disk; their sizes and digests by name."""
    found = {}
    for name in names:
        with open(folder / name, "rb") as handle:
            os.fsync(handle.fileno())
        found[name] = ((folder / name).stat().st_size, sha256(folder / name))
    return found
