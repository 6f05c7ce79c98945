import contextlib
import json
import re
import socket
import time
from pathlib import Path

import pytest

from dlrscale import tracking
from dlrscale.errors import ConfigError
from dlrscale.record import make_record
from dlrscale.tracking import mirror, tracker
from dlrscale.tracking import store as stores

LOCK = "a" * 64


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    uri = f"sqlite:///{tmp_path_factory.mktemp('a store') / 'results' / 'mlflow.db'}"
    tracking.prepare(uri)
    return uri


@pytest.fixture
def client(store):
    from mlflow import MlflowClient

    return MlflowClient(store)


@pytest.fixture(autouse=True)
def nothing_told_yet(monkeypatch):
    monkeypatch.setattr(stores, "_told", set())


def runs(client, experiment):
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id]) if found else []


def track(uri, experiment, rows=3, outcome="ok", kind="attack", run_name="r", config=None, tags=None, **kwargs):
    artifacts = kwargs.pop("artifacts", [])
    metrics = kwargs.pop("metrics", {"loss/heldout_task": 1.5})
    tags = {"id": "b" * 64, "resume_id": "c" * 64, "kind": kind} | (tags or {})
    kwargs.setdefault("system_metrics", False)
    mirrored = tracking.Tracker(uri, experiment, run_name, config=config or {"lr": 0.1}, tags=tags, **kwargs)
    for step in range(1, rows + 1):
        mirrored.log_step({"step": step, "phase": "train", "loss/train": 1.0 / step}, step)
    mirrored.finish(make_record(outcome=outcome, kind=kind, metrics=metrics), artifacts)
    return mirrored


def test_default_uri_is_absolute_and_below_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking.default_uri() == f"sqlite:///{tmp_path}/results/mlflow.db"
    assert tracking.resolve("sqlite:///x.db") == f"sqlite:///{tmp_path}/x.db"


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/x", "sqlite://"])
def test_stores_that_mlflow_does_not_have_are_refused(uri):
    with pytest.raises(ConfigError, match="sqlite:///FOLDER"):
        tracking.prepare(uri)


def test_prepare_twice_is_fast_and_makes_the_artifact_folder(store):
    start = time.monotonic()
    tracking.prepare(store)
    assert time.monotonic() - start < 0.5
    assert (tracking.sqlite_path(store).parent / "mlartifacts").is_dir()


def test_run_reaches_the_store_whole(store, client, tmp_path, capsys):
    file = tmp_path / "plot.txt"
    file.write_text("x")
    config = {"lr": 0.1, "axes": {"levers": {"zero": 2}}, "none": None, "many": [1, 2]}
    config |= {f"option_{i}": i for i in range(150)} | {"long": "x" * 7000}
    track(
        store,
        "whole",
        config=config,
        artifacts=[file, tmp_path / "absent"],
        tags={"side": "base", "strategy": None},
    )
    (run,) = runs(client, "whole")
    assert run.info.status == "FINISHED"
    assert run.data.tags["dlrscale.outcome"] == "ok"
    assert run.data.tags["dlrscale.side"] == "base"
    assert "dlrscale.strategy" not in run.data.tags
    params = run.data.params
    assert len(params) == 155
    assert params["axes.levers.zero"] == "2"
    assert params["option_149"] == "149"
    assert params["many"] == "[1, 2]"
    assert len(params["long"]) == 6000
    assert params["long"].endswith("config.json]")
    history = client.get_metric_history(run.info.run_id, "loss/train")
    assert [(p.step, p.value) for p in history] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert run.data.metrics["loss/heldout_task"] == 1.5
    assert "step" not in run.data.metrics
    names = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert names == {"config.json", "record.json", "plot.txt"}
    assert run.info.artifact_uri.startswith((tracking.sqlite_path(store).parent / "mlartifacts").as_uri())
    assert capsys.readouterr().err == ""
    whole = json.loads(Path(client.download_artifacts(run.info.run_id, "config.json", str(tmp_path))).read_text())
    assert whole["long"] == "x" * 7000


