"""Configurations: all faults at once, a line of JSON, and what identifies a run."""

import dataclasses
import json

import pytest

from dlrscale import config as configuration
from dlrscale import record
from dlrscale.config import AttackConfig, LockConfig, PretrainConfig, RunConfig
from dlrscale.errors import ConfigError

PLACES = {"model": "/m", "data": "/d", "out": "/o"}
HOSTILE = 'o u\'t "x" $HOME;{"a":1}\n\\ äö\u2028'


@pytest.mark.parametrize(
    "config",
    [
        LockConfig(**PLACES, document_separator=HOSTILE, rank=3, layers="0-1", harden=False),
        AttackConfig(**PLACES, knobs={"rank": 4, "dropout": 0.5}, columns={"prompt": HOSTILE, "completion": "c"}),
        PretrainConfig(data=HOSTILE, out="/o"),
    ],
)
def test_json_round_trip(config):
    line = configuration.to_json(config)
    assert "\n" not in line
    again = configuration.from_json(line)
    assert again == config
    assert type(again) is type(config)


def test_a_sound_configuration_has_no_faults():
    for kind in (RunConfig, LockConfig, AttackConfig):
        configuration.check(kind(**PLACES))


def test_all_faults_are_told_at_once():
    config = LockConfig(
        **PLACES, seq_len=1, micro_batch=0, steps=0, lr=float("nan"), dtype="int8", zero=1,
        offload_param=True, form="wide", coupling=-1, heal_steps=-1, rank=0, keep_checkpoints=0,
    )  # fmt: skip
    with pytest.raises(ConfigError) as error:
        configuration.check(config)
    parts = (
        "--seq-len 1", "--micro-batch 0", "--steps 0", "--lr nan", "--dtype int8", "--offload-param",
        "--form wide", "--coupling -1", "--heal-steps -1", "--rank 0", "--keep-checkpoints 0",
    )  # fmt: skip
    assert len(error.value.faults) == len(parts)
    for part in parts:
        assert sum(part in fault for fault in error.value.faults) == 1, part


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"lr": float("inf")}, "--lr inf"),
        ({"warmup_steps": -1}, "--warmup-steps -1"),
        ({"num_ranks": 0}, "--num-ranks 0"),
        ({"offload_optimizer": True, "zero": 0}, "--offload-optimizer"),
        ({"dtype": "fp16"}, "--dtype fp16"),
        ({"harden_weight": float("inf")}, "--harden-weight inf"),
        ({"heal_lr": float("nan")}, "--heal-lr nan"),
        ({"depth": 0, "rank": 4}, "--depth 0"),
        ({"depth": -2}, "--depth -2"),
    ],
)
def test_one_fault(changes, part):
    faults = LockConfig(**(PLACES | changes)).faults()
    assert len(faults) == 1
    assert part in faults[0]


def test_heal_hardens_with_a_tenth():
    assert LockConfig(**PLACES).heal_harden_weight == pytest.approx(0.003)
    assert LockConfig(**PLACES, harden_weight=0.2).heal_harden_weight == pytest.approx(0.02)


def test_defaults_of_the_design():
    config = LockConfig(**PLACES)
    assert (config.form, config.depth, config.start, config.coupling) == ("gated", 32, "warm", 0.25)
    assert (config.harden, config.harden_weight, config.harden_target) == (True, 0.03, 1.0)


def test_global_batch():
    assert RunConfig(**PLACES, micro_batch=3, accumulation=2, num_ranks=5).global_batch == 30


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A model folder and a data file at a place of one's choice, always with the same bytes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(name, text="text", weights="w"):
        folder = tmp_path / name
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").write_text("{}")
        (folder / "model" / "model.safetensors").write_text(weights)
        (folder / "data.txt").write_text(text)
        return {"model": str(folder / "model"), "data": str(folder / "data.txt"), "out": str(folder / "out")}

    return make


def ids(config, ds=None):
    return configuration.run_ids(config, {"a": 1} if ds is None else ds)


def test_ids_follow_bytes_not_paths(place):
    first = ids(LockConfig(**place("one")))
    assert ids(LockConfig(**place("two"))) == first
    assert ids(LockConfig(**place("text", text="other")))[1] != first[1]
    assert ids(LockConfig(**place("weights", weights="v")))[1] != first[1]


def test_identify_holds_no_path(place, tmp_path):
    places = place("one")
    for kind in (LockConfig, AttackConfig):
        values = configuration.identify(kind(**places, heldout=places["data"], name="n"), {"a": 1})
        left = {k: v for k, v in values.items() if k != "out"}
        assert str(tmp_path) not in json.dumps(left)


