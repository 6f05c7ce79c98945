"""What it costs to bring a locked model to where its base gets, and to undo the lock."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dlrscale.report.rows import Row, called, rows
from dlrscale.report.runs import Lock, Run, divide
from dlrscale.report.tables import count, loss, significant
from dlrscale.search import flops_per_token, spent, transform_cost

SAVED = "memory/saved_bytes_per_token"
OWN = "loss/heldout_base"
MARGIN_NATS = 0.05  # our target for C3 and C4: so many nats above the base still count as reached
UNDONE_NATS = 0.01  # a lock is undone so many nats above its own held-out loss
SHOWN = 8  # rows that are named
READ = ("heldout_limit", "seq_len", "document_separator")  # what decides which tokens a text is judged on
Flops = Mapping[Any, float] | None  # by seed; None where not known


def cheapest(counted: Sequence[Row], needed: Sequence[str]) -> tuple[bool | None, list[str]]:
    """Whether some attack brings the locked model to the base's best, and at which cost.

    The target is `MARGIN_NATS` above what the base's best row of those that count gets to with every seed.

    Args:
        counted: The rows of one lock and task that count.
        needed: The transforms that must have been tried for the lock to stand.

    Returns:
        True where a row gets there with every seed; False where none does, and the needed transforms are among those
        that get there on the base; None where that is not known. Then what it is founded on, in sentences.
    """
    bases = [[loss for loss in row.best_losses("base").values() if loss is not None] for row in counted]
    if not any(bases):
        return None, []
    target = min(max(losses) for losses in bases if losses) + MARGIN_NATS
    goal = f"target {loss(target)} (the base's best {MARGIN_NATS:+.2f})"
    there = {side: _there(counted, side, target) for side in ("base", "locked")}
    if there["locked"]:
        return True, _fallen(goal, there["base"], there["locked"], len(counted))
    untold = [called(row) for row in counted if row.reached("locked", target) is None]
    if untold:
        return None, [f"{goal}: not told by the records of {'; '.join(untold)}."]
    best = {row: max(v for v in row.best_losses("locked").values() if v is not None) for row in counted}
    closest = min(best, key=lambda row: best[row])
    budget = max((run.metric("cost/tokens") or 0 for row in counted for run in row.runs("locked")), default=0)
    told = [
        f"{goal}: none of {len(counted)} rows that count gets there with every seed, within {count(budget)} tokens; "
        f"the closest, {called(closest)}, to {loss(best[closest])}."
    ]
    able = {row.axis("transform") for row, _ in there["base"] if row.undoes}
    lacking = [name for name in needed if name not in able]
    if lacking:
        told.append(f"not tried by a row that counts and gets there on the base: {', '.join(lacking)}; not decided.")
    return None if lacking else False, told


def _there(counted: Sequence[Row], side: str, target: float) -> list[tuple[Row, Flops]]:
    """The rows that get to a target with every seed, the cheapest first, those of unknown cost last."""
    found = [(row, row.flops_to(side, target)) for row in counted if row.reached(side, target)]
    return sorted(found, key=lambda at: statistics.fmean(at[1].values()) if at[1] else float("inf"))


def _fallen(goal: str, bases: Sequence[Any], there: Sequence[Any], counted: int) -> list[str]:
    base = bases[0] if bases and bases[0][1] else None
    told = [
        f"{goal}: {len(there)} of {counted} rows that count get there with every seed, the cheapest by "
        f"{_price(*there[0], base)}."
    ]
    knowing = [at for at in there[1:] if knows_the_lock(at[0])]
    if knowing:
        told.append(f"of those that know the lock: {'; '.join(_price(*at, base) for at in knowing[:SHOWN])}.")
    return told


def knows_the_lock(row: Row) -> bool:
    """Whether an attack makes use of how the lock is built."""
    return row.transforms or row.axis("gradient") == "reverse" or row.has_levers(activation_checkpointing="nested")


def _price(row: Row, flops: Flops, base: tuple[Row, Mapping[Any, float]] | None) -> str:
    """What a row needs to the target: FLOPs, and as a multiple of the base's cheapest, with its range over seeds."""
    if flops is None:
        return f"{called(row)}, whose FLOPs are not known"
    told = f"{called(row)} for {statistics.fmean(flops.values()):.3g} FLOPs"
    ratios = [flops[seed] / base[1][seed] for seed in flops if base and base[1].get(seed)]
    if base is not None and ratios:
        mean, *ends = (significant(value) for value in (statistics.fmean(ratios), min(ratios), max(ratios)))
        told += f", {mean}x ({' to '.join(ends)}) the base's cheapest ({called(base[0])})"
    peak = [ratio for pair in row.pairs if (ratio := divide(*reversed(pair.peaks()))) is not None]
    saved = [ratio for pair in row.pairs if (ratio := pair.ratio(SAVED)) is not None]
    if peak and saved:
        told += f", saved bytes {significant(statistics.fmean(saved))}x, peak {significant(statistics.fmean(peak))}x"
    return told


