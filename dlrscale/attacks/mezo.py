"""The gradient method `mezo`: SGD along one random direction, from two forward passes (SPSA).

Per step, with z ~ N(0, 1) for each trained parameter, theta all of them, and L the mean loss over all label tokens of
the step, of all ranks and micro-batches:

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps),    theta <- theta - lr g z.

z depends on the seed, the step and the parameter's place alone (attacks/rounding.py), so that it is never kept, and is
the same on all ranks; a tied weight has one z for both of its uses. Nothing is saved for backward, and there are no
gradients and no optimizer states.

The source adds eps z, subtracts 2 eps z and adds eps z in place, which does not come back to the same weights in
floating point, least of all in 16 bits. Here one module at a time gets other weights, for the time of its own forward:
its parameters' data are w + eps z, rounded to the nearest, and then the very same tensors as before. So the weights
come back to the bit, for the memory of one module's weights. At ZeRO-3 that happens to the whole weights that DeepSpeed
has gathered; the shares of the ranks are only written by the update. In 16 bits the update is rounded stochastically,
since nearly all of its elements lie below half of a weight's last place; what moves a weight by eps z in a forward does
not move one whose last place is larger than about 2 eps |z|.

Dropout, where there is any, is the same in both passes. Each step moves all n trained parameters along one direction,
sqrt(n) times as far as SGD at the same rate goes along its gradient, so --lr must be small, and smaller the larger the
trained set: tune it (--trials).

Malladi et al., arXiv 2305.17333 (MeZO); Spall 1992 (SPSA).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from dlrscale.attacks import rounding
from dlrscale.config import AttackConfig
from dlrscale.data import StepBatch
from dlrscale.engine import Engine
from dlrscale.errors import JobError
from dlrscale.evaluate import cross_entropy_sum
from dlrscale.measure import Phases, SavedBytes
from dlrscale.train import TIMING_WARMUP_STEPS, counted_forward


def objective(config: AttackConfig, counter: SavedBytes | None = None) -> Mezo:
    """The objective of a run; see `attacks`."""
    return Mezo(config.seed, float(config.knobs["eps"]), counter)


class Mezo:
    """A step of MeZO, as `train.Objective`; `counted` and `seen` as in `train.LanguageModelling`.

    Args:
        seed: What the directions depend on, besides the step.
        eps: How far the weights are moved for the two forward passes.
        counter: Counts the bytes saved for backward in the first forward, which must be none.
    """

    def __init__(self, seed: int, eps: float, counter: SavedBytes | None = None):
        self.goes_backward = False
        self.seed, self.eps, self.counter = seed, eps, counter
        self.counted: dict[str, float] = {}
        self.seen: dict[str, Any] = {}
        self._steps = 0

    def __call__(self, engine: Engine, batch: StepBatch, phases: Phases) -> dict[str, float]:
        """One step.

        Args:
            engine: An engine without an optimizer.
            batch: The step's batch; its number decides the direction.
            phases: Where the time of `forward` and `optimizer` goes.

        Returns:
            `loss/train`, the mean of both losses, and the projected gradient g; nats per token.

        Raises:
            JobError: If a trained parameter takes no part in the forward, or something was saved for backward.
        """
        totals = torch.zeros(2, dtype=torch.float64, device=engine.device)
        devices = [engine.device] if engine.device.type == "cuda" else []
        for index, sign in enumerate((1, -1)):
            with torch.random.fork_rng(devices, enabled=index == 0), torch.no_grad():
                totals[index] = self._nats(engine, batch, phases, sign * self.eps)
        # All ranks go the same way to the bit, however their sums were rounded.
        plus, minus = (engine.of_first_rank(engine.sum_over_ranks(totals)) / batch.label_tokens).tolist()
        projected = (plus - minus) / (2 * self.eps)
        self._steps += 1
        if self._steps == TIMING_WARMUP_STEPS:
            self.seen["held"] = engine.held()
        with phases.phase("optimizer"):
            self._update(engine, batch.number, engine.lr * projected)
        return {"loss/train": (plus + minus) / 2, "optim/projected_gradient": projected}

    def _nats(self, engine: Engine, batch: StepBatch, phases: Phases, moved: float) -> torch.Tensor:
        """The sum of this rank's losses with all trained weights moved by `moved` z."""
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        with self._moved(engine, batch.number, moved):
            for micro in batch.micro_batches:
                micro = {k: v.to(engine.device) for k, v in micro.items()}
                with phases.phase("forward"):
                    total += counted_forward(self, partial(_loss, engine, micro), micro).double()
        if self.seen.get("saved_bytes"):
            raise JobError(
                f"mezo saved {self.seen['saved_bytes']} bytes for backward, and must save none. Please report it with "
                "the configuration."
            )
        return total

    @contextlib.contextmanager
    def _moved(self, engine: Engine, step: int, scale: float) -> Iterator[None]:
        """While inside, each module runs with weights of its own that are moved by `scale` z."""
        places = {id(p): index for index, (_, p) in enumerate(engine.trained)}
        before: dict[int, torch.Tensor] = {}
        reached: set[int] = set()

        def enter(module: nn.Module, args: Any) -> None:
            for p in module.parameters(recurse=False):
                if id(p) in places and id(p) not in before:  # a tied one may be moved already, by a module around
                    reached.add(places[id(p)])
                    before[id(p)] = p.data
                    p.data = moved(p.data, self.seed, step, places[id(p)], scale)
                    entered.setdefault(id(module), []).append(p)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            for p in entered.pop(id(module), []):
                p.data = before.pop(id(p))

        entered: dict[int, list[nn.Parameter]] = {}
        handles = []
        for module in engine.module.modules():
            if any(id(p) in places for p in module.parameters(recurse=False)):
                # ZeRO-3 gathers in a hook of its own before, and lets go of the weights in one after.
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave, prepend=True, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        missed = [name for index, (name, _) in enumerate(engine.trained) if index not in reached]
        if missed:
            raise JobError(
                f"No forward of a module of its own reaches {len(missed)} of {len(places)} trained parameters, such as "
                f"{', '.join(missed[:3])}: mezo would not train them. Please report it with the configuration."
            )

    def _update(self, engine: Engine, step: int, scale: float) -> None:
        """theta <- theta - `scale` z, on this rank's shares."""
        for index, (_, parameter) in enumerate(engine.trained):
            own, first, numel = engine.share(parameter)
            for piece in rounding.pieces(numel, first, own.numel()):
                source = rounding.generator(engine.device, self.seed, step, index, piece.number)
                part = own[piece.first - first : piece.last - first]
                rounding.add(part, rounding.normal(piece, source), -scale, piece, source)
        engine.drop_gathered()


def _loss(engine: Engine, micro: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = engine.ds(input_ids=micro["input_ids"], attention_mask=micro["attention_mask"], use_cache=False).logits
    return cross_entropy_sum(logits, micro["labels"])[0]


def moved(weight: torch.Tensor, seed: int, step: int, index: int, scale: float) -> torch.Tensor:
    """A new tensor w + scale z, rounded to the nearest, with the z of a seed, a step and a parameter's place.

    Args:
        weight: The whole weight w.
        seed: The run's seed.
        step: The step's number.
        index: The parameter's place among the trained ones.
        scale: How far.

    Returns:
        A tensor like `weight`.
    """
    found = torch.empty_like(weight, memory_format=torch.contiguous_format)
    flat, into = weight.reshape(-1), found.view(-1)
    for piece in rounding.pieces(flat.numel()):
        z = rounding.normal(piece, rounding.generator(weight.device, seed, step, index, piece.number))
        into[piece.first : piece.last] = z.mul_(scale).add_(flat[piece.first : piece.last])
        del z  # before the next one is made
    return found
