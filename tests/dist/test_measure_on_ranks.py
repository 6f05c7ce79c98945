"""Measurements on 2 ranks: the same saved bytes at every ZeRO stage, rates of real tokens, FLOPs, both sides."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from commands import last, rows

from dlrscale import launcher, record
from dlrscale.cli import attack_configs
from dlrscale.config import MeasureConfig, to_json

pytestmark = pytest.mark.dist
STAGES, DTYPES, CHECKPOINTING = range(4), ("fp32", "bf16"), ("none", "layer")
STRATEGIES = ("full", "lora", "lora-attn")
OPTIONS = {
    "model": "locked", "seq_len": 16, "micro_batch": 2, "num_ranks": 2, "steps": 3, "tracking_uri": "none",
    "checkpoint_every": 0, "inference_batches": [],
}  # fmt: skip
# C09: short and long records alternate; the last one is held out.
PADDED = {"data": "alternating.jsonl", "seq_len": 128, "accumulation": 4, "steps": 3}
RATES = {"full": {}, "ckpt-layer": {}, "lora": {"activation_checkpointing": "none"}}
SHORT, LONG, RECORDS = 10, 90, 17


def name(strategy: str, stage: int, dtype: str, checkpointing: str) -> str:
    return f"{strategy}-z{stage}-{dtype}-{checkpointing}"


def alternating(file: Path, tokenizer) -> None:
    """Records of 10 and of 90 tokens by turns, special tokens included."""
    with open(file, "w") as out:
        for i in range(RECORDS):
            length = LONG if i % 2 else SHORT
            text = {"prompt": "o" * 2, "completion": "n" * (length - 4)}
            out.write(json.dumps(text) + "\n")
    assert len(tokenizer("n" * 20).input_ids) == 21  # one token a letter and <s>; a record ends with </s>


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_llama, save_base, make_locked, tokenizer) -> Path:
    """A locked model, its base, and the records of C09."""
    folder = tmp_path_factory.mktemp("measure")
    base = save_base(make_llama(max_position_embeddings=128), folder / "base")
    make_locked(base, "model").rename(folder / "locked")
    alternating(folder / "alternating.jsonl", tokenizer)
    return folder


@pytest.fixture(scope="module")
def done(place: Path, start_ranks) -> Path:
    """All measurements, in one start of two ranks; small parameters are partitioned too at stage 3."""
    zero3 = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (place / "zero3.json").write_text(json.dumps(zero3))
    cases = {f"rates-{strategy}": (strategy, PADDED | chosen) for strategy, chosen in RATES.items()}
    # Stage 3 comes last: DeepSpeed's own linear of that stage stays in the process.
    for stage, strategy, dtype, checkpointing in itertools.product(STAGES, STRATEGIES, DTYPES, CHECKPOINTING):
        if strategy == "full" and checkpointing == "layer":
            strategy_, chosen = "ckpt-layer", {}
        else:
            strategy_, chosen = strategy, {"activation_checkpointing": checkpointing}
        chosen |= {"zero": stage, "dtype": dtype} | ({"deepspeed_config": "zero3.json"} if stage == 3 else {})
        cases[name(strategy, stage, dtype, checkpointing)] = (strategy_, chosen)
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("DS_ACCELERATOR", "cpu")
        for out, (strategy, chosen) in cases.items():
            options = OPTIONS | chosen | {"out": out}
            config = attack_configs(options, None, strategy, (), MeasureConfig)[0]
            sent.append({"run": "job", "config": json.loads(to_json(config))})
        results = start_ranks(2, sent)
    assert [r.get("code", r) for r in results] == [0] * len(sent)
    return place


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_stage_saves_the_same_bytes(strategy: str, dtype: str, checkpointing: str, done: Path) -> None:
    """Totals, peaks and each module's share; weights that ZeRO-3 gathers are no activations.

    Only where weights are frozen does stage 3 save more: its linear keeps its input all the same, as derived.
    """
    folders = [done / name(strategy, stage, dtype, checkpointing) for stage in STAGES]
    found = [last(folder)["metrics"] for folder in folders]
    by_module = [json.loads((folder / "saved.json").read_text()) for folder in folders]
    keys = [f"memory/saved{part}_bytes_per_token" for part in ("", "_peak", "_recomputed", "_mlp")]
    same = STAGES if strategy == "full" else STAGES[:3]
    first = [found[0][key] for key in keys]
    for stage in same:
        assert [found[stage][key] for key in keys] == first, stage
        assert by_module[stage] == by_module[0]
    if len(same) < len(STAGES):
        assert all(found[3][key] >= found[0][key] for key in keys)
        assert found[3][keys[0]] > found[0][keys[0]]
    for key in ("flops/forward", "flops/backward"):
        assert len({metrics[key] for metrics in found}) == 1
    for metrics, shares in zip(found, by_module, strict=True):
        total, peak, again, mlp = (metrics[key] for key in keys)
        assert sum(shares["saved"].values()) == total * shares["tokens"]
        assert sum(shares["recomputed"].values()) == again * shares["tokens"]
        if checkpointing == "none":
            assert (peak, again) == (total, 0)
            assert mlp > 0
        else:
            # A layer whose weights are frozen saves so little that the peak may be at the loss.
            assert peak > total or (strategy != "full" and peak == total)
            assert again > 0
            assert mlp == 0
        formula = metrics.get("memory/saved_mlp_bytes_per_token_formula")
        assert formula == (mlp if checkpointing == "none" and strategy != "lora" else None)


def test_nothing_of_a_measurement_is_left_but_its_record(done: Path) -> None:
    left = {path.name for path in (done / "full-z3-fp32-none").iterdir()}
    assert left <= {"records.jsonl", "steps.jsonl", "saved.json", "run.json", "description.json", ".ranks", ".outcome",
                    ".rank.lock"}  # fmt: skip


@pytest.mark.parametrize("strategy", RATES)
def test_rates_count_real_tokens(strategy: str, done: Path) -> None:
    """C09: 16 records of 10 and 90 tokens make a step: 800 real tokens, whatever is padded."""
    folder = done / f"rates-{strategy}"
    entry = last(folder)
    metrics = entry["metrics"]
    assert metrics["tokens/step"] == 800
    assert metrics["tokens/step_label"] == 800 - 16 * 3  # <s> and the prompt of two have no label
    steps = list(record.read_lines(folder / "steps.jsonl"))
    assert [row["tokens"] for row in steps] == [800, 1600, 2400]
    for epoch, row in enumerate(steps):
        # 8 micro-batches of two in the epoch's order: padded to 90 where one of them is long.
        order = np.random.default_rng([0, epoch]).permutation(16).reshape(8, 2)
        assert row["processed_tokens"] == sum(2 * (LONG if any(pair % 2) else SHORT) for pair in order)
        assert row["throughput/tokens_per_s"] * row["time/step_s"] == pytest.approx(800)
        assert row["throughput/tokens_per_s_per_device"] * row["time/step_s"] == pytest.approx(400)
    assert metrics["throughput/tokens_per_s_per_device"] * metrics["time/step_s"] == pytest.approx(400)
    assert metrics["time/data_s"] > 0
    assert "mfu" not in metrics  # a CPU's peak is not known
    assert rows(folder)


def test_recompute_is_no_work_of_the_model(done: Path) -> None:
    """C09: checkpointing runs more FLOPs, and none of them is in forward or backward; lora's backward is smaller."""
    full, layer, lora = (last(done / f"rates-{strategy}")["metrics"] for strategy in RATES)
    assert (full["flops/forward"], full["flops/backward"]) == (layer["flops/forward"], layer["flops/backward"])
    assert full["flops/recompute"] == 0
    assert 0 < layer["flops/recompute"] < full["flops/forward"]
    assert lora["flops/backward"] < full["flops/backward"]


