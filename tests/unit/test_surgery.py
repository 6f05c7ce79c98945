"""DLR-Nets beside the MLPs of a base model: what answers, what is trained, what is left alone."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlrscale import models, shapes, surgery
from dlrscale.errors import ConfigError, SurgeryError

IDS = torch.randint(3, 260, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["llama", "gpt2"])
def base(request, make_llama, make_gpt2):
    return make_llama() if request.param == "llama" else make_gpt2()


def install(model, lock_config, **changes):
    shape = shapes.model_shape(model.config.to_dict())
    changes.setdefault("form", "gated" if shape.family.gated else "plain")
    return surgery.install(model, shape, lock_config(**changes))


def mlp_path(model):
    return shapes.find_family(model.config.to_dict()).mlp


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_teacher_is_bitwise_the_base(base, lock_config):
    before = logits(base)
    switches = install(base, lock_config)
    assert len(switches) == 2
    assert torch.equal(logits(base), before)
    with surgery.mode(switches, "teacher"):
        assert torch.equal(logits(base), before)


def test_a_warm_student_at_coupling_zero_is_the_base(base, lock_config):
    before = logits(base)
    switches = install(base, lock_config, start="warm")
    with surgery.mode(switches, "student"):
        torch.testing.assert_close(logits(base), before, rtol=1e-4, atol=1e-4)
    for switch in switches:
        switch.net.b.fill_(2.0)
    with surgery.mode(switches, "flat"):
        torch.testing.assert_close(logits(base), before, rtol=1e-4, atol=1e-4)
    with surgery.mode(switches, "student"):
        assert (logits(base) - before).norm() > 1e-2 * before.norm()
    assert torch.equal(logits(base), before)  # mode() goes back to the teacher


def test_the_student_has_no_dropout(make_gpt2, lock_config):
    """GPT-2's own MLP has a dropout of 0.1: a warm student at b = 0 must equal its teacher all the same."""
    switches = install(make_gpt2(resid_pdrop=0.1), lock_config, start="warm")
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    for switch in switches:
        assert not switch.net.training
        torch.testing.assert_close(switch.net(x), switch.teacher(x), rtol=1e-4, atol=1e-5)


def test_mode_goes_back_after_an_error(base, lock_config):
    switches = install(base, lock_config)
    with pytest.raises(RuntimeError, match="x"), surgery.mode(switches, "student", lambda *a: None):
        raise RuntimeError("x")
    assert all((s.mode, s.visit) == ("teacher", None) for s in switches)


def test_only_dlr_nets_are_trainable(base, lock_config):
    switches = install(base, lock_config)
    trainable = {id(p) for p in base.parameters() if p.requires_grad}
    assert trainable == {id(p) for s in switches for p in s.net.parameters()}
    assert all(".net." in name for name, p in base.named_parameters() if p.requires_grad)


def test_parameters_match_the_formula(base, lock_config):
    shape = shapes.model_shape(base.config.to_dict())
    for switch in install(base, lock_config, depth=5):
        ranks = shapes.resolve_ranks(switch.net.form, shape, 5, None)
        assert [b.b_proj.in_features for b in switch.net.blocks] == list(ranks)
        counted = sum(p.numel() for p in switch.net.parameters())
        assert counted == shapes.dlr_params(switch.net.form, shape.width, ranks, shape.mlp_bias)
        # Parity: as many matrix parameters as the MLP beside it.
        matrices = [sum(p.numel() for p in m.parameters() if p.dim() == 2) for m in (switch.net, switch.teacher)]
        assert matrices[0] == matrices[1]


def test_a_subset_of_layers_leaves_the_others_untouched(base, lock_config):
    path = mlp_path(base)
    other = base.get_submodule(path.format(0))
    state = copy.deepcopy(other.state_dict())
    switches = install(base, lock_config, layers="1")
    assert [s.layer for s in switches] == [1]
    assert base.get_submodule(path.format(0)) is other
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    assert base.get_submodule(path.format(1)) is switches[0]
    assert not any(p.requires_grad for p in other.parameters())


