"""An attack of several runs: the search of its settings, the seeds that repeat the best, and the target."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from dlrscale import config as configuration
from dlrscale import record
from dlrscale.config import AttackConfig
from dlrscale.errors import ConfigError, JobError, PlanError
from dlrscale.search import Space, Target, Wanted, base_result, cost_of, gates, result, space
from dlrscale.search.sampler import Sampler

TRIALS, TARGET_EVALUATIONS = "trials", 20


def read_wanted(options: dict[str, Any], knobs: Sequence[str], base: str | None) -> Wanted | None:
    """Take the options of a search out of a command's options.

    Args:
        options: The command's options; `trials`, `lr_range`, `seeds` and `target` go.
        knobs: What `--set` was given.
        base: What `--base` was given.

    Returns:
        What was asked for; None where it is one run, which `options` describe.

    Raises:
        ConfigError: With all that is wrong.
    """
    trials, lr_range, seeds, target = (options.pop(key, None) for key in ("trials", "lr_range", "seeds", "target"))
    faults, read = [], []
    for function, *given in (
        (space.parse_lr_range, lr_range),
        (space.parse_seeds, seeds, options["seed"]),
        (Target.parse if target else lambda _: None, target),
    ):
        try:
            read.append(function(*given))
        except ConfigError as error:
            faults += error.faults
    if lr_range and not trials:
        faults.append("--lr-range is for a search. Give --trials as well.")
    if target and not faults and read[2].margin is not None and not base:
        faults.append(f"--target {target} needs the base's own loss: give --base, or a loss in nats.")
    if faults:
        raise ConfigError(faults)
    if not trials and seeds is None and target is None:
        return None
    names = tuple(knob.partition("=")[0] for knob in knobs)
    return Wanted(
        trials=trials or 0,
        lr_range=read[0],
        seeds=read[1],
        target=read[2],
        by_hand=names,
        default_out=not options.get("out"),
    )


def attack_many(configs: Sequence[AttackConfig], wanted: Wanted, dry_run: bool = False) -> list[dict[str, Any]]:
    """Search, repeat and measure to the target, on the base first.

    Args:
        configs: The given settings of each side: the base's first, where there is one.
        wanted: What was asked for.
        dry_run: Print what the given settings would start, and the space.

    Returns:
        The records of the runs that count, of all seeds and sides; no trial is among them.

    Raises:
        ConfigError: If a folder belongs to something else.
        JobError: If a run failed, after the others.
    """  # noqa: DOC502
    from dlrscale.cli.run import execute, refuse_unfit

    if wanted.default_out:
        kind = "search" if wanted.trials else "seeds"
        configs = [dataclasses.replace(config, out=f"{config.out}-{kind}") for config in configs]
    spaces = [_space(config, wanted) for config in configs]
    if dry_run:
        for config, points in zip(configs, spaces, strict=True):
            execute(config, dry_run=True)
            if wanted.trials:
                click.echo(f"# {wanted.trials} trials over {json.dumps(points.described())}")
        return []
    refuse_unfit(list(configs))
    for config in configs:
        _check_folder(Path(config.out))
    records, failures, base = [], [], None
    for config, points in zip(configs, spaces, strict=True):
        side = Side(config, wanted, points, base)
        try:
            records += side.run()
        except JobError as error:
            failures.append(str(error))
        if config is not configs[-1]:
            base = side.as_base()
            if wanted.target is not None and wanted.target.margin is not None:
                known = base["target"] is not None  # not where no run of the base ended
                wanted = dataclasses.replace(wanted, target=Target(loss=base["target"]) if known else None)
    if failures:
        raise JobError("\n".join(failures))
    return records


def _space(config: AttackConfig, wanted: Wanted) -> Space:
    """The space around the given settings, whose evaluations are those of a trial.

    Args:
        config: The given settings.
        wanted: What was asked for.

    Returns:
        The space; without ranges where there is no search.

    Raises:
        ConfigError: If the settings are wrong, or a DeepSpeed file decides what is to be tuned.
    """
    from dlrscale import engine, jobs

    if not wanted.trials:
        return Space(config, ())
    config = dataclasses.replace(config, eval_every=space.trial_eval_every(config))
    file = engine.read_file(config.deepspeed_config) if config.deepspeed_config else {}
    rate = (file.get("optimizer") or {}).get("params", {}).get("lr", "auto")
    if "scheduler" in file or rate != "auto":
        raise ConfigError(
            f"--trials tunes the learning rate, which {config.deepspeed_config} decides "
            f"({'scheduler' if 'scheduler' in file else 'optimizer.params.lr'}). Take it out of the file."
        )
    held = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
    jobs.preflight(dataclasses.replace(config, heldout_part="tune"))
    factors = space.batch_factors(config)
    if any(file.get(key, "auto") != "auto" for key in held):
        factors = (1.0,)
    if 2.0 in factors:
        try:
            jobs.preflight(dataclasses.replace(space.resized(config, 2.0), heldout_part="tune"))
        except ConfigError:  # less data than such a batch
            factors = tuple(f for f in factors if f != 2.0)
    return space.space(config, wanted.lr_range, wanted.by_hand, factors)


def _check_folder(out: Path) -> None:
    """Refuse a folder that holds one run, or anything else than a search or seeds.

    Args:
        out: The folder of a side.

    Raises:
        ConfigError: If it does.
    """
    if not out.exists():
        return
    own = {result.FILE, TRIALS, *configuration.OWN_FILES}
    alien = [] if out.is_dir() else [out.name]
    alien += [e.name for e in out.iterdir() if e.name not in own and not e.name.startswith((".search", "seed-"))]
    if alien:
        raise ConfigError(f"{out} holds {alien[0]}, which is not of a search or its seeds. Choose another --out.")


class Side:
    """One side of such an attack: its search, then its seeds, in one folder."""

    def __init__(self, config: AttackConfig, wanted: Wanted, points: Space, base: dict[str, Any] | None):
        self.config, self.wanted, self.points, self.out = config, wanted, points, Path(config.out)
        self.base, self.searched = base, None
        self.records: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        """Do all of it, or what is left of it.

        Returns:
            The records of the seeds.

        Raises:
            ConfigError: If another command has the folder.
            JobError: If a run failed, after the others.
        """
        from dlrscale.cli.run import execute

        self.out.mkdir(parents=True, exist_ok=True)
        with record.held(self.out / configuration.COMMAND_LOCK) as alone:
            if not alone:
                raise ConfigError(configuration.taken(self.out))
            best = self.search() if self.wanted.trials else None
            failures = []
            for seed in self.wanted.seeds:
                config = self.repeated(best, seed)
                try:
                    entry = ended(config) or execute(config)
                except JobError as error:
                    failures.append(str(error))
                    continue
                self.records.append(entry)
            self.settle()
            if failures:
                raise JobError("\n".join(failures))
            return self.records

    def search(self) -> Mapping[str, Any]:
        """Run the trials that have no record yet, in the order in which the sampler asks for them.

        Returns:
            The best trial: its number, point and loss.

        Raises:
            ConfigError: If the folder is of another search.
            JobError: If a trial failed, or none came to its end.
        """
        from dlrscale import engine
        from dlrscale.cli.run import execute

        id_ = result.search_id(self.points, self.wanted.trials, engine.merge(self.points.given))
        file, rows = self.out / result.FILE, []
        known = json.loads(file.read_text(encoding="utf-8"))["id"] if file.exists() else id_
        if known != id_:
            raise ConfigError(
                f"{self.out} holds another search ({known[:8]}, this one is {id_[:8]}): some setting differs. Choose "
                "another --out, or give the settings of that search to go on with it."
            )
        given = dataclasses.replace(self.points.given, search=id_, search_trials=self.wanted.trials)
        self.points = dataclasses.replace(self.points, given=given)
        sampler = Sampler(self.points.ranges, given.seed, self.wanted.trials, self.points.start())
        for number in range(self.wanted.trials):
            params = sampler.ask()
            config = self.trial(number, params, sampler.limits())
            try:
                entry = ended(config) or execute(config, quiet=True)
            except PlanError as error:
                click.echo(str(error), err=True)
                entry = None
            except JobError as error:
                raise JobError(f"Trial {number} of {self.wanted.trials}: {error}") from None
            shutil.rmtree(Path(config.out) / "transformed", ignore_errors=True)  # a model for every trial
            rows.append(result.trial_row(number, params, entry and with_cost(entry, Path(config.out))))
            sampler.tell([row[result.HELDOUT] for row in evaluations(Path(config.out))], rows[-1]["loss"])
            self.searched = result.described(self.points, self.wanted, id_, rows)
            record.write_atomic(file, record.dumps(self.searched, indent=1) + "\n")
            click.echo(told(self.searched), err=True)
        return result.chosen(self.searched, self.out)

    def trial(self, number: int, params: Mapping[str, float], limits: list[float | None]) -> AttackConfig:
        """The configuration of a trial: nothing is kept of it but its record and steps."""
        return dataclasses.replace(
            self.points.configuration(params),
            out=str(self.out / TRIALS / f"{number:03d}"),
            name=f"{self.config.name}-trial-{number:03d}",
            heldout_part="tune",
            heldout_base=None,
            trial=number,
            stop_above=limits,
            save_model=False,
            checkpoint_every=0,
        )

    def repeated(self, best: Mapping[str, Any] | None, seed: int) -> AttackConfig:
        """The configuration of one seed: the given settings, or the best trial's."""
        wanted, config = self.wanted, self.config
        if wanted.target is not None and not config.eval_every:
            config = dataclasses.replace(config, eval_every=max(1, config.steps // TARGET_EVALUATIONS))
        if best is not None:
            given = self.points.given
            whole = dataclasses.replace(self.points, given=dataclasses.replace(given, eval_every=config.eval_every))
            config = dataclasses.replace(
                whole.configuration(best["params"]), heldout_part="report", trial=best["number"]
            )
        return dataclasses.replace(
            config,
            seed=seed,
            out=str(self.out / f"seed-{seed}"),
            name=f"{config.name}-seed-{seed}",
            target=wanted.target.loss if wanted.target else None,
            base_result=self.base,
        )

    def settle(self) -> None:
        """Bring target and seeds to where they are told.

        A target above the base's best is known only now, and a run that ended before may have had another one, or
        another base beside it.
        """
        from dlrscale import tracking

        target = self.wanted.target
        if target is not None and self.records:
            folders = [self.out / f"seed-{entry['seed']}" for entry in self.records]
            losses = [result.best_loss(e, evaluations(f)) for e, f in zip(self.records, folders, strict=True)]
            found = [loss for loss in losses if loss is not None]
            limit = target.loss if target.margin is None else min(found, default=None)
            if limit is not None:
                limit += target.margin or 0.0
                config = dataclasses.replace(self.points.given, target=limit, base_result=self.base)
                self.records = [amended(e, f, limit, config) for e, f in zip(self.records, folders, strict=True)]
                for folder in folders if self.config.tracking_uri != "none" else ():
                    tracking.replay_quietly(folder, self.config.tracking_uri)
        if self.searched is not None:
            self.searched["repeats"] = result.repeats(self.records, self.searched["spent"])
            record.write_atomic(self.out / result.FILE, record.dumps(self.searched, indent=1) + "\n")

    def as_base(self) -> dict[str, Any]:
        """What the other side's records must know of this one."""
        return base_result(self.records, len(self.searched["trials"]) if self.searched else 0)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The step rows of a run that hold a held-out loss."""
    return [row for row in step_rows(folder) if row.get(result.HELDOUT) is not None]


def step_rows(folder: Path) -> list[dict[str, Any]]:
    """The step rows of a run."""
    file = folder / record.STEPS_FILE
    return list(record.read_lines(file)) if file.exists() else []


def ended(config: AttackConfig) -> dict[str, Any] | None:
    """The record of this very run where it ended in its folder, in whatever way that is a result."""
    from dlrscale import engine
    from dlrscale.cli.run import last_record

    entry = last_record(config)
    if entry is None or entry["outcome"] not in result.ENDED:
        return None
    return entry if entry["id"] == configuration.run_ids(config, engine.merge(config))[0] else None


def with_cost(entry: dict[str, Any], folder: Path, target: float | None = None) -> dict[str, Any]:
    """A record with what the run cost, and to a target, from its step rows; a killed run could not tell it.

    Args:
        entry: The record.
        folder: The run's folder.
        target: A target that the run did not know.

    Returns:
        The record, or one with more metrics.
    """
    if "cost/tokens" in entry["metrics"] and target is None:
        return entry
    return entry | {"metrics": entry["metrics"] | cost_of(entry, step_rows(folder), target)}


def amended(entry: dict[str, Any], folder: Path, target: float, config: AttackConfig) -> dict[str, Any]:
    """Append a run's record once more, with cost and gates for a target or a base that it did not know."""
    told = (entry.get("gates") or {}) | gates(config, str(entry["side"]))
    if entry["metrics"].get("target/loss") == target and entry.get("gates") == told:
        return entry
    found = with_cost(entry, folder, target) | {"gates": told}
    found["config"] = found["config"] | {"target": target, "base_result": config.base_result}
    record.append_line(folder / record.RECORDS_FILE, found)
    return found


def told(searched: Mapping[str, Any]) -> str:
    """The newest trial in a line."""
    row, best = searched["trials"][-1], searched["best_so_far"][-1]
    point = ", ".join(f"{name.removeprefix(space.KNOB)} {value:.3g}" for name, value in row["params"].items())
    if row["pruned_at"] is not None:
        end = f"pruned after step {row['pruned_at']} at {row['last_loss']:.4f}"
    else:
        end = f"loss {row['loss']:.4f}" if row["loss"] is not None else row["outcome"]
    best_words = "" if best is None else f" (best {best:.4f})"
    return f"trial {row['number'] + 1} of {searched['trials_wanted']}: {end}{best_words}: {point}"
