"""From texts to token items: packed windows of plain text, and single records with labels on a part of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrscale.errors import ConfigError

IGNORE = -100  # the label of a position without loss
COUNT_KEYS = (
    "documents", "records", "empty", "unreadable", "overlapping", "truncated_records", "truncated_tokens",
    "dropped_records", "dropped_tokens", "leftover_tokens", "unused_items", "unused_tokens", "items", "tokens",
    "label_tokens",
)  # fmt: skip
_TOKENIZER_BATCH = 64  # documents per tokenizer call


@dataclass(frozen=True)
class TokenData:
    """Tokenised data in their own order.

    Attributes:
        input_ids: One int64 array (length,) per item.
        labels: The same shapes; -100 where no loss is taken. Label i is predicted from position i - 1, so
            the label at position 0 is never used.
        packed: Whether the items are windows of packed text, all of one length.
        counts: What was read, left out and kept; the keys are `COUNT_KEYS`.
    """

    input_ids: list[np.ndarray]
    labels: list[np.ndarray]
    packed: bool
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.input_ids)

    def label_tokens(self, i: int) -> int:
        """The number of labels of item i that are predicted."""
        return int(np.count_nonzero(self.labels[i][1:] != IGNORE))

    def subset(self, selection: slice | Iterable[int]) -> TokenData:
        """Some of the items; the counts of items, tokens and label tokens are those of the subset."""
        chosen = range(len(self))[selection] if isinstance(selection, slice) else list(selection)
        ids, labels = [self.input_ids[i] for i in chosen], [self.labels[i] for i in chosen]
        return token_data(ids, labels, packed=self.packed, counts=self.counts)


def token_data(
    input_ids: list[np.ndarray], labels: list[np.ndarray], *, packed: bool, counts: Mapping[str, int]
) -> TokenData:
    """Items with their counts.

    Args:
        input_ids: One int64 array (length,) per item.
        labels: The same shapes.
        packed: Whether they are windows of packed text.
        counts: What is known of their source; items, tokens and label tokens are counted here.

    Returns:
        The data.
    """
    sums = {
        "items": len(input_ids),
        "tokens": sum(map(len, input_ids)),
        "label_tokens": sum(int(np.count_nonzero(x[1:] != IGNORE)) for x in labels),
    }
    return TokenData(input_ids, labels, packed, {**dict.fromkeys(COUNT_KEYS, 0), **counts, **sums})


@dataclass(frozen=True)
class Example:
    """The text of a record.

    Attributes:
        text: All of it, as the model sees it.
        spans: First and last (exclusive) character of what has labels.
        bare: Whether the text has its own special tokens, as a chat template writes them. Else the tokenizer adds
            its own, and one end token closes the record.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    bare: bool = False


def _encode(tokenizer: Any, texts: Iterable[str], bare: bool = False) -> Iterator[tuple[list[int], list | None]]:
    """Ids and character offsets of each text, some texts at a time; a first token that stands twice is kept once.

    The offsets are None where the tokenizer has none (those that are written in Python).
    """
    texts, bos = iter(texts), tokenizer.bos_token_id
    while batch := list(itertools.islice(texts, _TOKENIZER_BATCH)):
        found = tokenizer(
            batch, add_special_tokens=not bare, truncation=False, padding=False, return_attention_mask=False,
            return_offsets_mapping=tokenizer.is_fast, verbose=False,
        )  # fmt: skip
        offsets = found["offset_mapping"] if tokenizer.is_fast else [None] * len(batch)
        for ids, places in zip(found["input_ids"], offsets, strict=True):
            extra = next((n for n, token in enumerate(ids) if token != bos), len(ids)) - 1 if bos is not None else 0
            extra = max(extra, 0)
            yield ids[extra:], places and places[extra:]


