"""The layout of every family against live models: parameters one by one, and the maps that adapters sit on."""

from collections import Counter

import pytest

from dlrscale import shapes
from dlrscale.errors import SurgeryError
from dlrscale.shapes import layout

VARIANTS = [
    ("llama", {}), ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 16}), ("mistral", {}), ("qwen2", {}), ("qwen3", {}), ("gemma", {}), ("phi3", {}),
    ("phi", {}), ("phi", {"qk_layernorm": True}), ("gpt_neox", {}), ("gpt_neox", {"use_parallel_residual": False}),
    ("opt", {}), ("opt", {"word_embed_proj_dim": 16}), ("opt", {"do_layer_norm_before": False}),
    ("opt", {"layer_norm_elementwise_affine": False}), ("gpt2", {}), ("falcon", {}), ("falcon", {"alibi": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}), ("falcon", {"parallel_attn": False}),
    ("falcon", {"multi_query": False, "bias": True}),
]  # fmt: skip
FORMS = [("gated", 3, "llama"), ("plain", 4, "llama"), ("prenorm", 2, "gemma"), ("plain", 3, "gpt2"),
         ("gated", 2, "phi"), ("plain", 5, "opt"), ("prenorm", 3, "falcon"), ("gated", 4, "phi3")]  # fmt: skip


def locked_config(config, form, depth):
    """The configuration of a locked model, and its shape, from a base model's."""
    base = shapes.model_shape(config)
    ranks = shapes.resolve_ranks(form, base, depth, None)
    dlr = {"form": form, "ranks": {str(layer): list(ranks) for layer in range(base.layers)}}
    found = {k: v for k, v in config.items() if k != "architectures"}
    return found | {"model_type": f"dlr_{config['model_type']}", "dlr": dlr}


def build(config, attention="sdpa"):
    """A model from a configuration's content, of a locked class too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from dlrscale import models  # noqa: F401  registers the locked classes

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation=attention)


def assert_parameters(model):
    config = model.config.to_dict()
    shape = shapes.model_shape(config)
    # In their order, each with whether it is a bias (a norm's shift is the norm's) and the layer that it lies in.
    layers = shape.family.mlp.partition("{}")[0]
    found = [
        (p.numel(), n.endswith("bias") and not ("norm" in n or "ln_" in n), n.startswith(layers))
        for n, p in model.named_parameters()
    ]
    planned = layout.parameters(shape, layout.layout(config, shape))
    assert [(t.numel, t.bias, t.layer is not None) for t in planned for _ in range(t.count)] == found


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_parameters_of_every_family(make_model, family, changes):
    assert_parameters(make_model(family, **changes))


@pytest.mark.parametrize(("form", "depth", "family"), FORMS)
def test_parameters_of_locked_models(make_model, form, depth, family):
    assert_parameters(build(locked_config(make_model(family).config.to_dict(), form, depth)))


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_maps_are_the_linear_maps_of_the_layers(make_model, family, changes):
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    model = make_model(family, **changes)
    config = model.config.to_dict()
    shape = shapes.model_shape(config)
    parts = layout.layout(config, shape)
    head = model.get_output_embeddings()
    found = Counter()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and "project_" not in name:
            found[(module.weight.numel(), module.bias is not None)] += 1
    planned = Counter(
        (inputs * outputs, bias)
        for layer in range(shape.layers)
        for _, inputs, outputs, bias in layout.maps(shape, parts, layer)
    )
    assert planned == found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": None}, "num_attention_heads is None"),
        ({"num_attention_heads": 64000, "head_dim": None}, "no multiple of num_attention_heads"),
        ({"num_attention_heads": 5, "head_dim": None}, "no multiple of num_attention_heads"),
        ({"head_dim": "8"}, "head_dim is '8'"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"attention_dropout": "a"}, "attention_dropout is 'a'"),
        ({"rope_parameters": "x"}, "rope_parameters"),
        ({"hidden_size": -4}, "lacks hidden_size"),
    ],
)
def test_a_configuration_that_no_model_can_have_is_refused(make_llama, changes, said):
    config = make_llama().config.to_dict() | changes
    with pytest.raises(SurgeryError, match=said):
        layout.layout(config, shapes.model_shape(config))
