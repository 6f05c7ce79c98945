"""Every strategy on base and locked models, all forms, K = 8 and 64, on 1 and 2 ranks: gates, losses against `full`.

`tox -e matrix` runs it on the embedded model, `tox -e matrix -- --data DIR` on stories260K as well. Each job is a real
attack of a few steps. Written are `matrix.jsonl` with one line per job, and `README.md` with the table and what failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import campaign
import forks

from dlrscale import catalogue, record
from dlrscale.cli import attack_configs
from dlrscale.cli.levers import choose_levers
from dlrscale.cli.run import last_record, resolve
from dlrscale.config import LockConfig, RunConfig
from dlrscale.errors import DlrscaleError

FORMS, DEPTHS, RANKS = ("gated", "plain", "prenorm"), (8, 64), (1, 2)
TOLERANCE = 1e-4  # of a loss, relative to `full`'s at the same step, in fp32
COMMON = {"seq_len": 64, "tracking_uri": "none", "checkpoint_every": 0, "heldout_limit": 4, "warmup_steps": 1}
GLOBAL_BATCH = 4
TOPICS = {"data": "embedded:topics", "heldout": "embedded:topics-heldout"}  # read in no time; the model knows them not
Models = dict[str, tuple[Path, dict[str, Any]]]  # folder and text of each


def locks(out: Path, models: Models) -> Iterator[LockConfig]:
    """A short lock of each model, form and depth."""
    for name, (folder, data) in models.items():
        for form in FORMS:
            for depth in DEPTHS:
                options = data | COMMON | {
                    "model": str(folder), "form": form, "depth": depth, "steps": 30, "heal_steps": 5, "num_ranks": 1,
                    "start": "warm" if form == "gated" else "cold", "micro_batch": 4, "lr": 3e-3,
                    "out": str(out / "locks" / f"{name}-{form}-{depth}"),
                }  # fmt: skip
                yield resolve(
                    LockConfig, options, choose_levers(catalogue.LOCK, options), f"lock-{name}-{form}-{depth}"
                )


def sides(out: Path, models: Models) -> Iterator[tuple[str, str, Path, dict]]:
    """Each model that is attacked: the model's name, what it is, its folder and its data."""
    for name, (folder, data) in models.items():
        yield name, "base", folder, data
        for form in FORMS:
            for depth in DEPTHS:
                yield name, f"{form}-{depth}", out / "locks" / f"{name}-{form}-{depth}" / "model", data


def attacks(out: Path, models: Models, ranks: int, names: list[str], refused: dict[str, str]) -> Iterator[RunConfig]:
    """A short attack of each strategy on each of them."""
    for model, side, folder, data in sides(out, models):
        for name in names:
            label = f"{model}/{side}/{ranks}/{name}"
            options = data | COMMON | {
                "model": str(folder), "num_ranks": ranks, "micro_batch": GLOBAL_BATCH // ranks, "steps": 3, "lr": 1e-3,
                "name": label, "out": str(out / "attacks" / label),
            }  # fmt: skip
            knobs = SHORT.get(name, ())
            if name == "undistil" and "prenorm" in side:
                knobs = (*knobs, "start=fresh")
            try:
                yield attack_configs(options, None, name, knobs)[0]
            except DlrscaleError as error:
                refused[label] = str(error)


SHORT = {"undistil": ("regress_steps=5",), "drop-blocks": ("heal_steps=3",)}


def compared(entry: catalogue.Strategy) -> bool:
    """Whether a strategy is exact and trains all parameters of the model itself by AdamW: it repeats `full`."""
    levers = entry.resolve(catalogue.Levers())
    plain = levers.optimizer == "AdamW" and levers.activation_storage != "int8"
    return entry.exact and entry.trainable == "all" and entry.transform == "none" and plain


def row(config: RunConfig, curves: dict[str, list[float]]) -> dict:
    """What one job shows, in a few numbers."""
    entry = last_record(config)
    model, side, ranks, name = config.name.split("/")
    found = {"model": model, "side": side, "ranks": int(ranks), "strategy": name}
    if entry is None:
        return found | {"outcome": "no record", "passes": False}
    metrics, gates = entry["metrics"], entry["gates"] or {}
    found |= {
        "outcome": entry["outcome"],
        "error": entry["error"],
        "cosine": (gates.get("gradient") or {}).get("cosine"),
        "relative_error": (gates.get("gradient") or {}).get("relative_error"),
        "engaged": {k: [v["claimed"], v["found"]] for k, v in (gates.get("engaged") or {}).get("checks", {}).items()},
        "saved_bytes_per_token": metrics.get("memory/saved_bytes_per_token"),
        "plan_error_percent": (entry["plan"] or {}).get("error_percent", {}),
    }
    holds = [(gates.get(key) or {}).get("holds") for key in ("gradient", "engaged")]
    steps = Path(config.out) / record.STEPS_FILE
    losses = [line["loss/train"] for line in record.read_lines(steps)] if steps.exists() else []
    curves[config.name] = losses
    full = curves.get(f"{model}/{side}/{ranks}/full")
    if compared(config.entry) and full:
        pairs = zip(losses, full, strict=len(losses) > 0)
        found["loss_difference"] = max((abs(a - b) / b for a, b in pairs), default=None)
        holds.append(found["loss_difference"] is not None and found["loss_difference"] <= TOLERANCE)
    return found | {"passes": entry["outcome"] == "ok" and all(h is not False for h in holds)}


