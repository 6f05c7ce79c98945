"""Records as the report sees them: one object per run, base paired with locked, grouped by lock."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from dlrscale import catalogue
from dlrscale import config as configuration
from dlrscale import record as records

# What a job found, and no setting.
FOUND_KEYS = frozenset({
    "transform_engine", "resumed", "offloaded_optimizer_bytes", "offloaded_param_bytes", "device_in_use_bytes",
})  # fmt: skip
# Settings that may differ between the two sides of a pair: which model, and where things lie.
SIDE_KEYS = frozenset(
    {
        "model", "model_digest", "base", "base_digest", "lock", "lock_id", "form", "depth", "rank", "ranks",
        "start",
        "coupling", "harden", "harden_weight", "harden_target", "layers", "heal_steps", "heal_lr", "out",
        "name",
        "tracking_uri", "experiment", "command", "checkpoint_every", "keep_checkpoints", "max_hours",
        "hostfile",
        "deepspeed_config", "debug", "force", "dry_run", "side", "kind", "search", "search_trials", "trial",
        "stop_above", "target", "base_result", "pruned_at", "lever_search",
    }
) | FOUND_KEYS  # fmt: skip
TASK_SETTINGS = ("heldout_limit", "heldout_part", "seq_len", "columns", "document_separator", "chat_template")
DEVICE_KEYS = ("type", "kind", "name", "accelerator", "count", "num_ranks", "world_size")
ACCELERATOR, HOST = "accelerator", "host RSS"
PEAKS = {
    ACCELERATOR: ("memory/accelerator_peak_allocated_bytes", "accelerator_peak_allocated_bytes"),
    HOST: ("memory/host_peak_rss_bytes", "host_peak_rss_bytes"),
}


@dataclass(frozen=True, eq=False)
class Run:
    """One record and the folder that it lies in."""

    folder: Path
    record: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        """A key of the record's schema; null where the record has none."""
        if name in records.RECORD_KEYS:
            return self.record.get(name)
        raise AttributeError(name)

    @property
    def settings(self) -> dict[str, Any]:
        """The flat settings of the run."""
        return self.record.get("config") or {}

    def metric(self, name: str) -> float | None:
        """A metric, or null where it was not measured."""
        value = (self.record.get("metrics") or {}).get(name)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def peak(self, where: str) -> float | None:
        """Largest memory of the run in bytes, on the accelerator or the host: of its training, and of its transform."""
        metric, key = PEAKS[where]
        phases = {name: p for name, p in (self.record.get("phases") or {}).items() if isinstance(p, dict)}
        training = self.metric(metric)
        counted = phases if training is None else {name: p for name, p in phases.items() if name == "transform"}
        found = [float(p[key]) for p in counted.values() if p.get(key)]
        return max([*found, *([training] if training is not None else [])], default=None)

    @property
    def ok(self) -> bool:
        """Whether the run ended as it should."""
        return self.outcome == records.Outcome.OK.value

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The step rows of the run; none when there is no file, or when it cannot be read."""
        path = self.folder / records.STEPS_FILE
        try:
            rows = list(records.read_lines(path))
        except (OSError, records.ConfigError):
            return []
        by_step = {(row.get("phase"), row.get("step")): row for row in rows}  # steps done twice count once
        return list(by_step.values())

    @property
    def is_trial(self) -> bool:
        """Whether this is a trial of a search: never a row of a table."""
        return self.kind == "attack" and self.settings.get("heldout_part") == "tune"

    @property
    def key(self) -> str:
        """What two runs must have in common to be the two sides of one row."""
        return json.dumps([self.settings_key, self.seed])

    @cached_property
    def settings_key(self) -> str:
        """What two runs have in common that differ in the seed alone, and in the side.

        The id of a search stands for all settings: what it chose may differ from side to side.
        """
        settings = self.settings
        kept = {
            k: v
            for k, v in settings.items()
            if k not in SIDE_KEYS and not (f"{k}_digest" in settings and settings[f"{k}_digest"])
        }
        device = self.device
        if isinstance(device, dict):
            device = {k: device[k] for k in DEVICE_KEYS if k in device}
        merged = _without_paths(self.record.get("deepspeed_config"))
        name = self.strategy
        if settings.get("axes"):  # which stand for the name
            name = None
            kept.pop("strategy", None)
        kept.pop("seed", None)
        if settings.get("lever_search"):
            common = configuration.not_chosen(settings["lever_search"], settings.get("axes") or {})
            kept = {k: v for k, v in kept.items() if k not in configuration.CHOSEN_KEYS} | {"searched": common}
            merged = configuration.split_layout(merged or {})[1]
        parts = [name, device, settings.get("search") or [kept, merged]]
        return json.dumps(parts, sort_keys=True, default=str)

    @property
    def base_digest(self) -> str | None:
        """Digest of the base model: of the run's own model, or of the one that was locked."""
        lock = self.settings.get("lock")
        if self.kind == "attack" and isinstance(lock, dict):
            found = lock.get("base_digest") or lock.get("base_model_digest")
            return str(found) if found else None
        found = self.settings.get("model_digest")
        return str(found) if found else None


