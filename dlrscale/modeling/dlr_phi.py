"""A Phi whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from transformers import PhiConfig, PhiForCausalLM

from .dlr_net import DLRNet, Locked, locked_layers


class DLRPhiConfig(PhiConfig):
    """PhiConfig with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_phi"
    dlr: dict | None = None


class DLRPhiForCausalLM(Locked, PhiForCausalLM):
    """PhiForCausalLM with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLRPhiConfig
    config: DLRPhiConfig

    def __init__(self, config: DLRPhiConfig):
        super().__init__(config)
        for index, ranks, form in locked_layers(config):
            layer = self.model.layers[index]
            layer.mlp = DLRNet(config.hidden_size, ranks, form, layer.mlp.activation_fn, bias=True)
        self.post_init()
