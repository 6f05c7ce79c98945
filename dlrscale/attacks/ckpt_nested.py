"""The lever `--activation-checkpointing nested`: segments of a DLR-Net's blocks are checkpointed inside each layer.

While a layer is there again for its backward, its DLR-Net keeps the stream at the ceil(K / m) borders of segments of m
blocks, and all of one segment at a time. Per token, with D for x and for d at each inner border and s_k what block k
saves (gated: D + 4 R_k), the most that is kept is

    c(m) = D + max over segments j = 0, 1, .. of (j D + sum of s_k in segment j),

about D K / m + m (D + 4 R), smallest near m = sqrt(K D / (D + 4 R)). `shapes.segment_length` takes the smallest of all.
Source: Chen et al., arXiv 1604.06174, within one module.
"""

from __future__ import annotations

import functools

import torch
from torch.utils.checkpoint import checkpoint

from dlrscale import shapes
from dlrscale.modeling.dlr_net import DLRNet

_length = functools.cache(shapes.segment_length)


def forward(net: DLRNet, activation: str, x: torch.Tensor) -> torch.Tensor:
    """A DLR-Net's forward with its blocks checkpointed in segments.

    Args:
        net: The DLR-Net.
        activation: The name of its activation in the table of activations.
        x: (..., D).

    Returns:
        (..., D).
    """
    ranks = tuple(block.b_proj.in_features for block in net.blocks)
    length, d = _length(net.form, x.shape[-1], ranks, activation), None
    for start in range(0, len(ranks), length):
        d = checkpoint(net.through, net.blocks[start : start + length], x, d, use_reentrant=False)
    return net.finish(d)
