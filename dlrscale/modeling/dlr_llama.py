"""A Llama whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from transformers import LlamaConfig, LlamaForCausalLM

from .dlr_net import DLRNet, Locked, locked_layers


class DLRLlamaConfig(LlamaConfig):
    """LlamaConfig with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_llama"
    dlr: dict | None = None


class DLRLlamaForCausalLM(Locked, LlamaForCausalLM):
    """LlamaForCausalLM with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLRLlamaConfig
    config: DLRLlamaConfig

    def __init__(self, config: DLRLlamaConfig):
        super().__init__(config)
        for index, ranks, form in locked_layers(config):
            layer = self.model.layers[index]
            layer.mlp = DLRNet(config.hidden_size, ranks, form, layer.mlp.act_fn, bias=config.mlp_bias)
        self.post_init()
