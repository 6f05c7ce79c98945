"""Shapes: families, forms, ranks and parameters, against hand counts and real modules."""

import json

import pytest
import torch

from dlrscale import shapes
from dlrscale.errors import ConfigError, SurgeryError
from dlrscale.modeling.dlr_net import DLRNet

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 20, "vocab_size": 100,
    "hidden_act": "silu", "max_position_embeddings": 77,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_embd": 8,
    "vocab_size": 100,
    "n_positions": 55,
    "resid_pdrop": 0.2,
}


@pytest.mark.parametrize(
    ("form", "gated", "inner", "total"),
    [
        ("gated", True, 100, 100),  # 3 D F = 3 D S
        ("plain", True, 100, 150),  # 3 D F = 2 D S
        ("prenorm", True, 100, 150),
        ("plain", True, 101, 151),
        ("plain", False, 100, 100),
        ("prenorm", False, 100, 100),
        ("gated", False, 99, 66),  # 2 D F = 3 D S
        ("gated", False, 100, 66),
    ],
)
def test_parity_width(form, gated, inner, total):
    assert shapes.parity_width(form, gated, inner) == total


@pytest.mark.parametrize(("total", "depth"), [(10, 4), (12, 4), (7, 7), (100, 1), (257, 256), (5461, 64)])
def test_ranks_are_even_and_their_sum_is_exact(total, depth):
    ranks = shapes.split_ranks(total, depth)
    assert len(ranks) == depth
    assert sum(ranks) == total
    assert max(ranks) - min(ranks) <= 1
    assert min(ranks) >= 1


def test_ranks_by_hand():
    assert shapes.split_ranks(10, 4) == (3, 3, 2, 2)


@pytest.mark.parametrize("depth", [11, 0, -1])
def test_a_depth_without_ranks_is_refused(depth):
    with pytest.raises(SurgeryError) as error:
        shapes.split_ranks(10, depth)
    assert f"--depth {depth}" in str(error.value)
    assert "1 to 10" in str(error.value)


def test_rank_overrides_parity():
    shape = shapes.model_shape(LLAMA)
    assert shapes.resolve_ranks("gated", shape, 3, 5) == (5, 5, 5)
    assert shapes.resolve_ranks("gated", shape, 3, None) == (7, 7, 6)
    assert shapes.resolve_ranks("plain", shape, 4, None) == (8, 8, 7, 7)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", list(shapes.FORMS))
def test_dlr_params_are_those_of_a_real_net(form, bias):
    ranks = (5, 4, 4)
    net = DLRNet(8, ranks, form, torch.nn.SiLU(), bias=bias)
    counted = sum(p.numel() for p in net.parameters())
    assert shapes.dlr_params(form, 8, ranks, bias) == counted


def test_dlr_params_by_hand():
    assert shapes.dlr_params("gated", 8, (5, 4), False) == 3 * 8 * 9
    assert shapes.dlr_params("gated", 8, (5, 4), True) == 3 * 8 * 9 + 2 * 9 + 8
    assert shapes.dlr_params("plain", 8, (5, 4), True) == 2 * 8 * 9 + 9 + 8


@pytest.mark.parametrize("bias", [False, True])
def test_mlp_params_of_a_real_llama(make_llama, bias):
    model = make_llama(mlp_bias=bias)
    shape = shapes.model_shape(model.config.to_dict())
    assert shape.mlp_params == sum(p.numel() for p in model.model.layers[0].mlp.parameters())
    assert (shape.width, shape.inner, shape.layers, shape.kind) == (32, 48, 2, "gated")
    assert shape.mlp_bias is bias


def test_mlp_params_of_a_real_gpt2(make_gpt2):
    model = make_gpt2()
    shape = shapes.model_shape(model.config.to_dict())
    assert shape.mlp_params == sum(p.numel() for p in model.transformer.h[0].mlp.parameters())
    assert (shape.width, shape.inner, shape.kind, shape.activation) == (32, 64, "two-matrix", "gelu_new")


def test_parameter_ratio_is_one_up_to_biases_and_rounding():
    llama, gpt2 = shapes.model_shape(LLAMA), shapes.model_shape(GPT2)
    assert shapes.param_ratio("gated", llama, (7, 7, 6)) == 1.0
    assert shapes.param_ratio("plain", llama, (15, 15)) == 1.0
    assert shapes.param_ratio("plain", gpt2, (16, 16)) == 1.0
    # Two-matrix, F = 32: S = 21, 3 D S + 2 S + D of 2 D F + F + D.
    assert shapes.param_ratio("gated", gpt2, (21,)) == (3 * 8 * 21 + 2 * 21 + 8) / (2 * 8 * 32 + 32 + 8)
    assert shapes.param_ratio("gated", llama, (10, 10, 10)) == 1.5


