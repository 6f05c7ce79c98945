"""Runs that are hit: no process is left, nothing is half-written, and the same command ends as if nothing had been."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from commands import (
    LOCK,
    all_gone,
    check_end,
    check_nothing_is_half_written,
    dlrscale,
    hit,
    last,
    rows,
    rows_file,
    start,
    wait_for_rows,
)

pytestmark = pytest.mark.dist
LINE = ["lock", "--model", "base", "--data", "text.txt", *LOCK]
HITS = [
    ("command", signal.SIGKILL, 4, "the dlrscale command that started this rank has gone", -9),
    ("rank", signal.SIGKILL, 13, "a rank was ended from outside by SIGKILL", 4),
    ("runner", signal.SIGKILL, 22, "a rank was ended from outside by SIGKILL", 4),
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
        found.append({"mlflow": status, "gone": gone and len(processes) == 5, "code": code, "record": last(folder), "rows": rows(folder)})
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
    assert found["mlflow"] <= {"FAILED", "KILLED"}  # none is RUNNING without a process
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
