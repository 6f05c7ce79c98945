"""A GPT-2 whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from .dlr_net import DLRNet


class DLRGPT2Config(GPT2Config):
    """GPT2Config with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_gpt2"
    dlr: dict | None = None


class DLRGPT2ForCausalLM(GPT2LMHeadModel):
    """GPT2LMHeadModel with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLRGPT2Config
    config: DLRGPT2Config

    def __init__(self, config: DLRGPT2Config):
        super().__init__(config)
        for index, ranks in (config.dlr or {"ranks": {}})["ranks"].items():
            layer = self.transformer.h[int(index)]
            layer.mlp = DLRNet(
                config.n_embd, ranks, config.dlr["form"], layer.mlp.act, bias=True, dropout=config.resid_pdrop
            )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DLRNet):
            nn.init.zeros_(module.b)
            nn.init.zeros_(module.bias)
