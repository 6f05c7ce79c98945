"""The commands end to end on real DeepSpeed ranks, on a tiny model: lock, attack, direct launch, outcomes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from commands import LOCK, dlrscale, environment, last, rows
from dlrscale import launcher, record
from dlrscale.cli import attack_configs
from dlrscale.config import to_json

pytestmark = pytest.mark.dist

ROOT = Path(__file__).resolve().parents[2]
def test_lock_record(locked: Path) -> None:
    """The record is strict JSON with every key, an outcome, and both held-out losses."""
    text = (locked / record.RECORDS_FILE).read_text()
    entry = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert tuple(entry) == record.RECORD_KEYS
    assert entry["outcome"] == "ok"
    assert entry["plan"]["peak_bytes"] == sum(entry["plan"]["phases"][entry["plan"]["peak_phase"]].values()) > 0
    assert entry["config"]["global_batch"] == 4
    assert {"loss/heldout_base_model", "loss/heldout_locked", "loss/heldout_flat"} <= set(entry["metrics"])
    manifest = json.loads((locked / "model" / "lock.json").read_text())
    assert manifest["lock_id"] == entry["id"]
    assert str(locked.parent) not in (locked / "model" / "lock.json").read_text()
    assert str(locked.parent) not in (locked / "model" / "config.json").read_text()


def test_the_lock_tells_what_it_cost(locked: Path) -> None:
    """Tokens by hand: 52 steps of 4 sequences of 32, and 16 sequences that set the scales; hours of both ranks."""
    from dlrscale import models

    metrics, steps = last(locked)["metrics"], list(record.read_lines(locked / record.STEPS_FILE))
    assert metrics["cost/tokens"] == 52 * 4 * 32 + 16 * 32
    seconds = sum(row["time/step_s"] + row["time/data_s"] for row in steps)
    assert metrics["cost/device_hours"] == pytest.approx(2 * seconds / 3600)
    # 2 FLOPs per parameter, token and forward: at least one of the teacher and one of the student, which has as many; at
    # most the teacher's, and twice (hardening) the student's forward and backward.
    parameters = sum(p.numel() for p in models.load_model(locked / "model").parameters())
    assert 4 < metrics["cost/flops"] / (parameters * metrics["cost/tokens"]) < 14


def test_exported_losses_are_the_engine_s(locked: Path, place: Path) -> None:
    """The exported folder gives the held-out loss that the lock said, and its flattening the flat one."""
    from dlrscale import data, export, models
    from dlrscale.evaluate import heldout_loss

    entry = last(locked)
    tokenizer = models.load_tokenizer(locked / "model")
    _, heldout = data.split_heldout(data.load(str(place / "text.txt"), tokenizer, seq_len=32))
    heldout = heldout.subset(slice(4))
    model = models.load_model(locked / "model")
    for name, candidate in (("locked", model), ("flat", export.flattened_model(model))):
        found = heldout_loss(
            lambda ids, mask, m=candidate: m(ids, attention_mask=mask).logits,
            heldout, batch=2, rank=0, world_size=1, pad_id=0, device="cpu",
        )  # fmt: skip
        assert found["loss"] == pytest.approx(entry["metrics"][f"loss/heldout_{name}"], rel=1e-5)


def test_same_command_again_is_done_and_another_is_refused(locked: Path, place: Path) -> None:
    """A finished run is not run again; other settings do not write into its folder."""
    options = ["lock", "--model", "base", "--data", "text.txt", *LOCK, "--out", "whole"]
    before = (locked / record.RECORDS_FILE).read_bytes()
    again = dlrscale(place, *options)
    assert again.returncode == 0
    assert "was done before" in again.stderr
    other = dlrscale(place, *options, "--lr", "1e-4")
    assert other.returncode == 2
    assert "belongs to another run" in other.stderr
    assert (locked / record.RECORDS_FILE).read_bytes() == before


def test_direct_launch_is_the_same_job(locked: Path, place: Path) -> None:
    """`deepspeed launch/lock.py` with a file of ds_configs/ gives the rows of `dlrscale lock --zero 2`."""
    line = [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_addr", "127.0.0.1",
        "--master_port", str(launcher.free_port()), str(ROOT / "launch" / "lock.py"), "--model", "base",
        "--data", "text.txt", *LOCK[:-2], "--deepspeed_config", str(ROOT / "ds_configs" / "zero2.json"), "--out", "direct",
        "--tracking-uri", "none",
    ]  # fmt: skip
    done = subprocess.run(
        line, cwd=place, env=launcher.environment(2) | environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-out loss in nats per token" in done.stdout
    assert rows(place / "direct") == rows(locked)
    assert last(place / "direct")["id"] == last(locked)["id"]
    before = (place / "direct" / record.STEPS_FILE).read_bytes()
    again = subprocess.run(
        line, cwd=place, env=launcher.environment(2) | environment(), capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "was done before" in again.stdout + again.stderr
    assert (place / "direct" / record.STEPS_FILE).read_bytes() == before


def test_direct_launch_refuses_with_one_voice(place: Path) -> None:
    """Every rank checks first, rank 0 alone speaks, all end with 2."""
    line = [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_addr", "127.0.0.1",
        "--master_port", str(launcher.free_port()), str(ROOT / "launch" / "lock.py"), "--model", "bsae",
        "--data", "text.txt", "--out", "refused",
    ]  # fmt: skip
    done = subprocess.run(
        line, cwd=place, env=launcher.environment(2) | environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("Error: No such model folder") == 1
    assert "near: base" in done.stdout + done.stderr
    assert not (place / "refused").exists()


STRATEGIES = ["full", "full-offload", "ckpt-layer", "lora", "lora-attn", "flatten"]


@pytest.fixture(scope="module")
def attacked(locked: Path, place: Path, start_ranks) -> dict[str, tuple[dict, dict]]:
    """Each strategy on base and locked: (base record, locked record).

    One strategy goes through the command and MLflow; the others run one after the other in one start of two ranks.
    """
    done = dlrscale(
        place, "attack", "--model", "whole/model", "--base", "base", "--strategy", "ckpt-layer", "--data", "task.jsonl",
        "--heldout-base", "text.txt", "--heldout-limit", "4", "--seq-len", "32", "--micro-batch", "4",
        "--steps", "8", "--lr", "1e-2", "--warmup-steps", "1", "--out", "ckpt-layer",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Lock" in done.stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("DS_ACCELERATOR", "cpu")
        options = {
            "model": "whole/model", "data": "task.jsonl", "heldout_base": "text.txt", "heldout_limit": 4, "seq_len": 32,
            "micro_batch": 2, "num_ranks": 2, "steps": 8, "lr": 1e-2, "warmup_steps": 1, "tracking_uri": "none",
        }  # fmt: skip
        configs = [
            config
            for strategy in STRATEGIES
            if strategy != "ckpt-layer"
            for config in attack_configs(options | {"out": strategy}, "base", strategy, ())
        ]
    results = start_ranks(2, [{"run": "job", "config": json.loads(to_json(config))} for config in configs])
    assert results == [{"code": 0}] * len(configs)
    return {s: (last(place / s / "base"), last(place / s / "locked")) for s in STRATEGIES}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_attack_learns_the_task(strategy: str, attacked: dict) -> None:
    """Each strategy lowers the held-out loss of the task on both sides, and its record is whole."""
    for side, entry in zip(("base", "locked"), attacked[strategy], strict=True):
        metrics = entry["metrics"]
        assert entry["side"] == side
        assert entry["outcome"] == "ok"
        assert metrics["loss/heldout_task"] < metrics["loss/heldout_task_start"]
        assert {"loss/heldout_base", "loss/heldout_base_start", "time/step_s", "memory/host_peak_rss_bytes"} <= set(
            metrics
        )
        assert metrics["memory/saved_bytes_per_token"] > 0


def test_saved_bytes_by_strategy(attacked: dict) -> None:
    """Plain autograd saves the formula's bytes in the MLP part; checkpointing keeps none of them."""
    for entry in (*attacked["full"], *attacked["full-offload"]):  # stage 2 and stage 3 with gathered weights
        metrics = entry["metrics"]
        assert metrics["memory/saved_mlp_bytes_per_token"] == metrics["memory/saved_mlp_bytes_per_token_formula"]
    for strategy in ("ckpt-layer", "lora", "lora-attn", "flatten"):
        for entry in attacked[strategy]:
            assert entry["metrics"]["memory/saved_mlp_bytes_per_token"] == 0
    base, flat = attacked["flatten"]
    assert flat["metrics"]["memory/saved_bytes_per_token"] == base["metrics"]["memory/saved_bytes_per_token"]


