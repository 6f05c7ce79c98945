"""The validity gates that a run checks by itself: its gradient is plain autograd's, and its strategy was active."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from dlrscale.attacks.levers import Levers
from dlrscale.config import AttackConfig
from dlrscale.data import IGNORE
from dlrscale.engine import Engine
from dlrscale.evaluate import cross_entropy_sum
from dlrscale.modeling.dlr_net import DLRNet

SLICE_TOKENS = 128
SLICE_ELEMENTS = 1 << 28  # gradients kept in host memory for the comparison
COSINE = 0.999
COSINE_INT8 = 0.99  # stochastic rounding to 8 bits adds noise; it has no bias
PLAN_PERCENT = 3.0


def gradient(engine: Engine, levers: Levers, batch: dict[str, torch.Tensor], storage: str) -> dict[str, Any]:
    """Compare the strategy's gradient on the real model with plain autograd's, in the same precision.

    Each rank takes the first sequence of its own micro-batch, at most 128 tokens of it, all of them with a label, and
    goes forward and backward through the engine twice, with the levers and without. A hook on each compared parameter
    takes the whole gradient as autograd hands it on, before DeepSpeed reduces or partitions it, and hands zeros on in
    its place: nothing is left of the check in the first step. Dropout modules are off meanwhile.

    Args:
        engine: The engine, before its first step.
        levers: The levers on its model.
        batch: A micro-batch of this rank: `input_ids`, `attention_mask`, `labels`, (B, T) each.
        storage: The lever `activation_storage`; `int8` has a tolerance of its own.

    Returns:
        `cosine` and `relative_error` (||g - g0|| / ||g0||) over all compared elements, of the rank where they are
        worst; `least` cosine the gate asks for, `holds`, and the slice: `tokens`, `parameters` and `elements`.
    """
    kept = {k: v[:1, :SLICE_TOKENS].to(engine.device) for k, v in batch.items()}
    # Every token, since a prompt without a label may be longer than the slice.
    kept["labels"] = kept["input_ids"].masked_fill(kept["attention_mask"] == 0, IGNORE)
    named = compared(engine)
    with ExitStack() as stack:
        for module in engine.module.modules():
            if isinstance(module, nn.Dropout) and module.training:
                module.eval()
                stack.callback(module.train)
        found = _gradients(engine, kept, named)
        with levers.plain():
            plain = _gradients(engine, kept, named)
    sums = torch.zeros(4, dtype=torch.float64)
    for name, right in plain.items():
        own, right = found.get(name, torch.zeros_like(right)).double(), right.double()
        sums += torch.stack(
            [(own * right).sum(), own.square().sum(), right.square().sum(), (own - right).square().sum()]
        )
    both, own, right, wrong = sums.tolist()
    ranks = engine.gather(
        (both / math.sqrt(own * right) if own and right else 0.0, math.sqrt(wrong / right) if right else 0.0)
    )
    least = COSINE_INT8 if storage == "int8" else COSINE
    cosine = min(value for value, _ in ranks)
    return {
        "cosine": cosine,
        "relative_error": max(value for _, value in ranks),
        "least": least,
        "holds": cosine >= least,
        "tokens": kept["input_ids"].numel(),
        "parameters": len(named),
        "elements": sum(p.numel() for p in plain.values()),
    }


def compared(engine: Engine) -> dict[str, nn.Parameter]:
    """The trained parameters to compare: all, or those of first, middle and last layer and outside of the layers."""
    trained = set(engine.trained_names)
    named = {name: p for name, p in engine.module.named_parameters() if name in trained}
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in named.items()}
    if sum(sizes.values()) <= SLICE_ELEMENTS:
        return named
    index = {name: next((int(word) for word in name.split(".") if word.isdigit()), None) for name in named}
    last = max((i for i in index.values() if i is not None), default=0)
    chosen, elements = {}, 0
    for layer in (0, last, last // 2, None):
        for name in (name for name in named if index[name] == layer):
            if elements + sizes[name] <= SLICE_ELEMENTS:
                chosen[name], elements = named[name], elements + sizes[name]
    return chosen


def _gradients(
    engine: Engine, batch: dict[str, torch.Tensor], named: dict[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Gradients on the host by name, taken from one forward and backward of the engine that leaves zeros behind."""
    found: dict[str, torch.Tensor] = {}
    with _taking(engine, named, found):
        torch.manual_seed(0)
        engine.boundary(False)
        model = engine.ds if engine.updates else engine.module
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        engine.backward(cross_entropy_sum(logits, batch["labels"])[0], 1.0 / batch["input_ids"].numel())
    if not engine.updates:
        engine.module.zero_grad()
        engine.drop_gathered()
    return found


