"""What lives for a moment beside the saved tensors: logits and loss, and the gradients inside one layer.

Estimates, derived from the order in which autograd frees and makes; tests/unit/test_planner_plan.py holds them against
an exact count of live tensors. V vocabulary, n tokens, c label tokens of a chunk of the loss, s bytes of an element.
"""

from __future__ import annotations

from dlrscale.planner import forward
from dlrscale.planner.activations import Activations
from dlrscale.planner.forward import Pass
from dlrscale.planner.tape import FP32
from dlrscale.shapes import FORMS


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


def mlp_bytes(kept: Activations, layer: int) -> int:
    """Beside what is saved, at the highest moment of the backward of a layer's MLP or DLR-Net; one formula for both.

    An MLP is one block of width R = F. In the last block: the gradient of the stream, and of product, activation and up
    (of two matrices the last two), when the input of the last map has gone. Or one block later, when the last block's
    saved elements have gone: the gradients of d, x and u, the scaled one of d and the sum of both. Adapters add their
    branches' two of the stream.
    """
    run, shape, training = kept.run, kept.run.shape, kept.run.training
    form = FORMS[shape.form] if shape.ranks and layer in shape.ranks else None
    ranks = shape.ranks[layer] if form else (shape.inner,)
    gated = form.gated if form else shape.family.gated
    changed, rank = "mlp" in training.trained | training.adapted, ranks[-1]
    elements = shape.width + (3 if gated else 2) * rank - changed * rank
    if len(ranks) > 1:
        gone = changed * (shape.width + rank) + (3 if gated else 1) * rank
        elements = max(elements, (5 + 2 * ("mlp" in training.adapted)) * shape.width - gone)
    return run.batch * run.length * elements * run.size


def attention_bytes(kept: Activations) -> int:
    """Beside what is saved, at the highest moment of the backward of a layer's attention.

    The gradients of the stream, of the output map's input, and of q, k and v; written out, two fp32 gradients of all
    pairs.
    """
    run, parts = kept.run, kept.run.parts
    inner, narrow = parts.heads * parts.head_dim, parts.kv_heads * parts.head_dim
    tokens = run.batch * run.length * (run.shape.width + 2 * inner + 2 * narrow) * run.size
    pairs = 2 * run.batch * parts.heads * run.length**2 * FP32 if run.attention == "eager" else 0
    return tokens + pairs


def passing_bytes(run: Pass, layer: int) -> int:
    """What lives at once in the forward of a layer that keeps nothing: the stream and what its MLP or attention makes.

    The stream, its norm, and of an MLP the activation, up and the product; of a DLR-Net x, d, u and a block's output,
    and inside the block the same; of the attention q, k, v and the output.
    """
    shape, parts = run.shape, run.parts
    form = FORMS[shape.form] if shape.ranks and layer in shape.ranks else None
    inner = max(shape.ranks[layer]) if form else shape.inner
    gated = form.gated if form else shape.family.gated
    mlp = (3 if gated else 2) * inner + (3 if form else 0) * shape.width
    heads = 2 * (parts.heads + parts.kv_heads) * parts.head_dim
    pairs = 2 * parts.heads * run.length * (run.attention == "eager")
    return run.batch * run.length * (2 * shape.width + max(mlp, heads + pairs)) * run.size


def side_bytes(kept: Activations) -> int:
    """Beside what is saved, at the highest moment of the backward of a side network's layer, in its MLP.

    The gradients of the stream, of the product and both its factors, and of the fused map's output, when the product
    has gone.
    """
    run = kept.run
    return run.batch * run.length * 9 * run.training.side * run.size
