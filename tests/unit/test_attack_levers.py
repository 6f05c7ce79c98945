"""The levers inside a model and the reversal, against plain autograd in float64 and hand-counted bytes."""

import dataclasses

import pytest
import torch
from test_layout import locked_config
from transformers import AutoConfig, AutoModelForCausalLM

from dlrscale import catalogue, models, shapes
from dlrscale.attacks import act_int8, reverse, tile_tokens
from dlrscale.attacks.levers import Levers, mlp_parts
from dlrscale.config import AttackConfig
from dlrscale.errors import ConfigError
from dlrscale.evaluate import cross_entropy_sum
from dlrscale.jobs import check_levers
from dlrscale.measure import SavedBytes
from dlrscale.modeling.dlr_net import DLRNet

FORMS = ("gated", "plain", "prenorm")
NAMES = ("ckpt-nested", "ckpt-offload", "act-offload", "tile-tokens", "reverse")


def built(make_model, family, form=None, depth=8, dtype=torch.float32):
    """A tiny model in training mode, locked with b = 0.3 where a form is given."""
    config = make_model(family).config.to_dict()
    if form:
        config = locked_config(config, form, depth)
    for known in (models.locked_classes(row) for row in shapes.FAMILIES.values() if row.model_type == family):
        torch.manual_seed(1)
        own = known[0](**config) if form else AutoConfig.for_model(**config)
        model = known[1](own) if form else AutoModelForCausalLM.from_config(own)
    for module in model.modules():
        if isinstance(module, DLRNet):
            module.b.fill_(0.3)
    return model.to(dtype).train()


def attack_config(name, **changes):
    entry = catalogue.strategy(name)
    levers = dataclasses.asdict(entry.resolve(catalogue.Levers()))
    return AttackConfig(model="", data="", out="", strategy=name, knobs=entry.resolve_knobs({}), **(levers | changes))


def under(model, config):
    """The levers of a configuration on a model."""
    if config.activation_checkpointing != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Levers(model, shapes.model_shape(model.config.to_dict()), config)


def gradients(model, counter=None):
    """The gradient of all parameters as one float64 vector, and the loss."""
    ids = torch.arange(42).remainder(37).view(2, 21) + 5
    model.zero_grad()
    loss = cross_entropy_sum(model(input_ids=ids, use_cache=False).logits, ids)[0]
    if counter:
        counter.forward_done()
    loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()]), loss.item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("family", "form"), [("llama", None), *(("llama", form) for form in FORMS), ("gpt2", "plain"), ("phi3", "gated")]
)
def test_gradients_are_plain_autograds(make_model, family, form, name):
    model = built(make_model, family, form)
    wanted, loss = gradients(model)
    levers = under(model, attack_config(name))
    found, other = gradients(model)
    assert other == pytest.approx(loss, rel=1e-6)
    assert (found - wanted).norm() <= 2e-6 * wanted.norm()
    with levers.plain():
        assert torch.equal(gradients(model)[0], wanted)


@pytest.mark.parametrize("form", FORMS)
def test_eight_bits_are_near_and_unbiased(make_model, form):
    model = built(make_model, "llama", form)
    wanted, _ = gradients(model)
    under(model, attack_config("act-int8"))
    torch.manual_seed(0)
    draws = torch.stack([gradients(model)[0] for _ in range(24)])
    errors = (draws - wanted).norm(dim=1) / wanted.norm()
    assert 1e-4 < errors.max() < 0.05
    assert (draws.mean(0) - wanted).norm() / wanted.norm() < 0.5 * errors.mean()  # 24 draws average out


def test_eight_bit_codes():
    """E[s q / 127] is the row; the largest of a row keeps its value."""
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1.0], [50.0]])
    storage = act_int8.Storage(torch.nn.Module(), [])
    again = torch.stack([storage.give(storage.keep(rows)) for _ in range(2000)])
    step = rows.abs().amax(1, keepdim=True) / 127
    assert ((again - rows).abs() <= 1.0001 * step).all()
    assert ((again.mean(0) - rows).abs() < 0.06 * step).all()
    assert storage.bytes == 2000 * 3 * (64 + 4)
    assert storage.keep(torch.zeros(4, 20, dtype=torch.long)) is None
    assert storage.keep(torch.zeros(4, 8)) is None
    assert torch.equal(storage.give(storage.keep(torch.zeros(2, 16))), torch.zeros(2, 16))


@pytest.mark.parametrize("tiles", [1, 2, 3, 7, 100])
def test_ragged_tiles(tiles):
    net = torch.nn.Linear(6, 6).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    y = tile_tokens.forward(lambda t: net(t).tanh(), tiles, x)
    assert torch.allclose(y, net(x).tanh(), atol=1e-14)
    (y**2).sum().backward()
    tiled = x.grad.clone(), net.weight.grad.clone()
    x.grad = net.weight.grad = None
    (net(x).tanh() ** 2).sum().backward()
    assert torch.allclose(tiled[0], x.grad, atol=1e-12)
    assert torch.allclose(tiled[1], net.weight.grad, atol=1e-12)


def loud_net(form, depth, dtype=torch.float32, width=48, total=96):
    """A DLR-Net of random weights whose blocks depend on one another."""
    ranks = shapes.split_ranks(max(total, depth), depth)
    torch.manual_seed(3)
    net = DLRNet(width, ranks, form, torch.nn.SiLU(), bias=True)
    net.bias.data.normal_()
    for block in net.blocks:
        block.b_proj.weight.data *= min(1, (16 / depth) ** 0.5)
    net.b.fill_(0.5)
    return net.to(dtype)


