"""A GPT-2 whose MLPs are DLR-Nets. `config.dlr` holds the form and the ranks of each locked layer."""

from transformers import GPT2Config, GPT2LMHeadModel

from .dlr_net import DLRNet, Locked, locked_layers


class DLRGPT2Config(GPT2Config):
    """GPT2Config with `dlr`: {"form": name, "ranks": {layer index as text: [R_1, ..., R_K]}}."""

    model_type = "dlr_gpt2"
    dlr: dict | None = None


class DLRGPT2ForCausalLM(Locked, GPT2LMHeadModel):
    """GPT2LMHeadModel with a DLR-Net as the MLP of every layer that `config.dlr` names."""

    config_class = DLRGPT2Config
    config: DLRGPT2Config

    def __init__(self, config: DLRGPT2Config):
        super().__init__(config)
        for index, ranks, form in locked_layers(config):
            layer = self.transformer.h[index]
            layer.mlp = DLRNet(config.n_embd, ranks, form, layer.mlp.act, bias=True, dropout=config.resid_pdrop)
        self.post_init()
