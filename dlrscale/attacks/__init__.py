"""One file per idea of an attack, found by the names in catalogue.py (a hyphen becomes an underscore).

A file named after a transform has `apply(folder, out) -> Path`, which turns the attacked model's folder into
another one. A file named after a trainable set has `choose(model, shape, knobs) -> model`, which makes just that
set trainable. The transform `none` and the trainable set `all` need no file.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def find(name: str) -> ModuleType:
    """The module of a transform or of a trainable set by its name in the catalogue."""
    return importlib.import_module(f"dlrscale.attacks.{name.replace('-', '_')}")
