"""What a run's folder tells its mirror: the description, the process, the rows, and whether the mirror is behind."""

from __future__ import annotations

import calendar
import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlrscale import record as records
from dlrscale.errors import ConfigError
from dlrscale.tracking.store import shown, warn_once

DESCRIPTION_FILE = "description.json"  # the record of a run as far as it is known at its start, and its process
BEHIND_FILE = ".mirror-behind"  # there while MLflow has not all of a run: the store, and why
EXPERIMENT = "dlrscale"
PROCESS_KEYS = ("host", "pid", "pid_started")


def process() -> dict[str, str]:
    """This process in a form that no later one has: host, pid and start time; empty on systems without /proc."""
    started = records.process_started(os.getpid())
    found = (socket.gethostname(), str(os.getpid()), str(started))
    return {} if started is None else dict(zip(PROCESS_KEYS, found, strict=True))


def is_alive(known: Mapping[str, Any]) -> bool | None:
    """Whether a process that `process` described still runs; null if it cannot be told from here."""
    if not all(known.get(key) for key in PROCESS_KEYS) or known["host"] != socket.gethostname():
        return None
    return str(records.process_started(int(known["pid"]))) == known["pid_started"]


def write_description(folder: Path, entry: Mapping[str, Any]) -> None:
    """Write down what is known of a run when it starts, so that it can be mirrored whatever becomes of it.

    Args:
        folder: The run's folder.
        entry: Its record so far, with `started`.
    """
    file = Path(folder) / records.RECORDS_FILE
    before = sum(1 for _ in records.read_lines(file)) if file.is_file() else 0
    text = records.dumps(dict(entry) | {"process": process(), "records_before": before}, default=str)
    records.write_atomic(Path(folder) / DESCRIPTION_FILE, text + "\n")


@dataclass(frozen=True)
class RunFolder:
    """One run as its folder tells it: `entry` is its record, or its description where `ended` is false."""

    entry: dict[str, Any]
    process: dict[str, Any]
    ended: bool


def read(folder: Path) -> RunFolder:
    """Read a run's last record, or the description of an attempt that was started after it and left none.

    Args:
        folder: The run's folder.

    Returns:
        The run.

    Raises:
        ConfigError: If no run was started there, or the records are of several runs.
    """
    file, begun = folder / records.RECORDS_FILE, folder / DESCRIPTION_FILE
    entries = list(records.read_lines(file)) if file.is_file() else []
    if len({entry.get("resume_id") for entry in entries}) > 1:
        raise ConfigError(f"{file} holds several runs. Name the folder that each of them wrote.")
    described: dict[str, Any] = next(iter(records.read_lines(begun)), {}) if begun.is_file() else {}
    known, before = described.pop("process", {}), described.pop("records_before", 0)
    if described and len(entries) <= before:
        return RunFolder(described, known, False)
    if not entries:
        raise ConfigError(f"{folder} holds neither {records.RECORDS_FILE} nor {DESCRIPTION_FILE}: no run began there.")
    return RunFolder(entries[-1], known, True)


def find(places: Iterable[Path]) -> list[Path]:
    """The folders of runs at and below some places, sorted, those of locks first: they are parents in MLflow.

    Args:
        places: Folders.

    Returns:
        The folders.

    Raises:
        ConfigError: If a place is no folder, or no run is below any of them.
    """
    places, marks, found = list(places), {records.RECORDS_FILE, DESCRIPTION_FILE}, {}
    for place in places:
        if not place.is_dir():
            raise ConfigError(f"No such folder: {place.absolute()}. Name the folder that a run wrote (its --out).")
        for folder, _, names in os.walk(place):
            if marks & set(names):
                found[os.path.realpath(folder)] = Path(folder)
    if not found:
        raise ConfigError(f"No run has begun below {', '.join(map(str, places))}.")

    def order(folder: Path) -> tuple[bool, Path]:
        try:
            return read(folder).entry.get("kind") != "lock", folder
        except ConfigError:
            return True, folder

    return sorted(found.values(), key=order)


def naming(entry: Mapping[str, Any], folder: Path | str) -> dict[str, Any]:
    """What a run is called in MLflow: the arguments of a Tracker or a Mirror, from its record, ended or not.

    Args:
        entry: The record or the description.
        folder: The run's folder.

    Returns:
        `experiment`, `run_name`, `config`, `tags` and `parent_lock_id`.
    """
    lock_id = entry["id"] if entry["kind"] == "lock" else entry["config"].get("lock_id")
    tags = {key: entry.get(key) for key in ("id", "resume_id", "kind", "strategy", "side")} | {"lock_id": lock_id}
    if entry["config"].get("heldout_part") == "tune":  # a trial is a child of its search
        tags |= {"search": entry["config"]["search"], "trial": f"{entry['config']['trial']}"}
    return {
        "experiment": EXPERIMENT,
        "run_name": entry["name"],
        "config": dict(entry["config"]) | {"out": os.path.realpath(folder)},
        "tags": {key: value for key, value in tags.items() if value},
        "parent_lock_id": None if entry["kind"] == "lock" else lock_id,
    }


def rows(folder: Path, entry: Mapping[str, Any]) -> list[tuple[dict[str, Any], int, int]]:
    """The step rows of a run as metrics, step and time in ms, which is the start and the times of the steps so far."""
    file = folder / records.STEPS_FILE
    stamp, found = float(started_ms(entry)), []
    for row in records.read_lines(file) if file.is_file() else ():
        stamp += 1000 * (row.get("time/step_s") or 0)
        found.append(({k: v for k, v in row.items() if "/" in k}, int(row["step"]), int(stamp)))
    return found


def started_ms(entry: Mapping[str, Any]) -> int:
    """When a run started, in ms since 1970."""
    try:
        return calendar.timegm(time.strptime(str(entry.get("started")), "%Y-%m-%dT%H:%M:%SZ")) * 1000
    except ValueError:
        return int(time.time() * 1000)


def files(folder: Path) -> list[Path]:
    """The files of a run that its mirror carries."""
    return [p for p in (folder / records.RECORDS_FILE, folder / records.STEPS_FILE) if p.is_file()]


def set_behind(folder: Path, uri: str, reason: str) -> None:
    """Note in a run's folder that a store has not all of it."""
    with suppress(OSError):
        if folder.is_dir():
            records.write_atomic(folder / BEHIND_FILE, f"{shown(uri)}\n{reason}\n")


def clear_behind(folder: Path, uri: str) -> None:
    """Take the note back; one about another store stays."""
    file = folder / BEHIND_FILE
    with suppress(OSError):
        if file.read_text(encoding="utf-8").split("\n")[0] == shown(uri):
            file.unlink()


def tell_if_behind(folder: Path, uri: str | None) -> None:
    """Warn that a store has not all of a run that has ended, if nothing was said about that store yet.

    Ranks write their warnings into a log; this is how the command that started them says it.

    Args:
        folder: The run's folder.
        uri: URI of the store.
    """
    with suppress(OSError):
        told, _, reason = (Path(folder) / BEHIND_FILE).read_text(encoding="utf-8").partition("\n")
        if uri and told == shown(uri):
            warn_once(uri, reason.strip(), folder)
