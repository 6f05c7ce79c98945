"""The least time that a step can take: FLOPs and bytes over the hardware's rates, each resource alone."""

from __future__ import annotations

from dlrscale.planner.hardware import Hardware
from dlrscale.planner.locking import LockPlan
from dlrscale.planner.own_update import FORWARD_ONLY
from dlrscale.planner.plan import Plan
from dlrscale.planner.states import DTYPE_BYTES


def step_bounds(plan: Plan, hardware: Hardware) -> dict[str, float]:
    """Seconds that an optimizer step takes at least on each resource; a rate that is not known gives no entry.

    - `compute`: all FLOPs of a rank, what is run again included, over the dense 16-bit rate; not for fp32. Of fused
      attention, whose kernel leaves the masked half out, half.
    - `memory`: weights read in forward, backward and, with checkpointing, once more; saved tensors, and those that are
      saved again, written and read; master weights and optimizer states read and written.
    - `links` within a host, `network` between hosts: what a ring or its like must move per device. Gradients are summed
      and weights gathered once, 2 (W - 1) / W e T; at stage 3 weights that do not stay whole are gathered in forward
      and backward, 2 (W - 1) / W e (T + F), and gradients summed once. In backward only layers count that a gradient
      goes through. Between M hosts (M - 1) / M of it crosses,
      shared by the devices of a host, each with its own port.
    - `host`: the larger of both directions. With an offloaded optimizer gradients go to the host, and weights come back
      unless they live there; with offloaded parameters these come in forward and backward; activations that are kept
      there go and come.

    Args:
        plan: The plan of an attack.
        hardware: The device and its surroundings.

    Returns:
        Seconds by resource.
    """
    size, ranks = DTYPE_BYTES[plan.dtype], plan.num_ranks
    kept = plan.activations
    total, trained = plan.model.total * size, plan.model.trained * size
    summed = trained if plan.gradient not in FORWARD_ONLY else 0
    states = sum(plan.states[name].device for name in ("master", "optimizer"))
    back = plan.gone_through * size
    moved = total + (2 if kept.run.checkpointed else 1) * back + 2 * (kept.held_bytes + kept.again_bytes)
    if plan.stage == 3:
        gathered = sum(max(0, weights - size * plan.stays_whole) for weights in (total, back))
        on_links = plan.accumulation * (gathered + summed)
    else:
        on_links = 2 * summed
    to_host, from_host = host_traffic(plan)
    crossing = (plan.nodes - 1) / plan.nodes * on_links / plan.ranks_per_node
    work = {
        "compute": (plan.accumulation * least_flops(plan), hardware.bf16_flops_per_s if size == 2 else None),
        "memory": (plan.accumulation * moved + 2 * states, hardware.bandwidth_bytes_per_s),
        "links": ((ranks - 1) / ranks * on_links if plan.nodes == 1 else 0, hardware.link_bytes_per_s),
        "network": (crossing, hardware.node_link_bytes_per_s),
        "host": (max(to_host, from_host), hardware.host_link_bytes_per_s),
    }
    return {name: amount / rate for name, (amount, rate) in work.items() if rate and amount}


def host_traffic(plan: Plan) -> tuple[float, float]:
    """Bytes that a rank must send to its host in an optimizer step, and that it must get from it.

    Args:
        plan: The plan of an attack.

    Returns:
        Both.
    """
    size, ranks = DTYPE_BYTES[plan.dtype], plan.num_ranks
    activations = plan.accumulation * plan.activations.host_bytes
    to_host = plan.model.trained * size / ranks if plan.offloads("offload_optimizer") else 0
    from_host = to_host
    if plan.offloads("offload_param"):
        from_host = plan.accumulation * (plan.model.total + plan.gone_through) * size / ranks
    return to_host + activations, from_host + activations


def least_flops(plan: Plan) -> float:
    """FLOPs of a micro-batch that cannot be left out: of fused attention the half that no mask hides."""
    flops = plan.activations.flops()
    hidden = plan.activations.fused_flops() / 2
    return sum(flops.values()) - hidden


def lock_bounds(plan: LockPlan, hardware: Hardware) -> dict[str, float]:
    """Seconds that the FLOPs of a distilling and of a healing step take at least, in 16 bits.

    Args:
        plan: The plan of a lock.
        hardware: The device.

    Returns:
        Seconds by stage; empty for fp32 and where the rate is not known.
    """
    rate = hardware.bf16_flops_per_s if DTYPE_BYTES[plan.dtype] == 2 else None
    return {stage: plan.accumulation * sum(flops.values()) / rate for stage, flops in plan.flops().items() if rate}


def hours(plan: Plan, hardware: Hardware, tokens: int) -> dict[str, float]:
    """Device-hours, and where the hardware has a price the cost, of training on some tokens at the least time."""
    bounds = step_bounds(plan, hardware)
    if not bounds:
        return {}
    steps = -(-tokens // plan.tokens_per_step)
    found = {"device_hours": steps * max(bounds.values()) * plan.num_ranks / 3600}
    if hardware.cost_per_hour is not None:
        found["cost"] = found["device_hours"] * hardware.cost_per_hour
    return found
