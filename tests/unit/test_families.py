"""Every row of the table of families against a live model of that family: surgery, export, flattening, bytes."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from dlrscale import attacks, distil, export, models, shapes, surgery
from dlrscale.data import TokenData
from dlrscale.errors import SurgeryError
from dlrscale.jobs.attack import mlp_parts
from dlrscale.jobs.common import parameter_counts
from dlrscale.measure import Phases, SavedBytes
from dlrscale.modeling.dlr_net import DLRNet

IDS = torch.randint(3, 260, (2, 9), generator=torch.Generator().manual_seed(3))
# name: (family, changes of its configuration). Each way of wiring that a family knows is here.
VARIANTS = {
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma-legacy": ("gemma", {"hidden_act": "gelu"}),
    "phi": ("phi", {"partial_rotary_factor": 0.25}),
    "phi3": ("phi3", {}),
    "phi3-relu": ("phi3", {"hidden_act": "relu"}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu_fast"}),
    "opt": ("opt", {}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16, "enable_bias": False}),
    "falcon": ("falcon", {}),
    "falcon-sequential": ("falcon", {"parallel_attn": False, "bias": True, "alibi": True, "multi_query": False}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-one-norm": ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    "gpt2": ("gpt2", {}),
}
KNOBS = {"rank": 2, "alpha": 4, "dropout": 0.0}


@pytest.fixture(params=VARIANTS)
def base(request, make_model):
    family, changes = VARIANTS[request.param]
    return make_model(family, **changes)


def shape_of(model):
    return shapes.model_shape(model.config.to_dict())


def form_of(shape):
    return "gated" if shape.family.gated else "plain"


def install(model, lock_config, **changes):
    shape = shape_of(model)
    return surgery.install(model, shape, lock_config(**({"form": form_of(shape)} | changes)))


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def test_every_family_has_a_variant():
    assert {family for family, _ in VARIANTS.values()} == set(shapes.FAMILIES)


# --- The table against the source ---------------------------------------------------------------------------------


def test_the_shape_is_that_of_the_live_model(base):
    config = base.config.to_dict()
    shape = shapes.model_shape(config)
    mlps = models.find_mlps(base, shape, range(2))
    assert shape.layers == 2 == len(mlps)
    for mlp in mlps.values():
        assert shape.mlp_params == sum(p.numel() for p in mlp.parameters())
        weights = models.mlp_weights(mlp, shape.family)
        assert weights.up.shape == (shape.inner, shape.width)
        assert (weights.down_bias is not None) is shape.mlp_bias
        applied = getattr(mlp, shape.family.activation_module)
        assert type(applied) is type(ACT2FN[shape.activation])
        x = torch.linspace(-4, 4, 99)
        assert torch.equal(applied(x), ACT2FN[shape.activation](x))
    assert shape.tied == (base.get_output_embeddings().weight is base.get_input_embeddings().weight)
    assert shape.vocabulary == base.get_output_embeddings().out_features
    assert shape.max_length == (None if config.get("alibi") else 64)


@pytest.mark.parametrize("name", shapes.FAMILIES)
def test_what_a_config_leaves_out_is_the_familys_own_default(name):
    """A config.json may lack what equals transformers' default, or name the activation as an old release did."""
    family, defaults = shapes.FAMILIES[name], AutoConfig.for_model(name)
    sizes = {family.layers: 2, family.width: 64} | ({} if family.inner_default else {family.inner: 48})
    shape = shapes.model_shape({"model_type": name} | sizes)
    live = AutoConfig.for_model(name, **sizes)
    assert shape.inner == (getattr(live, family.inner) or 256)
    assert shape.activation == getattr(live, family.activation)
    assert shape.tied == live.tie_word_embeddings
    assert shape.mlp_bias == (getattr(live, family.bias) if isinstance(family.bias, str) else family.bias)
    assert shape.dropout == (getattr(defaults, family.dropout) if family.dropout else 0.0)
    for old in ("gelu", "relu"):
        config = {"model_type": name, family.activation: old} | sizes
        assert shapes.model_shape(config).activation == getattr(AutoConfig.for_model(**config), family.activation)


def test_layers_that_come_and_go_are_refused(make_model):
    """OPT's layerdrop: each rank would leave out other layers, and at ZeRO 3 all would wait for ever."""
    config = make_model("opt").config.to_dict()
    assert config["layerdrop"] == 0.0
    with pytest.raises(SurgeryError, match=r"layerdrop 0\.1 .* Set it to 0"):
        shapes.model_shape(config | {"layerdrop": 0.1})


