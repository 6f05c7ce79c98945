"""Chats: labels on the assistant's words and one end token a turn, whatever the template looks like."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from dlrscale import data
from dlrscale.errors import ConfigError
from dlrscale.models import train_tokenizer

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "models" / "stories260K"
SYSTEM, ASK, ANSWER = (
    {"role": r, "content": c} for r, c in (("system", "Be kind."), ("user", "Hi"), ("assistant", "Ho ho"))
)
AGAIN, BYE = {"role": "user", "content": "Again?"}, {"role": "assistant", "content": "Bye, fox."}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (  # trims, and names each turn by its role
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
PHI3 = (  # closes the whole chat by another token than a turn
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
THINKS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")  # prompts for more than it writes
ALONE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"  # no prompt for an answer
GENERATION = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
)
GENERATION_BLANK = (  # what is marked begins with a blank and leaves the end token out
    "{% for m in messages %}{% if m.role == 'assistant' %}[A]{% generation %} {{ m.content }}{% endgeneration %}"
    "<|im_end|>{% else %}[U] {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SHOUTS = "{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}"
FORGETS = "{% for m in messages %}{{ m.content if loop.last else '...' }}{{ eos_token }}{% endfor %}"
REFUSES = "{{ raise_exception('Roles must\nalternate') }}"
ROLES_ONLY = "{% for m in messages %}{{ m.content }}<|im_start|>{% endfor %}"


@pytest.fixture(scope="module")
def chatty():
    """A byte-level tokenizer with two more special tokens, and an added one that is not special."""
    made = train_tokenizer(["Hi Ho ho. Be kind. Again? Bye, fox. assistant user system"] * 3, 280)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.add_tokens(["<think>"])
    return made


@pytest.fixture
def load(tmp_path, chatty):
    """Load chats with a template."""

    def load(*chats, template=CHATML, seq_len=512, tokenizer=chatty, key="messages", **options):
        path = tmp_path / "chat.jsonl"
        path.write_text("".join(json.dumps({key: chat}) + "\n" for chat in chats))
        return data.load(str(path), tokenizer, seq_len=seq_len, chat_template=template, **options)

    return load


def learnt(loaded, tokenizer, i=0):
    """The labelled stretches of an item, as text."""
    ids, labels = loaded.input_ids[i], loaded.labels[i]
    assert ((labels == data.IGNORE) | (labels == ids)).all()
    runs = np.split(labels, np.flatnonzero(np.diff((labels != data.IGNORE).astype(int))) + 1)
    return [tokenizer.decode(run) for run in runs if run[0] != data.IGNORE]


@pytest.mark.parametrize(
    ("template", "first", "second"),
    [
        (CHATML, "Ho ho<|im_end|>", "Bye, fox.<|im_end|>"),
        (LLAMA2, " Ho ho </s>", " Bye, fox. </s>"),
        (LLAMA3, "Ho ho<|im_end|>", "Bye, fox.<|im_end|>"),
        (PHI3, "Ho ho<|im_end|>", "Bye, fox.<|im_end|>"),
        (THINKS, "Ho ho<|im_end|>", "Bye, fox.<|im_end|>"),
        (ALONE, "Ho ho</s>", "Bye, fox.</s>"),
        (GENERATION, "Ho ho<|im_end|>", "Bye, fox.<|im_end|>"),
        (GENERATION_BLANK, " Ho ho<|im_end|>", " Bye, fox.<|im_end|>"),
    ],
)
def test_labels_are_the_assistants_words_and_one_end(load, chatty, template, first, second):
    loaded = load([SYSTEM, ASK, ANSWER, AGAIN, BYE], [ASK, ANSWER, AGAIN], template=template)
    assert learnt(loaded, chatty, 0) == [first, second]
    assert learnt(loaded, chatty, 1) == [first]  # the user's last turn has no label
    assert not loaded.packed
    counts = loaded.counts
    assert (counts["records"], counts["items"]) == (2, 2)
    expected = chatty.apply_chat_template([SYSTEM, ASK, ANSWER, AGAIN, BYE], chat_template=template)["input_ids"]
    assert loaded.input_ids[0].tolist() == expected  # no first token but the template's own


def test_the_words_of_others_are_never_labelled(load, chatty):
    """The same words from the user, an end token in the words, and two answers in a row."""
    twin = {"role": "user", "content": "Ho ho"}
    marked = {"role": "assistant", "content": "a<|im_end|>b"}
    loaded = load([twin, ANSWER, twin], [ASK, marked], [ASK, ANSWER, BYE])
    assert learnt(loaded, chatty, 0) == ["Ho ho<|im_end|>"]
    assert learnt(loaded, chatty, 1) == ["a<|im_end|>b<|im_end|>"]
    assert learnt(loaded, chatty, 2) == ["Ho ho<|im_end|>", "Bye, fox.<|im_end|>"]


def test_an_assistant_may_begin_and_a_blank_answer_has_no_label(load, chatty):
    blank = {"role": "assistant", "content": " "}
    loaded = load([ANSWER, ASK], [ASK, blank, AGAIN, BYE], [ASK, blank], [ASK])
    assert learnt(loaded, chatty, 0) == ["Ho ho<|im_end|>"]
    assert learnt(loaded, chatty, 1) == ["Bye, fox.<|im_end|>"]
    assert (loaded.counts["items"], loaded.counts["empty"]) == (2, 2)
    assert learnt(load([ASK, blank, AGAIN, BYE], template=GENERATION), chatty) == ["Bye, fox.<|im_end|>"]


def test_chats_that_are_too_long_are_cut_or_dropped(load, chatty):
    length = len(load([SYSTEM, ASK, ANSWER, AGAIN, BYE]).input_ids[0])
    loaded = load([SYSTEM, ASK, ANSWER, AGAIN, BYE], [{"role": "user", "content": "Hi" * 99}, BYE], seq_len=length - 3)
    assert learnt(loaded, chatty) == ["Ho ho<|im_end|>", "Bye, fox"]
    counts = {k: loaded.counts[k] for k in ("truncated_records", "truncated_tokens", "dropped_records")}
    assert counts == {"truncated_records": 1, "truncated_tokens": 3, "dropped_records": 1}
    with pytest.raises(ConfigError, match=r"no label is left of 2 records: 1 have no text to learn, of 1 the 9 tokens"):
        load([ASK], [{"role": "user", "content": "Hi" * 99}, BYE], seq_len=9)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (NO_END, "writes no end token after message 2"),
        (SHOUTS, "rewrites the words of message 2"),
        (FORGETS, "renders the turns before message 2 differently"),
        (
            FORGETS.replace("if loop.last", "if loop.last or m.role == 'user'"),
            "message 2 differently when others follow",
        ),
        (REFUSES, "refuses these messages (Roles must alternate)"),
        (GENERATION_BLANK.replace("{% endgeneration %}<|im_end|>", "{% endgeneration %}"), "writes no end token"),
        ("{{ messages[0].content.x.y }}", "refuses these messages"),
    ],
)
def test_templates_that_hide_the_answer_are_refused(load, template, words):
    with pytest.raises(ConfigError) as caught:
        load([ASK, ANSWER, AGAIN], template=template)
    message = str(caught.value)
    assert "chat.jsonl:1: " in message
    assert words in message
    assert "--chat-template" in message
    assert "\n" not in message


def test_without_a_template_folder_and_option_are_named(load, chatty, tmp_path):
    chatty.save_pretrained(tmp_path / "base")
    bare = AutoTokenizer.from_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=rf"{tmp_path}/base has no chat template.*--chat-template FILE"):
        load([ASK, ANSWER], template=None, tokenizer=bare)
    bare.chat_template = CHATML
    assert learnt(load([ASK, ANSWER], template=None, tokenizer=bare), bare) == ["Ho ho<|im_end|>"]


def test_a_template_that_writes_the_date_writes_the_same_one_always(load, chatty):
    loaded = load([ASK, ANSWER], template="{{ strftime_now('%d %b %Y') }} " + CHATML)
    assert chatty.decode(loaded.input_ids[0]).startswith("26 Jul 2024 <|im_start|>user")
    assert learnt(loaded, chatty) == ["Ho ho<|im_end|>"]


def test_columns_name_the_messages_and_other_keys_do_not_matter(load, chatty):
    noisy = [ASK | {"id": [1], "tool_calls": None}, ANSWER | {"score": 1e400}]
    loaded = load(noisy, key="conversation", columns={"messages": "conversation"})
    assert learnt(loaded, chatty) == ["Ho ho<|im_end|>"]
    with pytest.raises(ConfigError, match=r"'conversation'.*messages=KEY"):
        load([ASK, ANSWER], key="conversation")


def test_template_files(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(GENERATION + "{% for x in messages %}{% if x %}{% continue %}{% endif %}{% endfor %}")
    assert data.read_template(str(file)) == file.read_text()
    assert data.read_template(None) is None
    file.write_text("a\n{% for m in messages %}")
    with pytest.raises(ConfigError, match=r"--chat-template .*chat.jinja:2: .*Mend"):
        data.read_template(str(file))
    with pytest.raises(ConfigError, match="no such file"):
        data.read_template(str(tmp_path / "none.jinja"))


@pytest.mark.parametrize(
    "template", ["{{ bos_token }}" + ALONE, GENERATION.replace("<|im_end|>", "{{ eos_token }}"), LLAMA2]
)
def test_a_real_tokenizer(load, template):
    """SentencePiece-like: a blank is put before each piece of text, and words carry the blank before them."""
    if not STORIES.is_dir():
        pytest.skip("needs the shared model stories260K")
    stories = AutoTokenizer.from_pretrained(STORIES)
    with pytest.raises(ConfigError, match="stories260K has no chat template"):
        load([ASK, ANSWER], template=None, tokenizer=stories)
    loaded = load([SYSTEM, ASK, ANSWER, AGAIN, BYE, ASK], template=template, tokenizer=stories)
    parts = [x.strip().replace(" </s>", "</s>") for x in learnt(loaded, stories)]
    assert parts == ["Ho ho</s>", "Bye, fox.</s>"]
    assert loaded.input_ids[0][0] == 1
    assert (loaded.input_ids[0] == 1).sum() == (3 if template == LLAMA2 else 1)


@pytest.mark.parametrize("answer", ["a", "is", "A", "user"])
def test_a_short_answer_is_not_found_in_the_role(answer, load, chatty):
    loaded = load([ASK, {"role": "assistant", "content": answer}], template=CHATML)
    assert learnt(loaded, chatty) == [f"{answer}<|im_end|>"]
