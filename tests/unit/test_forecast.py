"""The plan of a job: what stops before it starts, which lever would help, and what a record says of it."""

import dataclasses
import json

import pytest
from test_layout import locked_config

from dlrscale import engine
from dlrscale.config import AttackConfig
from dlrscale.errors import PlanError
from dlrscale.jobs import forecast
from dlrscale.planner import needs as need
from dlrscale.planner.locking import LockPlan
from dlrscale.planner.model import attacked
from dlrscale.shapes import model_shape

GIB = 2**30


@pytest.fixture
def attack(llama_folder):
    """An attack on a tiny Llama that nothing starts."""
    config = AttackConfig(
        model=str(llama_folder), data="/nowhere", out="/nowhere", strategy="full", seq_len=64, micro_batch=8, zero=2,
        num_ranks=2, name="trial",
    )  # fmt: skip
    return config, engine.merge(config)


def device(tmp_path, memory, host=512 * GIB):
    """A file with one device of some memory, and its options."""
    file = tmp_path / f"{memory}.json"
    entry = {"memory_bytes": max(memory, 2**28), "host_memory_bytes": host, "devices_per_node": 1}
    file.write_text(json.dumps({"own": entry}))
    return {"hardware": "own", "hardware_file": str(file)}


def small_buckets(plan):
    """The same plan without the buckets of half a billion elements that DeepSpeed's defaults take."""
    section = dict(plan.ds_config["zero_optimization"]) | {"reduce_bucket_size": 1000}
    return dataclasses.replace(plan, ds_config=dict(plan.ds_config) | {"zero_optimization": section})


def test_a_job_that_cannot_fit_is_refused_with_what_would(attack, tmp_path):
    config, merged = attack
    plan = forecast.forecast(config, merged)
    room = dataclasses.replace(config, **device(tmp_path, 4 * GIB))
    forecast.refuse(room, plan)  # 2 GB of bucket and little else
    tight = dataclasses.replace(config, **device(tmp_path, GIB))
    with pytest.raises(PlanError) as refusal:
        forecast.refuse(tight, plan)
    message = str(refusal.value)
    assert refusal.value.exit_code == 3
    assert "trial cannot fit: a device needs" in message
    assert "own has 1.00 GiB" in message
    assert "--force" in message
    forecast.refuse(dataclasses.replace(tight, force=True), plan)


def test_without_hardware_a_cpu_job_is_not_refused(attack):
    config, merged = attack
    assert forecast.hardware_of(config) is None
    forecast.refuse(config, forecast.forecast(config, merged))


def test_the_levers_that_are_named_make_it_fit(attack, tmp_path):
    config, merged = attack
    plan = small_buckets(forecast.forecast(config, merged))
    plan = dataclasses.replace(plan, micro_batch=4096)
    checkpointed = dataclasses.replace(plan, checkpointing="layer")
    assert checkpointed.needs.peak_bytes < plan.needs.peak_bytes
    halfway = (checkpointed.needs.peak_bytes + plan.needs.peak_bytes) // 2
    hardware = forecast.devices.find(
        **_find(device(tmp_path, int(halfway * (1 + need.FRAGMENTATION)) + need.CONTEXT_BYTES))
    )
    assert plan.needs.lacking(hardware)
    found = forecast.fitting_levers(config, plan, hardware)
    assert "--activation-checkpointing layer" in found
    smaller = int(next(words for words in found if "micro-batch" in words).split()[1])
    assert not plan.with_micro_batch(smaller).needs.lacking(hardware)
    assert plan.with_micro_batch(smaller + 1).needs.lacking(hardware)
    fixed = dataclasses.replace(config, strategy="ckpt-layer")
    assert "--activation-checkpointing layer" not in forecast.fitting_levers(fixed, plan, hardware)


def _find(options):
    return {"name": options["hardware"], "extra": options["hardware_file"]}


def test_a_lock_has_a_plan(lock_config, llama_folder):
    config = lock_config(model=str(llama_folder), depth=4)
    plan = forecast.forecast(config, engine.merge(config))
    assert isinstance(plan, LockPlan)
    assert set(plan.needs.phases) == {"distil", "heal", "step"}
    assert "predicted peak of a device" in forecast.said(plan, None)
    unhealed = dataclasses.replace(config, heal_steps=0)
    assert "heal" not in forecast.forecast(unhealed, engine.merge(unhealed)).needs.phases


