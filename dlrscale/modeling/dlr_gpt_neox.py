"""A GPT-NeoX whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from .dlr_net import init_net, replace_mlps


class DLRGPTNeoXConfig(GPTNeoXConfig):
    """GPTNeoXConfig with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_gpt_neox"
    dlr: dict | None = None


class DLRGPTNeoXForCausalLM(GPTNeoXForCausalLM):
    """GPTNeoXForCausalLM with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLRGPTNeoXConfig
    config: DLRGPTNeoXConfig

    def __init__(self, config: DLRGPTNeoXConfig):
        super().__init__(config)
        replace_mlps(self.gpt_neox.layers, config.dlr, config.hidden_size, True, "act")
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_net(module)