def test_non_finite_values_and_odd_names(store, client, capsys):
    mirrored = tracking.Tracker(store, "odd", "r", config={}, tags={"resume_id": "d" * 64}, system_metrics=False)
    mirrored.log_step({"a@b": 1.0, "loss/train": float("nan"), "p:q=%": 2, "x": float("inf"), "flag": True}, 1)
    mirrored.log_step({"loss/train": 0.5, "../up": 3.0, "": 4.0, "n" * 300: 5.0}, 2)
    mirrored.finish(make_record(outcome="diverged", metrics={"loss/heldout_task": float("nan")}), [])
    (run,) = runs(client, "odd")
    assert run.info.status == "FINISHED"
    assert run.data.tags["dlrscale.outcome"] == "diverged"
    found = {re.sub("-[0-9a-f]{6}$", "", key): value for key, value in run.data.metrics.items()}
    assert found == {"a_b": 1.0, "p_q__": 2.0, "loss/train": 0.5, "_/up": 3.0, "_": 4.0, "n" * 243: 5.0}
    assert capsys.readouterr().err == ""


def test_names_that_had_to_change_stay_apart():
    names = ["odd/a@b", "odd/a:b", "odd/a=b", "odd/a%b", "odd/a_b", "x//y", "x/y", "n" * 300, "n" * 301]
    legal = [mirror.legal(name) for name in names]
    assert len(set(legal)) == len(names)
    assert legal[4] == "odd/a_b"
    assert all(len(name) <= 250 and re.fullmatch(r"[\w\-. /]+", name) for name in legal)


@pytest.mark.parametrize(("outcome", "status"), [("oom", "FINISHED"), ("failed", "FAILED")])
def test_status_from_outcome(store, client, outcome, status):
    track(store, f"status-{outcome}", outcome=outcome)
    (run,) = runs(client, f"status-{outcome}")
    assert (run.info.status, run.data.tags["dlrscale.outcome"]) == (status, outcome)


def test_attacks_are_children_of_the_lock_run(store, client):
    track(store, "family", kind="lock", run_name="lock", tags={"id": LOCK, "resume_id": "1" * 64})
    track(store, "family", run_name="child", tags={"resume_id": "2" * 64}, parent_lock_id=LOCK)
    track(store, "family2", run_name="cousin", tags={"resume_id": "3" * 64}, parent_lock_id=LOCK)
    by_name = {run.info.run_name: run for run in runs(client, "family")}
    assert set(by_name) == {"lock", "child"}
    lock_run = by_name["lock"].info.run_id
    assert by_name["lock"].data.tags["dlrscale.lock_id"] == LOCK
    assert by_name["child"].data.tags["mlflow.parentRunId"] == lock_run
    assert by_name["child"].data.tags["dlrscale.lock_id"] == LOCK
    (cousin,) = runs(client, "family2")
    assert cousin.data.tags["mlflow.parentRunId"] == lock_run


def test_missing_lock_run_gets_one_stand_in_that_the_lock_takes_over(store, client):
    lock_id = "e" * 64
    for number in "45":
        track(
            store,
            "orphans",
            run_name=f"child{number}",
            tags={"resume_id": number * 64},
            parent_lock_id=lock_id,
        )
    by_name = {run.info.run_name: run for run in runs(client, "orphans")}
    assert set(by_name) == {"lock-eeeeeeee", "child4", "child5"}
    parent = by_name["lock-eeeeeeee"]
    assert parent.info.status == "FINISHED"
    assert {by_name[f"child{n}"].data.tags["mlflow.parentRunId"] for n in "45"} == {parent.info.run_id}
    track(store, "orphans", kind="lock", run_name="real", tags={"id": lock_id, "resume_id": "6" * 64})
    by_name = {run.info.run_name: run for run in runs(client, "orphans")}
    assert by_name["real"].info.run_id == parent.info.run_id
    assert len(by_name) == 3


def test_started_again_goes_on_in_its_run(store, client, capsys):
    config = {"lr": 0.1, "num_ranks": 1, "out": "x"}
    track(store, "again", rows=3, outcome="failed", config=config)
    track(store, "again", rows=5, config=config | {"num_ranks": 2})
    (run,) = runs(client, "again")
    assert run.info.status == "FINISHED"
    assert [p.step for p in client.get_metric_history(run.info.run_id, "loss/train")] == [1, 2, 3, 4, 5]
    assert run.data.params["num_ranks"] == "1"
    assert run.data.tags["dlrscale.resumed_with.num_ranks"] == "2"
    track(store, "again", config=config | {"out": "y"})
    assert len(runs(client, "again")) == 2
    assert capsys.readouterr().err == ""


