"""From options to a configuration, and from a configuration to a finished job, in the command's own process."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from dlrscale import catalogue, launcher, record
from dlrscale import config as configuration
from dlrscale.config import AttackConfig, LockConfig, RunConfig
from dlrscale.errors import ConfigError, JobError, PlanError, describe
from dlrscale.launcher import imports
from dlrscale.launcher.ranks import Ranks
from dlrscale.record import Outcome


def parse_columns(text: str | None) -> dict[str, str] | None:
    """Read `prompt=question,completion=answer`.

    Args:
        text: The option's value, or None.

    Returns:
        Role to key, or None.

    Raises:
        ConfigError: If it is not of that form.
    """
    if text is None:
        return None
    pairs = [part.split("=", 1) for part in text.split(",")]
    roles = sorted(pair[0] for pair in pairs)
    if any(len(pair) != 2 or not pair[1] for pair in pairs) or roles not in (
        ["text"],
        ["completion", "prompt"],
        ["messages"],
    ):
        raise ConfigError(f"--columns {text}: write prompt=KEY,completion=KEY, text=KEY or messages=KEY.")
    return dict(pairs)


def absolute(place: str | None) -> str | None:
    """An absolute path; data with a name (embedded, hub) and nothing stay as they are."""
    return place if place is None or place.startswith(configuration.NAMED) else os.path.abspath(place)


def resolve(kind: type, options_: dict[str, Any], levers: catalogue.Levers, default_name: str) -> Any:
    """Turn the options of a command into a configuration: absolute paths, defaults, one place for each setting.

    Args:
        kind: LockConfig, AttackConfig or PretrainConfig.
        options_: The command's options, without dry_run and local_rank.
        levers: The levers in force where no DeepSpeed file decides them.
        default_name: The run's name where none was given.

    Returns:
        The configuration, with `out` from the run's resume_id where none was given.

    Raises:
        ConfigError: If something is wrong or contradicts the DeepSpeed file.
    """
    with imports.many():
        from dlrscale import data, engine, folders, shapes, tracking

    values = {k: v for k, v in options_.items() if k not in ("dry_run", "local_rank")}
    for key in ("data", "heldout", "heldout_base", "public_data", "chat_template", "out", "deepspeed_config",
                "hostfile", "hardware_file"):  # fmt: skip
        if key in values:
            values[key] = absolute(values[key])
    if "model" in values:
        values["model"] = str(folders.find_model(values["model"]))
        shapes.read_config(values["model"])
    values["columns"] = parse_columns(values.get("columns"))
    values |= dataclasses.asdict(levers)
    file = engine.read_file(values["deepspeed_config"]) if values.get("deepspeed_config") else {}
    values["dtype"] = engine.resolve_dtype(file, values.get("dtype"))
    if "scheduler" in file and kind is LockConfig:
        raise ConfigError(
            f"scheduler in {values['deepspeed_config']}: a lock has two stages with rates of their own. Take the "
            "scheduler out of the file and give --lr and --heal-lr."
        )
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        values["num_ranks"] = int(os.environ["WORLD_SIZE"])
    slots = launcher.hostfile_slots(values["hostfile"]) if values.get("hostfile") else 0
    if slots and values.get("num_ranks") and values["num_ranks"] != slots:
        raise ConfigError(
            f"--num-ranks {values['num_ranks']} and the {slots} slots of {values['hostfile']} differ. Give one of them."
        )
    values["num_ranks"] = values.get("num_ranks") or slots or engine.device_count()
    default = catalogue.ADAM_RATE
    if issubclass(kind, AttackConfig):
        entry = catalogue.combined(values["strategy"], *(values.get(axis) for axis in catalogue.AXES))
        default = entry.default_rate(levers.optimizer)
    values["lr"], values["warmup_steps"] = engine.resolve_rates(
        file, values.get("lr"), values.get("warmup_steps"), default
    )
    values["micro_batch"], values["accumulation"] = engine.resolve_batch(
        file, values.get("micro_batch"), values.get("accumulation"), values["num_ranks"]
    )
    if values.get("tracking_uri") != "none":
        values["tracking_uri"] = tracking.resolve(values.get("tracking_uri"))
    values["name"] = values.get("name") or default_name
    values["command"] = values.get("command") or launcher.show(["dlrscale", *typed()])
    chosen_out = values.pop("out", None)
    config = kind(out=chosen_out or "", **values)
    configuration.check(config)
    for key in ("data", "heldout", "heldout_base", "public_data"):
        data.check_place(values.get(key))
    data.read_template(config.chat_template)
    places = {key: values[key] for key in ("data", "heldout", "heldout_base", "public_data") if values.get(key)}
    pinned = {key: data.pin(place, heldout=key.startswith("heldout")) for key, place in places.items()}
    config = dataclasses.replace(config, **pinned)
    if chosen_out is None:
        resume_id = configuration.run_ids(config, engine.merge(config))[1]
        config = dataclasses.replace(config, out=str(Path("results").absolute() / f"{config.name}-{resume_id[:8]}"))
    return config


def typed() -> list[str]:
    """The command's words as they were typed; none where a configuration is built outside of a command."""
    context = click.get_current_context(silent=True)
    return list(context.obj or []) if context else []


