"""What a search tunes: ranges of settings, and how a point of them becomes a configuration."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dlrscale.config import AttackConfig
from dlrscale.errors import ConfigError

WARMUP_SHARE = 0.2  # of the steps, at most
EVALUATIONS = 5  # of a trial, by which it is pruned
KNOB = "knob."
Params = Mapping[str, float]


@dataclass(frozen=True)
class Range:
    """One tuned setting: a number from `low` to `high`, evenly or in powers (`log`), or one of `choices`."""

    name: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[float, ...] = ()

    def described(self) -> dict[str, Any]:
        """As a record holds it."""
        if self.choices:
            return {"choices": list(self.choices)}
        return {"low": self.low, "high": self.high, "log": self.log, "whole": self.whole}

    def holds(self, value: float) -> bool:
        """Whether a value lies in it."""
        return value in self.choices if self.choices else self.low <= value <= self.high


@dataclass(frozen=True)
class Space:
    """All tuned settings of an attack, around the given configuration.

    A batch of f times as many sequences goes with 1 / f as many steps, so that every trial sees as many sequences. A
    larger one accumulates more micro-batches, so that it needs no more memory.
    """

    given: AttackConfig
    ranges: tuple[Range, ...]

    def configuration(self, params: Params) -> AttackConfig:
        """The configuration of a point."""
        config, factor = self.given, params.get("batch", 1.0)
        config = resized(config, factor)
        share = params["warmup_share"]
        knobs = {k: params.get(f"{KNOB}{k}", v) for k, v in config.knobs.items()}
        return replace(config, lr=params["lr"], warmup_steps=round(share * config.steps), knobs=knobs)

    def start(self) -> dict[str, float]:
        """The given settings as a point; what lies outside of its range is left out, and drawn."""
        config = self.given
        values = {"lr": config.lr, "warmup_share": config.warmup_steps / config.steps, "batch": 1.0}
        values |= {f"{KNOB}{name}": value for name, value in config.knobs.items()}
        return {r.name: values[r.name] for r in self.ranges if r.holds(values[r.name])}

    def described(self) -> dict[str, Any]:
        """As a record holds it."""
        return {r.name: r.described() for r in self.ranges}


def resized(config: AttackConfig, factor: float) -> AttackConfig:
    """The same sequences in batches of `factor` times as many, evaluated after as many sequences."""
    micro, accumulation = config.micro_batch, config.accumulation
    if factor >= 1 or accumulation * factor == int(accumulation * factor):
        accumulation = int(accumulation * factor)
    else:
        micro = int(micro * factor)
    every = config.eval_every and max(1, round(config.eval_every / factor))
    return replace(
        config, micro_batch=micro, accumulation=accumulation, steps=int(config.steps / factor), eval_every=every
    )


def batch_factors(config: AttackConfig) -> tuple[float, ...]:
    """The sizes, as multiples of the given batch, whose steps and evaluations come out whole."""
    found = [1.0]
    if config.steps % 2 == 0 and config.eval_every % 2 == 0:
        found.append(2.0)
    if config.accumulation % 2 == 0 or config.micro_batch % 2 == 0:
        found.append(0.5)
    return tuple(sorted(found))


def trial_eval_every(config: AttackConfig) -> int:
    """Steps between a trial's evaluations: those asked for, else a fifth of the run, even: a batch may double."""
    if config.eval_every:
        return config.eval_every
    every = max(1, config.steps // EVALUATIONS)
    return every - every % 2 if every > 1 else every


def space(
    config: AttackConfig, lr_range: tuple[float, float] | None, by_hand: Collection[str], factors: tuple[float, ...]
) -> Space:
    """The space of an attack.

    Args:
        config: The given settings.
        lr_range: Lowest and highest peak learning rate; None: the strategy's own.
        by_hand: Knobs that were given by `--set`: they stay.
        factors: Batch sizes as multiples of the given one.

    Returns:
        The space: learning rate, warm-up, batch where there is a choice, and every knob of the strategy that has a
        range to search (`Knob.search`).
    """
    rates = lr_range or config.entry.searched_rates(config.optimizer)
    ranges = [Range("lr", *rates, log=True), Range("warmup_share", 0.0, WARMUP_SHARE)]
    if len(factors) > 1:
        ranges.append(Range("batch", choices=factors))
    for knob in config.entry.knobs:
        if config.entry.gradient == "reverse" and knob.name == "dropout":
            continue  # refused: another dropout would give another code
        if knob.search is not None and knob.name not in by_hand:
            ranges.append(Range(f"{KNOB}{knob.name}", *knob.search, log=knob.log, whole=isinstance(knob.default, int)))
    return Space(config, tuple(ranges))


def parse_lr_range(text: str | None) -> tuple[float, float] | None:
    """Read `1e-5,3e-2`; None leaves it to the strategy.

    Args:
        text: The option's value.

    Returns:
        Lowest and highest rate.

    Raises:
        ConfigError: If it is not two numbers above 0, the lower one first.
    """
    if text is None:
        return None
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError:
        low = high = math.nan
    if not 0 < low < high < math.inf:
        raise ConfigError(f"--lr-range {text}: write LOW,HIGH, such as 1e-5,3e-2.")
    return low, high


def parse_seeds(text: str | None, default: int) -> tuple[int, ...]:
    """Read `0,1,2`; None is the one seed of `--seed`.

    Args:
        text: The option's value.
        default: The seed of `--seed`.

    Returns:
        The seeds.

    Raises:
        ConfigError: If they are not different whole numbers of at least 0.
    """
    if text is None:
        return (default,)
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words) or len({int(word) for word in words}) < len(words):
        raise ConfigError(f"--seeds {text}: write different whole numbers with commas between them, such as 0,1,2.")
    return tuple(int(word) for word in words)
