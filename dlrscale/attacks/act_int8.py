"""The lever `--activation-storage int8`: what the layers keep for backward is kept in 8 bits with a scale per row.

A row x (the last dimension) is kept as q = floor(127 x / s + u) with s = max |x| and u uniform in [0, 1): stochastic
rounding, so that E[s q / 127] = x and the gradients of linear maps stay unbiased. A tensor of n rows of length D takes
n (D + 4) bytes. What attention itself keeps between its linear maps (queries, keys, values, probabilities or their
log-sum) stays as it is, since it enters an exponential, as do short rows and whole numbers.

Source: ActNN, arXiv 2104.14129 (its per-group 2-bit codes are not used).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dlrscale.attacks.stored import Stored

SHORTEST_ROW = 16
LEVELS = 127


@dataclass(frozen=True)
class Codes:
    """A tensor as 8-bit codes (shape of the tensor) with a scale for each row."""

    codes: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype


class Storage(Stored):
    """Keeps rows in 8 bits; see `Stored`."""

    def __init__(self, model: nn.Module, attention: list[nn.Module]):
        super().__init__(model, attention)
        self._allowed = [True]
        for module in attention:
            for part, allowed in ((module, False), *((child, True) for child in module.children())):
                part.register_forward_pre_hook(lambda *_, allowed=allowed: self._allowed.append(allowed))
                part.register_forward_hook(self._leave, always_call=True)

    def _leave(self, *_: Any) -> None:
        self._allowed.pop()

    def key(self, tensor: torch.Tensor) -> Hashable:
        """One for each view, since its rows are its own."""
        return tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()

    @torch.no_grad()
    def keep(self, tensor: torch.Tensor) -> Codes | None:
        """Codes and scales; None for what stays as it is."""
        short = tensor.dim() < 2 or tensor.shape[-1] < SHORTEST_ROW
        if short or not tensor.is_floating_point() or not self._allowed[-1]:
            return None
        scale = tensor.detach().abs().amax(-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny)
        codes = (tensor.float() * (LEVELS / scale) + torch.rand(tensor.shape, device=tensor.device)).floor_()
        kept = Codes(codes.clamp_(-LEVELS, LEVELS).to(torch.int8), scale, tensor.dtype)
        self.bytes += kept.codes.numel() + 4 * scale.numel()
        self.saved(kept.codes)
        self.saved(scale)
        return kept

    def give(self, kept: Codes) -> torch.Tensor:
        """The tensor again, rounded."""
        return (kept.codes * (kept.scale / LEVELS)).to(kept.dtype)
