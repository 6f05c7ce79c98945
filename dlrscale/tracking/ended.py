"""Runs that have ended, or whose process has: their MLflow run is made, completed or ended from their folder."""

from __future__ import annotations

import socket
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlrscale.errors import JobError
from dlrscale.tracking import folder as folders
from dlrscale.tracking.mirror import TAG, Deleted, Mirror, place_tag, status_of
from dlrscale.tracking.store import bounded, first_line, is_made, make_ready, quiet, resolve, sqlite_path, warn_once

SWEEP_S = 10.0
STATES = ("added to", "up to date", "running", "deleted")


@dataclass(frozen=True)
class Replayed:
    """What became of one run: `state` is one of `STATES`.

    A run that still goes on is left to its own process, and one that was deleted in MLflow stays deleted.
    """

    folder: Path
    state: str
    status: str | None = None
    run_id: str | None = None
    added: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.state == "running":
            return "still running: left to its own process"
        if self.state == "deleted":
            return "deleted in MLflow: left so (restore it there to mirror it again)"
        if self.state == "up to date":
            return "up to date"
        counts = [f"{count} {key}" for key, count in self.added.items() if key in ("points", "parameters", "files")]
        return f"added {', '.join(counts) or 'what was missing'}; {self.status}"


def replay(folder: Path, uri: str | None = None) -> Replayed:
    """Make or complete the MLflow run of one run folder; what MLflow has already is not sent again.

    Args:
        folder: A folder that a run wrote.
        uri: URI of the store; null for the default one.

    Returns:
        What was added.

    Raises:
        ConfigError: If no run began in the folder, or MLflow has no such store.
        JobError: If the store does not answer, or fails on the way; the next replay goes on.
    """
    uri, folder = resolve(uri), Path(folder)
    run = folders.read(folder)
    # A process of another host cannot be seen from here: a run of it that left no record counts as running.
    alive = folders.is_alive(run.process)
    if not run.ended and (alive or (alive is None and run.process)):
        return Replayed(folder, "running", "RUNNING")
    status = status_of(run.entry) if run.ended else "KILLED"
    rows = folders.rows(folder, run.entry)
    started = folders.started_ms(run.entry)
    seconds = sum((phase or {}).get("seconds") or 0 for phase in (run.entry.get("phases") or {}).values())
    ended = max(started + int(1000 * seconds), rows[-1][2] if rows else started)
    named = folders.naming(run.entry, folder)
    named["tags"] |= run.process
    mirror, problems = Mirror(uri, **named, status=status, span_ms=(started, ended)), []
    quiet()
    try:
        mirror.start()
        files = folders.files(folder)
        if not mirror.is_sealed(run.entry, files):
            mirror.send(deque(rows))
            mirror.end(run.entry, files, warn=problems.append)
    except Deleted:
        return Replayed(folder, "deleted")
    except JobError:
        raise
    except Exception as error:
        problems.append(error)
    if problems:
        reason = first_line(problems[0])
        raise JobError(f"MLflow does not take all of {folder} ({reason}). Mirror it again later.") from problems[0]
    folders.clear_behind(folder, uri)
    added = {key: count for key, count in mirror.added.items() if count}
    return Replayed(folder, "added to" if added else "up to date", status, mirror.run_id, added)


def replay_quietly(folder: Path, uri: str | None = None, patience_s: float = 15.0) -> Replayed | None:
    """Replay a run within some seconds; failure costs one warning, and nothing is raised.

    Args:
        folder: A folder that a run wrote.
        uri: URI of the store; null for the default one.
        patience_s: The longest to wait, in seconds.

    Returns:
        What was added, or null if it failed or was not done in time.
    """
    try:
        return bounded(lambda: replay(folder, uri), patience_s)
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        warn_once(uri or "(default)", reason, folder)
        folders.set_behind(Path(folder), uri or "(default)", reason)
        return None


def sweep_soon(uri: str) -> None:
    """Sweep in the background, in a process that imports nothing large meanwhile: imports in two threads can clash."""
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
