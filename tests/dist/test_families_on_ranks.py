"""Every family on two real DeepSpeed ranks: a short lock at ZeRO 3, then an attack on what it wrote.

ZeRO 3 cuts up every parameter, however small (`stage3_param_persistence_threshold` 0), so that a weight which is
read outside its module's forward would be found empty. All jobs run in one start of the launcher.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from dlrscale import config as configuration
from dlrscale import data, dlr, engine, models, record, shapes

pytestmark = pytest.mark.dist

# name: (family, changes of its configuration, strategy of the attack on its lock)
MODELS = {
    "llama": ("llama", {"tie_word_embeddings": True}, "full"),
    "mistral": ("mistral", {}, "full"),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, "full"),
    "qwen3": ("qwen3", {}, "lora"),
    "gemma": ("gemma", {"hidden_act": "gelu"}, "full"),
    "phi": ("phi", {}, "full"),
    "phi3": ("phi3", {}, "full"),
    "gpt_neox": ("gpt_neox", {}, "full"),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}, "flatten"),
    "opt": ("opt", {}, "full"),
    "falcon": ("falcon", {}, "full"),
    "falcon-sequential": ("falcon", {"parallel_attn": False, "bias": True, "alibi": True}, "lora"),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, "flatten"),
    "gpt2": ("gpt2", {}, "full"),
}
# Again at ZeRO 0, where nothing is cut up; opt's second layer is then left out.
WHOLE = ("opt", "phi3", "falcon", "gpt2")
KNOBS = {"lora": {"rank": 2, "alpha": 4, "dropout": 0.0}, "flatten": {"group": 0}}
RUN = {"seq_len": 24, "micro_batch": 2, "num_ranks": 2, "warmup_steps": 1, "tracking_uri": "none", "heldout_limit": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_model, save_base) -> Path:
    """A folder with a base model of each family, text, and a DeepSpeed file."""
    folder = tmp_path_factory.mktemp("families")
    for name, (family, changes, _) in MODELS.items():
        save_base(make_model(family, **changes), folder / "base" / name)
    words = ["the", "fox", "sat", "in", "grass", "and", "saw", "sun", "go", "down", "once", "small", "time"]
    lines = (" ".join(words[(i * 7 + j * 3) % len(words)] for j in range(20)) for i in range(40))
    (folder / "text.txt").write_text("\n".join(lines))
    section = engine.lever_config(3, False, False)
    section["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "zero3.json").write_text(json.dumps(section))
    return folder


def lock_config(place: Path, name: str, zero: int, **changes) -> configuration.LockConfig:
    """A lock of two steps of each kind."""
    family = shapes.FAMILIES[MODELS[name][0]]
    return configuration.LockConfig(
        model=str(place / "base" / name), data=str(place / "text.txt"), out=str(place / f"lock{zero}" / name),
        form="gated" if family.gated else "plain", depth=3, steps=3, heal_steps=2, lr=1e-3, zero=zero,
        deepspeed_config=str(place / "zero3.json") if zero == 3 else None, **RUN, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(place: Path, start_ranks) -> dict[str, dict]:
    """The records of all jobs: `lock3 NAME`, `lock0 NAME`, `attack NAME`."""
    jobs = {f"lock3 {name}": lock_config(place, name, 3) for name in MODELS}
    jobs |= {f"lock0 {n}": lock_config(place, n, 0, **({"layers": "0"} if n == "opt" else {})) for n in WHOLE}
    for name, (_, _, strategy) in MODELS.items():
        jobs[f"attack {name}"] = configuration.AttackConfig(
            model=str(place / "lock3" / name / "model"), data=str(place / "text.txt"), strategy=strategy,
            knobs=KNOBS.get(strategy, {}), steps=4, lr=1e-2,
            out=str(place / "attack" / name), zero=3, deepspeed_config=str(place / "zero3.json"),
            activation_checkpointing="none" if strategy == "full" else "layer", **RUN,
        )  # fmt: skip
    sent = [{"run": "job", "config": json.loads(configuration.to_json(config))} for config in jobs.values()]
    results = dict(zip(jobs, start_ranks(2, sent), strict=True))
    assert {k: v for k, v in results.items() if v != {"code": 0}} == {}
    return {k: list(record.read_lines(Path(c.out) / record.RECORDS_FILE))[-1] for k, c in jobs.items()}


def true_scales(folder: Path, text: Path) -> dict[int, float]:
    """b of each layer from the plain base model: g median(||x|| / ||MLP(x)||) over the calibration set."""
    model = models.load_model(folder)
    shape = shapes.model_shape(model.config.to_dict())
    norms: dict[int, dict[str, list]] = {i: {"x": [], "y": []} for i in range(shape.layers)}
    for layer, seen in norms.items():
        home = model.get_submodule(shape.family.home(layer))
        first, last = (home.fc1, home.fc2) if shape.family.inline else (home, home)
        first.register_forward_pre_hook(lambda m, args, s=seen: s["x"].append(args[0].norm(dim=-1).flatten()))
        last.register_forward_hook(lambda m, args, out, s=seen: s["y"].append(out.norm(dim=-1).flatten()))
    read = data.load(str(text), models.load_tokenizer(folder), seq_len=RUN["seq_len"])
    train, _ = data.split_heldout(read)
    with torch.no_grad():
        for batch in data.calibration(train):
            model(**batch)
    return {i: dlr.coupling_scale(0.25, torch.cat(s["x"]), torch.cat(s["y"])) for i, s in norms.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_lock_at_zero_3(name: str, runs: dict, place: Path) -> None:
    """It ends, its b is the plain base model's, its errors are finite, and the folder holds what was evaluated."""
    metrics = runs[f"lock3 {name}"]["metrics"]
    assert runs[f"lock3 {name}"]["outcome"] == "ok"
    manifest = json.loads((place / "lock3" / name / "model" / "lock.json").read_text())
    expected = true_scales(place / "base" / name, place / "text.txt")
    assert {int(k): v for k, v in manifest["b"].items()} == pytest.approx(expected, rel=2**-7)
    errors = [metrics[f"lock/error_layer_{i}"] for i in (0, 1)]
    assert all(0 < e < 0.5 for e in errors), errors  # a warm start is near; MLP weights left empty would be far
    assert abs(metrics["loss/heldout_locked"] - metrics["loss/heldout_base_model"]) < 0.5
    assert metrics["params/ratio"] == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("name", WHOLE)
