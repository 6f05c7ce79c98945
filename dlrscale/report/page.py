"""Blocks of a page, written as Markdown, as one self-contained HTML file, or as plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

MISSING = "-"
STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881;
  --good: #2b8a3e; --bad: #c92a2a; --open: #b36b00; }
@media (prefers-color-scheme: dark) { :root { --good: #69db7c; --bad: #ff8787; --open: #ffc078; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 0 auto; padding: 1rem 1.5rem 4rem;
  background: Canvas; color: CanvasText; }
h1 { font-size: 1.6rem; } 
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .25rem; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { background: var(--soft); vertical-align: bottom; } thead th.group { text-align: center; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.wrap { white-space: normal; min-width: 14rem; }
.start { border-left: 1px solid var(--line); }
.verdict { border-left: .3rem solid var(--open); padding: .1rem .9rem; margin: .8rem 0;
  background: var(--soft); }
.verdict.stands { border-color: var(--good); } .verdict.falls { border-color: var(--bad); }
.verdict b.v { color: var(--open); } .stands b.v { color: var(--good); } .falls b.v { color: var(--bad); }
.verdict p, .verdict ul { margin: .3rem 0; }
figure { margin: 1rem 0; overflow-x: auto; } figure svg { max-width: 100%; height: auto; }
figcaption, .note { font-size: .875rem; opacity: .8; }
pre { overflow-x: auto; padding: .6rem; background: var(--soft); font-size: .8rem; }
"""


class Block(Protocol):
    """A part of the page."""

    def markdown(self, folder: str) -> str:
        """As Markdown; `folder` is where the plots lie."""

    def html(self) -> str:
        """As HTML."""


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 to 3."""

    level: int
    text: str

    def markdown(self, folder: str) -> str:
        """As Markdown."""
        return "#" * self.level + " " + plain_markdown(self.text)

    def html(self) -> str:
        """As HTML."""
        return f"<h{self.level}>{escape(self.text)}</h{self.level}>"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str

    def markdown(self, folder: str) -> str:
        """As Markdown."""
        return plain_markdown(self.text)

    def html(self) -> str:
        """As HTML."""
        return f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    text: str

    def markdown(self, folder: str) -> str:
        """As Markdown."""
        ticks = max([2, *(len(run) for run in re.findall("`+", self.text))]) + 1
        return f"{'`' * ticks}\n{self.text}\n{'`' * ticks}"

    def html(self) -> str:
        """As HTML."""
        return f"<pre>{escape(self.text)}</pre>"


@dataclass(frozen=True)
class Verdict:
    """A claim, the verdict on it, and one line of reason per lock."""

    title: str
    verdict: str
    text: str

    def markdown(self, folder: str) -> str:
        """As Markdown."""
        lines = "\n".join(f"- {plain_markdown(line)}" for line in self.text.splitlines() if line)
        return f"**{plain_markdown(self.title)}: {self.verdict}**\n\n{lines}"

    def html(self) -> str:
        """As HTML."""
        lines = "".join(f"<li>{escape(line)}</li>" for line in self.text.splitlines() if line)
        word = escape(self.verdict)
        css = self.verdict if self.verdict in ("stands", "falls") else "open"
        head = f'<p><b>{escape(self.title)}</b>: <b class="v">{word}</b></p>'
        return f'<div class="verdict {css}">{head}<ul>{lines}</ul></div>'


@dataclass(frozen=True)
class Table:
    """A table whose columns may stand in named groups.

    `groups` holds (name, columns); the columns of all groups together are those of each row. Columns of a
    group without a name are texts.
    """

    caption: str
    groups: Sequence[tuple[str, Sequence[str]]]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def columns(self) -> list[str]:
        """One title per column, with the name of its group."""
        return [f"{group} {name}".strip() for group, names in self.groups for name in names]

    def markdown(self, folder: str) -> str:
        """As Markdown."""
        texts = [not group for group, names in self.groups for _ in names]
        lines = [self.columns, ["---" if text else "---:" for text in texts], *self.rows]
        body = [
            "| " + " | ".join(cell if i == 1 else plain_markdown(cell) for cell in line) + " |"
            for i, line in enumerate(lines)
        ]
        parts = [f"**{plain_markdown(self.caption)}**"] if self.caption else []
        parts.append("\n".join(body))
        return "\n\n".join(parts + ([plain_markdown(self.note)] if self.note else []))

    def html(self) -> str:
        """As HTML."""
        css = []
        for group, names in self.groups:
            css += [("start" if group and not i else "") if group else "text" for i in range(len(names))]
        head = ""
        if any(group for group, _ in self.groups):
            head = "".join(
                f'<th colspan="{len(names)}" class="group start">{escape(group)}</th>'
                if group
                else f'<th colspan="{len(names)}"></th>'
                for group, names in self.groups
            )
            head = f"<tr>{head}</tr>"
        names = [name for _, names in self.groups for name in names]
        head += "<tr>" + "".join(_cell("th", n, c) for n, c in zip(names, css, strict=True)) + "</tr>"
        body = ""
        for row in self.rows:
            cells = (
                _cell("td", v, c + (" wrap" if len(v) > 40 and c == "text" else ""))
                for v, c in zip(row, css, strict=True)
            )
            body += "<tr>" + "".join(cells) + "</tr>\n"
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        thead = f"<thead>{head}</thead>" if any(names) else ""
        table = f"<table>{caption}{thead}<tbody>{body}</tbody></table>"
        return f'<div class="scroll" tabindex="0">{table}</div>{note}'


def _cell(tag: str, text: str, css: str) -> str:
    mark = f' class="{css}"' if css else ""
    return f"<{tag}{mark}>{escape(text)}</{tag}>"


def plain_markdown(text: str) -> str:
    """A text in which Markdown and HTML find nothing to interpret."""
    text = " ".join(str(text).split())
    text = re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("://", ":&#47;&#47;")


def plain(table: Table) -> str:
    """A table as aligned plain text, the groups of columns in a line above."""
    names = [name for _, columns in table.groups for name in columns]
    lines = [[re.sub(r"[^\x20-\x7e\u00a0-\uffff]", "?", cell) for cell in line] for line in (names, *table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    texts = [not group for group, columns in table.groups for _ in columns]
    above, first = [], 0
    for group, columns in table.groups:
        mine = range(first, first + len(columns))
        first += len(columns)
        widths[mine[-1]] += max(0, len(group) - sum(widths[i] + 2 for i in mine) + 2)
        room = sum(widths[i] + 2 for i in mine) - 2
        above.append(f" {group} ".center(room, "-") if group and len(mine) > 1 else group.rjust(room))
    rows = [
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, texts, strict=True)
        ).rstrip()
        for line in lines
    ]
    rows.insert(1, "  ".join("-" * width for width in widths))
    if any(group for group, _ in table.groups):
        rows.insert(0, "  ".join(above).rstrip())
    return "\n".join(rows + ([table.note] if table.note else []))


def markdown(blocks: Sequence[Block], folder: str) -> str:
    """The page as Markdown; plots are links into a folder beside it."""
    return "\n\n".join(block.markdown(folder) for block in blocks) + "\n"


def html(blocks: Sequence[Block]) -> str:
    """The page as one HTML file that asks for nothing else."""
    body = "\n".join(block.html() for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>dlrscale report</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )
