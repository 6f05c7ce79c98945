"""Which memory levers a job has: those of the command and of a DeepSpeed file, the strategy's own, or the best."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlrscale import catalogue
from dlrscale.config import AttackConfig
from dlrscale.errors import ConfigError
from dlrscale.launcher import imports


def choose_levers(entry: catalogue.Strategy, options_: dict[str, Any]) -> catalogue.Levers:
    """The levers in force: a DeepSpeed file's and those given by hand against the strategy's idea and defaults.

    Args:
        entry: The strategy; for a job that is none, an entry with that job's own levers.
        options_: The command's options.

    Returns:
        Levers without a None.

    Raises:
        ConfigError: If file and options differ, or either contradicts the strategy's idea.
    """
    place, given = options_.get("deepspeed_config"), given_levers(options_)
    try:
        return entry.resolve(given)
    except ConfigError as error:
        if place is None:
            raise
        raise ConfigError([*error.faults, f"(Stage and offload are those of {place}.)"]) from None


def given_levers(options_: dict[str, Any]) -> catalogue.Levers:
    """The levers that a DeepSpeed file or the command's options decide; None for every other.

    Args:
        options_: The command's options.

    Returns:
        The levers.

    Raises:
        ConfigError: If file and options differ.
    """
    from dlrscale import engine

    by_hand = {f.name: options_.get(f.name) for f in dataclasses.fields(catalogue.Levers)}
    place = options_.get("deepspeed_config")
    file = engine.read_file(place) if place else {}
    decided = engine.file_levers(file) if place else {}
    if "optimizer" in file:
        decided["optimizer"] = file["optimizer"]["type"]
    keys = {"zero": "zero_optimization.stage", "optimizer": "optimizer.type"}
    clash = [
        f"{catalogue.flag(k, by_hand[k])} and {keys.get(k, f'zero_optimization.{k}')} {v} in {place} differ. "
        "Give one of them."
        for k, v in decided.items()
        if by_hand[k] is not None and by_hand[k] != v
    ]
    if clash:
        raise ConfigError(clash)
    return catalogue.Levers(**by_hand | decided)


def with_best_levers(
    config: AttackConfig, entry: catalogue.Strategy, options_: dict[str, Any], own: dict[str, Any]
) -> AttackConfig:
    """An attack whose strategy searches its levers, with those that the planner finds best for its model.

    Args:
        config: The attack with the strategy's defaults.
        entry: The strategy.
        options_: The command's options.
        own: The options of this side.

    Returns:
        The attack as the winner's axes make it.

    Raises:
        ConfigError: If no combination is under the cap.
    """
    with imports.many():
        from dlrscale import engine, shapes
        from dlrscale.cli.run import resolve
        from dlrscale.jobs import forecast
    from dlrscale.planner.search import search

    def configure(levers: catalogue.Levers) -> dict[str, Any]:
        return engine.merge(dataclasses.replace(config, **dataclasses.asdict(levers)))

    values, hardware = shapes.read_config(config.model), forecast.hardware_of(config)
    plan = forecast.forecast(config, engine.merge(config))
    given, method = given_levers(options_), options_.get("gradient")
    found = search(plan, values, entry, given, method, config.knobs, configure, hardware)
    winner = found.winner
    by_hand = {k: v for k, v in (dataclasses.asdict(given) | {"gradient": method}).items() if v is not None}
    own = own | {"gradient": winner.gradient, "knobs": dict(winner.knobs)}
    own |= {"lever_search": found.values() | {"given": by_hand}}
    return resolve(type(config), own, winner.levers, config.name)
