"""Configurations for DeepSpeed: levers, files, batch sizes."""

import itertools
import json
from pathlib import Path

import pytest

from dlrscale import engine
from dlrscale.config import RunConfig
from dlrscale.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PLACES = {"model": "/m", "data": "/d", "out": "/o"}
FILES = {
    "zero0": (0, False, False),
    "zero1": (1, False, False),
    "zero2": (2, False, False),
    "zero3": (3, False, False),
    "zero1_offload": (1, True, False),
    "zero2_offload": (2, True, False),
    "zero3_offload_optimizer": (3, True, False),
    "zero3_offload": (3, True, True),
}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.parametrize("name", FILES)
def test_the_files_equal_what_the_levers_generate(name):
    file = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text(encoding="utf-8"))
    assert file == engine.lever_config(*FILES[name])


def test_no_other_files_stand_in_ds_configs():
    assert {p.stem for p in (ROOT / "ds_configs").glob("*.json")} == set(FILES)


@pytest.mark.parametrize("levers", list(FILES.values()))
def test_lever_config_says_what_the_levers_say(levers):
    found = engine.lever_config(*levers)
    zero, offload_optimizer, offload_param = levers
    section = found["zero_optimization"]
    assert section["stage"] == zero
    assert ("offload_optimizer" in section, "offload_param" in section) == (offload_optimizer, offload_param)
    assert any(k.startswith("stage3_") for k in section) == (zero == 3)
    assert found["optimizer"]["type"] == "AdamW"
    assert found["optimizer"]["params"].get("torch_adam", False) is not offload_optimizer
    assert "auto" not in json.dumps(found)
    read = engine.file_levers(found)
    assert read == {"zero": zero, "offload_optimizer": offload_optimizer, "offload_param": offload_param}


def test_merge_gives_fresh_objects():
    engine.merge(RunConfig(**PLACES))["optimizer"]["params"]["betas"].append(1)
    assert engine.merge(RunConfig(**PLACES))["optimizer"]["params"]["betas"] == [0.9, 0.999]


def test_file_levers():
    assert engine.file_levers({}) == {"zero": 0, "offload_optimizer": False, "offload_param": False}
    none = {"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}, "offload_optimizer": None}}
    assert engine.file_levers(none) == {"zero": 3, "offload_optimizer": False, "offload_param": False}
    nvme = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}
    assert engine.file_levers(nvme)["offload_param"] is True


def test_file_dtype():
    assert engine.file_dtype({}) is None
    assert engine.file_dtype({"bf16": {"enabled": False}}) is None
    assert engine.file_dtype({"bf16": {"enabled": True}, "fp16": {"enabled": False}}) == "bf16"
    assert engine.file_dtype({"fp16": {"enabled": True}}) == "fp16"
    with pytest.raises(ConfigError, match=r"bf16\.enabled, fp16\.enabled"):
        engine.file_dtype({"bf16": {"enabled": True}, "fp16": {"enabled": True}})


@pytest.mark.parametrize(
    ("given", "expected"),
    [((None, None), (4, 1)), ((2, None), (2, 1)), ((None, 3), (4, 3)), ((2, 3), (2, 3))],
)
def test_batch_from_the_command_line(given, expected):
    assert engine.resolve_batch({}, *given, 2) == expected


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_two_of_the_three_fix_the_third(ranks):
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for micro, accumulation in itertools.product((1, 2, 5), (1, 3)):
        whole = dict(zip(keys, (micro * accumulation * ranks, micro, accumulation), strict=True))
        for left_out in (
            None,
            "gradient_accumulation_steps",
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
        ):
            file = {k: v for k, v in whole.items() if k != left_out}
            assert engine.resolve_batch(file, None, None, ranks) == (micro, accumulation), (file, ranks)
        total = {"train_batch_size": whole["train_batch_size"]}
        assert engine.resolve_batch(total, micro, None, ranks) == (micro, accumulation)
        assert engine.resolve_batch(total, None, accumulation, ranks) == (micro, accumulation)
        assert engine.resolve_batch(total, micro, accumulation, ranks) == (micro, accumulation)
        assert engine.resolve_batch(total, None, None, ranks) == (micro * accumulation, 1)
        assert engine.resolve_batch(whole, micro, accumulation, ranks) == (micro, accumulation)


@pytest.mark.parametrize(
    ("file", "given", "parts"),
    [
        (
            {"train_micro_batch_size_per_gpu": 8},
            (4, None),
            ("--micro-batch 4", "train_micro_batch_size_per_gpu 8"),
        ),
        (
            {"gradient_accumulation_steps": 2},
            (None, 3),
            ("--accumulation 3", "gradient_accumulation_steps 2"),
        ),
        ({"train_batch_size": 7}, (None, None), ("train_batch_size 7", "2 ranks")),
        (
            {"train_batch_size": 24},
            (4, 2),
            ("train_batch_size 24", "micro-batch 4", "accumulation 2", "of 3 fits"),
        ),
        ({"train_batch_size": 2}, (4, None), ("train_batch_size 2",)),
        ({"train_batch_size": "many"}, (None, None), ("train_batch_size", "'many'", "leave it out")),
        ({"train_micro_batch_size_per_gpu": 0}, (None, None), ("train_micro_batch_size_per_gpu", "0")),
        ({"gradient_accumulation_steps": 1.5}, (None, None), ("gradient_accumulation_steps", "1.5")),
    ],
)
def test_batches_that_contradict_are_refused(file, given, parts):
    with pytest.raises(ConfigError) as error:
        engine.resolve_batch(file, *given, 2)
    assert len(error.value.faults) == 1
    assert all(part in str(error.value) for part in parts)


