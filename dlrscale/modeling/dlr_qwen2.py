"""A Qwen2 whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from .dlr_net import init_net, replace_mlps


class DLRQwen2Config(Qwen2Config):
    """Qwen2Config with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_qwen2"
    dlr: dict | None = None


class DLRQwen2ForCausalLM(Qwen2ForCausalLM):
    """Qwen2ForCausalLM with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLRQwen2Config
    config: DLRQwen2Config

    def __init__(self, config: DLRQwen2Config):
        super().__init__(config)
        replace_mlps(self.model.layers, config.dlr, config.hidden_size, False, "act_fn")
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_net(module)
