"""How a job's processes end: an interrupt, SIGTERM, and ranks that do not listen."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dlrscale import launcher, record
from dlrscale.config import LockConfig
from dlrscale.errors import JobError

pytestmark = pytest.mark.dist
PLACES = {"model": "/m", "data": "/d", "out": "/o"}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Let the launch line be a shell script that may write its children's pids into `pids`."""
    pids = tmp_path / "pids"

    def make(script, count=0):
        monkeypatch.setattr(launcher, "start_line", lambda config: ["bash", "-c", script.replace("PIDS", str(pids))])
        monkeypatch.setattr(launcher, "environment", lambda ranks: dict(os.environ))
        config = LockConfig(**(PLACES | {"out": str(tmp_path / "out")}))

        def found():
            return [int(p) for p in pids.read_text().split()] if pids.exists() else []

        return config, found

    return make


def gone(pids, patience=5.0):
    """Whether all processes have ended (a zombie that nobody has reaped yet has ended)."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        alive = []
        for pid in pids:
            try:
                with open(f"/proc/{pid}/stat") as file:
                    if file.read().rpartition(")")[2].split()[0] != "Z":
                        alive.append(pid)
            except FileNotFoundError:
                pass
        if not alive:
            return True
        time.sleep(0.05)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    return False


def interrupt_when(found, count):
    def watch():
        end = time.monotonic() + 10
        while len(found()) < count and time.monotonic() < end:
            time.sleep(0.02)
        assert len(found()) == count
        raise KeyboardInterrupt

    return watch


CHILDREN = "sleep 60 & echo $! >> PIDS; sleep 60 & echo $! >> PIDS; echo $$ >> PIDS; wait"


def test_the_exit_code_and_the_log(job, tmp_path):
    config, _ = job("echo out; echo err >&2; exit 11")
    assert launcher.run(config) == launcher.EXIT_OOM
    assert launcher.tail(tmp_path / "out" / "ranks.log") == "out\nerr"
    assert launcher.run(config) == 11
    assert launcher.tail(tmp_path / "out" / "ranks.log", 3) == "err\nout\nerr"


def test_watch_is_called_meanwhile(job):
    config, _ = job("sleep 0.7")
    calls = []
    assert launcher.run(config, lambda: calls.append(1)) == 0
    assert len(calls) >= 2


def test_an_interrupt_ends_every_process(job):
    config, found = job(CHILDREN)
    with pytest.raises(KeyboardInterrupt):
        launcher.run(config, interrupt_when(found, 3))
    assert gone(found())


def test_a_failing_watch_ends_every_process(job):
    config, found = job(CHILDREN)

    def watch():
        if len(found()) == 3:
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        launcher.run(config, watch)
    assert gone(found())


def test_sigterm_ends_every_process_and_the_handler_goes_back(job):
    config, found = job(CHILDREN)
    before = signal.getsignal(signal.SIGTERM)

    def terminate():
        while len(found()) < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        launcher.run(config)
    thread.join()
    assert gone(found())
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_leader_that_ignores_sigterm_is_killed(job, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_S", 0.5)
    config, found = job("trap '' TERM; echo $$ >> PIDS; while :; do sleep 0.1; done")
    with pytest.raises(KeyboardInterrupt):
        launcher.run(config, interrupt_when(found, 1))
    assert gone(found(), 1.0)


def test_a_rank_that_ignores_sigterm_is_killed_though_the_leader_has_gone(job, monkeypatch):
    """The leader ends at once; a rank that hangs in native code stays."""
    monkeypatch.setattr(launcher, "GRACE_S", 0.5)
    config, found = job("(trap '' TERM; echo $BASHPID >> PIDS; while :; do sleep 0.1; done) & wait")
    with pytest.raises(KeyboardInterrupt):
        launcher.run(config, interrupt_when(found, 1))
    assert gone(found(), 2.0)


def test_a_launcher_that_is_not_there(job, monkeypatch):
    config, _ = job("")
    monkeypatch.setattr(launcher, "start_line", lambda config: ["/nowhere/deepspeed"])
    with pytest.raises(JobError, match="The launcher did not start"):
        launcher.run(config)


def test_deepspeed_comes_without_what_only_its_unused_parts_need():
    """Half of its time: MLflow, which a rank may still import, and torch's compiler, which others may still use."""
    code = (
        "import sys; from dlrscale.engine import devices; devices.import_deepspeed()\n"
        "assert 'deepspeed.runtime.zero.muon.muon_optimizer' in sys.modules\n"
        "assert not {'mlflow', 'torch._inductor.compile_fx'} & set(sys.modules)\n"
        "import torch; from deepspeed.runtime import compiler; assert compiler.compile() is torch.compile\n"
        "import mlflow; mlflow.MlflowClient"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


GUARDED = """
import os, sys, time
from pathlib import Path
from dlrscale.launcher.guard import Guard
guard = Guard().start()
guard.last_words = lambda reason: Path(sys.argv[1]).write_text(reason)
Path(sys.argv[1] + ".pid").write_text(str(os.getpid()))
end = time.monotonic() + 30
while time.monotonic() < end:
    pass  # a main thread that is busy
"""


@pytest.fixture
def guarded(tmp_path):
    """Start a guarded process below a shell, its launcher; returns the launcher, the process and the last words."""
    script, words = tmp_path / "rank.py", tmp_path / "words"
    script.write_text(GUARDED)

    def start(*front, **environment):
        line = f"{sys.executable} {script} {words}; true"  # `true`: the shell must stay
        root = str(Path(launcher.__file__).parents[2])
        pid_file = tmp_path / "words.pid"
        pid_file.unlink(missing_ok=True)
        launched = subprocess.Popen([*front, "sh", "-c", line], env=os.environ | {"PYTHONPATH": root} | environment)
        end = time.monotonic() + 20
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < end:
            time.sleep(0.02)
        return launched, int(pid_file.read_text()), words

    return start


def test_a_rank_ends_with_its_launcher(guarded):
    launched, pid, words = guarded()
    launched.kill()
    launched.wait()
    assert gone([pid])
    assert words.read_text() == "the launcher that started this rank has gone"


def test_a_rank_ends_with_the_runner_of_its_launcher(guarded, tmp_path):
    """A direct launch has one; killed alone, it leaves the launcher behind."""
    program = tmp_path / "deepspeed"
    program.write_text("import subprocess, sys; subprocess.run(sys.argv[1:])")
    runner, pid, words = guarded(sys.executable, str(program))
    runner.kill()
    runner.wait()
    assert gone([pid])
    assert words.read_text() == "the deepspeed runner that started this rank has gone"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_rank_whatever_it_does(number, guarded):
    launched, pid, words = guarded()
    os.kill(pid, number)
    assert gone([pid], 3.0)
    assert words.read_text() == f"ended by {number.name}"
    launched.wait()


def test_a_rank_leaves_the_record_to_a_command_that_lives(guarded):
    command = subprocess.Popen(["sleep", "60"])
    launched, pid, words = guarded(DLRSCALE_COMMAND=f"{command.pid} {record.process_started(command.pid)}")
    os.kill(pid, signal.SIGTERM)
    assert gone([pid], 3.0)
    assert not words.exists()
    launched.wait()
    launched, pid, words = guarded(DLRSCALE_COMMAND=f"{command.pid} {record.process_started(command.pid)}")
    command.kill()  # and it is not waited for: a zombie has gone
    assert gone([pid], 5.0)
    assert words.read_text() == "the dlrscale command that started this rank has gone"
    command.wait()
    launched.wait()


def test_an_ignored_hangup_stays_ignored(guarded):
    """`nohup` lets a job live on when its terminal goes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        launched, pid, words = guarded()
        os.kill(pid, signal.SIGHUP)
        time.sleep(0.5)
        assert not words.exists()
        os.kill(pid, signal.SIGTERM)
        assert gone([pid], 3.0)
        launched.wait()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("code", "name"), [(247, "SIGKILL"), (241, "SIGTERM"), (143, "SIGTERM"), (-9, "SIGKILL"),
                                            (250, "SIGABRT"), (255, None), (0, None), (1, None), (2, None), (11, None), (12, None)])  # fmt: skip
def test_the_signal_in_an_exit_code(code, name):
    assert launcher.signal_of(code) == name


def test_the_leader_alone_is_killed(job):
    """DeepSpeed's launcher may be killed: what it has started stays in its group and is ended."""
    config, found = job(CHILDREN)

    def kill_leader():
        while len(found()) < 3:
            time.sleep(0.02)
        os.kill(found()[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill_leader)
    thread.start()
    assert launcher.run(config) == -9
    thread.join()
    assert gone(found())
