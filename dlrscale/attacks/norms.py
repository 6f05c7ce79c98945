"""The trainable set `norms`: the scales and shifts of all norms and all biases, as BitFit.

Trained are every norm (of the layers, of queries and keys, the final one) and every bias (attention, MLP, the A_k and
the output of a DLR-Net, the head); a model without biases trains its norms alone. Gradients go through everything, but
a frozen linear map keeps nothing of its own for them: a frozen DLR-Net keeps 3 sum(R) elements per token (gated) in
place of K D + 4 sum(R), a norm its normalised input.

Source: BitFit, arXiv 2106.10199.
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
    """Norms and biases trainable, all else frozen.

    Args:
        model: The attacked model.
        shape: Its shape.
        knobs: None.

    Returns:
        The model itself.
    """
    chosen.freeze(model)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(name == "bias" or chosen.is_norm(module))
    return model


def save(model: nn.Module, state: dict[str, torch.Tensor], folder: Path, base_name: str) -> None:
    """Write the trained norms and biases; see `chosen.save`."""
    chosen.save("norms", state, folder, base=base_name)
