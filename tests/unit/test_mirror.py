"""MLflow made or completed from run folders: `replay`, `sweep` and `dlrscale mirror` on a real SQLite store."""

import contextlib
import json
import os
import resource
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlrscale import cli, record, tracking
from dlrscale.errors import ConfigError, JobError
from dlrscale.tracking import ended, mirror
from dlrscale.tracking import folder as folders
from dlrscale.tracking import store as stores

STARTED = "2026-01-02T03:04:05Z"
STEPS = 20
GONE = {"host": socket.gethostname(), "pid": "1", "pid_started": "7"}  # another process has this pid
ODD = ("odd/a@b", "odd/a:b", "odd/a=b", "odd/a%b")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    uri = f"sqlite:///{tmp_path_factory.mktemp('a store') / 'mlflow.db'}"
    stores.make_ready(uri)
    return uri


@pytest.fixture
def client(store):
    from mlflow import MlflowClient

    client = MlflowClient(store)
    yield client
    found = client.get_experiment_by_name("dlrscale")
    if found is not None:
        if found.lifecycle_stage == "active":
            client.delete_experiment(found.experiment_id)
        client.restore_experiment(found.experiment_id)
        for run in client.search_runs([found.experiment_id]):
            client.delete_run(run.info.run_id)


@pytest.fixture(autouse=True)
def nothing_told_yet(monkeypatch):
    monkeypatch.setattr(stores, "_told", set())


@pytest.fixture
def make_run(tmp_path):
    """Write a run's folder as a job does; without an outcome it has left no record."""

    def make(name="run", outcome="ok", rows=STEPS, process=GONE, described=STARTED, error=None, **changes):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        settings = {"lr": 1e-3, "steps": STEPS, "out": name, "name": name} | changes.pop("config", {})
        values = {"id": name * 8, "resume_id": f"{tmp_path.name}{name}", "kind": "attack", "name": name}
        entry = record.make_record(**values | {"config": settings, "seed": 0, "deepspeed_config": {"a": 1}} | changes)
        records = folder / "records.jsonl"
        before = len(records.read_text().splitlines()) if records.exists() else 0
        text = record.dumps(entry | {"started": described, "process": process, "records_before": before})
        (folder / folders.DESCRIPTION_FILE).write_text(text + "\n")
        (folder / "run.json").write_text(json.dumps({"resume_id": entry["resume_id"]}))
        with open(folder / "steps.jsonl", "w") as file:
            for row in step_rows(rows):
                file.write(record.dumps(row) + "\n")
        if outcome:
            metrics = {"loss/train": 1 / rows, "time/step_s": 0.125, "loss/heldout_task": 1.5}
            entry |= {"outcome": outcome, "started": STARTED, "metrics": metrics, "error": error}
            entry["phases"] = {"forward": {"seconds": 30.0}, "load": {"seconds": 12.5}}
            record.append_line(folder / "records.jsonl", entry)
        return folder

    return make


def step_rows(count):
    return [
        {"step": step, "phase": "train", "loss/train": 1 / step, "time/step_s": 0.5 + step / 64, "tokens": 9 * step}
        | {"optim/grad_norm": float("nan") if step == 3 else 2.0}
        | {name: float(step + i) for i, name in enumerate(ODD)}
        for step in range(1, count + 1)
    ]


def own_run(client, folder):
    """The one MLflow run of a folder."""
    experiment = client.get_experiment_by_name("dlrscale").experiment_id
    tag = mirror.place_tag(folder)
    (run,) = client.search_runs([experiment], filter_string=f"tags.`dlrscale.out` = '{tag}'")
    return run


def content(store):
    """All that a store holds, but for the parts that MLflow fills by itself: rows by table, and files."""
    path = tracking.sqlite_path(store)
    with contextlib.closing(sqlite3.connect(path)) as database:
        tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {table: sorted(map(str, database.execute(f"SELECT * FROM {table}"))) for table in tables}
    files = {p: p.stat().st_mtime_ns for p in sorted((path.parent / "mlartifacts").rglob("*"))}
    return rows, files


