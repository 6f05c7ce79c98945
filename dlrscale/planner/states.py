"""Model states as DeepSpeed 0.19.8 holds them: bytes of each term on the fullest rank, device and host apart.

Derived from `deepspeed/runtime` (files named at each function). The letters:

- T elements in n tensors are trained, F are frozen; W ranks; e bytes an element of the model's precision; g bytes of
  a gradient (`data_types.grad_accum_dtype`, else e); m bytes of a master weight, 4 unless the file asks for 16-bit
  masters; k moments of the optimizer (`optimizer_of`).
- Stages 1 and 2: P = T rounded up to a multiple of 2W, cut into W equal parts of p = P / W. A rank keeps the *whole*
  gradient of every tensor that its part touches: G elements.
- Stage 3: each tensor is cut on its own, q = sum of ceil(numel / W), of the trained (q_T) and of the frozen (q_F).

All parameters are in one group of the optimizer, as dlrscale's Engine passes them. What NVMe would take counts as host
memory. Not counted: `zero_hpz_partition_size`, `parameter_alignment` (at most 15 bytes a tensor), single numbers such
as a loss scale. Host memory is what DeepSpeed asks for: where CUDA pins it, torch's allocator of pinned memory may
round each block up to a power of two.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from dlrscale.planner.optimizers import halved, optimizer_of

FORWARD, BACKWARD, STEP = "forward", "backward", "step"
ALWAYS = (FORWARD, BACKWARD, STEP)
UNTIL_STEP = (BACKWARD, STEP)
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
ALLREDUCE = 500_000_000  # engine.py, MEMORY_OPT_ALLREDUCE_SIZE: elements of a bucket at stage 0


@dataclass(frozen=True, kw_only=True)
class Weight:
    """Equal parameter tensors in a row, in the order of `model.parameters()`; a tied tensor stands once.

    Attributes:
        numel: Elements of one tensor.
        trained: Whether the optimizer has it.
        count: How many such tensors stand in a row.
    """

    numel: int
    trained: bool
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Term:
    """Bytes of one term on one rank.

    Attributes:
        device: Bytes in the accelerator's memory.
        host: Bytes in host memory.
        during: The phases of a step that hold it: `forward`, `backward`, `step`.
    """

    device: int = 0
    host: int = 0
    during: tuple[str, ...] = ALWAYS


class _Run:
    """A DeepSpeed configuration and the sums over a model's weights that the formulas need."""

    def __init__(self, weights: Sequence[Weight], ds_config: Mapping[str, Any], world_size: int, dtype: str):
        self.zero = ds_config.get("zero_optimization") or {}
        self.stage, self.ranks = int(self.zero.get("stage", 0)), world_size
        self.e = DTYPE_BYTES[dtype]
        kept = (ds_config.get("data_types") or {}).get("grad_accum_dtype")
        self.g = self.e if kept is None else 4 if "32" in str(kept) else 2
        self.comm = ds_config.get("communication_data_type")
        self.comm = self.e if self.comm is None else 4 if "32" in str(self.comm) else 2
        self.m = 2 if halved(ds_config) else 4
        self.accumulation = int(ds_config.get("gradient_accumulation_steps", 1))
        self.offload_optimizer = self.stage > 0 and self._offloads("offload_optimizer")
        self.offload_param = self.stage == 3 and self._offloads("offload_param")
        self.optimizer = optimizer_of(ds_config, self.offload_optimizer)
        self.bf16_optimizer = dtype == "bf16" and self.stage == 1 and self.g == 4 and not self.offload_optimizer
        self.trained = [w for w in weights if w.trained and w.numel and w.count]
        self.frozen = [w for w in weights if not w.trained]
        self.weights = weights
        if self.stage in (1, 2) and self.zero.get("round_robin_gradients"):
            single = [Weight(numel=w.numel, trained=True) for w in self.trained for _ in range(w.count)]
            self.trained = [w for rank in range(world_size) for w in single[rank::world_size]]
        self.T = sum(w.numel * w.count for w in self.trained)
        self.F = sum(w.numel * w.count for w in self.frozen)
        self.tensors = sum(w.count for w in self.trained)
        self.largest = max((w.numel for w in self.trained), default=0)
        self.factored = self.T

    def _offloads(self, key: str) -> bool:
        return (self.zero.get(key) or {}).get("device", "none") != "none"

    def setting(self, key: str, default: int) -> int:
        """A number of the section, which may bear the prefix `stage3_`."""
        return int(self.zero.get(f"stage3_{key}", self.zero.get(key, default)))

    @property
    def between(self) -> tuple[str, ...]:
        """The phases that hold what is added up over micro-batches and goes with the step."""
        return ALWAYS if self.accumulation > 1 else UNTIL_STEP

    def states(self, elements: int, tensors: int, on_device: int = 0) -> Term:
        """The optimizer's states for some masters, of which `on_device` elements stay on the device in an offload."""
        each, counts = self.optimizer.moments * self.optimizer.moment_bytes, 4 * tensors * self.optimizer.counts
        if not self.offload_optimizer:
            on_device = elements
        return Term(device=each * on_device, host=each * (elements - on_device) + counts)


