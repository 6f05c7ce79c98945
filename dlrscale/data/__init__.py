"""Token batches: text, records and chats, cut, padded and shared out over ranks.

Data are read whole on every rank and indexed by optimizer step, so that ranks need no communication and a
resumed run needs no more than its step number. Text is packed into windows of exactly `seq_len` tokens;
prompt/completion records and chats are never packed, because packed records would see each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlrscale.data import chat
from dlrscale.data.batches import Batches, StepBatch, calibration, eval_batches, heldout_half, split_heldout
from dlrscale.data.chat import read_template
from dlrscale.data.embedded import EMBEDDED
from dlrscale.data.hub import pin
from dlrscale.data.read import check_place, documents, fitting_columns, holds_records, records
from dlrscale.data.tokens import (
    COUNT_KEYS,
    IGNORE,
    Example,
    TokenData,
    left_out,
    pack,
    pad_id,
    record_data,
    token_data,
)
from dlrscale.errors import ConfigError

__all__ = [
    "COUNT_KEYS", "EMBEDDED", "IGNORE", "Batches", "StepBatch", "TokenData", "calibration", "check_place", "documents",
    "eval_batches", "fitting_columns", "heldout_half", "left_out", "load", "pad_id", "pin", "read_template",
    "split_heldout", "token_data",
]  # fmt: skip


def load(
    path: str,
    tokenizer: Any,
    *,
    seq_len: int,
    columns: Mapping[str, str] | None = None,
    document_separator: str | None = None,
    chat_template: str | None = None,
    limit: int = 0,
) -> TokenData:
    """Read and tokenise a file, a data set or an embedded corpus.

    Args:
        path: A file (`.jsonl` or `.json`: one JSON object per line; anything else: plain text; both also with
            `.gz`), a folder that the library `datasets` reads, `hf:org/name`, or one of `EMBEDDED`.
        tokenizer: A Hugging Face tokenizer.
        seq_len: Tokens per window of packed text, and the most tokens that a record keeps.
        columns: Names of the keys of records: `{"text": ...}`, `{"prompt": ..., "completion": ...}` or
            `{"messages": ...}`; without it the first record decides. Plain text has no columns and ignores it.
        document_separator: Text between the documents of a plain text file; records ignore it.
        chat_template: Source of the template of chats, before the tokenizer's own; others ignore it.
        limit: How many items are enough, 0 for all; what is counted stops there too.

    Returns:
        Windows of packed text, or one item per prompt/completion record or chat.

    Raises:
        ConfigError: If the data are missing, malformed, or less than one sequence.
    """
    if seq_len < 2:
        raise ConfigError(f"--seq-len is {seq_len}: a sequence needs at least 2 tokens to hold a predicted one.")
    counts = dict.fromkeys(COUNT_KEYS, 0)
    if not holds_records(path):
        return pack(path, documents(path, document_separator, counts), tokenizer, seq_len, counts, limit)
    roles, found = records(path, columns)
    if roles == ("text",):
        return pack(path, (text for _, (text,) in found), tokenizer, seq_len, counts, limit)
    if roles == ("messages",):
        template = chat.chat_template(tokenizer, chat_template)
        examples = [chat.example(place, messages, template) for place, (messages,) in found]
        full = [example for example in examples if example.spans]
    else:
        full = [
            Example(prompt + completion, ((len(prompt), len(prompt + completion)),))
            for _, (prompt, completion) in found
            if completion.strip()
        ]
    counts.update(records=len(found), empty=len(found) - len(full))
    return record_data(path, full, tokenizer, seq_len, counts, limit)
