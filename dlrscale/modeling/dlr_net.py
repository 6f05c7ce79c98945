"""The deep low-rank residual network (DLR-Net) that stands in the place of an MLP. Needs torch alone.

    d_0 = 0;  d_{k+1} = d_k + B_k s(A_k n(x + b d_k));  out = d_K  (+ bias)

This is the residual network h_{k+1} = h_k + B_k s(A_k n(h_k)) on h = x / b + d without the cancellation of
out = h_K - h_0. It is our reading of the abstract of DLR-Lock (arXiv 2605.10777): the paper's own block is not
known to us.

Shapes: x (..., D); A_k (R_k, D), or (2 R_k, D) in the gated form; B_k (D, R_k); b a scalar without a unit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

# form -> (gated, with a norm in front of A)
FORMS = {"gated": (True, False), "plain": (False, False), "prenorm": (False, True)}
EPSILON = 1e-6


def rms_normalise(u: torch.Tensor) -> torch.Tensor:
    """u / rms(u) over the last dimension, with the norm taken in fp32.

    For backward it keeps u, the norm and the divisor: D + 2 numbers per token.
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True, dtype=wide)
    return u / (norm * u.shape[-1] ** -0.5 + EPSILON).to(u.dtype)


class DLRBlock(nn.Module):
    """One low-rank block: B s(A u), or B (s(A1 u) * (A2 u)) with A1 and A2 fused in one linear."""

    def __init__(self, width: int, rank: int, gated: bool, bias: bool):
        super().__init__()
        self.a_proj = nn.Linear(width, rank * (2 if gated else 1), bias=bias)
        self.b_proj = nn.Linear(rank, width, bias=False)


class DLRNet(nn.Module):
    """A DLR-Net of K = len(ranks) blocks.

    Args:
        width: D.
        ranks: R_k of each block.
        form: `gated`, `plain` or `prenorm`.
        activation: s, the module that the base MLP applies.
        bias: Whether each A_k has a bias and the net an output bias.
        dropout: Dropout probability on the output, as the base MLP has it.
    """

    def __init__(
        self,
        width: int,
        ranks: Sequence[int],
        form: str,
        activation: Callable[[torch.Tensor], torch.Tensor],
        bias: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.form = form
        self.gated, self.norm = FORMS[form]
        self.blocks = nn.ModuleList(DLRBlock(width, rank, self.gated, bias) for rank in ranks)
        self.activation = activation
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.register_buffer("b", torch.zeros(()))

    def forward(self, x: torch.Tensor, flat: bool = False) -> torch.Tensor:
        """Apply the net.

        Args:
            x: (..., D).
            flat: Let every block read x alone, which is what flattening the net gives.

        Returns:
            (..., D).
        """
        return self.finish(self.through(self.blocks, x, None, flat))

    def through(
        self, blocks: Iterable[DLRBlock], x: torch.Tensor, d: torch.Tensor | None, flat: bool = False
    ) -> torch.Tensor:
        """Go through some consecutive blocks: d before them (None: zero) to d behind them, (..., D)."""
        for block in blocks:
            out = block.b_proj(self.code(block, x if d is None or flat else x + self.b * d))
            d = out if d is None else d + out
        return d

    def code(self, block: DLRBlock, u: torch.Tensor) -> torch.Tensor:
        """What goes into B_k, (..., R_k), for u = x + b d_k, (..., D)."""
        hidden = block.a_proj(rms_normalise(u) if self.norm else u)
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            return self.activation(gate) * up
        return self.activation(hidden)

    def finish(self, d: torch.Tensor) -> torch.Tensor:
        """The output of d_K: with the bias, and with the dropout."""
        if self.bias is not None:
            d = d + self.bias
        return d if self.dropout is None else self.dropout(d)


def locked_layers(config) -> Iterator[tuple[int, list[int], str]]:
    """Index, ranks and form of each locked layer that a model's configuration names in `dlr`."""
    for index, ranks in (config.dlr or {"ranks": {}})["ranks"].items():
        yield int(index), ranks, config.dlr["form"]


class Locked:
    """Goes in front of a model's class: tells transformers how a DLR-Net's own tensors start where no file has them."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DLRNet):
            nn.init.zeros_(module.b)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
