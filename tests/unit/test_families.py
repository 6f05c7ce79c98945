"""Every family of the table, on a tiny model: what its MLP is, the swap, the export, the flattening."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILY_CONFIGS, manifest
from transformers import AutoConfig, AutoModelForCausalLM

from dlrscale import dlr, export, models, shapes, surgery
from dlrscale.errors import SurgeryError
from dlrscale.measure import SavedBytes

NAMES = list(FAMILY_CONFIGS)
IDS = torch.arange(3, 23).view(2, 10)


@pytest.fixture(scope="module")
def bases(make_model):
    """A tiny model of every family, by name."""
    return {name: make_model(name) for name in NAMES}


def shape_of(model):
    return shapes.model_shape(model.config.to_dict())


def swapped(base, lock_config, **changes):
    """A copy of a base model with a switch at every chosen MLP, its shape, and the switches."""
    model, shape = copy.deepcopy(base), shape_of(base)
    values = {"form": "gated" if shape.family.gated else "plain"} | changes
    return model, shape, surgery.install(model, shape, lock_config(**values))


def test_every_family_of_the_table_is_tried():
    assert {model_type for model_type, _ in FAMILY_CONFIGS.values()} == set(shapes.FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_the_shape_is_that_of_the_module(name, bases):
    """D, F, layers, biases and parameters of the configuration are those of the live MLP."""
    base, shape = bases[name], shape_of(bases[name])
    assert shapes.model_shape(json.loads(base.config.to_json_string(use_diff=True))) == shape  # as on the disk
    for mlp in models.find_mlps(base, shape.family, tuple(range(shape.layers))).values():
        weights = models.mlp_weights(mlp, shape.family)
        assert weights.up.shape == (shape.inner, shape.width)
        assert weights.down.shape == (shape.width, shape.inner)
        assert (weights.gate is not None) == shape.family.gated
        assert (weights.down_bias is not None) == (weights.up_bias is not None) == shape.mlp_bias
        assert sum(p.numel() for p in mlp.parameters()) == shape.mlp_params
    assert shape.tied == (base.get_input_embeddings().weight is base.get_output_embeddings().weight)
    assert shape.layers == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_activation_is_the_one_that_the_module_applies(name, bases):
    """The MLP written out with the table's activation and the extracted matrices is the live MLP."""
    from transformers.activations import ACT2FN

    base, shape = bases[name], shape_of(bases[name])
    mlp = models.find_mlps(base, shape.family, (0,))[0].double()
    w = models.mlp_weights(mlp, shape.family)
    x = torch.randn(5, shape.width, dtype=torch.float64)
    act = ACT2FN[shape.activation]
    linear = torch.nn.functional.linear
    hidden = linear(x, w.up, w.up_bias)
    hidden = act(linear(x, w.gate, w.gate_bias)) * hidden if w.gate is not None else act(hidden)
    torch.testing.assert_close(linear(hidden, w.down, w.down_bias), mlp(x), rtol=1e-9, atol=1e-12)
    mlp.float()