def test_record_metric_stands_where_the_last_row_differs(store, client):
    mirrored = tracking.Tracker(store, "last", "r", config={}, tags={"resume_id": "7" * 64}, system_metrics=False)
    mirrored.log_step({"time/step_s": 9.0, "loss/train": 2.0}, 1)
    mirrored.finish(make_record(outcome="ok", metrics={"time/step_s": 4.0, "loss/train": 2.0}), [])
    (run,) = runs(client, "last")
    assert run.data.metrics == {"time/step_s": 4.0, "loss/train": 2.0}
    assert len(client.get_metric_history(run.info.run_id, "loss/train")) == 1


def test_artifact_that_fails_still_ends_the_run(store, client, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(mirror.Mirror, "_attach", lambda *a: (_ for _ in ()).throw(OSError("disk is full")))
    track(store, "attach")
    assert runs(client, "attach")[0].info.status == "FINISHED"
    err = capsys.readouterr().err
    assert err.count("warning") == 1
    assert "disk is full" in err


def test_system_metrics_do_not_hold_up_the_end(store, client):
    start = time.monotonic()
    track(store, "system", system_metrics=True)
    assert time.monotonic() - start < 8
    assert runs(client, "system")[0].info.status == "FINISHED"


@contextlib.contextmanager
def silent_server():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0), backlog=64)) as server:
        yield server.getsockname()[1]


def free_port():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as probe:
        return probe.getsockname()[1]


def check_away(uri, capfd):
    start = time.monotonic()
    tags = {"resume_id": "8" * 64}
    mirrored = tracking.Tracker(uri, "e", "r", config={"a": 1}, tags=tags, system_metrics=True)
    assert time.monotonic() - start <= 10
    for step in range(20):
        before = time.monotonic()
        mirrored.log_step({"loss/train": 1.0}, step)
        assert time.monotonic() - before < 0.1
    start = time.monotonic()
    mirrored.finish(make_record(outcome="ok", metrics={}), [])
    assert time.monotonic() - start <= tracker.FINISH_S + 1
    err = capfd.readouterr().err
    assert err.count("warning") == 1, err
    assert len(err.strip().splitlines()) == 1, err
    assert uri in err
    assert "records are complete" in err


def test_server_that_is_away(capfd):
    check_away(f"http://127.0.0.1:{free_port()}", capfd)


def test_server_that_never_answers(capfd, monkeypatch):
    monkeypatch.setattr(tracker, "FINISH_S", 3.0)
    with silent_server() as port:
        check_away(f"http://127.0.0.1:{port}", capfd)


def test_store_that_comes_back_gets_all_rows(store, client, monkeypatch, capsys):
    monkeypatch.setattr(tracker, "RETRY_S", (0.2, 0.2))
    monkeypatch.setattr(tracker, "FLUSH_S", 0.1)
    start, calls = mirror.Mirror.start, []

    def away_at_first(self):
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("away")
        start(self)

    monkeypatch.setattr(mirror.Mirror, "start", away_at_first)
    tags = {"resume_id": "9" * 64}
    mirrored = tracking.Tracker(store, "back", "r", config={}, tags=tags, system_metrics=False)
    for step in range(20):
        mirrored.log_step({"loss/train": float(step)}, step)
        time.sleep(0.05)
    mirrored.finish(make_record(outcome="ok", metrics={}), [])
    (run,) = runs(client, "back")
    assert len(client.get_metric_history(run.info.run_id, "loss/train")) == 20
    assert capsys.readouterr().err.count("warning") == 1


def test_prepare_only_warns_about_a_server(capsys):
    start = time.monotonic()
    tracking.prepare(f"http://127.0.0.1:{free_port()}")
    with silent_server() as port:
        tracking.prepare(f"http://user:secret@127.0.0.1:{port}")
    assert time.monotonic() - start < 4
    assert stores.ASK_S + 0.5 + tracker.START_S < 10  # the longest that a job's start is delayed
    err = capsys.readouterr().err
    assert err.count("warning") == 2
    assert "secret" not in err


def test_serve_refuses_what_cannot_work(tmp_path, store):
    with pytest.raises(ConfigError, match="no run has been tracked"):
        tracking.serve(f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(ConfigError, match="own pages"):
        tracking.serve("http://127.0.0.1:1")
    with silent_server() as port, pytest.raises(ConfigError, match=r"Port \d+ is free"):
        tracking.serve(store, port=port)
