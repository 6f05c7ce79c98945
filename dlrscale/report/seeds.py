"""What stands over several runs of a lock: means over seeds, costs to a target, gates and searches."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from dlrscale.report.page import MISSING, Table
from dlrscale.report.rows import MIN_SEEDS, rows
from dlrscale.report.runs import PEAKS, Lock, Pair, Run, divide
from dlrscale.report.tables import SIDES, count, loss, seconds, significant, size, text

SPENT = (("tokens", "tokens"), ("FLOPs", "flops"), ("device-hours", "device_hours"))


def blocks(lock: Lock) -> list[Table]:
    """The tables of a lock that there is something for."""
    found = []
    if any(len(row.pairs) > 1 for row in rows(lock)):
        found.append(means(lock))
    if any(pair.locked and pair.locked.metric("transform/tokens") is not None for pair in lock.pairs):
        found.append(transforms(lock))
    if any(run.metric("target/loss") is not None for pair in lock.pairs for run in _runs(pair)):
        found.append(targets(lock))
    if any(run.gates for pair in lock.pairs for run in _runs(pair)):
        found.append(gates(lock))
    if lock.searches:
        found.append(searches(lock))
    return found


def spread(values: Sequence[float | None], show: Callable[[float | None], str]) -> str:
    """The mean of some values and their sample standard deviation; one value stands alone."""
    known = [v for v in values if v is not None]
    if not known:
        return MISSING
    mean = show(statistics.fmean(known))
    return f"{mean} ± {show(statistics.stdev(known))} (n = {len(known)})" if len(known) > 1 else mean


def means(lock: Lock) -> Table:
    """Mean and spread over seeds; the rows of each seed stand in the other tables."""
    cells = []
    for row in rows(lock):
        losses = [row.losses(side).values() for side in ("base", "locked")]
        seeds = sorted({str(pair.any.seed) for pair in row.pairs})
        cells.append(
            [
                row.name,
                ", ".join(seeds),
                *(spread(list(values), loss) for values in losses),
                spread(row.gaps, lambda v: MISSING if v is None else f"{v:.3f}"),
                spread([pair.ratio("time/step_s") for pair in row.pairs], significant),
                spread([divide(*reversed(pair.peaks())) for pair in row.pairs], significant),
            ]
        )
    groups = [
        ("", ["strategy", "seeds"]),
        ("task loss after", ["base", "locked", "locked - base"]),
        ("step time", ["ratio"]),
        ("peak", ["ratio"]),
    ]
    note = "Mean ± sample standard deviation over seeds; differences and ratios are taken seed by seed."
    return Table("Over seeds", groups, cells, note)


def transforms(lock: Lock) -> Table:
    """What each transform of the locked model took, before the training whose costs stand in the other tables."""
    found = []
    for pair in lock.pairs:
        run = pair.locked
        if run is None or run.metric("transform/tokens") is None:
            continue
        phase, (metric, key) = (run.record.get("phases") or {}).get("transform") or {}, PEAKS[pair.where]
        spent = [run.metric(f"transform/{name}") for name in ("tokens", "flops", "time_s")]
        shown = [show(value) for show, value in zip((count, _amount, seconds), spent, strict=True)]
        found.append([pair.label, pair.where, *shown, size(phase.get(key)), size(run.metric(metric))])
    groups = [
        ("", ["strategy", "peak measured on"]),
        ("", ["tokens", "FLOPs", "time"]),
        ("peak", ["transform", "training"]),
    ]
    note = "FLOPs: over all ranks. The attacker needs the larger peak, which is the one in the other tables."
    return Table("Transforms", groups, found, note)


def _amount(value: float | None) -> str:
    return MISSING if value is None else amount(value)


def targets(lock: Lock) -> Table:
    """Tokens, FLOPs and device-hours to the target, alone and with the trials of the search."""
    found = []
    for pair in lock.pairs:
        sides = _runs(pair)
        target = next((v for run in sides if (v := run.metric("target/loss")) is not None), None)
        if target is None:
            continue
        cells = [pair.label, loss(target)]
        for _, name in SPENT:
            cells += _censored(pair, [run and run.metric(f"target/{name}") for run in (pair.base, pair.locked)])
        with_search = [_with_search(lock, run) for run in (pair.base, pair.locked)]
        found.append([*cells, *_censored(pair, with_search)])
    groups = [
        ("", ["strategy", "target"]),
        *((title, SIDES) for title, _ in SPENT),
        ("tokens with the search", SIDES),
    ]
    if all(row[-1] == MISSING for row in found):  # the trials are not among the records
        groups, found = groups[:-1], [row[: -len(SIDES)] for row in found]
    note = (
        "To the first held-out evaluation at or below the target, nothing interpolated; >: not reached in all that was "
        "spent. FLOPs: planned. Device-hours: time of steps and data on all devices."
    )
    return Table("To the target", groups, found, note)


def _runs(pair: Pair) -> list[Run]:
    return [run for run in (pair.base, pair.locked) if run is not None]


def _with_search(lock: Lock, run: Run | None) -> float | None:
    own = run and run.metric("target/tokens")
    search = run and lock.search_of(run)
    if own is None or search is None:
        return None
    trials = [trial.metric("cost/tokens") for trial in search.trials(str(run.side))]
    return None if not trials or None in trials else own + sum(trials)  # type: ignore[arg-type]


def _censored(pair: Pair, values: Sequence[float | None]) -> list[str]:
    """Base, locked and ratio of a cost; what did not get to the target has cost more than it spent."""
    short = [run is not None and run.metric("target/reached") == 0 for run in (pair.base, pair.locked)]
    cells = [MISSING if v is None else f"{'>' if s else ''}{amount(v)}" for v, s in zip(values, short, strict=True)]
    ratio = significant(divide(values[1], values[0]))
    if ratio != MISSING and any(short):
        ratio = MISSING if all(short) else f">{ratio}" if short[1] else f"<{ratio}"
    return [*cells, ratio]


def amount(value: float) -> str:
    """A cost: whole numbers with their thousands apart, large ones in powers of ten."""
    if abs(value) < 1e9:
        return count(value) if value == int(value) else significant(value)
    return f"{value:.3g}"


def gates(lock: Lock) -> Table:
    """One row per strategy and settings: whether it counts, and if not why."""
    cells = []
    for row in rows(lock):
        faults = row.faults
        told = [cell for _, cell in row.gates.values()]
        cells.append([row.name, *told, str(len(row.seeds)), f"no ({'; '.join(faults)})" if faults else "yes"])
    columns = ["strategy", "gradient", "engaged", "base reaches", "equal search", "seeds", "counts"]
    note = (
        "A row counts only if its gradient is plain autograd's (cosine) where it claims so, its levers were active, "
        f"the same strategy reaches the target on the base, both sides had as many trials, and {MIN_SEEDS} seeds or "
        "more ended ok. The worst of all its runs is shown."
    )
    return Table("Gates", [("", columns)], cells, note)


def searches(lock: Lock) -> Table:
    """One row per search and side: how the trials ended, and what the best of them is."""
    found = []
    for search in lock.searches:
        for side in ("base", "locked"):
            trials = search.trials(side)
            if trials:
                found.append([search.name, side, *_trials(trials)])
    columns = [
        "strategy",
        "side",
        "trials",
        "pruned",
        "oom",
        "diverged",
        "best loss",
        "rate",
        "warm-up",
        "batch",
        "knobs",
    ]
    note = "Losses on the tuning half of the held-out data; the rows above are measured on the other half."
    return Table("Searches", [("", [*columns, "tokens of all trials"])], found, note)


def _trials(trials: Sequence[Run]) -> list[str]:
    pruned = [run for run in trials if run.settings.get("pruned_at") is not None]
    whole = [run for run in trials if run.ok and run not in pruned]
    best: Run | None = min(whole, key=lambda run: run.metric("loss/heldout_task") or math.inf, default=None)
    settings = best.settings if best else {}
    tokens = [run.metric("cost/tokens") for run in trials]
    knobs = ", ".join(f"{k} {text(v)}" for k, v in (settings.get("knobs") or {}).items())
    return [
        str(len(trials)),
        str(len(pruned)),
        *(str(sum(run.outcome == outcome for run in trials)) for outcome in ("oom", "diverged")),
        loss(best.metric("loss/heldout_task")) if best else MISSING,
        *(significant(settings.get(k)) if k == "lr" else text(settings.get(k)) for k in ("lr", "warmup_steps")),
        text(settings.get("global_batch")),
        knobs or MISSING,
        MISSING if None in tokens else count(sum(tokens)),  # type: ignore[arg-type]
    ]
