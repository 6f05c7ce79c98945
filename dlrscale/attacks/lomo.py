"""The gradient method `lomo`: plain SGD whose update happens inside backward, so that gradients do not gather.

As soon as backward has all of a parameter's gradient, a hook sums that gradient over the ranks, and

    theta <- theta - lr dL/dtheta,    with L the mean loss over all label tokens of the step,

and lets go of it. So one parameter's gradient lives at a time, and there are no masters and no optimizer states. With
tied weights it is the sum of both uses, which comes when backward has been through both; what checkpointing runs again
has run before. A weight that backward still needed would make autograd raise, not go wrong.

The clip is LOMO's own where no second backward is made: `clip` bounds each element of the gradient. The norm that is
reported is that of the whole gradient before it. At ZeRO-3 each rank writes its share of the weights only, but sums
whole gradients. In 16 bits the update is rounded stochastically (attacks/rounding.py): there is no fp32 copy.

Gradients of several micro-batches would each have to be kept until the last one, which is what LOMO does without:
--accumulation must be 1. fp16 would need a scaled loss, whose gradients are checked before an update.

Lv et al., arXiv 2306.09782 (LOMO).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dlrscale.attacks import rounding
from dlrscale.config import AttackConfig
from dlrscale.data import StepBatch
from dlrscale.engine import Engine
from dlrscale.evaluate import cross_entropy_sum
from dlrscale.measure import Phases, SavedBytes
from dlrscale.train import TIMING_WARMUP_STEPS, counted_forward


def faults(config: AttackConfig) -> list[str]:
    """What lomo cannot do of a configuration, one sentence each."""
    found = []
    if config.accumulation > 1:
        found.append(
            f"--accumulation {config.accumulation}: lomo updates inside each backward and keeps no gradient to add to. "
            "Take --accumulation 1 and a larger --micro-batch, or --strategy ckpt-layer."
        )
    if config.dtype == "fp16":
        found.append("--dtype fp16: lomo has no loss scale, so small gradients would be lost. Take bf16.")
    return found


def objective(config: AttackConfig, counter: SavedBytes | None = None) -> Lomo:
    """The objective of a run; see `attacks`."""
    return Lomo(config.seed, float(config.knobs["clip"]), counter)


class Lomo:
    """A step of LOMO, as `train.Objective`; `counted` and `seen` as in `train.LanguageModelling`.

    Args:
        seed: What the rounding in 16 bits depends on, besides the step.
        clip: The largest absolute value of a gradient's element; 0: any.
        counter: Counts the bytes saved for backward in the first forward, if given.
    """

    def __init__(self, seed: int, clip: float, counter: SavedBytes | None = None):
        self.seed, self.clip, self.counter = seed, clip, counter
        self.counted: dict[str, float] = {}
        self.seen: dict[str, Any] = {}
        self._steps = 0

    def __call__(self, engine: Engine, batch: StepBatch, phases: Phases) -> dict[str, float]:
        """One step.

        Args:
            engine: An engine without an optimizer.
            batch: The step's batch, of one micro-batch.
            phases: Where the time of `forward`, `backward` and `optimizer` goes.

        Returns:
            `loss/train` in nats per token, and `optim/grad_norm` before the clip.
        """
        (micro,) = batch.micro_batches
        micro = {k: v.to(engine.device) for k, v in micro.items()}
        squares = torch.zeros((), dtype=torch.float64, device=engine.device)

        def loss() -> torch.Tensor:
            logits = engine.module(
                input_ids=micro["input_ids"], attention_mask=micro["attention_mask"], use_cache=False
            ).logits
            return cross_entropy_sum(logits, micro["labels"])[0]

        with self._fused(engine, batch.number, squares):
            with phases.phase("forward"):
                nats = counted_forward(self, loss, micro)
            with phases.phase("backward"):
                engine.backward(nats, 1 / batch.label_tokens)
        self._steps += 1
        if self._steps == TIMING_WARMUP_STEPS:
            self.seen["held"] = engine.held()
        with phases.phase("optimizer"):
            engine.drop_gathered()
        total = engine.sum_over_ranks(nats.detach().double())
        return {"loss/train": float(total) / batch.label_tokens, "optim/grad_norm": float(squares.sqrt())}

    @contextlib.contextmanager
    def _fused(self, engine: Engine, step: int, squares: torch.Tensor) -> Iterator[None]:
        """While inside, every gradient becomes an update as soon as it is whole; its square is added to `squares`."""

        def update(index: int, parameter: nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad.contiguous(), None
            engine.sum_over_ranks(gradient)
            squares.add_(torch.linalg.vector_norm(gradient, dtype=torch.float64).square())
            if self.clip:
                gradient.clamp_(-self.clip, self.clip)
            own, first, numel = engine.share(parameter)
            flat = gradient.view(-1)
            for piece in rounding.pieces(numel, first, own.numel()):
                source = rounding.generator(engine.device, self.seed, step, index, piece.number)
                part = own[piece.first - first : piece.last - first]
                rounding.add(part, flat[piece.first : piece.last], -engine.lr, piece, source)

        handles = [
            parameter.register_post_accumulate_grad_hook(lambda p, index=index: update(index, p))
            for index, (_, parameter) in enumerate(engine.trained)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
