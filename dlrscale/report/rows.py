"""One attack over its seeds: what it is by its axes, whether it counts, and its differences with their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dlrscale.report.runs import Lock, Pair, Run
from dlrscale.search import HELDOUT, cost_of

MIN_SEEDS = 3
GATES = ("gradient", "engaged", "base_reaches", "equal_search")
REQUIRED = ("base_reaches", "equal_search")  # what is not told by these is not passed; the others say "does not apply"
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
# Inside the model, plain autograd; what an older record does not name it did not have.
PLAIN = {"activation_checkpointing": "none", "activation_storage": "device", "tiles": 1, "optimizer": "AdamW"}


@dataclass(frozen=True)
class Interval:
    """A mean and the 95 % interval of it by Student's t; of paired differences, that of the paired t-test.

    Of three values a percentile bootstrap is their range, which holds the mean of normal values in 75 % of cases
    (1 - 2 (1/2)^3), not in 95 %: it decides nothing here.
    """

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The interval of some values; unbounded for a single one."""
        mean, count = statistics.fmean(values), len(values)
        if count < 2:
            return cls(mean, -math.inf, math.inf, count)
        half = STUDENT.get(count - 1, 2.2) * statistics.stdev(values) / math.sqrt(count)
        return cls(mean, mean - half, mean + half, count)

    def __str__(self) -> str:
        if self.count < 2:
            return f"{self.mean:+.3f} (one seed)"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True, eq=False)
class Row:
    """Pairs that differ in the seed alone."""

    pairs: tuple[Pair, ...]

    @property
    def one(self) -> Run:
        """A run that is there."""
        return self.pairs[0].any

    @property
    def name(self) -> str:
        """The strategy with its search, and what sets it apart from others of the lock."""
        return self.pairs[0].setting

    @property
    def task(self) -> str:
        """What it is trained on: the name of the data."""
        return self.pairs[0].task

    def runs(self, side: str) -> list[Run]:
        """The runs of a side, `base` or `locked`."""
        return [run for pair in self.pairs if (run := getattr(pair, side)) is not None]

    def by_seed(self, side: str) -> dict[Any, Run]:
        """The runs of a side by seed; of one that was run twice, the first."""
        found: dict[Any, Run] = {}
        for run in self.runs(side):
            found.setdefault(run.seed, run)
        return found

    def axis(self, name: str) -> str | None:
        """The resolved choice on an axis, `transform`, `trainable` or `gradient`; None where that is not told."""
        return (self.one.settings.get("axes") or {}).get(name)

    def has_levers(self, **wanted: object) -> bool:
        """Whether some levers have these values."""
        own = (self.one.settings.get("axes") or {}).get("levers") or {}
        return all(own.get(name, PLAIN.get(name)) == value for name, value in wanted.items())

    @property
    def whole(self) -> bool:
        """Whether all of the model as it is goes through plain backpropagation, whatever is kept of it."""
        return (self.axis("transform"), self.axis("trainable"), self.axis("gradient")) == ("none", "all", "backprop")

    @property
    def plain(self) -> bool:
        """Whether this is plain autograd: the reference of C1."""
        return self.whole and self.has_levers(**PLAIN)

    @property
    def checkpointed(self) -> bool:
        """Whether this is the stock attacker: plain but for checkpointing per layer."""
        return self.whole and self.has_levers(**PLAIN | {"activation_checkpointing": "layer"})

    @property
    def in_place(self) -> bool:
        """Whether the locked architecture itself is trained."""
        return self.axis("transform") == "none"

    @property
    def transforms(self) -> bool:
        """Whether the locked model is changed first."""
        return self.axis("transform") not in (None, "none")

    @property
    def undoes(self) -> bool:
        """Whether the locked model becomes an ordinary one: regressed, or flattened whole and not in groups."""
        whole = not (self.one.settings.get("knobs") or {}).get("group")
        return self.axis("transform") == "undistil" or (self.axis("transform") == "flatten" and whole)

    @cached_property
    def gates(self) -> dict[str, tuple[bool, str]]:
        """By gate: whether all runs that ended ok pass it, and the worst of them in words."""
        base, locked = ([run for run in self.runs(side) if run.ok] for side in ("base", "locked"))
        return {name: _gate(name, locked if name in REQUIRED else base + locked) for name in GATES}

    @property
    def seeds(self) -> list[Any]:
        """The seeds with which both sides ended ok."""
        ended = [pair for pair in self.pairs if pair.base and pair.locked and pair.base.ok and pair.locked.ok]
        return sorted({pair.any.seed for pair in ended}, key=str)

    @property
    def faults(self) -> list[str]:
        """Why it does not count; empty where it does."""
        found = [f"{name.replace('_', ' ')}: {cell}" for name, (holds, cell) in self.gates.items() if not holds]
        if len(self.seeds) < MIN_SEEDS:
            found.append(f"seeds: {len(self.seeds)} of {MIN_SEEDS}")
        return found

    @property
    def is_real(self) -> bool:
        """Whether no run of it failed a gate on what it did, gradient or engaged, however many seeds there are."""
        runs = self.runs("base") + self.runs("locked")
        told = [(run.gates or {}).get(name) or {} for run in runs for name in ("gradient", "engaged")]
        return all(gate.get("holds") is not False for gate in told)

    @property
    def is_proven(self) -> bool:
        """Whether it is what it claims, by its gates, with seeds enough: what bytes and times need to count."""
        return all(self.gates[name][0] for name in ("gradient", "engaged")) and len(self.seeds) >= MIN_SEEDS

    def losses(self, side: str) -> dict[Any, float]:
        """The held-out task loss of a side after training, by seed."""
        found = {seed: run.metric(HELDOUT) for seed, run in self.by_seed(side).items()}
        return {seed: loss for seed, loss in found.items() if loss is not None}

    @property
    def gaps(self) -> list[float]:
        """Locked - base of the task loss after training, seed by seed."""
        return differences(self.losses("locked"), self.losses("base"))

    def best_losses(self, side: str) -> dict[Any, float | None]:
        """The lowest held-out task loss of each run, over all evaluations after its start; None where there is none."""
        found = {}
        for seed, run in self.by_seed(side).items():
            losses = [run.metric(HELDOUT), *(step.get(HELDOUT) for step in run.steps)]
            found[seed] = min((loss for loss in losses if loss is not None), default=None)
        return found

    def reached(self, side: str, target: float) -> bool | None:
        """Whether a side comes to a task loss with every seed; None where that is not told.

        Args:
            side: `base` or `locked`.
            target: Nats per token.

        Returns:
            A run that ended otherwise than ok and tells no loss has not come there.
        """
        runs = self.by_seed(side)
        if not runs:
            return None
        there = []
        for seed, loss in self.best_losses(side).items():
            there.append(loss <= target if loss is not None else None if runs[seed].ok else False)
        return False if False in there else None if None in there else True

    def flops_to(self, side: str, target: float) -> dict[Any, float] | None:
        """FLOPs to a task loss that a side comes to with every seed, the transform's included.

        Args:
            side: `base` or `locked`.
            target: Nats per token.

        Returns:
            FLOPs by seed; None where the records do not tell them.
        """
        found = {}
        for seed, run in self.by_seed(side).items():
            cost = cost_of(run.record, run.steps, target) if run.steps else {}
            if "target/flops" not in cost:
                return None
            found[seed] = cost["target/flops"]
        return found or None


