"""The plots of the report: drawn once, written as PNG and SVG files and put inline into the HTML."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from dlrscale.report.claims import SAVED, SAVED_MLP, by_depth
from dlrscale.report.page import plain_markdown
from dlrscale.report.rows import rows
from dlrscale.report.runs import Lock, Pair, Run

POINTS = 400  # a line is thinned to about so many points
INK = "#010203"  # stands for the page's own text colour in inline drawings
BASE_COLOUR, LOCKED_COLOUR = "#3b8bd4", "#d9772b"
FORMULA = "memory/saved_mlp_bytes_per_token_formula"


@dataclass(frozen=True, eq=False)
class Figure:
    """One plot: its file name without the ending, what it shows, and the lock that it is of (or none)."""

    name: str
    caption: str
    lock: Lock | None
    png: bytes
    svg: str

    def write(self, folder: Path) -> list[Path]:
        """Write the PNG and the SVG file into a folder; returns their paths."""
        png, svg = folder / f"{self.name}.png", folder / f"{self.name}.svg"
        png.write_bytes(self.png)
        svg.write_text(self.svg.replace(INK, "#000000"), encoding="utf-8")
        return [png, svg]

    def markdown(self, folder: str) -> str:
        """As Markdown: the PNG, which every viewer shows."""
        text = plain_markdown(self.caption)
        return f"![{text}]({folder}/{self.name}.png)\n\n{text}"

    def html(self) -> str:
        """As HTML, in the page's own text colour."""
        svg = self.svg[self.svg.index("<svg") :].replace(INK, "currentColor")
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(self.caption)}" ', 1)
        return f"<figure>{svg}<figcaption>{escape(self.caption)}</figcaption></figure>"


def draw(locks: Sequence[Lock]) -> list[Figure]:
    """All plots that the records have something for."""
    figures = []
    for number, lock in enumerate(locks, 1):
        name = f"{number:02d}-{re.sub(r'[^0-9a-zA-Z]', '', lock.id or 'base')[:8]}"
        figures += [_loss(lock, f"loss-{name}"), _memory(lock, f"memory-{name}")]
    for number, runs in enumerate(by_depth(locks), 1):
        figures.append(_depth(runs, f"saved-against-depth-{number:02d}"))
    return [figure for figure in figures if figure is not None]


def _canvas(width: float, height: float) -> Any:
    """An empty matplotlib figure that needs no display."""
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width, height), layout="constrained")


def _style(name: str) -> dict[str, Any]:
    return {
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
        "ytick.color": INK,
        "axes.facecolor": "none", "legend.facecolor": "none", "legend.edgecolor": "none", "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none", "svg.hashsalt": name,
        "axes.titlesize": 10, "hatch.color": INK, "hatch.linewidth": 0.6, "text.parse_math": False,
        "font.family": ["DejaVu Sans"],
    }  # fmt: skip