def pack(
    source: str, documents: Iterable[str], tokenizer: Any, seq_len: int, counts: dict[str, int], limit: int
) -> TokenData:
    """Join documents, each closed by one end token, and cut them into windows.

    Args:
        source: Where the documents come from, for messages.
        documents: Their texts; those without any text are left out.
        tokenizer: A Hugging Face tokenizer.
        seq_len: Tokens per window.
        counts: What is counted, changed in place.
        limit: How many windows are enough, 0 for all.

    Returns:
        Windows with a label on each token.

    Raises:
        ConfigError: If there is less than one window.
    """

    def full() -> Iterator[str]:
        for text in documents:
            kept = bool(text.strip())
            counts["documents" if kept else "empty"] += 1
            if kept:
                yield text

    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts, length = [], 0
    for ids, _ in _encode(tokenizer, full()):
        parts.append(np.asarray(ids if ids[-1:] == end else ids + end, dtype=np.int64))
        length += len(parts[-1])
        if limit and length >= limit * seq_len:
            break
    if not parts:
        raise ConfigError(f"{source}: holds no text. Give data that are not empty.")
    windows = min(length // seq_len, limit or length)
    if not windows:
        raise ConfigError(
            f"{source}: {length} tokens are less than one sequence of {seq_len}. "
            "Give more text, or a smaller --seq-len."
        )
    counts["leftover_tokens"] = length - windows * seq_len
    items = list(np.concatenate(parts)[: windows * seq_len].reshape(windows, seq_len))
    return token_data(items, items, packed=True, counts=counts)


def record_data(
    source: str, examples: Sequence[Example], tokenizer: Any, seq_len: int, counts: dict[str, int], limit: int
) -> TokenData:
    """One item per record, never packed: packed records would see each other.

    Args:
        source: Where the records come from, for messages.
        examples: Records of one kind. Those whose labels are all cut off are dropped and counted.
        tokenizer: A Hugging Face tokenizer.
        seq_len: The most tokens that a record keeps, its first ones.
        counts: What is counted, changed in place.
        limit: How many records are enough, 0 for all.

    Returns:
        The items.

    Raises:
        ConfigError: If no record with a label is left.
    """
    bare = bool(examples) and examples[0].bare
    input_ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    encoded = _encode(tokenizer, (example.text for example in examples), bare)
    for example, (ids, offsets) in zip(examples, encoded, strict=False):
        ids, labelled = _mask(example, ids, offsets, tokenizer)
        if not any(labelled[1:seq_len]):
            counts["dropped_records"] += 1
            counts["dropped_tokens"] += len(ids)
            continue
        if len(ids) > seq_len:
            counts["truncated_records"] += 1
            counts["truncated_tokens"] += len(ids) - seq_len
        input_ids.append(np.asarray(ids[:seq_len], dtype=np.int64))
        labels.append(np.where(labelled[:seq_len], input_ids[-1], IGNORE))
        labels[-1][0] = IGNORE  # nothing predicts it
        if len(input_ids) == limit:
            break
    if not input_ids:
        raise ConfigError(
            f"{source}: no label is left of {counts['records']} records: {counts['empty']} have no text to learn, "
            f"of {counts['dropped_records']} the {seq_len} tokens of --seq-len end before it. "
            "Raise --seq-len, or shorten the prompts."
        )
    return token_data(input_ids, labels, packed=False, counts=counts)


def _mask(example: Example, ids: list[int], offsets: list | None, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The ids of a record, closed by one end token, and which of them have a label.

    A token has one if it covers a character of a span, so one that reaches over the border of prompt and completion
    has. The prompt's own ids are no guide to that border: it may be cut in other places inside the whole text.
    """
    eos = tokenizer.eos_token_id
    ids = list(ids)
    if not example.bare:
        while eos is not None and ids and ids[-1] == eos:
            ids.pop()
    if offsets is None:  # a tokenizer written in Python: the ids that prompt and whole have in common
        border = 0
        prompt = tokenizer(example.text[: example.spans[0][0]], verbose=False)["input_ids"]
        while border < min(len(prompt), len(ids)) and prompt[border] == ids[border]:
            border += 1
        labelled = [i >= border for i in range(len(ids))]
    else:
        labelled = [False] * len(ids)
        for first, last in example.spans:
            inside = [i for i, (start, end) in enumerate(offsets[: len(ids)]) if end > first and start < last]
            if inside:  # what lies between has its label too: some tokenizers leave blanks out of the places
                labelled[inside[0] : inside[-1] + 1] = [True] * (inside[-1] + 1 - inside[0])
    if not example.bare and eos is not None:
        ids.append(eos)
        labelled.append(True)
    return ids, labelled


def pad_id(tokenizer: Any) -> int:
    """The id that fills padding: the pad token, else the end token, else 0. It never gets a label."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


_LEFT_OUT = (
    "empty", "unreadable", "overlapping", "dropped_records", "truncated_records", "truncated_tokens",
    "leftover_tokens", "unused_items",
)  # fmt: skip


def left_out(metrics: Mapping[str, float]) -> str | None:
    """What a run's data lost, in one line for people.

    Args:
        metrics: A record's metrics.

    Returns:
        The line, or None where everything was used.
    """
    found = [
        f"{part} {metrics[f'data/{part}_{key}']:.0f} {key.replace('_', ' ')}"
        for part in ("train", "heldout", "heldout_base", "public")
        for key in _LEFT_OUT
        if metrics.get(f"data/{part}_{key}")
    ]
    return "data not used: " + ", ".join(found) if found else None