def test_a_missing_inner_width_is_no_guess():
    with pytest.raises(SurgeryError, match=r"mistral model lacks intermediate_size"):
        shapes.model_shape({"model_type": "mistral", "num_hidden_layers": 2, "hidden_size": 32})


# --- Surgery ------------------------------------------------------------------------------------------------------


def watch(model, shape):
    """The true input and output of every MLP in one forward, cloned before anybody adds to them in place."""
    seen = {}
    for layer in range(shape.layers):
        home = model.get_submodule(shape.family.home(layer))
        first, last = (home.fc1, home.fc2) if shape.family.inline else (home, home)
        first.register_forward_pre_hook(lambda m, args, layer=layer: seen.update({(layer, "x"): args[0].clone()}))
        last.register_forward_hook(lambda m, args, out, layer=layer: seen.update({(layer, "y"): out.clone()}))
    logits(model)
    return seen


def test_visits_get_the_true_input_and_output(base, lock_config):
    before, shape = logits(base), shape_of(base)
    truth = watch(copy.deepcopy(base), shape)
    seen = {}
    switches = install(base, lock_config)
    assert torch.equal(logits(base), before)
    visit = lambda s, x, y: seen.update({(s.layer, "x"): x.clone(), (s.layer, "y"): y.clone()})  # noqa: E731
    with surgery.mode(switches, "teacher", visit):
        logits(base)
    assert set(seen) == set(truth) == {(i, k) for i in range(2) for k in "xy"}
    assert all(torch.equal(seen[key], truth[key]) for key in truth)


def test_a_warm_student_at_coupling_zero_is_the_base(base, lock_config):
    before, shape = logits(base), shape_of(base)
    ranks = shapes.resolve_ranks(form_of(shape), shape, 5, None)
    switches = install(base, lock_config, depth=5)
    for switch in switches:
        counted = sum(p.numel() for p in switch.net.parameters())
        assert counted == shapes.dlr_params(switch.net.form, shape.width, ranks, shape.mlp_bias)
        matrices = [sum(p.numel() for p in m.parameters() if p.dim() == 2) for m in (switch.net, switch.teacher)]
        assert matrices[0] == matrices[1]
    with surgery.mode(switches, "student"):
        torch.testing.assert_close(logits(base), before, rtol=1e-3, atol=1e-4)
    for switch in switches:
        switch.net.b.fill_(2.0)
    with surgery.mode(switches, "student"):
        assert (logits(base) - before).norm() > 1e-2 * before.norm()
    assert torch.equal(logits(base), before)


def test_errors_and_gradients_do_not_see_what_a_layer_adds_in_place(base, lock_config, fake_engine, step_batch):
    """Falcon adds attention onto the MLP's output where it lies; all figures and gradients equal those on clones.

    OPT hands (B T, D) to its maps, the others (B, T, D): the real tokens of a padded batch are found in both.
    """
    switches = install(base, lock_config, harden=True)
    batch = step_batch((IDS, [9, 6]))
    rows = [ids[:n].numpy() for ids, n in zip(IDS, (9, 6), strict=True)]
    tokens = TokenData(rows, rows, False, {})

    def steps():
        distiller = distil.Distiller(switches, lock_config())
        found = [(distiller.calibrate(fake_engine(base), batch.micro_batches), dict(distiller.floors))]
        for step in (distiller.distil_step, distiller.heal_step):
            engine = fake_engine(base)
            found.append((step(engine, batch, Phases(engine.device)), engine.gradients))
        return [*found, (distiller.layer_errors(fake_engine(base), tokens, 2, 2), {})]

    plain = steps()
    for switch in switches:  # now nobody can write into what the switch gave to its visit or keeps
        switch.register_forward_hook(lambda module, args, out: out.clone())
    for (values, gradients), (other, others) in zip(plain, steps(), strict=True):
        assert values == other
        assert all(torch.equal(torch.as_tensor(gradients[k]), torch.as_tensor(others[k])) for k in others)
    (scales, floors), _, (_, gradients), (errors, _) = plain
    assert len(gradients) == sum(p.requires_grad for p in base.parameters())
    # By hand, from the true inputs and outputs of the 15 real tokens.
    seen = {}
    for switch in switches:
        switch.register_forward_hook(lambda s, args, out: seen.update({s.layer: (args[0].clone(), out.clone())}))
    with torch.no_grad():
        base(**{k: v for k, v in batch.micro_batches[0].items() if k != "labels"})
    for switch in switches:
        x, y = (v.reshape(18, -1)[:15] for v in seen[switch.layer])
        assert scales[switch.layer] == pytest.approx(
            float(0.25 * (x.norm(dim=-1) / y.norm(dim=-1)).median()), rel=2**-7
        )
        assert floors[switch.layer] == pytest.approx(float(y.norm(dim=-1).square().median()), rel=1e-5)
        with torch.no_grad():
            wrong = float((switch.net(x) - y).square().sum() / y.square().sum())
        assert errors[switch.layer] == pytest.approx(wrong, rel=1e-4)


