"""A verdict on each of the paper's five claims, given only where the records hold the evidence."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dlrscale.report import costs
from dlrscale.report.costs import MARGIN_NATS, SAVED
from dlrscale.report.rows import MIN_SEEDS, Interval, Row, called, differences, mean_loss, rows
from dlrscale.report.runs import FOUND_KEYS, HOST, Lock, Pair, Run, divide
from dlrscale.report.tables import loss, significant, size
from dlrscale.search import HELDOUT

STANDS, FALLS, OPEN = "stands", "falls", "not decided"
SAVED_MLP = "memory/saved_mlp_bytes_per_token"
TIME_MARGIN = 0.10  # a time asymmetry within this of 1 is noise
KEPT_NATS = 0.05  # our limit for C5: so many nats per token above the base model still count as kept
ON_ACCELERATOR, ON_CPU = "on the accelerator", "on the CPU"


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
    attacked = [lock for lock in real if lock.pairs] or real
    return [_memory(attacked), _backward(attacked), _optimisation(attacked), _adaptive(attacked), _capability(real)]


def _real(lock: Lock) -> list[Row]:
    """A lock's rows with both sides whose axes are told, without those that a gate found not to be what they claim."""
    found = [row for row in rows(lock) if row.is_real and row.axis("transform") is not None]
    return [row for row in found if any(pair.base and pair.locked for pair in row.pairs)]


def _left_out(lock: Lock) -> list[str]:
    """A line on the rows that are left out of all claims."""
    failed = [row.name for row in rows(lock) if not row.is_real]
    untold = [row.name for row in rows(lock) if row.is_real and row.axis("transform") is None]
    lines = [f"{lock.short}: left out, a gate fails: {'; '.join(failed)}."] if failed else []
    return lines + ([f"{lock.short}: left out, no axes in the records: {'; '.join(untold)}."] if untold else [])


def by_depth(locks: Sequence[Lock]) -> list[list[tuple[float, Pair, Lock]]]:
    """Plain autograd on locks that differ in depth and seed alone, two depths or more, by depth."""
    groups: dict[str, list[tuple[float, Pair, Lock]]] = {}
    for lock in locks:
        facts, depth = lock.manifest, lock.manifest.get("depth")
        made = {name: facts.get(name) for name in ("form", "coupling", "start", "harden", "layers", "rank")}
        for pair in (pair for row in rows(lock) if row.plain and row.is_real for pair in row.pairs):
            value = pair.locked.metric(SAVED_MLP) if pair.locked else None
            if pair.locked and isinstance(depth, (int, float)) and value:
                key = json.dumps([made, lock.base_digest, pair.locked.key], default=str)
                groups.setdefault(key, []).append((float(depth), pair, lock))
    return [sorted(g, key=lambda p: p[0]) for g in groups.values() if len({p[0] for p in g}) > 1]


def slopes(locks: Sequence[Lock]) -> list[Slope]:
    """Saved bytes against depth under plain autograd (`by_depth`), with the fitted line; each line once."""
    found = {}
    for group in by_depth(locks):
        points = {depth: pair.locked.metric(SAVED_MLP) for depth, pair, _ in group if pair.locked}
        depths, values = zip(*sorted(points.items()), strict=True)
        line = statistics.linear_regression(depths, values)
        fitted = [line.intercept + line.slope * k for k in depths]
        off = max(abs(v - f) / v if v else 0.0 for v, f in zip(values, fitted, strict=True))
        found.setdefault((depths, values), Slope(depths, values, line.slope, off))
    return list(found.values())


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
        plain = [pair for row in _real(lock) if row.plain for pair in row.pairs if pair.ratio(SAVED) is not None]
        still = [pair for pair in plain if not pair.any.settings.get("offload_optimizer")]  # offload moves states alone
        if not plain:
            lines.append(f"{lock.short}: no full or full-offload on both sides with saved bytes; not decided.")
        for pair in _one_each(still or plain):
            base, locked = pair.both(SAVED)
            ratio, mlp = pair.ratio(SAVED), pair.ratio(SAVED_MLP)
            verdicts.append(STANDS if ratio is not None and ratio > 1 else FALLS)
            part = f", the DLR-Net part alone {significant(mlp)}x" if mlp is not None else ""
            left = _left_by_checkpointing(lock, pair)
            lines.append(
                f"{lock.short}, {pair.task}: {pair.strategy} saves {significant(ratio)}x the bytes per token "
                f"({size(locked)} against {size(base)}){part}; {left}."
            )
        lines += _left_out(lock)
    for slope in slopes(locks):
        if slope.per_block <= 0:
            verdicts.append(FALLS)
        lines.append(slope.text)
    if verdicts:
        lines.append(
            "The verdict is on plain autograd (full, full-offload), the reference; stock attackers use ckpt-layer."
        )
    return _claim("C1", "memory: plain backpropagation keeps more, in proportion to depth", verdicts, lines)


