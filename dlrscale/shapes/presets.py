"""Shapes of public models by name: what of each one's config.json matters for size, in presets.json beside this file.

Dimensions, biases, dropouts and attention windows are kept; rates of rotation and epsilons only where transformers
needs them. Each entry names its source.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

from dlrscale.errors import ConfigError

FILE = Path(__file__).with_name("presets.json")


@cache
def _table() -> dict[str, dict[str, Any]]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def __getattr__(attribute: str) -> tuple[str, ...]:
    """`NAMES`: the names of all built-in shapes, read when first asked for."""
    if attribute == "NAMES":
        return tuple(_table())
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")


def find(name: str) -> dict[str, Any]:
    """The configuration of a public model.

    Args:
        name: Its name, such as llama-2-7b, in any case.

    Returns:
        What its config.json says of its size; a copy.

    Raises:
        ConfigError: If there is none of that name; near names are offered.
    """
    return copy.deepcopy(_entry(name)["config"])


def source(name: str) -> str:
    """Where the values of a built-in shape are from.

    Args:
        name: Its name, in any case.

    Returns:
        The address of the config.json, of the copy that was read, and of the paper's table where there is one.

    Raises:
        ConfigError: If there is none of that name; near names are offered.
    """
    return _entry(name)["source"]


def _entry(name: str) -> dict[str, Any]:
    table, wanted = _table(), name.lower()
    for own, entry in table.items():
        if wanted == own or wanted in entry.get("aliases", ()):
            return entry
    import difflib

    names = [*table, *(alias for entry in table.values() for alias in entry.get("aliases", ()))]
    near = difflib.get_close_matches(wanted, names, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(
        f"{name}: no built-in shape has this name.{hint} There are: {', '.join(table)}. For any other model name its "
        "folder or its config.json."
    )
