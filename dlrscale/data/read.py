"""Reading: text files, JSON lines, data sets of the library `datasets`, and what their records hold."""

from __future__ import annotations

import difflib
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dlrscale.data import hub
from dlrscale.data.embedded import EMBEDDED, embedded_documents
from dlrscale.errors import ConfigError

ROLES = (("text",), ("prompt", "completion"), ("messages",))  # what a record holds


def holds_records(place: str) -> bool:
    """Whether a place holds records (JSON lines, a data set) and no plain text."""
    if place.startswith("hf:") or place.lower().removesuffix(".gz").endswith((".jsonl", ".json")):
        return True
    return not place.startswith("embedded:") and Path(place).is_dir()


def fitting_columns(path: str, columns: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """The columns named for one file, if another one has them too; else None, so that its own keys are found.

    Args:
        path: The other file.
        columns: As for `load`.

    Returns:
        The columns, or None.
    """
    if columns is None or not holds_records(path):
        return columns
    if _is_data_set(path):
        return columns if set(columns.values()) <= set(hub.open_dataset(path).column_names) else None
    first = next((line for line in read_text(Path(path)).split("\n") if line.strip()), "")
    try:
        record = json.loads(first, parse_int=_integer)
    except (ValueError, RecursionError):
        return columns  # `load` says what is wrong
    return columns if isinstance(record, dict) and set(columns.values()) <= set(record) else None


def _is_data_set(place: str) -> bool:
    return place.startswith("hf:") or Path(place).is_dir()


def documents(
    path: str, separator: str | None, counts: dict[str, int], columns: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The documents of any data: an embedded corpus, a plain text file, or the texts of records.

    Args:
        path: As for `load`.
        separator: Text between the documents of a plain text file; without one a file is one document.
        counts: `unreadable` and `overlapping` are counted here.
        columns: As for `load`.

    Returns:
        Texts without the line breaks around them; of records all their text, a chat as its turns.
    """
    if holds_records(path):
        roles, found = records(path, columns)
        if roles == ("messages",):
            return (message["content"] for _, (messages,) in found for message in messages)
        return ("".join(values) for _, values in found)
    if path.startswith("embedded:"):
        return embedded_documents(path, counts)
    text = read_text(Path(path)).replace("\r\n", "\n")
    return (d.strip("\n") for d in (text.split(separator) if separator else [text]))


def check_place(place: str | None) -> None:
    """Refuse data that are not there; None, embedded corpora and names on the hub pass.

    Args:
        place: A file, a folder of a data set, one of `EMBEDDED`, `hf:org/name`, or None.

    Raises:
        ConfigError: If the file is missing; a near name in its folder is offered.
    """
    if place is None or place.startswith("embedded:"):
        return
    path = Path(place)
    if place.startswith("hf:"):
        hub.parse(place)
        return
    if path.is_file() or path.is_dir():
        return
    folder = path.absolute().parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"Did you mean {near[0]!r} there?" if near else f"Give a file, or one of {', '.join(EMBEDDED)}."
    raise ConfigError(f"No such data file: {path.absolute()}. {hint}")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without a byte order mark, unzipped where its name ends in .gz."""
    check_place(str(path))
    try:
        raw = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Give a readable, whole file.") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 ({error.reason}). Save the file as UTF-8.") from None


def records(path: str, columns: Mapping[str, str] | None) -> tuple[tuple[str, ...], list[tuple[str, tuple[Any, ...]]]]:
    """All records of JSON lines or of a data set.

    Args:
        path: As for `load`.
        columns: As for `load`.

    Returns:
        The roles, one of `ROLES`, and for each record its place and its value of each role.

    Raises:
        ConfigError: At the first record that does not hold what the first one or the columns say.
    """
    roles = None if columns is None else _column_roles(columns)
    keys = () if roles is None else tuple(columns[role] for role in roles)
    found = []
    for place, record in _rows(path, keys):
        if roles is None:
            roles = keys = _guess_roles(place, record)
        values = zip(roles, keys, strict=True)
        found.append((place, tuple(_value(place, record, role, key) for role, key in values)))
    if not found:
        raise ConfigError(f"{path}: holds no record. Give data with at least one.")
    return roles, found


def _rows(path: str, keys: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each record with its place. Of a data set only the columns that are read: others may need decoders.

    Lines end at a line feed alone: the other line breaks of Unicode may stand inside JSON strings.
    """
    if _is_data_set(path):
        table = hub.open_dataset(path)
        names = table.column_names
        if len(table) and not set(keys) <= set(names):
            yield f"{path}: row 0", dict.fromkeys(names)  # the caller refuses it
        wanted = keys or next((roles for roles in ROLES if set(roles) <= set(names)), tuple(names))
        for number, record in enumerate(table.select_columns(list(dict.fromkeys(wanted)))):
            yield f"{path}: row {number}", record
        return
    for number, line in enumerate(read_text(Path(path)).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line, parse_int=_integer)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or str(error)
            raise ConfigError(f"{place}: no JSON object ({reason}). Each line must hold a whole one.") from None
        if not isinstance(record, dict):
            raise ConfigError(f"{place}: {_short(record)} is no JSON object. Each line must hold one.")
        yield place, record


def _column_roles(columns: Mapping[str, str]) -> tuple[str, ...]:
    for roles in ROLES:
        if set(columns) == set(roles):
            return roles
    raise ConfigError(
        f"--columns names {', '.join(columns) or 'nothing'}: "
        "give text=KEY, messages=KEY, or prompt=KEY,completion=KEY with the keys of your records."
    )


def _guess_roles(place: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    for keys in ROLES:
        if all(key in record for key in keys):
            return keys
    raise ConfigError(
        f"{place}: no 'text', nor 'prompt' and 'completion', nor 'messages', among the record's keys "
        f"({_keys(record)}). Name the keys to read with --columns text=KEY, --columns prompt=KEY,completion=KEY or "
        "--columns messages=KEY."
    )


def _value(place: str, record: Mapping[str, Any], role: str, key: str) -> Any:
    if key not in record:
        raise ConfigError(
            f"{place}: {key!r} is not among the record's keys ({_keys(record)}). "
            "Add it, or name another with --columns."
        )
    value = record[key]
    if role != "messages":
        return _string(place, repr(key), value)
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise ConfigError(
            f"{place}: {key!r} is {_short(value)}, no list of turns. Write it as "
            '[{"role": "user", "content": "..."}, ...].'
        )
    for number, turn in enumerate(value, 1):
        for name in ("role", "content"):
            _string(place, f"{name!r} of turn {number} of {key!r}", turn.get(name))
    return value


def _string(place: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{place}: {name} is {_short(value)}, not a string. Write it as a string.")
    if re.search(r"[\ud800-\udfff]", value):
        raise ConfigError(f"{place}: {name} holds half of a surrogate pair, no character. Mend the escape.")
    return value


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, record)) or "none"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def _integer(text: str) -> int | float:
    """A JSON integer; one of thousands of digits, which Python refuses to read, as a float: nothing here needs it."""
    return int(text) if len(text) < 4000 else float(text)
