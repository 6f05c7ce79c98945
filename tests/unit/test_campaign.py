"""The tool of the tuned catalogue: what it runs, and what it copies of the runs."""

import json
from pathlib import Path

import pytest
from report_records import LOCK_ID, attack, lock_record

from dlrscale import catalogue, record


@pytest.fixture
def campaign(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "matrix"))
    import campaign

    return campaign


def test_every_strategy_has_a_row(campaign):
    rows = {label: (strategy, knobs, axes) for label, strategy, knobs, axes in campaign.rows()}
    assert {strategy for strategy, *_ in rows.values()} == set(catalogue.STRATEGIES)
    assert rows["best-memory-1.33"] == ("best-memory", ("cap=1.33",), {})
    assert rows["flatten-lomo"] == ("flatten", (), {"gradient": "lomo"})


def test_a_command_names_its_places_by_two_parts(campaign):
    options = {"model": "/a/b/lock-0/model", "target": "base+0.2", "gradient": None, "tracking_uri": "none"}
    line = campaign.shown("undistil", "/x/models/base", ("regress_steps=40",), options)
    assert line == (
        "dlrscale attack --strategy undistil --base models/base --model lock-0/model --target base+0.2 "
        "--tracking-uri none --set regress_steps=40"
    )


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("/tmp/out/locks/lock-0/model", "lock-0/model"),
        ("no file /home/a/data/x.txt, line 3", "no file data/x.txt, line 3"),
        ("https://example.org/a/b/c", "https://example.org/a/b/c"),
        ("results/of/a/run", "results/of/a/run"),
        ("3/4 of 1.5/2", "3/4 of 1.5/2"),
    ],
)
def test_only_absolute_places_are_shortened(campaign, text, short):
    assert campaign.shortened({"a": [text, 7]}) == {"a": [short, 7]}


def test_what_is_published_is_the_newest_record_without_trials(campaign, tmp_path):
    out, place = tmp_path / "out", tmp_path / "public"
    older, newer = (attack("locked", "full", LOCK_ID, metrics={"loss/heldout_task": loss}) for loss in (9.0, 2.0))
    newer["config"]["out"] = str(out / "full" / "seed-0")
    steps = [{"step": 1, "phase": "attack", "loss/train": 3.0, "throughput/tokens_per_s": 7.0, "tokens": 64}]
    runs = {"lock-0": [lock_record(LOCK_ID)], "full/seed-0": [older, newer], "full/trials/000": [older]}
    for name, entries in runs.items():
        folder = out / name
        folder.mkdir(parents=True)
        (folder / record.RECORDS_FILE).write_text("".join(record.dumps(e) + "\n" for e in entries))
        (folder / record.STEPS_FILE).write_text("".join(record.dumps(row) + "\n" for row in steps))
    (out / "full" / "search.json").write_text(json.dumps({"out": "/very/far/away/full", "trials": [1.5]}))
    campaign.publish(out, place)
    found = sorted(str(file.relative_to(place)) for file in place.rglob("*.json*"))
    names = (record.RECORDS_FILE, record.STEPS_FILE)
    assert found == sorted(
        ["full/search.json", *(f"{run}/{name}" for run in ("full/seed-0", "lock-0") for name in names)]
    )
    (entry,) = record.read_lines(place / "full" / "seed-0" / record.RECORDS_FILE)
    assert entry == newer | {"config": newer["config"] | {"out": "full/seed-0"}}
    (row,) = record.read_lines(place / "full" / "seed-0" / record.STEPS_FILE)
    assert row == {key: value for key, value in steps[0].items() if not key.startswith("throughput")}
    assert json.loads((place / "full" / "search.json").read_text()) == {"out": "away/full", "trials": [1.5]}
