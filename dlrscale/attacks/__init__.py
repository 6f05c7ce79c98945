"""One file per idea of an attack, found by the names in the catalogue (a hyphen becomes an underscore).

- A file named after a transform has `apply(run, folder, out) -> Path`: all ranks call it, and it turns the attacked
  model's folder into another one, an ordinary one, that is then trained.
- A file named after a trainable set has `choose(model, shape, knobs) -> model`, which makes just that set trainable,
  and, where it trains modules of its own, `save(model, state, folder, base_name)` and `merged(model, folder)`.
- A file named after a gradient method has `forward(net, x, knobs)`, another way through a DLR-Net for autograd, or
  `objective(config, counter)`, another step than the loop's (`train.Objective`, with `counter`, `counted` and `seen` as
  `train.LanguageModelling` has them). Such a method updates by itself: its levers have the optimizer `none`, and its
  engine has none. `faults(config) -> list[str]` says what of a run's settings the method cannot do.
- The files of the memory levers are called by levers.py. rounding.py has what the methods share that update by
  themselves.

The transform `none`, the trainable set `all` and the gradient method `backprop` need no file.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def find(name: str) -> ModuleType:
    """The module of a value of an axis by its name in the catalogue."""
    return importlib.import_module(f"dlrscale.attacks.{name.replace('-', '_')}")
