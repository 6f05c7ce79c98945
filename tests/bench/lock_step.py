"""Our lock step, one layer's backward at a time, against all layers' losses in one graph and one backward."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from common import Sizes, in_turns

from dlrscale import data, engine, shapes, surgery
from dlrscale.config import LockConfig
from dlrscale.data import StepBatch
from dlrscale.distil import Distiller, forward, token_error
from dlrscale.engine import Engine
from dlrscale.measure import Phases, SavedBytes

LR, WARMUP = 1e-3, 2


class Straight(Distiller):
    """The same objective as one would write it first: every layer's loss is kept, and their sum goes backward."""

    def distil_step(self, engine: Engine, batch: StepBatch, phases: Phases) -> dict[str, float]:
        """One step; loss and gradients are those of `Distiller.distil_step`."""
        sums = torch.zeros((), dtype=torch.float64, device=engine.device)
        scale = engine.world_size * len(batch.micro_batches) / batch.tokens
        losses: list[torch.Tensor] = []

        def visit(switch: surgery.Switch, x: torch.Tensor, y: torch.Tensor) -> None:
            with torch.enable_grad():
                x, floor = x.detach(), self.floors[switch.layer]
                per_token = token_error(switch.net(x), y.detach(), floor)
                if self.config.harden:
                    flat = token_error(switch.net(x, flat=True), y.detach(), floor)
                    per_token = per_token + self.config.harden_weight * F.relu(self.config.harden_target - flat)
                losses.append((per_token * mask).sum())

        for index, micro in enumerate(batch.micro_batches):
            engine.boundary(index == len(batch.micro_batches) - 1)
            micro = {k: v.to(engine.device) for k, v in micro.items()}
            mask = micro["attention_mask"].float().flatten()
            with phases.phase("distil"):
                losses.clear()
                with torch.no_grad(), surgery.mode(self.switches, "teacher", visit):
                    forward(engine, micro)
                with torch.enable_grad():
                    loss = torch.stack(losses).sum()
                engine.backward(loss, scale)
                losses.clear()
            sums += loss.detach().double()
        with phases.phase("optimizer"):
            norm = engine.step()
        mean = float(engine.sum_over_ranks(sums)) / (batch.tokens * len(self.switches))
        return {"loss/train": mean, "optim/grad_norm": norm}


class Side:
    """One of the two ways on its own model and engine."""

    def __init__(self, kind: type[Distiller], sizes: Sizes, ranks: int, depth: int):
        config = LockConfig(
            model="", data="", out="", zero=2, num_ranks=ranks, micro_batch=sizes.batch, seq_len=sizes.length,
            depth=depth, lr=LR,
        )  # fmt: skip
        model = sizes.llama()
        switches = surgery.install(model, shapes.model_shape(model.config.to_dict()), config)
        self.distiller = kind(switches, config)
        self.engine = Engine(model, self.distiller.parameters, engine.merge(config))
        self.phases = Phases(self.engine.device)
        tokens = sizes.data(64)
        self.batches = data.Batches(
            tokens, seed=0, micro_batch=sizes.batch, accumulation=1, rank=self.engine.rank, world_size=ranks, pad_id=0
        )
        self.distiller.calibrate(self.engine, data.calibration(tokens, 2))
        self.done = 0

    def step(self) -> dict[str, float]:
        """One step."""
        self.engine.set_lr(LR)
        found = self.distiller.distil_step(self.engine, self.batches.step(self.done), self.phases)
        self.done += 1
        return found

    def tokens_per_s(self, block: int) -> float:
        """Tokens per second over a block of steps."""
        engine.barrier()
        tokens = sum(self.batches.step(k).tokens for k in range(self.done, self.done + block))
        start = time.perf_counter()
        for _ in range(block):
            self.step()
        return tokens / (time.perf_counter() - start)

    def checked_step(self) -> tuple[dict[str, float], dict[str, torch.Tensor], list[int]]:
        """A step with every hook on: what it returns, all gradients, and the bytes saved before each backward."""
        gradients: dict[str, torch.Tensor] = {}
        named = [(n, p) for n, p in self.engine.module.named_parameters() if p.requires_grad]

        def keep(name: str) -> Any:
            def hook(gradient: torch.Tensor) -> None:
                gradients[name] = gradients.get(name, 0) + gradient.clone()

            return hook

        handles = [p.register_hook(keep(name)) for name, p in named]
        saved, backward = [0], self.engine.backward
        counter = SavedBytes(self.engine.module)

        def counted(loss: torch.Tensor, scale: float) -> None:
            saved.append(counter.total)
            backward(loss, scale)

        self.engine.backward = counted
        try:
            with counter:
                found = self.step()
        finally:
            del self.engine.backward
            for handle in handles:
                handle.remove()
        return found, gradients, [after - before for before, after in zip(saved, saved[1:], strict=False)]


def same(ours: tuple[dict, dict], straight: tuple[dict, dict]) -> float:
    """The largest relative difference of losses and gradients; both sides must do the same."""
    (loss, gradients), (other_loss, others) = ours, straight
    assert gradients.keys() == others.keys()
    assert gradients
    key = "loss/train"
    apart = [abs(loss[key] - other_loss[key]) / other_loss[key]]
    apart += [float((gradients[n] - others[n]).abs().max() / others[n].abs().max()) for n in gradients]
    assert max(apart) < 1e-4, f"the two lock steps differ by {max(apart)}"
    return max(apart)


def compare(sizes: Sizes, rank: int, ranks: int, *, depth: int, pairs: int, block: int) -> dict[str, Any]:
    """Tokens per second in turns, and the bytes saved at once; before that, that both do the same."""
    sides = {"ours": Side(Distiller, sizes, ranks, depth), "straight": Side(Straight, sizes, ranks, depth)}
    checked = {name: side.checked_step() for name, side in sides.items()}
    apart = same(checked["ours"][:2], checked["straight"][:2])
    for side in sides.values():
        for _ in range(WARMUP):
            side.step()
    speeds = in_turns({name: lambda s=side: s.tokens_per_s(block) for name, side in sides.items()}, pairs)
    saved = {name: found[2] for name, found in checked.items()}
    return {
        "tokens_per_s": speeds,
        "saved_at_once": {name: max(values) for name, values in saved.items()},
        "backwards": {name: len(values) for name, values in saved.items()},
        "layers": sizes.layers,
        "apart": apart,
    }
