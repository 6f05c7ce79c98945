"""best-memory: its winner against every combination planned one by one, its cap, and what was given by hand."""

import itertools
from dataclasses import replace

import pytest

from dlrscale import catalogue, shapes
from dlrscale.catalogue import Levers
from dlrscale.engine import lever_config
from dlrscale.errors import ConfigError
from dlrscale.planner import search
from dlrscale.planner.hardware import Hardware
from dlrscale.planner.model import attacked, locked_shape
from dlrscale.planner.plan import Plan
from dlrscale.shapes import presets

CONFIG = presets.find("llama-2-7b") | {"num_hidden_layers": 3}
ENTRY = catalogue.strategy("best-memory")
NONE = {"zero": 2, "offload_optimizer": False, "offload_param": False}


def configure(levers):
    own = lever_config(levers.zero, levers.offload_optimizer, levers.offload_param, levers.optimizer)
    return own | {"gradient_accumulation_steps": 1, "bf16": {"enabled": True}}


def template(depth, **changes):
    shape = shapes.model_shape(CONFIG)
    shape = locked_shape(shape, "gated", depth, None, None) if depth else shape
    values = {"model": attacked(CONFIG, shape, ENTRY, {}), "ds_config": configure(ENTRY.resolve(Levers())),
              "dtype": "bf16", "checkpointing": "layer", "micro_batch": 2, "seq_len": 512, "num_ranks": 2,
              "ranks_per_node": 2}  # fmt: skip
    return Plan(**(values | changes))


def find(depth, cap=1.33, gradient=None, hardware=None, entry=ENTRY, **by_hand):
    knobs = {"cap": cap}
    return search.search(template(depth), CONFIG, entry, Levers(**by_hand), gradient, knobs, configure, hardware)


def flops(plan):
    found = plan.activations.flops()
    return found["forward"] + found["backward"] + found["recompute"]


def one_by_one(depth, cap):
    """The peak, FLOPs and levers of every combination under the cap, each planned by itself."""
    base = replace(template(0), checkpointing="none")
    most = cap * flops(base)
    for zero, optimizer, param, kept, storage, tiles, anchor in itertools.product(
        range(4), (False, True), (False, True), ("none", "layer", "nested"), ("device", "host"), (1, 2, 4, 8, 16),
        (None, 0),
    ):  # fmt: skip
        if (param and zero != 3) or (optimizer and not zero) or (kept == "nested" and anchor == 0):
            continue
        plan = template(depth, ds_config=configure(Levers(zero=zero, offload_optimizer=optimizer, offload_param=param,
                                                          optimizer="AdamW")),
                        checkpointing=kept, storage=storage, tiles=tiles, anchor=anchor)  # fmt: skip
        if flops(plan) <= most:
            yield plan.needs.peak_bytes, flops(plan)


@pytest.mark.parametrize(("depth", "cap"), [(0, 1.33), (16, 1.33), (16, 1.1), (64, 2.0)])
def test_the_winner_is_the_smallest_of_all(depth, cap):
    found = find(depth, cap)
    winner = found.winner
    assert (winner.plan.needs.peak_bytes, flops(winner.plan)) == min(one_by_one(depth, cap))
    assert winner.flops_ratio <= cap
    assert all(one.flops_ratio <= cap for one in found.candidates)
    assert winner.plan.needs.peak_bytes <= template(depth).needs.peak_bytes


def test_the_cap_decides_what_can_win():
    """With the optimizer on the device and no room on the host, in the order of what is computed again."""
    within = {"zero": 2, "offload_optimizer": False, "activation_storage": "device"}
    chosen = {}
    for cap in (1.0, 1.25, 1.33, 2.0, 4.0):
        winner = find(64, cap, **within).winner
        assert winner.flops_ratio <= cap
        chosen[cap] = winner.plan.activations.peak_bytes
    assert list(chosen.values()) == sorted(chosen.values(), reverse=True)
    assert chosen[1.0] > chosen[1.33] > 0
    assert find(64, 1.0, **within).winner.levers.activation_checkpointing == "none"


def test_what_is_given_by_hand_stays():
    found = find(16, 4.0, gradient="reverse", zero=1, tiles=4, activation_checkpointing="layer")
    for one in found.candidates:
        assert (one.gradient, one.levers.zero, one.levers.tiles) == ("reverse", 1, 4)
        assert one.levers.activation_checkpointing == "layer"
        assert one.knobs == {"anchor": 0}
        assert one.plan.anchor == 0
    with pytest.raises(ConfigError, match="no combination of the levers that were given is allowed"):
        find(16, 4.0, gradient="reverse", activation_checkpointing="nested")
    with pytest.raises(ConfigError, match=r"need at least 1\.\d+ x the FLOPs of full"):
        find(16, 1.0, activation_checkpointing="layer")


def test_base_and_locked_have_winners_of_their_own():
    for base, locked in ((find(0, 4.0, **NONE), find(64, 4.0, **NONE)),):
        assert base.reference_flops == locked.reference_flops
        assert {one.gradient for one in base.candidates} == {"backprop"}
        assert not any(one.levers.activation_checkpointing == "nested" for one in base.candidates)
        assert {one.gradient for one in locked.candidates} == {"backprop", "reverse"}


def test_other_axes_keep_their_knobs():
    entry = catalogue.combined("best-memory", trainable="lora")
    knobs = entry.resolve_knobs({"rank": "4", "cap": "2"})
    assert knobs == {"rank": 4, "alpha": 16, "dropout": 0.0, "cap": 2.0}
    plan = replace(template(16), model=attacked(CONFIG, template(16).model.shape, entry, knobs))
    found = search.search(plan, CONFIG, entry, Levers(zero=2), None, knobs, configure)
    assert all(one.knobs | {"anchor": 0} == {"rank": 4, "alpha": 16, "dropout": 0.0, "anchor": 0}
               for one in found.candidates)  # fmt: skip
    assert found.winner.flops_ratio < 1  # hardly a weight's gradient is taken


def test_what_a_host_cannot_hold_comes_last():
    free = find(64, 1.33, zero=2, offload_optimizer=False)
    assert free.winner.levers.activation_storage == "host"
    host = free.winner.plan.needs.host_peak_bytes
    small = Hardware(name="small", memory_bytes=1 << 40, bandwidth_bytes_per_s=1e12, bf16_flops_per_s=1e15,
                     host_memory_bytes=host - 1, devices_per_node=8, link_bytes_per_s=1e11,
                     node_link_bytes_per_s=1e10, host_link_bytes_per_s=1e10)  # fmt: skip
    bound = find(64, 1.33, zero=2, offload_optimizer=False, hardware=small)
    assert not bound.winner.plan.needs.lacking(small)
    assert bound.candidates[-1].plan.needs.lacking(small)


def test_what_a_record_keeps_of_it():
    found = find(16, 1.33)
    values = found.values()
    assert values["under_cap"] == len(found.candidates)
    assert len(values["best"]) == search.SHOWN
    best = values["best"][0]
    assert best["peak_bytes"] == found.winner.plan.needs.peak_bytes
    assert best["host_bytes_per_step"] > 2 * found.winner.plan.activations.host_bytes  # and the offloaded states
    lines = search.lines(values)
    assert len(lines) == 1 + search.SHOWN
    assert "to and from the host per step" in lines[1]
