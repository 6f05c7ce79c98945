"""Memory that runs out is an outcome with its peak and its phase, on every rank, on one, or by the kernel's hand."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from commands import WORDS, dlrscale, environment, last

from dlrscale import launcher
from dlrscale.cli import attack_configs
from dlrscale.config import to_json

pytestmark = pytest.mark.dist
CGROUPS = Path("/sys/fs/cgroup")
OPTIONS = {"seq_len": 64, "steps": 2, "heldout_limit": 2, "tracking_uri": "none", "checkpoint_every": 0}


@pytest.fixture(scope="module")
def text(place: Path) -> Path:
    """Text that is enough for one huge batch."""
    file = place / "long.txt"
    file.write_text(" ".join(WORDS[(i * i) % len(WORDS)] for i in range(300_000)))
    return file


@pytest.mark.parametrize("limited", ["0,1", "1"], ids=["every rank", "one rank"])
def test_memory_that_runs_out_is_an_outcome(limited: str, place: Path, text: Path, monkeypatch) -> None:
    """The rank that ran out writes the record; all end at once, with the code of `oom`."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    out = f"oom-{limited}"
    options = OPTIONS | {"model": "base", "data": str(text), "micro_batch": 3500, "num_ranks": 2, "out": out}
    config = attack_configs(options, None, "full", ())[0]
    line = [
        str(Path(sys.executable).with_name("deepspeed")), "--no_local_rank", "--num_gpus", "2", "--master_addr",
        "127.0.0.1", "--master_port", str(launcher.free_port()), str(Path(__file__).with_name("limited.py")),
        to_json(config), limited, "1500",
    ]  # fmt: skip
    env = launcher.environment(2) | environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == launcher.EXIT_OOM, done.stdout[-2000:] + done.stderr[-2000:]
    entries = (place / out / "records.jsonl").read_text().splitlines()
    assert len(entries) == 1
    entry = json.loads(entries[0])
    assert entry["outcome"] == "oom"
    assert entry["error"].startswith("out of memory in the phase ")
    assert any(f"phase {phase}, rank {rank}: " in entry["error"] for phase in ("forward", "backward", "evaluate")
               for rank in limited.split(","))  # fmt: skip
    broken = entry["error"].split()[6].rstrip(",")
    assert entry["phases"][broken]["host_peak_rss_bytes"] > 100 * 2**20
    assert entry["metrics"]["memory/host_peak_rss_bytes"] >= entry["phases"][broken]["host_peak_rss_bytes"]


@contextlib.contextmanager
def memory_group(limit: int):
    """A control group of this host with a limit on memory; its folder, or a skip where none can be made."""
    first = CGROUPS / "memory" if (CGROUPS / "memory").is_dir() else CGROUPS
    group = first / f"dlrscale-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
        name = "memory.max" if first == CGROUPS else "memory.limit_in_bytes"
        (group / name).write_text(str(limit))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no control group for memory can be made here: {error}")
    try:
        yield group
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def test_a_rank_that_the_kernel_kills_is_out_of_memory(place: Path, text: Path) -> None:
    """The OOM killer's SIGKILL is told from any other: outcome `oom`, with the peak and the phase that were seen."""
    with memory_group(2600 * 2**20) as group:
        done = dlrscale(
            place, "attack", "--model", "base", "--strategy", "full", "--data", str(text), "--seq-len", "64",
            "--micro-batch", "4000", "--steps", "2", "--heldout-limit", "2", "--out", "killed-by-kernel",
            "--num-ranks", "1", "--tracking-uri", "none",
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    entry = last(place / "killed-by-kernel")
    assert entry["outcome"] == "oom"
    assert "the kernel killed a rank (rank 0 in " in entry["error"]
    assert entry["metrics"]["memory/host_peak_rss_bytes"] > 500 * 2**20