@contextmanager
def _taking(engine: Engine, named: dict[str, nn.Parameter], found: dict[str, torch.Tensor]) -> Iterator[None]:
    trained = set(engine.trained_names)

    def take(name: str, grad: torch.Tensor) -> torch.Tensor:
        if name in named:
            found[name] = found[name] + grad.cpu() if name in found else grad.to("cpu", copy=True)
        return torch.zeros_like(grad)

    named_trained = [(name, p) for name, p in engine.module.named_parameters() if name in trained]
    handles = [p.register_hook(lambda grad, name=name: take(name, grad)) for name, p in named_trained]
    if not engine.updates:  # a method that keeps no gradients has no room for all of them

        def forget(parameter: nn.Parameter) -> None:
            parameter.grad = None

        handles += [p.register_post_accumulate_grad_hook(forget) for _, p in named_trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def engaged(
    config: AttackConfig,
    levers: Levers,
    plan: dict[str, Any],
    notes: dict[str, Any],
    metrics: dict[str, float],
    ran: bool,
) -> dict[str, Any]:
    """Whether the strategy really was active: what it claims against what was there.

    Args:
        config: The attack.
        levers: The levers on its model.
        plan: `planned` and `measured` by name, as a record's plan holds them.
        notes: What the engine says of itself (`Engine.describe`).
        metrics: The run's, with `params/trainable` and `plan/params_trainable`.
        ran: Whether this start has done a step; one that only ended a run has seen nothing of its levers.

    Returns:
        `checks`, each with what was claimed and what was found, and `holds`.
    """
    checks: dict[str, dict[str, Any]] = {}

    def check(name: str, claimed: Any, found: Any, holds: bool) -> None:
        checks[name] = {"claimed": claimed, "found": found, "holds": bool(holds)}

    def close(name: str, claimed: float, found: float) -> None:
        check(name, claimed, found, abs(claimed - found) <= PLAN_PERCENT / 100 * found)

    close("trained_parameters", metrics["plan/params_trainable"], metrics["params/trainable"])
    planned, measured = plan["planned"], plan["measured"]
    for name in ("saved_bytes", "offloaded_activation_bytes"):
        if name in measured:
            close(name, planned[name], measured[name])
    net = any(isinstance(module, DLRNet) for module in levers.model.modules())
    through_nets = config.entry.gradient == "reverse" or config.activation_checkpointing == "nested"
    flows = config.entry.exact and config.entry.trainable not in ("head", "ladder")
    if ran and flows and (config.tiles > 1 or (net and through_nets)):
        check("parts_that_ran_another_way", "> 0", levers.taken, levers.taken > 0)
    if ran and config.activation_storage != "device":
        check("stored_bytes", "> 0", levers.storage.bytes, levers.storage.bytes > 0)
    for lever in ("offload_optimizer", "offload_param"):
        if getattr(config, lever):
            key = f"{lever.replace('offload', 'offloaded')}_bytes"
            check(key, "> 0", notes[key], notes[key] > 0)
    return {"checks": checks, "holds": all(entry["holds"] for entry in checks.values())}


def metrics(gates: dict[str, Any]) -> dict[str, float]:
    """What of the gates MLflow shows beside the other metrics: 1 where a gate holds, and how near the gradient is."""
    found = {f"gates/{name}": float(gate["holds"]) for name, gate in gates.items() if gate.get("holds") is not None}
    near = {name: gates.get("gradient", {}).get(name) for name in ("cosine", "relative_error")}
    return found | {f"gates/gradient_{name}": value for name, value in near.items() if value is not None}
