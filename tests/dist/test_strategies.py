"""Exact strategies on real ranks: the loss curve of `full` at every ZeRO stage, and the gates of their records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import last, rows

from dlrscale.cli import attack_configs
from dlrscale.config import to_json

pytestmark = pytest.mark.dist
OPTIONS = {"data": "task.jsonl", "seq_len": 32, "micro_batch": 2, "accumulation": 2, "num_ranks": 2, "steps": 4,
           "lr": 3e-3, "warmup_steps": 1, "tracking_uri": "none", "checkpoint_every": 0, "model": "whole/model"}  # fmt: skip
LEVERS = ("ckpt-layer", "ckpt-nested", "ckpt-offload", "act-offload", "tile-tokens", "reverse")
CASES = {
    "full-0": ("full", {"zero": 0}),
    **{f"{name}-{stage}": (name, {"zero": stage}) for stage in (0, 2) for name in LEVERS},
    "reverse-1-offload": ("reverse", {"zero": 1, "offload_optimizer": True}),
    "act-int8-2": ("act-int8", {"zero": 2}),
    "reverse-lora-2": ("reverse", {"zero": 2, "trainable": "lora"}),
    "tiles-lora-attn-2": ("tile-tokens", {"zero": 2, "trainable": "lora-attn"}),
    **{f"{name}-3": (name, {"zero": 3}) for name in LEVERS},  # last: DeepSpeed replaces torch's linear map for good
    "reverse-3-offload": ("reverse", {"zero": 3, "offload_optimizer": True, "offload_param": True}),
    "nested-lora-3": ("ckpt-nested", {"zero": 3, "trainable": "lora"}),
}


@pytest.fixture(scope="module")
def done(locked: Path, place: Path, start_ranks) -> Path:
    """All of these attacks, in one start of two ranks; small parameters are partitioned too at stage 3."""
    zero3 = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3.json").read_text())
    cases = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("DS_ACCELERATOR", "cpu")
        for name, (strategy, changes) in CASES.items():
            if changes["zero"] == 3:
                section = zero3["zero_optimization"] | {"stage3_param_persistence_threshold": 0}
                for lever in ("offload_optimizer", "offload_param"):
                    if changes.get(lever):
                        section = section | {lever: {"device": "cpu"}}
                optimizer = {"type": "AdamW", "params": {}}
                (place / f"{name}.json").write_text(
                    json.dumps(zero3 | {"zero_optimization": section, "optimizer": optimizer})
                )
                changes = changes | {"deepspeed_config": f"{name}.json"}
            config = attack_configs(OPTIONS | changes | {"out": f"curve-{name}"}, None, strategy, ())[0]
            cases.append({"run": "job", "config": json.loads(to_json(config))})
    assert [result["code"] for result in start_ranks(2, cases)] == [0] * len(cases)
    return place


def losses(place: Path, name: str) -> list[float]:
    return [row["loss/train"] for row in rows(place / f"curve-{name}")]


@pytest.mark.parametrize("name", [n for n in CASES if "lora" not in n and "int8" not in n])
def test_an_exact_strategy_has_the_losses_of_full(name: str, done: Path) -> None:
    """Within 1e-5 relative, over accumulation, clipping and AdamW's steps."""
    assert losses(done, name) == pytest.approx(losses(done, "full-0"), rel=1e-5)


def test_eight_bits_are_near(done: Path) -> None:
    assert losses(done, "act-int8-2") == pytest.approx(losses(done, "full-0"), rel=2e-2)
    assert losses(done, "act-int8-2") != losses(done, "full-0")


@pytest.mark.parametrize("name", CASES)
def test_the_gates_hold(name: str, done: Path) -> None:
    """The gradient of the first sequence is plain autograd's; what the strategy claims was there."""
    gates = last(done / f"curve-{name}")["gates"]
    gradient = gates["gradient"]
    assert gradient["holds"]
    assert gradient["relative_error"] < (0.1 if "int8" in name else 1e-5)
    assert gates["engaged"]["holds"], gates["engaged"]


LAYOUTS = [
    {"zero": 0},
    {"zero": 1, "offload_optimizer": True},
    {"zero": 2, "accumulation": 2},
    {"zero": 3, "accumulation": 2},
    {"zero": 3, "offload_optimizer": True, "offload_param": True},
]


@pytest.fixture(scope="module")
def gated(start_ranks) -> list[dict]:
    cases = [{"run": "gate", "ranks": 2, "broken": broken, **layout} for layout in LAYOUTS for broken in (False, True)]
    return start_ranks(2, cases)


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=[str(layout) for layout in LAYOUTS])
def test_the_gradient_check_sees_a_cut_graph_and_leaves_nothing_behind(index: int, gated: list[dict]) -> None:
    """C06: adapters that get no gradient under checkpointing fail the gate; the losses are bitwise those without it."""
    whole, broken = gated[2 * index : 2 * index + 2]
    assert "error" not in whole, whole
    assert whole["gate"]["holds"]
    assert whole["gate"]["relative_error"] < 1e-5
    assert whole["with"] == whole["without"]
    assert not broken["gate"]["holds"]
    assert broken["gate"]["cosine"] < 0.999
    assert broken["with"] == broken["without"]
