"""Where a tracking store lies, whether it answers, and what is said when it does not."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib import error as urllib_error
from urllib import request as urllib_request
from urllib.parse import urlsplit

from dlrscale.errors import ConfigError, JobError

SQLITE = "sqlite:///"
ASK_S = 2.0  # how long a server may take to say that it is there
LOCK_S = 20.0  # how long another process may take to make an SQLite store
# Of this process only; what the user set stands. MLflow reads the back-off factor with int().
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def default_uri() -> str:
    """The store that is used when none is named: an SQLite file below `results/` of the current folder."""
    return f"{SQLITE}{Path.cwd() / 'results' / 'mlflow.db'}"


def resolve(uri: str | None) -> str:
    """The URI of a store in a form that means the same in every process and folder.

    Args:
        uri: As the user gave it; null for `default_uri`.

    Returns:
        The URI, an SQLite path made absolute.

    Raises:
        ConfigError: If MLflow has no tracking store of this kind.
    """
    if uri is None:
        return default_uri()
    path = sqlite_path(uri)
    if path is not None:
        query = uri[len(SQLITE) :].partition("?")
        return f"{SQLITE}{path}{query[1]}{query[2]}"
    scheme = urlsplit(uri).scheme
    if scheme in ("", "file") or (scheme == "sqlite"):
        raise ConfigError(
            f"--tracking-uri {uri}: MLflow cannot track there. Give sqlite:///FOLDER/mlflow.db for a file, "
            "or http://HOST:PORT for a server."
        )
    return uri


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of an SQLite store, or null for any other store."""
    if not uri.startswith(SQLITE):
        return None
    name = uri[len(SQLITE) :].partition("?")[0]
    return Path(os.path.abspath(name)) if name else None


def shown(uri: str) -> str:
    """A URI as it may be printed: without the password."""
    return re.sub(r"(//[^/@:]*):[^/@]*@", r"\1:***@", uri)


def prepare(uri: str | None) -> None:
    """Make a store ready, once, by the process that starts the ranks; one that is away costs one warning.

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


def make_ready(uri: str) -> None:
    """See that a store answers, and make an SQLite one that is not there yet.

    An SQLite file is made aside, by one process at a time, and put in place whole: two processes that make it at
    once break it, and so does a disk that fills up meanwhile.

    Args:
        uri: URI of the store, as `resolve` gives it.

    Raises:
        JobError: If it does not answer, is locked, or cannot be made; after a few seconds at the most.
    """
    path = sqlite_path(uri)
    try:
        if path is None:
            if urlsplit(uri).scheme in ("http", "https"):
                _ask_server(uri)
        elif not is_made(path):
            (path.parent / "mlartifacts").mkdir(parents=True, exist_ok=True)
            with _locked(path.parent):
                if not is_made(path):
                    _make(path)
    except Exception as error:
        what = f"no MLflow server answers at {shown(uri)}" if path is None else f"the MLflow store {shown(uri)} is away"
        raise JobError(f"{what} ({first_line(error)})") from None


def silence(uri: str) -> str | None:
    """Why a tracking server does not answer, or None if it does."""
    try:
        _ask_server(uri)
    except Exception as error:
        return first_line(error)
    return None


def _ask_server(uri: str) -> None:
    """Ask a tracking server for its health; any answer will do, since it may want a login first."""

    def ask() -> None:
        with suppress(urllib_error.HTTPError):
            urllib_request.build_opener().open(uri.rstrip("/") + "/health", timeout=ASK_S).close()

    bounded(ask, ASK_S + 0.5)  # the socket's timeout does not hold while the host's name is looked up


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, where the file system has locks; another process may need some seconds first."""
    handle, until = os.open(folder, os.O_RDONLY), time.monotonic() + LOCK_S
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(f"another process has been making it for {LOCK_S:.0f} s") from None
                time.sleep(0.1)
                continue
            except OSError:
                pass
            break
        yield
    finally:
        os.close(handle)


def is_made(path: Path) -> bool:
    """Whether an SQLite file holds MLflow's tables.

    Args:
        path: The file.

    Returns:
        False where there is no file, or an empty one.

    Raises:
        sqlite3.Error: If it is locked, or no database.
    """
    import sqlite3

    if not path.is_file() or not path.stat().st_size:
        return False
    with closing(sqlite3.connect(path, timeout=1)) as database:
        tables = database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'alembic_version'").fetchone()
        return bool(tables[0]) and database.execute("SELECT version_num FROM alembic_version").fetchone() is not None


def _make(path: Path) -> None:
    """Make an SQLite store under another name and move it to its place.

    MLflow itself would try for 100 s where it cannot write, and leave half of its tables on a full disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        quiet()
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        quiet()  # the import turns MLflow's own messages on again
        # MLflow writes the place of its default experiment into SQL as it stands: an apostrophe would end it.
        store = SqlAlchemyStore(f"{SQLITE}{temporary}", (path.parent / "mlartifacts").as_uri())
        with suppress(AttributeError):
            store.engine.dispose()  # no connection may know the file by its first name
        os.replace(temporary, path)
    finally:
        for leftover in path.parent.glob(f"{temporary.name}*"):
            leftover.unlink(missing_ok=True)


def bounded(function: Callable[[], Any], patience_s: float) -> Any:
    """Call a function that may hang, in a thread of its own that nobody waits for in the end.

    Args:
        function: What to call.
        patience_s: Seconds to wait for it.

    Returns:
        What it returned.

    Raises:
        TimeoutError: If it has not returned by then.
    """
    found: list[Any] = []

    def call() -> None:
        try:
            found.append((function(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=call, name="dlrscale-bounded", daemon=True)
    thread.start()
    thread.join(patience_s)
    if not found:
        raise TimeoutError(f"not done after {patience_s:.0f} s")
    value, error = found[0]
    if error is not None:
        raise error
    return value


def quiet() -> None:
    """Set MLflow's patience in this process and silence what it and its libraries print by themselves."""
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def say(text: str) -> None:
    with suppress(Exception):
        print(text, file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return shown(text if len(text) <= 160 else text[:157] + "...")


_told: set[str] = set()


def warn_once(uri: str, reason: BaseException | str, folder: Path | str | None = None) -> None:
    """Say on stderr that a store does not take a run, once per process and store.

    Args:
        uri: URI of the store.
        reason: What is wrong with it.
        folder: The run's folder, for the command that mends it.
    """
    if uri in _told:
        return
    _told.add(uri)
    reason = reason if isinstance(reason, str) else first_line(reason)
    place = shlex.quote(str(folder)) if folder else "FOLDER"
    if shown(uri) not in reason:
        reason = f"the MLflow store {shown(uri)} does not take all of this run ({reason})"
    say(
        f"warning: {reason}. The run itself is as it would be, its records are complete; `dlrscale mirror {place}` "
        "brings MLflow up to date."
    )
