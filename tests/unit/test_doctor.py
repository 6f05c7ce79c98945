"""Each fault of a machine is named by `dlrscale doctor` with its mend, and a bug report tells no secret."""

import errno
import http.server
import importlib
import os
import resource
import shutil
import threading
import time
from pathlib import Path

import pytest

from dlrscale import cli, engine, launcher

doctor = importlib.import_module("dlrscale.cli.doctor")  # the package's own `doctor` is the command


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty current folder, on the CPU."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def find(check, *args):
    """The findings of a check by level."""
    found = {"ok": [], "warn": [], "FAIL": []}
    for finding in check(*args):
        found[finding.level].append(f"{finding.text} -> {finding.mend}")
    return found


def only(check, level, *parts):
    """The one finding that is not ok, with all parts in it and a mend."""
    found = find(check)
    wrong = found["warn"] + found["FAIL"]
    assert len(wrong) == len(found[level]) == 1, found
    assert all(part in wrong[0] for part in parts), wrong
    assert not wrong[0].endswith("-> ")


def test_all_is_well_here(here):
    for check in (doctor.packages, doctor.devices, doctor.launch_program, doctor.network, doctor.compiling):
        found = find(check)
        assert found["ok"], check
        assert not found["FAIL"] + found["warn"], found
    assert not list(here.iterdir())


def test_packages_that_are_old_or_missing(monkeypatch):
    needed = ["torch>=99", "no-such-package>=1", "click>=1", 'unneeded>=1; extra == "test"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needed)
    found = find(doctor.packages)
    assert len(found["FAIL"]) == 2
    assert ">=99 is needed -> pip install -c constraints.txt 'torch>=99'" in found["FAIL"][0]
    assert found["FAIL"][1].startswith("no-such-package is not installed -> pip install")
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: [])
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.8.1")
    only(doctor.packages, "FAIL", "Python 3.8.1", ">=3.10 is needed", "newer Python")


