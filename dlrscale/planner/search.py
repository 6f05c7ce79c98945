"""`best-memory`: the memory levers with the smallest planned peak of a device, under a cap on the FLOPs of a step.

The cap is a multiple of what plain autograd needs to train all of the base model on the same micro-batch (strategy
`full`), for base and locked model alike. Searched are checkpointing (none, layer, nested), activations on device or
host, tiles, backprop or `reverse`, the ZeRO stage and both offloads, each where it was not given by hand; 8 bits are
not, since they are not exact. What hardware cannot hold comes last. Of equal peaks the one with the fewest FLOPs wins,
then the one that moves least between device and host, then the plainest. Moving is no FLOP and does not count against
the cap; it is reported.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dlrscale import catalogue, shapes
from dlrscale.catalogue import Levers, Strategy
from dlrscale.errors import ConfigError
from dlrscale.planner.activations import Activations
from dlrscale.planner.hardware import Hardware
from dlrscale.planner.model import Model, attacked
from dlrscale.planner.needs import gib
from dlrscale.planner.plan import Plan, inside
from dlrscale.planner.time import host_traffic

TILES = (1, 2, 4, 8, 16)
CHECKPOINTING = ("none", "layer", "nested")
STORAGE = ("device", "host")
GRADIENTS = ("backprop", "reverse")
CAP = "cap"
SEARCHED = (
    "zero", "offload_optimizer", "offload_param", "activation_checkpointing", "activation_storage", "tiles",
)  # fmt: skip
SHOWN = 8  # candidates that a record keeps


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One combination of levers: all of them, the gradient method, the knobs, its plan, and its FLOPs over full's."""

    levers: Levers
    gradient: str
    knobs: Mapping[str, float | str]
    plan: Plan
    flops_ratio: float

    def values(self) -> dict[str, Any]:
        """As a record holds it; `host_bytes_per_step` go to the host and come from it, on each rank."""
        return {name: getattr(self.levers, name) for name in SEARCHED} | {
            "gradient": self.gradient,
            "peak_bytes": self.plan.needs.peak_bytes,
            "flops_ratio": round(self.flops_ratio, 4),
            "host_bytes_per_step": int(sum(host_traffic(self.plan))),
        }


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search has found: the candidates under the cap, best first."""

    cap: float
    reference_flops: int
    candidates: tuple[Candidate, ...]
    over_cap: int

    @property
    def winner(self) -> Candidate:
        """The best candidate."""
        return self.candidates[0]

    def values(self) -> dict[str, Any]:
        """As a record holds it: the best of each choice of what acts inside the model, at most `SHOWN`."""
        best: dict[tuple[Any, ...], Candidate] = {}
        for one in self.candidates:
            key = (one.levers.activation_checkpointing, one.levers.activation_storage, one.levers.tiles, one.gradient)
            best.setdefault(key, one)
        return {
            "cap": self.cap,
            "full_flops_per_micro_batch": self.reference_flops,
            "under_cap": len(self.candidates),
            "over_cap": self.over_cap,
            "best": [one.values() for one in itertools.islice(best.values(), SHOWN)],
        }


def lines(found: Mapping[str, Any]) -> list[str]:
    """The values of a search for people, the winner first.

    Args:
        found: `Found.values`.

    Returns:
        Lines of text.
    """
    shown = [
        f"best-memory: smallest peak at up to {found['cap']} x the FLOPs of full on the base; {found['under_cap']} "
        f"combinations within, {found['over_cap']} beyond"
    ]
    for one in found["best"]:
        words = [catalogue.flag(name, one[name]) for name in SEARCHED if one[name] is not False]
        words += [f"--gradient {one['gradient']}"]
        moved = gib(one["host_bytes_per_step"])
        shown.append(
            f"  {gib(one['peak_bytes'])}, {one['flops_ratio']:.2f} x, {moved} to and from the host per step: "
            f"{' '.join(words)}"
        )
    return shown


def search(
    plan: Plan,
    config: Mapping[str, Any],
    entry: Strategy,
    by_hand: Levers,
    gradient: str | None,
    knobs: Mapping[str, float | str],
    configure: Callable[[Levers], Mapping[str, Any]],
    hardware: Hardware | None = None,
) -> Found:
    """Search the levers for one model.

    Args:
        plan: A plan of the attack with any levers.
        config: The content of the model's config.json.
        entry: The strategy, with the other axes as they were chosen.
        by_hand: The levers that were given; None where one is free.
        gradient: The gradient method that was given; None: free.
        knobs: The strategy's knobs, `cap` among them.
        configure: What DeepSpeed gets with some levers.
        hardware: What candidates should fit, if it is known.

    Returns:
        All candidates under the cap.

    Raises:
        ConfigError: If no combination is under the cap, or none is allowed at all.
    """
    full = replace(plan, model=_base(config), checkpointing="none", storage="device", tiles=1, anchor=None)
    full = replace(full, gradient="backprop")
    reference, cap = _flops(full), float(knobs[CAP])
    states: dict[tuple[Any, ...], Any] = {}
    within: dict[tuple[Any, ...], tuple[Activations, float]] = {}
    found, ratios = [], []
    for method, levers, own in _combinations(plan, entry, by_hand, gradient, knobs):
        key = (levers.zero, levers.offload_optimizer, levers.offload_param)
        if key not in states:
            ds_config = configure(levers)
            states[key] = ds_config, replace(plan, ds_config=ds_config).states
        ds_config, terms = states[key]
        one = replace(plan, ds_config=ds_config, **inside(levers, method, own))
        same = (one.checkpointing, one.storage, one.tiles, one.anchor, levers.zero == 3)
        if same not in within:
            within[same] = one.activations, _flops(one) / reference
        one.__dict__.update(states=terms, activations=within[same][0])
        ratios.append(within[same][1])
        if ratios[-1] <= cap:
            found.append(
                Candidate(levers=levers, gradient=method.gradient, knobs=own, plan=one, flops_ratio=ratios[-1])
            )
    if not ratios:
        raise ConfigError(f"--strategy {entry.name}: no combination of the levers that were given is allowed.")
    if not found:
        raise ConfigError(
            f"--set cap={cap}: the levers that are left need at least {min(ratios):.3f} x the FLOPs of full on the "
            "base model. Take a larger cap, or give fewer levers by hand."
        )

    def order(one: Candidate) -> tuple[Any, ...]:
        lacks = hardware is not None and bool(one.plan.needs.lacking(hardware))
        return lacks, one.plan.needs.peak_bytes, one.flops_ratio, sum(host_traffic(one.plan))

    ranked = tuple(sorted(found, key=order))
    return Found(cap=cap, reference_flops=reference, candidates=ranked, over_cap=len(ratios) - len(found))


def _base(config: Mapping[str, Any]) -> Model:
    """The unlocked model of a configuration, all of it trained."""
    shape = replace(shapes.model_shape(config), locked=False, form=None, ranks=None)
    return attacked(config, shape, catalogue.strategy("full"), {})


def _flops(plan: Plan) -> int:
    """FLOPs of a micro-batch as torch's counter counts them."""
    flops = plan.activations.flops()
    return flops["forward"] + flops["backward"] + flops["recompute"]


