"""The memory levers' planned bytes and FLOPs against live models: saved, peak, on the host, and torch's counter."""

import itertools

import pytest
import torch
from test_layout import locked_config
from test_planner_saved import KNOBS, STRATEGIES, loss_of, prepare

from dlrscale import catalogue, shapes
from dlrscale.attacks.levers import Levers, mlp_parts
from dlrscale.config import AttackConfig
from dlrscale.measure import Flops, SavedBytes
from dlrscale.planner import model as planned_model
from dlrscale.planner.activations import Activations
from dlrscale.planner.forward import Pass, falls_back

LENGTH = 18


def ways():
    """Every combination of the levers that a strategy takes: checkpointing, storage, tiles, anchor (None: backprop)."""
    for checkpointing, storage, tiles, anchor in itertools.product(
        ("none", "layer", "nested"), ("device", "host", "int8"), (1, 5), (None, 0, 3)
    ):
        if checkpointing != "nested" or anchor is None:
            yield {"checkpointing": checkpointing, "storage": storage, "tiles": tiles, "anchor": anchor}


def plan(config, way, batch, attention, dtype, trainable="all"):
    shape = shapes.model_shape(config)
    model = planned_model.attacked(config, shape, catalogue.strategy(STRATEGIES[trainable]), KNOBS)
    return Activations(
        Pass(
            shape=model.shape,
            parts=model.parts,
            batch=batch,
            length=LENGTH,
            size=dtype.itemsize,
            training=model.training,
            attention=attention,
            device="cpu",
            **way,
        )  # fmt: skip
    )


def measured(config, way, batch, attention, dtype, trainable="all"):
    """What a live model saves: after forward, at the peak, again, and kept by the storage; and FLOPs."""
    model = prepare(config, attention, dtype, trainable, "none" if way["checkpointing"] == "none" else "layer")
    gradient = "backprop" if way["anchor"] is None else "reverse"
    knobs = {} if way["anchor"] is None else {"anchor": way["anchor"]}
    job = AttackConfig(
        model="", data="", out="", strategy="full", gradient=gradient, knobs=knobs, tiles=way["tiles"],
        activation_checkpointing=way["checkpointing"], activation_storage=way["storage"],
    )  # fmt: skip
    levers = Levers(model, shapes.model_shape(config), job, getattr(model, "side", None))
    with SavedBytes(model, mlp_parts(model, shapes.model_shape(config)), levers.storage) as counter:
        loss = loss_of(model, batch, LENGTH)
        counter.forward_done()
        loss.backward()
    flops = Flops()
    with flops.forward_pass():
        loss = loss_of(model, batch, LENGTH)
    with flops.backward_pass():
        loss.backward()
    return counter, levers.storage.bytes if levers.storage else 0, flops


def check(config, way, batch, attention, dtype, trainable="all"):
    planned = plan(config, way, batch, attention, dtype, trainable)
    counter, stored, flops = measured(config, way, batch, attention, dtype, trainable)
    about = (way, batch, dtype, trainable)
    assert planned.held_bytes == counter.total, about
    assert planned.peak_bytes == counter.peak, about
    assert way["storage"] != "host" or planned.host_bytes == stored, about
    found = planned.flops()
    assert (found["forward"], found["backward"], found["recompute"]) == (
        flops.forward, flops.backward, flops.recompute), about  # fmt: skip
    return planned, counter, stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth", [0, 4, 16])
@pytest.mark.parametrize("form", list(shapes.FORMS))
def test_levers_on_llama(make_llama, form, depth, dtype):
    """D 32, F 96: rows of 24 and of 6 inside the blocks, which 8 bits take and leave alone."""
    if not depth and form != "gated":
        return
    config = make_llama(intermediate_size=96).config.to_dict()
    config = locked_config(config, form, depth) if depth else config
    for way in ways():
        check(config, way, 2, "sdpa", dtype)


SOME = [
    {"checkpointing": "nested", "storage": "host", "tiles": 3, "anchor": None},
    {"checkpointing": "none", "storage": "int8", "tiles": 3, "anchor": None},
    {"checkpointing": "none", "storage": "host", "tiles": 3, "anchor": None},
    {"checkpointing": "layer", "storage": "device", "tiles": 3, "anchor": None},
    {"checkpointing": "none", "storage": "int8", "tiles": 1, "anchor": 2},
    {"checkpointing": "none", "storage": "device", "tiles": 5, "anchor": 0},
    {"checkpointing": "layer", "storage": "int8", "tiles": 1, "anchor": 0},
    {"checkpointing": "none", "storage": "int8", "tiles": 1, "anchor": None},
]
FAMILIES = [
    ("phi", {"qk_layernorm": True}, "plain"), ("opt", {}, "plain"), ("opt", {"do_layer_norm_before": False}, "gated"),
    ("falcon", {"multi_query": False, "bias": True}, "gated"), ("gpt2", {}, "plain"), ("gpt_neox", {}, "plain"),
    ("phi3", {}, "gated"), ("gemma", {}, "prenorm"), ("qwen3", {}, "plain"),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, "plain"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "form"), FAMILIES)
def test_levers_in_other_families(make_model, family, changes, form):
    """Norms, wirings, fused maps and activations of other kinds, some trained through adapters alone."""
    base = make_model(family, **changes).config.to_dict()
    trained = itertools.cycle(STRATEGIES)
    for config, attention in ((base, "eager"), (locked_config(base, form, 3), "sdpa")):
        for index, way in enumerate(SOME):
            dtype = (torch.float32, torch.bfloat16)[index % 2]
            if attention == "sdpa" and family == "falcon" and falls_back(plan(config, way, 2, attention, dtype).run):
                continue
            check(config, way, 2, attention, dtype, next(trained))
