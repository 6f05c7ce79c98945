"""The trainable set `lora`: low-rank adapters by peft on all linear maps (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

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
