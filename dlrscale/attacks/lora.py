"""The trainable set `lora`: low-rank adapters by peft on all linear maps (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dlrscale import export
from dlrscale.shapes import ModelShape


def linear_names(model: PreTrainedModel, shape: ModelShape, attention_only: bool) -> list[str]:
    """Full names of the linear maps that get an adapter: all but the LM head, or the attention's alone."""
    head = model.get_output_embeddings()
    names = []
    for name, module in model.named_modules():
        if module is head or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        if not attention_only or any(name.endswith("." + part) for part in shape.family.attention):
            names.append(name)
    return names


def choose(model: PreTrainedModel, shape: ModelShape, knobs: dict[str, float]) -> nn.Module:
    """Adapters on every linear map but the LM head, the factors of the DLR-Nets among them.

    Args:
        model: The attacked model.
        shape: Its shape.
        knobs: `rank`, `alpha` and `dropout` of the adapters.

    Returns:
        peft's model, whose trainable parameters are the adapters.
    """
    return adapt(model, linear_names(model, shape, attention_only=False), knobs)


def adapt(model: PreTrainedModel, names: list[str], knobs: dict[str, float]) -> nn.Module:
    """Put adapters on the named linear maps and freeze everything else."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=int(knobs["rank"]),
        lora_alpha=int(knobs["alpha"]),
        lora_dropout=float(knobs["dropout"]),
        target_modules=names,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def save(model: nn.Module, state: dict[str, torch.Tensor], folder: Path, base_name: str) -> None:
    """Write adapters in peft's format, so that the folder appears whole or not at all.

    Args:
        model: peft's model, whose own parameters may be empty shards.
        state: Whole adapter weights by parameter name.
        folder: Where to.
        base_name: The name of the model that they belong to, for the adapter's config.
    """

    def write(temporary: Path) -> None:
        for config in model.peft_config.values():
            config.base_model_name_or_path = base_name  # no path of this machine
        model.save_pretrained(temporary, state_dict=state, save_embedding_layers=False)

    export.write_folder(folder, write)


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapters of a folder merged into its weights."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).merge_and_unload()
