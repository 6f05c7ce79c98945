"""What DeepSpeed really holds on this rank: each storage once, by its role, device and host apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dlrscale.engine.config import file_levers

if TYPE_CHECKING:
    import torch

    from dlrscale.engine.core import Engine

# Where DeepSpeed's optimizers keep their tensors, by stage: 1 and 2, 3, bf16 with fp32 gradients, 0 with FusedAdam, 0.
MASTERS = (
    "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition",
    "fp32_groups_flat", "fp32_groups",
)  # fmt: skip
GRADIENTS = (
    "averaged_gradients", "all_grad_tensors", "grads_in_partition", "grad_partitions_flat_buffer",
    "fp32_groups_gradients_flat",
)  # fmt: skip
STAGED_ON_HOST = (
    "param_buffer_of_bit16_for_cpu_offload_groups", "temp_grad_buffer_for_cpu_offload", "accumulated_grads_in_cpu",
)  # fmt: skip


def held(engine: Engine) -> dict[str, dict[str, int]]:
    """Bytes of the model states that this rank holds at this moment; it reads and changes nothing.

    The names are those of `planner.states.model_states`. After the last backward of a step and before the step, all but
    `buckets` at stages 0 to 2, which live inside the backward, are to be seen. The optimizer's states come with the
    first step, `persistent` parameters of stage 3 with the second or third.

    A storage counts once, under the first role below that claims it. On an accelerator its device decides between
    device and host; on the CPU, where both are one memory, its role does: offloaded or not.

    Args:
        engine: The engine.

    Returns:
        By name, bytes on the `device` and on the `host`.
    """
    on_cpu = engine.device.type == "cpu"
    levers, wrapper = file_levers(engine.config), engine.optimizer
    offloaded = levers["offload_optimizer"] and engine.stage > 0
    parameters, inner = list(engine.module.parameters()), wrapper
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    states = list(_tensors(inner.state.values())) if engine.updates else []
    masters = list(_tensors(getattr(wrapper, name, None) for name in MASTERS))
    shares = [getattr(p, "ds_tensor", None) for p in parameters]
    at_stage3 = engine.stage == 3
    staged = [getattr(wrapper, "temp_grad_buffer_for_gpu_offload", None)]
    roles: list[tuple[str, bool, Any]] = [
        ("parameters", at_stage3 and levers["offload_param"], shares if at_stage3 else [p.data for p in parameters]),
        ("persistent", False, [p.data for p in parameters]),
        ("buckets", False, [bucket.buffer for bucket in getattr(wrapper, "ipg_buckets", {}).values()]),
        ("master", offloaded, masters),
        ("optimizer", True, [s for s in states if s.dim() == 0]),  # counts of steps
        ("optimizer", offloaded, states),
        ("offload", True, [getattr(wrapper, name, None) for name in STAGED_ON_HOST]),
        ("offload", False, staged),
        ("gradients", offloaded, [m.grad for m in masters]),
        ("gradients", offloaded and at_stage3, [getattr(wrapper, name, None) for name in GRADIENTS]),
        ("gradients", False, [[p.grad, getattr(p, "grad_accum", None)] for p in parameters]),
    ]
    found: dict[str, dict[str, int]] = {name: {"device": 0, "host": 0} for name, _, _ in roles}
    seen = set()
    for name, on_host, tensors in roles:
        for tensor in _tensors(tensors):
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                on_host = on_host if on_cpu else tensor.device.type == "cpu"
                found[name]["host" if on_host else "device"] += storage.nbytes()
    return found


def _tensors(kept: Any) -> Iterator[torch.Tensor]:
    """All tensors in lists and dictionaries of them, however deep."""
    import torch

    if torch.is_tensor(kept):
        yield kept
    elif isinstance(kept, dict):
        yield from _tensors(kept.values())
    elif isinstance(kept, Iterable):
        for part in kept:
            yield from _tensors(part)
