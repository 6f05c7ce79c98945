"""Jobs where the machine is odd: no home, no compiler, folders that cannot be written, hostile names, a full disk.

Starts of ranks are dear, so each one carries several faults.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import commands
import pytest

from dlrscale import engine, launcher, models, record
from dlrscale.config import LockConfig

pytestmark = pytest.mark.dist

ROOT = Path(__file__).resolve().parents[2]
OUT, NAME, MODEL, HERE = 'o u\'t "x" $HOME;{"a":1}', "-4C, ünï", "mo del, x", "he 're \"q\" 100% #"
LAYERS = "0-2,4"
TEXT = "\n".join(" ".join("the cat sat on a mat and saw two dogs".split()[(i + j * 3) % 10] for j in range(40))
                 for i in range(60))  # fmt: skip


def start(options: list[str], cwd: Path, env: dict[str, str], front: list[str] = ()) -> subprocess.Popen:
    """Start the command in a folder."""
    line = [*front, sys.executable, "-c", "from dlrscale.cli import main; main()", *options]
    return subprocess.Popen(line, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """Wait for a command that is to end with some code; what it said."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, out[-2000:] + err[-2000:]
    return out, err


def last(folder: Path) -> dict:
    """The newest record of a run."""
    return list(record.read_lines(folder / record.RECORDS_FILE))[-1]


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment on the CPU, changed; None takes a variable away."""
    return commands.environment(**{"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | changes)


def works(*line: str) -> bool:
    """Whether a program can be run here."""
    return bool(shutil.which(line[0])) and subprocess.run(line, capture_output=True, timeout=20).returncode == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_llama, tokenizer) -> Path:
    """A current folder of a hostile name, with a model of 5 layers and a text."""
    folder = tmp_path_factory.mktemp("environment") / HERE
    model = make_llama(num_hidden_layers=5)
    model.save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)
    (folder / "text.txt").write_text(TEXT)
    return folder


def lock(out: str, *more: str) -> list[str]:
    """Options of a short lock on one rank."""
    return [
        "lock", "--model", MODEL, "--data", "text.txt", "--depth", "4", "--num-ranks", "1", "--seq-len", "32",
        "--micro-batch", "2", "--steps", "3", "--heal-steps", "1", "--heldout-limit", "4", "--out", out, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pair(place: Path, tmp_path_factory) -> dict[str, Path]:
    """The same lock by the command and by its dry-run line in bash, at once, each in an environment of its own.

    The command: a user without a home or an entry, no compiler, no TMPDIR, offline. The line: a home and a package
    folder that cannot be written, and a parent that has touched 1 GiB.
    """
    other = tmp_path_factory.mktemp("other")
    bare = other / "bin"
    bare.mkdir()
    for name in ("env", "bash", "git", "hostname"):
        if shutil.which(name):
            (bare / name).symlink_to(shutil.which(name))
    homeless = environment(
        HOME=None, USER=None, LOGNAME=None, XDG_CACHE_HOME=None, CXX=None, PATH=str(bare), TMPDIR="/missing/tmp",
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    nobody = [shutil.which("unshare") or "unshare", "-U", "--map-user=12345"]
    nobody = nobody if works(*nobody, sys.executable, "-c", "0") else []
    options = [f"--name={NAME}", f"--layers={LAYERS}"]

    shown, _ = end(start(lock(OUT + "2", *options, "--dry-run"), place, homeless, nobody))
    line = shown.rstrip("\n").splitlines()[-1]
    assert not (place / (OUT + "2")).exists()

    package, home = other / "package", other / "home"
    shutil.copytree(ROOT / "dlrscale", package / "dlrscale", ignore=shutil.ignore_patterns("__pycache__"))
    line = line.replace(shlex.quote(str(ROOT / "dlrscale")), shlex.quote(str(package / "dlrscale")))
    line = line.replace(str(ROOT / "dlrscale" / "jobs"), str(package / "dlrscale" / "jobs"))
    home.mkdir()
    for folder in (home, *(p for p in package.rglob("*") if p.is_dir()), package):
        folder.chmod(0o555)
    front = ["setpriv", "--inh-caps=-dac_override", "--bounding-set=-dac_override"]
    front = front if os.geteuid() == 0 and works(*front, "true") else []
    parent = "import subprocess, sys; x = bytearray(1 << 30); x[::4096] = b'1' * (1 << 18); sys.exit(subprocess.call(sys.argv[1:]))"
    second = subprocess.Popen(
        [sys.executable, "-c", parent, *front, "bash", "-c", line], cwd=other, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
        env=environment(HOME=str(home), XDG_CACHE_HOME=None, PYTHONPATH=str(package), PYTHONDONTWRITEBYTECODE=None),
    )  # fmt: skip
    first = start(lock(OUT, *options), place, homeless, nobody)
    said = end(first)
    assert "warning" not in said[1], said[1]
    log, _ = second.communicate(timeout=200)
    assert second.returncode == 0, log[-3000:]
    yield {"command": place / OUT, "pasted": place / (OUT + "2"), "package": package, "home": home}
    for folder in (home, *(p for p in package.rglob("*") if p.is_dir()), package):
        folder.chmod(0o755)


@pytest.mark.parametrize("way", ["command", "pasted"])
def test_names_arrive_byte_for_byte(pair: dict, place: Path, way: str) -> None:
    """Name, layers, folders and the typed command stand in the record and the manifest as they were given."""
    entry = last(pair[way])
    assert entry["outcome"] == "ok"
    assert entry["name"] == NAME
    assert entry["config"]["layers"] == LAYERS
    assert entry["config"]["model"] == MODEL
    assert entry["config"]["out"] == pair[way].name
    words = shlex.split(entry["config"]["command"])
    assert words[words.index("--model") + 1] == MODEL
    assert words[words.index("--out") + 1] == pair[way].name
    assert f"--name={NAME}" in words
    manifest = json.loads((pair[way] / "model" / "lock.json").read_text())
    assert manifest["layers"] == [0, 1, 2, 4]
    assert manifest["base"]["name"] == MODEL
    models.check_folder(pair[way] / "model")


def test_both_ways_are_the_same_run(pair: dict) -> None:
    """One id, and the same losses, though both ran at once in other environments."""
    first, second = last(pair["command"]), last(pair["pasted"])
    assert first["id"] == second["id"]
    keys = [key for key in first["metrics"] if key.startswith(("loss/", "lock/"))]
    assert keys
    assert {key: first["metrics"][key] for key in keys} == {key: second["metrics"][key] for key in keys}


def test_nothing_is_left_in_odd_places(pair: dict, place: Path) -> None:
    """No folder called `~` or `$HOME`; the home and the package are as they were."""
    assert sorted(p.name for p in place.iterdir()) == sorted([MODEL, "text.txt", "results", OUT, OUT + "2"])
    assert not list(pair["home"].iterdir())
    assert not list(pair["package"].rglob("__pycache__"))


def test_mlflow_takes_runs_without_a_home(pair: dict, place: Path) -> None:
    """Both runs stand in one store, whose path has blanks, quotes and a sharp in it."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(place / "results" / "mlflow.db")) as database:
        names = database.execute("SELECT name, status FROM runs").fetchall()
    assert names == [(NAME, "FINISHED")] * 2


