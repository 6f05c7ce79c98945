"""Transforms that train, as whole attacks on two ranks: cut in the transform and in the fine-tune, and going on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import last, rows
from transformers import AutoModelForCausalLM

from dlrscale import data, folders, models, record
from dlrscale.cli import attack_configs
from dlrscale.config import to_json
from dlrscale.evaluate import heldout_loss

pytestmark = pytest.mark.dist
OPTIONS = {"data": "task.jsonl", "seq_len": 32, "micro_batch": 2, "num_ranks": 2, "steps": 4, "lr": 1e-3,
           "warmup_steps": 1, "tracking_uri": "none", "checkpoint_every": 2, "model": "whole/model"}  # fmt: skip
UNDISTIL, HEAL = ("regress_steps=4",), ("heal_steps=16",)
RUNS = {  # name -> strategy, knobs, levers, parts of the run after whose first checkpoint it is cut
    "undistil-z2": ("undistil", UNDISTIL, {"zero": 2}, ()),
    "undistil-z2-cut": ("undistil", UNDISTIL, {"zero": 2}, ("transformed_", "")),
    "undistil-z0-fresh": ("undistil", (*UNDISTIL, "start=fresh"), {"zero": 0}, ()),
    "undistil-z1-public": ("undistil", (*UNDISTIL, "text=public"), {"zero": 1, "public_data": "text.txt"}, ()),
    "drop-z2": ("drop-blocks", HEAL, {"zero": 2}, ()),
    "drop-z1-unhealed": ("drop-blocks", ("heal_steps=0",), {"zero": 1}, ()),
    "group-z2": ("flatten", ("group=2",), {"zero": 2}, ()),
    # Behind them stage 3: DeepSpeed replaces torch's linear map for the rest of the process.
    "undistil-z3-cut": ("undistil", UNDISTIL, {"zero": 3, "tiles": 2}, ("",)),
    "undistil-z3-offload": ("undistil", UNDISTIL, {"zero": 3, "offload_optimizer": True, "offload_param": True}, ()),
    "drop-z3-cut": ("drop-blocks", HEAL, {"zero": 3}, ("transformed_", "")),
}


@pytest.fixture(scope="module")
def done(locked: Path, place: Path, start_ranks) -> Path:
    """All of these attacks, in one start of two ranks; small parameters are partitioned too at stage 3."""
    zero3 = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (place / "zero3.json").write_text(json.dumps(zero3))
    cases, codes = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("DS_ACCELERATOR", "cpu")
        for name, (strategy, knobs, changes, cuts) in RUNS.items():
            if changes["zero"] == 3 and "offload_param" not in changes:
                changes = changes | {"deepspeed_config": "zero3.json"}
            config = attack_configs(OPTIONS | changes | {"out": f"run-{name}"}, None, strategy, knobs)[0]
            sent = {"config": json.loads(to_json(config))}
            cases += [*({"run": "cut_job", "part": part, **sent} for part in cuts), {"run": "job", **sent}]
            codes += [*(1 for _ in cuts), 0]
    assert [result.get("code", result) for result in start_ranks(2, cases)] == codes
    return place


def steps(folder: Path) -> list[dict]:
    """The rows of a run's transform without its times."""
    found = record.read_lines(folder / "transformed_steps.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))} for row in found]


def heldout(place: Path, model: torch.nn.Module) -> float:
    """The held-out loss of the task, computed outside of the engine."""
    tokenizer = models.load_tokenizer(place / "whole" / "model")
    _, part = data.split_heldout(data.load(str(place / "task.jsonl"), tokenizer, seq_len=32))
    return heldout_loss(
        lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits,
        part, batch=2, rank=0, world_size=1, pad_id=0, device="cpu",
    )["loss"]  # fmt: skip


def divergence(place: Path, folder: Path) -> float:
    """Nats per token of KL(locked || model) on the task's held-out data."""
    locked, model = models.load_model(place / "whole" / "model"), models.load_model(folder)
    _, part = data.split_heldout(data.load(str(place / "task.jsonl"), models.load_tokenizer(folder), seq_len=32))
    total = tokens = 0
    for batch in data.calibration(part):
        with torch.no_grad():
            teacher, student = (m(**batch).logits.double().log_softmax(-1) for m in (locked, model))
        total += float((teacher.exp() * (teacher - student)).sum())
        tokens += batch["input_ids"].numel()
    return total / tokens


@pytest.mark.parametrize("name", RUNS)
def test_the_fine_tune_starts_from_the_folder_that_the_transform_has_made(name: str, done: Path) -> None:
    """It is a normal one: transformers alone loads it, and its held-out loss is the record's first."""
    folder, entry = done / f"run-{name}" / "transformed", last(done / f"run-{name}")
    assert entry["outcome"] == "ok"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert heldout(done, model) == pytest.approx(entry["metrics"]["loss/heldout_task_start"], rel=1e-5)
    models.check_folder(folder)
    manifest, depth = folders.read_manifest(folder), 2 if name == "group-z2" else 3
    if name.startswith("undistil"):
        assert manifest is None
        assert type(model).__name__ == "LlamaForCausalLM"
        assert sum(p.numel() for p in model.parameters()) == entry["metrics"]["params/total"]
    else:
        assert manifest["depth"] == depth
        assert manifest["lock_id"] == entry["config"]["lock_id"]
        assert len(model.config.dlr["ranks"]["0"]) == depth
    assert [row["step"] for row in rows(done / f"run-{name}")] == [1, 2, 3, 4]
    assert not (done / f"run-{name}" / "transformed_checkpoints").exists()


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("undistil")])
def test_a_regression_and_its_bill(name: str, done: Path) -> None:
    """Rows of their own, errors by layer, and tokens and FLOPs at least of the products that must be done."""
    metrics, found = last(done / f"run-{name}")["metrics"], steps(done / f"run-{name}")
    assert [(row["step"], row["phase"]) for row in found] == [(i, "undistil") for i in (1, 2, 3, 4)]
    assert found[-1]["transform/error_mean"] < found[0]["transform/error_mean"]
    assert {k for k in metrics if k.startswith("transform/error_layer_")} == {
        "transform/error_layer_0", "transform/error_layer_1",
    }  # fmt: skip
    assert metrics["transform/tokens"] > found[-1]["tokens"]  # with calibration
    shape = json.loads((done / "base" / "config.json").read_text())
    mlp = 3 * shape["hidden_size"] * shape["intermediate_size"] * shape["num_hidden_layers"]
    processed = sum(row["processed_tokens"] for row in found)
    # The teacher's forward, and of each MLP a forward and the weights' gradients, its input's but for the first maps.
    assert 2 * processed * (mlp + mlp + mlp + mlp / 3) < metrics["transform/flops"] < 40 * processed * mlp
    assert metrics["transform/time_s"] > 0


