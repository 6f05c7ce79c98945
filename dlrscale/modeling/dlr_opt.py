"""An OPT whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from .dlr_net import init_net, replace_mlps


class DLROPTConfig(OPTConfig):
    """OPTConfig with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_opt"
    dlr: dict | None = None


class DLROPTForCausalLM(OPTForCausalLM):
    """OPTForCausalLM with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLROPTConfig
    config: DLROPTConfig

    def __init__(self, config: DLROPTConfig):
        super().__init__(config)
        replace_mlps(
            self.model.decoder.layers,
            config.dlr,
            config.hidden_size,
            config.enable_bias,
            "activation_fn",
            place="fc1",
            siblings=("activation_fn", "fc2"),
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_net(module)
