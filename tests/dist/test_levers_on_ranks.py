"""The memory levers on 2 ranks: what is measured is what was planned, to the byte, at ZeRO 0, 2 and 3; best-memory too."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from commands import last

from dlrscale.cli import attack_configs
from dlrscale.config import MeasureConfig, to_json

pytestmark = pytest.mark.dist
STAGES, DTYPES = (0, 2, 3), ("fp32", "bf16")
STRATEGIES = ("ckpt-nested", "ckpt-offload", "act-offload", "act-int8", "tile-tokens", "reverse", "best-memory")
OPTIONS = {
    "model": "locked", "seq_len": 24, "micro_batch": 2, "num_ranks": 2, "steps": 3, "tracking_uri": "none",
    "checkpoint_every": 0, "inference_batches": [],
}  # fmt: skip
EXACT = ("saved_bytes", "saved_peak_bytes", "flops_forward", "flops_backward", "flops_recompute")


@pytest.fixture(scope="module")
def done(tmp_path_factory, make_llama, save_base, make_locked, start_ranks) -> Path:
    """All measurements in one start of two ranks; stage 3 comes last: its linear map stays in the process."""
    place, sent = tmp_path_factory.mktemp("levers"), []
    base = save_base(make_llama(intermediate_size=96), place / "base")
    make_locked(base, "model").rename(place / "locked")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("DS_ACCELERATOR", "cpu")
        for stage, strategy, dtype in itertools.product(STAGES, STRATEGIES, DTYPES):
            options = OPTIONS | {"zero": stage, "dtype": dtype, "out": f"{strategy}-z{stage}-{dtype}"}
            knobs = ("cap=2",) if strategy == "best-memory" else ()
            config = attack_configs(options, None, strategy, knobs, MeasureConfig)[0]
            sent.append({"run": "job", "config": json.loads(to_json(config))})
        results = start_ranks(2, sent)
    assert [r.get("code", r) for r in results] == [0] * len(sent)
    return place


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_measured_as_planned(done, strategy):
    for stage, dtype in itertools.product(STAGES, DTYPES):
        entry = last(done / f"{strategy}-z{stage}-{dtype}")
        errors = entry["plan"]["error_percent"]
        assert {name: errors[name] for name in EXACT if errors.get(name)} == {}, (stage, dtype)
        on_host = entry["config"]["axes"]["levers"]["activation_storage"] == "host"
        assert ("offloaded_activation_bytes" in errors) == on_host
        assert ("memory/offloaded_activation_bytes_per_token" in entry["metrics"]) == on_host
        if on_host:
            assert errors["offloaded_activation_bytes"] == 0


def test_best_memory_ran_its_winner(done):
    for stage, dtype in itertools.product(STAGES, DTYPES):
        entry = last(done / f"best-memory-z{stage}-{dtype}")
        best = entry["config"]["lever_search"]["best"][0]
        assert entry["strategy"] == "best-memory"
        axes = entry["config"]["axes"]
        assert (axes["gradient"], axes["levers"]["tiles"]) == (best["gradient"], best["tiles"])
        assert entry["plan"]["peak_bytes"] == best["peak_bytes"]
        measured = sum(entry["plan"]["measured"].get(f"flops_{name}", 0) for name in ("forward", "backward", "recompute"))
        reference = entry["config"]["lever_search"]["full_flops_per_micro_batch"]
        assert measured / reference == pytest.approx(best["flops_ratio"], abs=1e-4)
        assert measured / reference <= 2
