"""A Phi-3 whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

from .dlr_net import init_net, replace_mlps


class DLRPhi3Config(Phi3Config):
    """Phi3Config with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_phi3"
    dlr: dict | None = None


class DLRPhi3ForCausalLM(Phi3ForCausalLM):
    """Phi3ForCausalLM with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLRPhi3Config
    config: DLRPhi3Config

    def __init__(self, config: DLRPhi3Config):
        super().__init__(config)
        replace_mlps(self.model.layers, config.dlr, config.hidden_size, False, "activation_fn")
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_net(module)
