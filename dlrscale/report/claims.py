"""A verdict on each of the paper's five claims, given only where the records hold the evidence."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dlrscale.report.runs import HOST, Lock, Pair, Run, divide
from dlrscale.report.tables import loss, significant, size

STANDS, FALLS, OPEN = "stands", "falls", "not decided"
SAVED, SAVED_MLP = "memory/saved_bytes_per_token", "memory/saved_mlp_bytes_per_token"
TIME_MARGIN = 0.10  # a time asymmetry within this of 1 is noise
KEPT_NATS = 0.05  # our limit for C5: so many nats per token above the base model still count as kept
MIN_SEEDS = 3
UNDOING = ("flatten", "undistil", "drop-blocks")  # strategies that change the lock itself first
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
STUDENT = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}


@dataclass(frozen=True)
class Claim:
    """One claim: what it says, the verdict (`stands`, `falls`, `not decided`), and one line per finding."""

    id: str
    title: str
    verdict: str
    text: str


@dataclass(frozen=True)
class Slope:
    """Saved bytes per token of the MLP part against the depth K, for locks that differ in depth alone."""

    depths: tuple[float, ...]
    values: tuple[float, ...]
    per_block: float
    departure: float  # largest distance from the fitted line, as a share of the value

    @property
    def text(self) -> str:
        """The slope in words."""
        points = ", ".join(f"{size(v)} at K = {k:g}" for k, v in zip(self.depths, self.values, strict=True))
        shape = "from two depths" if len(self.depths) == 2 else f"within {self.departure:.1%} of a straight line"
        return f"DLR-Net part against depth: {points}; {size(self.per_block)} per block and token ({shape})."


def judge(locks: Sequence[Lock]) -> list[Claim]:
    """The five claims, C1 to C5, from locks with their attacks."""
    real = [lock for lock in locks if lock.id is not None]
    return [_memory(real), _backward(real), _optimisation(real), _adaptive(real), _capability(real)]


def pairs_of(lock: Lock, *strategies: str) -> list[Pair]:
    """A lock's rows of some strategies in which both sides were run."""
    return [p for p in lock.pairs if p.base and p.locked and (not strategies or p.strategy in strategies)]


def slopes(locks: Sequence[Lock]) -> list[Slope]:
    """Saved bytes against depth under `full`, for each form and base locked at two depths or more."""
    groups: dict[str, dict[float, float]] = {}
    for lock in locks:
        depth = lock.manifest.get("depth")
        if not isinstance(depth, (int, float)):
            continue
        for pair in lock.pairs:
            run = pair.locked
            value = run.metric(SAVED_MLP) if run and pair.strategy == "full" else None
            if run is not None and value is not None:
                key = json.dumps([lock.manifest.get("form"), lock.base_digest, run.key])
                groups.setdefault(key, {}).setdefault(float(depth), value)
    found = []
    for points in groups.values():
        if len(points) >= 2:
            depths, values = zip(*sorted(points.items()), strict=True)
            line = statistics.linear_regression(depths, values)
            fitted = [line.intercept + line.slope * k for k in depths]
            off = max(abs(v - f) / v if v else 0.0 for v, f in zip(values, fitted, strict=True))
            found.append(Slope(depths, values, line.slope, off))
    return found


def _together(verdicts: Sequence[str]) -> str:
    """One verdict over locks: only if all that are decided agree."""
    decided = {v for v in verdicts if v != OPEN}
    return decided.pop() if len(decided) == 1 else OPEN


def _claim(number: str, title: str, verdicts: Sequence[str], lines: Sequence[str]) -> Claim:
    return Claim(number, title, _together(verdicts), "\n".join(lines) or "Nothing measured.")


def _memory(locks: Sequence[Lock]) -> Claim:
    """C1: decided by the bytes saved under plain autograd; what checkpointing leaves is told beside it."""
    verdicts, lines = [], []
    for lock in locks:
        plain = pairs_of(lock, "full") or pairs_of(lock, "full-offload")  # offload moves states, not activations
        full = [p for p in plain if p.ratio(SAVED) is not None]
        if not full:
            lines.append(f"{lock.short}: no full or full-offload on both sides with saved bytes; not decided.")
        for pair in full:
            base, locked = pair.both(SAVED)
            ratio, mlp = pair.ratio(SAVED), pair.ratio(SAVED_MLP)
            verdicts.append(STANDS if ratio is not None and ratio > 1 else FALLS)
            part = f", the DLR-Net part alone {significant(mlp)}x" if mlp is not None else ""
            left = _left_by_checkpointing(lock, pair)
            lines.append(
                f"{lock.short}: {pair.label} saves {significant(ratio)}x the bytes per token ({size(locked)} "
                f"against {size(base)}){part}; {left}."
            )
    for slope in slopes(locks):
        if slope.per_block <= 0:
            verdicts.append(FALLS)
        lines.append(slope.text)
    if verdicts:
        lines.append(
            "The verdict is on plain autograd (full, full-offload), the reference; stock attackers use ckpt-layer."
        )
    return _claim("C1", "memory: plain backpropagation keeps more, in proportion to depth", verdicts, lines)