def _one_each(pairs: Sequence[Pair]) -> list[Pair]:
    """One pair for each setting: what is told of it depends on no seed."""
    found: dict[str, Pair] = {}
    for pair in pairs:
        found.setdefault(pair.any.settings_key, pair)
    return list(found.values())


def _left_by_checkpointing(lock: Lock, full: Pair) -> str:
    """What layer checkpointing leaves of the lock's extra memory, and what it costs."""
    found = [
        pair for row in _real(lock) if row.checkpointed and row.pairs[0].task_key == full.task_key for pair in row.pairs
    ]
    pair = next((p for p in found if p.base and p.locked), None)
    if pair is None:
        return "ckpt-layer was not run on both sides, so what it leaves is not known"
    said = []
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
        said.append(f"at {significant(cost)}x the step time of {full.strategy}")
    return f"ckpt-layer leaves {', '.join(said)}" if said else "ckpt-layer was run but not measured"


def _step_time(run: Run | None) -> float | None:
    return run.metric("time/step_s") if run else None


def _backward(locks: Sequence[Lock]) -> Claim:
    """C2: by the ratio of ratios, locked against base, backward against forward, of plain rows where there are any."""
    verdicts, lines = [], []
    for lock in locks:
        figures = [f for row in _real(lock) if row.in_place and (f := _asymmetry(row))]
        if not figures:
            lines.append(f"{lock.short}: no attack with forward and backward times on both sides; not decided.")
            continue
        for task, where in dict.fromkeys((row.task, place) for row, place, _, _ in figures):
            told = "; ".join(words for row, place, _, words in figures if (row.task, place) == (task, where))
            lines.append(f"{lock.short}, {task}: backward / forward, {where}: {told}.")
        proven = [(row, known) for row, where, known, _ in figures if where == ON_ACCELERATOR and row.is_proven]
        plain = [known for row, known in proven if row.plain] or [known for _, known in proven]
        found = {STANDS if i.low > 1 + TIME_MARGIN else FALLS if i.high < 1 - TIME_MARGIN else OPEN for i in plain}
        verdicts.append(found.pop() if len(found) == 1 else OPEN)
    if verdicts:
        lines.append(
            f"Means over seeds. Three seeds whose interval lies {TIME_MARGIN:.0%} or more off 1 decide, on an "
            "accelerator; nothing does on a CPU."
        )
    return _claim("C2", "backward: the backward pass is slowed more than the forward pass", verdicts, lines)


def _asymmetry(row: Row) -> tuple[Row, str, Interval, str] | None:
    """Backward ratio / forward ratio: where it was timed, its interval over seeds, and the figures in words."""
    ended = [p for p in row.pairs if p.base and p.locked and p.base.ok and p.locked.ok]
    ratios = [(p.ratio("time/forward_s"), p.ratio("time/backward_s")) for p in ended]
    known = [(f, b) for f, b in ratios if f and b is not None]
    if not known:
        return None
    forward, backward = (significant(statistics.fmean(values)) for values in zip(*known, strict=True))
    interval = Interval.of([b / f for f, b in known])
    where = ON_CPU if any(p.where == HOST for p in ended) else ON_ACCELERATOR
    words = f"{called(row)} {significant(interval.mean)} (forward {forward}x, backward {backward}x)"
    return row, where, interval, words


def _by_task(found: Sequence[Row]) -> list[list[Row]]:
    """Rows whose losses can be compared, together."""
    tasks: dict[str, list[Row]] = {}
    for row in found:
        tasks.setdefault(row.pairs[0].task_key, []).append(row)
    return list(tasks.values())


def _optimisation(locks: Sequence[Lock]) -> Claim:
    """C3: the attacker's best on the locked architecture above the best on the base, of the rows that count."""
    verdicts, lines = [], []
    for lock in locks:
        for found in _by_task([row for row in _real(lock) if row.in_place and row.gaps]):
            counted, others = [row for row in found if not row.faults], [row for row in found if row.faults]
            where = f"{lock.short}, {found[0].task}"
            if counted:
                base, locked = (min(counted, key=lambda row: mean_loss(row, side)) for side in ("base", "locked"))
                gap = Interval.of(differences(locked.losses("locked"), base.losses("base")))
                lines.append(
                    f"{where}: the best of {len(counted)} rows that count is {called(locked)} on the locked model "
                    f"({loss(mean_loss(locked, 'locked'))}) and {called(base)} on the base "
                    f"({loss(mean_loss(base, 'base'))}): {gap} nats, against a limit of {MARGIN_NATS:+.2f}"
                    f"{_before(locked)}."
                )
                lines.append(f"{where}: locked - base of each row that counts: {_gaps(counted)}.")
                verdicts.append(STANDS if gap.low > MARGIN_NATS else FALLS if gap.high <= MARGIN_NATS else OPEN)
            else:
                verdicts.append(OPEN)
            if others:
                lines.append(f"{where}: locked - base of rows that do not count: {_gaps(others)}.")
    if lines:
        lines.append(
            f"{_seeds(locks)}, {_tuning(locks)}. Intervals: paired by seed, Student's t, 95 %; nothing makes up for "
            "the choice of the best row by the same seeds, on either side."
        )
    else:
        lines.append("No attack with a held-out task loss on both sides.")
    return _claim("C3", "optimisation: standard fine-tuning is made harder", verdicts, lines)


