"""Plans for people and for programs: a table of one plan, a table of a sweep, JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dlrscale.planner import search
from dlrscale.planner.locking import LockPlan
from dlrscale.planner.needs import CONTEXT_BYTES, FRAGMENTATION, gib, largest_micro_batch
from dlrscale.planner.plan import Plan
from dlrscale.planner.sides import BASE, LOCKED, Question, attack_plans, lock_plan, notes, searched
from dlrscale.planner.time import hours, lock_bounds, step_bounds

LOCK = "lock"
# What a sweep varies: the names of the options, and of a question's fields.
AXES = ("strategy", "zero", "hardware", "dtype", "num_ranks", "micro_batch", "seq_len", "form", "depth")


def asked(question: Question) -> dict[str, Any]:
    """What a question is about, as plain values."""
    found = {name: getattr(question, name, None) for name in (*AXES, "nodes", "attention", "layers", "rank")}
    found["strategy"] = question.entry.name
    free = question.search is not None and question.search.by_hand.zero is None
    return found | {"zero": "searched" if free else question.levers.zero, "hardware": question.hardware.name}


def memory(plan: Plan | LockPlan, question: Question) -> dict[str, Any]:
    """The memory of a plan as plain values, bytes as integers."""
    needs = plan.needs
    lacking = needs.lacking(question.hardware)
    return {
        "device_bytes": {phase: {k: v for k, v in terms.items() if v} for phase, terms in needs.phases.items()},
        "peak_bytes": needs.peak_bytes,
        "peak_phase": needs.peak_phase,
        "host_bytes": needs.host_terms,
        "host_load_bytes": needs.host_load_bytes,
        "host_peak_bytes": needs.host_peak_bytes,
        "allowance": {"fragmentation": FRAGMENTATION, "context_bytes": CONTEXT_BYTES},
        "fits": not lacking,
        "lacking": lacking,
        "largest_micro_batch": largest_micro_batch(lambda batch: plan.with_micro_batch(batch).needs, question.hardware),
    }


def attack_side(plan: Plan, question: Question, tokens: int | None) -> dict[str, Any]:
    """One side of an attack as plain values."""
    kept, bounds = plan.activations, step_bounds(plan, question.hardware)
    found: dict[str, Any] = {
        "parameters": plan.model.total,
        "trained": plan.model.trained,
        **memory(plan, question),
        "saved_bytes": {
            "held": kept.held_bytes,
            "peak": kept.peak_bytes,
            "host": kept.host_bytes,
            "by_part": kept.by_part(),
        },
        "flops_per_micro_batch": kept.flops(),
        "tokens_per_step": plan.tokens_per_step,
        "least_step_s": bounds,
        "least_step_bound": max(bounds, key=bounds.get) if bounds else None,
    }
    if tokens:
        found["to_target"] = hours(plan, question.hardware, tokens)
    return found


def describe(question: Question, *, tokens: int | None = None) -> dict[str, Any]:
    """The whole answer to a question about an attack: base and locked."""
    found = searched(question)
    plans = {side: one.winner.plan for side, one in found.items()} or attack_plans(question)
    sides = {side: attack_side(plan, question, tokens) for side, plan in plans.items()}
    for side, one in found.items():
        sides[side] |= {"searched": one.values(), "deepspeed_config": dict(one.winner.plan.ds_config)}
    about = {"asked": asked(question), "deepspeed_config": dict(question.ds_config), "notes": notes(question)}
    return about | sides


def describe_lock(question: Question, *, harden: bool, heal: bool) -> dict[str, Any]:
    """The whole answer to a question about a lock."""
    plan = lock_plan(question, harden, heal)
    own = {
        "parameters": sum(n * c for n, _, c in plan.tensors()),
        "trained": sum(n * c for n, t, c in plan.tensors() if t),
    }
    return {
        "asked": asked(question) | {"strategy": LOCK, "harden": harden, "heal": heal},
        "deepspeed_config": dict(question.ds_config),
        "notes": notes(question),
        LOCK: own
        | memory(plan, question)
        | {"flops_per_micro_batch": plan.flops(), "least_step_s": lock_bounds(plan, question.hardware)},
    }


def text(answers: Sequence[Mapping[str, Any]]) -> str:
    """One answer as a table of its terms, several as a table with a row each."""
    sides = [name for name in (BASE, LOCKED, LOCK) if name in answers[0]]
    return terms(answers[0], sides) if len(answers) == 1 else sweep(answers, sides)


def terms(answer: Mapping[str, Any], sides: Sequence[str]) -> str:
    """Every term of one answer, its sides beside one another, and what follows from it."""
    about = answer["asked"]
    head = (
        f"{about['strategy']} at ZeRO {about['zero']} on {about['num_ranks']} x {about['hardware']}, {about['dtype']}, "
        f"micro-batch {about['micro_batch']} x {about['seq_len']} tokens; {about['form']}, depth {about['depth']}"
    )
    found = [answer[side] for side in sides]
    rows = [["", *sides, *["ratio"] * (len(sides) > 1)]]
    rows += [row(name, [side[name] for side in found], "{:,}".format) for name in ("parameters", "trained")]
    for phase in found[0]["device_bytes"]:
        of_phase = [side["device_bytes"][phase] for side in found]
        rows.append(row(f"a device in {phase}", [sum(terms.values()) for terms in of_phase], gib))
        rows += term_rows(of_phase)
    rows.append(row("a host while training", [sum(side["host_bytes"].values()) for side in found], gib))
    rows += term_rows([side["host_bytes"] for side in found])
    rows.append(row("a host while loading", [side["host_load_bytes"] for side in found], gib))
    phases = ", ".join(dict.fromkeys(side["peak_phase"] for side in found))
    rows.append(row(f"peak of a device ({phases})", [side["peak_bytes"] for side in found], gib))
    rows.append(row("peak of a host", [side["host_peak_bytes"] for side in found], gib))
    told = [line for side in sides for line in verdict(side, answer[side])]
    return "\n".join([head, "", aligned(rows), "", *told, *(f"note: {note}" for note in answer["notes"])])


def term_rows(terms_of_sides: Sequence[Mapping[str, int]]) -> list[list[str]]:
    """An indented row for each term that some side has."""
    names = dict.fromkeys(name for terms in terms_of_sides for name in terms)
    return [row(f"  {name}", [terms.get(name, 0) for terms in terms_of_sides], gib) for name in names]


def row(name: str, numbers: Sequence[int], shown: Any) -> list[str]:
    """A row of a table of terms; the ratio of two sides stands behind them."""
    cells = [name, *map(shown, numbers)]
    if len(numbers) == 2:
        cells.append(f"{numbers[1] / numbers[0]:.3f}" if numbers[0] else "")
    return cells


def verdict(name: str, side: Mapping[str, Any]) -> list[str]:
    """Whether it fits, the largest micro-batch, and the least time, in sentences."""
    fits = "fits" if side["fits"] else f"does not fit: {'; '.join(side['lacking'])}"
    lines = [f"{name}: {fits}; largest micro-batch {side['largest_micro_batch']}"]
    lines += [f"  {line}" for line in (search.lines(side["searched"]) if "searched" in side else ())]
    bounds = side.get("least_step_s")
    if bounds:
        rates = ", ".join(f"{resource} {seconds:.3g} s" for resource, seconds in bounds.items())
        lines.append(f"  a step takes at least {max(bounds.values()):.3g} s ({rates})")
    lines += [
        f"  {key.replace('_', '-')} to the target, at least: {v:.4g}" for key, v in side.get("to_target", {}).items()
    ]
    return lines


def sweep(answers: Sequence[Mapping[str, Any]], sides: Sequence[str]) -> str:
    """One row per combination: what varies, peaks, their ratio, whether it fits, and the largest micro-batch."""
    varied = varying(answers)
    several = len(sides) > 1
    rows = [[*varied, *(f"{side} peak" for side in sides), *["ratio"] * several, "fits", "largest micro-batch"]]
    for answer in answers:
        found = [answer[side] for side in sides]
        peaks = [side["peak_bytes"] for side in found]
        rows.append([
            *(str(answer["asked"][name]) for name in varied), *map(gib, peaks),
            *[f"{peaks[-1] / peaks[0]:.3f}"] * several, "/".join("yes" if side["fits"] else "no" for side in found),
            "/".join(str(side["largest_micro_batch"]) for side in found),
        ])  # fmt: skip
    return aligned(rows)


def varying(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of what differs between the answers of a sweep."""
    return [name for name in AXES if len({str(answer["asked"][name]) for answer in answers}) > 1]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def as_json(answers: Sequence[Mapping[str, Any]], several: bool) -> str:
    """The answers as JSON: an object, or a list of them for a sweep."""
    return json.dumps(list(answers) if several else answers[0], indent=2)
