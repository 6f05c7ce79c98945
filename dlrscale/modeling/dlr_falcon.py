"""A Falcon whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from transformers import FalconConfig, FalconForCausalLM

from .dlr_net import DLRNet, Locked, locked_layers


class DLRFalconConfig(FalconConfig):
    """FalconConfig with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_falcon"
    dlr: dict | None = None


class DLRFalconForCausalLM(Locked, FalconForCausalLM):
    """FalconForCausalLM with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLRFalconConfig
    config: DLRFalconConfig

    def __init__(self, config: DLRFalconConfig):
        super().__init__(config)
        for index, ranks, form in locked_layers(config):
            layer = self.transformer.h[index]
            layer.mlp = DLRNet(config.hidden_size, ranks, form, layer.mlp.act, bias=config.bias)
        self.post_init()
