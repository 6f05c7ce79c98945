"""The trainable set `ladder`: a side network beside a frozen model that runs without a graph.

With h_0 the embedding's output, h_i that of decoder layer i, n(u) = u / rms(u), D the model's width and d the side's
(D / `reduction`, in whole eights):

    s_0 = P_0 n(h_0);   s_i = block_i(g_i s_{i-1} + (1 - g_i) P_i n(h_i)),   g_i = sigmoid(a_i), P: (d, D)
    block(s) = r + MLP(n(r)),  r = s + attention(n(s));  MLP gated by SiLU, of inner width 2 d
    logits = head(final norm(h_N + U n(s_N))),   U: (D, d), zero at the start

P, a, the blocks' maps and U are trained. No gradient goes through the model: for a layer the side keeps n(h_i), D per
token, and about 16 d in its block, whatever the model's MLPs are; where layers are checkpointed, D + d. At step 0 the
logits are the model's own. A norm's scale folds into the map behind it, so there is none.

Padding is on the right (data/): with causal attention no token that has a label sees it, so the side needs no mask.
Ours beside the paper: the norms n, and a start from random numbers (theirs prunes the backbone's weights, which would
not be the same for base and locked). U in front of the final norm trains better than behind it: 3.09 against 3.25 nats
on tinyshakespeare with stories260K (250 steps of 8 x 128 tokens, reduction 4, the best of three rates, two seeds).

Source: Ladder Side-Tuning (LST), arXiv 2206.06522.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from dlrscale import shapes
from dlrscale.attacks import chosen
from dlrscale.modeling.dlr_net import rms_normalise
from dlrscale.shapes import ModelShape


class SideLayer(nn.Module):
    """Takes in one layer's output and goes through one block of the side.

    Args:
        width: D.
        side: d.
    """

    def __init__(self, width: int, side: int):
        super().__init__()
        self.gradient_checkpointing = False
        self.heads = shapes.side_heads(side)
        self.gate = nn.Parameter(torch.zeros(1))
        self.down = nn.Linear(width, side, bias=False)
        self.qkv = nn.Linear(side, 3 * side, bias=False)
        self.out = nn.Linear(side, side, bias=False)
        self.inner = nn.Linear(side, 4 * side, bias=False)
        self.outer = nn.Linear(2 * side, side, bias=False)

    def forward(self, s: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """s of the layer before, (B, T, d), and n(h) of this one, (B, T, D); s of this one, (B, T, d)."""
        seen = self.down(h)
        s = seen + torch.sigmoid(self.gate) * (s - seen)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(rms_normalise(s)).chunk(3, -1))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        s = s + self.out(attended.transpose(1, 2).flatten(-2))
        gate, up = self.inner(rms_normalise(s)).chunk(2, -1)
        return s + self.outer(functional.silu(gate) * up)


class Side(nn.Module):
    """The side network.

    Args:
        width: D.
        side: d.
        layers: N.
    """

    def __init__(self, width: int, side: int, layers: int):
        super().__init__()
        self.start = nn.Linear(width, side, bias=False)
        self.layers = nn.ModuleList(SideLayer(width, side) for _ in range(layers))
        self.up = nn.Linear(side, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, stream: Sequence[torch.Tensor]) -> torch.Tensor:
        """n(h_0) to n(h_N), each (B, T, D); what is added to h_N, (B, T, D)."""
        s = self.start(stream[0])
        for layer, h in zip(self.layers, stream[1:], strict=True):
            again = layer.gradient_checkpointing and torch.is_grad_enabled()
            s = checkpoint(layer, s, h, use_reentrant=False) if again else layer(s, h)
        return self.up(rms_normalise(s))


class Ladder(nn.Module):
    """A frozen causal language model with a side network; it is called, and answers, as the model itself.

    Args:
        model: The model.
        shape: Its shape.
        reduction: D / d.
    """

    def __init__(self, model: PreTrainedModel, shape: ModelShape, reduction: int):
        super().__init__()
        self.model, self.config, self.reduction = model, model.config, reduction
        side = shapes.side_width(shape.width, reduction)
        self.side = Side(shape.width, side, shape.layers).to(model.dtype)
        self._stream: list[torch.Tensor] = []
        self._last: torch.Tensor | None = None
        self._behind_layers = chosen.behind_layers(model, shape)
        layers = chosen.decoder_layers(model, shape)
        layers[0].register_forward_pre_hook(self._before, with_kwargs=True)
        for layer in layers:
            layer.register_forward_hook(self._behind)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stream = [rms_normalise(args[0] if args else kwargs["hidden_states"])]

    def _behind(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._last = output[0] if isinstance(output, tuple) else output
        self._stream.append(rms_normalise(self._last))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, use_cache: bool = False
    ) -> CausalLMOutput:
        """Logits (B, T, V) of token ids (B, T), padded on the right; there is never a cache."""
        with torch.no_grad():
            self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        x = self._last + self.side(self._stream)
        self._stream, self._last = [], None
        for module in self._behind_layers:
            x = module(x)
        return CausalLMOutput(logits=x)


def choose(model: PreTrainedModel, shape: ModelShape, knobs: dict[str, float]) -> nn.Module:
    """The model frozen, with a side network that is trained.

    Args:
        model: The attacked model; where it is checkpointed per layer, the side's layers are in its place.
        shape: Its shape.
        knobs: `reduction`: D / d.

    Returns:
        The model with the side network.
    """
    checkpointed = any(getattr(layer, "gradient_checkpointing", False) for layer in model.modules())
    chosen.not_checkpointed(model.modules())
    chosen.freeze(model)
    found = Ladder(model, shape, int(knobs["reduction"]))
    for layer in found.side.layers:
        layer.gradient_checkpointing = checkpointed
    return found


def save(model: Ladder, state: dict[str, torch.Tensor], folder: Path, base_name: str) -> None:
    """Write the side network; see `chosen.save`."""
    chosen.save("ladder", state, folder, base=base_name, reduction=model.reduction)


def load(model: PreTrainedModel, shape: ModelShape, folder: Path) -> Ladder:
    """A model with the side network of a folder that `save` has written.

    Args:
        model: The model that it was trained beside.
        shape: Its shape.
        folder: The folder.

    Returns:
        Both, in eval mode.
    """
    about = json.loads((folder / chosen.ABOUT).read_text(encoding="utf-8"))
    found = Ladder(model, shape, about["reduction"])
    own = {name.removeprefix("side."): value for name, value in load_file(folder / chosen.WEIGHTS).items()}
    found.side.load_state_dict(own)
    return found.eval()