def test_tiles_and_stages_do_not_matter(done: Path) -> None:
    """The regression gives what it gives at stage 2, also where it is tiled, offloaded, or was cut."""
    wanted = [row["loss/train"] for row in steps(done / "run-undistil-z2")]
    for name in ("undistil-z2-cut", "undistil-z3-cut", "undistil-z3-offload"):
        assert [row["loss/train"] for row in steps(done / f"run-{name}")] == pytest.approx(wanted, rel=1e-4), name
    wanted = [row["loss/train"] for row in steps(done / "run-drop-z2")]
    assert [row["loss/train"] for row in steps(done / "run-drop-z3-cut")] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "peace"), [("undistil-z2-cut", "undistil-z2"), ("undistil-z3-cut", None), ("drop-z3-cut", None)]
)
def test_what_was_cut_goes_on_and_is_not_transformed_again(name: str, peace: str | None, done: Path) -> None:
    """A cut fine-tune has the transform's bill to the last digit; a cut transform went on from its checkpoint."""
    folder = done / f"run-{name}"
    *_, cut, ended = (json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines())
    assert (cut["outcome"], ended["outcome"]) == ("failed", "ok")
    assert ended["config"]["resumed"]["step"] == 2
    bills = [{k: v for k, v in entry["metrics"].items() if k.startswith("transform/")} for entry in (cut, ended)]
    assert bills[0] == bills[1]
    if peace is not None:  # to the last bit, as a run in peace
        assert rows(folder) == rows(done / f"run-{peace}")
        assert steps(folder) == steps(done / f"run-{peace}")
        files = [(done / f"run-{n}" / "transformed" / "model.safetensors").read_bytes() for n in (name, peace)]
        assert files[0] == files[1]


def test_a_heal_and_its_blocks(done: Path) -> None:
    """The blocks that went are those with the smallest shares; the heal brings the locked model nearer."""
    folder = done / "run-drop-z2"
    told = json.loads((folder / "transformed_blocks.json").read_text())
    for layer, shares in told["shares"].items():
        gone = sorted(set(range(4)) - set(told["kept"][layer]))
        assert gone == [min(range(4), key=lambda k, s=shares: s[k])]
    found = steps(folder)
    assert [row["phase"] for row in found] == ["heal"] * 16
    unhealed = done / "run-drop-z1-unhealed"
    assert json.loads((unhealed / "transformed_blocks.json").read_text())["kept"] == told["kept"]
    assert divergence(done, folder / "transformed") < 0.9 * divergence(done, unhealed / "transformed")


@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith("drop")])
def test_the_plan_knows_the_transformed_shape(name: str, done: Path) -> None:
    """Saved bytes and model states of the fine-tune are those of the plan; which blocks drop is known to no plan."""
    plan = last(done / f"run-{name}")["plan"]
    assert plan["planned"] == plan["measured"]


def test_on_a_base_there_is_nothing_to_transform(done: Path, start_ranks, monkeypatch) -> None:
    """The run is ckpt-layer, and its bill is zero."""
    monkeypatch.chdir(done)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    cases = []
    for strategy in ("undistil", "drop-blocks"):
        config = attack_configs(OPTIONS | {"model": "base", "out": f"base-{strategy}"}, None, strategy, ())[0]
        cases.append({"run": "job", "config": json.loads(to_json(config))})
    assert start_ranks(2, cases) == [{"code": 0}, {"code": 0}]
    for strategy in ("undistil", "drop-blocks"):
        metrics = last(done / f"base-{strategy}")["metrics"]
        assert [metrics[f"transform/{k}"] for k in ("tokens", "flops", "time_s")] == [0, 0, 0]
        assert not (done / f"base-{strategy}" / "transformed").exists()
