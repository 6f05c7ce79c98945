"""The trainable set `head`: the LM head alone, and its bias where it has one.

Where the head is tied to the embedding, it gets a matrix of its own, a copy: the embedding lies before the layers, and
training it would take a gradient through all of them. So no gradient goes through any layer; kept for backward are the
head's input and what the loss keeps. A saved model's config says that nothing is tied.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from dlrscale.attacks import chosen
from dlrscale.shapes import ModelShape


def choose(model: PreTrainedModel, shape: ModelShape, knobs: dict[str, float]) -> nn.Module:
    """The head trainable, all else frozen.

    Args:
        model: The attacked model.
        shape: Its shape.
        knobs: None.

    Returns:
        The model itself, its head untied.
    """
    untie(model)
    chosen.freeze(model)
    chosen.not_checkpointed(model.modules())
    model.get_output_embeddings().requires_grad_(True)
    return model


def untie(model: PreTrainedModel) -> None:
    """Give a tied head a copy of the embedding for its own, now and when the model is saved and loaded."""
    if model.config.tie_word_embeddings:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def save(model: nn.Module, state: dict[str, torch.Tensor], folder: Path, base_name: str) -> None:
    """Write the trained head; see `chosen.save`."""
    chosen.save("head", state, folder, base=base_name)


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the head of a folder, untied."""
    untie(model)
    return chosen.put(model, folder)
