"""Starts of a DLR-Net: warm ones equal the base MLP, cold ones are well scaled at every depth."""

import copy
import itertools

import pytest
import torch
from torch.nn import functional as F

from dlrscale import dlr, models, shapes
from dlrscale.errors import SurgeryError
from dlrscale.modeling.dlr_net import DLRNet
from dlrscale.models import MLPWeights

DEPTHS = (4, 16, 64, 256)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ACTIVATION = torch.nn.SiLU()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net_of(model, ranks, form=None):
    """The first MLP of a model, its family, and a warm DLR-Net of the given ranks."""
    shape = shapes.model_shape(model.config.to_dict())
    family, mlp = shape.family, models.find_mlps(model, shape, (0,))[0]
    weights = models.mlp_weights(mlp, family)
    form = form or ("gated" if family.gated else "plain")
    activation = getattr(mlp, family.activation_module)
    net = DLRNet(weights.up.shape[1], ranks, form, activation, bias=weights.down_bias is not None)
    dlr.warm_start(net.to(weights.up.dtype), weights, torch.Generator().manual_seed(0))
    return mlp, weights, net


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("family", ["llama", "llama-bias", "gpt2"])
def test_a_warm_start_at_coupling_zero_is_the_base_mlp(make_llama, make_gpt2, family, dtype):
    model = make_gpt2() if family == "gpt2" else make_llama(mlp_bias=family == "llama-bias")
    model = model.to(DTYPES[dtype])
    ranks = (13, 12, 12, 11) if family != "gpt2" else (22, 21, 21)
    mlp, weights, net = net_of(model, ranks)
    assert sum(ranks) == weights.up.shape[0]
    if family != "llama":
        assert min(weights.up_bias.abs().max(), weights.down_bias.abs().max()) > 0.05
    x = randn(7, 32).to(DTYPES[dtype])
    expected, found = mlp(x).double(), net(x).double()
    # bf16: the blocks' outputs are rounded one by one before they are added, each by 2^-9 of the running sum.
    tolerance = 1e-6 if dtype == "fp32" else 2**-7
    assert (found - expected).norm() <= tolerance * expected.norm()
    assert torch.equal(net.b, torch.zeros_like(net.b))


def reference_mlp(weights, x, neurons, activation):
    """The base MLP of some of its neurons, in float64."""
    chosen = list(neurons)
    up = x.double() @ weights.up[chosen].double().T
    if weights.up_bias is not None:
        up = up + weights.up_bias[chosen].double()
    inner = activation(up)
    if weights.gate is not None:
        gate = x.double() @ weights.gate[chosen].double().T
        inner = activation(gate) * up
    out = inner @ weights.down[:, chosen].double().T
    return out if weights.down_bias is None else out + weights.down_bias.double()


def test_a_warm_start_with_fewer_neurons_takes_the_first(make_llama, make_gpt2):
    x = randn(7, 32)
    for model, activation in ((make_llama(), F.silu), (make_gpt2(), lambda v: F.gelu(v, approximate="tanh"))):
        _, weights, net = net_of(model, (5, 5, 5))
        expected = reference_mlp(weights, x, range(15), activation)
        torch.testing.assert_close(net(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_warm_start_with_more_neurons_is_still_the_base_mlp(make_llama, make_gpt2, family):
    model = make_llama() if family == "llama" else make_gpt2()
    rank = 20
    mlp, weights, net = net_of(model, (rank,) * 5)
    assert sum(b.b_proj.in_features for b in net.blocks) > weights.up.shape[0]
    x = randn(7, 32)
    torch.testing.assert_close(net(x), mlp(x), rtol=1e-5, atol=1e-5)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    spare = net.blocks[-1].b_proj.weight
    assert torch.equal(spare[:, -1], torch.zeros(32))


def test_a_warm_start_is_refused_where_it_is_not_defined(make_llama, make_gpt2):
    for model, form in ((make_llama(), "plain"), (make_llama(), "prenorm"), (make_gpt2(), "gated")):
        with pytest.raises(SurgeryError, match=rf"--start warm is not defined for the form {form} .*--start cold"):
            net_of(model, (4, 4), form)


def test_forms_with_a_warm_start_are_those_of_the_table(make_llama, make_gpt2):
    for model, kind in ((make_llama(), "gated"), (make_gpt2(), "two-matrix")):
        for form in shapes.FORMS.values():
            if form.start_on == kind:
                net_of(model, (4, 4), form.name)


def test_coupling_scale_by_hand():
    """Ratios 2, 0.5, 8, 1, 100 have the median 2; times 0.25 is 0.5."""
    x = torch.tensor([2.0, 1.0, 8.0, 3.0, 100.0])
    y = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0])
    assert dlr.coupling_scale(0.25, x, y) == 0.5
    assert dlr.coupling_scale(0.0, x, y) == 0.0


