"""The built-in shapes: what models transformers builds from them, and what a wrong name says."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dlrscale import shapes
from dlrscale.errors import ConfigError
from dlrscale.shapes import presets

# Parameters as published: the totals of each model card on Hugging Face (tensors that are tied counted once).
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "phi-3-mini": 3_821_079_552,
    "phi-3-medium": 13_960_238_080,
    "phi-2": 2_779_683_840,
    "gpt-neox-20b": 20_554_567_680,
    "opt-6.7b": 6_658_473_984,
    "falcon-7b": 6_921_720_704,
    "gpt2": 124_439_808,
}


def parameters(config, layers):
    family = shapes.find_family(config)
    live = AutoConfig.for_model(**config | {family.layers: layers})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(live)
    model.tie_weights()
    return model, sum(p.numel() for p in model.parameters())


def test_the_count_of_every_name_is_known_here():
    assert set(PUBLISHED) == set(presets.NAMES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_builds_the_published_model(name):
    config = presets.find(name)
    shape = shapes.model_shape(config)
    _, one = parameters(config, 1)
    model, two = parameters(config, 2)
    assert one + (shape.layers - 1) * (two - one) == PUBLISHED[name]  # all layers of these models are alike
    assert shape.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert shape.vocabulary == model.get_output_embeddings().out_features
    assert shape.mlp_params * shape.layers < PUBLISHED[name]
    assert not shape.locked


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_is_one_that_transformers_knows(name):
    """A key that it does not know would change nothing, and look as if it did."""
    config = presets.find(name)
    known = AutoConfig.for_model(config["model_type"])
    moved = {"torch_dtype", "rope_theta", "rotary_pct", "partial_rotary_factor"}  # read from files, kept elsewhere
    assert not [key for key in config if not hasattr(known, key) and key not in moved]


def test_names_in_any_case_and_by_alias():
    assert presets.find("Llama-2-7B") == presets.find("llama-2-7b-hf") == presets.find("llama-2-7b")
    assert presets.find("llama-3-405b")["num_hidden_layers"] == 126


def test_what_is_handed_out_is_a_copy():
    presets.find("llama-3.1-405b")["rope_scaling"]["factor"] = 1
    assert presets.find("llama-3.1-405b")["rope_scaling"]["factor"] == 8.0


def test_names_and_aliases_are_lower_case_and_each_once():
    names = [*presets.NAMES] + [a for e in presets._table().values() for a in e.get("aliases", ())]
    assert len(set(names)) == len(names)
    assert all(n == n.lower() for n in names)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_shape_names_its_source(name):
    assert presets.source(name).startswith("https://")
    assert "source" not in presets.find(name)


def test_a_wrong_name_offers_near_ones():
    for function in (presets.find, presets.source):
        with pytest.raises(ConfigError, match=r"llama2-7b: no built-in shape .* Did you mean llama-2-7b"):
            function("llama2-7b")
        with pytest.raises(ConfigError, match=r"xyzzy: no built-in shape has this name\. There are: llama-2-7b, "):
            function("xyzzy")


def test_other_attributes_of_the_module_are_missing_as_ever():
    with pytest.raises(AttributeError, match="NOTHING"):
        presets.NOTHING  # noqa: B018
