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
import re
import shlex
import time
import traceback
from collections import Counter
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
from dlrscale.data.embedded import embedded_documents
from dlrscale.errors import DlrscaleError

SEPARATOR = "<|endoftext|>"  # of documents, in the files of text
EMBEDDED = Path(__file__).resolve().parents[2] / "dlrscale" / "embedded_model"
SEEDS = (0, 1, 2)  # of locks, and of attacks
TRIALS, MARGIN = 3, 0.2
STEPS = {"stories260K": (24, 4), "embedded": (18, 6)}  # of an attack, and between evaluations
RECORDS, HELDOUT = 1000, 200  # of a task, from its start: an attack sees fewer
FEW = 30_000  # characters
COMMON = {"num_ranks": 1, "tracking_uri": "none", "checkpoint_every": 0}
# Where a search starts; it goes ten times as far down and up. `full`, `lora`, `lomo` and `last-k` were tried on the
# unlocked models at three to five rates, one run each; the others start where one of these did best, or as is usual.
RATE = 3e-3
RATES = dict.fromkeys(("lora", "lora-attn", "lora-mlp", "norms", "ladder"), 1e-2)
RATES |= {"lomo": 1e-1, "mezo": 1e-4, "mezo-lora": 1e-3}
OWN_RATE = {("stories260K", "style"): 1e-3, ("embedded", "gsm8k"): 2e-3, ("embedded", "style"): 2e-3}
OWN_RATES = {"stories260K": {"last-k": 3e-3, "head": 3e-3}, "embedded": {"last-k": 1e-2, "head": 1e-2, "lomo": 3e-1}}
LONGER = {"stories260K": 4, "embedded": 2}  # of zeroth-order steps: they learn little, and cost less
KNOBS = {"undistil": ("regress_steps=40",), "drop-blocks": ("heal_steps=20",)}
LOCKS = {
    "stories260K": {"steps": 300, "heal_steps": 75, "micro_batch": 16, "seq_len": 256},
    "embedded": {"steps": 200, "heal_steps": 50, "micro_batch": 8, "seq_len": 128},
}
CAPS = (1.33, 2.0)
BY_HAND = {"flatten-lomo": ("flatten", {"gradient": "lomo"})}  # combinations: a strategy, and other choices on its axes


def model(name: str, data: Path, out: Path) -> tuple[Path, dict[str, Any]]:
    """A model's folder, and the text of its own domain.

    Of the standard library it is one file of eight; `few` is a part of the held-out files, for attacks.
    """
    if name == "stories260K":
        stories = data / "tinystories"
        text = {"data": str(stories / "train.txt.gz"), "heldout": str(stories / "valid.txt.gz")}
        return data / "models" / name, text | {"few": text["heldout"]}
    text = {key: str(out / "data" / f"stdlib-{key}.txt") for key in ("data", "heldout", "few")}
    if not all(Path(file).exists() for file in text.values()):
        for key, corpus, every in (("data", "embedded:stdlib", 8), ("heldout", "embedded:stdlib-heldout", 1)):
            some = SEPARATOR.join(itertools.islice(embedded_documents(corpus, Counter()), 0, None, every))
            record.write_atomic(Path(text[key]), some)
        record.write_atomic(Path(text["few"]), some[:FEW])
    return EMBEDDED, text


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
            folder, text = model(name, data, out)
            options = COMMON | LOCKS[name] | {
                "model": str(folder), "data": text["data"], "heldout": text["heldout"],
                "document_separator": SEPARATOR, "form": "gated", "depth": 8, "lr": 3e-3, "zero": 0, "seed": seed,
                "heldout_limit": 200, "out": str(out / name / f"lock-{seed}"),
            }  # fmt: skip
            yield resolve(LockConfig, options, choose_levers(catalogue.LOCK, options), f"lock-{seed}")


def rows() -> Iterator[tuple[str, str, tuple[str, ...], dict[str, str]]]:
    """What is run: a label, the strategy, its knobs, and what is chosen by hand."""
    for name in catalogue.STRATEGIES:
        if name == "best-memory":
            for cap in CAPS:
                yield f"{name}-{cap:g}", name, (f"cap={cap:g}",), {}
        else:
            yield name, name, KNOBS.get(name, ()), {}
    for label, (name, axes) in BY_HAND.items():
        yield label, name, KNOBS.get(name, ()), axes


def attack(job: tuple[Any, ...]) -> str | None:
    """One strategy on one task: base and locked, trials, seeds. What went wrong, if anything did."""
    out, data, name, task, own, label, strategy, knobs, axes = job
    started, place = time.monotonic(), out / name / task / label
    folder, text = model(name, data, out)
    steps, every = (count * (LONGER[name] if "mezo" in strategy else 1) for count in STEPS[name])
    lr = (RATES | OWN_RATES[name]).get(axes.get("gradient", strategy), OWN_RATE.get((name, task), RATE))
    options = own | COMMON | axes | {
        "heldout_base": text["few"], "document_separator": SEPARATOR, "heldout_limit": 32,
        "micro_batch": 4, "steps": steps, "warmup_steps": 3, "lr": lr, "eval_every": every,
        "seed": 0, "name": f"{task}-{label}",
        "model": str(out / name / "lock-0" / "model"), "out": str(place), "trials": TRIALS,
        "lr_range": f"{lr / 10:g},{10 * lr:g}", "seeds": ",".join(map(str, SEEDS)), "target": f"base+{MARGIN:g}",
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
    print(f"{name} {task} {label}: {time.monotonic() - started:.0f} s{f': {fault}' if fault else ''}", flush=True)
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
    """In place of `launcher.run`: fork the ranks; the code of the first that failed, or 0."""
    return next((code for code in forks.wait(forks.run(config)) if code), 0)


def main() -> None:
    """Lock, attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/campaign"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--models", nargs="*", default=["stories260K", "embedded"])
    parser.add_argument("--tasks", nargs="*", default=["gsm8k", "style"])
    parser.add_argument("--rows", nargs="*", default=[label for label, *_ in rows()])
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
        (out, data, name, task, found[task], *row)
        for name in options.models
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
