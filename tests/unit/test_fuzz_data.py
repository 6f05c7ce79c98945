"""Any bytes and any columns are data with their invariants, or one error that names the place."""

import json

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_records import PLAIN, make_tokenizer

from dlrscale import data
from dlrscale.errors import ConfigError

SEQ_LEN = 40
PIECES = ["the", " ", "cat", "a", "\n", "\r", "\u2028", "é", "<s>", "</s>", "\0", '"']
TEXT = st.lists(st.sampled_from(PIECES), max_size=30).map("".join) | st.text()
VALUE = TEXT | st.just("\ud800") | st.none() | st.integers() | st.lists(st.none(), max_size=2) | st.floats()
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXT})
KEYS = st.sampled_from(["text", "prompt", "completion", "messages", "x"])
KINDS = (
    st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}),
    st.fixed_dictionaries({"text": TEXT}),
    st.fixed_dictionaries({"messages": st.lists(TURN, min_size=1, max_size=4)}),
)
RECORD = st.one_of(*KINDS, st.dictionaries(KEYS, VALUE | st.lists(TURN, max_size=3), max_size=3))
END = st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n  \n"])


def line(record, plain):
    return json.dumps(record, ensure_ascii=plain).encode("utf-8", "surrogatepass")


LINE = st.builds(line, RECORD, st.booleans())
MARK = st.sampled_from([b"", b"\xef\xbb\xbf"])


def joined(lines):
    return st.builds(
        lambda mark, parts: mark + b"".join(a + b for a, b in parts), MARK, st.lists(st.tuples(lines, END))
    )


WHOLE = [joined(st.builds(line, kind, st.booleans())) for kind in KINDS]
BROKEN = (
    joined(LINE),
    joined(LINE | st.binary(max_size=8)),
    joined(st.builds(lambda line, cut: line[:cut], LINE, st.integers(1, 40))),
    st.binary(max_size=40),
)
CONTENT = st.one_of(*WHOLE, *BROKEN)
COLUMNS = st.sampled_from([None] * 8 + [{"text": "text"}, {"text": "x"}, {"prompt": "x"}, {"messages": "messages"}])


def check(loaded):
    """What holds of all token data."""
    assert len(loaded) == len(loaded.labels) == loaded.counts["items"] > 0
    assert set(loaded.counts) == set(data.COUNT_KEYS)
    assert min(loaded.counts.values()) >= 0
    for ids, labels in zip(loaded.input_ids, loaded.labels, strict=True):
        assert ids.dtype == labels.dtype == np.int64
        assert ids.shape == labels.shape
        assert len(ids) == SEQ_LEN if loaded.packed else 2 <= len(ids) <= SEQ_LEN
        assert ((labels == ids) | (labels == data.IGNORE)).all()
    assert loaded.counts["tokens"] == sum(map(len, loaded.input_ids))
    assert loaded.counts["label_tokens"] == sum(loaded.label_tokens(i) for i in range(len(loaded)))
    if not loaded.packed:
        assert all(loaded.label_tokens(i) for i in range(len(loaded)))
        kept = loaded.counts["records"] - loaded.counts["empty"] - loaded.counts["dropped_records"]
        assert len(loaded) == kept
    per_item = [list(data.eval_batches(loaded, batch=2, rank=r, world_size=2, pad_id=0)) for r in range(2)]
    labels = sum(int((b["labels"][:, 1:] != data.IGNORE).sum()) for rank in per_item for b in rank)
    assert labels == loaded.counts["label_tokens"]


def run(request, tmp_path, name, contents, columns):
    """Load every content under one name; the path is shown in every message."""
    tokenizer, path = make_tokenizer(PLAIN), tmp_path / name
    ends = {"data": 0, "refused": 0}

    @settings(
        max_examples=request.config.getoption("--fuzz-examples"),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(contents, columns, st.none() | st.sampled_from(["|", "the", "\n\n"]))
    def loads(content, chosen, separator):
        path.write_bytes(content)
        fault = None
        try:
            loaded = data.load(str(path), tokenizer, seq_len=SEQ_LEN, columns=chosen, document_separator=separator)
        except ConfigError as error:
            fault = error
        ends["data" if fault is None else "refused"] += 1
        if fault is None:
            check(loaded)
        else:
            assert len(fault.faults) == 1
            assert "\n" not in str(fault)
            assert name in str(fault) or "--columns" in str(fault)

    loads()
    assert ends["data"] > 10  # else the test would look at nothing
    assert ends["refused"] > 10


def test_any_json_lines(request, tmp_path):
    run(request, tmp_path, "some.jsonl", CONTENT, COLUMNS)


def test_any_text(request, tmp_path):
    contents = st.lists(TEXT, max_size=20).map(lambda x: "".join(x).encode("utf-8", "surrogatepass"))
    run(request, tmp_path, "some.txt", contents | st.binary(max_size=40), st.none())
