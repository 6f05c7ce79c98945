"""FLOPs of a step by torch's counter: forward and backward apart, and what checkpointing computes again apart.

Two FLOPs to a multiplication with its addition, matrix products alone. Attention counts as the full square of
positions: the counter does not know a causal mask, and eager attention computes all of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dlrscale.measure import recompute
from dlrscale.planner import hardware

ATTENTION_COUNTED = "full square, the masked half too"


def _attention(query: list[int], key: list[int], value: list[int], *args: object, **kwargs: object) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: list[int], query: list[int], key: list[int], value: list[int], *args: object, **kwargs: object
) -> int:
    return 2 * sdpa_flop_count(query, key, value)


_aten = torch.ops.aten
# torch does not count the CPU's kernel at all, and of the accelerators' it counts as backward what they compute again.
ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}


class Flops:
    """FLOPs of this rank, summed over all micro-batches that were counted.

    `forward` and `backward` are the training's own; `recompute` is what checkpointing ran again, which is in neither.
    """

    def __init__(self) -> None:
        self.forward = self.backward = self.recompute = 0

    @contextlib.contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Count a forward."""
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            yield
        self.forward += counter.get_total_flops()

    @contextlib.contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Count a backward, and apart what it computes again."""
        again = start = 0

        def entered() -> None:
            nonlocal start
            start = counter.get_total_flops()

        def left() -> None:
            nonlocal again
            again += counter.get_total_flops() - start

        counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
        with counter, recompute.watched(entered=entered, left=left):
            yield
        self.recompute += again
        self.backward += counter.get_total_flops() - again

    def mfu(self, step_s: float, device: torch.device, dtype: str) -> float | None:
        """Model FLOPs utilisation: forward and backward without recompute over what the device could do meanwhile.

        Args:
            step_s: Seconds of the step whose micro-batches were counted.
            device: The device.
            dtype: The run's precision; the peaks that are known are those of 16 bits.

        Returns:
            The ratio; None on a CPU, in fp32 and where the device's peak is not known.
        """
        peak = peak_flops(device) if dtype != "fp32" else None
        return (self.forward + self.backward) / step_s / peak if peak else None


def peak_flops(device: torch.device) -> float | None:
    """The stated bf16 FLOP/s of a device, None on a CPU and where it is not in the hardware table."""
    if device.type != "cuda":
        return None
    found = hardware.of_device(torch.cuda.get_device_name(device))
    return found.bf16_flops_per_s if found else None
