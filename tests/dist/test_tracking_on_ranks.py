"""Real jobs against a real MLflow server that is away, dies, hangs or comes back, and `dlrscale mirror` after it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from commands import environment

from dlrscale import cli, config, engine, jobs, launcher, record, tracking, train
from dlrscale.tracking import folder as folders
from dlrscale.tracking import mirror
from dlrscale.tracking import store as stores

pytestmark = pytest.mark.dist
STEPS = 20
ODD = ("odd/a@b", "odd/a:b", "odd/a=b", "odd/a%b")
MODES = ("open", "away from the start", "dies at 5", "silent", "hangs at 5", "back at 15")


class Proxy:
    """A TCP port before a server that can pass everything on, refuse connections, or accept and never answer."""

    def __init__(self, folder: Path, target: int):
        self.folder, self.target, self.port = folder, target, launcher.free_port()
        self.listener: socket.socket | None = None
        self.connections: list[socket.socket] = []

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def set(self, mode: str) -> None:
        """Change to `open`, `silent` or `closed`; what was connected is cut off."""
        listener, self.listener = self.listener, None
        for sock in [listener, *self.connections] if listener else self.connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self.connections = []
        if mode != "closed":
            self.listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
            threading.Thread(target=self._accept, args=(self.listener, mode), daemon=True).start()

    def _accept(self, listener: socket.socket, mode: str) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                self.connections.append(client)
                if mode == "open":
                    server = socket.create_connection(("127.0.0.1", self.target))
                    self.connections.append(server)
                    for pair in ((client, server), (server, client)):
                        threading.Thread(target=self._pump, args=pair, daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> tuple[Path, int]:
    """The folder and the port of an MLflow server."""
    folder, port = tmp_path_factory.mktemp("server"), launcher.free_port()
    line = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    line += ["--artifacts-destination", str(folder / "artifacts"), "--port", str(port), "--workers", "1"]
    env = environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", MLFLOW_DISABLE_TELEMETRY="true")
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(line, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    until = time.monotonic() + 90
    try:
        while True:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            time.sleep(0.2)
        yield folder, port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def proxy(server: tuple[Path, int]) -> Proxy:
    """A port before the server, closed at first."""
    proxy = Proxy(*server)
    yield proxy
    proxy.set("closed")


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """Prompt/completion records."""
    file = tmp_path_factory.mktemp("data") / "task.jsonl"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two"]
    rows = [{"prompt": " ".join(words[i % 7 : i % 7 + 3]) + " ", "completion": words[i % 5]} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def attack(tiny_folder: Path, task: Path, tmp_path_factory):
    """Run an attack of 20 steps on one rank in this process; its metrics have odd names, its settings odd sizes."""
    before, step = dict(os.environ), train.LanguageModelling.__call__
    with pytest.MonkeyPatch.context() as patch:
        for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(key, raising=False)
        patch.setenv("DS_ACCELERATOR", "cpu")
        odd = {name: float(i) for i, name in enumerate(ODD)}
        patch.setattr(train.LanguageModelling, "__call__", lambda self, *a: step(self, *a) | odd)

        def run(uri, at=lambda step: None, **changes):
            settings = config.AttackConfig(
                model=str(tiny_folder), data=str(task), out=str(tmp_path_factory.mktemp("run") / "out"), name="a",
                strategy="full", seq_len=32, micro_batch=4, steps=STEPS, lr=1e-2, heldout_limit=4, tracking_uri=uri,
                command="x" * 7000, knobs={f"knob_{i}": float(i) for i in range(150)}, checkpoint_every=0,
            )  # fmt: skip
            settings = replace(settings, **changes)
            delay, begun = [], time.monotonic()

            def sink(*arguments):
                tracker = jobs.make_tracker(*arguments)
                delay.append(time.monotonic() - begun)
                if tracker is not None:
                    log = tracker.log_step
                    tracker.log_step = lambda row, step: (at(step), log(row, step))
                return tracker

            if uri != "none":
                tracking.prepare(uri)
            prepared = time.monotonic() - begun
            started, begun = begun, time.monotonic()
            code = jobs.run(settings, sink)
            return Path(settings.out), code, prepared + delay[0], time.monotonic() - started

        yield run
        engine.stop_distributed()
    os.environ.clear()
    os.environ.update(before)


def losses(folder: Path) -> list[tuple]:
    """What a run computed in each step."""
    rows = record.read_lines(folder / record.STEPS_FILE)
    return [(row["step"], row["loss/train"], row["optim/grad_norm"], row["tokens"]) for row in rows]


def outcome(folder: Path) -> tuple:
    """How a run ended: outcome and held-out losses, read as strict JSON."""
    for name in (record.RECORDS_FILE, record.STEPS_FILE, folders.DESCRIPTION_FILE):
        for line in (folder / name).read_text().splitlines():
            json.loads(line, parse_constant=lambda word: pytest.fail(word))
    (entry,) = record.read_lines(folder / record.RECORDS_FILE)
    return entry["outcome"], {k: v for k, v in entry["metrics"].items() if k.startswith("loss/")}


@pytest.fixture(scope="module")
def untracked(attack) -> Path:
    """The same run without tracking."""
    return attack("none")[0]


def mirrored(capsys, *places) -> str:
    """What `dlrscale mirror` prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["mirror", *map(str, places)])
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    return out


