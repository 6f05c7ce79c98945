"""The lever `--tiles`: an MLP or DLR-Net runs forward and backward on one piece of the tokens after the other.

Position-wise modules do not mix tokens, so f(x) = [f(x_1); ..; f(x_T)] exactly. Each piece keeps its input alone, a
view of x, and runs again going backward: what f saves lives for ceil(n / T) of the n tokens at a time. autograd sums
the pieces' weight gradients before it hands them on, so that DeepSpeed sees one gradient per weight.

Idea: ALST (arXiv 2506.13996), DeepSpeed's TiledMLP. Here each piece is a checkpoint of torch's, which works at every
ZeRO stage and inside checkpointed layers; DeepSpeed's TiledMLP sets flags of ZeRO-3 parameters instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def forward(function: Callable[[torch.Tensor], torch.Tensor], tiles: int, x: torch.Tensor) -> torch.Tensor:
    """Apply a position-wise function piece by piece.

    Args:
        function: (n, D) -> (n, D), for any n.
        tiles: T, the number of pieces; ragged where it does not divide the tokens, and at most one per token.
        x: (..., D).

    Returns:
        (..., D).
    """
    rows = x.reshape(-1, x.shape[-1])
    pieces = rows.tensor_split(min(tiles, len(rows)))
    return torch.cat([checkpoint(function, piece, use_reentrant=False) for piece in pieces]).view(x.shape)
