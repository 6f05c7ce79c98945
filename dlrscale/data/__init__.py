"""Token batches: plain text, JSON lines and the embedded corpora, cut, padded and shared out over ranks.

Data are read whole on every rank and indexed by optimizer step, so that ranks need no communication and a
resumed run needs no more than its step number. Text is packed into windows of exactly `seq_len` tokens;
prompt/completion records are never packed, because packed records would see each other.
"""

from __future__ import annotations

import difflib
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dlrscale.data.embedded import EMBEDDED, embedded_documents
from dlrscale.errors import ConfigError

_ROLES = (("text",), ("prompt", "completion"))  # what a record holds
IGNORE = -100  # the label of a position without loss
COUNT_KEYS = (
    "documents", "records", "empty", "unreadable", "overlapping", "truncated_records", "truncated_tokens",
    "dropped_records", "dropped_tokens", "leftover_tokens", "items", "tokens", "label_tokens",
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
        return _token_data(ids, labels, packed=self.packed, counts=self.counts)


def _token_data(
    input_ids: list[np.ndarray], labels: list[np.ndarray], *, packed: bool, counts: Mapping[str, int]
) -> TokenData:
    sums = {
        "items": len(input_ids),
        "tokens": sum(map(len, input_ids)),
        "label_tokens": sum(int(np.count_nonzero(x[1:] != IGNORE)) for x in labels),
    }
    return TokenData(input_ids, labels, packed, {**dict.fromkeys(COUNT_KEYS, 0), **counts, **sums})


def load(
    path: str,
    tokenizer: Any,
    *,
    seq_len: int,
    columns: Mapping[str, str] | None = None,
    document_separator: str | None = None,
    limit: int = 0,
) -> TokenData:
    """Read and tokenise a file or an embedded corpus.

    Args:
        path: A file (`.jsonl` or `.json`: one JSON object per line; anything else: plain text; both also with
            `.gz`), or one of `EMBEDDED`.
        tokenizer: A Hugging Face tokenizer.
        seq_len: Tokens per window of packed text, and the most tokens that a record keeps.
        columns: Names of the keys of JSON lines: `{"text": ...}` or `{"prompt": ..., "completion": ...}`;
            without it the first record decides. Plain text has no columns and ignores it.
        document_separator: Text between the documents of a plain text file; JSON lines ignore it.
        limit: How many items are enough, 0 for all; what is counted stops there too.

    Returns:
        Windows of packed text, or one item per prompt/completion record.

    Raises:
        ConfigError: If the data are missing, malformed, or less than one sequence.
    """
    if seq_len < 2:
        raise ConfigError(f"--seq-len is {seq_len}: a sequence needs at least 2 tokens to hold a predicted one.")
    counts = dict.fromkeys(COUNT_KEYS, 0)
    if not _is_jsonl(path):
        return _pack(path, documents(path, document_separator, counts), tokenizer, seq_len, counts, limit)
    records = list(_records(path, _read_text(Path(path)), columns))
    if not records:
        raise ConfigError(f"{path}: holds no record. Give a file with one JSON object per line.")
    if len(records[0]) == 1:
        return _pack(path, (record[0] for record in records), tokenizer, seq_len, counts, limit)
    return _pair_data(path, records, tokenizer, seq_len, counts, limit)


def fitting_columns(path: str, columns: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """The columns named for one file, if another one has them too; else None, so that its own keys are found.

    Args:
        path: The other file.
        columns: As for `load`.

    Returns:
        The columns, or None.
    """
    if columns is None or not _is_jsonl(path):
        return columns
    first = next((line for line in _read_text(Path(path)).split("\n") if line.strip()), "")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return columns  # `load` says what is wrong
    return columns if isinstance(record, dict) and set(columns.values()) <= set(record) else None


def _is_jsonl(path: str) -> bool:
    return path.lower().removesuffix(".gz").endswith((".jsonl", ".json"))


def documents(path: str, separator: str | None, counts: dict[str, int]) -> Iterator[str]:
    """The documents of an embedded corpus or of a plain text file.

    Args:
        path: One of `EMBEDDED`, or a text file.
        separator: Text between documents; without one a file is one document.
        counts: `unreadable` and `overlapping` are counted here.

    Returns:
        Texts without the line breaks around them.
    """
    if path.startswith("embedded:"):
        return embedded_documents(path, counts)
    text = _read_text(Path(path)).replace("\r\n", "\n")
    return (d.strip("\n") for d in (text.split(separator) if separator else [text]))


def check_place(place: str | None) -> None:
    """Refuse a data file that is not there; None and embedded corpora pass.

    Args:
        place: A file, one of `EMBEDDED`, or None.

    Raises:
        ConfigError: If the file is missing; a near name in its folder is offered.
    """
    if place is None or place.startswith("embedded:") or Path(place).is_file():
        return
    path = Path(place)
    if path.is_dir():
        raise ConfigError(f"{path.absolute()} is a folder. Name the data file in it.")
    folder = path.absolute().parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"Did you mean {near[0]!r} there?" if near else f"Give a file, or one of {', '.join(EMBEDDED)}."
    raise ConfigError(f"No such data file: {path.absolute()}. {hint}")


def _read_text(path: Path) -> str:
    """The text of a UTF-8 file without a byte order mark, unzipped where its name ends in .gz."""
    check_place(str(path))
    try:
        raw = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Give a readable, whole file.") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 ({error.reason}). Save the file as UTF-8.") from None


def _records(path: str, text: str, columns: Mapping[str, str] | None) -> Iterator[tuple[str, ...]]:
    """Yield (text,) or (prompt, completion) of each record; the first line without such strings is refused.

    Lines end at a line feed alone: the other line breaks of Unicode may stand inside JSON strings.
    """
    keys = None if columns is None else _column_keys(columns)
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or str(error)
            raise ConfigError(f"{place}: no JSON object ({reason}). Each line must hold a whole one.") from None
        if not isinstance(record, dict):
            raise ConfigError(f"{place}: {_short(record)} is no JSON object. Each line must hold one.")
        keys = keys or _guess_keys(place, record)
        yield tuple(_value(place, record, key) for key in keys)


def _column_keys(columns: Mapping[str, str]) -> tuple[str, ...]:
    for roles in _ROLES:
        if set(columns) == set(roles):
            return tuple(columns[role] for role in roles)
    raise ConfigError(
        f"--columns names {', '.join(columns) or 'nothing'}: "
        "give text=KEY, or prompt=KEY,completion=KEY with the keys of your records."
    )


def _guess_keys(place: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    for keys in _ROLES:
        if all(key in record for key in keys):
            return keys
    raise ConfigError(
        f"{place}: no 'text', nor 'prompt' and 'completion', among the record's keys ({_keys(record)}). "
        "Name the keys to read with --columns text=KEY or --columns prompt=KEY,completion=KEY."
    )


def _value(place: str, record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        raise ConfigError(
            f"{place}: {key!r} is not among the record's keys ({_keys(record)}). "
            "Add it, or name another with --columns."
        )
    value = record[key]
    if not isinstance(value, str):
        raise ConfigError(f"{place}: {key!r} is {_short(value)}, not a string. Write it as a string.")
    if re.search(r"[\ud800-\udfff]", value):
        raise ConfigError(f"{place}: {key!r} holds half of a surrogate pair, no character. Mend the escape.")
    return value


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, record)) or "none"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _encode(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
    """The ids of each text, with the tokenizer's own special tokens; some texts at a time."""
    texts = iter(texts)
    while batch := list(itertools.islice(texts, _TOKENIZER_BATCH)):
        yield from tokenizer(batch, truncation=False, padding=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]


def _pack(
    source: str, documents: Iterable[str], tokenizer: Any, seq_len: int, counts: dict[str, int], limit: int
) -> TokenData:
    """Join the documents, each closed by one end token, and cut them into windows of seq_len tokens."""

    def full() -> Iterator[str]:
        for text in documents:
            kept = bool(text.strip())
            counts["documents" if kept else "empty"] += 1
            if kept:
                yield text

    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts, length = [], 0
    for ids in _encode(tokenizer, full()):
        parts.append(np.asarray(ids if ids[-1:] == end else ids + end, dtype=np.int64))
        length += len(parts[-1])
        if limit and length >= limit * seq_len:
            break
    if not parts:
        raise ConfigError(f"{source}: holds no text. Give a file that is not empty.")
    windows = min(length // seq_len, limit or length)
    if not windows:
        raise ConfigError(
            f"{source}: {length} tokens are less than one sequence of {seq_len}. "
            "Give more text, or a smaller --seq-len."
        )
    counts["leftover_tokens"] = length - windows * seq_len
    items = list(np.concatenate(parts)[: windows * seq_len].reshape(windows, seq_len))
    return _token_data(items, items, packed=True, counts=counts)


def _pair_data(
    path: str, records: Sequence[tuple[str, ...]], tokenizer: Any, seq_len: int, counts: dict[str, int], limit: int
) -> TokenData:
    """One item per prompt/completion record, with labels on the completion and its end token alone."""
    full = [(prompt, completion) for prompt, completion in records if completion.strip()]
    counts.update(records=len(records), empty=len(records) - len(full))
    prompts = _encode(tokenizer, [prompt for prompt, _ in full])
    wholes = _encode(tokenizer, [prompt + completion for prompt, completion in full])
    input_ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for prompt_ids, whole in zip(prompts, wholes, strict=True):
        ids, border = _close_pair(prompt_ids, whole, tokenizer.eos_token_id)
        if border >= min(len(ids), seq_len):
            counts["dropped_records"] += 1
            counts["dropped_tokens"] += len(ids)
            continue
        if len(ids) > seq_len:
            counts["truncated_records"] += 1
            counts["truncated_tokens"] += len(ids) - seq_len
        input_ids.append(np.asarray(ids[:seq_len], dtype=np.int64))
        labels.append(np.where(np.arange(len(input_ids[-1])) < border, IGNORE, input_ids[-1]))
        if len(input_ids) == limit:
            break
    if not input_ids:
        raise ConfigError(
            f"{path}: no completion label is left of {len(records)} records: {counts['empty']} have an empty "
            f"completion, {counts['dropped_records']} a prompt that fills all {seq_len} tokens. "
            "Raise --seq-len, or shorten the prompts."
        )
    return _token_data(input_ids, labels, packed=False, counts=counts)


def _close_pair(prompt: list[int], whole: list[int], eos: int | None) -> tuple[list[int], int]:
    """The whole record's ids with one end token, and the position of its first label (at least 1).

    The border is where the prompt's own ids part from the whole's, so a token that spans the border counts as
    completion, and an end token that the tokenizer put after the prompt does not matter.
    """
    ids = list(whole)
    while eos is not None and ids and ids[-1] == eos:
        ids.pop()
    border = 0
    while border < min(len(prompt), len(ids)) and prompt[border] == ids[border]:
        border += 1
    if eos is not None:
        ids.append(eos)
    return ids, max(border, 1)


def pad_id(tokenizer: Any) -> int:
    """The id that fills padding: the pad token, else the end token, else 0. It never gets a label."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


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


def calibration(data: TokenData, count: int = 16) -> list[dict[str, torch.Tensor]]:
    """The first items in the file's order, one per batch: input_ids and attention_mask, int64 (1, T)."""
    batches = [_collate(data, [i], 0) for i in range(min(count, len(data)))]
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
