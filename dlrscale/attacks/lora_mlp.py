"""The trainable set `lora-mlp`: low-rank adapters on the MLPs' maps, or the factors of the DLR-Nets, alone.

The counterpart of `lora-attn`: adapters sit where the lock is. Arguments and return value as in `lora.choose`.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from dlrscale.attacks.lora import adapt, linear_names, merged, save
from dlrscale.shapes import ModelShape

__all__ = ["choose", "merged", "save"]


def choose(model: PreTrainedModel, shape: ModelShape, knobs: dict[str, float]) -> nn.Module:
    """Adapters on every linear map of the MLPs, the factors of DLR-Nets among them."""
    prefixes = tuple(prefix for layer in range(shape.layers) for prefix in shape.family.state_prefixes(layer))
    names = linear_names(model, shape, attention_only=False)
    return adapt(model, [name for name in names if f"{name}.".startswith(prefixes)], knobs)