def inside_launch() -> bool:
    """Whether this process is a rank that the DeepSpeed launcher started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_rank(config: RunConfig, dry_run: bool) -> None:
    """Run a job as one rank of a direct `deepspeed launch/...`; rank 0 alone speaks. Ends the process."""
    from dlrscale.launcher.guard import Guard

    guard = Guard().start()
    with imports.many():
        from dlrscale import jobs, tracking
        from dlrscale.jobs import forecast
    first = os.environ["RANK"] == "0"
    merged = jobs.preflight(config)
    plan = forecast.forecast(config, merged)
    if dry_run:
        if first:
            click.echo(json.dumps(merged, indent=2))
            say_plan(config, plan)
        sys.exit(0)
    forecast.refuse(config, plan)
    # Every rank looks before the process group is there, so that none waits for one that has refused.
    entry, code = configuration.check_folder(Path(config.out), *configuration.run_ids(config, merged)), 0
    if entry is None:
        jobs.check_checkpoints(config)
        if first and config.tracking_uri != "none":
            tracking.prepare(config.tracking_uri)
        code = jobs.run(config, jobs.make_tracker, guard)
        entry = last_record(config)
    elif first:
        click.echo(f"{config.name}: was done before", err=True)
    if first:
        for line in jobs.summary_lines(entry, Path(config.out)) if entry else []:
            click.echo(line)
    sys.exit(code)


def check_family(folder: str) -> None:
    """Refuse a model of a family that is not in the table, naming the module that was looked at."""
    from dlrscale import shapes

    config = shapes.read_config(folder)
    try:
        shapes.find_family(config)
    except ConfigError:
        from dlrscale import models

        models.refuse_family(config)


def say_plan(config: RunConfig, plan: Any) -> None:
    """Print a job's plan, and what a search of its levers has found, behind the marks of comments."""
    from dlrscale.jobs import forecast
    from dlrscale.planner import search

    if plan is not None:
        click.echo(f"# {forecast.said(plan, forecast.hardware_of(config))}")
    found = getattr(config, "lever_search", None)
    for line in search.lines(found) if found else ():
        click.echo(f"# {line}")


def refuse_unfit(configs: list[RunConfig]) -> None:
    """Stop before the first of some jobs where the plan of one says that it cannot fit.

    Args:
        configs: Their configurations.

    Raises:
        PlanError: With what each lacks.
    """
    with imports.many():
        from dlrscale import engine
        from dlrscale.jobs import forecast

    faults = []
    for config in configs:
        try:
            forecast.refuse(config, forecast.forecast(config, engine.merge(config)))
        except PlanError as error:
            faults.append(str(error))
    if faults:
        raise PlanError("\n".join(faults))


def execute(config: RunConfig, *, dry_run: bool = False, quiet: bool = False) -> dict[str, Any] | None:
    """Check a job, launch it, wait for it and say how it ended.

    Args:
        config: The resolved configuration.
        dry_run: Print the merged DeepSpeed configuration and the launch line instead.
        quiet: Do not print the summary.

    Returns:
        The record; None after a dry run.

    Raises:
        ConfigError: If the input is wrong.
        PlanError: If the plan says that the job cannot fit.
        JobError: If the job failed; its record was written all the same.
    """
    with imports.many():
        from dlrscale import jobs
        from dlrscale.jobs import forecast

    merged = jobs.preflight(config)
    plan = forecast.forecast(config, merged)
    if dry_run:
        click.echo(json.dumps(merged, indent=2))
        say_plan(config, plan)
        click.echo(launcher.show(launcher.command(config)))
        return None
    forecast.refuse(config, plan)
    run_id, resume_id = configuration.run_ids(config, merged)
    out = Path(config.out)
    entry = configuration.check_folder(out, run_id, resume_id)
    if entry is not None:
        click.echo(f"{config.name}: was done before", err=True)
    else:
        jobs.check_checkpoints(config)
        entry = _launch(config, jobs.describe(config, merged, run_id, resume_id))
    if entry["outcome"] == Outcome.FAILED.value:
        told = describe(RuntimeError(entry["error"]))  # no space left: the log adds nothing to that
        log = "" if told else f"\nThe end of {out}/ranks.log:\n{launcher.tail(out / 'ranks.log')}"
        raise JobError(f"{config.name} failed: {entry['error']}{log}")
    if not quiet:
        for line in jobs.summary_lines(entry, out):
            click.echo(line)
    return entry


