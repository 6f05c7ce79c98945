"""Devices and the nodes they stand in: the table hardware.json beside this file, and a user's own of the same form.

All sizes are bytes and all rates are bytes or FLOPs in one second, of one device and in one direction. They are peaks
that vendors state, dense and not with 2:4 sparsity: what a plan makes of them is a lower bound on time.
docs/hardware.md has the table and its sources.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from dlrscale.errors import ConfigError

FILE = Path(__file__).with_name("hardware.json")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One row of the table. A rate or a price that nobody stated is None.

    `memory_bytes` is what the driver gives to programs, which is less than `memory_stated`, the vendor's words.
    `link_bytes_per_s` leads to the other devices of the node, `node_link_bytes_per_s` to other nodes and
    `host_link_bytes_per_s` to the host's memory. `device_names` are patterns (* and ?) of what
    `torch.cuda.get_device_name()` says.
    """

    name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float | None = None
    bf16_flops_per_s: float | None = None
    host_memory_bytes: int
    devices_per_node: int
    link_bytes_per_s: float | None = None
    node_link_bytes_per_s: float | None = None
    host_link_bytes_per_s: float | None = None
    cost_per_hour: float | None = None
    device_names: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    memory_stated: str = ""
    note: str = ""


# Key: (whole number, the least value that can be meant, what to write). The least values catch GiB or GB/s for bytes.
_NUMBERS: dict[str, tuple[bool, float, str]] = {
    "memory_bytes": (True, 2**28, "bytes, such as 85899345920 for 80 GiB"),
    "host_memory_bytes": (True, 2**28, "bytes, such as 549755813888 for 512 GiB"),
    "devices_per_node": (True, 1, "a whole number from 1"),
    "bandwidth_bytes_per_s": (False, 1e9, "bytes in a second, such as 2.039e12"),
    "bf16_flops_per_s": (False, 1e9, "FLOPs in a second, dense, such as 312e12"),
    "link_bytes_per_s": (False, 1e7, "bytes in a second and one direction, such as 300e9"),
    "node_link_bytes_per_s": (False, 1e7, "bytes in a second and one direction, such as 25e9"),
    "host_link_bytes_per_s": (False, 1e7, "bytes in a second and one direction, such as 32e9"),
    "cost_per_hour": (False, 0, "the price of one device for an hour, from 0"),
}
_TOO_MUCH = 1e20
_REQUIRED = ("memory_bytes", "host_memory_bytes", "devices_per_node")
_LISTS = ("device_names", "source")
_TEXTS = ("memory_stated", "note")


def table(extra: Path | None = None) -> dict[str, Hardware]:
    """All hardware by name.

    Args:
        extra: A user's JSON file of the same form as hardware.json. Where a name is in both, the user's entry replaces
            the built-in one as a whole.

    Returns:
        The rows: built-in ones first, in the order of their memory.

    Raises:
        ConfigError: If the file cannot be read or an entry is wrong; holds every fault.
    """
    return _built_in() | (_load(Path(extra)) if extra is not None else {})


def find(name: str, extra: Path | None = None) -> Hardware:
    """The row of a name.

    Args:
        name: The name, as --hardware takes it.
        extra: A user's file, as for `table`.

    Returns:
        The row.

    Raises:
        ConfigError: If there is none; near names are offered. Also if the user's file is wrong.
    """
    rows = table(extra)
    row = rows.get(name) or rows.get(name.lower())
    if row is not None:
        return row
    raise ConfigError(
        f"--hardware {name}: unknown.{_near(name.lower(), rows)} There are: {', '.join(rows)}. A JSON file of your own "
        "adds others (docs/hardware.md)."
    )


def of_device(device_name: str, extra: Path | None = None) -> Hardware | None:
    """The row of a device that is at hand.

    Args:
        device_name: What `torch.cuda.get_device_name()` says, such as NVIDIA H100 80GB HBM3.
        extra: A user's file, as for `table`; its patterns are tried first.

    Returns:
        The row, or None where no pattern matches: then its peaks are unknown.
    """
    own = _load(Path(extra)) if extra is not None else {}
    for row in [*own.values(), *(row for name, row in _built_in().items() if name not in own)]:
        if any(fnmatchcase(device_name, pattern) for pattern in row.device_names):
            return row
    return None


@cache
def _built_in() -> dict[str, Hardware]:
    return _load(FILE)


def _load(file: Path) -> dict[str, Hardware]:
    """The rows of one file, checked."""
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return dict(pairs)

    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}). Name a JSON file of hardware.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: is no JSON: {error}. See docs/hardware.md for its form.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: holds no JSON object of entries by name. See docs/hardware.md for its form.")
    faults = [f"{file}: {key} stands twice in one object. Leave one of them." for key in twice]
    for name, entry in content.items():
        if not isinstance(entry, dict):
            faults.append(f"{file}: {name} is no JSON object. Write its keys in braces, as docs/hardware.md shows.")
        else:
            faults += [f"{file}: {name}: {fault}" for fault in _entry_faults(entry)]
    if faults:
        raise ConfigError(faults)
    return {name: _row(name, entry) for name, entry in content.items()}


def _entry_faults(entry: Mapping[str, Any]) -> list[str]:
    """What is wrong with one entry, one sentence or two each."""
    known = [*_NUMBERS, *_LISTS, *_TEXTS]
    faults = [f"{key} is missing. Give {_NUMBERS[key][2]}." for key in _REQUIRED if entry.get(key) is None]
    for key, value in entry.items():
        if key not in known:
            faults.append(f"{key}: no such key.{_near(key, known)} There are: {', '.join(known)}.")
        elif value is None:
            continue
        elif key in _NUMBERS:
            whole, least, want = _NUMBERS[key]
            number = isinstance(value, int | float) and not isinstance(value, bool) and least <= value < _TOO_MUCH
            if not number or (whole and value != int(value)):
                faults.append(f"{key}: {json.dumps(value)} cannot be right. Give {want}.")
        elif key in _LISTS and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            faults.append(f"{key}: {json.dumps(value)} is no list of texts. Write them in brackets.")
        elif key in _TEXTS and not isinstance(value, str):
            faults.append(f"{key}: {json.dumps(value)} is no text. Write it in quotes.")
    return faults


def _row(name: str, entry: Mapping[str, Any]) -> Hardware:
    """A checked entry as a row."""
    given = {key: value for key, value in entry.items() if value is not None}
    whole = {key: int(given[key]) for key in _REQUIRED}
    lists = {key: tuple(given.get(key, ())) for key in _LISTS}
    return Hardware(name=name, **given | whole | lists)


def _near(name: str, names: Any) -> str:
    """` Did you mean NAME?`, or nothing where no name is near."""
    import difflib

    near = difflib.get_close_matches(name, names, n=2)
    return f" Did you mean {' or '.join(near)}?" if near else ""
