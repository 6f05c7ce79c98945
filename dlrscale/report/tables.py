"""The tables of the report, and numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from dlrscale.report import page
from dlrscale.report.page import MISSING, Table
from dlrscale.report.runs import ACCELERATOR, HOST, Lock, Pair, Run, divide

SIDES = ("base", "locked", "ratio")


def significant(value: float | None, digits: int = 3) -> str:
    """A number to some significant digits; its whole part is never cut."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if abs(round(value, digits - 1 - size)) >= 10 ** (size + 1):
        size += 1  # 9.999 becomes 10.0, not 10.00
    if size < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - size)}f}"


def size(value: float | None) -> str:
    """Bytes in units of 2^10, 2^20, 2^30 and 2^40."""
    if value is None:
        return MISSING
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(value) >= 2**power:
            return f"{significant(value / 2**power)} {unit}"
    return f"{value:.0f} B"


def seconds(value: float | None) -> str:
    """A time in s, ms or us."""
    if value is None:
        return MISSING
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if abs(value) * factor >= 1 or unit == "us" or value == 0:
            return f"{significant(value * factor)} {unit}"
    raise AssertionError


def loss(value: float | None) -> str:
    """A loss in nats per token."""
    return MISSING if value is None else f"{value:.3f}"


def count(value: float | None) -> str:
    """A whole number with its thousands apart."""
    return MISSING if value is None else f"{value:,.0f}"


def text(value: Any) -> str:
    """Any value of a record as a cell."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)) and len({str(v) for v in value}) <= 2 and value:
        names = list(dict.fromkeys(str(v) for v in value))
        return f"{' / '.join(names)} ({len(value)})" if len(value) > 2 else ", ".join(str(v) for v in value)
    return str(value)


def locks(found: Sequence[Lock]) -> Table:
    """One row per lock: what it is, what it cost and what it kept."""
    rows = []
    for lock in found:
        if lock.id is None:
            continue
        run, facts = lock.run, lock.manifest
        metrics = (run.metrics or {}) if run else {}
        errors = [v for k, v in metrics.items() if k.startswith("lock/error_layer_") and v is not None]

        def metric(name: str, run: Run | None = run) -> float | None:
            return run.metric(name) if run else None

        tokens = [metric("tokens/distil"), metric("tokens/heal")]
        rows.append(
            [
                lock.id[:8],
                text(run.outcome) if run else "not in these records",
                *(text(facts.get(k)) for k in ("form", "depth", "ranks", "coupling", "start", "harden")),
                significant(metric("params/ratio")),
                *(loss(metric(f"loss/heldout_{k}")) for k in ("base_model", "locked", "flat")),
                significant(max(errors)) if errors else MISSING,
                significant(sum(errors) / len(errors)) if errors else MISSING,
                *(count(t) for t in tokens),
                seconds(metric("time/total_s")),
            ]
        )
    groups = [
        ("", ["lock", "outcome", "form", "K", "ranks", "g", "start", "hardened"]),
        ("parameters", ["locked / base"]),
        ("held-out loss (nats)", ["base", "locked", "flattened"]),
        ("error per layer", ["max", "mean"]),
        ("tokens", ["distil", "heal"]),
        ("time", ["total"]),
    ]
    note = (
        "flattened: every block of a DLR-Net reads the same input, no training. "
        "Error: sum ||student - y||^2 / sum ||y||^2 "
    )
    return Table("", groups, rows, note)


def head(runs: Sequence[Run]) -> list[page.Block]:
    """Versions, commits, devices, dates and commands of all runs."""

    def distinct(values: Sequence[str]) -> str:
        return "; ".join(dict.fromkeys(v for v in values if v)) or MISSING

    versions: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in (run.versions or {}).items():
            versions.setdefault(name, {})[str(version)] = None
    commits = [
        f"{str(run.git.get('commit'))[:12]}{' (with changes)' if run.git.get('dirty') else ''}"
        for run in runs
        if isinstance(run.git, dict) and run.git.get("commit")
    ]
    dates = sorted(str(run.started) for run in runs if run.started)
    outcomes = [str(run.outcome) for run in runs]
    count_trials = sum(run.is_trial for run in runs)
    trials = f" ({count_trials} of them trials of searches)" if count_trials else ""
    rows = [
        ["runs", ", ".join(f"{outcomes.count(o)} {o}" for o in dict.fromkeys(outcomes)) + trials],
        [
            "started",
            MISSING if not dates else dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
        ],
        ["device", distinct([device(run) for run in runs])],
        ["versions", ", ".join(f"{k} {' / '.join(v)}" for k, v in versions.items()) or MISSING],
        ["commit", distinct(commits)],
        ["seeds", distinct([str(run.seed) for run in runs if run.seed is not None])],
    ]
    blocks: list[page.Block] = [Table("", [("", ["", ""])], rows)]
    commands = dict.fromkeys(str(run.settings["command"]) for run in runs if run.settings.get("command"))
    if commands:
        blocks += [page.Text("Commands:"), page.Code("\n".join(commands))]
    return blocks


def device(run: Run) -> str:
    """A run's device in words."""
    if isinstance(run.device, dict):
        return ", ".join(f"{k} {text(v)}" for k, v in run.device.items() if v is not None)
    return str(run.device or "")


