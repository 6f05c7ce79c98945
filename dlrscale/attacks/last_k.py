"""The trainable set `last-k`: all parameters of the last k decoder layers, and the final norm.

The LM head stays frozen: where it is tied, it is the embedding too, which lies before the frozen layers. No gradient
goes into the first N - k layers, so they keep nothing for backward and are not checkpointed; the k layers behind them
cost what they cost under `full` or `ckpt-layer`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from dlrscale.attacks import chosen
from dlrscale.attacks.chosen import put as merged
from dlrscale.shapes import ModelShape

__all__ = ["choose", "merged", "save"]


def choose(model: PreTrainedModel, shape: ModelShape, knobs: dict[str, float]) -> nn.Module:
    """The last layers and the final norm trainable, all else frozen.

    Args:
        model: The attacked model.
        shape: Its shape.
        knobs: `last`: k, the number of layers.

    Returns:
        The model itself.
    """
    layers, first = chosen.decoder_layers(model, shape), shape.layers - int(knobs["last"])
    chosen.freeze(model)
    chosen.not_checkpointed(layers[:first])
    for module in (*layers[first:], *chosen.final_norms(model, shape)):
        module.requires_grad_(True)
    return model


def save(model: nn.Module, state: dict[str, torch.Tensor], folder: Path, base_name: str) -> None:
    """Write the trained layers and norm; see `chosen.save`."""
    chosen.save("last-k", state, folder, base=base_name)