def test_a_package_that_is_not_installed(monkeypatch):
    def missing(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", missing)
    only(doctor.packages, "warn", "not installed", "pip install -e .")


def test_an_accelerator_that_is_not_there(monkeypatch):
    import torch

    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    only(doctor.devices, "FAIL", "runs go to: cuda", "torch sees none", "DS_ACCELERATOR=cpu")


def test_no_launcher(monkeypatch):
    monkeypatch.setattr(launcher, "deepspeed", lambda: "/nowhere/deepspeed")
    only(doctor.launch_program, "FAIL", "neither beside this Python nor on PATH", "pip install")
    only(doctor.ranks, "FAIL", "the launcher did not start", "pip install")


def test_ranks_that_do_not_answer(here, monkeypatch):
    script = here / "deepspeed"
    script.write_text("#!/bin/sh\necho first\necho gloo said no >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(launcher, "deepspeed", lambda: str(script))
    only(doctor.ranks, "FAIL", "2 ranks did not answer (exit code 3)", "gloo said no")
    script.write_text("#!/bin/sh\nsleep 30\n")
    monkeypatch.setattr(doctor, "RANKS_TIMEOUT_S", 0.2)
    start = time.monotonic()
    only(doctor.ranks, "FAIL", "no answer after 0.2 s")
    assert time.monotonic() - start < 10


def test_no_compiler_matters_only_on_a_gpu(here, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(launcher, "environment", lambda ranks: {"PATH": str(here)})
    monkeypatch.setenv("PATH", str(here))
    found = find(doctor.compiling)
    assert not found["warn"] + found["FAIL"]
    assert "no C++ compiler" in found["ok"][0]
    only(doctor.build, "FAIL", "no C++ compiler", "Install g++")
    monkeypatch.setattr(engine, "device_type", lambda: "cuda")
    monkeypatch.setattr(engine, "cuda_toolkit", lambda: None)
    found = find(doctor.compiling)["warn"]
    assert [text.partition(" -> ")[2] for text in found] == [
        "Install g++ to have it.",
        "pip install ninja",
        "Install torch's own, or set CUDA_HOME.",
    ]


def test_the_cpu_adam_is_found_where_torch_builds_it(here, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert engine.cpu_adam().parent == Path(cpp_extension._get_build_directory("cpu_adam", False))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(here / "ext"))
    assert engine.cpu_adam().parent == Path(cpp_extension._get_build_directory("cpu_adam", False))
    assert "is not built" in find(doctor.compiling)["ok"][-1]
    engine.cpu_adam().touch()
    assert f"is built: {here / 'ext'}" in find(doctor.compiling)["ok"][-1]


@pytest.mark.skipif(not shutil.which("c++"), reason="no compiler")
def test_a_build_that_fails_shows_the_compiler_s_words(monkeypatch, capfd):
    def fail():
        os.system("echo error: no such header >&2")
        raise RuntimeError("ninja: build stopped")

    monkeypatch.setattr(engine, "build_cpu_adam", fail)
    only(doctor.build, "FAIL", "did not build", "error: no such header", "ninja: build stopped")
    monkeypatch.setattr(engine, "build_cpu_adam", lambda: os.system("echo noise") or 3.0)
    assert "in 3 s" in find(doctor.build)["ok"][0]
    assert capfd.readouterr().out == ""


def test_caches_that_cannot_be_written(here, monkeypatch):
    (here / "file").touch()
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("HOME", str(here / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "file" / "cache"))
    monkeypatch.setenv("HF_HOME", str(here / "hub"))
    monkeypatch.setenv("TMPDIR", str(here / "missing"))
    found = find(doctor.places)
    text = "\n".join(found["warn"])
    for name, mend in (("HOME", "temporary folder"), ("cache", "XDG_CACHE_HOME"), ("TORCH_EXTENSIONS_DIR", "set TORCH"),
                       ("TMPDIR", "does not exist -> Make it")):  # fmt: skip
        assert f"{name} {here}" in text
        assert mend.lower() in text.lower()
    assert f"hub cache {here / 'hub'}" in found["ok"][0]
    assert not (here / "hub").exists()


def test_little_room(here, monkeypatch):
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage._replace(free=1 << 20))
    only(doctor.disk, "warn", "0.0 GiB of disk free", "larger disk")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage._replace(free=1 << 40, total=64 << 20))
    monkeypatch.setattr(engine, "device_type", lambda: "cuda")
    only(doctor.disk, "warn", "/dev/shm of 64 MiB", "--shm-size")


def test_a_current_folder_that_cannot_be_written(here, monkeypatch):
    (here / "results").touch()
    only(doctor.disk, "FAIL", "results cannot be written", "Give --out")


def test_limits(monkeypatch):
    def under(number, value, *parts):
        before = resource.getrlimit(number)
        resource.setrlimit(number, (value, before[1]))
        try:
            only(doctor.limits, "warn", *parts)
        finally:
            resource.setrlimit(number, before)

    monkeypatch.setattr(doctor, "LOW_MEMORY_BYTES", 0)
    under(resource.RLIMIT_NOFILE, 200, "200 open files allowed", "ulimit -n")
    under(resource.RLIMIT_FSIZE, 1 << 30, "no file may grow beyond 1.00 GiB", "ulimit -f unlimited")
    monkeypatch.setattr(doctor, "memory_limits", lambda: iter([("control group", 2 << 30)]))
    monkeypatch.setattr(doctor, "LOW_MEMORY_BYTES", 4 << 30)
    only(doctor.limits, "warn", "limited by control group 2.0 GiB", "raise the limit")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert any("OMP_NUM_THREADS=7" in text for text in find(doctor.limits)["ok"])


def test_ulimits_of_memory_are_seen():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 45, before[1]))
    try:
        assert ("ulimit -d", 1 << 45) in list(doctor.memory_limits())
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_mlflow_stores(here):
    assert "turned off" in find(doctor.mlflow_store, "none")["ok"][0]
    assert f"{here}/results/mlflow.db (made by the first run)" in find(doctor.mlflow_store, None)["ok"][0]
    assert "MLflow cannot track there" in find(doctor.mlflow_store, "file:./mlruns")["FAIL"][0]
    (here / "text.db").write_text("no database")
    assert "it is no SQLite file" in find(doctor.mlflow_store, "sqlite:///text.db")["warn"][0]
    assert "does not work" in find(doctor.mlflow_store, "sqlite:///text.db/below/mlflow.db")["warn"][0]
    silent = find(doctor.mlflow_store, f"http://me:secret@127.0.0.1:{launcher.free_port()}")["warn"][0]
    assert "no MLflow server answers at http://me:***@127.0.0.1" in silent
    assert "Runs go on without it" in silent
    assert sorted(p.name for p in here.iterdir()) == ["text.db"]


