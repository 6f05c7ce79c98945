"""The launch line, and that a job's processes end with it. No DeepSpeed is started here."""

import base64
import contextlib
import gc
import json
import os
import socket
import subprocess
import sys

import pytest

from dlrscale import config as configuration
from dlrscale import launcher
from dlrscale.config import AttackConfig, LockConfig
from dlrscale.errors import ConfigError
from dlrscale.launcher import imports

HOSTILE = 'o u\'t "x" $HOME;{"a":1} `id` \\ * ä\u2028 !'
PLACES = {"model": "/m", "data": "/d", "out": "/o"}


def hostile():
    return AttackConfig(
        **(PLACES | {"out": f"/tmp/{HOSTILE}", "data": HOSTILE}), name=HOSTILE, knobs={"rank": 4},
        columns={"prompt": HOSTILE, "completion": "a\nb"},
    )  # fmt: skip


def test_the_launch_line_carries_the_configuration():
    config = hostile()
    line = launcher.command(config, port=1234)
    assert configuration.from_json(line[-1]) == config
    assert os.path.basename(line[0]) == "deepspeed"
    assert line[-2].endswith(os.path.join("dlrscale", "jobs", "__main__.py"))
    assert os.path.isfile(line[-2])
    assert all(isinstance(part, str) for part in line)


def test_the_launch_line_names_ranks_and_port():
    line = launcher.command(LockConfig(**PLACES, num_ranks=3), port=1234)
    assert line[line.index("--num_gpus") + 1] == "3"
    assert line[line.index("--master_addr") + 1] == "127.0.0.1"
    assert line[line.index("--master_port") + 1] == "1234"
    assert "--no_local_rank" in line
    free = launcher.command(LockConfig(**PLACES))
    assert 1024 <= int(free[free.index("--master_port") + 1]) < 65536


def test_without_a_hostfile_deepspeed_s_launcher_is_started_itself():
    config = hostile()
    line = launcher.start_line(config)
    assert line[:2] == [sys.executable, "-u"]
    assert os.path.isfile(line[2])
    assert configuration.from_json(line[-1]) == config
    assert line[-2] == launcher.command(config)[-2]
    options = dict(word.removeprefix("--").split("=", 1) for word in line[3:-3])
    assert json.loads(base64.urlsafe_b64decode(options.pop("world_info"))) == {"localhost": [0]}
    assert 1024 <= int(options.pop("master_port")) < 65536
    assert options == {"master_addr": "127.0.0.1"}
    assert line[-3] == "--no_local_rank"
    hosts = LockConfig(**PLACES, hostfile="/hosts of mine")
    assert launcher.start_line(hosts) == launcher.command(hosts)


def test_many_imports_leave_the_collector_as_it_was():
    for collecting in (True, False):
        (gc.enable if collecting else gc.disable)()
        with contextlib.suppress(ImportError), imports.many():
            assert not gc.isenabled()
            import nowhere_to_be_found  # noqa: F401
        found = gc.isenabled()
        gc.enable()
        assert found == collecting


def test_a_package_is_hidden_for_a_while(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hidden_once.py").write_text("")
    with imports.without("hidden_once"), pytest.raises(ImportError):
        import hidden_once
    import hidden_once  # noqa: F811

    with imports.without("hidden_once"):
        import hidden_once as again
    assert again is hidden_once


def test_a_hostfile_goes_to_the_launcher():
    line = launcher.command(LockConfig(**PLACES, hostfile="/hosts of mine"))
    assert line[line.index("--hostfile") + 1] == "/hosts of mine"
    assert "--num_gpus" not in line
    assert "127.0.0.1" not in line


def test_a_shown_line_can_be_pasted():
    line = launcher.command(hostile(), port=1)
    shown = launcher.show(line)
    out = subprocess.run(["bash", "-c", f"printf '%s\\0' {shown}"], capture_output=True, check=True).stdout
    assert out.decode().split("\0")[:-1] == line
    assert json.loads(line[-1])["name"] == HOSTILE


def test_free_port_can_be_bound():
    port = launcher.free_port()
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
    assert len({launcher.free_port() for _ in range(5)}) > 1


def test_environment_of_ranks(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launcher.os, "cpu_count", lambda: 8)
    env = launcher.environment(3)
    assert env["OMP_NUM_THREADS"] == "2"
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(launcher.Path(launcher.__file__).parents[2])
    assert launcher.environment(99)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert launcher.environment(3)["OMP_NUM_THREADS"] == "5"


def test_a_usable_home_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert launcher.usable_home() == {}


def test_a_user_without_a_home_gets_one_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(launcher.os.path, "expanduser", lambda path: path)
    home = launcher.usable_home()["HOME"]
    assert os.path.dirname(home) == str(tmp_path)
    assert os.stat(home).st_mode & 0o777 == 0o700
    assert launcher.usable_home() == {"HOME": home}
    os.chmod(home, 0o777)  # others could put code into it
    monkeypatch.setattr(launcher.tempfile, "tempdir", str(tmp_path))
    assert launcher.usable_home()["HOME"] != home


def test_caches_move_from_where_they_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "home").touch()  # nothing can be made below a file
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for key in ("XDG_CACHE_HOME", "TRITON_HOME", "HF_HOME"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("MPLCONFIGDIR", "/chosen")
    moved = launcher.usable_home()
    assert set(moved) == {"XDG_CACHE_HOME", "TRITON_HOME"}
    assert all(value.startswith(str(tmp_path / "dlrscale-")) for value in moved.values())
    # A hub's cache that can be read stays in use.
    (tmp_path / "cache" / "huggingface").mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(launcher.os, "access", lambda *args: False)
    assert launcher.usable_home()["HF_HOME"] == str(tmp_path / "cache" / "huggingface")


def test_hostfile_slots(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# ours\na slots=8\n\n  b   slots=4  # half\n")
    assert launcher.hostfile_slots(str(file)) == 12
    with pytest.raises(ConfigError, match=r"--hostfile .*missing: no such file"):
        launcher.hostfile_slots(str(tmp_path / "missing"))
    for line in ("a", "a slots=", "a slots=x", "a slot=2", "a b slots=2", "slots=2"):
        file.write_text(f"ok slots=1\n{line}\n")
        with pytest.raises(ConfigError, match=r"hosts:2: .*host slots=8"):
            launcher.hostfile_slots(str(file))


def test_tail(tmp_path):
    assert launcher.tail(tmp_path / "missing") == ""
    (tmp_path / "log").write_bytes(b"a\n\xff\nc\n")
    assert launcher.tail(tmp_path / "log", 2) == "\ufffd\nc"


def test_exit_codes_are_distinct():
    codes = (0, launcher.EXIT_OOM, launcher.EXIT_DIVERGED, launcher.EXIT_CONFIG, launcher.EXIT_FAILED)
    assert len(set(codes)) == 5
