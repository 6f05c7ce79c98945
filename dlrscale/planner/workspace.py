"""What lives for a moment beside the saved tensors: logits and loss, and the gradients inside one layer.

Estimates, derived from the order in which autograd frees and makes; tests/unit/test_planner_plan.py holds them against
an exact count of live tensors. V vocabulary, n tokens, c label tokens of a chunk of the loss, s bytes of an element.
"""

from __future__ import annotations

from dlrscale.planner import forward
from dlrscale.planner.activations import Activations
from dlrscale.planner.forward import Pass
from dlrscale.planner.tape import DEVICE, FP32, HOST
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

    In tiles this is one piece's, beside the gradient that comes in, s n D, and the sum of the pieces' gradients of x,
    each of them made as long as x: 2 s n D.
    """
    run, tokens = kept.run, kept.run.batch * kept.run.length
    whole = tokens * run.shape.width * run.size
    if run.tiles == 1:
        return tokens * _mlp_bytes_per_token(run, layer)
    piece = -(-tokens // min(run.tiles, tokens))
    return 2 * whole + max(whole, piece * _mlp_bytes_per_token(run, layer))


def _mlp_bytes_per_token(run: Pass, layer: int) -> int:
    """The moments of one token.

    An MLP is one block of width R = F. In the last block: the gradient of the stream, and of product, activation and up
    (of two matrices the last two), when the input of the last map has gone. Or one block later, when the last block's
    saved elements have gone: the gradients of d, x and u, the scaled one of d and the sum of both. Adapters add their
    branches' two of the stream. In nested segments a whole one has just come back then, and one border has gone. What
    comes back from the host or out of codes stands beside: the product's factors, from the host the whole storage of a
    fused map; out of codes in fp32 first.
    """
    shape, training = run.shape, run.training
    form = FORMS[shape.form] if shape.ranks and layer in shape.ranks else None
    ranks = shape.ranks[layer] if form else (shape.inner,)
    gated = form.gated if form else shape.family.gated
    if form and run.anchor is not None:
        return _reversed_bytes_per_token(run, max(ranks), gated)
    changed, rank = "mlp" in training.trained | training.adapted, ranks[-1]
    elements = shape.width + (3 if gated else 2) * rank - changed * rank
    if len(ranks) > 1:
        gone = changed * (shape.width + rank) + (3 if gated else 1) * rank
        most = (5 + 2 * ("mlp" in training.adapted)) * shape.width
        elements = max(elements, most - (shape.width if run.checkpointing == "nested" else gone))
    if run.checkpointed or run.storage == DEVICE:
        return elements * run.size
    back = (2 if gated else 1) * rank
    if run.storage == HOST:
        return (elements + back + rank * (gated and bool(form or shape.family.fused))) * run.size
    return (elements + back) * run.size + FP32 * rank


def _reversed_bytes_per_token(run: Pass, rank: int, gated: bool) -> int:
    """Going backward through a reversed DLR-Net (attacks/reverse.py), with w bytes an element of its stream.

    In a block: the gradients of d and x and the rebuilt d, 3 w D; the gradient that came in, B's product and u, 3 s D;
    the code again with what lies before it, and the gradients of all of these. Or where the next block begins: its d
    and b d beside, and of the block before u with its gradient.
    """
    size, wide, width = run.size, max(run.size, FP32), run.shape.width
    inside = (3 * wide + 3 * size) * width + (9 if gated else 5) * rank * size
    turn = (4 * wide + (6 if wide > size else 5) * size) * width
    return max(inside, turn)


def attention_bytes(kept: Activations) -> int:
    """Beside what is saved, at the highest moment of the backward of a layer's attention.

    The gradients of the stream, of the output map's input, and of q, k and v; written out, two fp32 gradients of all
    pairs. What comes back from the host, q, k, v and the output, stands beside.
    """
    run, parts = kept.run, kept.run.parts
    inner, narrow = parts.heads * parts.head_dim, parts.kv_heads * parts.head_dim
    back = 2 * inner + 2 * narrow if run.storage == HOST and not run.checkpointed else 0
    tokens = run.batch * run.length * (run.shape.width + 2 * inner + 2 * narrow + back) * run.size
    pairs = 2 * run.batch * parts.heads * run.length**2 * FP32 if run.attention == "eager" else 0
    return tokens + pairs


def passing_bytes(run: Pass) -> dict[str, int]:
    """What lives in the forward of the last layer that keeps nothing: what a side network has kept so far, and inside.

    The embedding's output, the layer's input, the stream behind its attention and the norm, 4 D; and of an MLP the
    activation, up and the product, of a DLR-Net d, u and a block's output beside one block of these, or of the
    attention q, k, v and what rotates them.
    """
    shape, parts, ranks = run.shape, run.parts, run.shape.ranks or {}
    form = FORMS[shape.form] if 0 in ranks else None
    inner = max(ranks[0]) if form else shape.inner
    gated = form.gated if form else shape.family.gated
    mlp = (3 if gated else 2) * inner + (3 if form else 0) * shape.width
    attention = 3 * (parts.heads + parts.kv_heads) * parts.head_dim + parts.heads * run.length * (
        2 if run.attention == "eager" else 0
    )
    token = run.batch * run.length * run.size
    kept = shape.layers * shape.width if run.training.side else 0
    return {"saved tensors": token * kept, "inside a layer": token * (4 * shape.width + max(mlp, attention))}


def norm_bytes(kept: Activations) -> int:
    """Beside what is saved, in the backward of the final norm: the gradients of its factors in fp32, 5 D."""
    return kept.run.batch * kept.run.length * 5 * kept.run.shape.width * FP32


def side_bytes(kept: Activations) -> int:
    """Beside what is saved, at the highest moment of the backward of a side network's layer, in its MLP.

    The gradients of the stream, of the product and both its factors, and of the fused map's output, when the product
    has gone.
    """
    run = kept.run
    return run.batch * run.length * 9 * run.training.side * run.size
