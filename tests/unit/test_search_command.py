"""`dlrscale attack` with --trials, --seeds and --target: what it refuses, runs, and does after a stop."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from test_search import given

from dlrscale import cli, engine, record, search
from dlrscale import config as configuration
from dlrscale.cli import run as cli_run
from dlrscale.cli import search as cli_search
from dlrscale.errors import ConfigError, JobError
from dlrscale.search import Target, Wanted, space


@pytest.fixture
def call(no_rank_starts, tmp_path, monkeypatch, capsys, llama_folder):
    """`dlrscale attack` on a tiny model in an empty folder: (exit code, stdout, stderr); no rank may start."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "text.txt").write_text("the cat sat on a mat and saw two dogs run far away from home " * 40)

    def call(*args):
        capsys.readouterr()
        words = ["attack", "--model", str(llama_folder), "--data", str(tmp_path / "text.txt"), "--seq-len", "16",
                 "--tracking-uri", "none", *map(str, args)]  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        out, err = capsys.readouterr()
        assert list((tmp_path / "work").iterdir()) == []
        return stop.value.code, out, err

    return call


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--trials", 0], "--trials"),
        (["--lr-range", "1e-5,1e-3"], "--lr-range is for a search"),
        (["--trials", 2, "--lr-range", "1"], "--lr-range 1: write LOW,HIGH"),
        (["--seeds", "0,0"], "--seeds 0,0"),
        (["--target", "low"], "--target low"),
        (["--target", "base+0.1"], "give --base"),
        (["--trials", 2, "--heldout-limit", 1], "--heldout-limit"),
        (["--trials", 2, "--seq-len", 100000], "--seq-len"),
    ],
)
def test_what_is_wrong_is_told_before_a_rank_starts(call, options, fault):
    code, _, err = call("--strategy", "lora", *options)
    assert code == 2
    assert fault in err


def test_all_that_is_wrong_is_told_at_once(call):
    _, _, err = call("--strategy", "lora", "--seeds", "x", "--target", "y", "--trials", 1, "--lr-range", "z")
    assert all(option in err for option in ("--seeds x", "--target y", "--lr-range z"))


@pytest.mark.parametrize(
    ("file", "fault"),
    [({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "optimizer.params.lr"),
     ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}}}, "scheduler")],
)  # fmt: skip
def test_a_file_that_decides_the_rate_is_refused(call, tmp_path, file, fault):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}} | file))
    code, _, err = call("--strategy", "lora", "--trials", 2, "--deepspeed_config", tmp_path / "ds.json")
    assert code == 2
    assert "--trials tunes the learning rate" in err
    assert fault in err


def test_a_dry_run_shows_the_space(call):
    code, out, err = call("--strategy", "lora", "--trials", 2, "--steps", 20, "--micro-batch", 2, "--dry-run")
    assert code == 0, err
    (line,) = (line for line in out.splitlines() if line.startswith("# 2 trials over "))
    shown = json.loads(line.removeprefix("# 2 trials over "))
    assert shown["batch"] == {"choices": [0.5, 1.0, 2.0]}
    assert shown["lr"] == {"low": 1e-5, "high": 3e-2, "log": True, "whole": False}
    assert "knob.rank" in shown


def test_a_batch_that_the_data_do_not_fill_is_left_out(call, tmp_path):
    """Of 60 records 3 are held out: 57 are more than one global batch of 32, and less than two."""
    (tmp_path / "task.jsonl").write_text('{"prompt": "the cat ", "completion": "sat"}\n' * 60)
    line = ["--data", tmp_path / "task.jsonl", "--strategy", "lora", "--trials", 2, "--steps", 20, "--dry-run"]
    assert '"batch": {"choices": [0.5, 1.0]}' in call(*line, "--micro-batch", 32)[1]
    assert '"batch": {"choices": [0.5, 1.0, 2.0]}' in call(*line, "--micro-batch", 28)[1]


