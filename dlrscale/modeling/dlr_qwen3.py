"""A Qwen3 whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from transformers import Qwen3Config, Qwen3ForCausalLM

from .dlr_net import DLRNet, Locked, locked_layers


class DLRQwen3Config(Qwen3Config):
    """Qwen3Config with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_qwen3"
    dlr: dict | None = None


class DLRQwen3ForCausalLM(Locked, Qwen3ForCausalLM):
    """Qwen3ForCausalLM with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLRQwen3Config
    config: DLRQwen3Config

    def __init__(self, config: DLRQwen3Config):
        super().__init__(config)
        for index, ranks, form in locked_layers(config):
            layer = self.model.layers[index]
            layer.mlp = DLRNet(config.hidden_size, ranks, form, layer.mlp.act_fn)
        self.post_init()
