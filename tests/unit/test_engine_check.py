"""The check of a user's DeepSpeed file: every fault with its path in one message, and no false alarm."""

import json
from pathlib import Path

import pytest

from dlrscale import engine
from dlrscale.config import RunConfig
from dlrscale.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PLACES = {"model": "/m", "data": "/d", "out": "/o"}
HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
             "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW",
                  "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupDecayLR",
                  "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto",
                             "total_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "overlap_comm": True,
        "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True},
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def write(tmp_path):
    """Write a DeepSpeed file; returns its path."""

    def write(content):
        file = tmp_path / "own.json"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(file)

    return write


def faults(path):
    with pytest.raises(ConfigError) as error:
        engine.read_file(path)
    return error.value.faults


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda f: f.stem)
def test_our_own_files_pass(file):
    engine.read_file(str(file))


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"wall_clock_breakdown": True, "memory_breakdown": True, "steps_per_print": 10, "dump_state": False},
        {"comms_logger": {"enabled": True, "prof_all": False, "prof_ops": ["all_reduce"], "verbose": False}},
        {"activation_checkpointing": {"partition_activations": True, "number_checkpoints": 4, "profile": False}},
        {"flops_profiler": {"enabled": True, "profile_step": 1, "module_depth": -1, "output_file": None}},
        {"csv_monitor": {"enabled": True, "output_path": "x"}, "wandb": {"enabled": False}, "tensorboard": {}},
        {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 5e8}},
        {"zero_optimization": {"stage": 3, "offload_param": None, "prefetch_bucket_size": 10}},
        {"optimizer": {"type": "SGD", "params": {"momentum": 0.9, "nesterov": True}}},
        {"optimizer": {"type": "adam", "params": {"adam_w_mode": False, "bias_correction": True, "torch_adam": True}}},
        {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-3}}},
        {"scheduler": {"type": "WarmupLR"}},
        {"hybrid_engine": {"enabled": False}, "timers": {"throughput": {"enabled": False}}},
        {"data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": "auto"}, "aio": {"block_size": 1048576}},
        {"checkpoint": {"tag_validation": "Warn"}, "communication_data_type": "fp32"},
        HUGGING_FACE,
    ],
)
def test_no_false_alarm(write, content):
    engine.read_file(write(content))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (
            {"zero_optimization": {"stge": 2, "offload_optimiser": {"device": "cpu"}}, "gradient_cliping": 1.0},
            ("zero_optimization.stge: no such key. Did you mean stage?",
             "zero_optimization.offload_optimiser: no such key. Did you mean offload_optimizer?",
             "gradient_cliping: no such key. Did you mean gradient_clipping?"),
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": 0, "allgather_bucket_size": -1,
                                   "stage3_prefetch_bucket_size": 15099494.4}},
            ("zero_optimization.reduce_bucket_size is 0", "zero_optimization.allgather_bucket_size is -1",
             "zero_optimization.stage3_prefetch_bucket_size is 15099494.4: must be a whole number"),
        ),
        ({"zero_optimization": {"stage": "2"}, "gradient_clipping": True},
         ('zero_optimization.stage is "2"', "gradient_clipping is true")),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "auto"}}, ("zero_optimization.overlap_comm", '"auto"')),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, ("cpu_offload", "offload_optimizer")),
        ({"zero_optimization": True}, ("zero_optimization is true",)),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu", "pin": 1}}},
         ("offload_optimizer.device", "offload_optimizer.pin")),
        ({"optimizer": {"params": {}}}, ("optimizer.type: missing",)),
        ({"optimizer": {"type": "Adma"}}, ("optimizer.type Adma", "Did you mean")),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "2e-5", "weigth_decay": 0, "betas": [1]}}},
         ('optimizer.params.lr is "2e-5"', "weigth_decay: no such key. Did you mean weight_decay?", "betas is [1]")),
        ({"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}}, ("optimizer.params.adam_w_mode false",)),
        ({"optimizer": {"type": "Adam", "params": {"bias_correction": False}}}, ("bias_correction false",)),
        ({"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}}, ("gradient_clipping",)),
        ({"optimizer": {"type": "Lion"}}, ("optimizer.type Lion", "needs an accelerator")),
        ({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "zero_optimization": {"stage": 1}},
         ("optimizer.type SGD", "zero_allow_untested_optimizer")),
        ({"scheduler": {"type": "CosineAnnealingLR"}}, ("scheduler.type CosineAnnealingLR",)),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 0, "warmup_type": "cube"}}},
         ("total_num_steps: missing", "warmup_num_steps is 0", 'warmup_type is "cube"')),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, ("bf16.enabled, fp16.enabled",)),
        ({"bfloat16": {"enabled": True}}, ("bfloat16", "bf16")),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, ("master_weights_and_grads: needs",)),
        ({"torch_autocast": {"enabled": True}}, ("torch_autocast.enabled", "--dtype")),
        ({"pipeline": {"stages": 2}, "elasticity": {"enabled": True}, "compression_training": {},
          "data_efficiency": {"enabled": True}, "curriculum_learning": {}, "checkpoint": {"load_universal": True}},
         ("pipeline:", "elasticity:", "compression_training:", "data_efficiency:", "curriculum_learning:",
          "checkpoint.load_universal")),
    ],
)  # fmt: skip
def test_all_faults_are_told_with_their_paths(write, content, parts):
    found = faults(write(content))
    for part in parts:
        assert any(part in fault for fault in found), found
    assert "own.json" in found[0]


