"""What only an accelerator shows: allocator peaks, the bf16 default, saved bytes as on the CPU.

Skipped where there is none. Run with `pytest tests/gpu` on a machine with a GPU; nothing has run there yet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlrscale import record

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here"),
]


def dlrscale(folder: Path, *options: str) -> None:
    """Run the command in a folder, on the accelerator."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")}
    line = [sys.executable, "-c", "from dlrscale.cli import main; main()", *options, "--tracking-uri", "none"]
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def last(folder: Path) -> dict:
    """The newest record of a run."""
    return list(record.read_lines(folder / record.RECORDS_FILE))[-1]


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_llama, tokenizer) -> Path:
    """A tiny base model, a text, and a lock of it made on the accelerator at ZeRO-3 with offload."""
    folder = tmp_path_factory.mktemp("gpu")
    make_llama().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "text.txt").write_text("the cat sat on a mat and saw two dogs run far away from home\n" * 80)
    dlrscale(
        folder, "lock", "--model", "base", "--data", "text.txt", "--seq-len", "32", "--micro-batch", "4",
        "--depth", "4", "--steps", "4", "--heal-steps", "2", "--zero", "3", "--offload-optimizer", "--offload-param",
        "--num-ranks", "1", "--out", "lock",
    )  # fmt: skip
    return folder


def test_lock_runs_in_bf16_with_allocator_peaks(place: Path) -> None:
    """bf16 is the default there, and the record holds the allocator's peaks."""
    entry = last(place / "lock")
    assert entry["config"]["dtype"] == "bf16"
    assert entry["metrics"]["memory/accelerator_peak_allocated_bytes"] > 0
    assert json.loads((place / "lock" / "model" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("strategy", ["full", "full-offload", "ckpt-layer", "lora", "lora-attn", "flatten"])
def test_attack(strategy: str, place: Path) -> None:
    """Every strategy trains, and `full` saves the formula's bytes in the MLP parts."""
    dlrscale(
        place, "attack", "--model", "lock/model", "--base", "base", "--strategy", strategy, "--data", "text.txt",
        "--seq-len", "32", "--micro-batch", "4", "--steps", "6", "--num-ranks", "1", "--out", strategy,
    )  # fmt: skip
    for side in ("base", "locked"):
        metrics = last(place / strategy / side)["metrics"]
        assert metrics["memory/accelerator_peak_allocated_bytes"] > 0
        if strategy == "full":
            assert metrics["memory/saved_mlp_bytes_per_token"] == metrics["memory/saved_mlp_bytes_per_token_formula"]