def _left_by_checkpointing(lock: Lock, full: Pair) -> str:
    """What layer checkpointing leaves of the lock's extra memory, and what it costs."""
    found = pairs_of(lock, "ckpt-layer")
    if not found:
        return "ckpt-layer was not run on both sides, so what it leaves is not known"
    pair, said = found[0], []
    base, locked = pair.both(SAVED)
    full_base, full_locked = full.both(SAVED)
    if None not in (base, locked, full_base, full_locked):
        left = divide(locked - base, full_locked - full_base)  # type: ignore[operator]
        share = f" ({max(left, 0):.0%} of the extra bytes)" if left is not None else ""
        said.append(f"{significant(divide(locked, base))}x{share}")
    peak_base, peak_locked = pair.peaks()
    peak = divide(peak_locked, peak_base)
    if peak is not None:
        said.append(f"peak memory {significant(peak)}x ({pair.where})")
    cost = divide(_step_time(pair.locked), _step_time(full.locked))
    if cost is not None:
        said.append(f"at {significant(cost)}x the step time of {full.label}")
    return f"ckpt-layer leaves {', '.join(said)}" if said else "ckpt-layer was run but not measured"


def _step_time(run: Run | None) -> float | None:
    return run.metric("time/step_s") if run else None


def _trained(lock: Lock) -> list[Pair]:
    """Rows that trained the locked architecture itself on both sides to the end."""
    found = []
    for pair in pairs_of(lock):
        transform = (pair.any.settings.get("axes") or {}).get("transform")
        undone = transform not in (None, "none") or pair.strategy in UNDOING
        if not undone and all(run is not None and run.ok for run in (pair.base, pair.locked)):
            found.append(pair)
    return found


def _backward(locks: Sequence[Lock]) -> Claim:
    """C2: by the ratio of ratios, locked against base, backward against forward."""
    verdicts, lines = [], []
    for lock in locks:
        figures = []
        for pair in _trained(lock):
            forward, backward = pair.ratio("time/forward_s"), pair.ratio("time/backward_s")
            asymmetry = divide(backward, forward)
            if asymmetry is not None:
                ratios = f"forward {significant(forward)}x, backward {significant(backward)}x"
                figures.append((pair, asymmetry, f"{pair.label} {significant(asymmetry)} ({ratios})"))
        if not figures:
            lines.append(f"{lock.short}: no attack with forward and backward times on both sides; not decided.")
            continue
        where = "on the CPU" if figures[0][0].where == HOST else "on the accelerator"
        lines.append(f"{lock.short}: backward / forward, {where}: {'; '.join(f[2] for f in figures)}.")
        plain = [f for f in figures if f[0].strategy == "full"] or figures
        signs = {0 if abs(a - 1) <= TIME_MARGIN else (1 if a > 1 else -1) for _, a, _ in plain}
        decided = len(signs) == 1 and where == "on the accelerator"
        verdicts.append({1: STANDS, -1: FALLS, 0: OPEN}[signs.pop()] if decided else OPEN)
    if verdicts:
        lines.append(
            f"One timed run per side; a figure within {TIME_MARGIN:.0%} of 1 decides nothing, nor does any on a CPU."
        )
    return _claim("C2", "backward: the backward pass is slowed more than the forward pass", verdicts, lines)


def _optimisation(locks: Sequence[Lock]) -> Claim:
    """C3: figures only, because the learning rate is untuned and the seed is one."""
    lines = []
    for lock in locks:
        figures = []
        for pair in _trained(lock):
            base, locked = pair.both("loss/heldout_task")
            if base is not None and locked is not None:
                figures.append(f"{pair.label} {loss(base)} and {loss(locked)} ({locked - base:+.3f})")
        if figures:
            lines.append(f"{lock.short}: task loss after training, base and locked (difference): {'; '.join(figures)}.")
    if lines:
        lines.append(f"{_seeds(locks)}, {_tuning(locks)}.")
    else:
        lines.append("No attack with a held-out task loss on both sides.")
    return Claim("C3", "optimisation: standard fine-tuning is made harder", OPEN, "\n".join(lines))


