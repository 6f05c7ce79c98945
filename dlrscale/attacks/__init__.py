"""One file per idea of an attack, found by the names in the catalogue (a hyphen becomes an underscore).

- A file named after a transform has `apply(run, folder, out) -> Path`: all ranks call it, and it turns the attacked
  model's folder into another one, an ordinary one, that is then trained.
- A file named after a trainable set has `choose(model, shape, knobs) -> model`, which makes just that set trainable,
  and, where it trains modules of its own, `save(model, state, folder, base_name)` and `merged(model, folder)`.
- A file named after a gradient method has `forward(net, x, knobs)`, another way through a DLR-Net for autograd, or
  `objective(knobs, counter)`, another step than the loop's (`train.Objective`).
- The files of the memory levers are called by levers.py.

The transform `none`, the trainable set `all` and the gradient method `backprop` need no file.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def find(name: str) -> ModuleType:
    """The module of a value of an axis by its name in the catalogue."""
    return importlib.import_module(f"dlrscale.attacks.{name.replace('-', '_')}")