def zero3_linear(ds_config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's own linear map takes the place of torch's (zero/partition_parameters.py, `Init`)."""
    section = ds_config.get("zero_optimization") or {}
    return section.get("stage") == 3 and bool(section.get("memory_efficient_linear", True))


def model_states(
    weights: Sequence[Weight],
    ds_config: Mapping[str, Any],
    world_size: int,
    dtype: str,
    factored: int | None = None,
) -> dict[str, Term]:
    """Bytes of each model state on the rank that holds most, in the steady state after the first steps.

    The terms, by name:

    - `parameters`: what the model trains and what it does not, whole or this rank's share with its padding.
    - `persistent`: at stage 3, the whole copies of small parameters that stay between steps.
    - `gradients`: what is held after the last backward of a step.
    - `master`, `optimizer`: the weights that are updated and the optimizer's states.
    - `offload`: buffers that stand for the traffic between device and host.
    - `buckets`: buffers in which gradients are gathered for communication.
    - `backward`: what gradients need on top while the backward runs; bounds, stated at each stage.
    - `gathered`: at stage 3, whole weights beside the shares while layers run; a bound (`_gathered`).
    - `step`: copies of gradients and workspace while the optimizer steps; a bound.

    The first five, `offload` and `buckets` are exact; tests hold them to the engine's own tensors on two ranks.

    Args:
        weights: The model's parameters in their order.
        ds_config: A merged configuration (`engine.merge`), without "auto".
        world_size: The number of ranks.
        dtype: `fp32`, `bf16` or `fp16`.
        factored: What is trained, with the m + n of a matrix in the place of its m n elements, for Adafactor at stage
            0; None: as if all were vectors.

    Returns:
        The terms by name.
    """
    run = _Run(weights, ds_config, world_size, dtype)
    run.factored = factored if run.optimizer.factored and factored is not None else run.T
    if run.stage == 0:
        return _stage0(run)
    if run.stage == 3:
        return _stage3(run)
    return _bf16_stage1(run) if run.bf16_optimizer else _stage12(run)


def _stage0(run: _Run) -> dict[str, Term]:
    """Everything whole on every rank (fp16/unfused_optimizer.py, fp16/fused_optimizer.py; engine.py).

    parameters e (T + F); gradients e T; optimizer 4 k T. In 16 bits fp32 masters, 4 T, and in a step fp32 gradients,
    4 T, and torch's Adagrad keeps the states that it made before there were masters. `buckets`: `allreduce_no_retain`
    flattens tensors until they pass 5e8 elements, so at most that and one tensor.
    """
    half = run.e < 4
    states, stale = run.states(run.factored, run.tensors), half and run.optimizer.early
    bucket = min(run.T, ALLREDUCE + run.largest) if run.tensors > 1 else 0
    workspace = 4 * run.T * run.optimizer.foreach
    return {
        "parameters": Term(device=run.e * (run.T + run.F)),
        "persistent": Term(),
        "gradients": Term(device=run.e * run.T, during=run.between),
        "master": Term(device=4 * run.T * half),
        "optimizer": Term(device=states.device + run.e * run.T * stale, host=states.host * (1 + stale)),
        "offload": Term(),
        "buckets": Term(device=run.e * bucket, during=(BACKWARD,)),
        "backward": Term(during=(BACKWARD,)),
        "gathered": Term(during=(FORWARD, BACKWARD)),
        "step": Term(device=4 * run.T * half + workspace, during=(STEP,)),
    }


def _touched(run: _Run, part: int) -> tuple[int, int]:
    """Stages 1 and 2: elements of the tensors that the fullest rank's part touches, and of zeros beside them.

    `get_partition_info`, `copy_grads_in_partition` and `_get_flat_partition_unpadded` of zero/stage_1_and_2.py: the
    gradients in a part are kept as whole tensors; a part that reaches beyond the last tensor gets zeros for the rest.
    """
    starts = [0, *accumulate(w.numel * w.count for w in run.trained)]

    def tensor_at(element: int) -> tuple[int, int]:
        i = bisect_right(starts, element) - 1
        size = run.trained[i].numel
        first = starts[i] + (element - starts[i]) // size * size
        return first, first + size

    best = (0, 0)
    for rank in range(run.ranks):
        low, end = rank * part, (rank + 1) * part
        high = min(end, run.T)
        found = (tensor_at(high - 1)[1] - tensor_at(low)[0], end - high) if low < high else (0, part)
        best = max(best, found, key=sum)
    return best


def _first_fill(run: _Run, bucket: int) -> int:
    """Elements that the first bucket of gradients takes, in the order of the parameters (stage 1)."""
    filled = 0
    for w in run.trained:
        fits = min(w.count, max(0, bucket - filled) // w.numel)
        filled += fits * w.numel
        if fits < w.count:
            break
    return filled


def _backward1(run: _Run, bucket: int, gradients: int, norm: int) -> int:
    """Stage 1: bytes on top of the gradients that stay, while the last backward of a step reduces.

    All gradients, g T, are there when it begins; the first bucket's have moved into it when those of the part are set
    aside, e G. Where one bucket takes all, it is reduced as a flat copy before that. Offloaded, the largest tensor is
    copied once more where it is larger than a bucket, and the norm is taken in fp64.
    """
    scattered = run.ranks > 1 and run.zero.get("reduce_scatter", True)
    if bucket >= run.T and not run.offload_optimizer:
        return max(0, max(run.g * run.T, run.e * run.T * scattered) - gradients)
    oversized = run.e * run.largest * (run.largest > bucket)
    moved = min(run.g * _first_fill(run, bucket), gradients)
    return run.g * run.T - moved + oversized + norm * run.offload_optimizer


def _backward2(run: _Run, bucket: int, gradients: int, norm: int, whole: int) -> int:
    """Stage 2: bytes on top of the gradients that stay, while a backward reduces as it goes.

    The gradient that has just been made, and a flat copy of a bucket that spans the parts of several ranks; with one
    bucket for all, that copy is gone before the part's gradients are set aside. From the second micro-batch on the
    part's new gradients stand beside the old. Offloaded, a tensor larger than a bucket is copied once more, with
    accumulation such tensors of the part stay, and the norm is taken in fp64. Where sums are fp32 beside 16-bit
    weights, each slice is made fp32 before it is added.
    """
    compact, made = run.g == 4 and run.e < 4, run.e * run.largest
    made_fp32 = 4 * run.largest * compact
    scattered = run.ranks > 1 and run.zero.get("reduce_scatter", True)
    flat = run.e * min(run.T, max(bucket, run.largest)) * scattered
    if run.offload_optimizer:
        oversized = made + run.e * whole * (run.accumulation > 1) if run.largest > bucket else 0
        return made + max(flat + made_fp32, norm) + oversized
    new = gradients if run.accumulation > 1 else 0
    if compact:
        return made + flat + made_fp32 * (2 if run.largest > bucket else 1)
    if bucket >= run.T:
        return max(made, new, flat if new else flat - gradients)
    return made + flat + new


def _stage12(run: _Run) -> dict[str, Term]:
    """States cut over ranks, and at stage 2 gradients too (zero/stage_1_and_2.py).

    - parameters e (P + F): the trained ones lie in one flat buffer with its padding (`flatten_dense_tensors_aligned`).
    - master m p, also in fp32, where it is a clone all the same; optimizer 4 k p.
    - gradients e (G + zeros) until the step. Where they are added up in fp32 beside 16-bit weights, one part in fp32,
      4 p (`_build_compact_grad_partition_buffer`), is all.
    - buckets e `reduce_bucket_size`, twice with `overlap_comm` (`setup_buckets`), until the backward that reduces is
      over: each at stage 2, the last of a step at stage 1 (there, with fp32 sums, gradients of other ranks' parts lie
      in it until the next forward; such a tensor larger than a bucket, which stays too, is not counted). Without
      `contiguous_gradients`, a flat copy of as many elements, or of the largest gradient.
    - Offloaded (`initialize_optimizer_states`): master, optimizer and fp32 gradients, m p, in host memory; on the
      device no gradient remains. `offload`: a part in the model's precision, e p, in host memory, and the largest
      tensor once there and once on the device; at stage 2 with accumulation, in host memory, the whole gradients that
      a part touches, e G (`async_accumulate_grad_in_cpu_via_gpu`).
    - step: the norm in fp64 of one gradient at a time; then the part flattened (e p) and in fp32 (4 p), while the old
      gradients are still there; then 4 p of workspace with torch's optimizers on CUDA, which work on lists. On the host
      they go tensor by tensor and take 8 p.
    """
    total = run.T + -run.T % (2 * run.ranks)
    part, offload, bucket = total // run.ranks, run.offload_optimizer, run.setting("reduce_bucket_size", 500_000_000)
    whole, zeros = _touched(run, part)
    compact = run.g == 4 and run.e < 4
    gradients = 4 * part if compact else 0 if offload else run.e * (whole + zeros)
    norm, workspace = 8 * min(run.largest, part), 4 * part * run.optimizer.foreach
    flattened, updated = run.e * part + 4 * part * (run.e < 4), 4 * part + workspace - gradients
    step = max(norm, workspace) if compact else max(norm, flattened, updated)
    if run.zero.get("contiguous_gradients", True) or offload:
        in_bucket = run.g if run.stage == 1 else run.e
        buckets = in_bucket * bucket * (2 if run.zero.get("overlap_comm") else 1)
    else:
        buckets = run.e * min(run.T, max(bucket, run.largest))
    if run.stage == 1:
        backward = _backward1(run, bucket, gradients, norm)
    else:
        backward = _backward2(run, bucket, gradients, norm, whole)
    until_reduced = (FORWARD, BACKWARD) if run.stage == 1 and run.accumulation > 1 else (BACKWARD,)
    stay = compact and run.stage == 1
    terms = {
        "parameters": Term(device=run.e * (total + run.F)),
        "persistent": Term(),
        "gradients": Term(device=gradients, during=run.between),
        "master": Term(device=run.m * part),
        "optimizer": run.states(part, 1),
        "offload": Term(),
        "buckets": Term(device=buckets, during=run.between if stay else until_reduced),
        "backward": Term(device=backward, during=until_reduced),
        "gathered": Term(during=(FORWARD, BACKWARD)),
        "step": Term(device=step, during=(STEP,)),
    }
    if offload:
        added = whole if run.stage == 2 and run.accumulation > 1 and not compact and run.m == 4 else 0
        terms |= {
            "gradients": Term(device=gradients, host=run.m * part),
            "master": Term(host=run.m * part),
            "offload": Term(device=run.e * run.largest, host=run.e * (part + run.largest + added)),
            "step": Term(host=2 * workspace, during=(STEP,)),
        }
    return terms


def _bf16_stage1(run: _Run) -> dict[str, Term]:
    """Stage 1 in bf16 with gradients added up in fp32 (bf16_optimizer.py).

    As `_stage12`, but fp32 gradients of all that is trained, 4 P, stand on every rank for good, and those in bf16, e T,
    until the next backward. They are reduced in place, or as a copy of another `communication_data_type`, bf16 unless
    the file names one.
    """
    total = run.T + -run.T % (2 * run.ranks)
    part = total // run.ranks
    return {
        "parameters": Term(device=run.e * (total + run.F)),
        "persistent": Term(),
        "gradients": Term(device=run.g * total + run.e * run.T),
        "master": Term(device=4 * part),
        "optimizer": run.states(part, 1),
        "offload": Term(),
        "buckets": Term(during=(BACKWARD,)),
        "backward": Term(device=run.comm * total * (run.comm != run.g), during=(BACKWARD,)),
        "gathered": Term(during=(FORWARD, BACKWARD)),
        "step": Term(device=4 * part * run.optimizer.foreach, during=(STEP,)),
    }


def _sub_groups(run: _Run) -> list[int]:
    """Stage 3: elements of this rank's share in each group that is updated at once (`_create_fp16_sub_groups`)."""
    limit = run.setting("sub_group_size", 1_000_000_000)
    total = sum(w.count * -(-w.numel // run.ranks) for w in run.trained)
    if limit >= total:
        return [total]
    groups, filled = [], 0
    for w in run.trained:
        share, left = -(-w.numel // run.ranks), w.count
        while left:
            taken = min(left, max(1, -(-(limit - filled) // share)))
            filled, left = filled + taken * share, left - taken
            if filled >= limit:
                groups.append(filled)
                filled = 0
    return [*groups, filled] if filled else groups


def _stage3(run: _Run) -> dict[str, Term]:
    """Everything cut over ranks, tensor by tensor (zero/stage3.py, zero/partition_parameters.py).

    - parameters e (q_T + q_F); offloaded, in host memory.
    - persistent: tensors of at most `stage3_param_persistence_threshold` elements stay whole after a step
      (`mark_persistent_parameters`, `_post_step`), each padded to a multiple of W, beside their shares. On one rank
      the share is the whole, and nothing is added.
    - gradients g q_T, for good (`grad_partitions_flat_buffer`); master m q_T, in fp32 too: `_create_fp32_partitions`
      would share the weights', but compares a device with a name, which never are equal; optimizer 4 k q_T.
    - Offloaded: these three and fp32 gradients, m q_T, in host memory. With `ratio` below 1, the first groups of
      `sub_group_size` keep master, fp32 gradient and states on the device.
    - buckets `reduce_bucket_size`, for good.
    - backward: a bucket rearranged for `reduce_scatter_coalesced`, one gradient that has just been made, and, when
      offloaded, the norm in fp64 of at most 2.5e8 elements. With `overlap_comm` CUDA may hold two buckets more.
    - step: group by group, as at stage 2; the old gradients stay.
    """
    shares = dict.fromkeys((True, False), 0)
    for w in run.weights:
        shares[w.trained] += w.count * -(-w.numel // run.ranks)
    held, groups = shares[True], _sub_groups(run)
    persistent, gathered = _gathered(run)
    offload, share = run.offload_optimizer, -(-run.largest // run.ranks)
    ratio = float((run.zero.get("offload_optimizer") or {}).get("ratio", 1.0)) if offload else 0.0
    first = sum(groups[: int((1 - ratio) * len(groups))])  # elements whose states stay on the device
    bucket = run.setting("reduce_bucket_size", 500_000_000)
    contiguous = run.zero.get("contiguous_gradients", True)
    backward = run.comm * min(held * run.ranks, max(bucket, share * run.ranks)) + run.e * run.largest
    group, workspace = max(groups), 4 * max(groups) * run.optimizer.foreach
    copies = 4 * group + max(workspace, run.g * group * (run.g < 4))
    parameters = run.e * (held + shares[False])
    return {
        "parameters": Term(host=parameters) if run.offload_param else Term(device=parameters),
        "persistent": Term(device=persistent),
        "gradients": Term(device=run.m * first, host=run.g * held + run.m * (held - first))
        if offload
        else Term(device=run.g * held),
        "master": Term(device=run.m * first, host=run.m * (held - first)),
        "optimizer": run.states(held, len(groups), first),
        "offload": Term(),
        "buckets": Term(device=run.comm * bucket if contiguous else 0),
        "backward": Term(device=backward + 8 * min(share, 250_000_000) * offload, during=(BACKWARD,)),
        "gathered": Term(device=gathered, during=(FORWARD, BACKWARD)),
        "step": Term(host=2 * workspace, during=(STEP,))
        if offload
        else Term(device=max(8 * share, copies), during=(STEP,)),
    }


def _gathered(run: _Run) -> tuple[int, int]:
    """Stage 3: bytes of whole parameters that stay between steps, and a bound of those that come and go.

    `fetch_sub_module` of zero/partitioned_param_coordinator.py gathers the module that runs (a tensor, or one with a
    much smaller one after it, as a bias is) and, if there is a prefetch bucket, prefetches at every module until
    `stage3_max_live_parameters` are whole, and the tensor that passes it. `__params_to_release` keeps what the next
    `stage3_max_reuse_distance` elements of the trace use again: where the forward turns, the last half of that
    distance. Beside them stands the flat buffer of one gathering, a prefetch bucket or a module (`_all_gather_dtype`),
    and, of offloaded parameters, this rank's share of it. On one rank the share is the whole.
    """
    if run.ranks == 1 and not run.offload_param:
        return 0, 0
    small = run.setting("param_persistence_threshold", 100_000)
    left = run.setting("model_persistence_threshold", 2**63)
    persistent = others = module = before = 0
    for w in run.weights:
        padded = w.numel + -w.numel % run.ranks
        kept = min(w.count, left // w.numel) if 0 < w.numel <= small else 0
        left -= kept * w.numel
        persistent += kept * padded
        if kept < w.count:
            others += (w.count - kept) * padded
            module = max(module, padded, before + padded if 16 * padded <= before else 0)
            before = padded
    prefetch, reused = run.setting("prefetch_bucket_size", 50_000_000), run.setting("max_reuse_distance", 1_000_000_000)
    limit = run.setting("max_live_parameters", 1_000_000_000) if prefetch else 0
    live = min(others, max(limit, reused // 2) + module)
    flat = min(others, prefetch + module)
    brought = -(-flat // run.ranks) if run.offload_param else 0
    return run.e * persistent, run.e * (live + flat + brought)