def test_a_direct_launch_is_one_run(call, monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    code, _, err = call("--strategy", "lora", "--seeds", "0,1")
    assert code == 2
    assert "a direct launch is one run" in err


# --- Going on -------------------------------------------------------------------------------------------------


@pytest.fixture
def jobs_run(monkeypatch):
    """Runs of jobs that leave a record and step rows of a known loss, without ranks: what was run, in order."""
    ran = []

    def execute(config, quiet=False):
        ran.append(Path(config.out).name)
        if config.name in stopping:
            raise JobError("cut")
        best = 2 + abs(np.log10(config.lr) + 3)
        rows, pruned = [], None
        for step in range(1, config.steps + 1):
            row = {"step": step, "tokens": 10 * step, "processed_tokens": 10, "time/step_s": 1.0}
            if config.eval_every and step % config.eval_every == 0:
                row["loss/heldout_task"] = best + config.steps / step / 100
            rows.append(row)
            losses = [r["loss/heldout_task"] for r in rows if "loss/heldout_task" in r]
            limit = config.stop_above[len(losses) - 1] if 0 < len(losses) <= len(config.stop_above) else None
            if "loss/heldout_task" in row and limit is not None and min(losses) > limit and step < config.steps:
                pruned = step
                break
        last = next(r["loss/heldout_task"] for r in reversed(rows) if "loss/heldout_task" in r or r is rows[0])
        found = record.make_record(
            id=configuration.run_ids(config, engine.merge(config))[0], kind="attack", outcome="ok", seed=config.seed,
            side="base", config=dataclasses.asdict(config) | {"pruned_at": pruned}, gates=None,
            metrics={"loss/heldout_task": last, **search.bill(rows, {}, 1.0, 1, config.target)},
        )  # fmt: skip
        for row in rows:
            record.append_line(Path(config.out) / "steps.jsonl", row)
        record.append_line(Path(config.out) / "records.jsonl", found)
        return found

    stopping: set[str] = set()
    monkeypatch.setattr(cli_run, "execute", execute)
    return ran, stopping


@pytest.fixture
def side(llama_folder, tmp_path):
    def make(out="out", **changes):
        config = given(model=str(llama_folder), data=__file__, out=str(tmp_path / out), name="n", tracking_uri="none")
        points = space.space(config, (1e-5, 3e-2), (), (0.5, 1.0, 2.0))
        values = {"trials": 8, "lr_range": (1e-5, 3e-2), "seeds": (0, 1), "target": Target(margin=0.1)} | changes
        return cli_search.Side(config, Wanted(**values), points, None)

    return make


def test_a_search_that_was_cut_goes_on_where_it_was(jobs_run, side, tmp_path):
    ran, stopping = jobs_run
    whole = side("whole")
    whole.run()
    assert ran == [f"{n:03d}" for n in range(8)] + ["seed-0", "seed-1"]
    wanted = json.loads((tmp_path / "whole" / "search.json").read_text())
    assert any(row["pruned_at"] is not None for row in wanted["trials"])
    assert len({json.dumps(row["params"]) for row in wanted["trials"]}) == 8
    ran.clear()
    stopping.add("n-trial-005")
    with pytest.raises(JobError, match="Trial 5 of 8"):
        side("cut").run()
    stopping.clear()
    ran.clear()
    side("cut").run()
    assert ran == ["005", "006", "007", "seed-0", "seed-1"]
    assert json.loads((tmp_path / "cut" / "search.json").read_text()) == wanted
    ran.clear()
    side("cut").run()
    assert ran == []
    with pytest.raises(ConfigError, match="another search"):
        side("cut", trials=9).run()


def test_the_best_is_repeated_on_the_other_half_and_the_target_is_the_bases_best(jobs_run, side, tmp_path):
    own = side()
    records = own.run()
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    best = found["chosen"]
    for run in records:
        config = run["config"]
        assert (config["heldout_part"], config["trial"], config["search"]) == ("report", best["number"], found["id"])
        assert config["lr"] == best["params"]["lr"]
        assert config["knobs"]["rank"] == best["params"]["knob.rank"]
        assert run["metrics"]["target/loss"] == pytest.approx(run["metrics"]["loss/heldout_task"] + 0.1)
        assert run["metrics"]["target/reached"] == 1
        (folder,) = (tmp_path / "out").glob(f"seed-{run['seed']}")
        assert list(record.read_lines(folder / "records.jsonl"))[-1] == json.loads(record.dumps(run))
    assert own.as_base() == {"trials": 8, "runs": 2, "reached": 2, "target": records[0]["metrics"]["target/loss"]}
    repeat = found["repeats"][0]
    assert repeat["target/tokens_with_search"] == repeat["target/tokens"] + found["spent"]["tokens"]
    trials = [json.loads((tmp_path / "out" / "trials" / f"{n:03d}" / "records.jsonl").read_text()) for n in range(8)]
    assert {run["config"]["heldout_part"] for run in trials} == {"tune"}
    assert found["spent"]["tokens"] == sum(run["metrics"]["cost/tokens"] for run in trials)


def test_seeds_without_a_search_repeat_the_given_settings(jobs_run, side, tmp_path):
    records = side(trials=0, target=None).run()
    assert [run["seed"] for run in records] == [0, 1]
    assert all(run["config"]["heldout_part"] is None and run["config"]["lr"] == 1e-3 for run in records)
    assert not (tmp_path / "out" / "search.json").exists()


def test_another_target_in_the_same_folder_is_the_one_that_counts(jobs_run, side, tmp_path):
    """Nothing runs again; the records are told once more, with the cost to the new target."""
    ran, _ = jobs_run
    first = side(trials=0, target=Target(loss=5.0)).run()
    assert {run["metrics"]["target/reached"] for run in first} == {1}
    ran.clear()
    second = side(trials=0, target=Target(loss=1.0)).run()
    assert ran == []
    assert {(run["metrics"]["target/loss"], run["metrics"]["target/reached"]) for run in second} == {(1.0, 0)}
    told = list(record.read_lines(tmp_path / "out" / "seed-0" / "records.jsonl"))
    assert [entry["config"]["target"] for entry in told][-1] == 1.0
    assert len({entry["id"] for entry in told}) == 1
