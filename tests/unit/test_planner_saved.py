"""The planned saved bytes and FLOPs against hooks and torch's counter on live models: whole numbers, no tolerance."""

import itertools

import pytest
import torch
from test_layout import VARIANTS, build, locked_config
from torch.utils.flop_counter import FlopCounterMode

from dlrscale import attacks, catalogue, shapes
from dlrscale.config import AttackConfig
from dlrscale.evaluate import cross_entropy_sum
from dlrscale.jobs.attack import saved_formula
from dlrscale.measure import SavedBytes
from dlrscale.measure.flops import ATTENTION  # torch's own counter does not know the CPU's fused kernel
from dlrscale.planner import model as planned_model
from dlrscale.planner.activations import Activations
from dlrscale.planner.forward import Pass, falls_back

LENGTH, RANK = 11, 4
KNOBS = {"rank": RANK, "alpha": 8, "dropout": 0.0, "last": 1, "reduction": 4}
STRATEGIES = {"all": "full"} | {name: name for name in catalogue.choices("trainable") if name != "all"}


def prepare(config, attention, dtype, trainable, checkpointing):
    """A model of a configuration as an attack trains it."""
    model = build(config, attention).train()
    model = model if dtype is None else model.to(dtype)
    if checkpointing == "layer":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if trainable == "all":
        return model.requires_grad_(True)
    shape = shapes.model_shape(model.config.to_dict())
    return attacks.find(trainable).choose(model, shape, KNOBS).to(dtype)


def plan(config, batch, attention, dtype, trainable, checkpointing, **more):
    """The activations that the planner derives from the configuration."""
    shape = shapes.model_shape(config)
    model = planned_model.attacked(config, shape, catalogue.strategy(STRATEGIES[trainable]), KNOBS)
    run = Pass(shape=model.shape, parts=model.parts, batch=batch, length=LENGTH, size=dtype.itemsize,
               training=model.training, checkpointing=checkpointing, attention=attention, device="cpu",
               **more)  # fmt: skip
    return Activations(run)


def loss_of(model, batch, length=LENGTH):
    """The loss of one micro-batch of random tokens, as the training takes it."""
    ids = torch.randint(3, 264, (batch, length))
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return cross_entropy_sum(logits, ids)[0]


def saved(model, batch):
    with SavedBytes(model) as counter:
        loss_of(model, batch)
    return counter.total


def cases(batches, attentions):
    return itertools.product(
        attentions, (torch.float32, torch.bfloat16), batches, STRATEGIES, ("none", "layer")
    )  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_saved_bytes_of_every_family(make_model, family, changes, attention):
    config = make_model(family, **changes).config.to_dict()
    for index, (_, dtype, _, trainable, checkpointing) in enumerate(cases((1,), (attention,))):
        batch = (1, 3, 3, 1)[index % 4]
        planned = plan(config, batch, attention, dtype, trainable, checkpointing)
        if attention == "sdpa" and falls_back(planned.run) and dtype is not torch.float32:
            continue  # plain products in fp32, which the planner says that it does not count
        if attention == "sdpa" and config.get("alibi") and falls_back(planned.run):
            continue
        model = prepare(config, attention, dtype, trainable, checkpointing)
        assert planned.held_bytes == saved(model, batch), (dtype, batch, trainable, checkpointing)
        if checkpointing == "none":
            assert sum(planned.by_part().values()) == planned.held_bytes == planned.peak_bytes


@pytest.mark.parametrize("form", list(shapes.FORMS))
@pytest.mark.parametrize("family", list(shapes.FAMILIES))
def test_saved_bytes_of_locked_models(make_model, family, form):
    """Every form in every family, with three blocks of unequal ranks."""
    config = locked_config(make_model(family).config.to_dict(), form, 3)
    for attention, dtype, batch, trainable, checkpointing in cases((2,), ("eager",)):
        planned = plan(config, batch, attention, dtype, trainable, checkpointing)
        model = prepare(config, attention, dtype, trainable, checkpointing)
        assert planned.held_bytes == saved(model, batch), (dtype, trainable, checkpointing)


@pytest.mark.parametrize("trainable", [name for name in STRATEGIES if not name.startswith("lora")])
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_trained_tensors_of_every_set(make_model, family, changes, trainable):
    """Every tensor in its order, and whether it is trained, of base and locked model."""
    base = make_model(family, **changes).config.to_dict()
    for config in (base, locked_config(base, "plain", 2), locked_config(base, "gated", 3)):
        model = prepare(config, "eager", torch.float32, trainable, "none")
        shape = shapes.model_shape(config)
        if trainable == "norms" and not any(p.requires_grad for p in model.parameters()):
            continue
        planned = planned_model.attacked(config, shape, catalogue.strategy(STRATEGIES[trainable]), KNOBS)
        tensors = [(numel, trained) for numel, trained, count in planned.tensors() for _ in range(count)]
        assert tensors == [(p.numel(), p.requires_grad) for p in model.parameters()]
        by_layer = sum(planned.trained_by_layer[1])
        outside = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not is_in_layer(n, shape))
        assert by_layer + outside == planned.trained


def is_in_layer(name, shape):
    return "side.layers." in name or shape.family.mlp.partition("{}")[0] in name