def test_a_module_that_is_not_what_the_config_says_changes_nothing(base, lock_config):
    shape = shape_of(base)
    home = base.get_submodule(shape.family.home(1))
    setattr(home, shape.family.down, nn.Linear(7, shape.width))
    before = dict(base.named_modules())
    with pytest.raises(SurgeryError) as error:
        install(base, lock_config)
    assert f"{shape.family.home(1)}.{shape.family.down} (Linear)" in str(error.value)
    assert dict(base.named_modules()) == before
    assert all(p.requires_grad for p in base.parameters())


# --- Export and flattening ----------------------------------------------------------------------------------------


def lock_of(base, folder, save_base, start_nets, **options):
    shape = shape_of(base)
    options.setdefault("form", form_of(shape))
    save_base(base, folder)
    return export.locked_model(folder, "fp32", options["form"], start_nets(base, scale=0.8, **options))


def test_an_exported_folder_is_the_student(base, save_base, start_nets, tokenizer, tmp_path, lock_config):
    locked = lock_of(base, tmp_path / "base", save_base, start_nets, layers="1")
    export.save_folder(locked, tokenizer, tmp_path / "out", {})
    again = models.load_model(tmp_path / "out")
    family = shape_of(base).family
    assert type(again) is models.locked_classes(family)[1]
    assert torch.equal(logits(again), logits(locked))
    switches = install(base, lock_config, layers="1")
    switches[0].net.b.fill_(locked.get_submodule(family.mlp.format(1)).b)
    with surgery.mode(switches, "student"):
        assert torch.equal(logits(again), logits(base))
    # The base's own settings, and every layer that was left out, are as they were.
    drop = ("model_type", "architectures", "auto_map", "dlr", "transformers_version", "_name_or_path", "dtype")
    old, new = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("base", "out"))
    assert {k: v for k, v in new.items() if k not in drop} == {k: v for k, v in old.items() if k not in drop}
    source, state = models.load_model(tmp_path / "base").state_dict(), again.state_dict()
    kept = [k for k in source if not k.startswith(family.state_prefixes(1))]
    assert len(source) > len(kept) > len(source) / 2
    assert all(torch.equal(state[k], source[k]) for k in kept)
    nets = [n for n, m in again.named_modules() if isinstance(m, DLRNet)]
    assert nets == [family.mlp.format(1)]
    # A tied pair is one tensor on disk, one after loading, and counted once.
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not again.config.tie_word_embeddings  # noqa: SIM118
        names = {k for k, _ in again.named_parameters()}  # a pair has one name here
        stored = sum(file.get_tensor(k).numel() for k in file.keys() if k in names)  # noqa: SIM118
    assert parameter_counts(again)["params/total"] == stored


