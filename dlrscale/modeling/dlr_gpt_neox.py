"""A GPT-NeoX whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from .dlr_net import DLRNet, Locked, locked_layers


class DLRGPTNeoXConfig(GPTNeoXConfig):
    """GPTNeoXConfig with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_gpt_neox"
    dlr: dict | None = None


class DLRGPTNeoXForCausalLM(Locked, GPTNeoXForCausalLM):
    """GPTNeoXForCausalLM with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLRGPTNeoXConfig
    config: DLRGPTNeoXConfig

    def __init__(self, config: DLRGPTNeoXConfig):
        super().__init__(config)
        for index, ranks, form in locked_layers(config):
            layer = self.gpt_neox.layers[index]
            layer.mlp = DLRNet(config.hidden_size, ranks, form, layer.mlp.act, bias=True)
        self.post_init()