@pytest.mark.parametrize("name", NAMES)
def test_what_a_visit_gets_is_the_module_s_own(name, bases, lock_config):
    """In teacher mode the logits are bitwise the base's; x and y are those that the MLP itself sees and gives."""
    base = bases[name]
    model, shape, switches = swapped(base, lock_config)
    own, seen = {}, {}
    handles = []
    for layer, path in enumerate(shape.family.mlp_paths(i) for i in range(shape.layers)):
        first, last = base.get_submodule(path[0]), base.get_submodule(path[-1])
        keep = own.setdefault(layer, [])
        handles.append(first.register_forward_pre_hook(lambda m, args, keep=keep: keep.append(args[0].clone())))
        handles.append(last.register_forward_hook(lambda m, args, out, keep=keep: keep.append(out.clone())))

    def visit(switch, x, y):
        seen[switch.layer] = [x.clone(), y.clone()]

    with torch.no_grad(), surgery.mode(switches, "teacher", visit):
        logits = model(IDS).logits
        assert torch.equal(logits, base(IDS).logits)
    for handle in handles:
        handle.remove()
    for layer in own:
        assert all(torch.equal(a, b) for a, b in zip(own[layer], seen[layer], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_student_at_coupling_zero_is_the_base(name, bases, lock_config):
    model, shape, switches = swapped(bases[name], lock_config, depth=3, start="warm")
    for switch in switches:
        switch.net.b.fill_(0.0)
        assert sum(p.numel() for p in switch.net.parameters()) == pytest.approx(
            shape.mlp_params, abs=3 * shape.inner + shape.width
        )
    with torch.no_grad(), surgery.mode(switches, "student"):
        torch.testing.assert_close(model(IDS).logits, bases[name](IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_bytes_of_the_mlp_are_the_formula_s(name, trainable, bases):
    """Hooks count what the live MLP keeps for backward; Phi-3's fused matrix is one storage."""
    base, shape = bases[name], shape_of(bases[name])
    mlp = models.find_mlps(base, shape.family, (1,))[1].requires_grad_(trainable)
    x = torch.randn(7, shape.width).requires_grad_(True) * 1.0
    counter = SavedBytes(mlp)
    with counter:
        mlp(x)
    mlp.requires_grad_(True)
    assert counter.total == 7 * shapes.saved_bytes(shape, 1, 4, trainable)


def test_gradients_are_plain_ones_where_attention_is_added_in_place(bases, lock_config):
    """Falcon adds its attention onto the MLP's output itself: the heal's visit must not be touched by it."""
    for name in ("falcon-parallel", "falcon-new"):
        model, _, switches = swapped(bases[name], lock_config, coupling=0.5)
        kept = []

        def visit(switch, x, out, kept=kept):
            kept.append((out, out.detach().clone(), switch.net(x.detach(), flat=True) - out.detach()))

        for switch in switches:
            switch.net.b.fill_(0.3)
        with surgery.mode(switches, "student", visit):
            model(IDS).logits.square().sum().backward()
        for _, at_visit, difference in kept:
            expected = difference.detach() + at_visit
            assert torch.isfinite(expected).all()
        with_visit = [p.grad.clone() for s in switches for p in s.net.parameters()]
        model.zero_grad()
        with surgery.mode(switches, "student"):
            model(IDS).logits.square().sum().backward()
        plain = [p.grad for s in switches for p in s.net.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(with_visit, plain, strict=True))


@pytest.fixture(scope="module")
def exported(bases, save_base, start_nets, tmp_path_factory):
    """Each family's base folder and a locked folder of layer 0 alone, started warm, b = 0.3."""

    place = tmp_path_factory.mktemp("families")
    found = {}
    for name, base in bases.items():
        folder = save_base(base, place / f"base-{name}")
        form = "gated" if shape_of(base).family.gated else "plain"
        nets = start_nets(base, form=form, layers="0")
        export.export_locked(folder, place / f"locked-{name}", "fp32", form, nets, manifest(form, nets))
        found[name] = (folder, place / f"locked-{name}")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_locked_folder(name, exported, bases):
    """The net computes the recurrence, the layer left out and all else are bitwise the base's, ties stay ties."""
    base, locked = bases[name], models.load_model(exported[name][1])
    shape = shape_of(locked)
    assert shape.locked
    assert shape.family.model_type == FAMILY_CONFIGS[name][0]
    assert list(shape.ranks) == [0]
    state, own = locked.state_dict(), base.state_dict()
    prefixes = tuple(path + "." for path in shape.family.mlp_paths(0))
    for key, value in own.items():
        if not key.startswith(prefixes):
            assert torch.equal(state[key], value), key
    assert {k for k in state if not k.startswith(prefixes)} == {k for k in own if not k.startswith(prefixes)}
    tied = locked.get_input_embeddings().weight is locked.get_output_embeddings().weight
    assert tied == shape_of(base).tied == locked.config.tie_word_embeddings
    names = _names_on_disk(exported[name][1])
    assert len(names) == len(state) - int(tied)
    with torch.no_grad():
        assert not torch.equal(locked(IDS).logits, base(IDS).logits)


def _names_on_disk(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


OUTSIDE = """
import json, sys


class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dlrscale":
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Block())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ids = torch.arange(3, 23).view(2, 10)
out = {}
for name, folder in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        out[name] = model(ids).logits
        for cache in (True, False):
            out[f"{name}-{cache}"] = model.generate(ids[:1], max_new_tokens=5, min_new_tokens=5, do_sample=False,
                                                    use_cache=cache)
save_file(out, sys.argv[2])
"""


@pytest.fixture(scope="module")
def outside(exported, tmp_path_factory):
    """Logits and generated ids of every locked folder, from one process without dlrscale."""
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("outside")
    script = folder / "script.py"
    script.write_text(OUTSIDE)
    folders = json.dumps({name: str(locked) for name, (_, locked) in exported.items()})
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(folder / "hf")}
    line = [sys.executable, str(script), folders, str(folder / "out")]
    done = subprocess.run(line, env=env, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "out")


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_generates_where_dlrscale_is_not(name, exported, outside):
    locked = models.load_model(exported[name][1])
    with torch.no_grad():
        assert torch.equal(outside[name], locked(IDS).logits)
    assert torch.equal(outside[f"{name}-True"], outside[f"{name}-False"])
    assert outside[f"{name}-True"].shape == (1, 15)


@pytest.mark.parametrize("name", NAMES)
def test_flattened_it_is_a_model_of_the_base_s_class(name, exported, bases, lock_config, tmp_path):
    """The flat model computes what every block computes that reads x alone, in the base's own architecture."""
    base, locked = bases[name], models.load_model(exported[name][1])
    flat = export.flattened_model(locked)
    assert type(flat) is type(base)
    with torch.no_grad():
        for net in (m for m in locked.modules() if type(m).__name__ == "DLRNet"):
            net.b.fill_(0.0)
        torch.testing.assert_close(flat(IDS).logits, locked(IDS).logits, rtol=1e-4, atol=1e-4)
        # A warm net at b = 0 is the base MLP itself.
        torch.testing.assert_close(flat(IDS).logits, base(IDS).logits, rtol=1e-4, atol=1e-4)
    flat.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, flat(IDS).logits)


@pytest.mark.parametrize("name", NAMES)
def test_lora_reaches_every_linear_map_but_the_head(name, exported):
    """All-linear LoRA adapts attention, DLR factors and what is left of MLPs; lora-attn the attention of each layer."""
    from dlrscale import attacks

    knobs = {"rank": 2, "alpha": 4, "dropout": 0.0}
    locked = models.load_model(exported[name][1])
    shape = shape_of(locked)
    everything = attacks.find("lora").linear_names(locked, shape, attention_only=False)
    heads = attacks.find("lora").linear_names(locked, shape, attention_only=True)
    assert len(heads) == shape.layers * len(shape.family.attention)
    assert sum(".blocks." in n for n in everything) == 2 * len(shape.ranks[0])
    linears = [n for n, m in locked.named_modules() if hasattr(m, "weight") and getattr(m.weight, "ndim", 0) == 2]
    embeddings = [n for n, m in locked.named_modules() if isinstance(m, torch.nn.Embedding)]
    head = next(n for n, m in locked.named_modules() if m is locked.get_output_embeddings())
    assert set(everything) == set(linears) - set(embeddings) - {head}
    model = attacks.find("lora").choose(locked, shape, knobs)
    with torch.no_grad():
        assert model(IDS).logits.shape == (2, 10, shape.vocabulary)


@pytest.mark.parametrize(
    ("model_type", "part"),
    [("mixtral", "MixtralSparseMoeBlock"), ("qwen2_moe", "Qwen2MoeSparseMoeBlock"), ("gptj", "GPTJMLP")],
)
def test_another_architecture_is_refused_by_what_it_holds(model_type, part, tmp_path):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(SurgeryError) as first:
        shapes.find_family(shapes.read_config(tmp_path))
    text = str(models.refuse_family(tmp_path, first.value))
    assert all(words in text for words in (model_type, part, "Looked at ", ".0 (", "Looked for one MLP", "llama"))


def test_an_architecture_that_nobody_knows(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nova"}')
    with pytest.raises(SurgeryError) as first:
        shapes.find_family(shapes.read_config(tmp_path))
    text = str(models.refuse_family(tmp_path, first.value))
    assert "'nova'" in text
    assert "transformers cannot build it either" in text


def test_nothing_is_half_replaced(make_model, lock_config):
    """All layers are looked at before the first one is replaced."""
    model = make_model("opt")
    model.model.decoder.layers[1].fc2 = None
    with pytest.raises(SurgeryError, match=r"model\.decoder\.layers\.1\.fc1 \(OPTDecoderLayer\) has no fc2"):
        surgery.install(model, shape_of(model), lock_config(form="plain"))
    assert type(model.model.decoder.layers[0].fc1) is torch.nn.Linear


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gemma", "phi3"])
def test_a_plain_net_is_no_mlp_where_mlps_have_a_gate_and_no_biases(name, bases):
    shape = shape_of(bases[name])
    locked = shapes.ModelShape(**{f: getattr(shape, f) for f in shape.__dataclass_fields__} | {"form": "plain"})
    with pytest.raises(SurgeryError, match=r"no gate.*undistil"):
        export.check_flattens(locked)


def test_flat_weights_of_phi3_stay_in_the_fused_order(bases, exported):
    """Gate first: the chunk order of the base module."""
    locked = models.load_model(exported["phi3"][1])
    flat = export.flattened_model(locked)
    weights = dlr.flat_weights(locked.model.layers[0].mlp)
    fused = flat.model.layers[0].mlp.gate_up_proj.weight
    assert torch.equal(fused, torch.cat([weights.gate, weights.up]))


def test_the_table_stands_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "lock.md").read_text()
    for family in shapes.FAMILIES.values():
        assert f"| `{family.model_type}` | `{family.mlp.format('N')}` |" in text
