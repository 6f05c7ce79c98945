"""An OPT whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from .dlr_net import DLRNet, Locked, locked_layers


class DLROPTConfig(OPTConfig):
    """OPTConfig with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_opt"
    dlr: dict | None = None


class DLROPTForCausalLM(Locked, OPTForCausalLM):
    """OPTForCausalLM with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLROPTConfig
    config: DLROPTConfig

    def __init__(self, config: DLROPTConfig):
        super().__init__(config)
        for index, ranks, form in locked_layers(config):
            layer = self.model.decoder.layers[index]
            layer.fc1 = DLRNet(config.hidden_size, ranks, form, layer.activation_fn, bias=config.enable_bias)
            layer.activation_fn, layer.fc2 = nn.Identity(), nn.Identity()  # there is no MLP module
        self.post_init()
