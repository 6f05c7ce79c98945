"""Chats through the tokenizer's template, and which part of the rendered text the assistant wrote.

Few templates mark that part themselves (`{% generation %}`). For the others it is found by rendering the chat turn by
turn: what a turn adds to the text before it is that turn, and the assistant's words stand in it, closed by a special
token. Where a template does not render like that, the data are refused: a wrong label would not be seen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlrscale.data.read import read_text
from dlrscale.data.tokens import Example
from dlrscale.errors import ConfigError

Message = dict[str, str]
Span = tuple[int, int]  # characters of the rendered text, the end not included
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
# A template that writes today's date would give other tokens on another day.
_FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the tokenizer whose special tokens it writes.

    Attributes:
        tokenizer: The tokenizer.
        source: The template's text.
        ends: Matches what may close a turn: any added token but blanks and the first token.
    """

    tokenizer: Any
    source: str
    ends: re.Pattern[str]


def read_template(file: str | None) -> str | None:
    """The text of a template file.

    Args:
        file: The file, or None.

    Returns:
        Its text, or None.

    Raises:
        ConfigError: If it is missing or is no template.
    """
    if file is None:
        return None
    import jinja2

    if not Path(file).is_file():
        raise ConfigError(f"--chat-template {file}: no such file. Give a Jinja file.")
    text = read_text(Path(file))
    try:
        # `generation` is a tag of transformers' own
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", text))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"--chat-template {file}:{error.lineno}: {error.message}. Mend the template.") from None
    return text


def chat_template(tokenizer: Any, given: str | None) -> ChatTemplate:
    """The template of a tokenizer, or the one given for it.

    Args:
        tokenizer: A Hugging Face tokenizer.
        given: A template's text that goes before the tokenizer's own, or None.

    Returns:
        The template.

    Raises:
        ConfigError: If there is none.
    """
    try:
        source = given or tokenizer.get_chat_template()
    except ValueError:
        raise ConfigError(
            f"The tokenizer in {tokenizer.name_or_path} has no chat template, which records of messages need. Give "
            "one with --chat-template FILE (Jinja)."
        ) from None
    if "strftime_now" in source:
        source = _FIXED_DATE + source
    one_for_both = tokenizer.bos_token == tokenizer.eos_token
    added = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
    names = [name for name in added if name.strip() and (one_for_both or name != tokenizer.bos_token)]
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return ChatTemplate(tokenizer, source, re.compile("|".join(map(re.escape, longest_first)) or "(?!)"))


def example(place: str, messages: Sequence[Message], template: ChatTemplate) -> Example:
    """A chat as the template writes it, with labels on what `render` finds."""
    text, spans = render(place, messages, template)
    return Example(text, tuple(spans), bare=True)


def render(place: str, messages: Sequence[Message], template: ChatTemplate) -> tuple[str, list[Span]]:
    """Render a chat; what the assistant wrote gets a label: its words and the token that ends its turn.

    Turns of the assistant without words get no label.

    Args:
        place: Where the chat stands, for messages.
        messages: Role and content of each turn.
        template: The template.

    Returns:
        The text, and the spans to label, in order.

    Raises:
        ConfigError: If the template refuses the chat, writes no end token, or changes what stood before.
    """
    if _GENERATION.search(template.source):
        text, marked = _apply(place, messages, template, spans=True)
        spans = [_close_marked(place, text, span, template) for span in marked]
        return text, [span for span in spans if span is not None]
    text, _ = _apply(place, messages, template)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and message["content"].strip():
            spans.append(_turn(place, text, messages[: i + 1], template))
    return text, spans


def _turn(place: str, text: str, messages: Sequence[Message], template: ChatTemplate) -> Span:
    """The span of the last of some messages, the assistant's, in the text of the whole chat."""
    done, _ = _apply(place, messages, template)
    number, words = len(messages), messages[-1]["content"].strip()
    for prompt in (True, False):  # some templates prompt for more than they write (the start of a thought)
        head = _apply(place, messages[:-1], template, prompt=prompt)[0] if number > 1 else ""
        if text.startswith(head) and done.startswith(head):
            break
    else:
        raise ConfigError(
            f"{place}: the chat template renders the turns before message {number} differently once it follows, so "
            "that the assistant's part cannot be found. Mark it with {% generation %} in a template of your own "
            "(--chat-template FILE)."
        )
    for end in template.ends.finditer(done, len(head)):
        before = done[len(head) : end.start()].rstrip()
        if before.endswith(words):
            break
    else:
        written = words in done[len(head) :]
        raise ConfigError(
            f"{place}: the chat template "
            + (f"writes no end token after message {number}" if written else f"rewrites the words of message {number}")
            + ". Give one that writes the assistant's words and {{ eos_token }} (--chat-template FILE)."
        )
    if not text.startswith(done[: end.end()]):
        raise ConfigError(
            f"{place}: the chat template renders message {number} differently when others follow. Mark the "
            "assistant's part with {% generation %} in a template of your own (--chat-template FILE)."
        )
    start = len(head) + len(before) - len(words)
    if not done[len(head) : start].strip():
        start = len(head)  # blanks that the prompt for an answer does not hold are the assistant's too
    return start, end.end()


def _close_marked(place: str, text: str, span: Span, template: ChatTemplate) -> Span | None:
    """A span that the template marked, from its start to one end token; None where it holds no words."""
    start, stop = span
    inside = list(template.ends.finditer(text, start, stop))
    last = inside[-1] if inside and not text[inside[-1].end() : stop].strip() else None
    if not text[start : last.start() if last else stop].strip():
        return None
    if last is None:
        blanks = len(text[stop:]) - len(text[stop:].lstrip())
        last = template.ends.match(text, stop + blanks)
    if last is None:
        raise ConfigError(
            f"{place}: the chat template writes no end token after what it marks with {{% generation %}}. Write "
            "{{ eos_token }} there (--chat-template FILE)."
        )
    return start, last.end()


def _apply(
    place: str, messages: Sequence[Message], template: ChatTemplate, *, prompt: bool = False, spans: bool = False
) -> tuple[str, list[Span]]:
    """Render messages, with the prompt for an answer if asked; and the spans that the template marks, if asked.

    The tokenizer's own mask is not used: it stops at the first marked part that begins with a blank.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, marked = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template.source,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=spans,
            **template.tokenizer.special_tokens_map,
        )
    except Exception as error:  # a template is foreign code
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"{place}: the chat template refuses these messages ({reason}). Mend them, or give another template with "
            "--chat-template FILE."
        ) from None
    return texts[0], [tuple(span) for span in marked[0]] if marked else []
