"""A case of ranks.py: what DeepSpeed holds on each rank around the third step of a tiny model of odd sizes."""

from __future__ import annotations

import gc
import time
import weakref
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dlrscale import engine
from dlrscale.config import AttackConfig
from dlrscale.engine.held import held


STEPS = 3  # the trace of stage 3 is complete in the second
gc.freeze()  # what is imported so far; a collection has little to look at then


class Live(TorchDispatchMode):
    """Bytes of all storages that were made inside and are alive, and the most of them since `reset`."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def reset(self) -> int:
        """Forget the peak; returns what is alive."""
        self.most = self.now
        return self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(found)[0]:
            if torch.is_tensor(tensor) and tensor.device.type != "meta":
                self.add(tensor.untyped_storage())
        return found

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class Odd(nn.Module):
    """Odd sizes, so that every padding shows; "some" trains the small factors beside each layer, as LoRA does."""

    def __init__(self, trained: str, scale: int = 1):
        super().__init__()
        torch.manual_seed(0)
        d, f = 7 * scale, 23 * scale
        self.embed = nn.Embedding(37, d)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(d, f), "a": nn.Linear(d, 3, bias=False), "b": nn.Linear(3, f)})
            for _ in range(3)
        )
        self.down = nn.ModuleList(nn.Linear(f, d) for _ in range(3))
        self.head = nn.Linear(d, 41, bias=False)
        for name, p in self.named_parameters():
            p.requires_grad_(trained == "all" or ".a." in name or ".b." in name)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer, down in zip(self.layers, self.down, strict=True):
            x = x + down(torch.tanh(layer["up"](x) + layer["b"](layer["a"](x))))
        return self.head(x).float().logsumexp(-1).mean()


def run(case: dict) -> dict:
    """The parameters in their order and, for every rank, what it held: after the backward, and at most at any hook.

    With `peaks`, also all bytes alive before the step, and the most of them in the passes and in the step.
    """
    config = AttackConfig(
        model="", data="", out="", dtype=case["dtype"], zero=case["zero"], num_ranks=case["ranks"], micro_batch=1,
        offload_optimizer=case.get("offload_optimizer", False), offload_param=case.get("offload_param", False),
        accumulation=case.get("accumulation", 1), lr=1e-3,
    )  # fmt: skip
    ds_config = engine.merge(config) | case.get("file", {})
    ds_config["zero_optimization"] |= case.get("zero_optimization", {})
    if "foreach" in case:
        ds_config["optimizer"]["params"]["foreach"] = case["foreach"]  # torch's choice on CUDA
    ids = torch.arange(case.get("tokens", 5))
    live = Live()
    with live if case.get("peaks") else nullcontext():
        model = Odd(case["trained"], case.get("scale", 1))
        weights = [(p.numel(), p.requires_grad) for p in model.parameters()]
        factored = sum(sum(p.shape) for p in model.parameters() if p.requires_grad)  # rows and columns of a matrix
        ds = engine.Engine(model, [p for p in model.parameters() if p.requires_grad], ds_config)
        seen: dict[str, int] = {}

        def sample(*_) -> None:
            for name, sides in held(ds).items():
                seen[name] = max(seen.get(name, 0), sum(sides.values()))

        for module in model.modules() if not case.get("peaks") else ():
            module.register_forward_hook(sample)
        for p in model.parameters() if not case.get("peaks") else ():
            if p.requires_grad:
                p.register_hook(sample)
        for step in range(STEPS):
            ds.set_lr(1e-3)
            if case.get("peaks") and step == STEPS - 1:
                gc.collect()
            live.reset()
            for micro in range(config.accumulation):
                ds.boundary(micro == config.accumulation - 1)
                ds.backward(ds.ds(ids), 1.0)
            backward, now = live.most, held(ds)
            if case.get("peaks") and step == STEPS - 1:
                gc.collect()
                time.sleep(0.1)  # gloo lets go of what it has sent in a thread of its own
            before = live.reset()
            ds.step()
            peaks = {"backward": backward, "before": before, "step": live.most}
    every: list = [None] * ds.world_size
    dist.all_gather_object(every, {"now": now, "seen": seen, "peaks": peaks})
    found = {"weights": weights, "factored": factored, "config": ds_config, "ranks": every}
    return found | {"describe": ds.describe()}