def _seeds(locks: Sequence[Lock]) -> str:
    seeds = {str(pair.any.seed) for lock in locks for pair in lock.pairs if pair.any.seed is not None}
    return "One seed" if len(seeds) < 2 else f"{len(seeds)} seeds"


def _tuning(locks: Sequence[Lock]) -> str:
    """Whether the settings were searched on both sides alike."""
    runs = [run for lock in locks for pair in lock.pairs for run in (pair.base, pair.locked) if run is not None]
    trials = {run.settings.get("search_trials") or 0 for run in runs}
    return (
        f"tuned in {trials.pop()} trials on each side"
        if len(trials) == 1 and 0 not in trials
        else ("untuned learning rate" if trials <= {0} else "learning rate not tuned alike in all")
    )


def _adaptive(locks: Sequence[Lock]) -> Claim:
    """C4: what an attacker who knows the lock gets by undoing it; figures only."""
    lines, found = [], False
    for lock in locks:
        if lock.run is not None and lock.run.metric("loss/heldout_flat") is not None:
            flat, locked = (lock.run.metric(f"loss/heldout_{k}") for k in ("flat", "locked"))
            found = True
            lines.append(
                f"{lock.short}: flattened without training its held-out loss is {loss(flat)}, as locked {loss(locked)}."
            )
        for pair in lock.pairs:
            if pair.strategy not in UNDOING or pair.locked is None:
                continue
            run, found = pair.locked, True
            base = pair.base.metric("loss/heldout_task") if pair.base else None
            before, after = (run.metric(f"loss/heldout_task{k}") for k in ("_start", ""))
            lines.append(
                f"{lock.short}, {pair.label} ({run.outcome}): task loss {loss(before)} after the transform, "
                f"{loss(after)} after training"
                f"{f'; the same on the base model {loss(base)}' if base is not None else ''}."
            )
    if found:
        lines.append(f"{_seeds(locks)}, {_tuning(locks)}.")
    else:
        lines.append("No attack that knows the lock, such as flatten, among these records.")
    return Claim("C4", "adaptive: it withstands attackers who know the lock", OPEN, "\n".join(lines))


def _capability(locks: Sequence[Lock]) -> Claim:
    """C5: the interval over seeds of the loss that the lock adds, where three seeds or more were locked."""
    groups: dict[str, list[tuple[str, float]]] = {}
    lines, verdicts = [], []
    for lock in locks:
        run = lock.run
        base, locked = (run.metric(f"loss/heldout_{k}") if run else None for k in ("base_model", "locked"))
        if run is None or base is None or locked is None:
            lines.append(f"{lock.short}: no lock run with held-out losses; not decided.")
            continue
        lines.append(f"{lock.short}: {loss(base)} before, {loss(locked)} locked: {locked - base:+.3f} nats per token.")
        same = {k: v for k, v in run.settings.items() if k not in ("seed", "out", "name", "command", "tracking_uri")}
        key = json.dumps([same], sort_keys=True, default=str)
        groups.setdefault(key, []).append((str(run.seed), locked - base))
    for points in groups.values():
        added = list(dict(points).values())
        if len(added) < MIN_SEEDS:
            verdicts.append(OPEN)
            continue
        mean = statistics.fmean(added)
        half = STUDENT.get(len(added) - 1, 2.2) * statistics.stdev(added) / math.sqrt(len(added))
        verdicts.append(STANDS if mean + half <= KEPT_NATS else FALLS if mean - half > KEPT_NATS else OPEN)
        lines.append(
            f"{len(added)} seeds: {mean:+.3f} nats, 95 % interval {mean - half:+.3f} to {mean + half:+.3f}; "
            f"our limit is +{KEPT_NATS} nats."
        )
    if verdicts and all(len(dict(p)) < MIN_SEEDS for p in groups.values()):
        lines.append(f"Fewer than {MIN_SEEDS} seeds per lock: the figure stands, the verdict is not decided.")
    return _claim("C5", "capability: the model's own abilities are kept", verdicts, lines)
