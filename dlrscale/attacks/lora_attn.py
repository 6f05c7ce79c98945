"""The trainable set `lora-attn`: low-rank adapters on the attention alone; MLPs and DLR-Nets are frozen."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from dlrscale.attacks.lora import adapt, linear_names, merged, save
from dlrscale.shapes import ModelShape

__all__ = ["choose", "merged", "save"]


def choose(model: PreTrainedModel, shape: ModelShape, knobs: dict[str, float]) -> nn.Module:
    """Adapters on the attention's linear maps; arguments and return value as in `lora.choose`."""
    return adapt(model, linear_names(model, shape, attention_only=True), knobs)