def points(client, run, name):
    return [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)]


# --- One run --------------------------------------------------------------------------------------------------


def test_a_run_is_made_whole_and_the_second_time_changes_nothing(store, client, make_run, tmp_path):
    options = {f"option_{i}": i for i in range(150)} | {"long": "x" * 7000, "empty": "", "nested": {"a": {"b": None}}}
    folder = make_run(config=options)
    found = tracking.replay(folder, store)
    assert (found.state, found.status) == ("added to", "FINISHED")
    run = own_run(client, folder)
    assert (run.info.run_id, run.info.run_name, run.info.status) == (found.run_id, "run", "FINISHED")
    started = folders.started_ms({"started": STARTED})
    assert (run.info.start_time, run.info.end_time) == (started, started + 42_500)
    assert run.data.tags["dlrscale.outcome"] == "ok"
    params = run.data.params
    assert {key for key in options if key != "nested"} | {"nested.a.b", "lr", "out"} <= params.keys()
    assert params["option_149"] == "149"
    assert len(params["long"]) == 6000
    rows = step_rows(STEPS)
    for name in ("loss/train", *ODD):
        assert points(client, run, mirror.legal(name)) == [(row["step"], row[name]) for row in rows]
    assert [step for step, _ in points(client, run, "optim/grad_norm")] == [s for s in range(1, 21) if s != 3]
    # The record's median stands beside the last step's own value, and is what MLflow's table shows.
    assert points(client, run, "time/step_s") == [(r["step"], r["time/step_s"]) for r in rows] + [(STEPS, 0.125)]
    assert run.data.metrics["time/step_s"] == 0.125
    assert run.data.metrics["loss/heldout_task"] == 1.5
    assert not {"step", "tokens"} & run.data.metrics.keys()
    names = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert names == {"config.json", "deepspeed_config.json", "record.json", "records.jsonl", "steps.jsonl"}
    whole = Path(client.download_artifacts(run.info.run_id, "config.json", str(tmp_path))).read_text()
    assert json.loads(whole)["long"] == "x" * 7000
    before = content(store)
    again = tracking.replay(folder, store)
    assert (again.state, again.run_id, again.added) == ("up to date", found.run_id, {})
    assert content(store) == before


def test_a_run_that_was_tracked_to_its_end_is_up_to_date(store, client, make_run, capsys):
    """Also where its record knows settings that its start did not: the optimizer's class."""
    folder = make_run(process=folders.process(), config={"optimizer": "FusedAdam"})
    entry = json.loads((folder / "records.jsonl").read_text())
    named = tracking.naming(entry, folder)
    del named["config"]["optimizer"]
    live = tracking.Tracker(store, **named, system_metrics=False)
    for row in step_rows(STEPS):
        live.log_step({k: v for k, v in row.items() if "/" in k}, row["step"])
    live.finish(entry, folders.files(folder))
    assert own_run(client, folder).data.params["optimizer"] == "FusedAdam"
    before = content(store)
    assert tracking.replay(folder, store).state == "up to date"
    assert content(store) == before
    assert capsys.readouterr().err == ""


def begin(store, folder, rows):
    """What the process of a run that is killed after some rows leaves in MLflow: a run that is RUNNING."""
    from collections import deque

    run = folders.read(folder)
    named = tracking.naming(run.entry, folder)
    left = mirror.Mirror(store, **named | {"tags": named["tags"] | run.process})
    left.start()
    left.send(deque(folders.rows(folder, run.entry)[:rows]))
    return left.run_id


def test_what_is_missing_is_added(store, client, make_run):
    folder = make_run()
    run_id = begin(store, folder, 5)
    found = tracking.replay(folder, store)
    assert (found.state, found.run_id) == ("added to", run_id)
    run = own_run(client, folder)
    assert points(client, run, "loss/train") == [(step, 1 / step) for step in range(1, STEPS + 1)]
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("outcome", "status"),
    [("ok", "FINISHED"), ("oom", "FINISHED"), ("diverged", "FINISHED"), ("failed", "FAILED"), (None, "KILLED")],
)
def test_the_status_tells_how_a_run_ended(store, client, make_run, outcome, status):
    folder = make_run(outcome=outcome, rows=2)
    assert tracking.replay(folder, store).status == status
    run = own_run(client, folder)
    assert run.info.status == status
    assert run.data.tags["dlrscale.outcome"] == (outcome or "failed")
    assert tracking.replay(folder, store).state == "up to date"