def _gaps(found: Sequence[Row]) -> str:
    """The differences of some rows, the lowest locked loss first; how many seeds did not end ok."""
    same: dict[str, list[str]] = {}
    for row in sorted(found, key=lambda row: mean_loss(row, "locked")):
        same.setdefault(f"{Interval.of(row.gaps)}{_lost(row)}", []).append(called(row))
    return "; ".join(f"{', '.join(names)} {told}" for told, names in same.items())


def _before(row: Row) -> str:
    """How far apart both sides were before they were trained."""
    apart = [pair.both(f"{HELDOUT}_start") for pair in row.pairs]
    known = [locked - base for base, locked in apart if base is not None and locked is not None]
    return f" ({statistics.fmean(known):+.3f} before training)" if known else ""


def _lost(row: Row) -> str:
    ends = [str(run.outcome) for side in ("base", "locked") for run in row.runs(side) if not run.ok]
    return f" ({', '.join(f'{ends.count(end)} {end}' for end in dict.fromkeys(ends))})" if ends else ""


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
    """C4: by the cheapest attack that brings the locked model to what the base reaches, its transform paid for."""
    verdicts, lines = [], []
    for lock in locks:
        lines += _flat(lock) + costs.undone(lock)
        needed = ("undistil",) if lock.manifest.get("form") == "prenorm" else ("flatten", "undistil")
        outcomes = []
        for found in _by_task([row for row in _real(lock) if row.gaps]):
            reached, told = costs.cheapest([row for row in found if not row.faults], needed)
            outcomes.append(reached)
            lines += [f"{lock.short}, {found[0].task}: {line}" for line in told]
        if outcomes:  # one task is enough to fall
            verdicts.append(FALLS if True in outcomes else OPEN if None in outcomes else STANDS)
        changed = [row for row in rows(lock) if row.transforms and row.is_real and row.runs("locked")]
        for row in changed:
            if row.faults:
                ends = ", ".join(dict.fromkeys(str(run.outcome) for run in row.runs("locked")))
                lines.append(f"{lock.short}, {row.name} ({ends}): {_ended(row)}; does not count.")
        if not changed:
            lines.append(f"{lock.short}: no attack that changes the locked model first, such as flatten or undistil.")
    lines.append(f"{_seeds(locks)}, {_tuning(locks)}. FLOPs are planned, with those of the transform.")
    return _claim("C4", "adaptive: it withstands attackers who know the lock", verdicts, lines)


def _ended(row: Row) -> str:
    run = row.runs("locked")[0]
    before, after = (run.metric(f"{HELDOUT}{k}") for k in ("_start", ""))
    base = next((value for other in row.runs("base") if (value := other.metric(HELDOUT)) is not None), None)
    also = f"; the same on the base model {loss(base)}" if base is not None else ""
    return f"task loss {loss(before)} after the transform, {loss(after)} after training{also}"


def _flat(lock: Lock) -> list[str]:
    if lock.run is None or lock.run.metric("loss/heldout_flat") is None:
        return []
    flat, locked = (lock.run.metric(f"loss/heldout_{k}") for k in ("flat", "locked"))
    return [f"{lock.short}: flattened without training its held-out loss is {loss(flat)}, as locked {loss(locked)}."]


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
        own = FOUND_KEYS | {"seed", "out", "name", "command", "tracking_uri"}
        same = {k: v for k, v in run.settings.items() if k not in own}
        key = json.dumps([same], sort_keys=True, default=str)
        groups.setdefault(key, []).append((str(run.seed), locked - base))
    for points in groups.values():
        added = list(dict(points).values())
        if len(added) < MIN_SEEDS:
            verdicts.append(OPEN)
            continue
        known = Interval.of(added)
        verdicts.append(STANDS if known.high <= KEPT_NATS else FALLS if known.low > KEPT_NATS else OPEN)
        lines.append(f"{len(added)} seeds: {known} nats (95 %); our limit is +{KEPT_NATS} nats.")
    if verdicts and all(len(dict(p)) < MIN_SEEDS for p in groups.values()):
        lines.append(f"Fewer than {MIN_SEEDS} seeds per lock: the figure stands, the verdict is not decided.")
    return _claim("C5", "capability: the model's own abilities are kept", verdicts, lines)