def undone(lock: Lock) -> list[str]:
    """What it costs to make the locked model an ordinary one as good as it, against what the lock cost.

    Told by the rows that flatten whole nets or regress, with every seed, and know the loss on the tokens on which the
    lock was judged.

    Args:
        lock: The lock with its attacks.

    Returns:
        A sentence, or none where no row tells.
    """
    own = lock.run
    locked = own.metric("loss/heldout_locked") if own else None
    if own is None or locked is None:
        return []
    target, price = locked + UNDONE_NATS, own.metric("cost/flops")
    goal = f"{loss(target)} (as locked {UNDONE_NATS:+.2f})"
    there, short = [], []
    for row in rows(lock):
        if not row.undoes or not row.is_real:
            continue
        curves = [points(run) for run in row.by_seed("locked").values() if _judged_as(run, own)]
        costs = [min((flops for flops, reached in curve if reached <= target), default=None) for curve in curves]
        if curves and None not in costs:
            there.append((statistics.fmean(costs), row.name, costs))  # type: ignore[arg-type]
        elif any(curves):
            short.append((max(min(reached for _, reached in curve) for curve in curves if curve), row.name))
    if there:
        mean, name, costs = min(there)
        seeds = f"{len(costs)} seed{'s' * (len(costs) > 1)}"
        ratio = f", {_range([c / price for c in costs])} of the lock's own" if price else ""
        return [f"{lock.short}: undone to {goal} by {name} for {mean:.3g} FLOPs{ratio} ({seeds})."]
    if short:
        least, name = min(short)
        return [f"{lock.short}: not undone to {goal} with every seed; {name} gets to {loss(least)}."]
    return []


def _range(values: Sequence[float]) -> str:
    mean, low, high = (significant(value) for value in (statistics.fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _judged_as(run: Run, lock: Run) -> bool:
    """Whether an attack's own-domain loss is on the very tokens on which the lock was judged."""
    mine, theirs = run.settings, lock.settings
    same = mine.get("heldout_base_digest") == theirs.get("heldout_digest") is not None
    return same and all(mine.get(name) == theirs.get(name) for name in READ)


def points(run: Run) -> list[tuple[float, float]]:
    """FLOPs and loss on the base's own text: after the transform, at each evaluation of the training, and at its end.

    Args:
        run: An attack that transforms first, with the evaluations of `--heldout-base`.

    Returns:
        In the order of the run; FLOPs are those of the transform and the planned ones of the steps.
    """
    if None in (run.settings.get(name) for name in ("num_ranks", "micro_batch", "seq_len")):
        return []
    before = transform_cost(run.record)
    costs = spent(run.steps, flops_per_token(run.record), run.settings["num_ranks"], before)
    found = [(before, run.metric(f"{OWN}_start"))]
    found += [(cost, step.get(OWN)) for cost, step in zip(costs, run.steps, strict=True)]
    found += [(costs[-1], run.metric(OWN))] if costs else []
    return [(cost.flops, value) for cost, value in found if cost.flops is not None and value is not None]
