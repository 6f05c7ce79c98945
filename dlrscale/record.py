"""The run record: one strict JSON object per line and per run, and the step rows beside it.

The record is the truth of a run; MLflow and the report are made from it. `RECORD_KEYS` is the schema.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import hashlib
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from dlrscale.errors import ConfigError

SCHEMA = 1
RECORDS_FILE = "records.jsonl"
STEPS_FILE = "steps.jsonl"

RECORD_KEYS = (
    "schema", "id", "resume_id", "kind", "name", "outcome", "side", "strategy", "config", "deepspeed_config",
    "versions", "git", "device", "seed", "started", "metrics", "phases", "plan", "gates", "error",
)  # fmt: skip

# Settings that do not change what a run computes: a run may be continued with other values of these.
PLACEMENT_KEYS = frozenset(
    {
        "num_ranks", "hostfile", "zero", "offload_optimizer", "offload_param", "deepspeed_layout", "tracking_uri",
        "out", "name", "command", "lock_id", "checkpoint_every", "keep_checkpoints", "max_hours", "micro_batch",
        "accumulation",
    }
)  # fmt: skip
# Settings that are not part of a run's identity at all.
UNIDENTIFIED_KEYS = frozenset(
    {
        "out",
        "name",
        "command",
        "tracking_uri",
        "lock_id",
        "checkpoint_every",
        "keep_checkpoints",
        "max_hours",
        "hardware",
        "hardware_file",
        "force",
        "search",
        "search_trials",
        "trial",
        "stop_above",
        "target",
        "base_result",
    }
)


class Outcome(str, enum.Enum):
    """How a run ended."""

    OK = "ok"
    OOM = "oom"
    DIVERGED = "diverged"
    FAILED = "failed"


def finite(value: Any) -> Any:
    """Replace NaN and infinities, which strict JSON does not have, by null, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def dumps(value: Any, **kwargs: Any) -> str:
    """Serialise to strict JSON (non-finite numbers become null)."""
    return json.dumps(finite(value), allow_nan=False, ensure_ascii=False, **kwargs)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def append_line(path: Path, value: Any) -> None:
    """Append one strict JSON line with a single write, whole or not at all; a killed writer's cut-off line goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = memoryview(dumps(value).encode() + b"\n")
    with open(path, "a+b", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        end = file.seek(0, os.SEEK_END)
        try:
            while line:  # a disk that gets full takes a part of it
                line = line[file.write(line) :]
        except OSError:
            file.truncate(end)
            raise


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file; a cut-off last line (a killed writer) is left out.

    Args:
        path: A JSON-lines file.

    Yields:
        One object per line, in the file's order.

    Raises:
        ConfigError: If a line that is not the last is no JSON object.
    """
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise ConfigError(f"{path}:{number}: not a JSON object ({error.msg}). Delete that line.") from None
        if isinstance(value, dict):
            yield value