def test_coupling_scale_is_a_bf16_number():
    x = randn(101, seed=1).abs() + 0.1
    y = randn(101, seed=2).abs() + 0.1
    ratio = sorted((x.double() / y.double()).tolist())[50]
    found = dlr.coupling_scale(0.3, x, y)
    assert found == float(torch.tensor(found).to(torch.bfloat16))
    assert found == pytest.approx(0.3 * ratio, rel=2**-8)
    assert found != 0.3 * ratio


def test_coupling_scale_survives_a_dead_token():
    x, y = torch.ones(3), torch.tensor([0.0, 1.0, 1.0])
    assert dlr.coupling_scale(0.25, x, y) == 0.25


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["gated", "plain"])
def test_flat_weights_are_the_flat_net(form, bias):
    net = DLRNet(8, (5, 4, 4), form, ACTIVATION, bias=bias)
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=i))
        net.b.fill_(0.9)
    weights = dlr.flat_weights(net)
    assert weights.up.shape == (13, 8)
    assert weights.down.shape == (8, 13)
    assert (weights.gate is None) == (form == "plain")
    x = randn(6, 8, seed=99)
    up = x @ weights.up.T + (weights.up_bias if bias else 0)
    inner = F.silu(up)
    if form == "gated":
        inner = F.silu(x @ weights.gate.T + (weights.gate_bias if bias else 0)) * up
    out = inner @ weights.down.T + (weights.down_bias if bias else 0)
    torch.testing.assert_close(out, net(x, flat=True), rtol=1e-4, atol=1e-5)
    assert (out - net(x)).norm() > 0.01 * out.norm()


def test_flat_weights_of_prenorm_are_refused():
    with pytest.raises(SurgeryError, match="prenorm.*undistil"):
        dlr.flat_weights(DLRNet(8, (4, 4), "prenorm", ACTIVATION))


def test_flat_weights_of_an_untrained_warm_net_are_the_base_mlp(make_gpt2):
    _, weights, net = net_of(make_gpt2(), (22, 21, 21))
    net.b.fill_(0.5)
    flat = dlr.flat_weights(net)
    for name in ("up", "down", "up_bias", "down_bias"):
        assert torch.equal(getattr(flat, name), getattr(weights, name))


def test_a_cold_start_follows_its_generator():
    def states(seed):
        net = DLRNet(8, (4, 4), "gated", ACTIVATION, bias=True)
        dlr.cold_start(net, torch.Generator().manual_seed(seed))
        return net.state_dict()

    first, again, other = states(1), states(1), states(2)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["blocks.0.a_proj.weight"], other["blocks.0.a_proj.weight"])
    assert not torch.equal(first["blocks.0.a_proj.weight"], first["blocks.1.a_proj.weight"])
    assert torch.equal(first["blocks.0.a_proj.bias"], torch.zeros(8))
    assert torch.equal(first["bias"], torch.zeros(8))


# --- Stability: forms x depths x precisions, cold and warm ---
#
# With x ~ N(0, 1) per entry, A_k ~ N(0, 1/D) and B ~ N(0, c^2/S), S = sum(R_k), the entries of A_k x are N(0, 1).
# Uncoupled, out = B s with var(out) = S (c^2/S) E[s^2], so rms(out) = c m with m^2 = E[s^2] of the inner value:
#     plain, prenorm: E[silu(z)^2];  gated: E[silu(z)^2] E[z^2], which is the same number.
# The gradient of <v, out> with v ~ N(0, 1): (B^T v)_j is N(0, D c^2/S); summed over S inner units through A,
#     rms(grad)^2 = S (1/D) E[s'^2] D c^2/S = c^2 g^2;
#     plain: g^2 = E[silu'^2]; gated: g^2 = E[silu'^2] + E[silu^2];
#     prenorm as plain (its norm divides by 1 and projects out one direction of D).
# With coupling b = q rms(x) / rms(out), block k reads x + b d_k, whose variance lies between 1 and 1 + q^2.
# silu's second moment grows less than sigma^4, the gated one less than sigma^6: by (1 + q^2)^(3/2) <= 1.095 in
# rms at q = 1/4. The Jacobian is [prod(I + b J_k) - I] / b with independent J_k, so that
# rms(grad) = c g sqrt((e^p - 1) / p) with p = (q g / m)^2 <= 0.14: at most 1.04 more, below 1.15 with the growth
# of the variance. A warm start from matrices N(0, 1/D) and N(0, 1/F) is the same with c = 1. K appears nowhere.
# Drawing 512 inner units and 64 x 64 entries leaves some per cent of chance, bf16 some more: [0.85, 1.25].
COUPLING = 0.25
LOW, HIGH = 0.85, 1.25


def moments():
    """E[silu(z)^2] and E[silu'(z)^2] of a standard normal, by quadrature in float64."""
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
    sigmoid = torch.sigmoid(z)
    slope = sigmoid * (1 + z * (1 - sigmoid))
    return tuple(float(torch.trapezoid(f.square() * density, z)) for f in (z * sigmoid, slope))


