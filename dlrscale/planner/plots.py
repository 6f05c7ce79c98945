"""Plots of plans: the peaks of any sweep, and the saved bytes of every strategy against the depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dlrscale.planner.show import LOCK, varying
from dlrscale.planner.sides import BASE, LOCKED

SAVED_COLOUR, PEAK_COLOUR, SHADE = "#1f6fb4", "#d1495b", "0.72"
PER_ROW = 5


def draw(answers: Sequence[Mapping[str, Any]], file: str) -> None:
    """Draw a sweep into a PNG file: where depth and nothing but the strategy beside it varies, saved bytes against it.

    Args:
        answers: The answers of a sweep.
        file: The PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    varied = varying(answers)
    stages = {(answer["asked"]["strategy"], answer["asked"]["zero"]) for answer in answers}
    own = {"strategy", "depth"} | ({"zero"} if len(stages) == len(dict(stages)) else set())  # a strategy's own stage
    by_depth = "depth" in varied and set(varied) <= own and LOCKED in answers[0]
    figure = saved_by_depth(answers) if by_depth else peaks(answers)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def saved_by_depth(answers: Sequence[Mapping[str, Any]]) -> Any:
    """Saved bytes per token against K, a panel per strategy on common axes.

    Blue: what is saved when forward ends; red: the most at once going backward; dashed: the same on the base model;
    grey, in every panel: both under `full`, where that was asked for; dotted: what lies in host memory.

    Args:
        answers: The answers of a sweep over strategies and depths.

    Returns:
        The figure.
    """
    from matplotlib import pyplot

    strategies = list(dict.fromkeys(answer["asked"]["strategy"] for answer in answers))
    rows = math.ceil(len(strategies) / PER_ROW)
    columns = min(PER_ROW, len(strategies))
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(3.2 * columns + 0.6, 2.5 * rows + 1.1), sharex=True, sharey=True, squeeze=False
    )
    lines = {name: _lines([a for a in answers if a["asked"]["strategy"] == name]) for name in strategies}
    for axes, name in zip(grid.flat, strategies, strict=False):
        if "full" in lines and name != "full":
            axes.plot(*lines["full"][LOCKED, "saved"], color=SHADE, linewidth=1)
            axes.plot(*lines["full"][BASE, "saved"], "--", color=SHADE, linewidth=1)
        for (side, what), (depths, sizes) in lines[name].items():
            colour = {"saved": SAVED_COLOUR, "peak": PEAK_COLOUR}.get(what, SAVED_COLOUR)
            style = "--" if side == BASE else ":" if what == "host" else "-"
            width, size = (1.2, 0) if side == BASE else (1.5, 3)
            if what == "saved":  # seen also where the peak lies on it
                width, size = 2.4 * width, 1.6 * size
            axes.plot(depths, sizes, style, color=colour, linewidth=width, marker="o", markersize=size)
        if not any(any(sizes) for _, sizes in lines[name].values()):
            axes.text(0.5, 0.25, "nothing is saved", transform=axes.transAxes, ha="center", fontsize=9)
        axes.set_title(name, fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(True, which="major", alpha=0.25)
        axes.tick_params(labelsize=7)
    depths = sorted({answer["asked"]["depth"] for answer in answers})
    grid[0, 0].set_xticks(depths, [str(depth) for depth in depths])
    for axes in grid.flat[len(strategies) :]:
        axes.set_axis_off()
    for index, axes in enumerate(grid.flat[: len(strategies)]):
        if index + columns >= len(strategies):
            axes.xaxis.set_tick_params(labelbottom=True)
            axes.set_xlabel("K, blocks of a DLR-Net", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("bytes per token", fontsize=8)
    _legend(figure, answers)
    return figure


def _lines(answers: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[list[int], list[float]]]:
    """Depths and bytes per token of one strategy by side and kind: `saved`, `peak`, and the locked model's `host`."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for answer in answers:
        asked = answer["asked"]
        tokens = asked["micro_batch"] * asked["seq_len"]
        for side in (BASE, LOCKED):
            saved = answer[side]["saved_bytes"]
            sizes = {"saved": saved["held"], "peak": saved["peak"], "host": saved["host"] if side == LOCKED else 0}
            for what, size in sizes.items():
                if size:
                    found.setdefault((side, what), []).append((asked["depth"], size / tokens))
    return {key: tuple(map(list, zip(*sorted(points), strict=True))) for key, points in found.items()}


def _legend(figure: Any, answers: Sequence[Mapping[str, Any]]) -> None:
    """The legend above all panels, and what the plans are about."""
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color=SAVED_COLOUR, marker="o", markersize=3, label="locked: saved when forward ends"),
        Line2D([], [], color=PEAK_COLOUR, marker="o", markersize=3, label="locked: most at once"),
        Line2D([], [], color=SAVED_COLOUR, linestyle=":", label="locked: in host memory"),
        Line2D([], [], color="0.3", linestyle="--", label="base, in the same colours"),
        Line2D([], [], color=SHADE, label="under full, base dashed"),
    ]
    asked = answers[0]["asked"]
    tokens = f"{asked['micro_batch']} x {asked['seq_len']} tokens"
    about = f"{asked['form']}, {asked['dtype']}, {tokens}, {asked['attention']}"
    figure.suptitle(f"Bytes saved for the backward pass, planned: {about}", fontsize=10)
    figure.legend(handles=entries, loc="lower center", ncols=len(entries), fontsize=8, frameon=False)
    height = figure.get_size_inches()[1]
    figure.tight_layout(rect=(0, 0.35 / height, 1, 1))


def peaks(answers: Sequence[Mapping[str, Any]]) -> Any:
    """The peaks of a device against the last numeric thing that varies, a line per side and the rest.

    Args:
        answers: The answers of a sweep.

    Returns:
        The figure.
    """
    from matplotlib import pyplot

    varied = varying(answers) or ["depth"]
    numeric = [name for name in varied if all(isinstance(a["asked"][name], int) for a in answers)]
    across = numeric[-1] if numeric else varied[-1]
    sides = [name for name in (BASE, LOCKED, LOCK) if name in answers[0]]
    lines: dict[str, list[tuple[Any, float]]] = {}
    for answer in answers:
        rest = ", ".join(f"{name} {answer['asked'][name]}" for name in varied if name != across)
        for side in sides:
            point = (answer["asked"][across], answer[side]["peak_bytes"] / 2**30)
            lines.setdefault(f"{side} {rest}".strip(), []).append(point)
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for label, points in lines.items():
        axes.plot(
            *zip(*points, strict=True), marker="o", label=label, linestyle="--" if label.startswith(BASE) else "-"
        )
    axes.set(xlabel=across.replace("_", " "), ylabel="peak of a device, GiB", ylim=(0, None))
    if numeric:
        axes.set_xscale("log", base=2)
        axes.set_xticks([a["asked"][across] for a in answers], [str(a["asked"][across]) for a in answers])
    axes.legend(fontsize="small")
    figure.tight_layout()
    return figure
