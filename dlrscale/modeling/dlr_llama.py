"""A Llama whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from .dlr_net import init_net, replace_mlps


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
        replace_mlps(self.model.layers, config.dlr, config.hidden_size, config.mlp_bias, "act_fn")
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_net(module)