def find_records(places: list[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """All records below some folders (or in some files), the newest of each id last, with their folder.

    A run that was started again has several records of one id; the last one stands.

    Args:
        places: Folders to search, at any depth, or files of records.

    Returns:
        Pairs of a record's folder and the record.

    Raises:
        ConfigError: If a place does not exist or holds no record.
    """
    found: dict[tuple[Path, str], tuple[Path, dict[str, Any]]] = {}
    for place in places:
        if not place.exists():
            raise ConfigError(f"No such folder: {place.absolute()}. Name the folder that a run wrote (its --out).")
        files = [place] if place.is_file() else sorted(place.rglob(RECORDS_FILE))
        for file in files:
            for record in read_lines(file):
                found.pop((file.parent, record["id"]), None)
                found[(file.parent, record["id"])] = (file.parent, record)
    if not found:
        raise ConfigError(f"No {RECORDS_FILE} below {', '.join(map(str, places))}: no run has ended there yet.")
    return list(found.values())


def hash_config(config: Mapping[str, Any], leave_out: frozenset[str]) -> str:
    """Hash a resolved configuration without some of its settings: 64 hexadecimal digits."""
    kept = {k: v for k, v in config.items() if k not in leave_out}
    return hashlib.sha256(json.dumps(finite(kept), sort_keys=True, allow_nan=False).encode()).hexdigest()


def run_ids(config: Mapping[str, Any]) -> tuple[str, str]:
    """The id and the resume_id of a resolved configuration whose paths stand as digests.

    Args:
        config: Flat settings, with `global_batch` among them, so that the resume_id can leave the split of
            the batch over micro-batch, accumulation and ranks aside.

    Returns:
        `id` (every setting that identifies the run) and `resume_id` (the same without ranks, ZeRO stage,
        offload and the split of the global batch).
    """
    return hash_config(config, UNIDENTIFIED_KEYS), hash_config(config, PLACEMENT_KEYS | UNIDENTIFIED_KEYS)


def process_started(pid: int) -> int | None:
    """When a process of this host was started, in clock ticks since the boot; None where it has gone.

    A pid alone is used again; with its start it names one process. A zombie has gone.
    """
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else int(words[19])


@contextlib.contextmanager
def held(file: Path, patience_s: float = 0.0) -> Iterator[bool]:
    """Hold a lock on a file while inside; the kernel frees it when the process dies in whatever way.

    Args:
        file: The file; made if need be.
        patience_s: Seconds to wait for another holder.

    Yields:
        Whether the lock was got; also where the filesystem has no locks.
    """
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        until = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                got = True
            except BlockingIOError:
                got = False
            except OSError:
                got = True
            if got or time.monotonic() >= until:
                break
            time.sleep(0.2)
        yield got
    finally:
        os.close(handle)


def _digest_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "dlrscale" / "digests.json"


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes; cached by absolute path, size and modification time where a cache can be written."""
    stat = path.stat()
    key, stamp = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
    cache_file = _digest_cache()
    try:
        cache = json.loads(cache_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        cache = {}
    entry = cache.get(key)
    if entry and entry[0] == stamp:
        return entry[1]
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    cache[key] = [stamp, digest.hexdigest()]
    if stat.st_size > 1 << 20:  # small files are hashed faster than the cache is written
        with contextlib.suppress(OSError):  # a read-only home costs the cache, nothing else
            write_atomic(cache_file, json.dumps(cache))
    return digest.hexdigest()


def digest_folder(folder: Path) -> str:
    """SHA-256 over the names and bytes of what makes a model: config, weights and tokenizer files.

    A folder without a config.json holds data: there all files count, but for hidden ones.
    """
    if (folder / "config.json").is_file():
        names = sorted(
            p.name
            for p in folder.iterdir()
            if p.suffix == ".safetensors"
            or p.name == "config.json"
            or p.name.startswith(("tokenizer", "chat_template"))
        )
    else:
        inside = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
        names = sorted(p.as_posix() for p in inside if not any(part.startswith(".") for part in p.parts))
    lines = "".join(f"{name} {digest_file(folder / name)}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    import platform

    names = ("dlrscale", "torch", "deepspeed", "transformers", "datasets", "accelerate", "peft", "mlflow", "optuna")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit and dirtiness of the checkout that dlrscale runs from, or null for an installed copy."""
    folder = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        if not git("ls-files", "--", Path(__file__).name):
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def make_record(**fields: Any) -> dict[str, Any]:
    """Build a record with every key of the schema; keys not given are null.

    Args:
        **fields: Values by key; `schema` is filled in.

    Returns:
        The record, its keys in the order of `RECORD_KEYS`.

    Raises:
        ValueError: If a key is not in the schema.
    """
    unknown = set(fields) - set(RECORD_KEYS)
    if unknown:
        raise ValueError(f"not in the record's schema: {sorted(unknown)}")
    return {key: SCHEMA if key == "schema" else fields.get(key) for key in RECORD_KEYS}
