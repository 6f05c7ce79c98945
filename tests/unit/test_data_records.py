"""Borders of prompt and completion, chats, and data sets of the library `datasets`."""

import dataclasses
import json
import os
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from dlrscale import config as configuration
from dlrscale import data
from dlrscale.config import AttackConfig
from dlrscale.errors import ConfigError

BOS, EOS = 1, 2
PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}a: {% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}u: {{ m['content'] }}{% endif %}{% endfor %}"
)
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat here"},
    {"role": "user", "content": "the mat"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "thanks"},
]


def make_tokenizer(template=None):
    """A BPE over letters that joins a blank with the word after it, as SentencePiece's do; `<s>` at the start."""
    letters = [*map(chr, range(33, 127)), "▁", "\n"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a"), ("ca", "t"), ("▁", "cat")]
    tokens = ["<unk>", "<s>", "</s>", *letters, *("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    made.chat_template = template
    return made


def write(folder, *records, name="data.jsonl"):
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder / name)


def refusal(*args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        data.load(*args, **kwargs)
    return str(caught.value)


def labelled(tokenizer, loaded, item=0):
    """The runs of labelled tokens of an item, decoded."""
    runs, run = [], []
    for label in [*loaded.labels[item].tolist(), data.IGNORE]:
        if label != data.IGNORE:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def test_the_prompt_alone_is_no_prefix_of_the_whole(tmp_path):
    tokenizer = make_tokenizer()
    prompt, completion = "Answer: ", "the cat"
    whole = tokenizer(prompt + completion).input_ids
    alone = tokenizer(prompt).input_ids
    assert whole[: len(alone)] != alone  # the effect that the test is about
    loaded = data.load(write(tmp_path, {"prompt": prompt, "completion": completion}), tokenizer, seq_len=64)
    ids = loaded.input_ids[0].tolist()
    assert ids == [*whole, EOS]
    assert (ids[0], ids.count(BOS)) == (BOS, 1)
    assert tokenizer.decode(ids[1:-1]) == "Answer: the cat"
    assert labelled(tokenizer, loaded) == ["the cat</s>"]


@pytest.mark.parametrize(
    ("prompt", "completion", "labels"),
    [
        ("x ca", "t", ["cat</s>"]),  # one token over the border is the completion's
        ("ü", "ü", None),  # the same unknown token in prompt and whole
        ("the", " cat", ["cat</s>"]),
        ("the cat", "\n", None),  # blank: nothing to learn
    ],
)
def test_borders(tmp_path, prompt, completion, labels):
    tokenizer = make_tokenizer()
    records = [{"prompt": prompt, "completion": completion}, {"prompt": "x", "completion": "y"}]
    loaded = data.load(write(tmp_path, *records), tokenizer, seq_len=64)
    if labels:
        assert labelled(tokenizer, loaded) == labels
    else:
        assert loaded.label_tokens(0) == 2
    assert loaded.counts["dropped_records"] == 0


def test_a_fused_unknown_token_over_the_border_has_a_label(tmp_path):
    """Prompt and whole have the same ids here: a border by common ids would drop the record."""
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    loaded = data.load(write(tmp_path, {"prompt": "foo", "completion": "bar"}), tokenizer, seq_len=8)
    assert loaded.labels[0].tolist() == [data.IGNORE, 0, EOS]


def test_a_first_token_in_the_text_is_not_doubled(tmp_path):
    loaded = data.load(write(tmp_path, {"prompt": "<s>the", "completion": " cat"}), make_tokenizer(), seq_len=8)
    assert loaded.input_ids[0].tolist().count(BOS) == 1
    assert labelled(make_tokenizer(), loaded) == ["cat</s>"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_labels_of_a_chat_stand_on_the_assistant_and_its_end(tmp_path, template):
    tokenizer = make_tokenizer(template)
    path = write(tmp_path, {"messages": TURNS}, {"messages": TURNS[:2]}, {"messages": TURNS[1:3]})
    loaded = data.load(path, tokenizer, seq_len=256)
    assert [text.strip() for text in labelled(tokenizer, loaded)] == ["sat here</s>", "the cat</s>"]
    assert labelled(tokenizer, loaded, 1) == ["sat here</s>"]
    assert loaded.counts["records"] == 3
    assert loaded.counts["empty"] == 1  # nobody answers there
    ids = loaded.input_ids[0].tolist()
    assert (ids[0], ids.count(BOS)) == (BOS, 1)
    assert ids == tokenizer(tokenizer.apply_chat_template(TURNS, tokenize=False), add_special_tokens=False).input_ids
    assert not loaded.packed


def test_a_template_from_a_file_and_a_key_of_another_name(tmp_path):
    tokenizer = make_tokenizer()
    path = write(tmp_path, {"chat": TURNS})
    message = refusal(path, tokenizer, seq_len=64, columns={"messages": "chat"})
    assert "--chat-template" in message
    tokenizer.name_or_path = "/some/folder"
    assert "/some/folder" in refusal(path, tokenizer, seq_len=64, columns={"messages": "chat"})
    (tmp_path / "t.jinja").write_text(PLAIN)
    source = data.read_template(str(tmp_path / "t.jinja"))
    loaded = data.load(path, tokenizer, seq_len=256, columns={"messages": "chat"}, chat_template=source)
    assert len(labelled(tokenizer, loaded)) == 2
    with pytest.raises(ConfigError, match="nowhere"):
        data.read_template(str(tmp_path / "nowhere"))


def test_a_template_without_an_opening_labels_the_text_alone(tmp_path):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}</s>{% endfor %}"
    tokenizer = make_tokenizer(template)
    loaded = data.load(write(tmp_path, {"messages": TURNS[:3]}), tokenizer, seq_len=256)
    assert [text.strip() for text in labelled(tokenizer, loaded)] == ["sat here</s>"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "--chat-template"),
        ("{% for m in messages %}{{ m.content }}{% if loop.last %}</s>{% endif %}{% endfor %}", "--chat-template"),
        (PLAIN.replace("== 'assistant'", "== 'assistant' and loop.last"), "--chat-template"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "--chat-template"),
        ("{{ raise_exception('no system turns') }}", "no system turns"),
        ("{% for m in messages %}", "--chat-template"),
    ],
)
def test_templates_that_hide_the_assistant_are_refused(tmp_path, template, words):
    message = refusal(write(tmp_path, {"messages": TURNS}), make_tokenizer(template), seq_len=64)
    assert "data.jsonl:1: " in message
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hi", '"hi", no list of turns'),
        ([], "no list of turns"),
        (["hi"], "no list of turns"),
        ([{"role": "user"}], "'content' of turn 1"),
        ([TURNS[0], {"role": 5, "content": "a"}], "'role' of turn 2"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
    ],
)
def test_bad_turns_are_named(tmp_path, messages, words):
    path = write(tmp_path, {"messages": TURNS}, {"messages": messages})
    message = refusal(path, make_tokenizer(PLAIN), seq_len=64)
    assert "data.jsonl:2: " in message
    assert words in message


