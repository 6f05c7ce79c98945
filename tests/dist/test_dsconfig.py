"""DeepSpeed files of users in whole jobs: rates by the file's formula, what the record says is in use, resume."""

import dataclasses
import itertools
import json
import math

import pytest

from dlrscale import record
from dlrscale.config import AttackConfig

pytestmark = pytest.mark.dist
STEPS, LR = 4, 2e-3
WARMUP_DECAY = {
    "type": "WarmupDecayLR",
    "params": {"total_num_steps": STEPS, "warmup_num_steps": 2, "warmup_max_lr": LR, "warmup_type": "linear"},
}


def zero(stage, offload=False):
    section = {"stage": stage}
    if stage == 3:
        section["stage3_param_persistence_threshold"] = 0
    return section | ({"offload_optimizer": {"device": "cpu", "pin_memory": False}} if offload else {})


def case(folder, place, name, file, **changes):
    """A whole attack with a DeepSpeed file."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(file))
    values = {
        "model": str(place / "base"), "data": str(place / "text.txt"), "out": str(folder / name), "seq_len": 16,
        "micro_batch": 1, "steps": STEPS, "warmup_steps": 2, "lr": LR, "strategy": "full", "tracking_uri": "none",
        "activation_checkpointing": "none", "checkpoint_every": 0, "heldout_limit": 2, "deepspeed_config": str(path),
        "zero": file["zero_optimization"]["stage"],
        "offload_optimizer": "offload_optimizer" in file["zero_optimization"], "num_ranks": 1,
    }  # fmt: skip
    return {"run": "job", "config": dataclasses.asdict(AttackConfig(**(values | changes)))}


def rates(folder, name):
    return [row["optim/lr"] for row in record.read_lines(folder / name / record.STEPS_FILE)]


def entry(folder, name):
    return list(record.read_lines(folder / name / record.RECORDS_FILE))[-1]


def own_formula(steps):
    return [LR * s / 2 if s <= 2 else LR * 0.5 * (1 + math.cos(math.pi * (s - 2) / (steps - 2))) for s in range(1, steps + 1)]


# DeepSpeed steps its schedule after each update: step 1 has the least rate, step s the factor of iteration s - 2.
FILE_RATES = [0.0, 0.0, LR / 2, LR]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, place, start_ranks):
    folder = tmp_path_factory.mktemp("dsconfig1")
    adamw = {"type": "AdamW", "params": {"weight_decay": 0.1}}
    cases = []
    for stage in range(4):
        cases.append(case(folder, place, f"own{stage}", {"optimizer": adamw, "zero_optimization": zero(stage)}))
    optimizers = {
        "adamw": {"optimizer": adamw},
        "adam": {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False, "bias_correction": True}}},
        "sgd": {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}, "zero_allow_untested_optimizer": True},
        "none": {},
    }
    for (name, file), dtype, offload in itertools.product(optimizers.items(), ("fp32", "bf16"), (False, True)):
        own = file | {"zero_optimization": zero(2, offload), dtype: {"enabled": True}} if dtype == "bf16" else file | {
            "zero_optimization": zero(2, offload)
        }
        cases.append(case(folder, place, f"{name}-{dtype}-{offload}", own, dtype=dtype, steps=2, warmup_steps=1))
    rare = {
        "optimizer": adamw, "scheduler": WARMUP_DECAY, "zero_optimization": zero(2), "wall_clock_breakdown": True,
        "comms_logger": {"enabled": True}, "activation_checkpointing": {"number_checkpoints": 2},
        "flops_profiler": {"enabled": True, "profile_step": 2, "output_file": str(folder / "flops.txt")},
    }  # fmt: skip
    cases.append(case(folder, place, "rare", rare))
    resumes = []
    for stage in (0, 2, 3):
        path = folder / f"resume{stage}.json"
        path.write_text(json.dumps({"optimizer": adamw, "scheduler": WARMUP_DECAY, "zero_optimization": zero(stage)}))
        own = {"deepspeed_config": str(path)}
        resumes.append({"run": "checkpoint", "ranks": 1, "zero": stage, "folder": f"{folder}/c{stage}", "config": own})
    done = start_ranks(1, cases + resumes)
    for case_, resumed in zip(resumes, done[len(cases) :], strict=True):  # by the file's schedule
        assert resumed["resumed"] == resumed["whole"], case_
    done = done[: len(cases)]
    assert [(c["config"]["name"], r) for c, r in zip(cases, done, strict=True) if r != {"code": 0}] == []
    return folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, place, start_ranks):
    folder = tmp_path_factory.mktemp("dsconfig2")
    adamw = {"type": "AdamW", "params": {"weight_decay": 0.1}}
    cases = []
    for stage in range(4):
        file = {"optimizer": adamw, "zero_optimization": zero(stage, offload=stage == 2)}
        cases.append(case(folder, place, f"own{stage}", file, num_ranks=2, accumulation=2))
    for stage, strategy in itertools.product((2, 3), ("full", "lora", "lora-attn")):
        file = {"optimizer": adamw, "scheduler": WARMUP_DECAY, "zero_optimization": zero(stage)}
        knobs = {"rank": 2, "alpha": 4, "dropout": 0.0} if strategy != "full" else {}
        cases.append(
            case(folder, place, f"{strategy}{stage}", file, num_ranks=2, accumulation=2, strategy=strategy, knobs=knobs)
        )
    done = start_ranks(2, cases)
    assert [(c["config"]["out"], r) for c, r in zip(cases, done, strict=True) if r != {"code": 0}] == []
    return folder


@pytest.mark.parametrize("stage", range(4))
def test_the_rate_is_the_formula_of_each_step_whatever_the_layout(one_rank, two_ranks, stage):
    assert rates(one_rank, f"own{stage}") == pytest.approx(own_formula(STEPS), abs=1e-12)
    assert rates(two_ranks, f"own{stage}") == rates(one_rank, f"own{stage}")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("strategy", ["full", "lora", "lora-attn"])
def test_a_files_schedule_applies_once_and_the_groups_are_told(two_ranks, strategy, stage):
    assert rates(two_ranks, f"{strategy}{stage}") == pytest.approx(FILE_RATES, abs=1e-12)
    groups = entry(two_ranks, f"{strategy}{stage}")["config"]["optimizer_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "cls"), [("adamw", "AdamW"), ("adam", "Adam"), ("sgd", "SGD"), ("none", "AdamW")])
def test_the_record_tells_what_is_in_use(one_rank, name, cls, dtype, offload):
    told = entry(one_rank, f"{name}-{dtype}-{offload}")["config"]
    assert told["optimizer_class"].rpartition(".")[2] == cls
    assert told["parameter_dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    assert told["master_dtype"] == "float32"
    trained = entry(one_rank, f"{name}-{dtype}-{offload}")["metrics"]["params/trainable"]
    if offload:
        copies = 2 if cls == "SGD" else 3  # masters and the moments
        assert told["offloaded_optimizer_bytes"] == pytest.approx(4 * copies * trained, rel=0.01)
    else:
        assert told["offloaded_optimizer_bytes"] == 0


def test_rare_sections_do_not_disturb(one_rank):
    assert rates(one_rank, "rare") == pytest.approx(FILE_RATES, abs=1e-12)
