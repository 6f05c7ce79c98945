"""What attacks leave behind: adapters whole at every stage and after a cut, and the attacked model itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import last, rows
from safetensors.torch import load_file

from dlrscale import data, models
from dlrscale.cli import attack_configs
from dlrscale.config import to_json
from dlrscale.evaluate import heldout_loss

pytestmark = pytest.mark.dist
OPTIONS = {"data": "task.jsonl", "seq_len": 32, "micro_batch": 2, "num_ranks": 2, "steps": 4, "lr": 1e-2,
           "warmup_steps": 1, "tracking_uri": "none", "checkpoint_every": 2, "model": "whole/model"}  # fmt: skip
ADAPTERS = {
    "z0": ("lora", {"zero": 0}),
    "z2": ("lora", {"zero": 2}),
    "no-checkpointing": ("lora", {"zero": 2, "activation_checkpointing": "none"}),
    "z3": ("lora", {"zero": 3}),  # behind it: DeepSpeed replaces torch's linear map for the rest of the process
    "attention-z3": ("lora-attn", {"zero": 3}),
}
MODELS = {
    "full-z3": ("full", {"zero": 3, "save_model": True}),
    "lora-z3": ("lora", {"zero": 3, "save_model": True}),
    "flatten": ("flatten", {"save_model": True}),
}


@pytest.fixture(scope="module")
def done(locked: Path, place: Path, start_ranks) -> Path:
    """All of these attacks, in one start of two ranks; small parameters are partitioned too at stage 3."""
    zero3 = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (place / "zero3.json").write_text(json.dumps(zero3))
    cases = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("DS_ACCELERATOR", "cpu")
        for name, (strategy, changes) in (ADAPTERS | MODELS).items():
            if changes.get("zero") == 3:
                changes = changes | {"deepspeed_config": "zero3.json"}
            config = attack_configs(OPTIONS | changes | {"out": f"made-{name}"}, None, strategy, ())[0]
            sent = {"config": json.loads(to_json(config))}
            if name == "z3":
                cases.append({"run": "cut_job", **sent})
            cases.append({"run": "job", **sent})
    results = start_ranks(2, cases)
    assert [r["code"] for r in results] == [1 if case["run"] == "cut_job" else 0 for case in cases]
    return place


def adapter(place: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(place / f"made-{name}" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_is_whole_and_trained(name: str, done: Path) -> None:
    """No empty tensor; each B, of the DLR factors too, has left zero; the file loads onto the locked model."""
    from peft import PeftModel

    found = adapter(done, name)
    assert all(value.numel() for value in found.values())
    assert all(value.norm() > 0 for key, value in found.items() if "lora_B" in key)
    assert any(".blocks." in key for key in found) == (ADAPTERS[name][0] == "lora")
    model = PeftModel.from_pretrained(models.load_model(done / "whole" / "model"), done / f"made-{name}" / "adapter")
    assert str(done) not in (done / f"made-{name}" / "adapter" / "adapter_config.json").read_text()
    assert loss(done, model) == pytest.approx(last(done / f"made-{name}")["metrics"]["loss/heldout_task"], rel=1e-5)


def loss(place: Path, model: torch.nn.Module) -> float:
    """The held-out loss of the task, computed outside of the engine."""
    tokenizer = models.load_tokenizer(place / "whole" / "model")
    _, heldout = data.split_heldout(data.load(str(place / "task.jsonl"), tokenizer, seq_len=32))
    return heldout_loss(
        lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits,
        heldout, batch=2, rank=0, world_size=1, pad_id=0, device="cpu",
    )["loss"]  # fmt: skip


@pytest.mark.parametrize("name", ["z2", "z3", "no-checkpointing"])
def test_stage_and_checkpointing_do_not_matter(name: str, done: Path) -> None:
    """The losses and the adapters are those of stage 0; stage 3 was cut after two steps and went on."""
    first, other = rows(done / "made-z0"), rows(done / f"made-{name}")
    assert [row["loss/train"] for row in other] == pytest.approx([row["loss/train"] for row in first], rel=1e-5)
    wanted, found = adapter(done, "z0"), adapter(done, name)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}
    for key, value in wanted.items():
        assert (found[key] - value).abs().max() <= 2e-3 * value.abs().max(), key


def test_a_cut_attack_went_on(done: Path) -> None:
    """The record of the second start says from where; frozen weights came from the model's folder."""
    first, second = (json.loads(line) for line in (done / "made-z3" / "records.jsonl").read_text().splitlines())
    assert (first["outcome"], second["outcome"]) == ("failed", "ok")
    assert second["config"]["resumed"]["step"] == 2
    assert [row["step"] for row in rows(done / "made-z3")] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", MODELS)
def test_the_attacked_model_is_the_one_that_was_measured(name: str, done: Path) -> None:
    """Its folder gives the record's held-out loss; a locked one keeps its manifest, a flattened one has none."""
    folder = done / f"made-{name}" / "model"
    recorded = last(done / f"made-{name}")["metrics"]["loss/heldout_task"]
    assert loss(done, models.load_model(folder)) == pytest.approx(recorded, rel=1e-5)
    assert (folder / "lock.json").exists() == (name != "flatten")
    if name != "flatten":
        assert json.loads((folder / "lock.json").read_text())["attacked"]["strategy"] == MODELS[name][0]


@pytest.mark.parametrize("name", ADAPTERS | MODELS)
def test_the_plan_in_the_record_is_what_was_measured(name: str, done: Path) -> None:
    """Saved bytes, parameters, gradients, masters and optimizer states: predicted to the byte, on the fullest rank."""
    plan = last(done / f"made-{name}")["plan"]
    assert plan["planned"] == plan["measured"]
    assert {"saved_bytes", "parameters_bytes", "gradients_bytes", "optimizer_bytes"} <= set(plan["measured"])
    assert set(plan["error_percent"].values()) == {0}
