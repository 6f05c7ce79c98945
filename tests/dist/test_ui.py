"""MLflow's pages, opened by the command's own function in a process of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from dlrscale import tracking
from dlrscale.tracking import pages



def free_port():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as probe:
        return probe.getsockname()[1]


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def members(group):
    """Processes of a process group that are not zombies."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as file:
            state, _, its_group = file.read().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(entry))
    return found


@pytest.mark.dist
def test_serve_answers_and_leaves_no_process(tmp_path_factory, tmp_path):
    store = f"sqlite:///{tmp_path_factory.mktemp('a store') / 'mlflow.db'}"
    tracking.prepare(store)
    port = free_port()
    code = f"from dlrscale.tracking import serve; serve({store!r}, port={port})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert f"http://127.0.0.1:{port}" in lines[1]
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
        (leader,) = children(process.pid)
        assert 2 <= len(members(leader)) <= 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.stdout.close()
    assert members(leader) == []
    assert pages._port_fault("127.0.0.1", port) is None
    assert list(tmp_path.iterdir()) == []