def test_a_run_that_goes_on_is_left_to_its_process(store, client, make_run):
    folder = make_run(outcome=None, process=folders.process())
    before = content(store)
    assert tracking.replay(folder, store).state == "running"
    elsewhere = make_run("elsewhere", outcome=None, process=folders.process() | {"host": "another"})
    assert tracking.replay(elsewhere, store).state == "running"
    assert content(store) == before


def test_of_several_attempts_the_last_one_stands(store, client, make_run):
    folder = make_run(outcome="failed", rows=3, error="rank 0: it broke")
    tracking.replay(folder, store)
    assert own_run(client, folder).data.tags["dlrscale.error"] == "rank 0: it broke"
    make_run(outcome=None, rows=5, described="2026-01-02T04:00:00Z")  # a second attempt, killed
    assert tracking.replay(folder, store).status == "KILLED"
    make_run(outcome="ok", described=STARTED)
    assert tracking.replay(folder, store).status == "FINISHED"
    run = own_run(client, folder)
    assert "dlrscale.error" not in run.data.tags
    assert sorted(points(client, run, "loss/train")) == [(step, 1 / step) for step in range(1, STEPS + 1)]


def test_a_record_that_the_command_left_stands_though_it_began_before_its_ranks(store, client, make_run):
    """The command takes the time before the ranks write their description."""
    folder = make_run("command", outcome="oom", rows=3, described="2026-01-02T04:00:00Z", error="the kernel killed it")
    tracking.replay(folder, store)
    tags = own_run(client, folder).data.tags
    assert (tags["dlrscale.outcome"], tags["dlrscale.error"]) == ("oom", "the kernel killed it")


def test_what_was_deleted_in_mlflow_stays_deleted(store, client, make_run):
    folder = make_run(rows=2)
    run_id = tracking.replay(folder, store).run_id
    client.delete_run(run_id)
    before = content(store)
    found = tracking.replay(folder, store)
    assert found.state == "deleted"
    assert "restore it" in str(found)
    assert content(store) == before
    client.restore_run(run_id)
    assert tracking.replay(folder, store).state == "up to date"
    client.delete_experiment(client.get_experiment_by_name("dlrscale").experiment_id)
    assert tracking.replay(folder, store).state == "deleted"


def test_attacks_find_their_lock_in_any_order(store, client, make_run):
    lock_id = f"lock-of-{time.time_ns()}"
    lock = make_run("lock", rows=1, kind="lock", id=lock_id)
    child = make_run("child", rows=1, config={"lock_id": lock_id})
    tracking.replay(child, store)
    stand_in = own_run(client, child).data.tags["mlflow.parentRunId"]
    assert tracking.replay(lock, store).run_id == stand_in
    assert own_run(client, lock).info.run_name == "lock"
    before = content(store)
    assert {tracking.replay(f, store).state for f in folders.find([lock, child])} == {"up to date"}
    assert content(store) == before
    client.delete_run(stand_in)
    assert tracking.replay(child, store).state == "up to date"
    # A new stand-in for a new child does not bring the deleted lock back
    tracking.replay(make_run("late", rows=1, config={"lock_id": lock_id}), store)
    assert tracking.replay(lock, store).state == "deleted"
    assert folders.find([lock.parent])[0] == lock


def test_a_replay_that_breaks_off_leaves_nothing_running(store, client, make_run, monkeypatch):
    folder = make_run()

    def die(self, rows):
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(mirror.Mirror, "send", die)
        with pytest.raises(JobError, match="gone.*again later"):
            tracking.replay(folder, store)
    assert own_run(client, folder).info.status == "FINISHED"
    assert tracking.replay(folder, store).state == "added to"
    assert len(points(client, own_run(client, folder), "loss/train")) == STEPS


