"""What a search is called, what came out of it, and the gates that need both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dlrscale import config as configuration
from dlrscale import record
from dlrscale.config import AttackConfig
from dlrscale.errors import JobError
from dlrscale.search.sampler import settings
from dlrscale.search.space import Space
from dlrscale.search.target import HELDOUT, Target

FILE = "search.json"
SPENT = ("tokens", "flops", "device_hours")
ENDED = (record.Outcome.OK.value, record.Outcome.OOM.value, record.Outcome.DIVERGED.value)  # a failed trial is repeated


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What `dlrscale attack` was asked for besides one run: `trials` 0 is no search.

    Knobs in `by_hand` stay as they are; `default_out`: no folder was named.
    """

    trials: int
    lr_range: tuple[float, float] | None
    seeds: tuple[int, ...]
    target: Target | None
    by_hand: tuple[str, ...] = ()
    default_out: bool = False


def search_id(space: Space, trials: int, ds_config: Mapping[str, Any]) -> str:
    """The id of a search, the same for both sides of it: all given settings but the model, the ranges, the trials.

    Where the planner chooses the levers of each side, the cap stands for them.

    Args:
        space: The space.
        trials: Their number.
        ds_config: The merged DeepSpeed configuration of the given settings.

    Returns:
        64 hexadecimal digits.
    """
    values = configuration.identify(space.given, ds_config) | {"trials": trials, "space": space.described()}
    if space.given.lever_search:
        common = configuration.not_chosen(space.given.lever_search, values["axes"])
        values = {k: v for k, v in values.items() if k not in configuration.CHOSEN_KEYS} | {"searched": common}
    return record.hash_config(values, record.UNIDENTIFIED_KEYS | {"model"})


def trial_row(number: int, params: Mapping[str, float], entry: Mapping[str, Any] | None) -> dict[str, Any]:
    """One trial as `search.json` holds it.

    Args:
        number: The trial's number.
        params: Its point.
        entry: Its record; None where the plan said that it cannot fit.

    Returns:
        Its loss is None where it did not come to its end: pruned, out of memory, diverged or unfit.
    """
    entry = entry or {"outcome": "unfit", "metrics": {}, "config": {}, "id": None}
    metrics, pruned_at = entry["metrics"], entry["config"].get("pruned_at")
    whole = entry["outcome"] == record.Outcome.OK.value and pruned_at is None
    return {
        "number": number,
        "params": dict(params),
        "loss": metrics.get(HELDOUT) if whole else None,
        "last_loss": metrics.get(HELDOUT),
        "outcome": entry["outcome"],
        "pruned_at": pruned_at,
        **{name: metrics.get(f"cost/{name}") for name in SPENT},
        "record": entry["id"],
    }


