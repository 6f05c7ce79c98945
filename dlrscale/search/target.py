"""What a run cost, and what it cost to reach a target loss: tokens, FLOPs and device-hours from its step rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dlrscale.errors import ConfigError

HELDOUT = "loss/heldout_task"


@dataclass(frozen=True)
class Cost:
    """Real tokens, FLOPs (None: not known) and device-hours."""

    tokens: float = 0.0
    flops: float | None = 0.0
    device_hours: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        flops = None if self.flops is None or other.flops is None else self.flops + other.flops
        return Cost(self.tokens + other.tokens, flops, self.device_hours + other.device_hours)

    def metrics(self, prefix: str) -> dict[str, float]:
        """The three as metrics; what is not known is left out."""
        found = {"tokens": self.tokens, "flops": self.flops, "device_hours": self.device_hours}
        return {f"{prefix}/{name}": value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Target:
    """A target: `loss` in nats per token, or `margin` nats above the base's best."""

    loss: float | None = None
    margin: float | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `2.5` or `base+0.05`.

        Args:
            text: The option's value.

        Returns:
            The target.

        Raises:
            ConfigError: If it is neither.
        """
        words, of_base = text.strip().replace(" ", ""), False
        if words.startswith("base"):
            words, of_base = words.removeprefix("base") or "0", True
        try:
            value = float(words)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (not of_base and value <= 0):
            raise ConfigError(f"--target {text}: give a loss in nats per token, such as 2.5, or base+MARGIN.")
        return cls(margin=value) if of_base else cls(loss=value)


def spent(rows: Sequence[Mapping[str, Any]], flops_per_token: float | None, devices: int, before: Cost) -> list[Cost]:
    """The cost after each step.

    Device-hours are the time of the steps and of waiting for data, on all devices; held-out evaluations, loading and
    saving are the experiment's and not the attacker's. FLOPs go by processed tokens, padding included.

    Args:
        rows: Step rows.
        flops_per_token: FLOPs of a processed token: of the planned micro-batch, what is run again included.
        devices: Ranks of the run.
        before: What was spent before the first step, on the transform.

    Returns:
        One cost per row.
    """
    found, processed, hours = [], 0, 0.0
    for row in rows:
        processed += row.get("processed_tokens") or 0
        hours += ((row.get("time/step_s") or 0) + (row.get("time/data_s") or 0)) * devices / 3600
        flops = None if flops_per_token is None else processed * flops_per_token
        found.append(before + Cost(row.get("tokens") or 0, flops, hours))
    return found


def to_target(evaluations: Sequence[tuple[Cost, float | None]], target: float, total: Cost) -> dict[str, float]:
    """The cost up to the first evaluation at or below a target; nothing is interpolated.

    Args:
        evaluations: Cost and held-out loss of each evaluation, in their order.
        target: Nats per token.
        total: What the whole run cost.

    Returns:
        `target/loss`, `target/reached` (1 or 0) and `target/tokens`, `.../flops`, `.../device_hours`: the run's
        totals where it was not reached.
    """
    hit = next((cost for cost, loss in evaluations if loss is not None and loss <= target), None)
    found = {"target/loss": target, "target/reached": float(hit is not None)}
    return found | (total if hit is None else hit).metrics("target")


def bill(
    rows: Sequence[Mapping[str, Any]],
    losses: Mapping[str, Any],
    flops_per_token: float | None,
    devices: int,
    target: float | None,
    before: Cost | None = None,
) -> dict[str, float]:
    """What a run cost in all, and to a target where there is one.

    Args:
        rows: Its step rows.
        losses: Metrics with the held-out loss before the first step (`..._start`) and, where it got there, at the end.
        flops_per_token: As `spent`.
        devices: Ranks of the run.
        target: Nats per token, or None.
        before: What was spent before the first step.

    Returns:
        Metrics: `cost/*`, and `target/*` as `to_target`.
    """
    before = before or Cost()
    costs = spent(rows, flops_per_token, devices, before)
    total = costs[-1] if costs else before
    evaluations = [(before, losses.get(f"{HELDOUT}_start"))]
    evaluations += [(cost, row.get(HELDOUT)) for cost, row in zip(costs, rows, strict=True)]
    evaluations.append((total, losses.get(HELDOUT)))
    found = total.metrics("cost")
    return found if target is None else found | to_target(evaluations, target, total)


def cost_of(
    entry: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], target: float | None = None
) -> dict[str, float]:
    """What an ended attack cost in all, and to a target that it may not have known.

    Args:
        entry: Its record.
        rows: Its step rows.
        target: Nats per token, or None.

    Returns:
        Metrics as `bill` gives them, FLOPs by the record's plan; none where the record does not hold what they need.
    """
    metrics, config = entry.get("metrics") or {}, entry.get("config") or {}
    if None in (config.get(name) for name in ("num_ranks", "micro_batch", "seq_len")):
        return {}
    return bill(rows, metrics, flops_per_token(entry), config["num_ranks"], target, transform_cost(entry))


def flops_per_token(entry: Mapping[str, Any]) -> float | None:
    """Planned FLOPs of a processed token of an ended attack; None where its record has no plan."""
    flops, config = (entry.get("plan") or {}).get("flops_per_micro_batch"), entry["config"]
    return sum(flops.values()) / (config["micro_batch"] * config["seq_len"]) if flops else None


def transform_cost(entry: Mapping[str, Any]) -> Cost:
    """What an ended attack has spent before its first step; its FLOPs are None where the record has them as null."""
    metrics = entry.get("metrics") or {}
    tokens, flops, seconds = (metrics.get(f"transform/{name}", 0.0) for name in ("tokens", "flops", "time_s"))
    return Cost(tokens or 0.0, flops, (seconds or 0.0) * entry["config"]["num_ranks"] / 3600)