def _combinations(
    plan: Plan, entry: Strategy, by_hand: Levers, gradient: str | None, knobs: Mapping[str, float | str]
) -> Iterator[tuple[Strategy, Levers, dict[str, float | str]]]:
    """Every allowed combination, the plainest first: the strategy with its gradient method, levers, and knobs.

    `nested` and `reverse` are there for DLR-Nets alone.
    """
    locked = bool(plan.model.shape.ranks)

    def free(given: Any, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return values if given is None else (given,)

    methods = []
    for name in free(gradient, GRADIENTS if locked else GRADIENTS[:1]):
        method = catalogue.combined(entry.name, entry.transform, entry.trainable, name)
        usual = method.resolve_knobs({})
        if name == "reverse" and gradient is None and knobs.get("dropout"):
            continue  # refused: another dropout would give another code
        methods.append((method, {k: knobs.get(k, value) for k, value in usual.items() if k != CAP}))
    for zero, optimizer, param, checkpointing, storage, tiles, (method, own) in itertools.product(
        free(by_hand.zero, (0, 1, 2, 3)), free(by_hand.offload_optimizer, (False, True)),
        free(by_hand.offload_param, (False, True)),
        free(by_hand.activation_checkpointing, CHECKPOINTING if locked else CHECKPOINTING[:2]),
        free(by_hand.activation_storage, STORAGE), free(by_hand.tiles, TILES), methods,
    ):  # fmt: skip
        levers = replace(
            by_hand, zero=zero, offload_optimizer=optimizer, offload_param=param,
            activation_checkpointing=checkpointing, activation_storage=storage, tiles=tiles,
        )  # fmt: skip
        try:
            yield method, method.resolve(levers), own
        except ConfigError:
            continue
