"""The plan of a job from its configuration: before it starts, and beside what it measured when it has ended."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from dlrscale import engine, launcher, shapes
from dlrscale.config import AttackConfig, LockConfig, RunConfig
from dlrscale.errors import PlanError
from dlrscale.planner import hardware as devices
from dlrscale.planner.activations import Activations
from dlrscale.planner.forward import Pass
from dlrscale.planner.hardware import Hardware
from dlrscale.planner.locking import LockPlan
from dlrscale.planner.model import attacked, locked_shape
from dlrscale.planner.needs import gib, largest_micro_batch
from dlrscale.planner.plan import Plan, inside
from dlrscale.shapes.layout import layout

ATTENTION = "sdpa"  # what transformers takes where nothing else is asked for
# Exact, and counted in the engine before the second update; `persistent` parameters are all there only after it.
STATES = ("parameters", "gradients", "master", "optimizer", "offload")


def forecast(config: RunConfig, ds_config: Mapping[str, Any]) -> Plan | LockPlan | None:
    """The plan of a lock or an attack.

    Args:
        config: The resolved configuration.
        ds_config: The merged DeepSpeed configuration.

    Returns:
        The plan; None for a job of another kind.
    """
    if not isinstance(config, (AttackConfig, LockConfig)):
        return None
    values = shapes.read_config(config.model)
    shape = shapes.model_shape(values)
    nodes, ranks_per_node = hosts(config)
    common = {
        "ds_config": ds_config,
        "dtype": config.dtype,
        "micro_batch": config.micro_batch,
        "seq_len": config.seq_len,
        "num_ranks": config.num_ranks,
        "nodes": nodes,
        "ranks_per_node": ranks_per_node,
        "attention": ATTENTION,
        "device": engine.device_type(),
    }
    if isinstance(config, LockConfig):
        return LockPlan(
            base=shape,
            shape=locked_shape(shape, config.form, config.depth, config.rank, config.layers),
            parts=layout(values, shape),
            harden=config.harden,
            heal=config.heal_steps > 0,
            **common,
        )
    model = attacked(values, shape, config.entry, config.knobs)
    return Plan(model=model, **inside(config, config.entry, config.knobs), **common)


def flops_per_token(config: AttackConfig, ds_config: Mapping[str, Any]) -> float:
    """Planned FLOPs of a processed token: forward, backward and what is run again, of a full micro-batch."""
    flops = forecast(config, ds_config).activations.flops()
    return sum(flops.values()) / (config.micro_batch * config.seq_len)


def hosts(config: RunConfig) -> tuple[int, int]:
    """The hosts of a job and the ranks of the fullest: of its hostfile, or as DeepSpeed's launcher has started it."""
    if config.hostfile:
        slots = launcher.slots_by_host(config.hostfile)
        return len(slots), max(slots.values())
    here = int(os.environ.get("LOCAL_SIZE") or config.num_ranks) if "RANK" in os.environ else config.num_ranks
    here = min(here, config.num_ranks)
    return -(-config.num_ranks // here), here


def hardware_of(config: RunConfig) -> Hardware | None:
    """The hardware that a job must fit: the one named, else the table's entry for the accelerator in use."""
    if config.hardware:
        return devices.find(config.hardware, config.hardware_file)
    if engine.device_type() == "cpu":
        return None
    import torch

    return devices.of_device(torch.cuda.get_device_name())


def refuse(config: RunConfig, plan: Plan | LockPlan | None) -> None:
    """Stop a job whose plan says that it cannot fit.

    Args:
        config: The resolved configuration.
        plan: Its plan.

    Raises:
        PlanError: With what does not fit, and which lever would make it fit.
    """
    hardware = hardware_of(config)
    if plan is None or hardware is None or config.force:
        return
    lacking = plan.needs.lacking(hardware)
    if lacking:
        found = fitting_levers(config, plan, hardware)
        none = "Neither a smaller --micro-batch nor checkpointing, ZeRO or offload makes it fit: take more devices."
        mend = f"It would fit with {', or with '.join(found)}." if found else none
        raise PlanError(
            f"The plan says that {config.name} cannot fit: {'; '.join(lacking)}. {mend} --force runs anyway."
        )


def fitting_levers(config: RunConfig, plan: Plan | LockPlan, hardware: Hardware) -> list[str]:
    """The options that would make a job fit, at most three: each by itself, else two together.

    Args:
        config: The resolved configuration.
        plan: Its plan.
        hardware: The device that it does not fit.

    Returns:
        Options as they are typed; none that contradicts the strategy's idea or the DeepSpeed file.
    """
    file = engine.read_file(config.deepspeed_config) if config.deepspeed_config else None
    free_batch = file is None or not {"train_batch_size", "train_micro_batch_size_per_gpu"} & set(file)
    changes: list[tuple[str, dict[str, Any]]] = []
    held = fixed(config)
    if isinstance(plan, Plan) and plan.checkpointing == "none" and "activation_checkpointing" not in held:
        changes.append(("--activation-checkpointing layer", {"checkpointing": "layer"}))
    if file is None:
        for words, levers in (
            ("--zero 3", (3, config.offload_optimizer, config.offload_param)),
            ("--zero 2 --offload-optimizer", (2, True, False)),
            ("--zero 3 --offload-optimizer --offload-param", (3, True, True)),
        ):
            changes.append((words, {"ds_config": dict(plan.ds_config) | engine.lever_config(*levers)}))
    pairs = [
        (f"{a} {b}", left | right) for a, left in changes[:1] for b, right in changes[1:] if "checkpointing" in left
    ]

    def largest(change: dict[str, Any]) -> int:
        changed = dataclasses.replace(plan, **change)
        return largest_micro_batch(lambda batch: changed.with_micro_batch(batch).needs, hardware)

    found = [f"--micro-batch {largest({})}"] if free_batch and largest({}) else []
    found += [
        words for words, change in changes + pairs if not dataclasses.replace(plan, **change).needs.lacking(hardware)
    ]
    if not found and free_batch:
        found = [f"{words} --micro-batch {size}" for words, change in changes + pairs if (size := largest(change))]
    return found[:3]


def fixed(config: RunConfig) -> tuple[str, ...]:
    """The levers that are a strategy's own idea."""
    return config.entry.fixed if isinstance(config, AttackConfig) else ()


def summary(plan: Plan | LockPlan, hardware: Hardware | None) -> dict[str, Any]:
    """A plan as a record holds it: bytes by phase and term, peaks, and whether it fits."""
    needs = plan.needs
    found = {
        "phases": {phase: dict(terms) for phase, terms in needs.phases.items()},
        "peak_bytes": needs.peak_bytes,
        "peak_phase": needs.peak_phase,
        "host_bytes": needs.host_terms,
        "host_peak_bytes": needs.host_peak_bytes,
        "hardware": hardware.name if hardware else None,
        "fits": not needs.lacking(hardware) if hardware else None,
        "attention": plan.attention,
    }
    if isinstance(plan, Plan):
        found["flops_per_micro_batch"] = plan.activations.flops()
    return found


def said(plan: Plan | LockPlan, hardware: Hardware | None) -> str:
    """A plan's peak in a sentence, for a dry run."""
    needs = plan.needs
    fits = ""
    if hardware:
        fits = f"; {'does not fit' if needs.lacking(hardware) else 'fits'} {hardware.name}"
    return (
        f"predicted peak of a device: {gib(needs.peak_bytes)} ({needs.peak_phase}), of a host: "
        f"{gib(needs.host_peak_bytes)}{fits}"
    )


def measured(
    plan: Plan,
    counted: Mapping[str, Any],
    held: Mapping[str, Mapping[str, int]] | None,
    peaks: Mapping[str, float],
) -> dict[str, Any]:
    """What an attack measured beside its plan, and the plan's errors in per cent.

    Saved bytes are planned once more for the micro-batch that was counted, with its own length, padding and labels.

    Args:
        plan: The attack's plan.
        counted: `batch`, `length`, `labels`, `masked` and `saved_bytes` of the counted micro-batch; `saved_peak_bytes`,
            `offloaded_activation_bytes` and `flops` where they were taken.
        held: What the engine held before its first update (`engine.held`).
        peaks: The most bytes on a device, by who counted them: `accelerator_peak_bytes`, `live_peak_bytes`.

    Returns:
        `measured`, `planned` and `error_percent`, by the same names.
    """
    pairs: dict[str, tuple[float, float]] = {}
    if counted:
        run: Pass = dataclasses.replace(
            plan.activations.run,
            batch=counted["batch"],
            length=counted["length"],
            label_tokens=counted["labels"],
            masked=counted["masked"],
        )
        kept = Activations(run)
        pairs["saved_bytes"] = (kept.held_bytes, counted["saved_bytes"])
        if "saved_peak_bytes" in counted:
            pairs["saved_peak_bytes"] = (kept.peak_bytes, counted["saved_peak_bytes"])
        if "offloaded_activation_bytes" in counted:
            pairs["offloaded_activation_bytes"] = (kept.host_bytes, counted["offloaded_activation_bytes"])
        planned = kept.flops()
        pairs |= {f"flops_{name}": (planned[name], seen) for name, seen in counted.get("flops", {}).items()}
    for name in STATES if held else ():
        term = plan.states[name]
        pairs[f"{name}_bytes"] = (term.device + term.host, sum(held[name].values()))
    offloaded = sum(size for name, size in plan.needs.host_terms.items() if name != "processes") // plan.ranks_per_node
    beside = {"live_peak_bytes": offloaded}  # live tensors are counted wherever they are
    pairs |= {name: (plan.needs.peak_bytes + beside.get(name, 0), peak) for name, peak in peaks.items()}
    pairs = {name: pair for name, pair in pairs.items() if any(pair)}
    return {
        "planned": {name: planned for name, (planned, _) in pairs.items()},
        "measured": {name: seen for name, (_, seen) in pairs.items()},
        "error_percent": {
            name: 100 * (planned / seen - 1) if seen else None for name, (planned, seen) in pairs.items()
        },
    }
