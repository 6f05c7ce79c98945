"""The catalogue of attacker strategies: a strategy is a named choice on four axes, never a loop of its own.

The axes are the transform of the locked model, the trainable set, the gradient method and the memory levers.
`attacks/` holds one file per idea, found by the names that stand here. A value of an axis is what the row says that
brings it: the first one that has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields, replace

from dlrscale.catalogue.axes import (
    ADAM_RATE,
    CHECKPOINTING,
    DEFAULT_LEVERS,
    PARTS,
    STORAGE,
    Knob,
    Levers,
    Strategy,
    Trains,
    flag,
    lever_faults,
)
from dlrscale.catalogue.strategies import ROWS
from dlrscale.errors import ConfigError

__all__ = [
    "ADAM_RATE",
    "AXES",
    "CHECKPOINTING",
    "DEFAULT_LEVERS",
    "LOCK",
    "PARTS",
    "STORAGE",
    "STRATEGIES",
    "Knob",
    "Levers",
    "Strategy",
    "Trains",
    "axes",
    "choices",
    "combined",
    "flag",
    "is_exact",
    "lever_faults",
    "strategy",
]

AXES = {"transform": "none", "trainable": "all", "gradient": "backprop"}  # with the value that is nobody's idea
STRATEGIES: dict[str, Strategy] = {row.name: row for row in ROWS}

# A lock is no strategy, but has levers as they have: it keeps all activations of the one DLR-Net that it visits.
LOCK = Strategy(name="lock", idea="", source="", saved="", cost="", levers=Levers(activation_checkpointing="none"))


def choices(axis: str) -> dict[str, str]:
    """The values of an axis, each with its idea.

    Args:
        axis: `transform`, `trainable` or `gradient`.

    Returns:
        The idea by value, in the order of the catalogue.
    """
    usual = {"transform": "the model as it is", "trainable": "all parameters", "gradient": "plain backpropagation"}
    found = {AXES[axis]: usual[axis]}
    for row in ROWS:
        found.setdefault(getattr(row, axis), row.idea)
    return found


def strategy(name: str) -> Strategy:
    """The row of a name.

    Args:
        name: The strategy's name, as `--strategy` takes it.

    Returns:
        The strategy.

    Raises:
        ConfigError: If there is none; near names are offered.
    """
    return STRATEGIES[_known("--strategy", name, STRATEGIES)]


def _known(option: str, name: str, names: Iterable[str]) -> str:
    import difflib

    names = list(names)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{option} {name}: unknown.{hint} There are: {', '.join(names)}.")


def combined(
    name: str, transform: str | None = None, trainable: str | None = None, gradient: str | None = None
) -> Strategy:
    """A strategy with some of its axes chosen by hand.

    Args:
        name: The strategy's name.
        transform: Another transform; None: the strategy's own.
        trainable: Another trainable set; None: the strategy's own.
        gradient: Another gradient method; None: the strategy's own.

    Returns:
        A strategy of that name whose knobs, fixed levers, exactness and stages are those of all its values.

    Raises:
        ConfigError: If there is no such strategy, or no such value of an axis, or the gradient method needs levers that
            contradict the strategy's idea.
    """
    row = strategy(name)
    by_hand = {"transform": transform, "trainable": trainable, "gradient": gradient}
    chosen = {axis: value or getattr(row, axis) for axis, value in by_hand.items()}
    for axis, value in chosen.items():
        _known(f"--{axis}", value, choices(axis))
    bringing = {axis: _bringing(axis, value) for axis, value in chosen.items()}
    brings = [entry for entry in bringing.values() if entry is not None]
    own = () if any(_bringing(axis, getattr(row, axis)) is row for axis in AXES) else row.knobs
    knobs = {knob.name: knob for knobs in (own, *(entry.knobs for entry in brings)) for knob in knobs}
    method, levers, fixed = bringing["gradient"], asdict(row.levers), row.fixed
    replaced = _bringing("gradient", row.gradient)
    if replaced is not None and replaced is not method:  # what the row's own method needs goes with it
        gone = ("zero", *replaced.fixed)
        levers |= dict.fromkeys(gone)
        fixed = tuple(lever for lever in fixed if lever not in gone)
        row = replace(row, rates=Strategy.rates, stages=Strategy.stages, why_not="")
    if method is not None and method is not replaced:
        clash = [
            f"--gradient {method.gradient} needs {flag(lever, wanted)}, and the idea of the strategy {name} "
            f"is {flag(lever, levers[lever])}. Take another --strategy, such as {method.name}."
            for lever in method.fixed
            if lever in fixed and (wanted := getattr(method.levers, lever)) != levers[lever]
        ]
        if clash:
            raise ConfigError(clash)
        levers |= {lever: getattr(method.levers, lever) for lever in method.fixed}
        levers["zero"] = method.levers.zero if levers["zero"] is None else levers["zero"]
        fixed = tuple(dict.fromkeys((*fixed, *method.fixed)))
    return replace(
        row,
        **chosen,
        knobs=tuple(knobs.values()),
        levers=Levers(**levers),
        fixed=fixed,
        trains=bringing["trainable"].trains if bringing["trainable"] else Trains(),
        exact=method is None or method.exact,
        rates=method.rates if method else row.rates,
        stages=method.stages if method else row.stages,
        why_not=method.why_not if method else row.why_not,
    )


def is_exact(entry: Strategy, storage: str) -> bool:
    """Whether a strategy's gradient is plain autograd's with activations kept in that way."""
    return entry.exact and storage != "int8"


def _bringing(axis: str, value: str) -> Strategy | None:
    """The row that brings a value to an axis; None for the one that is nobody's idea."""
    if value == AXES[axis]:
        return None
    return next(row for row in ROWS if getattr(row, axis) == value)


def axes(entry: Strategy, levers: Levers, knobs: dict[str, float | str]) -> dict[str, object]:
    """The resolved choice on the four axes, as the record holds it; this, not the name, identifies a run."""
    return {
        "transform": entry.transform,
        "trainable": entry.trainable,
        "gradient": entry.gradient,
        "levers": {f.name: getattr(levers, f.name) for f in fields(levers)},
        "knobs": dict(knobs),
    }
