"""A Qwen2 whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from transformers import Qwen2Config, Qwen2ForCausalLM

from .dlr_net import DLRNet, Locked, locked_layers


class DLRQwen2Config(Qwen2Config):
    """Qwen2Config with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_qwen2"
    dlr: dict | None = None


class DLRQwen2ForCausalLM(Locked, Qwen2ForCausalLM):
    """Qwen2ForCausalLM with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLRQwen2Config
    config: DLRQwen2Config

    def __init__(self, config: DLRQwen2Config):
        super().__init__(config)
        for index, ranks, form in locked_layers(config):
            layer = self.model.layers[index]
            layer.mlp = DLRNet(config.hidden_size, ranks, form, layer.mlp.act_fn)
        self.post_init()