@pytest.mark.parametrize(
    ("content", "place", "parts"),
    [
        ("", "line 1, column 1", ("empty",)),
        (b"\xef\xbb\xbf{}", "line 1, column 1", ("byte order mark",)),
        (b'{\n "a": "\xff"}', "line 2, column 8", ("UTF-8",)),
        ("[1]", "line 1, column 1", ("one JSON object",)),
        ('{\n  // fast\n  "steps_per_print": 1}', "line 2, column 3", ("no comments",)),
        ('{"bf16": {"enabled": true},\n "bf16": {}}', "line 2, column 2", ("bf16 stands there twice",)),
        ('{"zero_optimization": {"stage": 1,\n"stage": 2}}', "line 2, column 1", ("zero_optimization.stage stands",)),
        ('{"gradient_clipping": NaN}', "line 1, column 23", ("NaN",)),
        ("{'a': 1}", "line 1, column 2", ("no JSON",)),
    ],
)
def test_what_is_no_json_is_told_with_line_and_column(write, content, place, parts):
    (fault,) = faults(write(content))
    assert place in fault
    assert all(part in fault for part in parts)


def test_equal_keys_of_different_objects_are_no_duplicates(write):
    engine.read_file(write('{"bf16": {"enabled": false}, "fp16": {"enabled": false}, "log_level": "a\\"{:,NaN"}'))


def test_every_auto_is_resolved(write):
    config = RunConfig(
        **PLACES, zero=3, deepspeed_config=write(HUGGING_FACE), lr=0.5, steps=20, warmup_steps=4, dtype="bf16"
    )
    merged = engine.merge(config)
    assert "auto" not in json.dumps(merged)
    section = merged["zero_optimization"]
    for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "sub_group_size", "stage3_max_live_parameters"):
        assert type(section[key]) is int
        assert section[key] >= 1
    assert merged["scheduler"]["params"] == {
        "warmup_min_lr": 0.0, "warmup_max_lr": 0.5, "warmup_num_steps": 4, "total_num_steps": 20,
    }  # fmt: skip
    assert (merged["bf16"]["enabled"], merged["fp16"]["enabled"], merged["gradient_clipping"]) == (True, False, 1.0)
    assert merged["optimizer"]["params"]["betas"] == [0.9, 0.999]


def test_torchs_adam_keeps_mode_and_parameters(write):
    own = {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.1, "eps": 1e-6, "set_grad_none": True}}
    merged = engine.merge(RunConfig(**PLACES, zero=0, deepspeed_config=write({"optimizer": own}), lr=0.1))
    assert merged["optimizer"] == {
        "type": "Adam",
        "params": {"adam_w_mode": False, "weight_decay": 0.1, "eps": 1e-6, "lr": 0.1, "torch_adam": True},
    }


def test_a_schedule_and_rates_given_by_hand(write):
    fixed = {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_num_steps": 3}}}
    with pytest.raises(ConfigError) as error:
        engine.resolve_rates(fixed, 0.1, 4, 3e-3)
    assert len(error.value.faults) == 2
    assert all(part in str(error.value) for part in ("--lr 0.1", "--warmup-steps 4", "scheduler WarmupDecayLR"))
    assert engine.resolve_rates(fixed, None, None, 3e-3) == (3e-3, 10)
    assert engine.resolve_rates({}, None, None, 0.5) == (0.5, 10)
    assert engine.resolve_rates(HUGGING_FACE, 0.1, 4, 3e-3) == (0.1, 4)
    assert engine.resolve_rates({"scheduler": {"type": "WarmupLR", "params": {}}}, 0.1, None, 3e-3) == (0.1, 10)


def test_precision_of_file_and_command(monkeypatch):
    for file, given in (({"fp16": {"enabled": True}}, "bf16"), ({"bf16": {"enabled": False}}, "bf16")):
        with pytest.raises(ConfigError, match="differ"):
            engine.resolve_dtype(file, given)
    assert engine.resolve_dtype({"bf16": {"enabled": "auto"}}, "bf16") == "bf16"
    assert engine.resolve_dtype({}, None) == "fp32"
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert engine.resolve_dtype({}, None) == "bf16"
    assert engine.resolve_dtype({"bf16": {"enabled": False}}, None) == "fp32"


SCATTER = {"zero_optimization": {"stage": 2, "reduce_scatter": True}}
OFFLOAD = {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}


@pytest.mark.parametrize(
    ("content", "path"),
    [
        (SCATTER | {"prescale_gradients": True}, "prescale_gradients True: DeepSpeed cannot do it at stage 2"),
        (SCATTER | {"gradient_predivide_factor": 2.0}, "gradient_predivide_factor 2.0: DeepSpeed cannot do it"),
        ({"zero_optimization": {"stage": 1, "allgather_bucket_size": 5001}}, "zero_optimization.allgather_bucket_size"),
        ({"zero_optimization": OFFLOAD}, "zero_optimization.offload_optimizer.ratio: needs"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads: "),
        (
            {"optimizer": {"type": "Adam", "params": {"fp32_optimizer_states": False}}},
            "optimizer.params.fp32_optimizer",
        ),
        ({"comet": {"enabled": False, "api_key": "secret"}}, "comet.api_key"),
    ],
)
def test_what_would_be_an_assertion_in_every_rank_is_told_before(content, path, write):
    _, fault = faults(write(content))
    assert path in fault
    assert "secret" not in fault


def test_torchs_adamw_decays_no_more_than_deepspeeds(write):
    """Without a decay in the file DeepSpeed's own takes 0; torch's default is 0.01."""
    place = write({"optimizer": {"type": "AdamW"}})
    merged = engine.merge(RunConfig(**PLACES, deepspeed_config=place))
    assert merged["optimizer"]["params"]["weight_decay"] == 0.0
