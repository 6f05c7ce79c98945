"""MLflow's own pages on a store, in a process group that ends as a whole."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from urllib import request as urllib_request
from urllib.parse import urlsplit

from dlrscale.errors import ConfigError, JobError
from dlrscale.tracking.ended import sweep_soon
from dlrscale.tracking.store import resolve, shown, sqlite_path

START_S = 90.0


def serve(uri: str, host: str = "127.0.0.1", port: int = 5000) -> None:
    """Show a store in MLflow's own pages until Ctrl+C or a SIGTERM; leaves no process behind.

    Args:
        uri: URI of the store.
        host: Address to listen on.
        port: Port to listen on.

    Raises:
        ConfigError: If the SQLite file is not there, the store is a server already, or the port is taken.
        JobError: If the pages' server ends by itself.
    """
    uri = resolve(uri)
    faults = _faults(uri, host, port)
    if faults:
        raise ConfigError(faults)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    ended = threading.Event()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda *_: ended.set())
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"Starting MLflow's pages at {address} (about 10 s) ...", flush=True)
    sweep_soon(uri)
    # What MLflow says goes to stderr: stdout is for the address.
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=2)
    try:
        _wait_served(process, address, ended)
        while not ended.wait(0.3):
            if process.poll() is not None:
                raise JobError(f"mlflow ui ended by itself with code {process.returncode}; its output is above.")
    except KeyboardInterrupt:
        pass
    finally:
        _end_group(process)
        for number, handler in before.items():
            signal.signal(number, handler)


def _faults(uri: str, host: str, port: int) -> list[str]:
    """Why a store cannot be shown at an address; empty when it can."""
    path, found = sqlite_path(uri), []
    if path is not None and not path.is_file():
        found.append(
            f"No MLflow store at {path}: no run has been tracked there yet. Run one first, or name another "
            "with --tracking-uri."
        )
    if urlsplit(uri).scheme in ("http", "https"):
        found.append(f"{shown(uri)} is a server that shows its own pages: open it in a browser.")
    if not 1 <= port <= 65535:
        return [*found, f"--port {port}: must be from 1 to 65535."]
    fault = _port_fault(host, port)
    if fault:
        free = next((p for p in range(port + 1, min(port + 200, 65536)) if not _port_fault(host, p)), None)
        mend = f" Port {free} is free: --port {free}." if free else " Choose another --port."
        found.append(f"--port {port} on {host} cannot be used ({fault}).{mend}")
    return found


def _port_fault(host: str, port: int) -> str | None:
    """Why a port cannot be listened on, or null if it can."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        return error.strerror or str(error)
    return None


def _wait_served(process: subprocess.Popen, address: str, ended: threading.Event) -> None:
    """Wait until the pages answer, then say so."""
    opener = urllib_request.build_opener(urllib_request.ProxyHandler({}))
    until = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until and not ended.wait(0.3):
        with suppress(OSError):
            opener.open(address + "/health", timeout=2).close()
            print(f"MLflow: {address}  (Ctrl+C ends it)", flush=True)
            return


def _end_group(process: subprocess.Popen) -> None:
    """End a process that leads a session, and all that it started: politely, then for good."""
    for number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        until = time.monotonic() + patience_s
        while time.monotonic() < until:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except (ProcessLookupError, PermissionError):
                return
            time.sleep(0.1)
