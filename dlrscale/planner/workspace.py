"""What lives for a moment beside the saved tensors: logits and loss, and the gradients inside one layer.

Estimates, derived from the order in which autograd frees and makes; tests/unit/test_planner_plan.py holds them against
an exact count of live tensors. V vocabulary, n tokens, c label tokens of a chunk of the loss, s bytes of an element.
"""

from __future__ import annotations

from dlrscale.planner import forward
from dlrscale.planner.activations import Activations
from dlrscale.planner.forward import Pass
from dlrscale.planner.tape import FP32


def logits_bytes(run: Pass) -> int:
    """The logits of a micro-batch in the model's precision, s n V."""
    return run.batch * run.length * run.shape.vocabulary * run.size


def loss_forward_bytes(run: Pass) -> int:
    """Beside what is saved, while the last chunk's loss is taken: the logits and the chunk's rows in fp32."""
    return logits_bytes(run) + forward.loss_chunks(run)[-1] * run.shape.vocabulary * FP32


def loss_backward_bytes(run: Pass) -> int:
    """Beside all that is saved when forward ends, at the highest moment of the loss's backward.

    A chunk has the gradients of its log-probabilities and of its fp32 rows, 8 c V; from the second chunk on also the
    sum of the logits' gradients, s n V, while the log-probabilities of the chunks before have gone. At the end three
    gradients of all logits stand beside one another (two that are added, and the sum), and no log-probabilities.
    """
    total, gone, found = logits_bytes(run), 0, []
    for index, rows in enumerate(reversed(forward.loss_chunks(run))):
        pairs = rows * run.shape.vocabulary * FP32
        found.append(2 * pairs + (total if index else 0) - gone)
        gone += pairs
    return max(*found, 3 * total - gone)


def layer_bytes(kept: Activations, layer: int) -> int:
    """Beside what is saved, at the highest moment of a layer's backward.

    In an MLP the gradient of the stream and those of product, activation and up (of two matrices the last two), when
    the input of the last map has gone, and that of a trained last map's weights. In a DLR-Net either the last block's,
    of d and inside, or, when the last block's D + 4 R saved elements have gone, those of d, x and u, the scaled one of
    d and the sum of both; adapters add their branches' own. Written-out attention has two fp32 gradients
    of all pairs, when what the MLP saved has gone.
    """
    run, shape = kept.run, kept.run.shape
    tokens = run.batch * run.length
    trained, adapted = ("mlp" in parts for parts in (run.training.trained, run.training.adapted))
    weights = 0
    if shape.ranks and layer in shape.ranks:
        rank = shape.ranks[layer][-1]
        elements = max((1 + adapted) * (shape.width + 2 * rank), (4 + 2 * adapted) * shape.width - 4 * rank)
    else:
        elements = shape.width + (3 if shape.family.gated else 2) * shape.inner - (trained or adapted) * shape.inner
        weights = trained * shape.width * shape.inner
    mlp = (tokens * elements + weights) * run.size
    if run.attention != "eager":
        return mlp
    pairs = 2 * run.batch * run.parts.heads * run.length**2 * FP32
    return max(mlp, pairs - kept.layers[layer].tape.by_part().get("mlp", 0))
