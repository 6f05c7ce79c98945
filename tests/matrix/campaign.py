"""The whole catalogue against one lock, tuned on both sides alike, three seeds: the material of the claims' verdicts.

`python tests/matrix/campaign.py --out DIR --data DATA` locks the models and runs, for each model, task and strategy,
what `dlrscale attack --trials --seeds --target` runs, with ranks forked from one process in place of launched. Every
seed of a run leaves its record, every search its `search.json`; `dlrscale report DIR/MODEL` reads them.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import itertools
import json
import multiprocessing
import os
import re
import shlex
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forks

from dlrscale import catalogue, launcher, record
from dlrscale.cli import attack_configs
from dlrscale.cli.levers import choose_levers
from dlrscale.cli.run import resolve
from dlrscale.cli.search import attack_many, read_wanted
from dlrscale.config import LockConfig, RunConfig
from dlrscale.errors import DlrscaleError

EMBEDDED = Path(__file__).resolve().parents[2] / "dlrscale" / "embedded_model"
SEEDS = (0, 1, 2)  # of locks, and of attacks
TRIALS, STEPS, MARGIN = 3, 24, 0.2
RECORDS, HELDOUT = 1000, 200  # of a task, from its start: an attack sees fewer
COMMON = {"num_ranks": 1, "tracking_uri": "none", "checkpoint_every": 0}
# Where a search starts and how far it goes: the middle of what is usual for models of this size, in powers of ten.
RATES = {"lora": (1e-2, (1e-3, 1e-1)), "lora-attn": (1e-2, (1e-3, 1e-1)), "lora-mlp": (1e-2, (1e-3, 1e-1)),
         "norms": (1e-2, (1e-3, 1e-1)), "ladder": (1e-2, (1e-3, 1e-1)), "lomo": (1e-1, (1e-2, 1.0)),
         "mezo": (1e-4, (1e-5, 1e-2)), "mezo-lora": (1e-3, (1e-5, 1e-2))}  # fmt: skip
RATE = (3e-3, (3e-4, 3e-2))
LONGER = {"mezo": 4, "mezo-lora": 4}  # they learn little per step, and a step costs less
KNOBS = {"undistil": ("regress_steps=40",), "drop-blocks": ("heal_steps=20",)}
LOCKS = {
    "stories260K": {"steps": 300, "heal_steps": 75, "micro_batch": 16, "seq_len": 256},
    "embedded": {"steps": 100, "heal_steps": 25, "micro_batch": 4, "seq_len": 128},
}
CAPS = (1.33, 2.0)


def models(data: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Each model's folder, and the text of its own domain."""
    stories = data / "tinystories"
    return {
        "stories260K": (
            data / "models" / "stories260K",
            {"data": str(stories / "train.txt.gz"), "heldout": str(stories / "valid.txt.gz"),
             "document_separator": "<|endoftext|>"},
        ),
        "embedded": (EMBEDDED, {"data": "embedded:stdlib", "heldout": "embedded:stdlib-heldout"}),
    }  # fmt: skip


def tasks(out: Path, data: Path) -> dict[str, dict[str, Any]]:
    """The data of each attack: the first records of each file, so that no run spends its time on reading the rest."""
    style = data / "style_ylt_to_bbe"
    files = {
        "gsm8k": (data / "gsm8k" / "train.jsonl.gz", data / "gsm8k" / "test.jsonl.gz", "question", "answer", 256),
        "style": (style / "train.jsonl.gz", style / "test.jsonl.gz", "source", "target", 128),
    }
    found = {}
    for name, (train, test, prompt, completion, length) in files.items():
        own = {"columns": f"prompt={prompt},completion={completion}", "seq_len": length}
        for key, file, count in (("data", train, RECORDS), ("heldout", test, HELDOUT)):
            own[key] = str(out / "data" / f"{name}-{key}.jsonl")
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                record.write_atomic(Path(own[key]), "".join(itertools.islice(lines, count)))
        found[name] = own
    return found


def locks(out: Path, data: Path, names: list[str], seeds: list[int]) -> Iterator[LockConfig]:
    """The default lock but for its depth of 8, with each seed; the first seed's is attacked."""
    for seed in seeds:
        for name in names:
            folder, text = models(data)[name]
            options = text | COMMON | LOCKS[name] | {
                "model": str(folder), "form": "gated", "depth": 8, "lr": 3e-3, "zero": 0, "seed": seed,
                "heldout_limit": 200, "out": str(out / name / f"lock-{seed}"),
            }  # fmt: skip
            yield resolve(LockConfig, options, choose_levers(catalogue.LOCK, options), f"lock-{seed}")


def rows() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """What is run: a label, the strategy and its knobs."""
    for name in catalogue.STRATEGIES:
        if name == "best-memory":
            for cap in CAPS:
                yield f"{name}-{cap:g}", name, (f"cap={cap:g}",)
        else:
            yield name, name, KNOBS.get(name, ())


