"""A Mistral whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from transformers import MistralConfig, MistralForCausalLM

from .dlr_net import DLRNet, Locked, locked_layers


class DLRMistralConfig(MistralConfig):
    """MistralConfig with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_mistral"
    dlr: dict | None = None


class DLRMistralForCausalLM(Locked, MistralForCausalLM):
    """MistralForCausalLM with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLRMistralConfig
    config: DLRMistralConfig

    def __init__(self, config: DLRMistralConfig):
        super().__init__(config)
        for index, ranks, form in locked_layers(config):
            layer = self.model.layers[index]
            layer.mlp = DLRNet(config.hidden_size, ranks, form, layer.mlp.act_fn)
        self.post_init()