def test_zero_0_and_zero_3_agree(name: str, runs: dict, place: Path) -> None:
    """Where weights are cut up, the same numbers come out."""
    cut, whole = runs[f"lock3 {name}"]["metrics"], runs[f"lock0 {name}"]["metrics"]
    assert whole["loss/heldout_base_model"] == pytest.approx(cut["loss/heldout_base_model"], rel=1e-5)
    if name != "opt":
        for key in ("lock/error_layer_0", "lock/error_layer_1", "loss/heldout_locked", "loss/heldout_flat"):
            assert whole[key] == pytest.approx(cut[key], rel=1e-3)


def test_a_layer_that_is_left_out_is_the_base_s(runs: dict, place: Path) -> None:
    """Errors for locked layers alone; the other layer's weights are bitwise the base's, fc1 and fc2 among them."""
    metrics = runs["lock0 opt"]["metrics"]
    assert [key for key in metrics if key.startswith("lock/error_layer_")] == ["lock/error_layer_0"]
    assert json.loads((place / "lock0" / "opt" / "model" / "lock.json").read_text())["layers"] == [0]
    base = models.load_model(place / "base" / "opt").state_dict()
    state = models.load_model(place / "lock0" / "opt" / "model").state_dict()
    kept = [key for key in base if not key.startswith(shapes.FAMILIES["opt"].state_prefixes(0))]
    assert {"model.decoder.layers.1.fc1.weight", "model.decoder.layers.1.fc2.weight"} <= set(kept)
    assert all(torch.equal(state[key], base[key]) for key in kept)


@pytest.mark.parametrize("name", MODELS)
def test_an_attack_at_zero_3(name: str, runs: dict, place: Path) -> None:
    """It starts from the lock's own loss, learns, and saves the bytes of the formula; a tied pair counts once."""
    strategy, entry = MODELS[name][2], runs[f"attack {name}"]
    metrics = entry["metrics"]
    assert (entry["outcome"], entry["side"]) == ("ok", "locked")
    assert metrics["loss/heldout_task"] < metrics["loss/heldout_task_start"]
    kind = "flat" if strategy == "flatten" else "locked"
    lock = runs[f"lock3 {name}"]["metrics"]
    assert metrics["loss/heldout_task_start"] == pytest.approx(lock[f"loss/heldout_{kind}"], rel=1e-4)
    if strategy == "full":
        assert metrics["memory/saved_mlp_bytes_per_token"] == metrics["memory/saved_mlp_bytes_per_token_formula"]
        model = models.load_model(place / "lock3" / name / "model")
        sizes = {p.data_ptr(): p.numel() for p in model.parameters()}
        assert metrics["params/total"] == sum(sizes.values())
    if strategy == "flatten":
        flat = models.load_model(place / "attack" / name / "transformed")
        assert type(flat) is type(models.load_model(place / "base" / name))
    assert all(math.isfinite(v) for v in metrics.values())
