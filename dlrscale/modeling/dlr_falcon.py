"""A Falcon whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from torch import nn
from transformers import FalconConfig, FalconForCausalLM

from .dlr_net import init_net, replace_mlps


class DLRFalconConfig(FalconConfig):
    """FalconConfig with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_falcon"
    dlr: dict | None = None


class DLRFalconForCausalLM(FalconForCausalLM):
    """FalconForCausalLM with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLRFalconConfig
    config: DLRFalconConfig

    def __init__(self, config: DLRFalconConfig):
        super().__init__(config)
        replace_mlps(self.transformer.h, config.dlr, config.hidden_size, config.bias, "act")
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_net(module)