def _triple(pair: Pair, name: str, show: Callable[[float | None], str], losses: bool = False) -> list[str]:
    base, locked = pair.both(name)
    return [show(base), show(locked), significant(divide(locked, base))]


def peak_cells(pair: Pair) -> list[str]:
    """Peak of base, locked and their ratio; what ran out of memory needs more than it reached."""
    base, locked = pair.peaks()
    cells = []
    for run, value in ((pair.base, base), (pair.locked, locked)):
        out = run is not None and run.outcome == "oom"
        cells.append((f"{size(value)} (oom)" if value else "oom") if out else size(value))
    ratio = significant(divide(locked, base))
    base_out, locked_out = (run is not None and run.outcome == "oom" for run in (pair.base, pair.locked))
    if ratio != MISSING and locked_out:
        ratio = MISSING if base_out else f">{ratio}"
    elif ratio != MISSING and base_out:
        ratio = f"<{ratio}"
    return [*cells, ratio]


def outcome(pair: Pair) -> str:
    """How both sides ended."""
    return " / ".join(str(run.outcome) if run else MISSING for run in (pair.base, pair.locked))


def sections(lock: Lock) -> list[page.Block]:
    """The three tables of one lock, and what is missing from them."""
    if not lock.pairs:
        return [page.Text("No attack on this lock among these records.")]
    blocks: list[page.Block] = [_memory(lock), _times(lock), _results(lock)]
    missing = [
        f"{pair.label} ({'base' if pair.base is None else 'locked'})"
        for pair in lock.pairs
        if lock.id is not None and (pair.base is None or pair.locked is None)
    ]
    if missing:
        named = "; ".join(missing)
        blocks.append(page.Text(f"Not run with the same settings, so no ratio: {named}."))
    return blocks


def _memory(lock: Lock) -> Table:
    rows = []
    places = {pair.where for pair in lock.pairs}
    for pair in lock.pairs:
        mlp, formula = "memory/saved_mlp_bytes_per_token", "memory/saved_mlp_bytes_per_token_formula"
        checks = [
            significant(divide(run.metric(mlp), run.metric(formula)), 4) if run else MISSING
            for run in (pair.base, pair.locked)
        ]
        rows.append(
            [
                pair.label,
                outcome(pair),
                pair.where,
                *peak_cells(pair),
                *_triple(pair, "memory/saved_bytes_per_token", size),
                *_triple(pair, mlp, size),
                *checks,
            ]
        )
    groups = [
        ("", ["strategy", "outcome base / locked", "peak measured on"]),
        ("peak memory", SIDES),
        ("saved for backward per token", SIDES),
        ("of which MLP or DLR-Net", SIDES),
        ("measured / formula", SIDES[:2]),
    ]
    note = {
        (ACCELERATOR,): "Peak: bytes allocated on the accelerator, largest over the run's phases.",
        (HOST,): "Peak: resident memory of the host process (no accelerator peak on both sides), libraries and "
        "weights included, so its ratio says less than that of the saved bytes.",
    }.get(tuple(places), "Peak: on the accelerator where both sides have it, else resident host memory.")
    return Table("Memory", groups, rows, note + " A run out of memory (oom) shows the peak that it reached.")


