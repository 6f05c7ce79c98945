"""What the optimizers of a DeepSpeed configuration keep per weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dlrscale.errors import ConfigError

# Of torch.optim: moments per element; all but SGD keep a step count per tensor, 4 bytes in host memory. Adafactor's one
# is of a vector; of a whole matrix it keeps the means of rows and columns (`factored`).
MOMENTS = {
    "adadelta": 2, "adafactor": 1, "adagrad": 1, "adam": 2, "adamax": 2, "adamw": 2, "asgd": 1, "nadam": 2, "radam": 2,
    "rmsprop": 1, "rprop": 2, "sgd": 0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What an optimizer of DeepSpeed's keeps per master weight.

    Attributes:
        moments: Tensors of the master's size.
        moment_bytes: Bytes an element of a moment.
        counts: Whether each tensor has a step count, a 4-byte tensor in host memory.
        foreach: Whether a step makes a copy of all that it updates on a device (torch's, on CUDA alone).
        early: Whether it makes its states for the model's own weights, before there are masters (torch's Adagrad).
        factored: Whether a whole matrix of m x n has m + n moments (torch's Adafactor).
    """

    moments: int
    moment_bytes: int = 4
    counts: bool = False
    foreach: bool = False
    early: bool = False
    factored: bool = False


def halved(ds_config: Mapping[str, Any]) -> bool:
    """Whether the file asks for masters and gradients of 16 bits, which DeepSpeed's CPU Adam alone can use."""
    return any((ds_config.get(k) or {}).get(f"{k}_master_weights_and_grads") for k in ("bf16", "fp16"))


def optimizer_of(ds_config: Mapping[str, Any], offload: bool) -> Optimizer:
    """What the optimizer of a merged configuration keeps (engine.py, `_configure_basic_optimizer`; ops/).

    DeepSpeed's own classes count steps in Python numbers. Its CPU Lion allocates a second moment that it never uses.
    Adafactor factors the second moment of matrices, which it sees at stage 0 alone: stages 1 to 3 give it the flat
    share of a rank, for which it keeps all of it, and whose root mean square takes the place of each tensor's in its
    step. So there it saves Adam's first moment only, and its steps depend on the stage and the number of ranks.

    Args:
        ds_config: The configuration.
        offload: Whether the states are offloaded.

    Returns:
        What it keeps.

    Raises:
        ConfigError: If the type is none whose memory is known.
    """
    section = ds_config.get("optimizer") or {"type": "AdamW", "params": {"torch_adam": True}}
    name, params = str(section.get("type")).lower(), section.get("params") or {}
    half = ds_config.get("bf16") or {}
    asked = half.get("bf16_optimizer_states") or params.get("fp32_optimizer_states") is False
    own = Optimizer(
        moments={"lion": 2 if offload else 1, "adagrad": 1}.get(name, 2),
        moment_bytes=2 if asked and halved(ds_config) else 4,
    )
    if name in ("adam", "adamw") and not params.get("torch_adam") or name in ("lion", "lamb"):
        return own
    if name == "adagrad" and offload:
        return own
    if name not in MOMENTS:
        raise ConfigError(
            f"optimizer.type {section.get('type')}: the memory of its states is not known. Take AdamW, or one of "
            f"{', '.join(sorted(MOMENTS))}, lamb, lion."
        )
    more = bool(params.get("amsgrad")) + bool(params.get("momentum")) + bool(params.get("centered"))
    return Optimizer(
        moments=MOMENTS[name] + more,
        counts=name != "sgd",
        foreach=True,
        early=name == "adagrad",
        factored=name == "adafactor",
    )