def _without_paths(value: Any) -> Any:
    """A DeepSpeed configuration without the places that it names."""
    if isinstance(value, dict):
        return {k: _without_paths(v) for k, v in value.items() if not (isinstance(v, str) and "/" in v)}
    return value


@dataclass(eq=False)
class Pair:
    """One row of a lock's tables: the same attack on both sides, or on the one that there is.

    `label` names it among the lock's pairs, `setting` what it has in common with those that differ in the seed alone.
    """

    base: Run | None
    locked: Run | None
    label: str = ""
    setting: str = ""

    @property
    def any(self) -> Run:
        """A side that is there."""
        found = self.locked or self.base
        assert found is not None
        return found

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        return str(self.any.strategy or "-")

    @property
    def name(self) -> str:
        """Name of the attack, with the trials of the search that its settings come from."""
        trials = self.any.settings.get("search_trials")
        return f"{_named(self.any)}, {trials} trials" if trials else _named(self.any)

    @property
    def task(self) -> str:
        """What it is trained on: the name of the data."""
        return PurePath(str(self.any.settings.get("data"))).name

    @property
    def task_key(self) -> str:
        """What two rows have in common whose losses can be compared: the data, and how they are read."""
        settings = self.any.settings
        data = [settings.get(f"{name}_digest") or settings.get(name) for name in ("data", "heldout")]
        read = [settings.get(name) for name in TASK_SETTINGS]
        return json.dumps([data, read], sort_keys=True, default=str)

    @property
    def where(self) -> str:
        """Where both peaks were measured: on the accelerator if it was, else as resident host memory."""
        sides = [run for run in (self.base, self.locked) if run is not None]
        return ACCELERATOR if all(run.peak(ACCELERATOR) for run in sides) else HOST

    def both(self, name: str) -> tuple[float | None, float | None]:
        """A metric of base and locked."""
        return tuple(run.metric(name) if run else None for run in (self.base, self.locked))  # type: ignore

    def ratio(self, name: str) -> float | None:
        """Locked / base of a metric."""
        return divide(*reversed(self.both(name)))

    def peaks(self) -> tuple[float | None, float | None]:
        """Peak memory of base and locked in bytes, both measured at the same place (`where`)."""
        return tuple(run.peak(self.where) if run else None for run in (self.base, self.locked))  # type: ignore