def test_model_shape_reads_a_config():
    shape = shapes.model_shape(LLAMA)
    assert (shape.layers, shape.width, shape.inner, shape.vocabulary, shape.max_length) == (3, 8, 20, 100, 77)
    assert (shape.locked, shape.tied, shape.mlp_bias, shape.dropout) == (False, False, False, 0.0)
    shape = shapes.model_shape(GPT2)
    assert (shape.layers, shape.width, shape.inner, shape.max_length) == (2, 8, 32, 55)
    assert (shape.tied, shape.mlp_bias, shape.dropout, shape.activation) == (True, True, 0.2, "gelu_new")
    assert shapes.model_shape(LLAMA | {"hidden_act": "swish"}).activation == "silu"


def test_an_activation_that_the_config_leaves_out_is_the_familys_own_default():
    from transformers import LlamaConfig

    config = {k: v for k, v in LLAMA.items() if k != "hidden_act"}
    assert shapes.model_shape(config).activation == LlamaConfig().hidden_act


def test_model_shape_of_a_locked_config():
    locked = LLAMA | {"model_type": "dlr_llama", "dlr": {"form": "plain", "ranks": {"0": [3, 2], "2": [5]}}}
    shape = shapes.model_shape(locked)
    assert shape.locked
    assert shape.form == "plain"
    assert shape.ranks == {0: (3, 2), 2: (5,)}
    # Layer 1 stayed a SwiGLU: D + 4F; layer 0 is a plain net: K D + 2 S.
    assert shapes.saved_bytes(shape, 1, 4) == 4 * (8 + 4 * 20)
    assert shapes.saved_bytes(shape, 0, 2) == 2 * (2 * 8 + 2 * 5)


def test_unknown_family_is_refused():
    with pytest.raises(SurgeryError) as error:
        shapes.model_shape({"model_type": "mamba"})
    assert all(part in str(error.value) for part in ("'mamba'", "llama", "gpt2"))
    assert "\n" not in str(error.value)


def test_unknown_activation_is_refused():
    with pytest.raises(SurgeryError) as error:
        shapes.model_shape(LLAMA | {"hidden_act": "xielu"})
    assert all(part in str(error.value) for part in ("hidden_act", "'xielu'", "silu"))


def test_a_missing_size_is_refused():
    config = {k: v for k, v in LLAMA.items() if k != "hidden_size"}
    with pytest.raises(SurgeryError, match=r"llama model lacks hidden_size"):
        shapes.model_shape(config)


def test_read_config_refuses(tmp_path):
    (tmp_path / "stories260K").mkdir()
    with pytest.raises(ConfigError, match=r"No such model folder: .*stories260k .*near: stories260K"):
        shapes.read_config(tmp_path / "stories260k")
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        shapes.read_config(tmp_path / "stories260K")
    file = tmp_path / "stories260K" / "config.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is no JSON"):
        shapes.read_config(tmp_path / "stories260K")
    file.write_text("[1]")
    with pytest.raises(ConfigError, match="no JSON object"):
        shapes.read_config(tmp_path / "stories260K")
    file.write_text(json.dumps(LLAMA))
    assert shapes.read_config(tmp_path / "stories260K") == LLAMA


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (None, range(16)),
        ("2-10,15", [*range(2, 11), 15]),
        ("3", [3]),
        ("5,1,1-2", [1, 2, 5]),
        (" 0 , 2-3 ", [0, 2, 3]),
    ],
)
def test_parse_layers(text, chosen):
    assert shapes.parse_layers(text, 16) == tuple(chosen)


@pytest.mark.parametrize("text", ["", "a", "1,,2", "2-", "-3", "1.5", "16", "2-20", "5-2", "²"])
def test_parse_layers_refuses(text):
    with pytest.raises(ConfigError) as error:
        shapes.parse_layers(text, 16)
    assert f"--layers {text!r}" in str(error.value)


def test_saved_elements_of_the_design_page():
    """Elements per token, SiLU or GELU."""
    width, ranks = 8, (5, 4, 4)
    depth, total = 3, 13
    saved = shapes.dlr_saved_elements
    assert shapes.mlp_saved_elements(True, 8, 20, "silu") == 8 + 4 * 20
    assert shapes.mlp_saved_elements(True, 8, 20, "silu", trainable=False) == 3 * 20
    assert shapes.mlp_saved_elements(False, 8, 32, "gelu") == 8 + 2 * 32
    assert shapes.mlp_saved_elements(False, 8, 32, "gelu", trainable=False) == 32
    assert shapes.mlp_saved_elements(False, 8, 32, "gelu_new") == 8 + 5 * 32
    assert shapes.mlp_saved_elements(False, 8, 32, "gelu_new", trainable=False) == 4 * 32
    assert saved("plain", width, ranks, "silu") == depth * width + 2 * total
    assert saved("plain", width, ranks, "silu", trainable=False) == total
    assert saved("gated", width, ranks, "silu") == depth * width + 4 * total
    assert saved("gated", width, ranks, "silu", trainable=False) == 3 * total
    assert saved("plain", width, ranks, "gelu_new") == depth * width + 5 * total
    assert saved("plain", width, ranks, "gelu_new", trainable=False) == 4 * total
    assert saved("plain", width, ranks, "relu") == depth * width + total