def _launch(config: RunConfig, description: dict[str, Any]) -> dict[str, Any]:
    """Run the ranks of a job to the record of this start; where they leave none, it is written here.

    Args:
        config: The resolved configuration.
        description: The record as far as it is known before the start.

    Returns:
        The record.

    Raises:
        ConfigError: If another command has the folder, or the ranks refused their input.
        Interrupted: If this command was told to end; the record says so.
    """
    from dlrscale import jobs, tracking

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with record.held(out / configuration.COMMAND_LOCK) as alone:
        if not alone:
            raise ConfigError(configuration.taken(out))
        configuration.claim_folder(out, description["id"], description["resume_id"])
        if config.tracking_uri != "none":
            tracking.prepare(config.tracking_uri)
        with record.held(out / configuration.RANK_LOCK, jobs.LEFTOVER_S) as free:  # ranks of a direct launch, or left
            if not free:
                raise ConfigError(configuration.taken(out))
        before, started, ranks = count_records(config), record.now(), Ranks(out)
        try:
            with Progress(config) as progress:
                # The pids of other hosts say nothing here.
                look = (lambda: None) if config.hostfile else ranks.sample
                code = launcher.run(config, lambda: (progress.update(), look()))
        except launcher.Interrupted as signal:
            if count_records(config) == before:
                _leave_record(config, description, ranks, started, Outcome.FAILED, f"interrupted by {signal}")
            if config.tracking_uri != "none":
                tracking.replay_quietly(out, config.tracking_uri)
            raise
        if count_records(config) == before:
            outcome, error = end_of_ranks(code, ranks, out)
            _leave_record(config, description, ranks, started, outcome, error)
        entry = last_record(config)
        if config.tracking_uri != "none":
            if entry["outcome"] in (Outcome.FAILED.value, Outcome.OOM.value):
                tracking.replay_quietly(out, config.tracking_uri)  # rank 0 may have had no time to end its MLflow run
            tracking.tell_if_behind(out, config.tracking_uri)
        if entry["outcome"] == Outcome.FAILED.value and code == launcher.EXIT_CONFIG:
            raise ConfigError(entry["error"])
        return entry


def end_of_ranks(code: int, ranks: Ranks, out: Path) -> tuple[Outcome, str]:
    """How a job ended whose ranks left no record.

    Args:
        code: The launcher's exit code.
        ranks: What was seen of the ranks.
        out: The run's folder.

    Returns:
        The outcome and what to say of it.
    """
    doing = ", ".join(f"rank {rank} in {phase}" for rank, (_, phase) in sorted(ranks.notes().items())) or "at the start"
    name = launcher.signal_of(code)
    if name == "SIGKILL" and ranks.killed_for_memory():
        return Outcome.OOM, f"the host ran out of memory and the kernel killed a rank ({doing})"
    if code == launcher.EXIT_OOM or (name == "SIGABRT" and ranks.aborted_for_memory()):
        return Outcome.OOM, f"a rank got no more memory and aborted ({doing})"
    if name is not None:
        who = "DeepSpeed's launcher" if code < 0 else "a rank"
        return Outcome.FAILED, f"{who} was ended from outside by {name} ({doing})"
    left = f"the ranks ended (launcher exit code {code}) and left no record; see {out}/ranks.log"
    return Outcome.FAILED, describe(RuntimeError(ranks.last_words()), out) or left


def _leave_record(
    config: RunConfig, description: dict[str, Any], ranks: Ranks, started: str, outcome: Outcome, error: str
) -> None:
    peak = {"memory/host_peak_rss_bytes": ranks.peak_rss_bytes} if ranks.peak_rss_bytes else {}
    entry = description | {"outcome": outcome.value, "started": started, "metrics": peak, "phases": {}, "error": error}
    record.append_line(Path(config.out) / record.RECORDS_FILE, entry)


def count_records(config: RunConfig) -> int:
    """Records in a run's folder."""
    file = Path(config.out) / record.RECORDS_FILE
    return sum(1 for _ in record.read_lines(file)) if file.exists() else 0


def last_record(config: RunConfig) -> dict[str, Any] | None:
    """The newest record of a run's folder."""
    file = Path(config.out) / record.RECORDS_FILE
    rows = list(record.read_lines(file)) if file.exists() else []
    return rows[-1] if rows else None


TAIL_BYTES = 1 << 16  # more than a step row is long


class Progress:
    """A progress bar over a run's steps, drawn from its step rows."""

    def __init__(self, config: RunConfig):
        self.file = Path(config.out) / record.STEPS_FILE
        self.total = config.steps + (config.heal_steps if isinstance(config, LockConfig) else 0)
        self.label = config.name

    def __enter__(self) -> Progress:
        from tqdm import tqdm

        self.bar = tqdm(total=self.total, desc=self.label, unit="step", dynamic_ncols=True, file=sys.stderr)
        return self

    def update(self) -> None:
        """Move the bar to the newest complete row."""
        try:
            with open(self.file, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                row = json.loads(file.read().split(b"\n")[-2])
        except (OSError, IndexError, ValueError):
            return  # no step yet, or the file is being written
        self.bar.n = row["step"]
        self.bar.set_postfix_str(
            f"{row['phase']} loss {row['loss/train']:.4f}" if row["loss/train"] is not None else ""
        )
        self.bar.refresh()

    def __exit__(self, *error: object) -> None:
        self.update()
        self.bar.close()
