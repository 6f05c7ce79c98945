"""One attack over its seeds: what it is by its axes, whether it counts, and its differences with their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dlrscale.report.runs import Lock, Pair, Run
from dlrscale.search import cost_of

MIN_SEEDS = 3
TASK = "loss/heldout_task"
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
    def any(self) -> Run:
        """A run that is there."""
        return self.pairs[0].any

    @property
    def name(self) -> str:
        """The strategy with its search, and what sets it apart from others of the lock."""
        return self.pairs[0].setting

    @property
    def task(self) -> str:
        """What it is trained on: the data's last two names."""
        return self.pairs[0].task

    def runs(self, side: str) -> list[Run]:
        """The runs of a side, `base` or `locked`."""
        return [run for pair in self.pairs if (run := getattr(pair, side)) is not None]

    def axis(self, name: str) -> str:
        """The resolved choice on an axis: `transform`, `trainable` or `gradient`."""
        return str((self.any.settings.get("axes") or {}).get(name))

    def levers(self, **wanted: object) -> bool:
        """Whether some levers have these values."""
        own = (self.any.settings.get("axes") or {}).get("levers") or {}
        return all(own.get(name, PLAIN.get(name)) == value for name, value in wanted.items())

    @property
    def whole(self) -> bool:
        """Whether all of the model as it is goes through plain backpropagation, whatever is kept of it."""
        return (self.axis("transform"), self.axis("trainable"), self.axis("gradient")) == ("none", "all", "backprop")

    @property
    def plain(self) -> bool:
        """Whether this is plain autograd: the reference of C1."""
        return self.whole and self.levers(**PLAIN)

    @property
    def checkpointed(self) -> bool:
        """Whether this is the stock attacker: plain but for checkpointing per layer."""
        return self.whole and self.levers(**PLAIN | {"activation_checkpointing": "layer"})

    @property
    def in_place(self) -> bool:
        """Whether the locked architecture itself is trained."""
        return self.axis("transform") == "none"

    @property
    def knows_the_lock(self) -> bool:
        """Whether it makes use of how the lock is built."""
        nested = self.levers(activation_checkpointing="nested")
        return not self.in_place or self.axis("gradient") == "reverse" or nested

    @cached_property
    def gates(self) -> dict[str, tuple[bool, str]]:
        """By gate: whether all runs pass it, and the worst of them in words."""
        both, locked = self.runs("base") + self.runs("locked"), self.runs("locked")
        return {name: _gate(name, locked if name in REQUIRED else both) for name in GATES}

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

    def losses(self, side: str) -> list[float]:
        """The held-out task losses of a side after training."""
        return [loss for run in self.runs(side) if (loss := run.metric(TASK)) is not None]

    @property
    def gaps(self) -> list[float]:
        """Locked - base of the task loss after training, seed by seed."""
        both = [pair.both(TASK) for pair in self.pairs]
        return [locked - base for base, locked in both if base is not None and locked is not None]

    def flops_to(self, side: str, target: float) -> dict[Any, float] | None:
        """FLOPs to a task loss, the transform's included.

        Args:
            side: `base` or `locked`.
            target: Nats per token.

        Returns:
            FLOPs by seed; None unless all runs get there and tell them.
        """
        found = {}
        for run in self.runs(side):
            told = run.steps and (run.record.get("plan") or {}).get("flops_per_micro_batch")
            cost = cost_of(run.record, run.steps, target) if told else {}
            if not cost.get("target/reached") or "target/flops" not in cost:
                return None
            found[run.seed] = cost["target/flops"]
        return found or None


def rows(lock: Lock) -> list[Row]:
    """The rows of a lock, in the order of its pairs."""
    found: dict[str, list[Pair]] = {}
    for pair in lock.pairs:
        found.setdefault(pair.any.settings_key, []).append(pair)
    return [Row(tuple(pairs)) for pairs in found.values()]


def mean_loss(row: Row, side: str) -> float:
    """The mean over seeds of a side's task loss after training."""
    return statistics.fmean(row.losses(side))


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