def attack(job: tuple[Path, Path, str, str, dict[str, Any], str, str, tuple[str, ...]]) -> str | None:
    """One strategy on one task: base and locked, trials, seeds. What went wrong, if anything did."""
    out, data, model, task, own, label, strategy, knobs = job
    started, place = time.monotonic(), out / model / task / label
    folder, text = models(data)[model]
    lr, reach = RATES.get(strategy, RATE)
    options = own | COMMON | {
        "heldout_base": text["heldout"], "document_separator": text.get("document_separator"), "heldout_limit": 32,
        "micro_batch": 4, "steps": STEPS * LONGER.get(strategy, 1), "warmup_steps": 3, "lr": lr,
        "eval_every": 4 * LONGER.get(strategy, 1), "seed": 0, "name": f"{task}-{label}",
        "model": str(out / model / "lock-0" / "model"), "out": str(place), "trials": TRIALS,
        "lr_range": f"{reach[0]:g},{reach[1]:g}", "seeds": ",".join(map(str, SEEDS)), "target": f"base+{MARGIN:g}",
    }  # fmt: skip
    options["command"] = shown(strategy, str(folder), knobs, options)
    log = place.parent / f"{label}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    fault = None
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            wanted = read_wanted(options, knobs, str(folder))
            assert wanted is not None
            attack_many(attack_configs(options, str(folder), strategy, knobs), wanted)
        except DlrscaleError as error:
            fault = str(error)
        except Exception:  # of one job; the others go on
            fault = traceback.format_exc()
    print(f"{model} {task} {label}: {time.monotonic() - started:.0f} s{f': {fault}' if fault else ''}", flush=True)
    return fault


def shown(strategy: str, base: str, knobs: tuple[str, ...], options: dict[str, Any]) -> str:
    """The command that does the same, places by their last two parts."""
    words = ["dlrscale", "attack", "--strategy", strategy, "--base", base]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*shortened(words), *(word for knob in knobs for word in ("--set", knob))])


PLACE = re.compile(r"(?<![\w.:/-])/(?:[\w.@+-]+/)*([\w.@+-]+/[\w.@+-]+)")  # no addresses, no relative places
KEPT = ("step", "phase", "tokens", "processed_tokens", "time/step_s", "time/data_s")  # of a step, besides its losses


def publish(out: Path, place: Path) -> None:
    """Copy what a report needs: the newest record and the steps of every run but trials, and the searches.

    Places become their last two names. What a report tells of the runs that count is the same for the copy; of the
    trials the searches tell.
    """
    for file in sorted(out.rglob(record.RECORDS_FILE)):
        own = file.parent.relative_to(out)
        if "trials" in own.parts:
            continue
        to = place / own
        newest = shortened(list(record.read_lines(file))[-1])
        record.write_atomic(to / file.name, record.dumps(newest) + "\n")
        steps = file.with_name(record.STEPS_FILE)
        found = record.read_lines(steps) if steps.exists() else ()
        rows = [{k: v for k, v in r.items() if k in KEPT or k.startswith("loss/")} for r in found]
        record.write_atomic(to / steps.name, "".join(record.dumps(row) + "\n" for row in rows))
    for file in sorted(out.rglob("search.json")):
        text = record.dumps(shortened(json.loads(file.read_text(encoding="utf-8"))), indent=1)
        record.write_atomic(place / file.relative_to(out), text + "\n")


def shortened(value: Any) -> Any:
    """A value in which absolute places, also inside of texts, are their last two names."""
    if isinstance(value, dict):
        return {k: shortened(v) for k, v in value.items()}
    if isinstance(value, list):
        return [shortened(v) for v in value]
    return PLACE.sub(r"\1", value) if isinstance(value, str) else value


def forked(config: RunConfig, poll: Callable[[], object] = lambda: None) -> int:
    """In place of `launcher.run`: fork the ranks, wait for them as long as `forks.LIMIT_S`; the first code but 0."""
    pids = forks.run(config)
    watch = threading.Timer(forks.LIMIT_S, lambda: [os.kill(pid, signal.SIGKILL) for pid in pids])
    watch.start()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    watch.cancel()
    return next((code for code in codes if code), 0)


def main() -> None:
    """Lock, attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/campaign"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--models", nargs="*", default=["stories260K", "embedded"])
    parser.add_argument("--tasks", nargs="*", default=["gsm8k", "style"])
    parser.add_argument("--rows", nargs="*", default=[label for label, _, _ in rows()])
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS), help="of the locks")
    parser.add_argument("--cores", type=int, default=forks.CORES)
    parser.add_argument("--publish", type=Path, help="copy what a report needs to a folder, and run nothing")
    options = parser.parse_args()
    if options.publish:
        publish(options.out.absolute(), options.publish)
        return
    out, data = options.out.absolute(), options.data.absolute()
    forks.ready()
    refused = forks.run_all(locks(out, data, options.models, options.seeds), options.cores)
    launcher.run = forked
    found = tasks(out, data)
    jobs = [
        (out, data, model, task, found[task], *row)
        for model in options.models
        for task in options.tasks
        for row in rows()
        if row[0] in options.rows
    ]
    with multiprocessing.get_context("fork").Pool(options.cores, maxtasksperchild=1) as pool:
        faults = [fault for fault in pool.imap_unordered(attack, jobs) if fault]
    print(f"{len(jobs) - len(faults)} of {len(jobs)} done; {len(refused)} locks refused")
    raise SystemExit(bool(faults or refused))


if __name__ == "__main__":
    main()
