"""The trainable sets norms, last-k, head and ladder on live models: what is trained, where gradients go."""

import copy

import pytest
import torch
from test_layout import VARIANTS, build, locked_config

from dlrscale import attacks, catalogue, config, jobs, models, shapes
from dlrscale.attacks import head, ladder
from dlrscale.attacks.levers import Levers
from dlrscale.errors import ConfigError
from dlrscale.evaluate import cross_entropy_sum
from dlrscale.measure import SavedBytes
from dlrscale.planner.activations import Activations
from dlrscale.planner.forward import Pass
from dlrscale.planner.model import attacked

KNOBS = {"last": 1, "reduction": 4}


def choose(model, name, checkpointing="none", **knobs):
    if checkpointing == "layer":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = attacks.find(name).choose(model, shapes.model_shape(model.config.to_dict()), KNOBS | knobs)
    return found.train()


def loss(model, ids):
    return cross_entropy_sum(model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits, ids)[0]


def tokens():
    return torch.randint(3, 264, (2, 9), generator=torch.Generator().manual_seed(1))


def gradients(model, ids):
    model.zero_grad()
    loss(model, ids).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3"])
def test_gradients_are_those_of_plain_autograd(make_model, family, locked, checkpointing):
    """Of each set its share of `full`'s gradient, and of nothing else; a tied head's own share is taken apart."""
    base = make_model(family).config.to_dict()
    torch.manual_seed(0)
    whole = build(locked_config(base, "plain", 3) if locked else base).train()
    ids = tokens()
    if whole.config.tie_word_embeddings:
        head.untie(whole)
    wanted = gradients(whole, ids)
    for name in ("norms", "last-k", "head"):
        model = choose(copy.deepcopy(whole), name, checkpointing)
        found = gradients(model, ids)
        assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad} < set(wanted)
        for key, value in found.items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["last-k", "head", "ladder"])
def test_no_gradient_goes_into_frozen_layers(make_llama, name):
    """Not with checkpointing either, where transformers would ask for the embedding's."""
    model = choose(make_llama(), name, "layer")
    seen = []
    inner = model.model if name == "ladder" else model
    for layer in inner.model.layers:
        layer.register_forward_hook(lambda _, args, output: seen.append((args[0].requires_grad, output.requires_grad)))
    loss(model, tokens()).backward()
    assert seen[:2] == [(False, False), (False, name == "last-k")]
    assert len(seen) == 2


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_a_ladder_starts_as_the_model(make_model, family, changes):
    """Bitwise, in every family; and reads no padding on the right into a token before it."""
    model = make_model(family, **changes)
    ids = tokens()
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        net = choose(copy.deepcopy(model), "ladder").eval()
        assert torch.equal(net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, wanted)
        torch.manual_seed(0)
        torch.nn.init.normal_(net.side.up.weight)
        mask = torch.ones_like(ids)
        mask[:, 6:] = 0
        short = net(input_ids=ids[:, :6], attention_mask=mask[:, :6]).logits
        padded = net(input_ids=torch.where(mask == 1, ids, 2), attention_mask=mask).logits[:, :6]
    torch.testing.assert_close(padded, short, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(short, wanted[:, :6], atol=1e-3)


def test_a_ladder_against_its_formula(make_llama):
    """In float64, written out; with and without checkpointing."""
    model = make_llama().double()
    ids = tokens()
    hidden = model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    last = []
    handle = model.model.layers[-1].register_forward_hook(lambda module, args, output: last.append(output))
    model(input_ids=ids, use_cache=False)
    handle.remove()
    net = choose(copy.deepcopy(model), "ladder", "layer", reduction=2)
    torch.manual_seed(3)
    for p in net.side.parameters():
        torch.nn.init.normal_(p, std=0.3)
    w = {name: p.detach() for name, p in net.side.named_parameters()}

    def n(u):
        return u / (u.square().mean(-1, keepdim=True).sqrt() + 1e-6)

    s = n(hidden[0]) @ w["start.weight"].T
    for i, h in enumerate((hidden[1], last[0])):
        own = {k.removeprefix(f"layers.{i}."): v for k, v in w.items()}
        g = 1 / (1 + torch.exp(-own["gate"]))
        s = g * s + (1 - g) * (n(h) @ own["down.weight"].T)
        q, k, v = ((n(s) @ part.T) for part in own["qkv.weight"].chunk(3))
        scores = (q @ k.mT) / 16**0.5 + torch.full((9, 9), -torch.inf).triu(1)
        s = s + (scores.softmax(-1) @ v) @ own["out.weight"].T
        gate, up = ((n(s) @ part.T) for part in own["inner.weight"].chunk(2))
        s = s + (gate * torch.sigmoid(gate) * up) @ own["outer.weight"].T
    wanted = model.lm_head(model.model.norm(last[0] + n(s) @ w["up.weight"].T))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(net(input_ids=ids).logits, wanted)


def test_a_ladder_is_written_and_read(make_llama, tmp_path):
    model, ids = make_llama(), tokens()
    net = choose(copy.deepcopy(model), "ladder")
    torch.nn.init.normal_(net.side.up.weight)
    state = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    ladder.save(net, state, tmp_path / "adapter", "base")
    again = ladder.load(model, shapes.model_shape(model.config.to_dict()), tmp_path / "adapter")
    assert torch.equal(again(input_ids=ids).logits, net(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "opt", "falcon"])
@pytest.mark.parametrize("locked", [False, True])
def test_an_untied_head_is_saved_and_loaded(make_model, tmp_path, family, locked):
    """Two matrices in a folder of the model's own class, whose shape says that nothing is tied."""
    base = make_model(family, tie_word_embeddings=True).config.to_dict()
    model = build(locked_config(base, "plain", 2) if locked else base)
    net = choose(copy.deepcopy(model), "head")
    with torch.no_grad():
        net.get_output_embeddings().weight.add_(1.0)
    state = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    head.save(net, state, tmp_path / "adapter", "base")
    head.merged(copy.deepcopy(model), tmp_path / "adapter").save_pretrained(tmp_path / "model")
    again = models.load_model(tmp_path / "model")
    assert torch.equal(again.get_output_embeddings().weight, model.get_output_embeddings().weight + 1)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert not shapes.model_shape(shapes.read_config(tmp_path / "model")).tied
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens()).logits, net.eval()(input_ids=tokens()).logits)