@pytest.mark.parametrize(
    ("changes", "same_id", "same_resume_id"),
    [
        ({"out": "/elsewhere", "name": "x", "tracking_uri": "none"}, True, True),
        ({"command": "dlrscale lock --again", "checkpoint_every": 7, "keep_checkpoints": 9}, True, True),
        ({"zero": 3, "offload_optimizer": True, "offload_param": True}, False, True),
        ({"num_ranks": 2, "micro_batch": 2}, False, True),
        ({"accumulation": 2, "micro_batch": 2}, False, True),
        ({"micro_batch": 2}, False, False),
        ({"seed": 1}, False, False),
        ({"depth": 8}, False, False),
        ({"document_separator": "x"}, False, False),
        ({"dtype": "bf16"}, False, False),
        ({"harden": False}, False, False),
    ],
)
def test_ids_follow_settings(place, changes, same_id, same_resume_id):
    places = place("one")
    before, after = ids(LockConfig(**places)), ids(LockConfig(**(places | changes)))
    assert (before[0] == after[0], before[1] == after[1]) == (same_id, same_resume_id)


def test_both_ids_follow_the_optimizer_of_a_deepspeed_file(place):
    """The stage may change between a run and its continuation, the optimizer may not."""
    config = LockConfig(**place("one"), deepspeed_config="/x.json")
    plain = {
        "optimizer": {"type": "AdamW", "params": {"weight_decay": 0.0}},
        "zero_optimization": {"stage": 2},
    }
    stage = plain | {"zero_optimization": {"stage": 3}}
    decay = plain | {"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}}}
    clipped = plain | {"gradient_clipping": 0.1}
    first = ids(config, plain)
    assert ids(config, stage)[0] != first[0]
    assert ids(config, stage)[1] == first[1]
    assert ids(config, decay)[0] != first[0]
    assert ids(config, decay)[1] != first[1]
    assert ids(config, clipped)[1] != first[1]


def test_the_resolved_axes_identify_an_attack_not_the_name(place):
    places = place("one")
    stock = AttackConfig(**places, strategy="ckpt-layer", activation_checkpointing="layer")
    by_hand = AttackConfig(**places, strategy="full", activation_checkpointing="layer")
    full = AttackConfig(**places, strategy="full", activation_checkpointing="none")
    assert ids(stock) == ids(by_hand)
    assert ids(stock)[1] != ids(full)[1]
    lora = AttackConfig(**places, strategy="lora", knobs={"rank": 4}, activation_checkpointing="layer")
    assert ids(lora)[1] != ids(dataclasses.replace(lora, knobs={"rank": 8}))[1]
    assert ids(lora)[1] != ids(dataclasses.replace(lora, strategy="lora-attn"))[1]


def test_embedded_corpora_count_by_name_and_interpreter():
    import platform

    assert configuration.digest("embedded:topics") == f"embedded:topics of Python {platform.python_version()}"


def test_claim_folder(tmp_path):
    out = tmp_path / "new" / "run"
    configuration.claim_folder(out, "1" * 64, "a" * 64)
    configuration.claim_folder(out, "2" * 64, "a" * 64)  # not ended: goes on at another layout
    with pytest.raises(ConfigError) as error:
        configuration.claim_folder(out, "1" * 64, "b" * 64)
    assert all(part in str(error.value) for part in (str(out), "aaaaaaaa", "bbbbbbbb", "--out"))


def test_a_finished_run_is_not_overwritten_by_another_layout(tmp_path):
    configuration.claim_folder(tmp_path / "run", "1" * 64, "a" * 64)
    record.append_line(tmp_path / "run" / "records.jsonl", record.make_record(id="1" * 64, outcome="failed"))
    assert configuration.check_folder(tmp_path / "run", "2" * 64, "a" * 64) is None
    entry = record.make_record(id="1" * 64, outcome="ok")
    record.append_line(tmp_path / "run" / "records.jsonl", entry)
    assert configuration.check_folder(tmp_path / "run", "1" * 64, "a" * 64) == entry
    with pytest.raises(ConfigError, match="another ZeRO stage"):
        configuration.claim_folder(tmp_path / "run", "2" * 64, "a" * 64)


def test_claim_folder_refuses_what_is_not_ours(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is no folder of a run"):
        configuration.claim_folder(tmp_path, "1" * 64, "a" * 64)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="is no folder of a run"):
        configuration.claim_folder(tmp_path / "thesis.tex", "1" * 64, "a" * 64)