def test_the_parent_s_memory_is_not_the_run_s(pair: dict) -> None:
    """C29: a parent of 1 GiB and one without give the same host peak within 5 %."""
    first, second = (last(pair[way])["metrics"]["memory/host_peak_rss_bytes"] for way in ("command", "pasted"))
    assert second == pytest.approx(first, rel=0.05)
    assert second < 1 << 30


# --- A full disk ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Path, list[str], object]]:
    """A folder with room for one checkpoint, what goes before a command there, and how to make the room larger.

    A tmpfs where one can be mounted; else no file may be as large as a checkpoint's.
    """
    folder.mkdir()
    if not works("mount", "-t", "tmpfs", "-o", "size=700k", "none", str(folder)):
        yield folder, ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash"], lambda: None
        return
    try:
        yield folder, [], lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_message_and_the_same_command_goes_on(place: Path, tmp_path: Path) -> None:
    """What was whole stays whole; after space was freed, the run ends as if nothing had been."""
    with small_disk(tmp_path / "disk") as (disk, front, enlarge):
        options = lock(str(disk / "run"), "--tracking-uri", "none", "--steps", "4", "--checkpoint-every", "1")
        _, said = end(start(options, place, environment(), front), 4)
        message = said[said.index("Error: ") :]
        assert message.count("No space left") == 1, message
        assert "run the same command again" in message
        assert "Traceback" not in message
        kept = engine.checkpoints(disk / "run" / "checkpoints")
        assert not list((disk / "run").glob("checkpoints/tmp-*"))
        assert not (disk / "run" / "model").exists()
        assert last(disk / "run")["outcome"] == "failed"
        assert "No space left" in last(disk / "run")["error"]
        if not front:
            assert kept == [1]
            assert len(list(record.read_lines(disk / "run" / record.STEPS_FILE))) == 2
        enlarge()
        _, said = end(start(options, place, environment()))
        entry = last(disk / "run")
        assert entry["outcome"] == "ok"
        steps = [row["step"] for row in record.read_lines(disk / "run" / record.STEPS_FILE)]
        assert steps == [1, 2, 3, 4, 5]
        models.check_folder(disk / "run" / "model")


# --- A port that was taken --------------------------------------------------------------------------------------


def test_a_port_that_was_taken_is_chosen_once_more(tmp_path: Path, monkeypatch) -> None:
    """Two starts after the words of torch's own error, one after any other."""
    from torch.distributed import TCPStore

    with contextlib.closing(socket.create_server(("0.0.0.0", 0))) as server:
        with pytest.raises(RuntimeError) as error:
            TCPStore("127.0.0.1", server.getsockname()[1], is_master=True)
    count = tmp_path / "count"
    for words, starts, code in ((str(error.value), 2, 0), ("some other fault", 1, 1)):
        script = f"echo x >> {count}; [ $(wc -l < {count}) = 2 ] && exit 0; echo {shlex.quote(words)} >&2; exit 1"
        monkeypatch.setattr(launcher, "start_line", lambda config, script=script: ["bash", "-c", script])
        config = LockConfig(model="/m", data="/d", out=str(tmp_path / f"out{starts}"))
        assert launcher.run(config) == code
        assert len(count.read_text().splitlines()) == starts
        count.unlink()


# --- Doctor -----------------------------------------------------------------------------------------------------


def test_doctor_starts_two_ranks(tmp_path: Path) -> None:
    """All checks on this machine, with real ranks, without a compiler or a home; nothing is written."""
    env = environment(HOME=None, CXX=None, PATH="/nowhere")
    out, _ = end(start(["doctor", "--tracking-uri", "none"], tmp_path, env))
    assert "2 ranks started by the launcher answered" in out
    assert "no C++ compiler" in out
    assert "FAIL" not in out
    assert not list(tmp_path.iterdir())
