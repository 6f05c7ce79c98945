"""Speed of prefill and decode, of several models in one process, one after the other in turn."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median, quantiles

import torch
from torch import nn

from dlrscale.measure.phases import synchronise


@torch.no_grad()
def once(model: nn.Module, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of one prefill, and of one decoded token on the average; greedy, with a key-value cache.

    Args:
        model: A causal language model in eval mode.
        ids: The prompts, int64 (B, T).
        new_tokens: Tokens to decode after the prompt.

    Returns:
        Seconds of the prefill and seconds per decoded token of all B sequences at once.
    """
    synchronise(ids.device)
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    synchronise(ids.device)
    filled = time.perf_counter()
    for _ in range(new_tokens):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    synchronise(ids.device)
    return filled - start, (time.perf_counter() - filled) / new_tokens


def speeds(
    models: Mapping[str, nn.Module],
    batches: Sequence[int],
    vocabulary: int,
    prompt: int,
    new_tokens: int,
    repeats: int,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Prefill and decode of each model at each batch size; in every repeat the models take turns.

    Args:
        models: Models in eval mode by side.
        batches: Sequences at once.
        vocabulary: Prompts are random ids below it; the time does not depend on them.
        prompt: Tokens of a prompt.
        new_tokens: Tokens to decode.
        repeats: Timed repeats, after one that warms up.
        device: Where the models are.

    Returns:
        By side the metrics: medians, the distance between the quartiles as `..._iqr_...`, and the weights' bytes.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, dict[str, float]] = {
        side: {"inference/weight_bytes": weight_bytes(model)} for side, model in models.items()
    }
    for batch in batches:
        ids = torch.randint(vocabulary, (batch, prompt), generator=generator).to(device)
        taken: dict[str, list[tuple[float, float]]] = {side: [] for side in models}
        for repeat in range(repeats + 1):
            order = list(models)[:: 1 if repeat % 2 else -1]  # neither is always the one that comes first
            for side in order:
                seconds = once(models[side], ids, new_tokens)
                if repeat:
                    taken[side].append(seconds)
        for side, times in taken.items():
            rates = [batch * prompt / prefill for prefill, _ in times]
            decode = [1000 * each for _, each in times]
            for name, values in (("prefill_tokens_per_s", rates), ("decode_ms_per_token", decode)):
                found[side][f"inference/{name}_b{batch}"] = median(values)
                found[side][f"inference/{name}_iqr_b{batch}"] = spread(values)
    return found


def spread(values: Sequence[float]) -> float:
    """The distance between the lower and the upper quartile; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