def described(space: Space, wanted: Wanted, id_: str, trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A search as `search.json` holds it, finished or not.

    Args:
        space: The space.
        wanted: What was asked for.
        id_: The id of the search.
        trials: Rows of `trial_row`.

    Returns:
        Among others `best_so_far` (the lowest loss after each trial, None while there is none), `chosen` (the number
        and the point of the best trial) and `spent` (tokens, FLOPs and device-hours of all trials).
    """
    random, unpruned = settings(wanted.trials)
    best, curve = None, []
    for row in trials:
        if row["loss"] is not None and (best is None or row["loss"] < best["loss"]):
            best = row
        curve.append(best and best["loss"])
    config = space.given
    return {
        "schema": record.SCHEMA,
        "id": id_,
        "name": config.name,
        "strategy": config.strategy,
        "objective": f"{HELDOUT} on the tuning half of the held-out data, in nats per token",
        "sampler": {"name": "TPE", "seed": config.seed, "random_trials": random},
        "pruner": {"name": "median", "after_trials": unpruned, "eval_every": config.eval_every},
        "space": space.described(),
        "trials_wanted": wanted.trials,
        "trials": list(trials),
        "best_so_far": curve,
        "chosen": best and {key: best[key] for key in ("number", "params", "loss")},
        "spent": spent(trials),
    }


def spent(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The sum over some trials of what each cost; FLOPs are None where those of one are not known."""
    found: dict[str, float | None] = {}
    for name in SPENT:
        values = [row[name] for row in rows if row["outcome"] != "unfit"]
        found[name] = None if None in values else sum(values)
    return found


def chosen(result: Mapping[str, Any], out: object) -> Mapping[str, Any]:
    """The best trial of a finished search.

    Args:
        result: The search (`described`).
        out: Its folder, for the message.

    Returns:
        Its number, point and loss.

    Raises:
        JobError: If no trial came to its end.
    """
    if result["chosen"] is None:
        ends = ", ".join(str(row["outcome"]) for row in result["trials"])
        raise JobError(
            f"{result['name']}: none of {len(result['trials'])} trials came to its end ({ends}; {out}/{FILE}). Lower "
            "--lr-range, or take levers that need less memory."
        )
    return result["chosen"]


def repeats(entries: Sequence[Mapping[str, Any]], searched: Mapping[str, float | None] | None) -> list[dict[str, Any]]:
    """The runs that repeat the best settings, as `search.json` holds them.

    Args:
        entries: Their records.
        searched: What the trials cost (`spent`); None where there was no search.

    Returns:
        Seed, record, outcome, loss and target metrics of each; to the target also with the search added.
    """
    found = []
    for entry in entries:
        metrics = {k: v for k, v in entry["metrics"].items() if k.startswith("target/")}
        for name, extra in (searched or {}).items():
            if f"target/{name}" in metrics and extra is not None:
                metrics[f"target/{name}_with_search"] = metrics[f"target/{name}"] + extra
        found.append(
            {"seed": entry["seed"], "record": entry["id"], "outcome": entry["outcome"],
             "loss": entry["metrics"].get(HELDOUT), **metrics}
        )  # fmt: skip
    return found


def best_loss(entry: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The lowest held-out task loss of a run after its start, over all evaluations."""
    losses = [row.get(HELDOUT) for row in rows] + [entry["metrics"].get(HELDOUT)]
    return min((loss for loss in losses if loss is not None), default=None)


def base_result(entries: Sequence[Mapping[str, Any]], trials: int) -> dict[str, Any]:
    """What the locked side's records must know of the base side: the material of the gates.

    Args:
        entries: The base's records, one per seed.
        trials: The trials of its search; 0 where there was none.

    Returns:
        `trials`, `runs`, and how many of these `reached` the target (None without one), with the `target`.
    """
    reached = [entry["metrics"].get("target/reached") for entry in entries]
    target = next((e["metrics"]["target/loss"] for e in entries if "target/loss" in e["metrics"]), None)
    return {
        "trials": trials,
        "runs": len(entries),
        "reached": None if target is None else sum(value == 1 for value in reached),
        "target": target,
    }


def gates(config: AttackConfig, side: str) -> dict[str, dict[str, Any]]:
    """The gates `base_reaches` (every run of the base came to the target) and `equal_search` of a run.

    Args:
        config: The run's configuration, with `base_result` where the base ran first.
        side: `base` or `locked`.

    Returns:
        By gate: `holds`, True, False or None where it cannot be told, then `why`; and the figures.
    """
    base, own = config.base_result, config.search_trials
    if base is None:
        needs = {"base_reaches": "--target", "equal_search": "--trials"}
        own_run = "the base's own run" if side == "base" else None
        return {name: {"holds": None, "why": own_run or f"asks for --base and {o}"} for name, o in needs.items()}
    found: dict[str, dict[str, Any]] = {}
    if config.target is None or base["target"] is None:
        found["base_reaches"] = {"holds": None, "why": "no target (--target)"}
    else:
        holds = base["target"] == config.target and 0 < base["runs"] == base["reached"]
        found["base_reaches"] = {"holds": holds, "reached": base["reached"], "runs": base["runs"]}
    if not own and not base["trials"]:
        found["equal_search"] = {"holds": None, "why": "no search (--trials)"}
    else:
        found["equal_search"] = {"holds": own == base["trials"], "trials": own, "base_trials": base["trials"]}
    return found