def test_folders_that_hold_no_single_run_are_refused(tmp_path, make_run):
    with pytest.raises(ConfigError, match="no run began there"):
        tracking.replay(tmp_path, "sqlite:///never-made.db")
    folder = make_run()
    record.append_line(folder / "records.jsonl", {"resume_id": "another"})
    with pytest.raises(ConfigError, match="several runs"):
        tracking.replay(folder, "sqlite:///never-made.db")


# --- Runs without a process -----------------------------------------------------------------------------------


def test_a_process_is_known_by_its_start_and_a_zombie_is_gone():
    own = folders.process()
    assert folders.is_alive(own) is True
    assert folders.is_alive(own | {"pid_started": "1"}) is False
    assert folders.is_alive(own | {"host": "another"}) is None
    assert folders.is_alive({}) is None
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = own | {"pid": str(child.pid), "pid_started": str(record.process_started(child.pid))}
    assert folders.is_alive(known) is True
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has reaped it yet
    assert folders.is_alive(known) is False
    child.wait()
    assert folders.is_alive(known) is False


def test_sweep_ends_what_has_no_process_and_nothing_else(store, client, make_run):
    runs = {
        "whole": make_run("whole"),
        "lost": make_run("lost", outcome=None),
        "alive": make_run("alive", outcome=None, process=folders.process()),
        "elsewhere": make_run("elsewhere", outcome=None, process=GONE | {"host": "another"}),
        "foreign": make_run("foreign", outcome=None, process={}),
    }
    ids = {name: begin(store, folder, 2) for name, folder in runs.items()}
    for file in runs["lost"].iterdir():
        file.unlink()
    assert sorted(tracking.sweep(store)) == sorted([ids["whole"], ids["lost"]])
    status = {name: client.get_run(run_id).info.status for name, run_id in ids.items()}
    running = dict.fromkeys(("alive", "elsewhere", "foreign"), "RUNNING")
    assert status == running | {"whole": "FINISHED", "lost": "KILLED"}
    assert client.get_run(ids["lost"]).data.tags["dlrscale.outcome"] == "failed"
    assert len(points(client, own_run(client, runs["whole"]), "loss/train")) == STEPS
    assert tracking.sweep(store) == []


def test_the_next_job_sweeps(store, client, make_run):
    run_id = begin(store, make_run(outcome=None), 2)
    live = tracking.Tracker(store, "another", "r", config={}, tags={"resume_id": "x"}, system_metrics=False)
    until = time.monotonic() + 10
    while client.get_run(run_id).info.status == "RUNNING" and time.monotonic() < until:
        time.sleep(0.05)
    assert client.get_run(run_id).info.status == "KILLED"
    live.finish(record.make_record(outcome="ok", metrics={}))


@contextlib.contextmanager
def silent_server():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0), backlog=64)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def closed_server():
    with silent_server() as uri:
        return uri


def test_a_store_that_is_away_costs_sweep_and_replay_a_moment(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stores, "ASK_S", 0.3)
    folder = make_run("o u't")
    with silent_server() as silent:
        for uri in (silent, closed_server(), f"sqlite:///{tmp_path}/none.db"):
            start = time.monotonic()
            assert tracking.sweep(uri) == []
            assert time.monotonic() - start < 2
        assert tracking.replay_quietly(folder, silent) is None
        assert tracking.replay_quietly(folder, silent) is None
    assert not (tmp_path / "none.db").exists()
    err = capsys.readouterr().err
    assert err.count("warning") == len(err.splitlines()) == 1
    assert f"""dlrscale mirror '{tmp_path}/o u'"'"'t'""" in err
    assert (folder / folders.BEHIND_FILE).is_file()


