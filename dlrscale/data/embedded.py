"""Corpora that every Python interpreter has with it, so that a demonstration needs no download."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from dlrscale.errors import ConfigError

EMBEDDED = ("embedded:stdlib", "embedded:stdlib-heldout", "embedded:topics", "embedded:topics-heldout")
_STDLIB_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__", "pydoc_data"}
)
_LONG_PARAGRAPH = 60  # characters; shorter paragraphs may stand in both parts of a corpus


def embedded_documents(name: str, counts: dict[str, int]) -> Iterator[str]:
    """The documents of an embedded corpus."""
    if name not in EMBEDDED:
        raise ConfigError(f"No embedded corpus {name!r}. There are: {', '.join(EMBEDDED)}.")
    heldout = name.endswith("-heldout")
    return _topics(heldout, counts) if "topics" in name else _stdlib(heldout, counts)


def _share(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _stdlib(heldout: bool, counts: dict[str, int]) -> Iterator[str]:
    """The source files of the running interpreter's standard library; about 5 % of them are held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _STDLIB_LEFT_OUT.intersection(relative.parts) or (_share(relative.as_posix()) < 0.05) != heldout:
            continue
        try:
            yield path.read_text(encoding="utf-8").strip("\n")
        except (OSError, UnicodeDecodeError):
            counts["unreadable"] += 1


def _paragraphs(text: str) -> set[str]:
    """The long paragraphs of a text, whatever its line breaks and blanks; the whole text if it has none."""
    joined = [" ".join(part.split()) for part in text.split("\n\n")]
    return {part for part in joined if len(part) >= _LONG_PARAGRAPH} or {" ".join(text.split())}


def _topics(heldout: bool, counts: dict[str, int]) -> Iterator[str]:
    """Python's help topics; about 15 % are held out.

    Topics repeat one another's text, so training leaves out those that share a paragraph with a held-out one.
    """
    from pydoc_data.topics import topics

    held = {key for key in topics if _share(f"embedded:topics/{key}") < 0.15}
    seen: set[str] = set().union(*(_paragraphs(topics[key]) for key in held))
    for key in sorted(topics):
        if (key in held) != heldout:
            continue
        if not heldout and _paragraphs(topics[key]) & seen:
            counts["overlapping"] += 1
            continue
        yield topics[key].strip("\n")