def content(proxy: Proxy) -> tuple:
    """All that the server holds: rows by table, and files."""
    with contextlib.closing(sqlite3.connect(proxy.folder / "mlflow.db")) as database:
        tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {table: sorted(map(str, database.execute(f"SELECT * FROM {table}"))) for table in tables}
    return rows, {p: p.stat().st_mtime_ns for p in (proxy.folder / "artifacts").rglob("*")}


def check_whole(client, folder: Path, tmp_path: Path) -> None:
    """MLflow has all of a run that ended `ok`: parameters, 20 points per metric, files."""
    experiment = client.get_experiment_by_name("dlrscale").experiment_id
    own = f"tags.`dlrscale.out` = '{mirror.place_tag(folder)}'"
    (run,) = client.search_runs([experiment], filter_string=own)
    run_id = run.info.run_id
    assert (run.info.status, run.data.tags["dlrscale.outcome"]) == ("FINISHED", "ok")
    assert len(run.data.params) > 300
    assert run.data.params["knobs.knob_149"] == run.data.params["axes.knobs.knob_149"] == "149.0"
    assert len(run.data.params["command"]) == 6000
    whole = Path(client.download_artifacts(run_id, "config.json", str(tmp_path))).read_text()
    assert json.loads(whole)["command"] == "x" * 7000
    rows = list(record.read_lines(folder / record.STEPS_FILE))
    (entry,) = record.read_lines(folder / record.RECORDS_FILE)
    assert len(rows) == STEPS
    for name in (key for key in rows[0] if "/" in key):
        points = [(p.step, p.value) for p in client.get_metric_history(run_id, mirror.legal(name))]
        # Where the record holds a median, it stands beside the last step's own value.
        median = entry["metrics"].get(name, rows[-1][name])
        extra = [(STEPS, median)] if median != rows[-1][name] else []
        assert sorted(points) == sorted([(row["step"], row[name]) for row in rows] + extra), name