@dataclass(eq=False)
class Search:
    """The trials of one search on one lock and its base."""

    id: str
    runs: list[Run] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the attack that is tuned."""
        return _named(self.runs[0])

    def trials(self, side: str) -> list[Run]:
        """The trials of a side, in their order."""
        return sorted((run for run in self.runs if run.side == side), key=lambda run: run.settings.get("trial") or 0)


@dataclass(eq=False)
class Lock:
    """One lock: its run, if it is among the records, and its attacks. No `id`: attacks on base alone."""

    id: str | None
    run: Run | None
    pairs: list[Pair] = field(default_factory=list)
    searches: list[Search] = field(default_factory=list)

    def search_of(self, run: Run) -> Search | None:
        """The search that a run's settings come from, if it is among the records."""
        return next((s for s in self.searches if s.id == run.settings.get("search")), None)

    @property
    def manifest(self) -> dict[str, Any]:
        """Form, depth and the like: from an attack's manifest, completed by the lock's own settings."""
        found: dict[str, Any] = dict(self.run.settings) if self.run else {}
        for pair in self.pairs:
            if pair.locked is not None and isinstance(pair.locked.settings.get("lock"), dict):
                found |= {k: v for k, v in pair.locked.settings["lock"].items() if v is not None}
                break
        return found

    @property
    def short(self) -> str:
        """The lock in two words: its id and depth."""
        depth = self.manifest.get("depth")
        return f"Lock {str(self.id)[:8]}" + (f" (K = {depth})" if depth is not None else "")

    @property
    def title(self) -> str:
        """A line that names the lock."""
        if self.id is None:
            return "Base model alone (no lock among these records)"
        facts = self.manifest
        named = [str(facts["form"])] if facts.get("form") is not None else []
        named += [f"{sign} = {facts[k]}" for k, sign in (("depth", "K"), ("coupling", "g")) if k in facts]
        named += [str(facts["start"])] if facts.get("start") is not None else []
        if isinstance(facts.get("harden"), bool):
            named.append("hardened" if facts["harden"] else "not hardened")
        return f"Lock {self.id[:8]}" + (f": {', '.join(named)}" if named else "")

    @property
    def base_digest(self) -> str | None:
        """Digest of the model that was locked, where a record tells."""
        runs = [self.run] + [pair.locked for pair in self.pairs]
        return next((run.base_digest for run in runs if run and run.base_digest), None)


def _named(run: Run) -> str:
    """A run's strategy, and what was chosen by hand on its axes; of best-memory, which chooses itself, the cap."""
    name, axes = str(run.strategy or "-"), run.settings.get("axes") or {}
    if cap := (run.settings.get("lever_search") or {}).get("cap"):
        return f"{name} {cap:g}x"
    entry = catalogue.STRATEGIES.get(name)
    by_hand = [
        axis for axis in catalogue.AXES if entry and axes.get(axis, getattr(entry, axis)) != getattr(entry, axis)
    ]
    return ", ".join([name, *(f"{axis} {axes[axis]}" for axis in by_hand)])


def divide(above: float | None, below: float | None) -> float | None:
    """A ratio, or null where a side is missing or zero."""
    return above / below if above is not None and below else None


def group(runs: list[Run]) -> list[Lock]:
    """Locks with the attacks on them, each attack beside the same attack on the base model."""
    locks: dict[str, Lock] = {}
    for run in runs:
        if run.kind == "lock" and run.id:
            locks[str(run.id)] = Lock(str(run.id), run)
    attacks = [run for run in runs if run.kind == "attack" and not run.is_trial]
    locked: dict[str, list[Run]] = {}
    for run in attacks:
        if run.side == "locked":
            lock_id = str(run.settings.get("lock_id") or "unknown")
            locks.setdefault(lock_id, Lock(lock_id, None))
            locked.setdefault(lock_id, []).append(run)
    bases = [run for run in attacks if run.side == "base"]
    if bases and not locks:
        alone = Lock(None, None)
        alone.pairs = _pair(bases, [])
        alone.searches = _searches(runs, None)
        return [alone]
    for lock_id, lock in locks.items():
        mine = locked.get(lock_id, [])
        lock.pairs = [Pair(None, run) for run in mine]  # so that the manifest and the digest can be read
        digest = lock.base_digest
        fitting = [run for run in bases if not digest or not run.base_digest or run.base_digest == digest]
        # Base runs alone are no attack on a lock where another lock was attacked.
        lock.pairs = _pair(_once(fitting, lock_id), mine) if mine or not locked else []
        lock.searches = _searches(runs, lock)
    return sorted(locks.values(), key=_order)