def test_live_bytes_hold_what_the_rank_holds(done: Path) -> None:
    """Weights, gradients and Adam's two states are alive at the optimizer's step; ZeRO-2 shares out the last."""
    metrics = last(done / "full-z0-fp32-none")["metrics"]
    least = 4 * 4 * metrics["params/total"]
    assert metrics["memory/live_peak_bytes_optimizer"] >= least
    shared = last(done / "full-z2-fp32-none")["metrics"]
    assert shared["memory/live_start_bytes"] > 0


def state_of_hooks(module) -> dict:
    """Everything through which something could look into a step from outside."""
    import torch

    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    saved = torch.autograd.graph.saved_tensors_hooks
    return {
        "modules": sum(len(getattr(m, kind)) for m in module.modules() for kind in kinds),
        "parameters": sum(len(p._backward_hooks or ()) for p in module.parameters()),
        "modes": torch._C._len_torch_dispatch_stack(),
        "saved": torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,
        "torch": (saved.__enter__.__module__, type(torch.UntypedStorage.resize_).__name__),
        "global": len(torch.nn.modules.module._global_forward_hooks),
    }


def test_no_hook_is_there_in_timed_steps(place: Path, monkeypatch) -> None:
    """A job in this process: the forwards of timed steps see what the engine alone has, those of counted ones more."""
    from dlrscale import jobs
    from dlrscale.train import LanguageModelling, Loop

    body = importlib.import_module("dlrscale.jobs.measure")
    monkeypatch.chdir(place)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"),
                       ("MASTER_PORT", str(launcher.free_port()))):  # fmt: skip
        monkeypatch.setenv(key, value)
    seen: dict[str, list] = {"start": [], "dressed": [], "bare": [], "counted": []}
    now, models = ["bare"], []
    forward, step, run = LanguageModelling._forward, Loop.step, body.Counts._step

    def looking(self, engine, micro):
        seen[now[0]].append(state_of_hooks(engine.module))
        return forward(self, engine, micro)

    def stepping(self, stage, done):
        if done == 0:
            seen["start"].append(state_of_hooks(self.engine.module) | {"parameters": 0})
        now[0] = "dressed"
        try:
            return step(self, stage, done)
        finally:
            now[0] = "bare"

    def counting(self, context):
        now[0] = "counted"
        models.append(self.engine.module)
        run(self, context)

    monkeypatch.setattr(LanguageModelling, "_forward", looking)
    monkeypatch.setattr(Loop, "step", stepping)
    monkeypatch.setattr(body.Counts, "_step", counting)
    options = OPTIONS | {"num_ranks": 1, "steps": 4, "out": "hooks", "inference_batches": [1, 2], "new_tokens": 4}
    config = attack_configs(options | {"base": "base"}, None, "ckpt-layer", (), MeasureConfig)[0]
    assert jobs.run(config) == 0
    clean = seen["start"][0]
    seen["end"] = [state_of_hooks(models[0])]
    assert clean["modes"] == 0
    assert not clean["saved"]
    assert len(seen["dressed"]) == len(seen["bare"]) == 4
    assert [state for state in seen["dressed"][2:] + seen["bare"] + seen["end"] if state != clean] == []
    saved, flops, live = seen["counted"]  # and the test can see a hook
    assert saved["saved"]
    assert saved["modules"] > clean["modules"]
    assert flops["modes"] > 0
    assert live["modes"] > 0
    metrics = last(place / "hooks")["metrics"]
    assert "measure/overhead_ratio" in metrics
    for side, batch in itertools.product(("inference", "inference_base"), (1, 2)):
        assert metrics[f"{side}/prefill_tokens_per_s_b{batch}"] > 0
        assert metrics[f"{side}/decode_ms_per_token_b{batch}"] > 0
