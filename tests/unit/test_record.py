"""Records: strict JSON, whole files, hashes and digests."""

import hashlib
import json
import math
import os
import stat

import pytest

from dlrscale import record
from dlrscale.errors import ConfigError


def test_finite_at_any_depth():
    value = {"a": [1.0, math.nan, (math.inf, {"b": -math.inf})], 3: "x"}
    assert record.finite(value) == {"a": [1.0, None, [None, {"b": None}]], "3": "x"}


def test_dumps_is_strict():
    def refuse(text):
        raise AssertionError(text)

    text = record.dumps({"loss": math.nan, "text": "ä\n"})
    assert json.loads(text, parse_constant=refuse) == {"loss": None, "text": "ä\n"}
    assert "\n" not in text


def test_write_atomic_replaces_whole(tmp_path):
    file = tmp_path / "new" / "x.json"
    record.write_atomic(file, "one")
    record.write_atomic(file, "two")
    assert file.read_text() == "two"
    assert [p.name for p in file.parent.iterdir()] == ["x.json"]


def test_write_atomic_leaves_the_old_file_if_writing_fails(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    record.write_atomic(file, "one")
    monkeypatch.setattr(record.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        record.write_atomic(file, "two")
    assert file.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_write_atomic_obeys_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        record.write_atomic(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_lines_come_back(tmp_path):
    rows = [
        {"step": 1, "loss": 0.1},
        {"step": 2, "name": 'ö "x" \n \t'},
        {"step": 3, "error": "a\u2028b\x85c\x0cd"},
    ]
    for row in rows:
        record.append_line(tmp_path / "new" / "r.jsonl", row)
    assert list(record.read_lines(tmp_path / "new" / "r.jsonl")) == rows


def test_a_cut_off_last_line_is_left_out(tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text('{"step": 1}\n\n{"step": 2}\n{"ste')
    assert list(record.read_lines(file)) == [{"step": 1}, {"step": 2}]


def test_a_line_after_a_cut_off_one_is_not_lost(tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text('{"step": 1}\n{"ste')
    record.append_line(file, {"step": 2})
    assert {"step": 2} in list(record.read_lines(file))


def test_a_broken_line_in_the_middle_is_refused(tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"r\.jsonl:2: not a JSON object"):
        list(record.read_lines(file))


def test_find_records_takes_the_newest_of_each_id(tmp_path):
    for folder, rows in (("a", [("1", "failed"), ("2", "ok"), ("1", "ok")]), ("b", [("1", "oom")])):
        for identity, outcome in rows:
            record.append_line(tmp_path / folder / record.RECORDS_FILE, {"id": identity, "outcome": outcome})
    found = [(p.name, r["id"], r["outcome"]) for p, r in record.find_records([tmp_path])]
    assert found == [("a", "2", "ok"), ("a", "1", "ok"), ("b", "1", "oom")]
    one = record.find_records([tmp_path / "b" / record.RECORDS_FILE])
    assert [(p, r["outcome"]) for p, r in one] == [(tmp_path / "b", "oom")]


def test_find_records_refuses(tmp_path):
    with pytest.raises(ConfigError, match=r"No such folder: .*missing"):
        record.find_records([tmp_path / "missing"])
    with pytest.raises(ConfigError, match=r"No records\.jsonl below"):
        record.find_records([tmp_path])


def settings(**changes):
    base = {
        "model": "digest",
        "lr": 0.1,
        "steps": 10,
        "zero": 2,
        "num_ranks": 1,
        "micro_batch": 4,
        "accumulation": 1,
    }
    base |= {"offload_optimizer": False, "tracking_uri": "x", "out": "/a", "name": "n", "global_batch": 4}
    return base | changes


@pytest.mark.parametrize(
    ("changes", "same_id", "same_resume_id"),
    [
        ({}, True, True),
        ({"out": "/b", "name": "m", "tracking_uri": "none"}, True, True),
        ({"zero": 3, "offload_optimizer": True}, False, True),
        ({"num_ranks": 2, "micro_batch": 2}, False, True),
        ({"micro_batch": 2, "accumulation": 2}, False, True),
        ({"num_ranks": 2, "global_batch": 8}, False, False),
        ({"lr": 0.2}, False, False),
        ({"model": "other"}, False, False),
    ],
)
def test_run_ids(changes, same_id, same_resume_id):
    before, after = record.run_ids(settings()), record.run_ids(settings(**changes))
    assert (before[0] == after[0], before[1] == after[1]) == (same_id, same_resume_id)
    assert all(len(i) == 64 for i in after)


def test_run_ids_do_not_depend_on_the_order_of_keys():
    assert record.run_ids(settings()) == record.run_ids(dict(reversed(settings().items())))


def test_digest_file_follows_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "x.bin"
    for content in (b"abc", b"x" * (2 << 20), b"y" * (2 << 20)):
        file.write_bytes(content)
        os.utime(file, ns=(0, len(content) + content[0]))
        expected = hashlib.sha256(content).hexdigest()
        assert record.digest_file(file) == record.digest_file(file) == expected
    assert (tmp_path / "cache" / "dlrscale" / "digests.json").exists()


def test_digest_file_without_a_cache(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the cache's folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "x").write_bytes(b"x" * (2 << 20))
    assert record.digest_file(tmp_path / "x") == hashlib.sha256(b"x" * (2 << 20)).hexdigest()


def test_digest_folder_counts_names_and_bytes_not_paths(tmp_path):
    def folder(name, **files):
        (tmp_path / name).mkdir()
        for file, text in ({"config.json": "{}", "model.safetensors": "w", "tokenizer.json": "t"} | files).items():
            (tmp_path / name / file).write_text(text)
        return record.digest_folder(tmp_path / name)

    one = folder("one")
    assert folder("two") == one
    assert folder("readme", **{"README.md": "x"}) == one
    assert folder("weights", **{"model.safetensors": "v"}) != one
    assert folder("config", **{"config.json": "{ }"}) != one
    assert folder("tokenizer", **{"tokenizer.json": "u"}) != one
    assert folder("shards", **{"model-2.safetensors": "w"}) != one


def test_make_record_has_every_key_of_the_schema():
    entry = record.make_record(id="1", outcome="ok")
    assert tuple(entry) == record.RECORD_KEYS
    assert (entry["schema"], entry["id"], entry["error"]) == (record.SCHEMA, "1", None)
    with pytest.raises(ValueError, match="losss"):
        record.make_record(losss=1)


def test_versions_and_outcomes():
    assert {"python", "torch", "deepspeed", "transformers", "dlrscale"} <= set(record.versions())
    assert [o.value for o in record.Outcome] == ["ok", "oom", "diverged", "failed"]


def test_git_state_is_this_checkout():
    import subprocess

    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout")
    state = record.git_state()
    assert state is None or state["commit"] == head
