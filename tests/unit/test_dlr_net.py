"""The DLR-Net against a float64 reference of its recurrence."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from dlrscale import shapes
from dlrscale.modeling import dlr_net
from dlrscale.modeling.dlr_net import DLRNet, rms_normalise

FORMS = list(shapes.FORMS)
WIDTH, RANKS = 8, (4, 3, 3, 2)


def make(form, bias=False, scale=0.7, seed=0, ranks=RANKS):
    """A net with all its numbers, biases too, away from zero."""
    generator = torch.Generator().manual_seed(seed)
    net = DLRNet(WIDTH, ranks, form, torch.nn.SiLU(), bias=bias)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        net.b.fill_(scale)
    return net


def inputs(dtype=torch.float32, seed=1):
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forward_is_the_recurrence(reference_net, form, bias):
    net, x = make(form, bias), inputs()
    expected = reference_net(net.state_dict(), form, x, F.silu)
    torch.testing.assert_close(net(x).double(), expected, rtol=1e-5, atol=1e-5)
    # The coupling matters: without it the result is another one.
    uncoupled = reference_net(net.state_dict() | {"b": torch.zeros(())}, form, x, F.silu)
    assert (expected - uncoupled).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_flat_is_the_sum_of_blocks_that_read_x(reference_net, form, bias):
    net, x = make(form, bias), inputs()
    state = net.state_dict()
    expected = torch.zeros_like(x, dtype=torch.float64)
    for k in range(len(RANKS)):
        one = {key.replace(f"blocks.{k}.", "blocks.0."): v for key, v in state.items() if f"blocks.{k}." in key}
        expected += reference_net(one | {"b": torch.zeros(())}, form, x, F.silu)
    if bias:
        expected += state["bias"].double()
    torch.testing.assert_close(net(x, flat=True).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_zero_coupling_is_flat(form):
    net, x = make(form, scale=0.0), inputs()
    torch.testing.assert_close(net(x), net(x, flat=True))


@pytest.mark.parametrize("form", FORMS)
def test_the_d_form_is_the_residual_network(form):
    """h_0 = x / b, h_{k+1} = h_k + B_k s(A_k n(b h_k)), out = h_K - h_0, in float64."""
    net, x = make(form, scale=0.7).double(), inputs(torch.float64)
    h = start = x / 0.7
    net.b.fill_(0.7)
    for block in net.blocks:
        u = 0.7 * h
        if form == "prenorm":
            u = u / (u.square().mean(-1, keepdim=True).sqrt() + 1e-6)
        hidden = u @ block.a_proj.weight.T
        if form == "gated":
            gate, up = hidden.chunk(2, -1)
            hidden = F.silu(gate) * up
        else:
            hidden = F.silu(hidden)
        h = h + hidden @ block.b_proj.weight.T
    torch.testing.assert_close(net(x), h - start, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    net, x = make(form, bias=True, ranks=(2, 1)).double(), inputs(torch.float64)[:1, :2].requires_grad_()
    names = [name for name, _ in net.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *(p.detach().requires_grad_() for p in net.parameters())))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_reference(reference_net, form):
    net, x = make(form, bias=True), inputs().requires_grad_()
    weight = inputs(seed=2)
    (net(x) * weight).sum().backward()
    state = {k: v.detach().double().requires_grad_() for k, v in net.state_dict().items()}
    x64 = inputs(torch.float64).requires_grad_()
    (reference_net(state, form, x64, F.silu) * weight.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), state[name].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_normalise(dtype):
    x = (inputs() * torch.tensor([[[1e-3], [1.0], [30.0], [1.0], [1.0]]])).to(dtype).requires_grad_()
    weight = inputs(seed=2)
    found = rms_normalise(x)
    assert found.dtype == dtype
    (found.float() * weight).sum().backward()
    x64 = x.detach().double().requires_grad_()
    expected = x64 / (x64.square().mean(-1, keepdim=True).sqrt() + 1e-6)
    (expected * weight.double()).sum().backward()
    # bf16: each of the result's roundings (of the divisor, of the quotient) is 2^-9 relative.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    scale = x64.grad.norm(dim=-1, keepdim=True)
    assert ((x.grad.double() - x64.grad) / scale).abs().max() < (1e-4 if dtype == torch.float32 else 2**-5)


def test_rms_normalise_of_zeros_is_zero():
    x = torch.zeros(1, WIDTH, requires_grad=True)
    rms_normalise(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_the_norm_of_large_numbers_in_bf16():
    """1e15 squared is far beyond what bf16's 8 bits of mantissa add up; the sum runs in fp32."""
    found = rms_normalise(torch.full((1, WIDTH), 1e15, dtype=torch.bfloat16))
    torch.testing.assert_close(found.float(), torch.ones(1, WIDTH), rtol=1e-2, atol=1e-2)


def test_bf16_keeps_a_small_output_beside_a_large_input(reference_net):
    """The h form would lose it: out is here 2^-9 of x / b, one bf16 rounding."""
    net = make("gated", scale=0.02)
    x = inputs()
    with torch.no_grad():
        for block in net.blocks:
            block.b_proj.weight.mul_(0.05)
    half = net.to(torch.bfloat16)
    expected = reference_net(half.state_dict(), "gated", x.bfloat16(), F.silu)
    assert expected.norm() < 2**-8 * (x / 0.02).norm()
    assert (half(x.bfloat16()).double() - expected).norm() < 0.02 * expected.norm()


def test_the_two_tables_of_forms_agree():
    assert {name: (f.gated, f.norm) for name, f in shapes.FORMS.items()} == dlr_net.FORMS


def test_each_factor_is_a_linear_of_its_own():
    net = make("gated", bias=True)
    linears = {name: m for name, m in net.named_modules() if type(m) is torch.nn.Linear}
    assert set(linears) == {f"blocks.{k}.{f}_proj" for k in range(4) for f in "ab"}
    for k, rank in enumerate(RANKS):
        assert linears[f"blocks.{k}.a_proj"].weight.shape == (2 * rank, WIDTH)
        assert linears[f"blocks.{k}.a_proj"].bias is not None
        assert linears[f"blocks.{k}.b_proj"].weight.shape == (WIDTH, rank)
        assert linears[f"blocks.{k}.b_proj"].bias is None


def test_the_coupling_is_a_buffer_in_the_state():
    net = make("plain", scale=0.25)
    assert net.state_dict()["b"] == 0.25
    assert "b" not in dict(net.named_parameters())


def test_dropout_acts_on_the_output_in_training_alone():
    net = DLRNet(WIDTH, RANKS, "plain", torch.nn.SiLU(), dropout=0.5)
    x = inputs()
    whole = net.eval()(x)
    torch.manual_seed(0)
    dropped = net.train()(x)
    kept = dropped != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])


def test_the_module_needs_torch_alone():
    lines = [line for line in inspect.getsource(dlr_net).splitlines() if line.startswith(("import", "from"))]
    assert all(line.split()[1].split(".")[0] in ("collections", "torch") for line in lines)
