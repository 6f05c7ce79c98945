"""A case of ranks.py: what DeepSpeed holds on each rank around the third step of a tiny model of odd sizes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from dlrscale import engine
from dlrscale.config import AttackConfig
from dlrscale.engine.held import held


class Odd(nn.Module):
    """Odd sizes, so that every padding shows; "some" trains the small factors beside each layer, as LoRA does."""

    def __init__(self, trained: str):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(37, 7)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(7, 23), "a": nn.Linear(7, 3, bias=False), "b": nn.Linear(3, 23)})
            for _ in range(3)
        )
        self.down = nn.ModuleList(nn.Linear(23, 7) for _ in range(3))
        self.head = nn.Linear(7, 41, bias=False)
        for name, p in self.named_parameters():
            p.requires_grad_(trained == "all" or ".a." in name or ".b." in name)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer, down in zip(self.layers, self.down, strict=True):
            x = x + down(torch.tanh(layer["up"](x) + layer["b"](layer["a"](x))))
        return self.head(x).float().logsumexp(-1).mean()


def run(case: dict) -> dict:
    """The parameters in their order and, for every rank, what it held: after the backward, and at most at any hook."""
    config = AttackConfig(
        model="", data="", out="", dtype=case["dtype"], zero=case["zero"], num_ranks=case["ranks"], micro_batch=1,
        offload_optimizer=case.get("offload_optimizer", False), offload_param=case.get("offload_param", False),
        accumulation=case.get("accumulation", 1), lr=1e-3,
    )  # fmt: skip
    ds_config = engine.merge(config) | case.get("file", {})
    ds_config["zero_optimization"] |= case.get("zero_optimization", {})
    model = Odd(case["trained"])
    weights = [(p.numel(), p.requires_grad) for p in model.parameters()]
    ds = engine.Engine(model, [p for p in model.parameters() if p.requires_grad], ds_config)
    seen: dict[str, int] = {}

    def sample(*_) -> None:
        for name, sides in held(ds).items():
            seen[name] = max(seen.get(name, 0), sum(sides.values()))

    for module in model.modules():
        module.register_forward_hook(sample)
    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(sample)
    for _ in range(case.get("steps", 3)):
        for micro in range(config.accumulation):
            ds.boundary(micro == config.accumulation - 1)
            ds.backward(ds.ds(torch.arange(5)), 1.0)
        now = held(ds)
        ds.step()
    every: list = [None] * ds.world_size
    dist.all_gather_object(every, {"now": now, "seen": seen})
    return {"weights": weights, "config": ds_config, "ranks": every, "describe": ds.describe()}
