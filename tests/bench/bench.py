"""The benchmark: ratios of one run, the two sides in turns, median and spread; writes a dated record.

    python tests/bench/bench.py [--quick] [--ranks 2] [--only attack,lock] [--out FOLDER]

Every figure that compares two sides comes from alternating blocks (A B A B ...): a ratio per pair of neighbours, its
median and its interquartile range. Nothing is timed with a hook on; saved bytes come from steps of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
from common import QUICK_SIZES, Sizes  # noqa: E402

from dlrscale import engine, launcher, record  # noqa: E402

PARTS = ("attack", "lock", "growth", "commands")
GIGABYTE = 1 << 30


def run_part(name: str, sizes: Sizes, ranks: int, **settings: Any) -> dict[str, Any]:
    """Run `module.function` of a part on fresh ranks, each a process of its own.

    Args:
        name: What `part.py` calls.
        sizes: Model and batch.
        ranks: The number of processes.
        **settings: The function's own keywords.

    Returns:
        What rank 0 returned.
    """
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        line = [sys.executable, str(Path(__file__).with_name("part.py")), name]
        line += [json.dumps({"sizes": asdict(sizes), **settings}), str(result)]
        meet = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launcher.free_port())}
        env = launcher.environment(ranks) | meet
        with open(log, "wb") as said:
            started = [
                subprocess.Popen(line, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=said, stderr=said)
                for r in range(ranks)
            ]
            codes = [process.wait() for process in started]
        if any(codes):
            sys.exit(f"{name} failed on ranks that ended with {codes}:\n" + log.read_text(errors="replace")[-3000:])
        return json.loads(result.read_text(encoding="utf-8"))


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {"median": float(middle), "q1": float(low), "q3": float(high), "n": len(values)}


def ratios(over: list[float], under: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of neighbours."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def row(what: str, found: dict[str, float], goal: str, met: bool, unit: str = "", **more: Any) -> dict[str, Any]:
    """One line of the table and of the records."""
    return {"what": what, **found, "unit": unit, "goal": goal, "met": met, **more}


def attack(sizes: Sizes, ranks: int, quick: bool) -> list[dict[str, Any]]:
    """Our attack step over the Trainer's: time, resident memory, live bytes."""
    both = run_part("attack_step.time_both", sizes, ranks, pairs=3 if quick else 24, block=2)
    seconds = both["seconds"]
    found = ratios(seconds["ours"], seconds["trainer"])
    rows = [row("attack step / Trainer step: time", found, "<= 1.00", found["median"] <= 1, seconds=seconds,
                weights_moved=both["weights_moved"], weights_apart=both["weights_apart"])]  # fmt: skip
    for live, name, times in ((False, "peak resident memory", 1 if quick else 3), (True, "peak live tensor bytes", 1)):
        peaks: dict[str, list[float]] = {"ours": [], "trainer": []}
        for _ in range(times):
            for side, values in peaks.items():
                values.append(run_part("attack_step.peak", sizes, ranks, side=side, live=live, steps=4)["bytes"])
        found = ratios(peaks["ours"], peaks["trainer"])
        rows.append(row(f"attack step / Trainer step: {name}", found, "<= 1.00", found["median"] <= 1, bytes=peaks))
    return rows


def lock(sizes: Sizes, ranks: int, quick: bool) -> list[dict[str, Any]]:
    """Our lock step over one graph of all layers: tokens per second, bytes saved at once."""
    rows = []
    for depth in (4,) if quick else (8, 32):
        found = run_part("lock_step.compare", sizes, ranks, depth=depth, pairs=3 if quick else 16, block=2)
        speeds, saved, layers = found["tokens_per_s"], found["saved_at_once"], found["layers"]
        speed = ratios(speeds["ours"], speeds["straight"])
        kept = saved["ours"] / saved["straight"]
        rows += [
            row(f"lock step / one graph, K = {depth}: tokens/s", speed, ">= 1.30", speed["median"] >= 1.3,
                tokens_per_s=speeds, apart=found["apart"]),
            row(f"lock step / one graph, K = {depth}: saved bytes at once", spread([kept]), f"<= 1/{layers}",
                kept <= 1 / layers, bytes=saved),
        ]  # fmt: skip
    return rows


def growth(sizes: Sizes, ranks: int, quick: bool) -> list[dict[str, Any]]:
    """Lines through seconds and saved bytes over layers, depth and tokens."""
    found = run_part("growth.measure", sizes, 1, depth=4 if quick else 16, rounds=2 if quick else 5, quick=quick)
    rows = []
    for name, sweep in found.items():
        slope, straight = sweep["bytes_line"]["slope"] / sweep["derived_slope"], sweep["seconds_line"]["r2"]
        rows += [
            row(f"saved bytes over {name}: fitted slope / derived", spread([slope]), "0.95 to 1.05",
                abs(slope - 1) <= 0.05, **sweep),
            row(f"time over {name}: R^2 of the line", spread([straight]), ">= 0.99", straight >= 0.99),
        ]  # fmt: skip
    return rows