def _times(lock: Lock) -> Table:
    rows = []
    for pair in lock.pairs:
        cells = [pair.label]
        for name in ("step", "forward", "backward"):
            cells += _triple(pair, f"time/{name}_s", seconds)
        cells += _triple(pair, "throughput/tokens_per_s", significant)
        asymmetry = divide(pair.ratio("time/backward_s"), pair.ratio("time/forward_s"))
        rows.append([*cells, significant(asymmetry)])
    groups = [
        ("", ["strategy"]),
        ("step", SIDES),
        ("forward", SIDES),
        ("backward", SIDES),
        ("tokens/s", SIDES),
        ("asymmetry", ["backward / forward"]),
    ]
    return Table("Time", groups, rows, "Asymmetry: ratio of the backward pass / ratio of the forward pass.")


def _results(lock: Lock) -> Table:
    rows = []
    for pair in lock.pairs:
        base, locked = pair.both("loss/heldout_task")
        gap = MISSING if base is None or locked is None else f"{locked - base:+.3f}"
        tokens = [
            count(run.steps[-1].get("tokens")) if run and run.steps else MISSING for run in (pair.base, pair.locked)
        ]
        rows.append(
            [
                pair.label,
                outcome(pair),
                *(loss(v) for v in pair.both("loss/heldout_task_start")),
                *_triple(pair, "loss/heldout_task", loss),
                gap,
                *(loss(v) for v in pair.both("loss/heldout_base_start")),
                *_triple(pair, "loss/heldout_base", loss),
                *tokens,
            ]
        )
    groups = [
        ("", ["strategy", "outcome base / locked"]),
        ("task loss before", SIDES[:2]),
        ("task loss after", [*SIDES, "locked - base"]),
        ("own-domain loss before", SIDES[:2]),
        ("own-domain loss after", SIDES),
        ("tokens trained", SIDES[:2]),
    ]
    return Table("Outcome (held-out loss, nats per token)", groups, rows)


def summary(lock: Lock) -> Table:
    """The main numbers of one lock for the terminal."""
    rows = [
        [
            pair.label,
            outcome(pair),
            *peak_cells(pair),
            *_triple(pair, "memory/saved_bytes_per_token", size),
            significant(pair.ratio("time/step_s")),
            *(loss(v) for v in pair.both("loss/heldout_task")),
        ]
        for pair in lock.pairs
    ]
    groups = [
        ("", ["strategy", "outcome"]),
        ("peak", SIDES),
        ("saved/token", SIDES),
        ("step", ["ratio"]),
        ("task loss", SIDES[:2]),
    ]
    notes = []
    if lock.run is not None:
        kept = [lock.run.metric(f"loss/heldout_{k}") for k in ("base_model", "locked", "flat")]
        notes.append(
            f"lock run: {lock.run.outcome}; held-out loss base {loss(kept[0])}, locked {loss(kept[1])}, "
            f"flattened {loss(kept[2])}"
        )
    places = sorted({pair.where for pair in lock.pairs})
    if places:
        notes.append(f"peak: {' or '.join(places)}; ratio: locked / base; loss: nats per token")
    return Table("", groups, rows, "\n".join(notes))


def all_runs(runs: Sequence[Run]) -> Table:
    """Every run but trials, with its outcome and, where it failed, why."""
    rows = []
    for run in sorted((run for run in runs if not run.is_trial), key=lambda r: str(r.started)):
        error = run.error
        if isinstance(error, dict):
            error = error.get("message") or error.get("text") or str(error)
        reason = str(error).strip().splitlines()[0][:200] if error and str(error).strip() else MISSING
        rows.append(
            [
                str(run.id or MISSING)[:8],
                *(text(v) for v in (run.kind, run.name, run.strategy, run.side, run.outcome, run.seed, run.started)),
                run.folder.name or MISSING,
                *plan(run),
                reason,
            ]
        )
    columns = ["id", "kind", "name", "strategy", "side", "outcome", "seed", "started", "folder", "planned peak",
               "plan off by", "error"]  # fmt: skip
    note = "Planned peak: of a device. Plan off by: the largest error of what was both planned and measured."
    return Table("", [("", columns)], rows, note)


def plan(run: Run) -> list[str]:
    """The predicted peak of a device, and the largest error of what was planned and measured, with its name."""
    found = run.record.get("plan") or {}
    errors = {k: v for k, v in (found.get("error_percent") or {}).items() if isinstance(v, (int, float))}
    worst = max(errors, key=lambda name: abs(errors[name]), default=None)
    off = f"{errors[worst]:+.2f} % ({worst.removesuffix('_bytes')})" if worst and errors[worst] else "0"
    return [size(found.get("peak_bytes")), off if worst else MISSING]
