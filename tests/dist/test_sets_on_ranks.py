"""The sets that train part of a model or a network beside it: the same at every stage, whole on disk, nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import last, rows
from safetensors.torch import load_file

from dlrscale import data, models, shapes
from dlrscale.attacks import chosen, ladder
from dlrscale.cli import attack_configs
from dlrscale.config import to_json
from dlrscale.evaluate import heldout_loss

pytestmark = pytest.mark.dist
OPTIONS = {"data": "task.jsonl", "seq_len": 32, "micro_batch": 2, "num_ranks": 2, "steps": 3, "lr": 1e-2,
           "warmup_steps": 1, "tracking_uri": "none", "checkpoint_every": 2, "model": "whole/model"}  # fmt: skip
SETS = {"norms": {}, "last-k": {"last": "1"}, "head": {}, "ladder": {"reduction": "2"}}
STAGES = (0, 2, 3)
TIED = "head-tied"


@pytest.fixture(scope="module")
def done(locked: Path, place: Path, start_ranks, make_llama, tokenizer) -> Path:
    """All of them in one start of two ranks; at stage 3, the last, small parameters are partitioned too."""
    zero3 = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (place / "all3.json").write_text(json.dumps(zero3))
    make_llama(tie_word_embeddings=True).save_pretrained(place / "tied")
    tokenizer.save_pretrained(place / "tied")
    cases = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("DS_ACCELERATOR", "cpu")
        asked = [(f"{name}-z{zero}", name, zero, {}) for zero in STAGES for name in SETS]
        for label, name, zero, changes in (*asked, (TIED, "head", 3, {"model": "tied"})):
            changes |= {"out": f"set-{label}", "zero": zero, "save_model": name != "ladder"}
            changes |= {"deepspeed_config": "all3.json"} if zero == 3 else {}
            words = tuple(f"{knob}={value}" for knob, value in SETS[name].items())
            sent = {"config": json.loads(to_json(attack_configs(OPTIONS | changes, None, name, words)[0]))}
            if label == "ladder-z3":
                cases.append({"run": "cut_job", **sent})
            cases.append({"run": "job", **sent})
    results = start_ranks(2, cases)
    assert [r["code"] for r in results] == [1 if case["run"] == "cut_job" else 0 for case in cases]
    return place


def trained(place: Path, label: str) -> dict[str, torch.Tensor]:
    return load_file(place / f"set-{label}" / "adapter" / chosen.WEIGHTS)


def loss(place: Path, model: torch.nn.Module) -> float:
    """The held-out loss of the task, computed outside of the engine."""
    tokenizer = models.load_tokenizer(place / "whole" / "model")
    _, heldout = data.split_heldout(data.load(str(place / "task.jsonl"), tokenizer, seq_len=32))
    return heldout_loss(
        lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits,
        heldout, batch=2, rank=0, world_size=1, pad_id=0, device="cpu",
    )["loss"]  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_stages_do_not_matter(name: str, done: Path) -> None:
    """Losses, and what is written, are those of stage 0; the ladder at stage 3 was cut and went on."""
    wanted = [row["loss/train"] for row in rows(done / f"set-{name}-z0")]
    first = trained(done, f"{name}-z0")
    assert len(wanted) == 3 and wanted[-1] < wanted[0]
    for zero in STAGES:
        assert [row["loss/train"] for row in rows(done / f"set-{name}-z{zero}")] == pytest.approx(wanted, rel=1e-5)
        found = trained(done, f"{name}-z{zero}")
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in first.items()}
        assert all(value.numel() for value in found.values())
        for key, value in first.items():
            assert (found[key] - value).abs().max() <= 2e-3 * value.abs().max(), key


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("name", [name for name in SETS if name != "ladder"])
def test_only_the_claimed_parameters_move(name: str, zero: int, done: Path) -> None:
    """The saved model is the one that was measured; all that is frozen is bitwise the attacked model's."""
    folder = done / f"set-{name}-z{zero}" / "model"
    before = load_file(done / "whole" / "model" / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert after.keys() == before.keys()
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert moved == set(trained(done, f"{name}-z{zero}"))
    claimed = {
        "norms": {key for key in before if "norm" in key},
        "last-k": {key for key in before if key.startswith(("model.layers.1.", "model.norm")) and not key.endswith(".b")},
        "head": {"lm_head.weight"},
    }
    assert moved == claimed[name]
    recorded = last(done / f"set-{name}-z{zero}")["metrics"]["loss/heldout_task"]
    assert loss(done, models.load_model(folder)) == pytest.approx(recorded, rel=1e-5)


def test_a_tied_head_is_saved_beside_its_embedding(done: Path) -> None:
    """Two matrices on disk and after loading; the embedding is what it was."""
    before = load_file(done / "tied" / "model.safetensors")
    after = load_file(done / f"set-{TIED}" / "model" / "model.safetensors")
    assert set(after) - set(before) == {"lm_head.weight"}
    assert all(torch.equal(after[key], value) for key, value in before.items())
    model = models.load_model(done / f"set-{TIED}" / "model")
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, after["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    recorded = last(done / f"set-{TIED}")["metrics"]["loss/heldout_task"]
    assert loss(done, model) == pytest.approx(recorded, rel=1e-5)


@pytest.mark.parametrize("zero", STAGES)
def test_a_ladder_is_loaded_beside_its_model(zero: int, done: Path) -> None:
    folder = done / f"set-ladder-z{zero}"
    model = models.load_model(done / "whole" / "model")
    found = ladder.load(model, shapes.model_shape(model.config.to_dict()), folder / "adapter")
    assert loss(done, found) == pytest.approx(last(folder)["metrics"]["loss/heldout_task"], rel=1e-5)
    assert not (folder / "model").exists()


def test_the_cut_ladder_went_on(done: Path) -> None:
    first, second = (json.loads(line) for line in (done / "set-ladder-z3" / "records.jsonl").read_text().splitlines())
    assert (first["outcome"], second["outcome"]) == ("failed", "ok")
    assert second["config"]["resumed"]["step"] == 2


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("name", SETS)
def test_the_plan_in_the_record_is_what_was_measured(name: str, zero: int, done: Path) -> None:
    """Saved bytes, parameters, gradients, masters and optimizer states, to the byte."""
    plan = last(done / f"set-{name}-z{zero}")["plan"]
    assert plan["planned"] == plan["measured"]
    assert {"saved_bytes", "parameters_bytes", "gradients_bytes", "optimizer_bytes"} <= set(plan["measured"])