def expected_rms(form, start):
    """rms(out) and rms(grad) by the derivation above."""
    silu2, slope2 = moments()
    c = 0.1 if start == "cold" else 1.0
    return c * silu2**0.5, c * (slope2 + (silu2 if form == "gated" else 0)) ** 0.5


def random_mlp(gated, width, inner):
    return MLPWeights(
        gate=randn(inner, width, seed=11) * width**-0.5 if gated else None,
        up=randn(inner, width, seed=12) * width**-0.5,
        down=randn(width, inner, seed=13) * inner**-0.5,
        gate_bias=None,
        up_bias=None,
        down_bias=None,
    )


def started(form, depth, start, dtype, width, inner, x):
    """A started net in its coupling, and the random MLP of its kind."""
    gated = form == "gated"
    mlp = random_mlp(gated, width, inner)
    net = DLRNet(width, shapes.split_ranks(inner, depth), form, ACTIVATION)
    if start == "warm":
        dlr.warm_start(net, mlp, torch.Generator())
    else:
        dlr.cold_start(net, torch.Generator().manual_seed(depth))
    net = net.to(dtype)
    with torch.no_grad():
        net.b.fill_(COUPLING * x.detach().norm() / net(x.to(dtype), flat=True).float().norm())
    return net, mlp


STARTS = [("gated", "cold"), ("plain", "cold"), ("prenorm", "cold"), ("gated", "warm"), ("plain", "warm")]
CASES = [(f, s, k, d) for (f, s), k, d in itertools.product(STARTS, DEPTHS, DTYPES)]


@pytest.mark.parametrize(("form", "start", "depth", "dtype"), CASES)
def test_output_and_gradient_are_well_scaled_at_the_start(form, start, depth, dtype):
    width, inner = 64, 512
    x = randn(64, width, seed=5)
    x = (x / x.square().mean().sqrt()).to(DTYPES[dtype]).requires_grad_()
    net, _ = started(form, depth, start, DTYPES[dtype], width, inner, x.detach().float())
    out = net(x)
    (out.float() * randn(64, width, seed=6)).sum().backward()
    out = out.detach()
    rms_out, rms_grad = expected_rms(form, start)
    assert LOW < float(out.float().square().mean().sqrt()) / rms_out < HIGH
    assert LOW < float(x.grad.float().square().mean().sqrt()) / rms_grad < HIGH
    # b ||d|| is the coupling times ||x||, up to what the coupling itself adds to d.
    assert float((net.b * out.float().norm() / x.float().norm()).detach()) == pytest.approx(COUPLING, rel=0.2)
    with torch.no_grad():
        # Every block gets a gradient of the same size: none is cut off at any depth.
        norms = torch.stack([b.b_proj.weight.grad.float().norm() / b.b_proj.in_features**0.5 for b in net.blocks])
        assert torch.isfinite(norms).all()
        assert norms.max() < 4 * norms.min()


# Fifty steps at K = 256 take a second: there in bf16 alone, the harder of the two.
TRAINED = [case for case in CASES if case[2:] in ((4, "fp32"), (4, "bf16"), (64, "fp32"), (256, "bf16"))]


@pytest.mark.parametrize(("form", "start", "depth", "dtype"), TRAINED)
def test_fifty_steps_bring_no_nan_and_a_smaller_loss(form, start, depth, dtype):
    width, inner = 16, 256
    x = randn(32, width, seed=5)
    net, mlp = started(form, depth, start, DTYPES[dtype], width, inner, x)
    up = x @ mlp.up.T
    y = (F.silu(x @ mlp.gate.T) * up if mlp.gate is not None else F.silu(up)) @ mlp.down.T
    x, parameters = x.to(DTYPES[dtype]), list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0, fused=True)
    losses = []
    for _ in range(50):
        loss = (net(x).float() - y).square().mean() / y.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    losses = torch.stack(losses)
    assert torch.isfinite(losses).all()
    assert losses[-5:].mean() < 0.5 * losses[0]
    assert all(torch.isfinite(p).all() for p in parameters)


def test_warm_start_does_not_touch_the_base_mlp(make_llama):
    model = make_llama()
    before = copy.deepcopy(model.state_dict())
    _, _, net = net_of(model, (24, 24))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_units_beyond_the_mlp_can_learn(make_llama, make_gpt2, family):
    """With more units than neurons a warm start is still the MLP, and every unit's B gets a gradient."""
    mlp, weights, net = net_of(make_llama() if family == "llama" else make_gpt2(), (40, 40))
    x = randn(16, weights.up.shape[1], seed=4)
    torch.testing.assert_close(net(x), mlp(x), rtol=1e-4, atol=1e-5)
    net(x).square().sum().backward()
    gradient = torch.cat([block.b_proj.weight.grad for block in net.blocks], dim=1)
    assert (gradient.norm(dim=0) > 0).all()
