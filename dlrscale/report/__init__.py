"""Records into what people read: tables, plots and a verdict per claim, as Markdown, HTML and plain text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlrscale import record
from dlrscale.report import page, plots, seeds, tables
from dlrscale.report.claims import Claim, judge
from dlrscale.report.runs import Lock, Run, group

__all__ = ["Claim", "build", "claims", "summary_table"]


def build(places: list[Path], out: Path) -> list[Path]:
    """Write the report of all records below some folders.

    Args:
        places: Folders (or records files) to read.
        out: Folder to write to; made if need be.

    Returns:
        The files written: `report.md`, `report.html`, then the plots below `report_files/`.

    Raises:
        ConfigError: If a place does not exist or holds no record.
    """  # noqa: DOC502
    runs = [Run(folder, values) for folder, values in record.find_records(places)]
    locks = group(runs)
    figures = plots.draw(locks)
    files = out / "report_files"
    files.mkdir(parents=True, exist_ok=True)
    written = [path for figure in figures for path in figure.write(files)]
    blocks = _blocks(runs, locks, figures)
    markdown, html = out / "report.md", out / "report.html"
    record.write_atomic(markdown, page.markdown(blocks, files.name))
    record.write_atomic(html, page.html(blocks))
    return [markdown, html, *written]


def summary_table(records: Sequence[Any]) -> str:
    """The main numbers as aligned plain text, one part per lock.

    Args:
        records: Records, or (folder, record) as `record.find_records` gives them.

    Returns:
        Text of several lines, for a terminal.
    """
    parts = []
    for lock in group(_runs(records)):
        found = [tables.summary(lock), *seeds.blocks(lock)]
        parts.append("\n\n".join([f"{lock.title}\n{page.plain(found[0])}", *map(_named, found[1:])]))
    return "\n\n".join(parts) + "\n" if parts else "No attack and no lock in these records.\n"


def _named(table: page.Table) -> str:
    return f"{table.caption}\n{page.plain(table)}"


def claims(records: Sequence[Any]) -> list[Claim]:
    """A verdict on each of the five claims, from the records alone.

    Args:
        records: Records, or (folder, record) as `record.find_records` gives them.

    Returns:
        C1 to C5, in this order.
    """
    return judge(group(_runs(records)))


def _runs(records: Sequence[Any]) -> list[Run]:
    return [Run(Path("."), r) if isinstance(r, dict) else Run(Path(r[0]), r[1]) for r in records]


def _blocks(runs: list[Run], locks: list[Lock], figures: list[plots.Figure]) -> list[page.Block]:
    """The page from top to bottom."""
    blocks: list[page.Block] = [
        page.Heading(1, "What the lock costs an attacker"),
        page.Text(
            "base is the model before, locked the model after its MLPs were replaced by DLR-Nets; ratio is "
            "locked / base under the same strategy and the same settings. Every number was measured on the "
            "device named below. The lock is our reading of the abstract of DLR-Lock (arXiv 2605.10777)."
        ),
    ]
    blocks += tables.head(runs)
    blocks.append(page.Heading(2, "Claims"))
    for claim in judge(locks):
        blocks.append(page.Verdict(f"{claim.id} {claim.title}", claim.verdict, claim.text))
    if any(lock.run for lock in locks):
        blocks += [page.Heading(2, "Locks"), tables.locks(locks)]
    blocks += [figure for figure in figures if figure.lock is None]
    for lock in locks:
        blocks += [page.Heading(2, lock.title), *tables.sections(lock), *seeds.blocks(lock)]
        blocks += [figure for figure in figures if figure.lock is lock]
    blocks += [page.Heading(2, "All runs"), tables.all_runs(runs)]
    return blocks