def test_hosts_are_counted_in_the_hostfile(attack, tmp_path, monkeypatch):
    config, _ = attack
    assert forecast.hosts(config) == (1, 2)
    hosts = tmp_path / "hosts"
    hosts.write_text("# two\na slots=8\n\nb slots=2\n")
    assert forecast.hosts(dataclasses.replace(config, hostfile=str(hosts), num_ranks=10)) == (2, 8)
    for key, value in (("RANK", "0"), ("LOCAL_SIZE", "8")):  # a direct launch on two hosts
        monkeypatch.setenv(key, value)
    assert forecast.hosts(dataclasses.replace(config, num_ranks=16)) == (2, 8)


def test_measurement_beside_the_plan(attack):
    config, merged = attack
    plan = forecast.forecast(config, merged)
    kept = dataclasses.replace(plan.activations.run, batch=3, length=20, label_tokens=9)
    exact = type(plan.activations)(kept).held_bytes
    counted = {"batch": 3, "length": 20, "labels": 9, "masked": False, "saved_bytes": exact}
    held = {name: {"device": plan.states[name].device, "host": plan.states[name].host} for name in forecast.STATES}
    held["persistent"] = {"device": 1, "host": 0}  # not yet all there when it is measured
    found = forecast.measured(plan, counted, held, {"accelerator_peak_bytes": 2.0 * plan.needs.peak_bytes})
    assert found["error_percent"]["saved_bytes"] == 0
    assert found["error_percent"]["master_bytes"] == 0
    assert found["error_percent"]["accelerator_peak_bytes"] == pytest.approx(-50)
    assert not {"persistent_bytes", "offload_bytes"} & set(found["planned"])  # too early; nothing, planned and found
    wrong = forecast.measured(plan, counted | {"saved_bytes": exact + exact // 4}, None, {})
    assert wrong["error_percent"]["saved_bytes"] == pytest.approx(-20, abs=0.01)
    assert set(wrong["planned"]) == {"saved_bytes"}


def test_a_summary_is_plain_and_adds_up(attack):
    config, merged = attack
    found = forecast.summary(forecast.forecast(config, merged), None)
    assert json.loads(json.dumps(found)) == found
    assert sum(found["phases"][found["peak_phase"]].values()) == found["peak_bytes"]
    assert found["fits"] is None


def test_levers_inside_the_model_are_offered(attack, make_llama, tmp_path):
    """Those of DLR-Nets for locked models alone, none that is a strategy's own idea; what is named makes it fit."""
    config, merged = attack
    plan = small_buckets(forecast.forecast(config, merged))
    anywhere = ["--activation-checkpointing layer", "--tiles 8", "--activation-storage host"]
    if not plan.model.shape.ranks:
        assert [words for words, _ in forecast.inner_changes(config, plan)] == anywhere
    values = locked_config(make_llama().config.to_dict(), "gated", 16)
    model = attacked(values, model_shape(values), config.entry, {})
    plan = dataclasses.replace(plan, model=model, micro_batch=2048)
    changes = dict(forecast.inner_changes(config, plan))
    assert set(changes) == {*anywhere, "--activation-checkpointing nested", "--gradient reverse"}
    for words, change in changes.items():
        assert dataclasses.replace(plan, **change).needs.peak_bytes < plan.needs.peak_bytes, words
    least = min(changes, key=lambda words: dataclasses.replace(plan, **changes[words]).needs.peak_bytes)
    room = dataclasses.replace(plan, **changes[least]).needs.peak_bytes
    hardware = forecast.devices.find(
        **_find(device(tmp_path, int(room * (1 + need.FRAGMENTATION)) + need.CONTEXT_BYTES + 1))
    )
    assert any(least in words for words in forecast.fitting_levers(config, plan, hardware))
    tiled = dataclasses.replace(config, strategy="ckpt-nested", activation_checkpointing="nested")
    nested = dataclasses.replace(plan, checkpointing="nested")
    assert set(dict(forecast.inner_changes(tiled, nested))) == {"--tiles 8", "--activation-storage host"}
