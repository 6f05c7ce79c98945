"""A Gemma whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from transformers import GemmaConfig, GemmaForCausalLM

from .dlr_net import DLRNet, Locked, locked_layers


class DLRGemmaConfig(GemmaConfig):
    """GemmaConfig with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_gemma"
    dlr: dict | None = None


class DLRGemmaForCausalLM(Locked, GemmaForCausalLM):
    """GemmaForCausalLM with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLRGemmaConfig
    config: DLRGemmaConfig

    def __init__(self, config: DLRGemmaConfig):
        super().__init__(config)
        for index, ranks, form in locked_layers(config):
            layer = self.model.layers[index]
            layer.mlp = DLRNet(config.hidden_size, ranks, form, layer.mlp.act_fn)
        self.post_init()
