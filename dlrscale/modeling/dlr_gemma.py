"""A Gemma whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM

from .dlr_net import init_net, replace_mlps


class DLRGemmaConfig(GemmaConfig):
    """GemmaConfig with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_gemma"
    dlr: dict | None = None


class DLRGemmaForCausalLM(GemmaForCausalLM):
    """GemmaForCausalLM with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLRGemmaConfig
    config: DLRGemmaConfig

    def __init__(self, config: DLRGemmaConfig):
        super().__init__(config)
        replace_mlps(self.model.layers, config.dlr, config.hidden_size, False, "act_fn")
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_net(module)
