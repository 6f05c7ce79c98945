"""A Phi-3 whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from transformers import Phi3Config, Phi3ForCausalLM

from .dlr_net import DLRNet, Locked, locked_layers


class DLRPhi3Config(Phi3Config):
    """Phi3Config with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_phi3"
    dlr: dict | None = None


class DLRPhi3ForCausalLM(Locked, Phi3ForCausalLM):
    """Phi3ForCausalLM with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLRPhi3Config
    config: DLRPhi3Config

    def __init__(self, config: DLRPhi3Config):
        super().__init__(config)
        for index, ranks, form in locked_layers(config):
            layer = self.model.layers[index]
            layer.mlp = DLRNet(config.hidden_size, ranks, form, layer.mlp.activation_fn)
        self.post_init()
