"""Where a tracking store lies, and making it ready before the ranks start."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib import error as urllib_error
from urllib import request as urllib_request
from urllib.parse import urlsplit

from dlrscale.errors import ConfigError

SQLITE = "sqlite:///"
# Of this process only; what the user set stands. MLflow reads the back-off factor with int().
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
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


def prepare(uri: str) -> None:
    """Make a store ready, once, by the process that starts the ranks.

    An SQLite file is created and migrated here, because two processes that do it at once break it. A server
    is only asked whether it is there; silence is a warning.

    Args:
        uri: URI of the store.

    Raises:
        ConfigError: If MLflow has no such store, or the folder of an SQLite store cannot be made.
    """
    uri = resolve(uri)
    path = sqlite_path(uri)
    if path is None:
        if urlsplit(uri).scheme in ("http", "https"):
            _ask_server(uri)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "mlartifacts").mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--tracking-uri {uri}: the folder cannot be made ({error.strerror}: {error.filename}). "
            "Choose a folder that you may write to."
        ) from None
    with _locked(path.parent):
        if _is_migrated(path):
            return
        try:
            quiet()
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            # MLflow writes the place of its default experiment into SQL as it stands: an apostrophe would end it.
            SqlAlchemyStore(uri, (path.parent / "mlartifacts").as_uri())
        except Exception as error:
            say(warning(uri, error))


def _ask_server(uri: str) -> None:
    """Ask a tracking server for its health, and warn when it does not answer."""
    if reason := silence(uri):
        say(
            f"warning: no MLflow server answers at {shown(uri)} ({reason}). "
            "The run goes on; its records will be complete, and a mirror can be rebuilt from them."
        )


def silence(uri: str, timeout_s: float = 3.0) -> str | None:
    """Why a tracking server does not answer, or None if it does."""
    try:
        opener = urllib_request.build_opener()
        opener.open(uri.rstrip("/") + "/health", timeout=timeout_s).close()
    except urllib_error.HTTPError:
        return None  # an answer, and the server may want a login first
    except Exception as error:
        return first_line(error)
    return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, where the file system has locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_migrated(path: Path) -> bool:
    """Whether an SQLite file holds MLflow's tables already."""
    import sqlite3

    if not path.is_file() or not path.stat().st_size:
        return False
    try:
        with closing(sqlite3.connect(path, timeout=5)) as database:
            return database.execute("SELECT version_num FROM alembic_version").fetchone() is not None
    except sqlite3.Error:
        return False


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


def warning(uri: str, error: BaseException | str) -> str:
    reason = error if isinstance(error, str) else first_line(error)
    return (
        f"warning: the MLflow store {shown(uri)} does not take this run ({reason}). The run goes on; "
        "its records are complete, and a mirror can be rebuilt from them."
    )
