"""A Llama whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from .dlr_net import DLRNet


class DLRLlamaConfig(LlamaConfig):
    """LlamaConfig with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_llama"
    dlr: dict | None = None


class DLRLlamaForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLRLlamaConfig
    config: DLRLlamaConfig

    def __init__(self, config: DLRLlamaConfig):
        super().__init__(config)
        for index, ranks in (config.dlr or {"ranks": {}})["ranks"].items():
            layer = self.model.layers[int(index)]
            layer.mlp = DLRNet(config.hidden_size, ranks, config.dlr["form"], layer.mlp.act_fn, bias=config.mlp_bias)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DLRNet):
            nn.init.zeros_(module.b)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
