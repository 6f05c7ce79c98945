"""Plans of gradient methods that update by themselves, without an optimizer of DeepSpeed's: mezo and lomo.

Model states are the weights alone, whole at stage 0 and cut at stage 3. c is the elements of a piece of the largest
trained tensor, for which random numbers are made at once (attacks/rounding.py).

- mezo: no gradients, nothing saved, two forwards. While a module runs, its weights stand there twice (`moved`, e times
  the largest trained tensor), and while they are made a piece of them in fp32, 4 c.
- lomo: `backward` is one parameter's gradient, e times the largest. With a tied embedding that is trained, the head's
  gradient waits for the embedding's through all of backward (plan.py).
- Updates of a piece: in fp32 4 c; in 16 bits the change, the sum and the noise of the rounding, 12 c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dlrscale.planner import forward
from dlrscale.planner.activations import Activations
from dlrscale.planner.forward import Pass
from dlrscale.planner.states import BACKWARD, FORWARD, STEP, Term
from dlrscale.planner.tape import FP32
from dlrscale.planner.workspace import logits_bytes
from dlrscale.shapes import FORMS

FORWARD_ONLY = ("mezo",)
UPDATES = ("mezo", "lomo")
PIECE = 1 << 22  # attacks/rounding.py


def states(found: Mapping[str, Term], gradient: str, largest: int, size: int, waiting: int) -> dict[str, Term]:
    """Model states of a method that updates by itself.

    Args:
        found: Those of a training with an optimizer, whose weights are as they are here.
        gradient: `mezo` or `lomo`.
        largest: Elements of the largest trained tensor.
        size: Bytes of an element.
        waiting: Elements of a gradient that waits through all of backward (lomo).

    Returns:
        The terms, by the names of `states.model_states`.
    """
    terms = dict.fromkeys(found, Term()) | {name: found[name] for name in ("parameters", "gathered")}
    terms["persistent"] = Term(device=found["persistent"].device, during=(FORWARD, BACKWARD))  # dropped by the update
    update = update_bytes(largest, size)
    if gradient in FORWARD_ONLY:
        return terms | {
            "moved": Term(device=moved_bytes(largest, size), during=(FORWARD,)),
            "step": Term(device=update, during=(STEP,)),
        }
    return terms | {"backward": Term(device=size * (largest + waiting) + update, during=(BACKWARD,))}


def update_bytes(largest: int, size: int) -> int:
    """What an update of a piece of the largest trained tensor, of elements of `size` bytes, takes for a moment."""
    return (4 if size == FP32 else 12) * min(largest, PIECE)


def moved_bytes(largest: int, size: int) -> int:
    """What stands beside the weights while a module runs with moved ones."""
    return size * largest + 4 * min(largest, PIECE)


def forward_bytes(run: Pass) -> int:
    """What lives at the highest moment inside a layer of a forward that saves nothing; an estimate.

    The residual stream and its norm; in an MLP gate, up, activation and product (of two matrices the first and the
    activation); in a DLR-Net x, d and what the largest block has of those; in attention q, k, v and the output, and
    written out the scores of all pairs twice in fp32.
    """
    shape, parts, tokens = run.shape, run.parts, run.batch * run.length
    most = 0
    for layer in range(shape.layers):
        form = FORMS[shape.form] if shape.ranks and layer in shape.ranks else None
        ranks = shape.ranks[layer] if form else (shape.inner,)
        gated = form.gated if form else shape.family.gated
        most = max(most, (4 if gated else 2) * max(ranks) + (3 * shape.width if form else 0))
    attention = 2 * (parts.heads + parts.kv_heads) * parts.head_dim
    pairs = 2 * run.batch * parts.heads * run.length**2 * FP32 if run.attention == "eager" else 0
    return tokens * (2 * shape.width + max(most, attention)) * run.size + pairs


def loss_bytes(run: Pass) -> int:
    """Logits, and of the last chunk's rows fp32 logits and log-probabilities."""
    return logits_bytes(run) + 2 * forward.loss_chunks(run)[-1] * run.shape.vocabulary * FP32


@dataclass(frozen=True)
class ForwardOnly(Activations):
    """Two forwards that save nothing."""

    @property
    def held_bytes(self) -> int:
        """Nothing."""
        return 0

    @property
    def peak_bytes(self) -> int:
        """Nothing."""
        return 0

    def by_part(self) -> dict[str, int]:
        """Nothing, by part."""
        return dict.fromkeys(super().by_part(), 0)

    def fused_flops(self) -> int:
        """FLOPs of fused attention kernels in both forwards."""
        return 4 * sum(layer.tape.kernel_flops for layer in self.layers)

    def flops(self) -> dict[str, int]:
        """FLOPs of both forwards."""
        once = super().flops()
        return {"forward": 2 * once["forward"], "backward": 0, "recompute": 0, "in_kernels": 0}