def net_gradients(net, x, forward):
    x = x.clone().requires_grad_()
    net.zero_grad()
    forward(x).square().sum().backward()
    return torch.cat([g.flatten().double() for g in (x.grad, *(p.grad for p in net.parameters()))])


@pytest.mark.parametrize("anchor", [0, 1, 5])
@pytest.mark.parametrize("form", FORMS)
def test_reverse_of_a_net_in_float64(form, anchor):
    net = loud_net(form, 16, torch.float64)
    x = torch.randn(7, 48, dtype=torch.float64)
    wanted = net_gradients(net, x, net)
    found = net_gradients(net, x, lambda t: reverse.forward(net, t, {"anchor": anchor}))
    assert (found - wanted).norm() <= 1e-12 * wanted.norm()


@pytest.mark.parametrize("depth", [8, 64, 256])
def test_reverse_in_bf16_is_as_near_to_fp32_as_plain_autograd(depth):
    """The fp32 stream: at any anchor spacing the error is that of bf16 weights and products, not of the rebuild."""
    net = loud_net("gated", depth, total=256)
    x = torch.randn(64, 48)
    half = loud_net("gated", depth, total=256).bfloat16()
    for own, other in zip(net.parameters(), half.parameters(), strict=True):
        own.data.copy_(other.data)
    x = x.bfloat16()
    wanted = net_gradients(net, x.float(), net)

    def error(forward):
        return float((net_gradients(half, x, forward) - wanted).norm() / wanted.norm())

    plain = error(half)
    assert plain < 0.05
    for anchor in (0, 1, 8, 64):
        assert error(lambda t, a=anchor: reverse.forward(half, t, {"anchor": a})) < plain


@pytest.mark.parametrize("anchor", [0, 3])
@pytest.mark.parametrize(
    ("form", "dtype"), [("gated", torch.float32), ("gated", torch.bfloat16), ("prenorm", torch.float32)]
)
def test_what_reverse_saves(form, dtype, anchor):
    """x, the codes, d_K and the anchors, whatever the depth: (1 + sum R / D) D + fp32 stream."""
    net, x = loud_net(form, 8, dtype), torch.randn(10, 48).to(dtype).requires_grad_()
    with SavedBytes(net) as counter:
        out = reverse.forward(net, x, {"anchor": anchor})
        counter.forward_done()
    size = dtype.itemsize
    anchors = len([k for k in range(1, 8) if anchor and k % anchor == 0])
    assert counter.total == 10 * (size * (48 + 96) + 4 * 48 * (1 + anchors))
    out.sum().backward()


@pytest.mark.parametrize(("depth", "rank", "width"), [(1, 8, 32), (7, 8, 32), (64, 1, 64), (32, 20, 16), (256, 2, 64)])
def test_the_segment_length_is_the_best(depth, rank, width):
    """Against the peak counted by hand for every length, and near the square root where blocks are many."""

    def peak(length):
        found = []
        for borders, start in enumerate(range(0, depth, length)):
            inside = min(length, depth - start) * (width + 4 * rank) - (width if start == 0 else 0)
            found.append(borders * width + inside)
        return width + max(found)

    ranks = (rank,) * depth
    best = shapes.segment_length("gated", width, ranks, "silu")
    lengths = range(1, depth + 1)
    assert [shapes.segment_peak("gated", width, ranks, "silu", m) for m in lengths] == list(map(peak, lengths))
    assert peak(best) == min(map(peak, lengths))
    if depth >= 64:
        root = (depth * width / (width + 4 * rank)) ** 0.5
        assert root / 2 <= best <= 2 * root + 1


def test_offloaded_bytes_are_those_that_plain_autograd_saves(make_model):
    """Host and device together keep what `full` keeps; the layers' share is on the host, each storage once."""
    model = built(make_model, "llama", "gated")
    with SavedBytes(model) as plain:
        gradients(model, plain)
    levers = under(model, attack_config("act-offload"))
    with SavedBytes(model, None, levers.storage) as counter:
        gradients(model, counter)
    assert counter.total + levers.storage.bytes == plain.total
    head = sum(size for path, size in plain.by_module.items() if path in ("", "lm_head"))
    assert counter.total == head


def test_checkpointed_inputs_go_to_the_host(make_model):
    model = built(make_model, "llama", "gated")
    levers = under(model, attack_config("ckpt-offload"))
    with SavedBytes(model, None, levers.storage) as counter:
        gradients(model, counter)
    shape = shapes.model_shape(model.config.to_dict())
    stream, norm = 42 * shape.width * 4, counter.by_module.get("model.norm", 0)
    inputs = levers.storage.bytes - shape.layers * stream
    assert norm == 0
    assert 0 < inputs < 3 * stream  # embedding indices and what the final norm keeps


def test_levers_find_their_modules(make_model):
    model = built(make_model, "gpt2", "plain")
    assert len(mlp_parts(model, shapes.model_shape(model.config.to_dict()))) == 2


def test_levers_that_contradict_one_another_are_refused():
    mixed = dataclasses.replace(attack_config("reverse", trainable="lora"), knobs={"anchor": 0, "dropout": 0.1})
    with pytest.raises(ConfigError, match=r"--set dropout=0.1: --gradient reverse"):
        check_levers(mixed)
    check_levers(dataclasses.replace(mixed, knobs={"anchor": 0, "dropout": 0.0}))