@pytest.mark.parametrize(
    ("strategy", "changes", "said"),
    [
        ("last-k", {"knobs": {"last": 3}}, "--set last=3: the model has 2 decoder layers"),
        ("ladder", {"knobs": {"reduction": 8}, "save_model": True}, "--save-model.*--trainable ladder.*does not merge"),
    ],
)
def test_what_cannot_be_is_refused(llama_folder, strategy, changes, said):
    wrong = config.AttackConfig(model=str(llama_folder), data="", out="", strategy=strategy, seq_len=32, **changes)
    with pytest.raises(ConfigError, match=said):
        jobs.preflight(wrong)


def test_a_model_without_norms_and_biases_of_its_own_is_refused(make_model, tmp_path):
    bare = make_model("opt", layer_norm_elementwise_affine=False, enable_bias=False)
    bare.save_pretrained(tmp_path)
    wrong = config.AttackConfig(model=str(tmp_path), data="", out="", strategy="norms", seq_len=32)
    with pytest.raises(ConfigError, match="--trainable norms: the model has no such parameter"):
        jobs.preflight(wrong)


def test_norms_of_every_kind_and_all_biases(make_model):
    model = choose(make_model("phi", qk_layernorm=True), "norms")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {f"model.layers.0.{n}" for n in ("self_attn.q_layernorm.weight", "mlp.fc1.bias", "self_attn.dense.bias",
            "input_layernorm.bias")} | {"lm_head.bias", "model.final_layernorm.weight"} <= trained  # fmt: skip
    assert not any(name.endswith("weight") and "norm" not in name for name in trained)


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
@pytest.mark.parametrize("storage", ["host", "int8"])
@pytest.mark.parametrize("name", ["norms", "last-k", "head", "ladder"])
def test_storage_of_what_is_kept(make_llama, name, storage, checkpointing):
    """A storage acts on what the trained layers keep, of a side network too: bytes on device and host as planned."""
    model = make_llama(hidden_size=64)
    values, shape = model.config.to_dict(), shapes.model_shape(model.config.to_dict())
    job = config.AttackConfig(
        model="", data="", out="", strategy=name, activation_storage=storage, activation_checkpointing=checkpointing
    )
    net = choose(model, name, checkpointing)
    levers = Levers(model, shape, job, getattr(net, "side", None))
    counter = SavedBytes(net, None, levers.storage)
    with counter:
        nats = loss(net, tokens())
        counter.forward_done()
        nats.backward()
    planned = attacked(values, shape, catalogue.strategy(name), KNOBS)
    run = Pass(shape=planned.shape, parts=planned.parts, batch=2, length=9, size=4, training=planned.training,
               checkpointing=checkpointing, device="cpu", storage=storage)  # fmt: skip
    kept = Activations(run)
    assert kept.held_bytes == counter.total
    assert kept.host_bytes == (levers.storage.bytes if storage == "host" else 0)