@pytest.mark.parametrize("options", [{}, {"layers": "1", "rank": 20}], ids=["parity", "unequal"])
def test_a_flattened_model_is_the_flat_mode(base, save_base, start_nets, tokenizer, tmp_path, options):
    locked = lock_of(base, tmp_path / "base", save_base, start_nets, **options)
    coupled, shape = logits(locked), shape_of(base)
    flat = export.flattened_model(locked)
    assert type(flat) is type(base)
    export.save_folder(flat, tokenizer, tmp_path / "flat", {})
    assert not list((tmp_path / "flat").glob("*.py"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "flat", trust_remote_code=False)
    assert getattr(again.config, shape.family.inner) == (80 if options else shape.inner)
    for module in locked.modules():
        if isinstance(module, DLRNet):
            module.b.zero_()
    torch.testing.assert_close(logits(again), logits(locked), rtol=1e-3, atol=1e-4)
    assert (coupled - logits(again)).norm() > 1e-3 * coupled.norm()


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_which_forms_flatten(make_model, family):
    """A plain net on a gated MLP needs biases there, which only Llama's configuration knows."""
    shape = shape_of(make_model(family))
    fits = {"gated": shape.family.gated, "plain": not shape.family.gated or family == "llama", "prenorm": False}
    from dataclasses import replace

    for form, allowed in fits.items():
        if allowed:
            shapes.check_flattens(replace(shape, form=form))
            continue
        with pytest.raises(SurgeryError) as error:
            shapes.check_flattens(replace(shape, form=form))
        assert all(part in str(error.value) for part in (form, family, "undistil"))


# --- Families that are not in the table ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (
            {"model_type": "mixtral"},
            ("model.layers.0.mlp (MixtralSparseMoeBlock: gate, experts)", "mixture of experts"),
        ),
        ({"model_type": "qwen2_moe"}, ("model.layers.0.mlp (Qwen2MoeSparseMoeBlock: ", "mixture of experts")),
        # Its first layers are dense, the later ones are not.
        ({"model_type": "deepseek_v3"}, ("model.layers.3.mlp (DeepseekV3MoE: ", "mixture of experts")),
        ({"model_type": "mamba"}, ("backbone.layers.0.mixer (MambaMixer: ", "two or three linear maps")),
        ({"model_type": "bert-of-mine"}, ("transformers builds no causal language model", "bert-of-mine")),
        ({"model_type": "t5"}, ("transformers builds no causal language model", "T5Config")),
        ({"model_type": "mixtral", "hidden_size": "x"}, ("transformers builds no causal", "hidden_size")),
        ({}, ("model_type None", "transformers builds no causal language model")),
    ],
)
def test_another_family_is_refused_by_what_was_looked_at(config, parts):
    with pytest.raises(SurgeryError) as error:
        models.refuse_family(config)
    for part in (*parts, "model_type", "llama, mistral, qwen2, qwen3, gemma, phi3, phi, gpt_neox, opt, falcon, gpt2"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["lock", "attack"])
def test_the_commands_name_the_expert_block(command, tmp_path):
    from click.testing import CliRunner

    from dlrscale.cli import dlrscale

    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "qwen2_moe", "num_hidden_layers": 2}))
    line = [command, "--model", str(tmp_path / "m"), "--data", "x.txt", "--out", str(tmp_path / "out")]
    with pytest.raises(SurgeryError, match=r"model\.layers\.0\.mlp \(Qwen2MoeSparseMoeBlock") as error:
        CliRunner().invoke(
            dlrscale, line + (["--strategy", "full"] if command == "attack" else []), catch_exceptions=False
        )
    assert error.value.exit_code == 2
    assert not (tmp_path / "out").exists()


# --- Attacks ------------------------------------------------------------------------------------------------------


def counted_bytes(model, shape, trainable):
    """Counted and derived bytes per token of the MLP parts in one training forward."""
    model.config._attn_implementation = "eager"
    with SavedBytes(model, mlp_parts(model, shape)) as counter:
        model.train()(input_ids=IDS, use_cache=False)
    formula = sum(shapes.saved_bytes(shape, layer, 4, trainable) for layer in range(2))
    return sum(counter.by_part.values()) / IDS.numel(), formula


@pytest.mark.parametrize("form", ["own", "prenorm"])
def test_saved_bytes_are_those_of_the_formula(base, save_base, start_nets, tmp_path, form):
    options = {"layers": "1"} | ({"form": "prenorm"} if form == "prenorm" else {})
    locked = lock_of(base, tmp_path / "base", save_base, start_nets, **options)
    for model in (base, locked):
        shape = shape_of(model)
        counted, formula = counted_bytes(model, shape, True)
        assert counted == formula
        frozen = attacks.find("lora-attn").choose(copy.deepcopy(model), shape, KNOBS)
        counted, formula = counted_bytes(frozen, shape, False)
        assert counted == formula


def test_lora_reaches_all_linear_maps(base, save_base, start_nets, tmp_path):
    """Falcon's linear maps are a class of their own; the LM head is left alone."""
    locked = lock_of(base, tmp_path / "base", save_base, start_nets, layers="1")
    shape = shape_of(locked)
    attention = {part.split(".")[-1] for part in shape.family.attention}
    for trainable, wanted in (
        ("lora-attn", attention),
        ("lora", attention | set(shape.family.matrices) | {"a_proj", "b_proj"}),
    ):
        model = attacks.find(trainable).choose(copy.deepcopy(locked), shape, KNOBS)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all(".lora_" in n for n in names)
        touched = {n.split(".lora_")[0].split(".")[-1] for n in names} - {"project_in", "project_out"}
        assert touched == wanted
        assert len(mlp_parts(model, shape)) == (2 + 4 if shape.family.inline else 2)
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