@pytest.mark.parametrize("mode", MODES)
def test_a_server_in_any_state_changes_nothing(mode, attack, untracked, proxy, capfd, monkeypatch, tmp_path):
    from mlflow import MlflowClient

    monkeypatch.setattr(stores, "_told", set())
    proxy.set({"away from the start": "closed", "silent": "silent"}.get(mode, "open"))

    def at(step):
        if step == 5 and "at" in mode.split():
            time.sleep(2.5)  # the steps before have been sent
            proxy.set("silent" if mode == "hangs at 5" else "closed")
        if step == 15 and mode == "back at 15":
            time.sleep(1.5)  # the silence has been noticed
            proxy.set("open")

    capfd.readouterr()
    folder, code, delay, seconds = attack(proxy.uri, at)
    err = capfd.readouterr().err
    assert code == 0
    assert losses(folder) == losses(untracked)
    assert outcome(folder) == outcome(untracked)
    assert delay <= 10
    assert seconds <= 10 + 4 + stores.ASK_S + 15
    assert err.count("warning:") == (mode != "open"), err
    assert (folder / folders.BEHIND_FILE).exists() == (mode not in ("open", "back at 15"))
    proxy.set("open")
    client = MlflowClient(proxy.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody asks this
    first = mirrored(capfd, folder, "--tracking-uri", proxy.uri)
    assert ("up to date" in first) == (mode in ("open", "back at 15")), first
    check_whole(client, folder, tmp_path)
    before = content(proxy)
    assert "up to date" in mirrored(capfd, folder, "--tracking-uri", proxy.uri)
    assert content(proxy) == before


@pytest.mark.parametrize("lr", [1e6, 1e30])
def test_numbers_that_are_not_finite(lr, attack, proxy, capfd):
    """At 1e6 the gradients of this model are NaN, and DeepSpeed would skip their steps; at 1e30 the loss is NaN."""
    proxy.set("open")
    folder, code, _, _ = attack(proxy.uri, lr=lr)
    plain, plain_code, _, _ = attack("none", lr=lr)
    assert code == plain_code == launcher.EXIT_DIVERGED
    assert outcome(folder)[0] == "diverged"
    assert outcome(folder) == outcome(plain)
    assert losses(folder) == losses(plain)
    assert None in losses(folder)[-1]  # strict JSON has no NaN
    assert "up to date" in mirrored(capfd, folder, "--tracking-uri", proxy.uri)


def start(place: Path, out: str, uri: str, tiny_folder: Path, task: Path, **kwargs) -> subprocess.Popen:
    """Start the command."""
    line = [sys.executable, "-c", "from dlrscale.cli import main; main()", "attack", "--model", str(tiny_folder)]
    line += ["--strategy", "full", "--data", str(task), "--seq-len", "32", "--steps", "150", "--num-ranks", "1"]
    line += ["--heldout-limit", "4", "--out", out, "--tracking-uri", uri]
    return subprocess.Popen(line, cwd=place, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def test_the_terminal_shows_one_warning(server, proxy, tiny_folder, task, tmp_path, capfd):
    """Two commands at once: one whose server never answers, and one whose server dies on the way."""
    silent = Proxy(*server)
    silent.set("silent")
    proxy.set("open")
    begun = time.monotonic()
    dying = start(tmp_path, "dying", proxy.uri, tiny_folder, task)
    quiet = start(tmp_path, "quiet", silent.uri, tiny_folder, task)
    steps = tmp_path / "dying" / record.STEPS_FILE
    while not (steps.exists() and len(steps.read_bytes().splitlines()) >= 5):
        assert dying.poll() is None, dying.stderr.read()
        assert time.monotonic() - begun < 120
        time.sleep(0.02)
    proxy.set("closed")
    errors = {"dying": dying.communicate(timeout=120)[1], "quiet": quiet.communicate(timeout=120)[1]}
    silent.set("closed")
    assert (dying.returncode, quiet.returncode) == (0, 0), errors
    for name, err in errors.items():
        assert err.count("warning:") == 1, err
        folder = tmp_path / name
        assert re.search(rf"dlrscale mirror ({re.escape(str(folder))}|FOLDER)", err), err
        assert (folder / "ranks.log").read_text().count("warning:") == 1
    proxy.set("open")
    assert "2 added to" in mirrored(capfd, tmp_path, "--tracking-uri", proxy.uri)
    assert "2 up to date" in mirrored(capfd, tmp_path, "--tracking-uri", proxy.uri)


def test_a_killed_process_leaves_no_run_that_is_running(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking.prepare(uri)
    code = (
        "import sys, time; from dlrscale import tracking\n"
        "t = tracking.Tracker(sys.argv[1], 'dlrscale', 'r', config={}, tags={'resume_id': 'x'})\n"
        "t.log_step({'loss/train': 1.0}, 1); time.sleep(60)"
    )
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    process = subprocess.Popen([sys.executable, "-c", code, uri])
    try:
        runs, until = [], time.monotonic() + 60
        while not (runs and runs[0].data.metrics) and time.monotonic() < until:
            experiment = client.get_experiment_by_name("dlrscale")
            runs = client.search_runs([experiment.experiment_id]) if experiment else []
            time.sleep(0.1)
        assert runs[0].info.status == "RUNNING"
        assert tracking.sweep(uri) == []
    finally:
        process.kill()
        process.wait()
    assert tracking.sweep(uri) == [runs[0].info.run_id]
    assert client.get_run(runs[0].info.run_id).info.status == "KILLED"


def test_two_jobs_may_make_a_store_at_once(tmp_path):
    code = "import sys; from dlrscale import tracking; tracking.prepare(sys.argv[1])"
    uri = f"sqlite:///{tmp_path}/results/mlflow.db"
    line = [sys.executable, "-c", code, uri]
    both = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[1] for process in both] == ["", ""]
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == ["mlartifacts", "mlflow.db"]
    assert stores.is_made(tmp_path / "results" / "mlflow.db")
