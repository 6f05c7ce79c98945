"""From options to plans: base and locked side by side, and every combination of a sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dlrscale import catalogue, shapes
from dlrscale.errors import ConfigError
from dlrscale.planner.hardware import Hardware
from dlrscale.planner.locking import LockPlan
from dlrscale.planner.model import attacked, locked_shape
from dlrscale.planner.plan import Plan, inside
from dlrscale.shapes import ModelShape, presets
from dlrscale.shapes.layout import layout

BASE, LOCKED = "base", "locked"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a plan is asked about, all of it decided.

    `ds_config` is what DeepSpeed would get, without "auto".
    """

    config: Mapping[str, Any]
    entry: catalogue.Strategy
    levers: catalogue.Levers
    knobs: Mapping[str, float]
    ds_config: Mapping[str, Any]
    dtype: str
    micro_batch: int
    seq_len: int
    num_ranks: int
    nodes: int
    ranks_per_node: int
    depth: int
    form: str
    rank: int | None
    layers: str | None
    attention: str
    hardware: Hardware

    @property
    def setup(self) -> dict[str, Any]:
        """What the plans of attacks and locks have in common."""
        names = (
            "ds_config",
            "dtype",
            "micro_batch",
            "seq_len",
            "num_ranks",
            "nodes",
            "ranks_per_node",
            "attention",
        )
        return {name: getattr(self, name) for name in names}


def read_model(name: str) -> dict[str, Any]:
    """The configuration that `--model` means: a folder, a config.json, or a built-in name such as llama-2-7b.

    Args:
        name: The option's value.

    Returns:
        The content of the config.json.

    Raises:
        ConfigError: If it is none of these.
    """
    path = Path(name)
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"--model {path.absolute()} is no JSON: {error}. Name a config.json.") from None
        if not isinstance(found, dict):
            raise ConfigError(f"--model {path.absolute()} holds no JSON object. Name a config.json.")
        return found
    if path.is_dir() or "/" in name:
        return shapes.read_config(path)
    return presets.find(name)


def sides(question: Question) -> dict[str, ModelShape]:
    """The shapes of base and locked model; a configuration that is locked already says how it is locked."""
    shape = shapes.model_shape(question.config)
    if shape.ranks:
        return {BASE: replace(shape, locked=False, form=None, ranks=None), LOCKED: shape}
    locked = locked_shape(shape, question.form, question.depth, question.rank, question.layers)
    return {BASE: shape, LOCKED: locked}


def attack_plans(question: Question) -> dict[str, Plan]:
    """The plans of an attack on base and locked model.

    Args:
        question: What is asked.

    Returns:
        A plan by side.

    Raises:
        ConfigError: If the model or the lock cannot be.
    """
    return {
        side: Plan(
            model=attacked(question.config, shape, question.entry, question.knobs),
            **inside(question.levers, question.entry, question.knobs),
            **question.setup,
        )
        for side, shape in sides(question).items()
    }


def notes(question: Question) -> list[str]:
    """What of a plan is not exact to the byte for this model, one sentence each."""
    found, parts, config = [], layout(question.config, shapes.model_shape(question.config)), question.config
    if parts.kv_heads == 1 and parts.fused:
        found.append("No fused kernel takes attention with Falcon's single key head: fp32 copies are not counted.")
    window = config.get("sliding_window")
    if window and question.seq_len > window and config.get("use_sliding_window", True):
        found.append(f"Sequences are longer than the sliding window ({window}): its mask is not counted.")
    if question.entry.transform == "drop-blocks":
        found.append("Which blocks drop-blocks takes is not known: those that stay are taken to be the largest.")
    if parts.dropout["attention"] and question.attention == "sdpa":
        found.append("Attention has a dropout: what a fused kernel keeps for it is not counted.")
    return found


def lock_plan(question: Question, harden: bool = True, heal: bool = True) -> LockPlan:
    """The plan of the lock itself.

    Args:
        question: What is asked; its strategy counts for nothing.
        harden: Whether hardening is on.
        heal: Whether the end-to-end stage follows.

    Returns:
        The plan.

    Raises:
        ConfigError: If the model is locked already, or the lock cannot be.
    """
    base = shapes.model_shape(question.config)
    if base.ranks:
        raise ConfigError("--lock: --model is locked already. Name the base model.")
    return LockPlan(
        base=base,
        shape=locked_shape(base, question.form, question.depth, question.rank, question.layers),
        parts=layout(question.config, base),
        **question.setup,
        harden=harden,
        heal=heal,
    )
