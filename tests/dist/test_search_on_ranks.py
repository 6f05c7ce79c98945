"""A real search on a tiny model and its lock: equal trials, one pruned by construction, seeds, target, gates, MLflow."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
from commands import dlrscale, last, rows

from dlrscale import launcher, record, report
from dlrscale.search import space
from dlrscale.search.sampler import Sampler

pytestmark = pytest.mark.dist
HELDOUT = "loss/heldout_task"
STEPS, TRIALS, LR, RANGE = 10, 3, 2e-2, (1e-12, 3e-2)
OPTIONS = ["--data", "task.jsonl", "--heldout", "task.jsonl", "--heldout-limit", "8", "--seq-len", "32",
           "--micro-batch", "4", "--steps", str(STEPS), "--warmup-steps", "1", "--lr", str(LR), "--zero", "2",
           "--num-ranks", "2"]  # fmt: skip
RATES = ["--trials", str(TRIALS), "--lr-range", f"{RANGE[0]},{RANGE[1]}", "--seeds", "0", "--target", "base+0.02"]


def hopeless_seed() -> int:
    """A seed with which the second and third trials, both random, have rates that train nothing."""
    ranges = (space.Range("lr", *RANGE, log=True), space.Range("warmup_share", 0.0, space.WARMUP_SHARE),
              space.Range("batch", choices=(0.5, 1.0, 2.0)))  # fmt: skip
    for seed in range(100):
        sampler, rates = Sampler(ranges, seed, TRIALS, {"lr": LR, "warmup_share": 0.1, "batch": 1.0}), []
        for _ in range(TRIALS):
            rates.append(sampler.ask()["lr"])
            sampler.tell([], 1.0)
        if max(rates[1:]) < 1e-7:
            return seed
    raise AssertionError("no such seed")


@pytest.fixture(scope="module")
def searched(locked: Path, place: Path, on_forked_ranks) -> Path:
    """The search on both sides, by one command."""
    line = ["attack", "--model", "whole/model", "--base", "base", "--strategy", "ckpt-layer", *OPTIONS, *RATES,
            "--seed", str(hopeless_seed()), "--out", "searched", "--tracking-uri", f"sqlite:///{place}/search.db"]  # fmt: skip
    with mock.patch.object(launcher, "run", on_forked_ranks):
        done = dlrscale(place, *line)
    assert done.returncode == 0, done.stderr
    assert "To the target" in done.stdout
    assert "Gates" in done.stdout
    again = dlrscale(place, *line)
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout[done.stdout.index("Lock ") :]  # nothing ran again: all was found in records
    return place / "searched"


def test_both_sides_have_the_same_trials_and_one_is_pruned(searched: Path) -> None:
    sides = {side: json.loads((searched / side / "search.json").read_text()) for side in ("base", "locked")}
    assert sides["base"]["id"] == sides["locked"]["id"]
    for side, found in sides.items():
        assert [row["params"]["lr"] for row in found["trials"]] == [
            row["params"]["lr"] for row in sides["base"]["trials"]
        ]
        assert found["chosen"]["number"] == 0
        assert found["chosen"]["params"]["lr"] == LR
        assert [row["pruned_at"] is not None for row in found["trials"]] == [False, False, True], found["trials"]
        assert found["best_so_far"] == [found["chosen"]["loss"]] * TRIALS
        for row in found["trials"]:
            folder = searched / side / "trials" / f"{row['number']:03d}"
            entry, steps = last(folder), rows(folder)
            assert entry["id"] == row["record"]
            assert len(steps) == (row["pruned_at"] or entry["config"]["steps"])
            assert entry["metrics"]["cost/tokens"] == steps[-1]["tokens"] == row["tokens"]
            assert not (folder / "checkpoints").exists()
        assert found["spent"]["tokens"] == sum(row["tokens"] for row in found["trials"])


def test_a_pruned_trial_was_above_the_median_of_the_others(searched: Path) -> None:
    for side in ("base", "locked"):
        losses = [
            [row[HELDOUT] for row in rows(searched / side / "trials" / f"00{n}") if HELDOUT in row] for n in range(3)
        ]
        stopped = len(losses[2]) - 1
        assert 1 <= stopped < 4
        assert min(losses[2]) > (losses[0][stopped] + losses[1][stopped]) / 2
        assert last(searched / side / "trials" / "002")["metrics"][HELDOUT] == losses[2][-1]


def test_the_repeat_has_its_target_and_its_gates(searched: Path) -> None:
    assert [p.name for p in sorted((searched / "locked").glob("seed-*"))] == ["seed-0"]
    base, locked = (last(searched / side / "seed-0") for side in ("base", "locked"))
    best = min(row[HELDOUT] for row in rows(searched / "base" / "seed-0") if HELDOUT in row)
    target = locked["metrics"]["target/loss"]
    assert target == base["metrics"]["target/loss"] == min(best, base["metrics"][HELDOUT]) + 0.02
    assert base["metrics"]["target/reached"] == 1
    assert locked["config"]["heldout_part"] == "report"
    assert locked["seed"] == 0
    for side, entry in (("base", base), ("locked", locked)):
        steps = rows(searched / side / "seed-0")
        hit = next((row for row in steps if row.get(HELDOUT, 99) <= target), steps[-1])
        if entry["metrics"][f"{HELDOUT}_start"] > target:
            assert entry["metrics"]["target/tokens"] == hit["tokens"]
        flops = entry["plan"]["flops_per_micro_batch"]
        per_token = sum(flops.values()) / (entry["config"]["micro_batch"] * entry["config"]["seq_len"])
        done = sum(row["processed_tokens"] for row in steps)
        assert entry["metrics"]["cost/flops"] == pytest.approx(per_token * done)
    assert locked["gates"]["base_reaches"]["holds"] is True
    assert locked["gates"]["equal_search"] == {"holds": True, "trials": TRIALS, "base_trials": TRIALS}
    assert base["gates"]["equal_search"]["holds"] is None


def test_the_halves_are_what_was_evaluated(searched: Path) -> None:
    """The same weights, those of the start, have another loss on each half, and the trials all the same one."""
    for side in ("base", "locked"):
        starts = [last(searched / side / "trials" / f"00{n}")["metrics"][f"{HELDOUT}_start"] for n in range(3)]
        assert starts == [pytest.approx(starts[0], rel=1e-6)] * 3
        assert last(searched / side / "seed-0")["metrics"][f"{HELDOUT}_start"] != pytest.approx(starts[0], rel=1e-6)


def test_the_report_has_no_row_for_a_trial(searched: Path, tmp_path: Path) -> None:
    markdown, *_ = report.build([searched], tmp_path)
    text = markdown.read_text()
    everything = text[text.index("## All runs") :]
    assert "trial-0" not in everything
    assert everything.count("seed-0") >= 2
    assert f"ckpt-layer, {TRIALS} trials" in text
    searches = text[text.index("**Searches**") :]
    assert [line.split("|")[2].strip() for line in searches.splitlines()[4:6]] == ["base", "locked"]
    assert "8 ok (6 of them trials of searches)" in text
    assert "seeds: 1 of 3" in text[text.index("**Gates**") :]


def test_trials_are_children_of_their_search(searched: Path, place: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/search.db")
    experiment = client.get_experiment_by_name("dlrscale").experiment_id
    found = {run.info.run_id: run for run in client.search_runs([experiment], max_results=100)}
    kinds = {id_: run.data.tags.get("dlrscale.kind") for id_, run in found.items()}
    parents = {id_: run.data.tags.get("mlflow.parentRunId") for id_, run in found.items()}
    searches = [id_ for id_, kind in kinds.items() if kind == "search"]
    assert len(searches) == 2
    for id_ in searches:
        children = [found[child].info.run_name for child, parent in parents.items() if parent == id_]
        assert sorted(name[-9:] for name in children) == ["trial-000", "trial-001", "trial-002"]
        assert kinds[parents[id_]] == "lock"
    repeats = [id_ for id_, run in found.items() if run.info.run_name.endswith("seed-0")]
    assert [kinds[parents[id_]] for id_ in repeats] == ["lock", "lock"]
    (base,) = (found[id_] for id_ in repeats if found[id_].data.tags["dlrscale.side"] == "base")
    assert "target/loss" in base.data.metrics  # appended to its record when the base side had ended


def test_a_trial_is_told_by_its_record(searched: Path) -> None:
    records = [entry for _, entry in record.find_records([searched])]
    trials = [entry for entry in records if entry["config"]["heldout_part"] == "tune"]
    assert len(trials) == 2 * TRIALS
    assert {entry["config"]["trial"] for entry in trials} == set(range(TRIALS))
    assert {entry["config"]["search"] for entry in records} == {trials[0]["config"]["search"]}