def test_merge_of_levers():
    config = RunConfig(**PLACES, zero=2, micro_batch=3, accumulation=2, num_ranks=2, lr=0.5)
    merged = engine.merge(config)
    assert merged["train_batch_size"] == 12
    assert (merged["train_micro_batch_size_per_gpu"], merged["gradient_accumulation_steps"]) == (3, 2)
    assert merged["optimizer"]["params"]["lr"] == 0.5
    assert merged["optimizer"]["params"]["torch_adam"] is True
    assert merged["zero_optimization"] == engine.lever_config(2, False, False)["zero_optimization"]
    assert merged["gradient_clipping"] == 1.0
    assert not merged.get("bf16", {}).get("enabled")
    assert "auto" not in json.dumps(merged)


def test_merge_sets_the_precision():
    for dtype in ("bf16", "fp16"):
        assert engine.merge(RunConfig(**PLACES, dtype=dtype))[dtype]["enabled"] is True


def test_merge_on_the_cpu_takes_torchs_optimizer_when_offloading():
    merged = engine.merge(RunConfig(**PLACES, zero=2, offload_optimizer=True))
    assert merged["zero_force_ds_cpu_optimizer"] is False
    assert merged["optimizer"]["params"]["torch_adam"] is True


def test_merge_with_an_accelerator_keeps_deepspeeds_cpu_adam_if_it_can_be_built(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    config = RunConfig(**PLACES, zero=2, offload_optimizer=True)
    monkeypatch.setattr(engine.optimizers, "compiler", lambda: "/usr/bin/g++")
    merged = engine.merge(config)
    assert "zero_force_ds_cpu_optimizer" not in merged
    assert "torch_adam" not in merged["optimizer"]["params"]
    monkeypatch.setattr(engine.optimizers, "compiler", lambda: None)
    assert engine.merge(config)["zero_force_ds_cpu_optimizer"] is False


def test_merge_of_a_users_file(tmp_path):
    own = {
        "optimizer": {"type": "AdamW", "params": {"lr": 9, "weight_decay": 0.3}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 7},
        "gradient_clipping": 0.25,
        "train_batch_size": 99,
        "wall_clock_breakdown": True,
        "steps_per_print": 5,
    }
    file = tmp_path / "own.json"
    file.write_text(json.dumps(own))
    merged = engine.merge(RunConfig(**PLACES, deepspeed_config=str(file), zero=1, micro_batch=2, lr=0.1))
    assert merged["zero_optimization"] == own["zero_optimization"]
    assert (merged["gradient_clipping"], merged["wall_clock_breakdown"], merged["steps_per_print"]) == (
        0.25,
        True,
        5,
    )
    assert merged["optimizer"]["params"]["weight_decay"] == 0.3
    assert merged["optimizer"]["params"]["lr"] == 0.1
    assert (merged["train_batch_size"], merged["train_micro_batch_size_per_gpu"]) == (2, 2)
    assert json.loads(file.read_text()) == own


def test_merge_fills_in_an_optimizer(tmp_path):
    file = tmp_path / "own.json"
    file.write_text("{}")
    assert engine.merge(RunConfig(**PLACES, deepspeed_config=str(file)))["optimizer"]["type"] == "AdamW"


def test_read_file_refuses(tmp_path):
    with pytest.raises(ConfigError, match=r"--deepspeed_config .*x\.json: no such file"):
        engine.read_file(str(tmp_path / "x.json"))
    (tmp_path / "x.json").write_text("{'a': 1}")
    with pytest.raises(ConfigError, match=r"--deepspeed_config .*x\.json: no JSON"):
        engine.read_file(str(tmp_path / "x.json"))
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ConfigError, match="one JSON object"):
        engine.read_file(str(tmp_path / "x.json"))


def test_auto_is_resolved_everywhere(tmp_path):
    file = tmp_path / "hf.json"
    file.write_text(
        json.dumps(
            {
                "bf16": {"enabled": "auto"},
                "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
                "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"},
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
            }
        )
    )
    assert engine.resolve_batch(engine.read_file(str(file)), 2, None, 2) == (2, 1)
    merged = engine.merge(RunConfig(**PLACES, zero=3, deepspeed_config=str(file), micro_batch=2, num_ranks=2, lr=0.5))
    assert "auto" not in json.dumps(merged)
    assert merged["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 500_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
    }
    assert merged["train_batch_size"] == 4
    assert merged["optimizer"]["params"]["lr"] == 0.5
    assert not merged["bf16"].get("enabled")