def test_visits_get_the_true_input_and_output(base, lock_config):
    path = mlp_path(base)
    truth = {}
    reference = copy.deepcopy(base)
    for layer in range(2):
        reference.get_submodule(path.format(layer)).register_forward_hook(
            lambda module, args, out, layer=layer: truth.update({layer: (args[0], out)})
        )
    logits(reference)
    switches = install(base, lock_config)
    seen = {}
    with surgery.mode(switches, "teacher", lambda switch, x, y: seen.update({switch.layer: (x, y)})):
        logits(base)
    assert set(seen) == {0, 1}
    for layer in seen:
        assert torch.equal(seen[layer][0], truth[layer][0])
        assert torch.equal(seen[layer][1], truth[layer][1])


def test_cold_starts_differ_by_layer_and_seed(base, lock_config):
    def weights(seed):
        switches = install(copy.deepcopy(base), lock_config, start="cold", seed=seed)
        return [s.net.blocks[0].a_proj.weight for s in switches]

    first, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_the_net_applies_the_activation_of_the_base(make_llama, lock_config):
    model = make_llama(hidden_act="relu")
    switch = install(model, lock_config)[0]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    weights = models.mlp_weights(switch.teacher, shapes.FAMILIES["llama"])
    expected = (F.relu(x @ weights.gate.T) * (x @ weights.up.T)) @ weights.down.T
    torch.testing.assert_close(switch.net(x), expected, rtol=1e-4, atol=1e-5)


def test_dtype_and_dropout_are_those_of_the_base(make_gpt2, lock_config):
    model = make_gpt2(resid_pdrop=0.25).to(torch.bfloat16)
    net = install(model, lock_config)[0].net
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert net.dropout.p == 0.25


def test_a_missing_mlp_names_the_module(make_llama, lock_config):
    model = make_llama()
    del model.model.layers[1].mlp
    with pytest.raises(SurgeryError, match=r"LlamaForCausalLM has no module model\.layers\.1\.mlp"):
        install(model, lock_config)


def test_an_mlp_of_another_kind_names_the_module_and_what_is_missing(make_llama, lock_config):
    model = make_llama()
    model.model.layers[1].mlp = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(
        SurgeryError, match=r"model\.layers\.1\.mlp \(Sequential\) has no gate_proj, up_proj, down_proj"
    ):
        install(model, lock_config)


def test_a_layer_that_does_not_exist(make_llama, lock_config):
    with pytest.raises(ConfigError, match=r"--layers '1-4': the model has layers 0 to 1; not there: \[2, 3, 4\]"):
        install(make_llama(), lock_config, layers="1-4")


def test_a_refused_install_changes_nothing(make_llama, lock_config):
    model = make_llama()
    before = logits(model)
    with pytest.raises(SurgeryError, match="--start warm"):
        install(model, lock_config, form="plain", start="warm")
    assert torch.equal(logits(model), before)
    assert not any(isinstance(m, surgery.Switch) for m in model.modules())


def test_mlp_weights_are_in_one_orientation(make_llama, make_gpt2):
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for model, activation in ((make_llama(), F.silu), (make_gpt2(), lambda v: F.gelu(v, approximate="tanh"))):
        shape = shapes.model_shape(model.config.to_dict())
        family, mlp = shape.family, models.find_mlps(model, shape, (1,))[1]
        w = models.mlp_weights(mlp, family)
        w = SimpleNamespace(**{k: 0.0 if v is None else v for k, v in vars(w).items()})
        up = x @ w.up.T + w.up_bias
        inner = activation(x @ w.gate.T + w.gate_bias) * up if family.gated else activation(up)
        torch.testing.assert_close(inner @ w.down.T + w.down_bias, mlp(x), rtol=1e-4, atol=1e-5)
