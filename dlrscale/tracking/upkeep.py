"""What keeps a store in order: it is ready before ranks start, and no run in it is RUNNING without a process."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from dlrscale.errors import JobError
from dlrscale.tracking import folder as folders
from dlrscale.tracking.mirror import TAG, place_tag
from dlrscale.tracking.replay import replay
from dlrscale.tracking.store import bounded, is_made, make_ready, quiet, resolve, sqlite_path, warn_once

SWEEP_S = 10.0


def prepare(uri: str | None) -> None:
    """Make a store ready, once, by the process that starts the ranks; one that is away costs one warning.

    Runs of this host whose process has gone are ended meanwhile, in the background.

    Args:
        uri: URI of the store; null for the default one.

    Raises:
        ConfigError: If MLflow has no such store.
    """
    uri = resolve(uri)
    try:
        make_ready(uri)
    except JobError as error:
        warn_once(uri, error)
        return
    sweep_soon(uri)


def sweep_soon(uri: str) -> None:
    """Sweep in the background."""
    threading.Thread(target=sweep, args=(uri,), name="dlrscale-sweep", daemon=True).start()


def sweep(uri: str | None, patience_s: float = SWEEP_S) -> list[str]:
    """End the runs that MLflow shows as RUNNING, though their process on this host has gone.

    A run whose folder is there gets all that the folder holds; any other becomes KILLED. Runs of other hosts,
    and runs that others made, are left alone. Never raises.

    Args:
        uri: URI of the store; null for the default one.
        patience_s: The longest that it takes, in seconds.

    Returns:
        MLflow's ids of the runs that were ended.
    """
    ended: list[str] = []
    with suppress(Exception):
        bounded(lambda: _sweep(resolve(uri), ended), patience_s)
    return list(ended)


def _sweep(uri: str, ended: list[str]) -> None:
    path = sqlite_path(uri)
    if path is not None and not is_made(path):
        return
    make_ready(uri)
    quiet()
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    host = socket.gethostname().replace("'", "")
    experiments = [e.experiment_id for e in client.search_experiments()]
    wanted = f"attributes.status = 'RUNNING' and tags.`{TAG}host` = '{host}'"
    for run in client.search_runs(experiments, filter_string=wanted) if experiments else ():
        known = {key: run.data.tags.get(TAG + key) for key in folders.PROCESS_KEYS}
        if folders.is_alive(known) is False and _end(client, uri, run):
            ended.append(run.info.run_id)


def _end(client: Any, uri: str, run: Any) -> bool:
    """End one run, from its folder if that can be found; false where a process goes on with it."""
    place = run.data.params.get("out")
    if place and place_tag(place) == run.data.tags.get(TAG + "out"):
        with suppress(Exception):
            if replay(Path(place), uri).state == "running":
                return False
            if client.get_run(run.info.run_id).info.status != "RUNNING":
                return True
    client.set_tag(run.info.run_id, TAG + "outcome", "failed")
    client.set_terminated(run.info.run_id, "KILLED")
    return True
