"""The least time that a step can take: FLOPs and bytes over the hardware's rates, each resource alone."""

from __future__ import annotations

from dlrscale.planner.hardware import Hardware
from dlrscale.planner.model import DTYPE_BYTES
from dlrscale.planner.plan import Plan


def step_bounds(plan: Plan, hardware: Hardware) -> dict[str, float]:
    """Seconds that an optimizer step takes at least on each resource; a rate that is not known gives no entry.

    - `compute`: all FLOPs of a rank, what is run again included, over the dense 16-bit rate; not for fp32.
    - `memory`: weights read in forward, backward and, with checkpointing, once more; saved tensors written and read;
      master weights and optimizer states read and written.
    - `links`: what a ring moves per device: gradients once summed and weights once gathered, 2 (W - 1) / W e T; at
      stage 3 weights gathered in forward and backward, 2 (W - 1) / W e (T + F), and gradients summed once.
    - `host`: gradients to the host and weights back, where the optimizer is offloaded; shares of the weights twice
      more, where they are.

    Args:
        plan: The plan of an attack.
        hardware: The device and its surroundings.

    Returns:
        Seconds by resource.
    """
    size, ranks, stage = DTYPE_BYTES[plan.dtype], plan.num_ranks, plan.stage
    flops, kept = plan.activations.flops(), plan.activations
    total, trained = plan.model.total * size, plan.model.trained * size
    passes = 3 if plan.checkpointing == "layer" else 2
    ring = (ranks - 1) / ranks
    states = sum(plan.states[name].device for name in ("master", "optimizer"))
    moved = passes * total + 2 * (kept.held_bytes + (sum(kept.layer_bytes) if plan.checkpointing == "layer" else 0))
    on_links = ring * (2 * total + trained) if stage == 3 else 2 * ring * trained
    on_host = sum(2 * trained / ranks for name in ("offload_optimizer",) if plan.offloads(name))
    on_host += 2 * plan.accumulation * total / ranks if plan.offloads("offload_param") else 0
    link = hardware.node_link_bytes_per_s if plan.nodes > 1 else hardware.link_bytes_per_s
    work = {
        "compute": (plan.accumulation * sum(flops.values()), hardware.bf16_flops_per_s if size == 2 else None),
        "memory": (plan.accumulation * moved + 2 * states, hardware.bandwidth_bytes_per_s),
        "links": (on_links * (plan.accumulation if stage == 3 else 1), link),
        "host": (on_host, hardware.host_link_bytes_per_s),
    }
    return {name: amount / rate for name, (amount, rate) in work.items() if rate and amount}


def hours(plan: Plan, hardware: Hardware, tokens: int) -> dict[str, float]:
    """Device-hours, and where the hardware has a price the cost, of training on some tokens at the least time."""
    steps = -(-tokens // plan.tokens_per_step)
    found = {"device_hours": steps * max(step_bounds(plan, hardware).values(), default=0.0) * plan.num_ranks / 3600}
    if hardware.cost_per_hour is not None:
        found["cost"] = found["device_hours"] * hardware.cost_per_hour
    return found
