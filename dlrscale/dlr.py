"""Starts of a DLR-Net, its coupling, and its flat weights.

Legend: D model width, F inner width, R_k rank of block k, S = sum(R_k), K blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dlrscale.errors import SurgeryError
from dlrscale.modeling.dlr_net import DLRNet

COLD_SCALE = 0.1


@dataclass(frozen=True)
class MLPWeights:
    """The matrices of a base MLP, all as (out, in): gate and up (F, D), down (D, F); biases or None."""

    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


@torch.no_grad()
def cold_start(net: DLRNet, generator: torch.Generator) -> None:
    """Start from random numbers: A_k ~ N(0, 1/D), B_k ~ N(0, c^2/S) with c = 0.1, biases 0.

    For x with rms 1 the entries of A_k x are N(0, 1), so out = sum_k B_k s(A_k x) has variance
    c^2/S * S * E[s^2] per entry: rms(out) = c sqrt(E[s^2]), whatever K is. With S = K R this is B scaled
    by 1/sqrt(K). E[s^2] is 0.356 for SiLU of a standard normal, alone or times another one.
    """
    total = sum(block.b_proj.in_features for block in net.blocks)
    for block in net.blocks:
        for linear, std in (
            (block.a_proj, net.blocks[0].a_proj.in_features ** -0.5),
            (block.b_proj, COLD_SCALE * total**-0.5),
        ):
            values = torch.randn(linear.weight.shape, generator=generator) * std
            linear.weight.copy_(values)
        if block.a_proj.bias is not None:
            block.a_proj.bias.zero_()
    if net.bias is not None:
        net.bias.zero_()


@torch.no_grad()
def warm_start(net: DLRNet, mlp: MLPWeights, generator: torch.Generator) -> None:
    """Start from the base MLP's own neurons: block k takes the next R_k of them, so at b = 0 the net is the MLP.

    A_k gets the gate and up rows (or the first matrix's), B_k the down columns. Neurons beyond S are left
    out. Units beyond F start cold in A, N(0, 1/D), and with zeros in B: they change nothing and can learn.

    Args:
        net: The DLR-Net, written in place.
        mlp: The matrices of the base MLP, of width D and inner width F.
        generator: Source of the random numbers of units beyond F, on the CPU.

    Raises:
        SurgeryError: If the form does not take the neurons of this kind of MLP.
    """
    if net.norm or net.gated != (mlp.gate is not None):
        raise SurgeryError(f"--start warm is not defined for the form {net.form} on this MLP. Take --start cold.")
    sources = [mlp.gate, mlp.up] if net.gated else [mlp.up]
    biases = [mlp.gate_bias, mlp.up_bias] if net.gated else [mlp.up_bias]
    first = 0
    for block in net.blocks:
        rank = block.b_proj.in_features
        rows = slice(first, first + rank)
        halves = [m[rows] for m in sources]
        surplus = torch.randn(len(halves), rank - len(halves[0]), mlp.up.shape[1], generator=generator)
        surplus = (surplus * mlp.up.shape[1] ** -0.5).to(mlp.up)
        block.a_proj.weight.copy_(torch.cat([t for pair in zip(halves, surplus, strict=True) for t in pair]))
        if block.a_proj.bias is not None:
            block.a_proj.bias.copy_(torch.cat([_pad(m[rows], rank) for m in biases]))
        block.b_proj.weight.copy_(_pad(mlp.down[:, rows].t(), rank).t())
        first += rank
    if net.bias is not None:
        net.bias.copy_(mlp.down_bias)


def _pad(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Append zero rows up to `count` of them."""
    missing = count - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def coupling_scale(coupling: float, input_norms: torch.Tensor, output_norms: torch.Tensor) -> float:
    """b = g median(||x|| / ||MLP(x)||) over the tokens of the calibration set, rounded to a bf16 number.

    The rounding lets b have the same value in a bf16 and in an fp32 model.
    """
    ratio = (input_norms / output_norms.clamp_min(torch.finfo(torch.float32).tiny)).median()
    return float((coupling * ratio).to(torch.bfloat16))


@torch.no_grad()
def flat_weights(net: DLRNet) -> MLPWeights:
    """The ordinary MLP that the net becomes when every block reads x alone, A = [A_1; ..], B = [B_1 ..].

    Args:
        net: The DLR-Net.

    Returns:
        Its matrices: gate (gated forms only) and up (S, D), down (D, S).

    Raises:
        SurgeryError: If the form has a norm in front: it divides per token and is no MLP.
    """
    if net.norm:
        raise SurgeryError(
            "flatten: the form prenorm divides each token by its own norm and is no ordinary MLP. "
            "Regress one on it instead (undistil)."
        )
    halves = [block.a_proj.weight.chunk(2 if net.gated else 1) for block in net.blocks]
    bias = net.blocks[0].a_proj.bias is not None
    bias_halves = [b.a_proj.bias.chunk(2 if net.gated else 1) for b in net.blocks] if bias else []
    return MLPWeights(
        gate=torch.cat([h[0] for h in halves]) if net.gated else None,
        up=torch.cat([h[-1] for h in halves]),
        down=torch.cat([block.b_proj.weight for block in net.blocks], dim=1),
        gate_bias=torch.cat([h[0] for h in bias_halves]) if net.gated and bias else None,
        up_bias=torch.cat([h[-1] for h in bias_halves]) if bias else None,
        down_bias=net.bias,
    )


def grouped(net: DLRNet, group: int) -> dict[str, torch.Tensor]:
    """The state of the net whose every `group` consecutive blocks were made one, which reads what the first one does.

    Such a block has A = [A_i; ..], B = [B_i ..]; in the gated form all gate rows stand before all up rows. What is lost
    is the coupling inside a group. A norm in front is the same for all blocks that read one u, so that prenorm groups
    too.

    Args:
        net: The DLR-Net.
        group: How many blocks become one; the last group may be smaller.

    Returns:
        State of a net of ceil(K / group) blocks of the same form.
    """
    halves = 2 if net.gated else 1

    def stacked(parts: list[torch.Tensor]) -> torch.Tensor:
        by_half = zip(*(part.detach().chunk(halves) for part in parts), strict=True)
        return torch.cat([half for same in by_half for half in same])

    found = {k: v.detach() for k, v in net.state_dict().items() if not k.startswith("blocks.")}
    for index, start in enumerate(range(0, len(net.blocks), group)):
        blocks, name = net.blocks[start : start + group], f"blocks.{index}"
        found[f"{name}.a_proj.weight"] = stacked([b.a_proj.weight for b in blocks])
        if blocks[0].a_proj.bias is not None:
            found[f"{name}.a_proj.bias"] = stacked([b.a_proj.bias for b in blocks])
        found[f"{name}.b_proj.weight"] = torch.cat([b.b_proj.weight.detach() for b in blocks], dim=1)
    return found


def without_others(net: DLRNet, kept: Sequence[int]) -> dict[str, torch.Tensor]:
    """The state of the net of which only some blocks, in their order, are left."""
    state = {k: v.detach() for k, v in net.state_dict().items()}
    found = {k: v for k, v in state.items() if not k.startswith("blocks.")}
    for index, block in enumerate(kept):
        own = f"blocks.{block}."
        found |= {f"blocks.{index}.{k.removeprefix(own)}": v for k, v in state.items() if k.startswith(own)}
    return found


@torch.no_grad()
def block_shares(net: DLRNet, x: torch.Tensor) -> torch.Tensor:
    """||B_k s_k|| / ||d_K|| of every block and token, in fp32; x (..., D) gives (K, tokens)."""
    outs, d = [], None
    for block in net.blocks:
        outs.append(block.b_proj(net.code(block, x if d is None else x + net.b * d)))
        d = outs[-1] if d is None else d + outs[-1]
    whole = d.float().norm(dim=-1).flatten().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.stack([out.float().norm(dim=-1).flatten() for out in outs]) / whole
