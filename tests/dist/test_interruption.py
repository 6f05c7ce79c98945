"""Runs that are hit: no process is left, nothing is half-written, and the same command ends as if nothing had been.

Memory that runs out is an outcome with its peak and its phase, on every rank, on one, or by the kernel's hand. All
of this stands in one file, since one test asks the kernel how many processes it killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import uuid
from pathlib import Path

import pytest
from commands import (
    LOCK,
    WORDS,
    all_gone,
    check_end,
    check_nothing_is_half_written,
    dlrscale,
    environment,
    hit,
    last,
    process,
    rows,
    rows_file,
    start,
    wait_for_rows,
)

from dlrscale import launcher
from dlrscale.cli import attack_configs
from dlrscale.config import to_json

pytestmark = pytest.mark.dist
LINE = ["lock", "--model", "base", "--data", "text.txt", *LOCK]
HITS = [
    ("command", signal.SIGKILL, 4, "the dlrscale command that started this rank has gone", -9),
    ("rank", signal.SIGKILL, 13, "a rank was ended from outside by SIGKILL", 4),
    ("launcher", signal.SIGKILL, 22, "DeepSpeed's launcher was ended from outside by SIGKILL", 4),
    ("command", signal.SIGINT, 30, "interrupted by SIGINT", 130),
]


def runs_of(place: Path) -> list:
    """All runs of the folder's MLflow store."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/results/mlflow.db")
    return client.search_runs([e.experiment_id for e in client.search_experiments()])


def resume_id(folder: Path) -> str:
    """The resume_id of the run that owns a folder."""
    return json.loads((folder / "run.json").read_text())["resume_id"]


@pytest.fixture(scope="module")
def hits(place: Path) -> list[dict]:
    """One run that is hit again and again, each time further on; what was left after each hit."""
    found, folder = [], place / "hit"
    for target, number, after, *_ in HITS:
        before = rows_file(folder)
        command = start(place, *LINE, "--out", "hit")
        wait_for_rows(folder, command, after, before)
        processes = hit(command, target, number, pick=1)
        code = command.wait(30)
        gone = all_gone(processes, 30.0)
        check_nothing_is_half_written(folder)
        status = {run.info.status for run in runs_of(place) if run.data.tags["dlrscale.resume_id"] == resume_id(folder)}
        found.append({"mlflow": status, "gone": gone and len(processes) == 4, "code": code, "record": last(folder), "rows": rows(folder)})
        if number is signal.SIGKILL and target == "rank":
            shutil.copytree(folder, place / "hit-one-rank")
    return found


@pytest.mark.parametrize("index", range(len(HITS)), ids=[f"{hit[1].name}-{hit[0]}" for hit in HITS])
def test_nothing_is_left_but_a_record(index: int, hits: list[dict]) -> None:
    """Every process is gone, the record says `failed` and by what."""
    _, _, _, said, code = HITS[index]
    found = hits[index]
    assert found["gone"]
    assert found["code"] == code
    assert found["record"]["outcome"] == "failed"
    assert "RUNNING" not in found["mlflow"]  # no process is left
    assert found["mlflow"] & {"FAILED", "KILLED"}
    assert said in found["record"]["error"]


def test_the_same_command_ends_as_if_nothing_had_been(hits: list[dict], locked: Path, place: Path) -> None:
    """After all that: the rows and the weights of the run without interruption, bitwise."""
    check_end(start(place, *LINE, "--out", "hit"), place / "hit", locked)
    assert last(place / "hit")["outcome"] == "ok"
    assert last(place / "hit")["config"]["resumed"]["step"] >= 28


def test_one_rank_goes_on_from_two(hits: list[dict], locked: Path, place: Path) -> None:
    """The checkpoint of two ranks is converted for one: the same batches, losses within 1e-5."""
    options = list(LINE)
    options[options.index("--num-ranks") + 1] = "1"
    options[options.index("--micro-batch") + 1] = "4"
    done = dlrscale(place, *options, "--out", "hit-one-rank")
    assert done.returncode == 0, done.stderr
    assert re.search(r"went on from step (12|16|20|24), written by 2 ranks at ZeRO stage 2", done.stdout)
    whole, found = rows(locked), rows(place / "hit-one-rank")
    assert [row["tokens"] for row in found] == [row["tokens"] for row in whole]
    assert [row["loss/train"] for row in found] == pytest.approx([row["loss/train"] for row in whole], rel=1e-5)
    assert [row["optim/lr"] for row in found] == [row["optim/lr"] for row in whole]


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
    line = launcher.on_this_host(2, Path(__file__).with_name("limited.py"), to_json(config), limited, "1500")
    env = launcher.environment(2) | environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == launcher.EXIT_OOM, done.stdout[-2000:] + done.stderr[-2000:]
    entries = (place / out / "records.jsonl").read_text().splitlines()
    assert len(entries) == 1
    entry = json.loads(entries[0])
    assert entry["outcome"] == "oom"
    assert entry["error"].startswith("out of memory in the phase ")
    assert any(f"phase {phase}, rank {rank}: " in entry["error"] for phase in ("check", "forward", "backward", "evaluate")
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
    with memory_group(2100 * 2**20) as group:
        done = process(
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