def _finish(canvas: Any, name: str, caption: str, lock: Lock | None) -> Figure:
    """Save a canvas in both formats, without dates or the writer's name."""
    svg, png = io.StringIO(), io.BytesIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    canvas.savefig(svg, format="svg", transparent=True, metadata=empty)
    canvas.savefig(png, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    text = re.sub(r"<!DOCTYPE.*?>\s*", "", svg.getvalue(), flags=re.S)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    return Figure(name, caption, lock, png.getvalue(), text)


def _series(run: Run | None, metric: str) -> tuple[list[float], list[float]]:
    """Tokens and values of a metric of the step rows, thinned."""
    if run is None:
        return [], []
    points = [
        (row["tokens"], row[metric])
        for row in run.steps
        if isinstance(row.get("tokens"), (int, float)) and isinstance(row.get(metric), (int, float))
    ]
    every = max(1, math.ceil(len(points) / POINTS))
    points = [p for i, p in enumerate(points) if i % every == 0 or i == len(points) - 1]
    return [p[0] for p in points], [p[1] for p in points]


def _sides(pair: Pair) -> list[tuple[Run | None, str, str, str, str]]:
    return [(pair.base, "base", BASE_COLOUR, "--", "o"), (pair.locked, "locked", LOCKED_COLOUR, "-", "s")]


def _shown(lock: Lock) -> list[Pair]:
    """One pair for each setting, the first seed's, under the name of the setting."""
    return [replace(row.pairs[0], label=row.name) for row in rows(lock)]


def _seed(pairs: Sequence[Pair], lock: Lock) -> str:
    return ", the first seed of each" if len(pairs) < len(lock.pairs) else ""


def _loss(lock: Lock, name: str) -> Figure | None:
    """Loss against tokens: a panel per strategy, base dashed, locked solid."""
    import matplotlib

    pairs = _shown(lock)
    shown = [p for p in pairs if _series(p.base, "loss/train")[0] or _series(p.locked, "loss/train")[0]]
    if not shown:
        return None
    across = min(3, len(shown))
    down = math.ceil(len(shown) / across)
    with matplotlib.rc_context(_style(name)):
        canvas = _canvas(max(4.5, 3.3 * across), 2.6 * down + 0.7)
        axes = canvas.subplots(down, across, squeeze=False, sharey=True).flatten()
        for ax, pair in zip(axes, shown, strict=False):
            for run, side, colour, line, mark in _sides(pair):
                x, y = _series(run, "loss/train")
                ax.plot(x, y, line, color=colour, lw=1.3, label=f"{side}, training")
                x, y = _series(run, "loss/heldout_task")
                if x:
                    ax.plot(x, y, mark, color=colour, ms=4, mec=INK, mew=0.5, label=f"{side}, held-out")
            ax.set_title(_short(pair.label), loc="left")
            ax.set_xlabel("tokens trained on")
            ax.grid(alpha=0.25)
            ax.label_outer()
            ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
            ax.set_xlabel("tokens trained on")
            ax.tick_params(labelbottom=True)
        for ax in axes[::across]:
            ax.set_ylabel("loss (nats per token)")
        for ax in axes[len(shown) :]:
            ax.remove()
        labels = {
            text: line for ax in axes[: len(shown)] for line, text in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        canvas.legend(labels.values(), labels.keys(), loc="outside lower left", ncols=min(4, len(labels)))
        canvas.suptitle("Loss against tokens", x=0.01, ha="left", fontsize=11)
        return _finish(canvas, name, f"Loss against tokens by strategy{_seed(pairs, lock)}. {lock.title}", lock)


def _short(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _memory(lock: Lock, name: str) -> Figure | None:
    """Bars of saved bytes per token and of the peak, by strategy and side."""
    import matplotlib

    pairs = _shown(lock)
    saved = [pair.both(SAVED) for pair in pairs]
    peaks = [pair.peaks() for pair in pairs]
    panels = [
        (values, title)
        for values, title in ((saved, "Saved for backward, per token"), (peaks, "Peak memory" + _where(pairs)))
        if any(v for both in values for v in both)
    ]
    if not panels:
        return None
    with matplotlib.rc_context(_style(name)):
        canvas = _canvas(10, max(2.4, 0.62 * len(pairs) + 1.5))
        axes = canvas.subplots(1, len(panels), squeeze=False)[0]
        for i, (ax, (values, title)) in enumerate(zip(axes, panels, strict=True)):
            _bars(ax, pairs, values, title, names=i == 0, peaks=title.startswith("Peak"))
        handles, labels = axes[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower left", ncols=2)
        return _finish(canvas, name, f"Memory by strategy{_seed(pairs, lock)}. {lock.title}", lock)


def _where(pairs: Sequence[Pair]) -> str:
    return f" ({' or '.join(sorted({pair.where for pair in pairs}))})"


def _bars(
    ax: Any,
    pairs: Sequence[Pair],
    values: Sequence[tuple[float | None, float | None]],
    title: str,
    names: bool,
    peaks: bool,
) -> None:
    from dlrscale.report.tables import size

    flat = [v for both in values for v in both if v]
    low = 2.0 ** (math.floor(math.log2(min(flat))) - 2)
    styles = (("base", BASE_COLOUR, "", -0.2), ("locked", LOCKED_COLOUR, "////", 0.2))
    for side, (label, colour, hatch, shift) in enumerate(styles):
        for row, (pair, both) in enumerate(zip(pairs, values, strict=True)):
            value, run = both[side], (pair.base, pair.locked)[side]
            oom = peaks and run is not None and run.outcome == "oom"
            if value:
                ax.barh(row + shift, value - low, 0.38, left=low, color=colour, hatch=hatch, edgecolor=INK, lw=0.6)
            text = ("oom at " if oom else "") + size(value) if value else ("oom" if oom else "no figure")
            ax.text((value or low) * 1.05, row + shift, text, va="center", fontsize=8)
        ax.barh([0], [0], color=colour, hatch=hatch, edgecolor=INK, lw=0.6, label=label)
    ax.set_xscale("log", base=2)
    ax.set_xlim(low, max(flat) * 2 ** (0.35 * math.log2(max(flat) / low)))
    ax.xaxis.set_major_formatter(lambda value, _: size(value))
    ax.xaxis.set_major_locator(_log_ticks(low, max(flat)))
    ax.xaxis.minorticks_off()
    ax.set_xlabel("bytes, log scale")
    ax.set_yticks(range(len(pairs)), [_short(p.label, 34) for p in pairs] if names else [])
    ax.set_ylim(len(pairs) - 0.5, -0.5)
    ax.set_title(title, loc="left")


def _log_ticks(low: float, high: float) -> Any:
    from matplotlib.ticker import FixedLocator

    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1
    every = max(1, math.ceil((last - first) / 4))
    return FixedLocator([2.0**p for p in range(first, last + 1, every)])


def _binary_ticks(high: float) -> Any:
    """Four to eight ticks at round numbers of bytes, which are powers of two apart."""
    from matplotlib.ticker import MultipleLocator

    return MultipleLocator(2.0 ** math.floor(math.log2(max(high, 1.0) / 4)))


def _depth(rows: list[tuple[float, Pair, Lock]], name: str) -> Figure:
    """Saved bytes of the MLP part against depth: measured on the line of the formula."""
    import matplotlib

    from dlrscale.report.tables import size

    form = str(rows[0][2].manifest.get("form"))
    with matplotlib.rc_context(_style(name)):
        canvas = _canvas(6.4, 4.0)
        ax = canvas.subplots()
        lines = [(k, pair.locked.metric(FORMULA)) for k, pair, _ in rows if pair.locked]
        lines = [(k, v) for k, v in lines if v is not None]
        if len(lines) > 1:
            ax.plot(*zip(*lines, strict=True), "-", color=LOCKED_COLOUR, lw=1.3, label="locked, formula")
        points = [(k, pair.locked.metric(SAVED_MLP)) for k, pair, _ in rows if pair.locked]
        ax.plot(*zip(*points, strict=True), "s", color=LOCKED_COLOUR, mec=INK, ms=6, label="locked, measured")
        base = next((v for _, pair, _ in rows if (v := pair.both(SAVED_MLP)[0]) is not None), None)
        if base is not None:
            ax.axhline(base, ls="--", color=BASE_COLOUR, lw=1.3, label="base, measured")
        ax.set_ylim(bottom=0)
        ax.set_xlim(left=0)
        ax.set_xticks(sorted({k for k, _, _ in rows}))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_major_locator(_binary_ticks(ax.get_ylim()[1]))
        ax.yaxis.set_major_formatter(lambda value, _: size(value))
        ax.set_xlabel("K, blocks in a DLR-Net")
        ax.set_ylabel("saved for backward per token (bytes)")
        ax.grid(alpha=0.25)
        ax.set_title(_short(f"MLP part of the saved bytes against depth ({form}, full)", 70), loc="left")
        ax.legend()
        caption = (
            f"Bytes saved for backward per token by all MLPs or DLR-Nets, against depth; form {form}, plain autograd."
        )
        return _finish(canvas, name, caption, None)