def test_replay_quietly_is_bounded(store, make_run, monkeypatch, capsys):
    monkeypatch.setattr(ended, "replay", lambda *a: time.sleep(3))
    start = time.monotonic()
    assert tracking.replay_quietly(make_run(), store, patience_s=0.2) is None
    assert time.monotonic() - start < 1
    assert "not done after" in capsys.readouterr().err


def test_the_command_tells_what_its_ranks_saw_once(store, client, make_run, capsys):
    folder = make_run(rows=2)
    tracking.tell_if_behind(folder, store)
    assert capsys.readouterr().err == ""
    folders.set_behind(folder, store, "it died")
    tracking.tell_if_behind(folder, closed_server())
    assert capsys.readouterr().err == ""
    tracking.tell_if_behind(folder, store)
    tracking.tell_if_behind(folder, store)
    err = capsys.readouterr().err
    assert err.count("it died") == 1
    assert f"dlrscale mirror {folder}" in err
    tracking.replay(folder, store)
    assert not (folder / folders.BEHIND_FILE).exists()


# --- Stores that cannot be used -------------------------------------------------------------------------------


def check_one_warning(uri, capsys, text):
    start = time.monotonic()
    tracking.prepare(uri)
    assert time.monotonic() - start < 5
    err = capsys.readouterr().err
    assert err.count("warning") == len(err.splitlines()) == 1, err
    assert text in err


def test_a_locked_store(store, tmp_path, capsys):
    copy = tmp_path / "mlflow.db"
    copy.write_bytes(tracking.sqlite_path(store).read_bytes())
    with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        check_one_warning(f"sqlite:///{copy}", capsys, "locked")


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    check_one_warning(f"sqlite:///{tmp_path}/file/mlflow.db", capsys, "Not a directory")


def test_a_full_disk_leaves_no_half_store(tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, hard))
    try:
        check_one_warning(f"sqlite:///{tmp_path}/mlflow.db", capsys, "is away")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["mlartifacts"]


# --- The command ----------------------------------------------------------------------------------------------


@pytest.fixture
def call(capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def call(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in args])
        return stop.value.code, *capsys.readouterr()

    return call


def test_the_command_mirrors_all_runs_below_a_folder(store, client, make_run, call, tmp_path, monkeypatch):
    make_run("one")
    make_run("two", outcome="failed")
    make_run("three", outcome=None, process=folders.process())
    code, out, err = call("mirror", tmp_path, "--tracking-uri", store)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{tmp_path}/one: added 4 parameters, 141 points, 5 files; FINISHED"
    assert "still running" in lines[1]
    assert lines[2].endswith("; FAILED")
    assert lines[3] == f"3 runs: 2 added to, 1 running; MLflow at {store}"
    before = content(store)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(".")
    code, out, _ = call("mirror", "results/one", "results/two", "--tracking-uri", store)
    assert code == 0
    assert out.splitlines()[-1] == f"2 runs: 2 up to date; MLflow at {store}"
    assert content(store) == before


def test_a_broken_run_does_not_keep_the_others_from_mlflow(store, client, make_run, call, tmp_path):
    broken, _ = make_run("a"), make_run("b")
    with open(broken / "steps.jsonl", "r+") as file:
        file.write("nonsense")
    code, out, err = call("mirror", tmp_path, "--tracking-uri", store)
    assert code == 2
    assert "b: added" in out
    assert f"{broken}/steps.jsonl:1" in err


def test_the_command_says_what_is_wrong(make_run, call, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "ASK_S", 0.3)
    (tmp_path / "none").mkdir()
    assert "No such folder" in call("mirror", tmp_path / "absent")[2]
    code, _, err = call("mirror", tmp_path / "none")
    assert (code, err.count("No run has begun below")) == (2, 1)
    assert call("mirror", make_run(), "--tracking-uri", "file:./mlruns")[0] == 2
    with silent_server() as silent:
        for uri in (silent, closed_server()):
            start = time.monotonic()
            code, out, err = call("mirror", make_run(), "--tracking-uri", uri)
            assert (code, out) == (4, "")
            assert err.startswith("Error: no MLflow server answers")
            assert time.monotonic() - start < 3