def _once(bases: list[Run], lock_id: str) -> list[Run]:
    """Base runs, each once: the same run stands beside every lock that was attacked, this one's own first."""
    found: dict[tuple[str, str], Run] = {}
    for run in sorted(bases, key=lambda run: run.settings.get("lock_id") != lock_id):
        found.setdefault((str(run.id), run.key), run)  # two searches may end with the same run
    return list(found.values())


def _searches(runs: list[Run], lock: Lock | None) -> list[Search]:
    """The searches on a lock, with those on its base that belong to them."""
    found: dict[str, Search] = {}
    for run in runs:
        if not run.is_trial:
            continue
        mine = run.side == "base" if lock is None else run.settings.get("lock_id") == lock.id
        if mine:
            search = str(run.settings.get("search"))
            found.setdefault(search, Search(search)).runs.append(run)
    return list(found.values())


def _order(lock: Lock) -> tuple[str, float, str]:
    facts = lock.manifest
    depth = facts.get("depth")
    return str(facts.get("form")), depth if isinstance(depth, (int, float)) else 0, str(lock.id)


def _pair(bases: list[Run], locked: list[Run]) -> list[Pair]:
    """One pair per setting; a side that was run once serves all runs of the other, none is averaged."""
    sides: dict[str, tuple[list[Run], list[Run]]] = {}
    for run in sorted(bases + locked, key=lambda r: str(r.started)):
        sides.setdefault(run.key, ([], []))[run.side == "locked"].append(run)
    pairs = []
    for base, lock in sides.values():
        if len(base) == 1 and lock:
            pairs += [Pair(base[0], run) for run in lock]
        elif len(lock) == 1 and base:
            pairs += [Pair(run, lock[0]) for run in base]
        else:
            pairs += [Pair(*both) for both in itertools.zip_longest(base, lock)]
    _label(pairs)
    rank = {name: i for i, name in enumerate(("full", "full-offload", "ckpt-layer"))}
    return sorted(pairs, key=lambda p: (rank.get(p.strategy, len(rank)), p.strategy, p.label))


def _label(pairs: list[Pair]) -> None:
    """Name each row by its strategy and by what sets it apart from other rows of that strategy."""
    for name, rows in itertools.groupby(sorted(pairs, key=lambda p: p.name), key=lambda p: p.name):
        alike = list(rows)
        tuned = any(pair.any.settings.get("search") for pair in alike)
        flat = [({"data": pair.task} if tuned else _flat(pair.any.settings)) for pair in alike]
        keys = list(dict.fromkeys(pair.any.settings_key for pair in alike))
        names = sorted({name for settings in flat for name in settings} - {"seed"})
        apart = [n for n in names if len({json.dumps(s.get(n), default=str) for s in flat}) > 1]
        seeds = {json.dumps(pair.any.seed) for pair in alike}
        for pair, settings in zip(alike, flat, strict=True):
            notes = [(name, settings.get(name)) for name in apart]
            pair.setting = _noted(name, notes)
            if tuned and len(keys) > len({settings["data"] for settings in flat}):  # searches that differ in more
                pair.setting += f" #{keys.index(pair.any.settings_key) + 1}"
            pair.label = _noted(name, sorted([*notes, ("seed", pair.any.seed)]) if len(seeds) > 1 else notes)
    for label in {pair.label for pair in pairs}:
        same = [pair for pair in pairs if pair.label == label]
        if len(same) > 1:
            for number, pair in enumerate(same, 1):
                pair.label = f"{label} #{number}"


def _noted(name: str, notes: list[tuple[str, Any]]) -> str:
    return f"{name} ({', '.join(f'{k} {v}' for k, v in notes)})" if notes else name


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key in SIDE_KEYS and not prefix:
            continue
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