def commands(sizes: Sizes, ranks: int, quick: bool) -> list[dict[str, Any]]:
    """Wall time of fresh processes."""
    dlrscale = Path(sys.executable).with_name("dlrscale")
    lines = {
        "dlrscale --help": ([dlrscale, "--help"], 0.5),
        "dlrscale plan, llama-3.1-405b, all strategies": (
            [dlrscale, "plan", "--model", "llama-3.1-405b", "--strategy", "all"],
            1.0,
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    env = dict(os.environ) | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for _ in range(3 if quick else 15):
        for name, (line, _) in lines.items():
            start = time.perf_counter()
            subprocess.run(line, check=True, stdout=subprocess.DEVNULL, env=env)
            seconds[name].append(time.perf_counter() - start)
    return [
        row(name, spread(seconds[name]), f"<= {goal} s", float(np.median(seconds[name])) <= goal, "s", seconds=values)
        for (name, (_, goal)), values in zip(lines.items(), seconds.values(), strict=True)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    said = {True: "met", False: "missed"}
    lines = ["| what | median | quartiles | n | goal | |", "|---|---|---|---|---|---|"]
    for r in rows:
        middle, low, high = (f"{r[key]:.4g}{' ' + r['unit'] if r['unit'] else ''}" for key in ("median", "q1", "q3"))
        lines.append(f"| {r['what']} | {middle} | {low} to {high} | {r['n']} | {r['goal']} | {said[r['met']]} |")
    return "\n".join(lines) + "\n"


def command(options: argparse.Namespace) -> str:
    """The command as one would type it elsewhere: without the folder."""
    words = ["python tests/bench/bench.py"]
    words += ["--quick"] if options.quick else []
    words += ["--ranks", str(options.ranks)] if options.ranks != 1 else []
    words += ["--only", options.only] if options.only != ",".join(PARTS) else []
    return " ".join(words)


def machine() -> str:
    """The machine in words."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIGABYTE
    return f"{os.cpu_count()} CPU cores ({model}), {memory:.0f} GiB, {platform.system()}, no accelerator in use"


def write(folder: Path, rows: list[dict[str, Any]], header: dict[str, Any], sizes: Sizes) -> None:
    """The dated record: bench.jsonl, its first line the header, and README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    record.write_atomic(folder / "bench.jsonl", "".join(record.dumps(line) + "\n" for line in [header, *rows]))
    versions = ", ".join(f"{name} {value}" for name, value in header["versions"].items())
    git = header["git"] or {"commit": "unknown", "dirty": False}
    changed = " with local changes" if git["dirty"] else ""
    text = f"""# Benchmark

`{header["command"]}` on {header["machine"]}; {header["threads"]} thread(s) per rank, {header["ranks"]} rank(s), fp32,
ZeRO 2. Commit {git["commit"]}{changed}. {versions}.

Model: a Llama of random weights, D {sizes.width}, F {sizes.inner}, {sizes.layers} layers, V {sizes.vocabulary};
micro-batch {sizes.batch} x {sizes.length} tokens. Started {header["started"]}, took {header["seconds"]:.0f} s.

{table(rows)}"""
    record.write_atomic(folder / "README.md", text)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of tiny models: its figures mean nothing")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of the attack and the lock step (default 1)")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, split by commas (default {','.join(PARTS)})")
    parser.add_argument("--out", type=Path, help="folder of the record (default results/<date>_bench_<cpuN>)")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if set(chosen) - set(PARTS) or options.ranks < 1:
        parser.error(f"--only takes {', '.join(PARTS)}, and --ranks a number of at least 1")
    os.environ.setdefault("DS_ACCELERATOR", engine.device_type())
    sizes = Sizes(**QUICK_SIZES) if options.quick else Sizes()
    started, start, git = record.now(), time.perf_counter(), record.git_state()
    rows = []
    for part in chosen:
        print(f"{part} ...", file=sys.stderr, flush=True)
        rows += globals()[part](sizes, options.ranks, options.quick)
    header = {
        "started": started,
        "seconds": time.perf_counter() - start,
        "command": command(options),
        "machine": machine(),
        "threads": int(launcher.environment(options.ranks)["OMP_NUM_THREADS"]),
        "ranks": options.ranks,
        "sizes": asdict(sizes),
        "versions": record.versions(),
        "git": git,
    }
    out = options.out or ROOT / "results" / f"{started[:10]}_bench_cpu{os.cpu_count()}"
    write(out, rows, header, sizes)
    print(table(rows) + f"\nrecord: {os.path.relpath(out)}", flush=True)


if __name__ == "__main__":
    main()
