"""Data: reading, refusing, packing, labels, and batches that do not depend on the layout."""

import gzip
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dlrscale import data
from dlrscale.data.embedded import embedded_documents
from dlrscale.errors import ConfigError

SHARED = Path(__file__).resolve().parents[3] / "shared"
STORIES = SHARED / "data" / "models" / "stories260K"
BOS, EOS = 1, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz .\n\u2028\x85\x0c"


def make_tokenizer(bos=True, eos=True):
    """One token per character: letter number i of LETTERS is id 3 + i."""
    vocabulary = {"<unk>": 0, "<s>": BOS, "</s>": EOS, **{c: i + 3 for i, c in enumerate(LETTERS)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    names = {"unk_token": "<unk>", "bos_token": "<s>"} | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=8, **names)


def ids_of(text):
    return [LETTERS.index(c) + 3 for c in text]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def stories():
    if not STORIES.is_dir():
        pytest.skip("needs the shared model stories260K")
    return AutoTokenizer.from_pretrained(STORIES)


@pytest.fixture
def write(tmp_path):
    def write(content, name="data.jsonl"):
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(raw)
        return str(tmp_path / name)

    return write


def pairs(*records):
    return "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in records)


def flat(loaded):
    return np.concatenate(loaded.input_ids).tolist()


def refusal(*args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        data.load(*args, **kwargs)
    assert len(caught.value.faults) == 1
    return str(caught.value)


# Plain text


def test_text_is_packed_with_an_end_at_every_join(tokenizer, write):
    path = write("ab\n<|end|>\n\ncde\n<|end|>\n<|end|>f", "x.txt")
    loaded = data.load(path, tokenizer, seq_len=5, document_separator="<|end|>")
    # <s> a b </s> <s> | c d e </s> <s> | f </s>
    assert [x.tolist() for x in loaded.input_ids] == [[1, 3, 4, 2, 1], [5, 6, 7, 2, 1]]
    assert [x.tolist() for x in loaded.labels] == [[1, 3, 4, 2, 1], [5, 6, 7, 2, 1]]
    expected = {"documents": 3, "empty": 1, "leftover_tokens": 2, "items": 2, "tokens": 10, "label_tokens": 8}
    assert {k: v for k, v in loaded.counts.items() if v} == expected
    assert loaded.packed
    assert loaded.label_tokens(0) == 4
    assert loaded.input_ids[0].dtype == np.int64


def test_text_without_separator_is_one_document(write):
    loaded = data.load(write("\r\nab\r\ncd\r\n", "x.txt"), make_tokenizer(bos=False), seq_len=3)
    assert flat(loaded) == [*ids_of("ab\ncd"), EOS]


def test_text_without_end_token(write):
    loaded = data.load(write("ab|cd", "x.txt"), make_tokenizer(eos=False), seq_len=2, document_separator="|")
    assert flat(loaded) == [BOS, *ids_of("ab"), BOS, *ids_of("cd")]


def test_an_end_token_in_the_text_is_not_doubled(write):
    loaded = data.load(write("ab</s>", "x.txt"), make_tokenizer(bos=False), seq_len=3)
    assert flat(loaded) == [*ids_of("ab"), EOS]
    assert loaded.counts["leftover_tokens"] == 0


def test_gzip_and_byte_order_mark(tokenizer, write):
    raw = b"\xef\xbb\xbf" + b"abcd"
    plain, packed = write(raw, "x.txt"), write(gzip.compress(raw), "x.txt.gz")
    for path in (plain, packed):
        assert flat(data.load(path, tokenizer, seq_len=6)) == [BOS, *ids_of("abcd"), EOS]
    record = write(gzip.compress(b'{"text": "abcd"}'), "x.jsonl.gz")
    assert flat(data.load(record, tokenizer, seq_len=6)) == [BOS, *ids_of("abcd"), EOS]


def test_less_than_one_sequence_names_both_figures(tokenizer, write):
    path = write("a" * 38, "x.txt")  # 40 tokens with both ends
    message = refusal(path, tokenizer, seq_len=64)
    assert "40 tokens" in message
    assert "64" in message
    assert "--seq-len" in message
    assert len(data.load(path, tokenizer, seq_len=40)) == 1


def test_no_length_warning(tokenizer, write, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    data.load(write("a" * 100, "x.txt"), tokenizer, seq_len=10)
    assert not caplog.records


def test_three_stories_have_an_end_at_every_join(stories, write):
    texts = ["Once upon a time.", "The dog ran.", "Tim was sad."]
    alone = [[*stories(text).input_ids, EOS] for text in texts]
    loaded = data.load(write("|".join(texts), "x.txt"), stories, seq_len=8, document_separator="|")
    whole = sum(alone, [])
    assert flat(loaded) == whole[: len(whole) // 8 * 8]
    assert loaded.counts["leftover_tokens"] == len(whole) % 8


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
@pytest.mark.parametrize("content", ["", "\n \r\n\n"])
def test_empty_files_are_refused(tokenizer, write, name, content):
    assert "holds no" in refusal(write(content, name), tokenizer, seq_len=4)


# JSON lines


BASE = b'\xef\xbb\xbf{"text":"a"}\r\n\r\n   \r\n{"text":"b","meta":{"n":1}}\r\n{"text":"c","meta":"x"}'


def test_byte_order_mark_blank_lines_and_mixed_columns(tokenizer, write):
    expected = [BOS, 3, EOS, BOS, 4, EOS, BOS, 5, EOS]
    for name, content in (("bom.jsonl", BASE), ("plain.jsonl", BASE[3:])):
        loaded = data.load(write(content, name), tokenizer, seq_len=9)
        assert flat(loaded) == expected
        assert loaded.counts["documents"] == 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text":5}', "5, not a string"),
        (b'{"text":null}', "null, not a string"),
        (b'{"text":["a"]}', "not a string"),
        (b'{"txt":"a"}', "'txt'"),
        (b'{"text":"a', "JSON"),
        (b'"a"', "JSON object"),
        (b'{"text":"\\ud800"}', "surrogate"),
        (b'{"text":"\xff"}', "UTF-8"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_bad_lines_are_named_with_blank_lines_counted(tokenizer, write, line, words):
    message = refusal(write(BASE + b"\r\n" + line), tokenizer, seq_len=4)
    assert "data.jsonl:6: " in message
    assert words in message
    assert "\n" not in message


def test_empty_text_is_skipped_and_counted(tokenizer, write):
    loaded = data.load(write(BASE + b'\n{"text":""}'), tokenizer, seq_len=9)
    assert flat(loaded) == [BOS, 3, EOS, BOS, 4, EOS, BOS, 5, EOS]
    assert (loaded.counts["documents"], loaded.counts["empty"]) == (3, 1)


def test_a_line_of_two_megabytes_is_used_whole(stories, write):
    words = "the cat sat. " * 160_000
    loaded = data.load(write(json.dumps({"text": words})), stories, seq_len=64)
    tokens = loaded.counts["tokens"] + loaded.counts["leftover_tokens"]
    one, two = (len(stories("the cat sat. " * n).input_ids) for n in (1, 2))
    assert tokens == one + (two - one) * (160_000 - 1) + 1  # and </s>


def test_line_breaks_of_unicode_do_not_end_a_line(write):
    raw = '{"text": "a\u2028b\x85c\u000cd"}\n'.replace("\x0c", "\\f")
    loaded = data.load(write(raw), make_tokenizer(bos=False), seq_len=8)
    assert flat(loaded) == [*ids_of("a\u2028b\x85c\x0cd"), EOS]


def test_columns_rename_and_are_checked(tokenizer, write):
    path = write('{"question": "ab", "answer": "cd", "story": "efgh"}\n')
    loaded = data.load(path, tokenizer, seq_len=9, columns={"prompt": "question", "completion": "answer"})
    assert flat(loaded) == [BOS, *ids_of("abcd"), EOS]
    assert not loaded.packed
    loaded = data.load(path, tokenizer, seq_len=6, columns={"text": "story"})
    assert flat(loaded) == [BOS, *ids_of("efgh"), EOS]
    message = refusal(path, tokenizer, seq_len=6)
    assert "data.jsonl:1" in message
    assert all(word in message for word in ("'question'", "'answer'", "'story'", "--columns"))
    assert "--columns" in refusal(path, tokenizer, seq_len=6, columns={"prompt": "question"})
    assert "'nope'" in refusal(path, tokenizer, seq_len=6, columns={"text": "nope"})


def test_missing_file_names_the_place_and_a_near_name(tokenizer, write, tmp_path):
    write("a", "stories.txt")
    message = refusal(str(tmp_path / "storys.txt"), tokenizer, seq_len=4)
    assert str(tmp_path / "storys.txt") in message
    assert "'stories.txt'" in message
    assert "nowhere" in refusal(str(tmp_path / "nowhere" / "x.txt"), tokenizer, seq_len=4)
    assert "folder" in refusal(str(tmp_path), tokenizer, seq_len=4)
    write(gzip.compress(b"abcdefgh")[:-9], "cut.txt.gz")
    write(b"abc", "none.txt.gz")
    assert "cut.txt.gz" in refusal(str(tmp_path / "cut.txt.gz"), tokenizer, seq_len=4)
    assert "none.txt.gz" in refusal(str(tmp_path / "none.txt.gz"), tokenizer, seq_len=4)
    assert "embedded:topics" in refusal("embedded:topic", tokenizer, seq_len=4)


# Prompt and completion


def test_labels_stand_on_the_completion_and_one_end(tokenizer, write):
    loaded = data.load(write(pairs(("ab", "cd"), ("", "e"), ("f", ""))), tokenizer, seq_len=8)
    assert [x.tolist() for x in loaded.input_ids] == [[1, 3, 4, 5, 6, 2], [1, 7, 2]]
    assert [x.tolist() for x in loaded.labels] == [[-100, -100, -100, 5, 6, 2], [-100, 7, 2]]
    assert (loaded.counts["records"], loaded.counts["empty"], loaded.counts["label_tokens"]) == (3, 1, 5)


def test_without_a_first_token_the_first_label_cannot_be_predicted(write):
    loaded = data.load(write(pairs(("", "ab"))), make_tokenizer(bos=False), seq_len=8)
    assert loaded.labels[0].tolist() == [-100, 4, EOS]


def test_a_tokenizer_that_ends_every_text(write):
    tokenizer = make_tokenizer()
    ends = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokenizer.backend_tokenizer.post_processor = ends
    loaded = data.load(write(pairs(("ab", "c"))), tokenizer, seq_len=8)
    assert loaded.input_ids[0].tolist() == [1, 3, 4, 5, 2]
    assert loaded.labels[0].tolist() == [-100, -100, -100, 5, 2]
    assert flat(data.load(write("ab", "x.txt"), tokenizer, seq_len=4)) == [1, 3, 4, 2]


def test_truncated_and_dropped_records_are_counted(tokenizer, write):
    records = (
        ("a" * 19, "bbbbb"),
        ("a" * 19, "bbbbb"),
        ("aa", "bbbbb"),
        ("aa", "bbbbb"),
        ("a" * 12, "bbbbb"),
    )
    loaded = data.load(write(pairs(*records)), tokenizer, seq_len=16)
    assert [len(x) for x in loaded.input_ids] == [9, 9, 16]
    assert [loaded.label_tokens(i) for i in range(3)] == [6, 6, 3]
    assert all((x == EOS).sum() == 1 for x in loaded.labels[:2])
    expected = {"dropped_records": 2, "dropped_tokens": 52, "truncated_records": 1, "truncated_tokens": 3}
    assert {key: loaded.counts[key] for key in expected} == expected
    batch = data.Batches(loaded, seed=0, micro_batch=3, accumulation=1, rank=0, world_size=1, pad_id=EOS).step(0)
    inputs = batch.micro_batches[0]
    assert (inputs["labels"] == EOS).sum() == 2  # padding with the end token has no label
    assert ((inputs["labels"] == -100) | (inputs["attention_mask"] == 1)).all()
    message = refusal(write(pairs(*records[:2])), tokenizer, seq_len=16)
    assert "label" in message
    assert "16" in message


def test_border_of_a_real_tokenizer(stories, write):
    loaded = data.load(write(pairs(("Answer: ", "the cat"))), stories, seq_len=64)
    joined = [410, 447, 416, 419, 424, 285, 467, 265, 280, 294]
    ids, labels = loaded.input_ids[0], loaded.labels[0]
    assert ids.tolist() == [1, *joined, 2]
    kept = labels[labels != -100]
    assert kept[-1] == 2
    assert stories.decode(kept[:-1]).strip() == "the cat"
    assert stories.decode(ids, skip_special_tokens=True).strip() == "Answer: the cat"
    assert (ids == 1).sum() == 1
    assert ids[0] == 1


def test_records_with_prompts_of_a_real_tokenizer(stories, write):
    prompt, short = "Once upon a time there was a big dog", "Once upon a"
    assert len(stories(short).input_ids) == 4
    loaded = data.load(write(pairs((prompt * 3, " time"), (short, " time"))), stories, seq_len=16)
    assert loaded.counts["dropped_records"] == 1
    assert stories.decode(loaded.labels[0][loaded.labels[0] != -100]).strip() == "time</s>"


def test_records_are_never_packed(tokenizer, write):
    loaded = data.load(write(pairs(("a", "bcd"), ("ab", "cdefg"), ("a", "bc"))), tokenizer, seq_len=32)
    assert [len(x) for x in loaded.input_ids] == [6, 9, 5]


# Embedded corpora


def test_topics_have_no_text_in_common_with_their_held_out_part():
    parts = {}
    for name in ("embedded:topics", "embedded:topics-heldout"):
        parts[name] = list(embedded_documents(name, dict.fromkeys(data.COUNT_KEYS, 0)))
    train, held = parts.values()
    assert 0.1 < len(held) / (len(held) + len(train)) < 0.35
    whole = " ".join(" ".join(train).split())
    for text in held:
        assert " ".join(text.split()) not in whole
        assert all(part not in whole for part in data.embedded._paragraphs(text))


def test_standard_library_is_split_by_name():
    counts = dict.fromkeys(data.COUNT_KEYS, 0)
    train, held = (list(embedded_documents(name, counts)) for name in ("embedded:stdlib", "embedded:stdlib-heldout"))
    assert 0.02 < len(held) / (len(held) + len(train)) < 0.1
    assert held == list(embedded_documents("embedded:stdlib-heldout", counts))


def test_standard_library_leaves_out_tests_and_packages(tmp_path, monkeypatch):
    names = ("a.py", "b/c.py", "test/d.py", "b/tests/e.py", "idlelib/idle_test/f.py", "site-packages/g.py")
    for name in (*names, "dist-packages/h.py", "lib2to3/i.py", "pydoc_data/topics.py", "j.txt", "latin.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() + (b"\xff" if name == "latin.py" else b""))
    monkeypatch.setattr(data.embedded.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    counts = dict.fromkeys(data.COUNT_KEYS, 0)
    found = [text for name in data.EMBEDDED[:2] for text in embedded_documents(name, counts)]
    assert sorted(found) == ["a.py", "b/c.py"]
    assert counts["unreadable"] == 1


def test_embedded_text_is_packed(tokenizer):
    loaded = data.load("embedded:topics-heldout", tokenizer, seq_len=128)
    assert loaded.packed
    assert {len(x) for x in loaded.input_ids} == {128}


# Batches


def numbered(count, length=4):
    """Items that can be told apart: item i holds the token 10 + i alone."""
    ids = [np.full(length, 10 + i, dtype=np.int64) for i in range(count)]
    return data.token_data(ids, ids, packed=True, counts={})


def batches(loaded, micro, accumulation=1, rank=0, world=1, seed=0):
    return data.Batches(
        loaded, seed=seed, micro_batch=micro, accumulation=accumulation, rank=rank, world_size=world, pad_id=0
    )


def rows(step):
    return [int(row[0]) for micro in step.micro_batches for row in micro["input_ids"]]


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)])
def test_every_layout_takes_the_same_items(micro, accumulation, world):
    loaded = numbered(11)
    for k in range(5):
        seen = []
        for rank in range(world):
            layout = batches(loaded, micro, accumulation, rank, world)
            step = layout.step(k)
            assert (layout.steps_per_epoch, layout.unused_per_epoch) == (2, 3)
            assert len(step.micro_batches) == accumulation
            assert (step.label_tokens, step.tokens, step.processed_tokens) == (12, 16, 16)
            seen += rows(step)
        assert sorted(seen) == sorted(rows(batches(loaded, 4).step(k)))


def test_the_place_of_an_item_in_the_global_batch():
    loaded, order = numbered(8), np.random.default_rng([3, 0]).permutation(8) + 10
    steps = [batches(loaded, 2, 2, rank, 2, seed=3).step(0) for rank in range(2)]
    for m in range(2):
        for rank in range(2):
            start = (m * 2 + rank) * 2
            assert steps[rank].micro_batches[m]["input_ids"][:, 0].tolist() == list(order[start : start + 2])


def test_an_epoch_takes_each_item_once_and_steps_stand_alone():
    loaded = numbered(8)
    walk = batches(loaded, 2)
    epochs = [[x for k in range(e * 4, e * 4 + 4) for x in rows(walk.step(k))] for e in range(3)]
    assert all(sorted(epoch) == list(range(10, 18)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert rows(batches(loaded, 2).step(9)) == epochs[2][2:4]  # straight to step 9
    assert rows(batches(loaded, 2, seed=1).step(0)) + rows(batches(loaded, 2, seed=1).step(1)) != epochs[0][:4]


def test_less_than_a_global_batch_is_refused():
    with pytest.raises(ConfigError, match=r"3 sequences.*16 .*micro-batch 8 x accumulation 1 x 2 ranks"):
        batches(numbered(3), 8, world=2)
    layout = batches(numbered(5), 2, world=2)
    assert (layout.steps_per_epoch, layout.unused_per_epoch) == (1, 1)


def test_unequal_records_count_globally(tokenizer, write):
    # 10 and 100 label tokens: completions of 9 and 99 letters and an end each
    loaded = data.load(write(pairs(("a", "b" * 9), ("a", "b" * 99))), tokenizer, seq_len=128)
    assert [loaded.label_tokens(i) for i in range(2)] == [10, 100]
    for micro, accumulation, world in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        counted = 0
        for rank in range(world):
            step = batches(loaded, micro, accumulation, rank, world).step(0)
            assert (step.label_tokens, step.tokens) == (110, 114)
            assert step.processed_tokens == (204 if micro == 2 else 114)
            counted += sum(int((m["labels"][:, 1:] != -100).sum()) for m in step.micro_batches)
        assert counted == 110
    ten = data.load(write(pairs(*[("a", "b")] * 10), "ten.jsonl"), tokenizer, seq_len=8)
    layout = batches(ten, 1, 4)
    assert (layout.steps_per_epoch, layout.unused_per_epoch) == (2, 2)


def test_items_that_no_step_takes_are_counted(tokenizer, write):
    ten = data.load(write(pairs(*[("a", "b" * n) for n in range(1, 11)])), tokenizer, seq_len=32)
    layout = batches(ten, 1, 4)
    taken = [int(i) for k in range(2) for i in layout.items(k).reshape(-1)]
    unused = [len(ten.input_ids[i]) for i in range(10) if i not in taken]
    assert layout.unused(2) == {"unused_items": 2, "unused_tokens": sum(unused)}
    assert layout.unused(1)["unused_items"] == 6
    assert layout.unused(50) == {"unused_items": 0, "unused_tokens": 0}  # another pass leaves out others
    assert sum(layout.step(k).tokens for k in range(2)) + sum(unused) == ten.counts["tokens"]


def test_what_was_lost_is_one_line():
    counts = dict.fromkeys(data.COUNT_KEYS, 0) | {"items": 8, "tokens": 80, "documents": 3}
    metrics = {f"data/train_{key}": value for key, value in counts.items()}
    assert data.left_out(metrics) is None
    assert data.left_out({"loss/train": 1.0}) is None
    metrics |= {"data/train_unused_items": 2, "data/train_dropped_records": 1, "data/heldout_leftover_tokens": 7.0}
    line = data.left_out(metrics)
    assert line == "data not used: train 1 dropped records, train 2 unused items, heldout 7 leftover tokens"


def test_five_records_on_two_ranks_end_together_and_repeat_none():
    """C14: the naive split gives rank 0 [0,1],[4] and rank 1 [2,3],[]."""
    ranks = [batches(numbered(5), 2, rank=rank, world=2) for rank in range(2)]
    assert {x.steps_per_epoch for x in ranks} == {1}
    seen = [row for x in ranks for row in rows(x.step(0))]
    assert len(set(seen)) == len(seen) == 4
    assert ranks[0].unused(1)["unused_items"] == 1
    for count, micro in ((1, 1), (3, 8)):
        with pytest.raises(ConfigError, match=rf"{count} sequences.*global batch of {micro * 2}"):
            batches(numbered(count), micro, world=2)


def test_processed_tokens_count_padding():
    lengths = [10, 90] * 8
    ids = [np.full(n, 5, dtype=np.int64) for n in lengths]
    step = batches(data.token_data(ids, ids, packed=False, counts={}), 16).step(0)
    assert (step.tokens, step.processed_tokens) == (800, 1440)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_evaluation_takes_each_item_once_in_equal_batches(batch, world):
    per_rank = [
        list(data.eval_batches(numbered(7), batch=batch, rank=rank, world_size=world, pad_id=0))
        for rank in range(world)
    ]
    assert len({len(x) for x in per_rank}) == 1
    labelled = [int(row[0]) for x in per_rank for inputs in x for row in inputs["labels"] if (row != -100).any()]
    assert sorted(labelled) == list(range(10, 17))


def test_subsets():
    loaded = numbered(41)
    train, held = data.split_heldout(loaded)
    assert [len(train), len(held)] == [39, 2]
    assert [int(x[0]) for x in held.input_ids] == [49, 50]
    assert (held.counts["tokens"], held.counts["label_tokens"], held.counts["items"]) == (8, 6, 2)
    assert len(data.split_heldout(numbered(2))[1]) == 1
    with pytest.raises(ConfigError, match="1 sequence"):
        data.split_heldout(numbered(1))
    first = data.calibration(loaded, 3)
    assert [x["input_ids"].tolist() for x in first] == [[[10] * 4], [[11] * 4], [[12] * 4]]
    assert all(x["attention_mask"].tolist() == [[1] * 4] for x in first)
    assert len(data.calibration(numbered(2))) == 2
    assert [int(x[0]) for x in loaded.subset([5, 3]).input_ids] == [15, 13]


def test_pad_id(tokenizer):
    assert data.pad_id(tokenizer) == EOS
    assert data.pad_id(make_tokenizer(eos=False)) == 0
    padded = make_tokenizer()
    padded.pad_token = "<s>"
    assert data.pad_id(padded) == BOS


def test_columns_of_one_file_are_taken_for_another_only_if_it_has_them(tmp_path):
    own, same = tmp_path / "own.jsonl", tmp_path / "same.jsonl"
    own.write_text('{"text": "a"}\n')
    same.write_text('\n{"q": "a", "a": "b"}\n')
    columns = {"prompt": "q", "completion": "a"}
    assert data.fitting_columns(str(own), columns) is None
    assert data.fitting_columns(str(same), columns) == columns
    assert data.fitting_columns(str(tmp_path / "plain.txt"), columns) == columns
