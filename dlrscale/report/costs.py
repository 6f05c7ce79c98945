"""What it costs to bring a locked model to where its base gets, and to undo the lock."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dlrscale.report.rows import Row, mean_loss, rows
from dlrscale.report.runs import Lock, Run, divide
from dlrscale.report.tables import loss, significant

SAVED = "memory/saved_bytes_per_token"
MARGIN_NATS = 0.05  # our target for C3 and C4: so many nats above the base still count as reached
UNDONE_NATS = 0.01  # a lock is undone so many nats above its own held-out loss (design: undo target)
SHOWN = 8  # rows that are named
Spent = tuple[Row, Mapping[Any, float]]  # a row with its FLOPs by seed


def cheapest(counted: Sequence[Row]) -> tuple[bool | None, list[str]]:
    """Whether some attack brings the locked model to the base's best, and at which cost.

    The target is `MARGIN_NATS` above what the base's best row of those that count gets to with every seed.

    Args:
        counted: The rows of one lock and task that count.

    Returns:
        True where a row gets there with every seed; False where none does and one of them knows how the lock is built;
        None where that is not known. Then what it is founded on, in sentences.
    """
    if not counted:
        return None, []
    target = min(max(row.losses("base")) for row in counted) + MARGIN_NATS
    goal = f"target {loss(target)} (the base's best {MARGIN_NATS:+.2f})"
    there, bases = (_reached(counted, side, target) for side in ("locked", "base"))
    if not there:
        closest = min(counted, key=lambda row: mean_loss(row, "locked"))
        knowing = any(row.knows_the_lock for row in counted)
        return False if knowing else None, [
            f"{goal}: none of {len(counted)} rows that count gets there with every seed; the closest, {closest.name}, "
            f"is at {loss(mean_loss(closest, 'locked'))}."
        ]
    base = bases[0] if bases else None
    told = [
        f"{goal}: {len(there)} of {len(counted)} rows that count get there with every seed, the cheapest by "
        f"{_price(there[0], base)}."
    ]
    knowing = [at for at in there[1:] if at[0].knows_the_lock]
    if knowing:
        told.append(f"of those that know the lock: {'; '.join(_price(at, base) for at in knowing[:SHOWN])}.")
    return True, told


def _reached(counted: Sequence[Row], side: str, target: float) -> list[Spent]:
    """The rows that get to a target with every seed, the cheapest first."""
    found = [(row, flops) for row in counted if (flops := row.flops_to(side, target)) is not None]
    return sorted(found, key=lambda at: statistics.fmean(at[1].values()))


def _price(at: Spent, base: Spent | None) -> str:
    """What a row needs to the target: FLOPs, and as a multiple of the base's cheapest, with its range over seeds."""
    row, flops = at
    told = f"{row.name} for {statistics.fmean(flops.values()):.3g} FLOPs"
    ratios = [flops[seed] / base[1][seed] for seed in flops if base and base[1].get(seed)]
    if base is not None and ratios:
        mean, *ends = (significant(value) for value in (statistics.fmean(ratios), min(ratios), max(ratios)))
        told += f", {mean}x ({' to '.join(ends)}) the base's cheapest ({base[0].name})"
    peak = [ratio for pair in row.pairs if (ratio := divide(*reversed(pair.peaks()))) is not None]
    saved = [ratio for pair in row.pairs if (ratio := pair.ratio(SAVED)) is not None]
    if peak and saved:
        told += f", saved bytes {significant(statistics.fmean(saved))}x, peak {significant(statistics.fmean(peak))}x"
    return told


def undone(lock: Lock) -> list[str]:
    """What it costs to make the locked model an ordinary one as good as it, against what the lock cost.

    Told by the runs that flatten or regress and know the loss on the text on which the lock was judged.

    Args:
        lock: The lock with its attacks.

    Returns:
        A sentence, or none where no run tells.
    """
    own = lock.run
    locked = own.metric("loss/heldout_locked") if own else None
    if own is None or locked is None:
        return []
    found = [
        (row.name, *point)
        for row in rows(lock)
        if row.axis("transform") in ("flatten", "undistil")
        for run in row.runs("locked")
        if _judged_as(run, own)
        for point in points(run)
    ]
    if not found:
        return []
    target, spent = locked + UNDONE_NATS, own.metric("cost/flops")
    goal = f"{loss(target)} (as locked {UNDONE_NATS:+.2f})"
    there = [(flops, name) for name, flops, reached in found if reached <= target]
    if not there:
        name, _, least = min(found, key=lambda at: at[2])
        return [f"{lock.short}: not undone to {goal}; {name} gets to {loss(least)}."]
    flops, name = min(there)
    ratio = f", {significant(flops / spent)} of the lock's own" if spent else ""
    return [f"{lock.short}: undone to {goal} by {name} for {flops:.3g} FLOPs{ratio}."]


def _judged_as(run: Run, lock: Run) -> bool:
    """Whether an attack's own-domain loss is on the very tokens on which the lock was judged."""
    mine, theirs = run.settings, lock.settings
    same = mine.get("heldout_base_digest") == theirs.get("heldout_digest") is not None
    return same and all(mine.get(name) == theirs.get(name) for name in ("heldout_limit", "seq_len"))


def points(run: Run) -> list[tuple[float, float]]:
    """FLOPs and loss on the base's own text: after the transform, and at each evaluation of the training after it.

    Args:
        run: An attack that transforms first, with the evaluations of `--heldout-base`.

    Returns:
        In the order of the run; FLOPs are those of the transform and the planned ones of the steps.
    """
    before, start = run.metric("transform/flops"), run.metric("loss/heldout_base_start")
    if before is None or start is None:
        return []
    found, processed = [(before, start)], 0.0
    planned = (run.record.get("plan") or {}).get("flops_per_micro_batch")
    for step in run.steps:
        processed += step.get("processed_tokens") or 0
        value = step.get("loss/heldout_base")
        if value is not None and planned:
            per_token = sum(planned.values()) / (run.settings["micro_batch"] * run.settings["seq_len"])
            found.append((before + processed * per_token, value))
    return found
