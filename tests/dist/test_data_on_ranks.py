"""Chats from a data set's folder, through a whole attack on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands import dlrscale
from dlrscale import data, models, record

pytestmark = pytest.mark.dist

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}"
)
ATTACK = ["--strategy", "full", "--columns", "messages=chat", "--seq-len", "48", "--micro-batch", "1",
          "--accumulation", "2", "--num-ranks", "2", "--steps", "2", "--tracking-uri", "none", "--zero", "2"]  # fmt: skip


def chat(answer: str, question: str = "the cat") -> dict[str, list[dict[str, str]]]:
    return {"chat": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_chats_of_a_data_set_are_learnt_and_counted(place: Path) -> None:
    """Ten records and two steps of four: two are not used; one is too long, one has no answer."""
    import datasets

    rows = [chat("sat " * (1 + i % 3)) for i in range(10)] + [chat("no", "x" * 200), chat(" ")]
    datasets.Dataset.from_list(rows).save_to_disk(str(place / "chats"))
    (place / "held.jsonl").write_text("".join(json.dumps(chat("sat " * n)) + "\n" for n in (1, 2, 3)))
    line = ["attack", "--model", "base", "--data", "chats", "--heldout", "held.jsonl", *ATTACK, "--out", "chatted"]
    refused = dlrscale(place, *line)
    assert refused.returncode == 2
    assert "--chat-template" in refused.stderr
    assert str(place / "base") in refused.stderr
    assert not (place / "chatted").exists()

    (place / "chat.jinja").write_text(TEMPLATE)
    done = dlrscale(place, *line, "--chat-template", "chat.jinja")
    assert done.returncode == 0, done.stderr
    expected = "train 1 empty, train 1 dropped records, train 2 unused items"
    assert f"data not used: {expected}" in done.stdout.splitlines()
    entry = list(record.read_lines(place / "chatted" / record.RECORDS_FILE))[-1]
    assert entry["config"]["data"] == "chats"
    assert entry["config"]["chat_template"] == "chat.jinja"
    assert entry["config"]["chat_template_digest"] == record.digest_file(place / "chat.jinja")
    loaded = data.load(
        str(place / "chats"), models.load_tokenizer(place / "base"), seq_len=48, columns={"messages": "chat"},
        chat_template=TEMPLATE,
    )  # fmt: skip
    metrics = entry["metrics"]
    assert metrics["data/train_items"] == len(loaded) == 10
    steps = list(record.read_lines(place / "chatted" / record.STEPS_FILE))
    assert steps[-1]["tokens"] == loaded.counts["tokens"] - metrics["data/train_unused_tokens"]
    assert sum(row["label_tokens"] for row in steps) < loaded.counts["label_tokens"]