def test_flatten_exports_the_base_s_architecture(attacked: dict, place: Path) -> None:
    """The flattened model is an ordinary Llama of the base's own sizes."""
    config = json.loads((place / "flatten" / "locked" / "transformed" / "config.json").read_text())
    base = json.loads((place / "base" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["intermediate_size"] == base["intermediate_size"]
    assert "auto_map" not in config
    assert attacked["flatten"][1]["metrics"]["params/total"] == attacked["flatten"][0]["metrics"]["params/total"]


def test_trainable_sets(attacked: dict) -> None:
    """LoRA trains rank * (in + out) per linear map; the attention alone with lora-attn."""
    base = attacked["lora-attn"][0]["metrics"]["params/trainable"]
    assert attacked["lora-attn"][1]["metrics"]["params/trainable"] == base
    assert attacked["lora"][1]["metrics"]["params/trainable"] > base
    for entry in attacked["full"]:
        assert entry["metrics"]["params/trainable"] == entry["metrics"]["params/total"]


def test_mlflow_holds_the_runs(attacked: dict, locked: Path, place: Path) -> None:
    """Attacks are children of their lock's run, with a point for every step."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/results/mlflow.db")
    experiment = client.get_experiment_by_name("dlrscale")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    parent = next(r for r in runs if r.data.tags.get("dlrscale.kind") == "lock")
    assert parent.data.tags["dlrscale.lock_id"] == last(locked)["id"]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 2
    assert all(r.info.status == "FINISHED" for r in runs)
    assert len(client.get_metric_history(children[0].info.run_id, "loss/train")) >= 8


def test_report_of_everything(attacked: dict, place: Path) -> None:
    """The report is made from the records of all runs."""
    done = dlrscale(place, "report", ".", "--out", "report")
    assert done.returncode == 0, done.stderr
    page = (place / "report" / "report.html").read_text()
    assert all(strategy in page for strategy in STRATEGIES)
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_divergence_is_an_outcome(locked: Path, place: Path) -> None:
    """A loss that is not finite ends the run as `diverged`, with exit code 0 and strict JSON."""
    done = dlrscale(
        place, "attack", "--model", "whole/model", "--strategy", "full", "--data", "task.jsonl", "--seq-len", "32",
        "--micro-batch", "2", "--steps", "30", "--lr", "1e30", "--warmup-steps", "0", "--heldout-limit", "2",
        "--out", "diverged", "--tracking-uri", "none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (place / "diverged" / record.RECORDS_FILE).read_text()
    entry = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert entry["outcome"] == "diverged"
    assert "loss is" in entry["error"]
    assert entry["plan"]["error_percent"]["saved_bytes"] == 0  # measured all the same


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, make_gpt2, tokenizer) -> Path:
    """A tiny GPT-2's folder: the other kind of MLP."""
    folder = tmp_path_factory.mktemp("gpt2") / "base"
    make_gpt2().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_gpt2_line(gpt2: Path, place: Path, on_forked_ranks, monkeypatch) -> None:
    """GPT-2 at ZeRO-3 with offload: plain and warm by default, flattened into a GPT2LMHeadModel."""
    monkeypatch.setattr(launcher, "run", on_forked_ranks)
    few = ("--steps", "4", "--heal-steps", "2", "--checkpoint-every", "0")
    done = dlrscale(
        place, "lock", "--model", str(gpt2), "--data", "text.txt", *LOCK[:-2], *few, "--zero", "3", "--offload-optimizer",
        "--offload-param", "--dtype", "bf16", "--accumulation", "2", "--micro-batch", "1", "--out", "gpt2",
        "--tracking-uri", "none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((place / "gpt2" / "model" / "config.json").read_text())["dtype"] == "float32"  # the base's own
    assert "form plain" in done.stderr
    assert "warm start" in done.stderr
    done = dlrscale(
        place, "attack", "--model", "gpt2/model", "--strategy", "flatten", "--data", "task.jsonl", "--seq-len", "32",
        "--steps", "3", "--heldout-limit", "2", "--out", "gpt2-flat", "--tracking-uri", "none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = json.loads((place / "gpt2-flat" / "transformed" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]


def test_demo_on_a_tiny_model(place: Path, tiny_folder: Path, on_forked_ranks, monkeypatch, capsys) -> None:
    """The demonstration's own code with another model and fewer steps: table, claims, report, how to open MLflow."""
    import importlib

    demo = importlib.import_module("dlrscale.cli.demo")  # the package's own `demo` is the command
    small = {"steps": 4, "warmup_steps": 1}
    monkeypatch.chdir(place)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(demo, "EMBEDDED_MODEL", tiny_folder)
    monkeypatch.setattr(demo, "SHARED", demo.SHARED | {"seq_len": 32, "heldout_limit": 2})
    texts = {"data": str(place / "text.txt"), "heldout": None}
    monkeypatch.setattr(demo, "LOCK", demo.LOCK | texts | small | {"depth": 2, "heal_steps": 2})
    monkeypatch.setattr(demo, "ATTACK", demo.ATTACK | texts | small | {"heldout_base": None})
    monkeypatch.setattr(demo, "STRATEGIES", ("ckpt-layer",))
    monkeypatch.setattr(launcher, "run", on_forked_ranks)
    demo.run_demo(place / "demo", "none")
    said = capsys.readouterr().out
    assert "ckpt-layer  ok / ok" in said
    assert all(f"\nC{n} " in said for n in range(1, 6))
    assert "dlrscale ui" in said
    assert (place / "demo" / "report.html").is_file()
