"""Batches by optimizer step, padded and shared out over ranks; the held-out part and its batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dlrscale.data.tokens import IGNORE, TokenData
from dlrscale.errors import ConfigError


def _collate(data: TokenData, items: Sequence[int], pad: int) -> dict[str, torch.Tensor]:
    """Pad items on the right to the longest: input_ids, attention_mask and labels, int64 (B, T)."""
    width = max(len(data.input_ids[i]) for i in items)
    input_ids = np.full((len(items), width), pad, dtype=np.int64)
    mask = np.zeros((len(items), width), dtype=np.int64)
    labels = np.full((len(items), width), IGNORE, dtype=np.int64)
    for row, i in enumerate(items):
        length = len(data.input_ids[i])
        input_ids[row, :length] = data.input_ids[i]
        mask[row, :length] = 1
        labels[row, :length] = data.labels[i]
    arrays = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@dataclass(frozen=True)
class StepBatch:
    """What one rank needs for one optimizer step.

    Attributes:
        micro_batches: One dict of input_ids, attention_mask, labels (int64, (B, T)) per accumulation step.
        label_tokens: Predicted labels of the step over all ranks and micro-batches: the loss's divisor.
        tokens: Real tokens of the step, over all ranks and micro-batches.
        processed_tokens: The same with padding.
    """

    micro_batches: list[dict[str, torch.Tensor]]
    label_tokens: int
    tokens: int
    processed_tokens: int


class Batches:
    """Training batches by optimizer step: step k is the same whatever ran before it.

    Each epoch has its own permutation; what does not fill a global batch at its end is not used. The item of
    micro-batch m, rank r and position i is number (m * world_size + r) * micro_batch + i of the global batch,
    so that a step holds the same items in every layout.
    """

    def __init__(
        self, data: TokenData, *, seed: int, micro_batch: int, accumulation: int, rank: int, world_size: int,
        pad_id: int,
    ):  # fmt: skip
        self.data, self.seed, self.pad = data, seed, pad_id
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.rank, self.world_size = rank, world_size
        self.global_batch = micro_batch * accumulation * world_size
        self.steps_per_epoch, self.unused_per_epoch = divmod(len(data), self.global_batch)
        if not self.steps_per_epoch:
            raise ConfigError(
                f"The data hold {len(data)} sequences, less than one global batch of {self.global_batch} "
                f"(micro-batch {micro_batch} x accumulation {accumulation} x {world_size} ranks). "
                "Give more data, or lower --micro-batch, --accumulation or --num-ranks."
            )
        self._lengths = np.array([len(ids) for ids in data.input_ids])
        self._label_tokens = np.array([data.label_tokens(i) for i in range(len(data))])
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def items(self, k: int) -> np.ndarray:
        """The items of step k over all ranks, (accumulation, world_size, micro_batch)."""
        epoch, position = divmod(k, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.data)))
        start = position * self.global_batch
        chosen = self._order[1][start : start + self.global_batch]
        return chosen.reshape(self.accumulation, self.world_size, self.micro_batch)

    def unused(self, steps: int) -> dict[str, int]:
        """The items, and their tokens, that none of a run's first steps takes."""
        left = np.ones(len(self.data), dtype=bool)
        for k in range(steps):
            left[self.items(k)] = False
            if not left.any():
                break
        return {"unused_items": int(left.sum()), "unused_tokens": int(self._lengths[left].sum())}

    def step(self, k: int) -> StepBatch:
        """This rank's micro-batches of optimizer step k (from 0), and the step's global counts."""
        items = self.items(k)
        lengths = self._lengths[items]
        return StepBatch(
            micro_batches=[_collate(self.data, mine, self.pad) for mine in items[:, self.rank]],
            label_tokens=int(self._label_tokens[items].sum()),
            tokens=int(lengths.sum()),
            processed_tokens=int(lengths.max(axis=-1).sum()) * self.micro_batch,
        )


def eval_batches(
    data: TokenData, *, batch: int, rank: int, world_size: int, pad_id: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield every item exactly once over all ranks, in as many batches on each rank.

    A rank that has no items left yields one sequence without labels, so that ranks stay in step.
    Each batch holds input_ids, attention_mask and labels, int64 (B, T), B <= batch.
    """
    for start in range(0, len(data), batch * world_size):
        first = start + rank * batch
        items = range(first, min(first + batch, len(data)))
        if items:
            yield _collate(data, items, pad_id)
        else:
            dummy = _collate(data, [0], pad_id)
            dummy["labels"].fill_(IGNORE)
            yield dummy


def split_heldout(data: TokenData, fraction: float = 0.05) -> tuple[TokenData, TokenData]:
    """The training part, and the last items (at least one) for evaluation; needs two items or more."""
    if len(data) < 2:
        raise ConfigError(
            f"The data hold {len(data)} sequence, too few to hold one out of 2 or more. "
            "Give more data, or name held-out data with --heldout."
        )
    count = min(max(1, round(len(data) * fraction)), len(data) - 1)
    return data.subset(slice(None, len(data) - count)), data.subset(slice(len(data) - count, None))


def heldout_half(data: TokenData, part: str) -> TokenData:
    """One half of held-out data: every other item, since a file may be sorted.

    Args:
        data: The held-out data.
        part: `tune` for items 0, 2, 4 ..., by which a search chooses; `report` for 1, 3, 5 ..., which it never sees.

    Returns:
        The half.

    Raises:
        ConfigError: If there are fewer than two items.
    """
    if len(data) < 2:
        raise ConfigError(
            f"The held-out data hold {len(data)} sequence: a search tunes on one half and reports on the other. Give "
            "more with --heldout, or raise --heldout-limit."
        )
    return data.subset(slice({"tune": 0, "report": 1}[part], None, 2))


def calibration(data: TokenData, count: int = 16) -> list[dict[str, torch.Tensor]]:
    """The first items in the file's order, one per batch: input_ids and attention_mask, int64 (1, T)."""
    batches = [_collate(data, [i], 0) for i in range(min(count, len(data)))]
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
