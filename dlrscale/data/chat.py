"""Chat records: turns of role and content, written out by a chat template, with labels on the assistant's text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from dlrscale.data.tokens import Example
from dlrscale.errors import ConfigError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def read_template(place: str | None) -> str | None:
    """The source in the file of `--chat-template`.

    Args:
        place: The file, or None.

    Returns:
        Its text, or None.

    Raises:
        ConfigError: If it cannot be read.
    """
    if place is None:
        return None
    try:
        return Path(place).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {place}: cannot be read ({error}). Give a text file (jinja).") from None


def template(tokenizer: Any, text: str | None) -> str:
    """The chat template in force.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: The template of `--chat-template`, or None for the tokenizer's own.

    Returns:
        Its source (jinja).

    Raises:
        ConfigError: If there is none, or if the tokenizer cannot tell where its tokens stand.
    """
    place = tokenizer.name_or_path or "of this run"
    if not tokenizer.is_fast:
        raise ConfigError(
            f"The tokenizer {place} does not tell the places of its tokens, which the labels of chat records need. "
            "Take one with a tokenizer.json."
        )
    if text is not None:
        return text
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise ConfigError(
            f"The tokenizer {place} has no chat template, and the data hold chat records. "
            "Give one with --chat-template FILE (jinja)."
        ) from None


def example(place: str, messages: Sequence[Mapping[str, Any]], tokenizer: Any, source: str) -> Example:
    """Write a chat out, and find what the assistant says in it.

    Args:
        place: Where the record stands, for messages.
        messages: Its turns.
        tokenizer: A Hugging Face tokenizer.
        source: The template.

    Returns:
        The text; its spans are the assistant's texts with their end tokens. Where the template marks them with
        `{% generation %}`, they are what it marks.

    Raises:
        ConfigError: If the template fails, or does not write the first turns of a chat as it writes them alone.
    """
    messages = [dict(message) for message in messages]
    if _GENERATION.search(source):
        return _marked(place, messages, tokenizer, source)
    whole = _render(place, messages, tokenizer, source)
    ends = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""})
    end = re.compile(r"\s*(?:" + "|".join(map(re.escape, ends)) + ")") if ends else None
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"].strip():
            continue
        plain = _render(place, messages[:i], tokenizer, source) if i else ""
        opened = _render(place, messages[:i], tokenizer, source, prompt=True) if i else ""
        upto = _render(place, messages[: i + 1], tokenizer, source)
        start = upto.find(message["content"].strip(), len(plain))
        if not (upto.startswith(plain) and whole.startswith(upto)) or start < 0:
            raise ConfigError(
                f"{place}: the chat template does not write turn {i + 1} as a continuation of the turns before it, "
                "so the assistant's text cannot be found. Mark it in the template with {% generation %}, or give "
                "another one with --chat-template FILE."
            )
        stop = start + len(message["content"].strip())
        # What is written between the opening of the turn and its text is for the model to write too.
        if opened != plain and upto.startswith(opened) and len(opened) <= start:
            start = len(opened)
        closing = end.match(upto, stop) if end else None
        spans.append((start, closing.end() if closing else len(upto)))
    return Example(whole, tuple(spans), bare=True)


def _render(place: str, messages: list[dict], tokenizer: Any, source: str, prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=prompt
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise _refused(place, messages, error) from None


def _refused(place: str, messages: list[dict], error: Exception) -> ConfigError:
    return ConfigError(
        f"{place}: the chat template refuses its first {len(messages)} turns "
        f"({' '.join(str(error).split()) or type(error).__name__}). Mend the record, or give another template with "
        "--chat-template FILE."
    )


def _marked(place: str, messages: list[dict], tokenizer: Any, source: str) -> Example:
    """The text and the spans that the template marks by itself."""
    whole = _render(place, messages, tokenizer, source)
    try:
        found = tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        )  # fmt: skip
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise _refused(place, messages, error) from None
    marked = zip(found["offset_mapping"], found["assistant_masks"], strict=True)
    return Example(whole, tuple((start, end) for (start, end), mask in marked if mask), bare=True)