def test_chats_are_cut_and_dropped_like_records(tmp_path):
    tokenizer = make_tokenizer(PLAIN)
    long = [{"role": "user", "content": "x" * 80}, {"role": "assistant", "content": "y"}]
    cut = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 80}]
    loaded = data.load(write(tmp_path, {"messages": long}, {"messages": cut}), tokenizer, seq_len=64)
    assert len(loaded) == 1
    assert (loaded.counts["dropped_records"], loaded.counts["truncated_records"]) == (1, 1)


# Data sets


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def test_folders_of_data_sets(tmp_path, datasets):
    tokenizer = make_tokenizer(PLAIN)
    rows = {"prompt": ["the", "a"], "completion": [" cat", " mat"], "n": [1, 2], "chat": [TURNS, TURNS[1:3]]}
    table = datasets.Dataset.from_dict(rows)
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(str(tmp_path / "split"))
    (tmp_path / "parquet").mkdir()
    table.to_parquet(str(tmp_path / "parquet" / "part.parquet"))
    expected = data.load(
        write(tmp_path, *({k: rows[k][i] for k in ("prompt", "completion")} for i in range(2))), tokenizer, seq_len=32
    )
    for name in ("saved", "split", "parquet"):
        place = str(tmp_path / name)
        data.check_place(place)
        loaded = data.load(place, tokenizer, seq_len=32)
        assert [x.tolist() for x in loaded.labels] == [x.tolist() for x in expected.labels]
        chats = data.load(place, tokenizer, seq_len=256, columns={"messages": "chat"})
        assert len(labelled(tokenizer, chats)) == 2
    columns = {"text": "nope"}
    assert data.fitting_columns(place, columns) is None
    message = refusal(str(tmp_path / "saved"), tokenizer, seq_len=32, columns=columns)
    assert "saved: row 0" in message
    assert "'completion'" in message
    assert "row 0: 'n' is 1" in refusal(str(tmp_path / "saved"), tokenizer, seq_len=32, columns={"text": "n"})


