"""`dlrscale measure`: its configurations, what it refuses, and the table of both sides."""

import dataclasses
import json

import pytest

from dlrscale import cli, config, jobs
from dlrscale.cli import attack_configs
from dlrscale.cli.measure import parse_batches, side_by_side
from dlrscale.config import MeasureConfig
from dlrscale.errors import ConfigError
from dlrscale.jobs.measure import random_corpora


@pytest.fixture
def call(no_rank_starts, tmp_path, monkeypatch, capsys):
    """Run a command line in an empty folder: (exit code, stdout, stderr); no rank may start."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def call(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(["measure", *map(str, args)])
        out, err = capsys.readouterr()
        assert list((tmp_path / "work").iterdir()) == []
        return stop.value.code, out, err

    return call


@pytest.fixture(scope="module")
def sides(llama_folder, make_locked):
    """A locked model's folder and its base's."""
    folder = make_locked(llama_folder, "locked-measured")
    manifest = json.loads((folder / "lock.json").read_text())
    manifest["base"]["digest"] = config.digest(str(llama_folder))
    (folder / "lock.json").write_text(json.dumps(manifest))
    return str(folder), str(llama_folder)


def test_help_shows_commands(call):
    code, out, _ = call("--help")
    assert code == 0
    assert "dlrscale measure --model ./locked --base ./base" in out


def test_a_dry_run_prints_two_launch_lines(call, sides):
    locked, base = sides
    code, out, err = call(
        "--model", locked, "--base", base, "--strategy", "lora", "--seq-len", 32, "--num-ranks", 2, "--dry-run",
        "--tracking-uri", "none",
    )  # fmt: skip
    assert code == 0, err
    lines = [line for line in out.splitlines() if "jobs/__main__.py" in line]
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--steps", 2), "--steps 2: must be at least 3."),
        (("--inference-batches", "1,x"), "--inference-batches 1,x: write different numbers such as 1,4,16"),
        (("--inference-batches", "0"), "--inference-batches 0: each must be at least 1."),
        (("--new-tokens", 32), "--new-tokens 32: prompt and new tokens together are --seq-len 32 long"),
        (("--data", "nowhere.txt"), "nowhere.txt"),
        (("--seq-len", 4096), "takes at most 64 tokens"),
    ],
)
def test_bad_input_is_one_message(call, sides, options, says):
    code, _, err = call(
        "--model", sides[0], "--strategy", "full", "--seq-len", 32, "--tracking-uri", "none", *options
    )  # fmt: skip
    assert code == 2
    assert says in err
    assert "Traceback" not in err


def measured(sides, **options):
    shared = {"seq_len": 32, "tracking_uri": "none", "steps": 4, "out": "o", "num_ranks": 1}
    return attack_configs(shared | options | {"model": sides[0]}, sides[1], "full", (), MeasureConfig)


def test_inference_of_both_sides_is_in_one_job(sides, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    base, locked = measured(sides, inference_batches=[2])
    assert (base.kind, base.base, base.inference_batches) == ("measure", None, [])
    assert (locked.base, locked.inference_batches, locked.name) == (sides[1], [2], "measure-full-locked-k4")
    again = config.from_json(config.to_json(locked))
    assert again == locked
    described = jobs.describe(locked, {}, "a", "b")
    assert (described["kind"], described["side"], described["strategy"]) == ("measure", "locked", "full")
    assert described["config"]["base"] == "llama-tiny"
    assert described["config"]["base_digest"] == config.digest(sides[1])


def test_a_measurement_is_another_run_than_its_attack(sides, monkeypatch):
    """And what is measured beside it counts: by its bytes, not by its place."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    _, locked = measured(sides)
    ids = {
        config.run_ids(one, {})[0]
        for one in (
            locked,
            dataclasses.replace(locked, base=None),
            dataclasses.replace(locked, steps=5),
            dataclasses.replace(locked, inference_batches=[8]),
        )
    }
    assert len(ids) == 4
    assert config.run_ids(dataclasses.replace(locked, out="elsewhere"), {})[0] in ids


def test_random_ids_fill_whole_steps(sides, monkeypatch):
    from dlrscale import shapes

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    chosen = measured(sides, micro_batch=2, accumulation=3)[1]
    shape = shapes.model_shape(shapes.read_config(sides[0]))
    corpora = random_corpora(chosen, shape)
    assert len(corpora.train) % chosen.global_batch == 0
    assert {len(ids) for ids in corpora.train.input_ids} == {32}
    assert max(ids.max() for ids in corpora.train.input_ids) < shape.vocabulary
    assert corpora.train.label_tokens(0) == 31


def test_batches_are_read():
    assert parse_batches("1, 4,16") == [1, 4, 16]
    assert parse_batches("") == []
    with pytest.raises(ConfigError, match="different numbers"):
        parse_batches("2,2")


def test_both_sides_and_their_ratio():
    base = {"time/step_s": 2.0, "loss/train": 1.0, "flops/recompute": 0}
    locked = {"time/step_s": 3.0, "loss/train": 1.0, "flops/recompute": 0, "inference/decode_ms_per_token_b1": 6.0,
              "inference_base/decode_ms_per_token_b1": 4.0}  # fmt: skip
    lines = [line.split() for line in side_by_side(base, locked).splitlines()]
    assert lines[1:] == [
        ["inference/decode_ms_per_token_b1", "4", "6", "1.500"],
        ["time/step_s", "2", "3", "1.500"],
    ]
