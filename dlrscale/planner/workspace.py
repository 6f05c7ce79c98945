"""What lives for a moment beside the saved tensors: logits and loss, and the gradients of one layer's inside."""

from __future__ import annotations

from dlrscale.planner import forward
from dlrscale.planner.forward import Pass
from dlrscale.planner.tape import FP32


def logits_bytes(run: Pass) -> int:
    """The logits of a micro-batch in the model's precision."""
    return run.batch * run.length * run.shape.vocabulary * run.size


def loss_forward_bytes(run: Pass) -> int:
    """Beside what is saved, while the last chunk's loss is taken: the logits, its rows, and their fp32 copy."""
    rows = forward.loss_chunks(run)[-1] * run.shape.vocabulary
    return logits_bytes(run) + rows * (run.size + FP32 if run.size != FP32 else FP32)


def loss_backward_bytes(run: Pass) -> int:
    """Beside what is saved, while the first chunk that backward meets is done.

    The gradients of its log-probabilities and of its fp32 rows, those in the model's precision, and two gradients of
    all logits: one that a chunk's rows are put into, and the sum over chunks.
    """
    rows = forward.loss_chunks(run)[-1] * run.shape.vocabulary
    return rows * (2 * FP32 + (run.size if run.size != FP32 else 0)) + 2 * logits_bytes(run)


def layer_bytes(run: Pass, layer: int) -> int:
    """Beside what is saved, while a layer's backward runs: an estimate, the largest of its parts'.

    The gradient of the stream, twice where the residual splits it, and of the widest part its inner gradients: an MLP's
    three of inner width, a DLR-Net's of one block and of x and d, attention's of q, k, v, or of all pairs.
    """
    shape, parts, tokens = run.shape, run.parts, run.batch * run.length
    stream = 2 * tokens * shape.width * run.size
    if shape.ranks and layer in shape.ranks:
        mlp = tokens * (4 * max(shape.ranks[layer]) + 2 * shape.width) * run.size
    else:
        mlp = tokens * 3 * shape.inner * run.size
    heads = parts.heads * parts.head_dim
    attention = tokens * (heads + 2 * parts.kv_heads * parts.head_dim + heads) * run.size
    if run.attention == "eager":
        attention += 2 * run.batch * parts.heads * run.length**2 * FP32
    return stream + max(mlp, attention)
