"""Held-out loss: the sum of nats over the sum of label tokens, whatever the batch and the number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from dlrscale.data import IGNORE, TokenData, eval_batches
from dlrscale.errors import ConfigError

_CHUNK_ELEMENTS = 1 << 25  # logits turned to float32 at a time: 128 MiB


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sum the cross-entropy of the next token over all labels that are not -100.

    Only the rows that have a label are turned to float32, some at a time. It can be differentiated, also
    where no label is left (the gradient is zero then).

    Args:
        logits: (B, T, V), any floating dtype; position t predicts label t + 1.
        labels: (B, T) int64, -100 where no loss is taken.

    Returns:
        The sum in nats, a float32 scalar, and the number of label tokens that it sums.
    """
    vocabulary = logits.shape[-1]
    targets = functional.pad(labels.to(logits.device)[:, 1:], (0, 1), value=IGNORE).reshape(-1)
    rows = logits.reshape(-1, vocabulary)
    places = (targets != IGNORE).nonzero().squeeze(1)
    total = rows[:0].float().sum()
    for chunk in places.split(max(1, _CHUNK_ELEMENTS // vocabulary)):
        # Not rows[chunk], whose backward is several times slower. Freed before the next chunk asks for as much.
        logits_fp32 = rows.index_select(0, chunk).float()
        total = total + functional.cross_entropy(logits_fp32, targets[chunk], reduction="sum")
        del logits_fp32
    return total, places.numel()


@torch.no_grad()
def heldout_loss(
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    data: TokenData,
    *,
    batch: int,
    rank: int,
    world_size: int,
    pad_id: int,
    device: torch.device | str,
    reduce: Callable[[torch.Tensor], torch.Tensor | None] | None = None,
) -> dict[str, float | int]:
    """Measure the loss on held-out data, each item once over all ranks.

    Args:
        forward: Maps input_ids and attention_mask, int64 (B, T), to logits (B, T, V). Whether dropout is off
            is the caller's matter.
        data: The held-out data, the same on every rank.
        batch: Sequences per forward and rank.
        rank: This process.
        world_size: The number of processes; all make the same number of forwards.
        pad_id: The id that fills padding.
        device: Where the batches go.
        reduce: Sums a float64 tensor (2,) over the ranks, in place or as its result; None on one process.

    Returns:
        `loss` in nats per label token, and `label_tokens` over all ranks.

    Raises:
        ConfigError: If the data hold no label.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for inputs in eval_batches(data, batch=batch, rank=rank, world_size=world_size, pad_id=pad_id):
        moved = {name: tensor.to(device) for name, tensor in inputs.items()}
        logits = forward(moved["input_ids"], moved["attention_mask"])
        nats, count = cross_entropy_sum(logits, moved["labels"])
        sums[0] += nats.to(sums)
        sums[1] += count
    if reduce is not None:
        reduced = reduce(sums)
        sums = sums if reduced is None else reduced
    nats, count = sums.tolist()
    if not count:
        raise ConfigError("The held-out data hold no label token. Give data with text or completions.")
    return {"loss": nats / count, "label_tokens": int(count)}