def test_folders_that_hold_no_data_set(tmp_path, datasets):
    folder = tmp_path / "stuff"
    folder.mkdir()
    assert "stuff" in refusal(str(folder), make_tokenizer(), seq_len=4)
    (folder / "a.txt").write_text("the cat")
    assert "Name the data file" in refusal(str(folder), make_tokenizer(), seq_len=4)
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in "ab"}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "two"))
    assert "the splits a, b" in refusal(str(tmp_path / "two"), make_tokenizer(), seq_len=4)
    assert len(data.load(str(tmp_path / "two" / "b"), make_tokenizer(), seq_len=3)) == 1


def test_names_on_the_hub(tmp_path, monkeypatch, datasets):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = refusal("hf:nobody/nothing@test", make_tokenizer(), seq_len=4)
    assert "offline" in message
    assert "hf:nobody/nothing@test" in message
    with pytest.raises(ConfigError, match="Write hf:org/name"):
        data.check_place("hf:a b")
    data.check_place("hf:nobody/nothing")
    os.makedirs("nobody/nothing")
    with pytest.raises(ConfigError, match="is here too"):
        data.pin("hf:nobody/nothing")
    assert data.pin("embedded:topics") == "embedded:topics"


def test_a_cached_data_set_of_the_hub_is_read_offline(tmp_path, monkeypatch, datasets):
    """The cache as `datasets` leaves it after a download; it is read without a connection."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    source = tmp_path / "name"
    source.mkdir()
    for split, count in (("train", 5), ("test", 2)):
        write(source, *[{"prompt": "the", "completion": " cat"}] * count, name=f"{split}.jsonl")
    datasets.load_dataset(str(source))
    shutil.rmtree(source)
    made = next((tmp_path / "cache").rglob("dataset_info.json")).parent
    copy = tmp_path / "cache" / "org___name" / "default" / "0.0.0" / ("ab" * 20)
    shutil.copytree(made, copy)
    pinned = data.pin("hf:org/name")
    assert pinned.startswith("hf:org/name@train#")
    assert data.pin(pinned) == pinned
    assert len(data.load(pinned, make_tokenizer(), seq_len=8)) == 5
    assert len(data.load("hf:org/name@test", make_tokenizer(), seq_len=8)) == 2
    assert "nope" in refusal("hf:org/name@nope", make_tokenizer(), seq_len=8)
    shutil.move(copy, copy.with_name("cd" * 20))  # another revision
    assert "another one now" in refusal(pinned, make_tokenizer(), seq_len=8)


def test_identity_of_folders_templates_and_names(tmp_path):
    folder = tmp_path / "set"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "a.arrow").write_bytes(b"one")
    before = configuration.digest(str(folder))
    (folder / ".cache").write_bytes(b"no matter")
    assert configuration.digest(str(folder)) == before
    (folder / "train" / "a.arrow").write_bytes(b"two!")
    assert configuration.digest(str(folder)) != before
    (tmp_path / "t.jinja").write_text("a")
    run = AttackConfig(model="", data="hf:a/b@train#12", out="", chat_template=str(tmp_path / "t.jinja"))
    first = configuration.identify(run, {})
    assert first["data"] == "hf:a/b@train#12"
    (tmp_path / "u.jinja").write_text("a")
    moved = dataclasses.replace(run, chat_template=str(tmp_path / "u.jinja"))
    assert configuration.identify(moved, {}) == first
    (tmp_path / "u.jinja").write_text("bc")
    assert configuration.identify(moved, {}) != first


def test_held_out_data_of_several_splits_name_one(tmp_path, datasets, llama_folder, capsys, monkeypatch):
    """`train` is the usual split of the data that are trained on, and must not become the held-out data unseen."""
    from dlrscale import cli

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    table = datasets.Dataset.from_dict({"text": ["the cat sat on a mat " * 40] * 4})
    place = tmp_path / "split"
    datasets.DatasetDict(train=table, test=table).save_to_disk(str(place))
    line = ["attack", "--model", str(llama_folder), "--strategy", "full", "--data", str(place), "--seq-len", "16",
            "--micro-batch", "1", "--tracking-uri", "none", "--dry-run", "--heldout"]  # fmt: skip
    for held, code in ((place, 2), (place / "test", 0)):
        with pytest.raises(SystemExit) as stop:
            cli.main([*line, str(held)])
        assert stop.value.code == code
    assert f"{place}: held-out data of the splits train, test. Name one" in capsys.readouterr().err


def test_an_unread_number_of_any_length_does_not_matter(tmp_path):
    file = tmp_path / "long.jsonl"
    file.write_text('{"text": "the cat", "n": ' + "9" * 5000 + "}\n")
    assert len(data.load(str(file), make_tokenizer(), seq_len=3)) == 1
    file.write_text('{"text": ' + "9" * 5000 + "}\n")
    assert "'text' is" in refusal(str(file), make_tokenizer(), seq_len=3)