def write(out: Path, rows: list[dict], refused: dict[str, str], seconds: float) -> None:
    """The record and its table."""
    record.write_atomic(out / "matrix.jsonl", "".join(record.dumps(r) + "\n" for r in rows))
    names = list(dict.fromkeys(r["strategy"] for r in rows))
    columns = list(dict.fromkeys((r["model"], r["side"], r["ranks"]) for r in rows))
    kinds = list(dict.fromkeys((model, ranks) for model, _, ranks in columns))
    lines = [
        "# The matrix of strategies",
        "",
        f"Made {datetime.date.today()} by `tox -e matrix` in {seconds / 60:.0f} min, commit "
        f"{record.git_state()['commit'][:8]}, on a CPU with {os.cpu_count()} cores, {platform.system()}; "
        + ", ".join(f"{k} {v}" for k, v in record.versions().items()) + ".",
        "",
        "A cell counts the jobs that passed of those that ran, over the base and three forms at K = 8 and 64: outcome "
        "ok, the gradient gate (cosine of at least 0.999 with plain autograd on the real model; 0.99 for act-int8), "
        "engaged (trained parameters, saved and offloaded bytes within 3 % of the plan), and exact ones on all "
        f"parameters the losses of `full` within {TOLERANCE:g}. One line per job: `matrix.jsonl`.",
        "",
        "| strategy | " + " | ".join(f"{model}, {ranks} rank{'s' * (ranks > 1)}" for model, ranks in kinds)
        + " | least cosine | largest relative error | largest difference from full's losses |",
        "|---" * (len(kinds) + 4) + "|",
    ]  # fmt: skip
    for name in names:
        own = [r for r in rows if r["strategy"] == name]
        cells = []
        for model, ranks in kinds:
            some = [r for r in own if (r["model"], r["ranks"]) == (model, ranks)]
            cells.append(f"{sum(r['passes'] for r in some)}/{len(some)}")
        for key, worst, form in (
            ("cosine", min, ".6f"),
            ("relative_error", max, ".1e"),
            ("loss_difference", max, ".1e"),
        ):
            values = [r[key] for r in own if r.get(key) is not None]
            cells.append(format(worst(values), form) if values else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    failed = [r for r in rows if not r["passes"]]
    lines += ["", "## Did not pass", ""] + [f"- {json.dumps(r)}" for r in failed] if failed else ["", "All passed."]
    reasons: dict[str, list[str]] = {}
    for label, reason in refused.items():
        reasons.setdefault(reason, []).append(label)
    lines += ["", "## Refused", ""] if reasons else []
    lines += [f"- {len(labels)} jobs ({labels[0]} ...): {reason}" for reason, labels in reasons.items()]
    record.write_atomic(out / "README.md", "\n".join(lines) + "\n")


def main() -> None:
    """Run what is asked for, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/matrix"))
    parser.add_argument("--data", type=Path, help="folder of stories260K and TinyStories (models/, tinystories/)")
    parser.add_argument("--models", nargs="*", default=None, help="default: embedded, and stories260K where --data is")
    parser.add_argument("--ranks", nargs="*", type=int, default=list(RANKS))
    parser.add_argument("--strategies", nargs="*", default=list(catalogue.STRATEGIES))
    options = parser.parse_args()
    out, started = options.out.absolute(), time.monotonic()
    names = options.models or (["embedded", "stories260K"] if options.data else ["embedded"])
    data = options.data.absolute() if options.data else Path()
    known: Models = {}
    for name in names:
        if name == "embedded":
            known[name] = campaign.EMBEDDED, TOPICS
            continue
        folder, text = campaign.model(name, data, out)
        known[name] = folder, {k: text[k] for k in ("data", "heldout")} | {"document_separator": campaign.SEPARATOR}
    forks.ready()
    refused = forks.run_all(locks(out, known))
    rows: list[dict] = []
    for ranks in options.ranks:
        configs = list(attacks(out, known, ranks, options.strategies, refused))
        refused |= forks.run_all(configs)
        curves: dict[str, list[float]] = {}
        rows += [row(config, curves) for config in configs if config.name not in refused]
        write(out, rows, refused, time.monotonic() - started)
    passed = sum(r["passes"] for r in rows)
    print(f"{passed} of {len(rows)} jobs passed, {len(refused)} were refused; {out / 'README.md'}")
    raise SystemExit(passed < len(rows))


if __name__ == "__main__":
    main()
