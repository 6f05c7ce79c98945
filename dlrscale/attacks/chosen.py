"""What the trainable sets share that train a model's own parameters, or modules of their own beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from dlrscale import export
from dlrscale.shapes import ModelShape

WEIGHTS, ABOUT = "trained.safetensors", "trained.json"


def backbone(model: PreTrainedModel, shape: ModelShape) -> nn.Module:
    """The module that holds the decoder layers and the final norm."""
    return model.get_submodule(shape.family.mlp.partition(".{}")[0].rpartition(".")[0])


def decoder_layers(model: PreTrainedModel, shape: ModelShape) -> nn.ModuleList:
    """The decoder layers in their order."""
    return model.get_submodule(shape.family.mlp.partition(".{}")[0])


def final_norms(model: PreTrainedModel, shape: ModelShape) -> list[nn.Module]:
    """The norm behind the last layer, if there is one."""
    return [child for child in backbone(model, shape).children() if is_norm(child)]


def behind_layers(model: PreTrainedModel, shape: ModelShape) -> tuple[nn.Module, ...]:
    """What a model's stream goes through behind its last layer, in order, the LM head at the end."""
    projection = getattr(backbone(model, shape), "project_out", None)  # of some OPTs
    found = (*final_norms(model, shape), projection, model.get_output_embeddings())
    return tuple(module for module in found if module is not None)


def freeze(model: PreTrainedModel) -> None:
    """Freeze all parameters, and let no gradient flow that nobody needs.

    Where layers are checkpointed, transformers makes the embedding's output ask for a gradient, which reentrant
    checkpointing needs: one would go through every frozen layer, and each would keep what it takes.
    """
    model.requires_grad_(False)
    if getattr(model, "_require_grads_hooks", None):
        model.disable_input_require_grads()


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of one of the families."""
    return "Norm" in type(module).__name__


def not_checkpointed(modules: Iterable[nn.Module]) -> None:
    """Take layer checkpointing off modules that no gradient goes through: there is nothing to run again."""
    for module in modules:
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False


def save(trainable: str, state: dict[str, torch.Tensor], folder: Path, **about: Any) -> None:
    """Write trained weights with a few words about them, so that the folder appears whole or not at all.

    Args:
        trainable: The trainable set.
        state: Whole weights by parameter name.
        folder: Where to.
        **about: What else the JSON beside them tells.
    """

    def write(temporary: Path) -> None:
        save_file({name: value.contiguous() for name, value in state.items()}, temporary / WEIGHTS)
        text = json.dumps({"trainable": trainable} | about, indent=2) + "\n"
        (temporary / ABOUT).write_text(text, encoding="utf-8")

    export.write_folder(folder, write)


def put(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with a folder's weights in the place of its own."""
    unknown = model.load_state_dict(load_file(folder / WEIGHTS), strict=False).unexpected_keys
    assert not unknown, unknown
    return model
