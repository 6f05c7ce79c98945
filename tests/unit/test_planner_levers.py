"""The memory levers' planned bytes and FLOPs against live models: saved, peak, on the host, and torch's counter."""

import itertools

import pytest
import torch
from test_layout import locked_config
from test_planner_plan import Live, attack_plan
from test_planner_saved import KNOBS, STRATEGIES, loss_of, prepare

from dlrscale import catalogue, shapes
from dlrscale.attacks import act_int8
from dlrscale.attacks.levers import Levers, mlp_parts
from dlrscale.config import AttackConfig
from dlrscale.jobs.attack import saved_formula
from dlrscale.measure import Flops, SavedBytes
from dlrscale.planner import model as planned_model
from dlrscale.planner import states
from dlrscale.planner.activations import Activations
from dlrscale.planner.forward import Pass, falls_back
from dlrscale.planner.tape import SHORTEST_ROW

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


def job(way, trainable, dtype):
    """The configuration of an attack that has the levers."""
    gradient = "backprop" if way["anchor"] is None else "reverse"
    return AttackConfig(
        model="", data="", out="", strategy=STRATEGIES[trainable], gradient=gradient,
        knobs=KNOBS | {"anchor": way["anchor"]}, tiles=way["tiles"], activation_checkpointing=way["checkpointing"],
        activation_storage=way["storage"], dtype="fp32" if dtype == torch.float32 else "bf16",
    )  # fmt: skip


def measured(config, way, batch, attention, dtype, trainable="all"):
    """What a live model saves: after forward, at the peak, again, and kept by the storage; and FLOPs."""
    model = prepare(config, attention, dtype, trainable, "none" if way["checkpointing"] == "none" else "layer")
    levers = Levers(model, shapes.model_shape(config), job(way, trainable, dtype), getattr(model, "side", None))
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
    assert way["storage"] != "host" or planned.host_bytes == stored > 0, about
    found = planned.flops()
    assert (found["forward"], found["backward"], found["recompute"]) == (
        flops.forward, flops.backward, flops.recompute), about  # fmt: skip
    shape = shapes.model_shape(config)
    formula = saved_formula(job(way, trainable, dtype), {}, shape)
    if formula:
        per_token = formula["memory/saved_mlp_bytes_per_token_formula"]
        assert sum(counter.by_part.values()) == batch * LENGTH * per_token, about


LIVE = [
    {"checkpointing": "nested", "storage": "device", "tiles": 1, "anchor": None},
    {"checkpointing": "layer", "storage": "device", "tiles": 4, "anchor": None},
    {"checkpointing": "none", "storage": "device", "tiles": 4, "anchor": None},
    {"checkpointing": "layer", "storage": "device", "tiles": 1, "anchor": 0},
    {"checkpointing": "none", "storage": "device", "tiles": 1, "anchor": 0},
]
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


@pytest.mark.parametrize(
    ("form", "depth", "dtype"),
    [
        ("gated", 4, torch.float32), ("gated", 0, torch.float32), ("gated", 0, torch.bfloat16),
        ("gated", 16, torch.bfloat16), ("plain", 16, torch.float32), ("plain", 4, torch.bfloat16),
        ("prenorm", 4, torch.bfloat16), ("prenorm", 16, torch.float32),
    ],
)  # fmt: skip
def test_levers_on_llama(make_llama, form, depth, dtype):
    """D 32, F 96: rows of 24 and of 6 inside the blocks, which 8 bits take and leave alone. One net in all ways."""
    config = make_llama(intermediate_size=96).config.to_dict()
    config = locked_config(config, form, depth) if depth else config
    for way in ways() if (form, depth) == ("gated", 4) else SOME:
        check(config, way, 2, "sdpa", dtype)


@pytest.mark.parametrize(("family", "changes", "form"), FAMILIES)
def test_levers_in_other_families(make_model, family, changes, form):
    """Norms, wirings, fused maps and activations of other kinds; every trainable set, the side network too."""
    base = make_model(family, **changes).config.to_dict()
    trained = itertools.cycle(STRATEGIES)
    for index, way in enumerate(SOME):
        dtype = (torch.float32, torch.bfloat16)[index // 2 % 2]
        config, attention = ((base, "eager"), (locked_config(base, form, 3), "sdpa"))[index % 2]
        if attention == "sdpa" and falls_back(plan(config, way, 2, attention, dtype).run):
            continue
        check(config, way, 2, attention, dtype, next(trained))


def test_rows_that_8_bits_leave_alone():
    assert SHORTEST_ROW == act_int8.SHORTEST_ROW


@pytest.mark.parametrize("depth", [0, 4, 16])
@pytest.mark.parametrize("way", LIVE, ids=lambda way: "-".join(map(str, way.values())))
def test_peak_with_levers_against_live_tensors(make_llama, way, depth):
    """As tests/unit/test_planner_plan.py, where one layer's MLP and the logits matter alike."""
    if not depth and (way["anchor"] is not None or way["checkpointing"] == "nested"):
        return
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "vocab_size": 512}
    config = make_llama(**(sizes | {"max_position_embeddings": 256})).config.to_dict()
    config = locked_config(config, "gated", depth) if depth else config
    for dtype in (torch.float32, torch.bfloat16):
        model = prepare(config, "sdpa", dtype, "all", "none" if way["checkpointing"] == "none" else "layer")
        levers = Levers(model, shapes.model_shape(config), job(way, "all", dtype))
        with Live([*model.parameters(), *model.buffers()]) as live:
            loss_of(model, 2, 256).backward()
        del levers
        planned = attack_plan(config, "full", dtype="fp32" if dtype == torch.float32 else "bf16", micro_batch=2,
                              seq_len=256, device="cpu", **way)  # fmt: skip
        gradients = planned.states["gradients"]
        planned.__dict__["states"] = dict.fromkeys(planned.states, states.Term()) | {"gradients": gradients}
        most = max(planned.needs.peaks[phase] for phase in (states.FORWARD, states.BACKWARD))
        off = most / live.peak - 1
        print(f"K {depth}, {dtype}, {way}: {off:+.2%}")
        assert abs(off) < 0.06