def test_an_mlflow_server_that_answers():
    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = find(doctor.mlflow_store, f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert not found["warn"] + found["FAIL"]


def test_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert any("HF_HUB_OFFLINE" in text and "hub's cache" in text for text in find(doctor.network)["ok"])

    def refuse(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(doctor.socket, "create_server", refuse)
    only(doctor.network, "FAIL", "no port on 127.0.0.1", "firewall")


def test_hostfile(here, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "no such file" in find(doctor.hosts, "missing")["FAIL"][0]
    (here / "hosts").write_text("localhost slots=2\nno-such-host.invalid slots=4\n")
    found = find(doctor.hosts, "hosts")
    assert found["ok"] == ["hostfile: 2 hosts, 6 ranks -> "]
    assert "no-such-host.invalid has no address" in found["FAIL"][0]
    assert "pdsh" in found["FAIL"][1]
    (here / "hosts").write_text("host slots=x\n")
    assert "hosts:1" in find(doctor.hosts, "hosts")["FAIL"][0]


def test_the_bug_report_tells_no_secret(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "homes" / "ann"))
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    monkeypatch.setenv("HF_HOME", f"{here}/homes/ann/hub")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", f"{here}/ext")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:pa55@example.org/x")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pa55")
    monkeypatch.setenv("DS_SKIP_CUDA_CHECK", "1")
    monkeypatch.setenv("CUDA_HOME", "/home/bob/cuda:/root/x:/rooted")
    text = doctor.bug_report()
    for secret in ("hf_abcdef", "pa55", "bob", str(here), "/root/"):
        assert secret not in text
    for part in ("HF_TOKEN=(set, not shown)", "DS_SKIP_CUDA_CHECK=1", "deepspeed 0", "device: cpu x 1", "platform: ",
                 "CUDA_HOME=~/cuda:~/x:/rooted",
                 "https://ann:***@example.org/x", "TORCH_EXTENSIONS_DIR=./ext"):  # fmt: skip
        assert part in text, part
    assert "PATH=" not in text.replace("LD_LIBRARY_PATH=", "")


def test_the_command(monkeypatch, capsys):
    """Exit 0 with all sections; --quick starts no rank; a check that breaks is a finding, and ends in 4."""
    calls = []
    monkeypatch.setattr(doctor, "ranks", lambda: calls.append(1) or iter([doctor.Finding("ok", "two ranks")]))

    def call(*options):
        with pytest.raises(SystemExit) as stop:
            cli.main(["doctor", "--tracking-uri", "none", *options])
        return stop.value.code, *capsys.readouterr()

    code, out, err = call("--quick")
    assert (code, err, calls) == (0, "", [])
    assert all(
        f" {name} " in out for name in ("packages", "devices", "launcher", "places", "disk", "limits", "network")
    )
    assert "for a bug report" in out
    code, out, _ = call()
    assert (code, calls) == (0, [1])
    assert "two ranks" in out

    def broken():
        raise ValueError("odd")
        yield

    monkeypatch.setattr(doctor, "disk", broken)
    monkeypatch.setattr(launcher, "deepspeed", lambda: "/nowhere/deepspeed")
    code, out, err = call("--quick")
    assert code == 4
    assert "FAIL  disk      the check broke: ValueError: odd" in out
    assert "-> pip install -c constraints.txt deepspeed" in out
    assert err == "Error: 2 of the checks failed. Mend what the lines with FAIL say.\n"
