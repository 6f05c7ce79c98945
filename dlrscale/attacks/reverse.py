"""The gradient method `reverse`: a DLR-Net keeps its rank-R codes, and rebuilds its stream by subtraction.

Block k writes d_{k+1} = d_k + B_k z_k with the code z_k = s(A_k n(x + b d_k)), (..., R_k). Kept are x, the codes and
the last d; going backward, with g = dL/dd_{k+1},

    o = B_k z_k,   d_k = d_{k+1} - o,   u = x + b d_k,
    dB_k += g z_k^T,   dz = B_k^T g,   (dA_k, du) by autograd through z_k = s(A_k n(u)),
    dL/dd_k = g + b du,   dL/dx += du.

That is 2 D + sum(R) elements per token for x, d_K and the codes in place of K D + 4 sum(R) (gated), whatever K is, and
one more forward of each block. The stream is fp32 for models in 16 bits: there the sum and the difference are of the
same product, so that what the rebuild loses is fp32's rounding alone. `anchor` = m > 0 keeps d_k exactly at every m-th
block besides, D (K / m - 1) elements more in the stream's precision.

Ours; a relative of RevNet, arXiv 1707.04585.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dlrscale.modeling.dlr_net import DLRNet


def forward(net: DLRNet, x: torch.Tensor, knobs: Mapping[str, float]) -> torch.Tensor:
    """A DLR-Net's forward that autograd goes backward through as above.

    Args:
        net: The DLR-Net.
        x: (..., D).
        knobs: `anchor`: blocks from one exactly kept d to the next; 0: none.

    Returns:
        (..., D).
    """
    # Without a tensor that asks for a gradient, autograd would leave a trained net out where x asks for none.
    trained = any(parameter.requires_grad for parameter in net.parameters())
    asks = torch.zeros((), device=x.device, requires_grad=trained)
    return net.finish(_Reverse.apply(net, int(knobs["anchor"]), x, asks))


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, net: DLRNet, anchor: int, x: torch.Tensor, asks: torch.Tensor) -> torch.Tensor:
        d = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        codes, anchors = [], {}
        for k, block in enumerate(net.blocks):
            if anchor and k and k % anchor == 0:
                anchors[k] = d
            codes.append(net.code(block, _read(net, x, d)))
            d = d + block.b_proj(codes[-1])
        ctx.net, ctx.places = net, list(anchors)
        out = d.to(x.dtype)
        ctx.save_for_backward(x, d, *codes, *anchors.values())
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        net = ctx.net
        x, d, *kept = ctx.saved_tensors
        codes = kept[: len(net.blocks)]
        anchors = dict(zip(ctx.places, kept[len(net.blocks) :], strict=True))
        passed, into_x = grad.to(d.dtype), torch.zeros_like(d)
        for k in reversed(range(len(codes))):
            block = net.blocks[k]
            with torch.enable_grad():
                code = codes[k].detach().requires_grad_()
                out = block.b_proj(code)
            d = anchors[k] if k in anchors else d - out.detach()
            with torch.enable_grad():
                u = _read(net, x, d).detach().requires_grad_()
                again = net.code(block, u)
            torch.autograd.backward(out, passed.to(out.dtype))
            torch.autograd.backward(again, code.grad)
            into_x += u.grad
            if k:  # block 0 reads x alone
                passed = passed + net.b * u.grad
        return None, None, into_x.to(x.dtype) if ctx.needs_input_grad[2] else None, None


def _read(net: DLRNet, x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """What a block reads: u = x + b d."""
    return x + (net.b * d).to(x.dtype)