def rows(lock: Lock) -> list[Row]:
    """The rows of a lock, in the order of its pairs."""
    found: dict[str, list[Pair]] = {}
    for pair in lock.pairs:
        found.setdefault(pair.any.settings_key, []).append(pair)
    return [Row(tuple(pairs)) for pairs in found.values()]


def called(row: Row) -> str:
    """A row's name where its task and its trials are told beside it."""
    trials = row.one.settings.get("search_trials")
    name = row.name.replace(f" (data {row.task})", "")
    return name.replace(f", {trials} trials", "", 1) if trials else name


def differences(above: Mapping[Any, float], below: Mapping[Any, float]) -> list[float]:
    """The differences of two losses by seed, where both are known."""
    return [value - below[seed] for seed, value in above.items() if seed in below]


def mean_loss(row: Row, side: str) -> float:
    """The mean over seeds of a side's task loss after training."""
    return statistics.fmean(row.losses(side).values())


def _gate(name: str, runs: Sequence[Run]) -> tuple[bool, str]:
    """Whether a gate holds for all runs, and the worst of them in words."""
    found = [(run.gates or {}).get(name) for run in runs]
    if not found or None in found:
        return False, "not checked"
    failed = [gate for gate in found if gate.get("holds") is False]
    unknown = [gate for gate in found if gate.get("holds") is None]
    if not failed and unknown:
        return name not in REQUIRED, str(unknown[0].get("why", "not told"))
    return not failed, _said(name, failed or found)


def _said(name: str, found: Sequence[dict[str, Any]]) -> str:
    gate = min(found, key=lambda g: g.get("cosine") or 0.0) if name == "gradient" else found[0]
    words = "yes" if gate.get("holds") else "no"
    if name == "gradient" and isinstance(gate.get("cosine"), (int, float)):
        return f"{words}, cosine {gate['cosine']:.6f}"
    if name == "base_reaches":
        return f"{words}, {gate.get('reached')} of {gate.get('runs')}"
    if name == "equal_search":
        return f"{words}, {gate.get('base_trials')} / {gate.get('trials')} trials"
    return f"{words}: {gate['why']}" if words == "no" and gate.get("why") else words