@pytest.mark.parametrize("depth", [1, 8, 48])
def test_saved_bytes_grow_with_the_depth(make_llama, depth):
    """A gated DLR-Net at parity keeps (K - 1) D elements per token and layer more than the MLP (memory-model.md)."""
    base = make_llama().config.to_dict()
    locked = locked_config(base, "gated", depth)
    kept = [plan(c, 2, "eager", torch.float32, "all", "none").held_bytes for c in (base, locked)]
    assert kept[1] - kept[0] == (depth - 1) * 32 * 2 * 2 * LENGTH * 4
    assert kept[1] == saved(prepare(locked, "eager", torch.float32, "all", "none"), 2)


def test_a_loss_in_several_chunks(make_llama, monkeypatch):
    from dlrscale import evaluate
    from dlrscale.planner import forward

    for module, name in ((evaluate, "_CHUNK_ELEMENTS"), (forward, "LOSS_CHUNK_ELEMENTS")):
        assert getattr(module, name) == 1 << 25
        monkeypatch.setattr(module, name, 264 * 4 + 1)
    model = make_llama()
    planned = plan(model.config.to_dict(), 2, "eager", torch.float32, "all", "none")
    assert len(forward.loss_chunks(planned.run)) == 5
    assert planned.held_bytes == saved(prepare(model.config.to_dict(), "eager", torch.float32, "all", "none"), 2)


@pytest.mark.parametrize("pdrop", [0.1])
def test_dropout_keeps_its_masks(make_gpt2, pdrop):
    dropped = {"resid_pdrop": pdrop, "attn_pdrop": pdrop, "embd_pdrop": pdrop}
    for trainable, checkpointing in itertools.product(STRATEGIES, ("none", "layer")):
        model = make_gpt2(**dropped)
        planned = plan(model.config.to_dict(), 2, "eager", torch.float32, trainable, checkpointing)
        assert planned.held_bytes == saved(
            prepare(model.config.to_dict(), "eager", torch.float32, trainable, checkpointing), 2
        )


@pytest.mark.parametrize("trainable", STRATEGIES)
@pytest.mark.parametrize(
    ("family", "form"), [("llama", None), ("llama", "gated"), ("gpt_neox", "plain"), ("phi", None)]
)
def test_flops_are_those_of_torchs_counter(make_model, family, form, trainable):
    config = make_model(family).config.to_dict()
    config = locked_config(config, form, 3) if form else config
    found = {}
    for attention, checkpointing in itertools.product(("eager", "sdpa"), ("none", "layer")):
        model = prepare(config, attention, torch.float32, trainable, checkpointing)
        counts = []
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            loss = loss_of(model, 2)
            counts.append(counter.get_total_flops())
            loss.backward()
        counts.append(counter.get_total_flops() - counts[0])
        planned = plan(config, 2, attention, torch.float32, trainable, checkpointing).flops()
        assert planned["forward"] == counts[0]
        assert planned["backward"] + planned["recompute"] == counts[1]
        found[checkpointing] = planned
    if (
        trainable == "all"
    ):  # with adapters, peft asks for the gradient of the embedding too where layers are checkpointed
        assert found["none"]["backward"] == found["layer"]["backward"]
    assert found["none"]["recompute"] == 0
    assert 0 < found["layer"]["recompute"] < found["layer"]["forward"] or trainable == "head"  # nothing runs again


def test_flops_of_fused_attention(make_llama):
    """As written out; the kernel takes the scores once more in backward, which is kept apart."""
    config = make_llama().config.to_dict()
    eager, fused = (plan(config, 2, a, torch.float32, "all", "none").flops() for a in ("eager", "sdpa"))
    product = 2 * 2 * 4 * LENGTH**2 * 8 * 2  # 2 per multiplication, batch, heads, pairs, head dimension, layers
    assert fused == eager | {"in_kernels": product}
    assert eager["in_kernels"] == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gpt2"])
def test_padding_and_fewer_labels(make_model, family, attention):
    config = make_model(family).config.to_dict()
    ids, mask = torch.randint(3, 264, (3, LENGTH)), torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, 7:] = 0
    labels = torch.where(mask.bool() & (torch.arange(LENGTH) > 3), ids, -100)
    count = int((labels[:, 1:] != -100).sum())
    for dtype in (torch.float32, torch.bfloat16):
        planned = plan(config, 3, attention, dtype, "all", "none", masked=True, label_tokens=count)
        model = prepare(config, attention, dtype, "all", "none")
        with SavedBytes(model) as counter:
            cross_entropy_sum(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, labels)
        assert planned.held_bytes == counter.total


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_the_closed_form_is_the_planned_mlp_part(make_model, family, changes):
    """Also where ZeRO-3's own linear map keeps inputs of frozen weights, is off, or is none of the family's maps."""
    base = make_model(family, **changes).config.to_dict()
    for config, strategy, efficient in itertools.product(
        (base, locked_config(base, "plain", 2)), ("full", "lora-attn"), (True, False)
    ):
        job = AttackConfig(
            model="", data="", out="", strategy=strategy, knobs=KNOBS, activation_checkpointing="none", dtype="fp32"
        )
        section = {"stage": 3, "memory_efficient_linear": efficient}
        found = saved_formula(job, {"zero_optimization": section}, shapes.model_shape(config))
        trainable = catalogue.strategy(strategy).trainable
        kept = plan(config, 2, "sdpa", torch.float32, trainable, "none", zero3=efficient)
        planned = sum(map(kept.mlp_bytes, range(len(kept.layers))))
        assert found["memory/saved_mlp_bytes_per_token_formula"] * 2 * LENGTH == planned, (strategy, efficient)
