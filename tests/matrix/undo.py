"""What undoing a lock costs: cold, warm and hardened locks at three couplings, flattened and regressed, three seeds.

`python tests/matrix/undo.py locks --out DIR --data DATA` makes the locks of stories260K on TinyStories, `attacks`
undoes them, and `table` writes `undo.jsonl`, `table.md` and `undo.png`. Held-out loss is that of TinyStories'
validation text, whatever is trained on. A lock is undone 0.01 nats above its own; what that costs is told in parts of
what the lock cost, in FLOPs.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
from collections.abc import Iterator
from pathlib import Path

import forks

from dlrscale import catalogue, record
from dlrscale.cli import attack_configs
from dlrscale.cli.levers import choose_levers
from dlrscale.cli.run import last_record, resolve
from dlrscale.config import AttackConfig, LockConfig
from dlrscale.report import costs
from dlrscale.report.runs import Run

COUPLINGS, SEEDS = (0.1, 0.25, 0.5), (0, 1, 2)
# start, hardened, distilling and healing steps of 4,096 tokens, rate
KINDS = {
    "warm": ("warm", False, 300, 75, 3e-3),
    "hardened": ("warm", True, 300, 75, 3e-3),
    "cold": ("cold", False, 450, 110, 8e-3),
}
# start, text and steps of the regression: each a run of its own, with its own schedule
LENGTHS = (10, 20, 40, 80, 160)
REGRESSED = [
    *(("flat", "stories", steps) for steps in LENGTHS),
    ("flat", "gsm8k", 160),
    ("fresh", "stories", 160),
]
STEP_TOKENS = 16 * 256
TUNED_STEPS = 80  # of the flattened model, by full fine-tuning


def locks(out: Path, data: Path) -> Iterator[LockConfig]:
    """The locks: every kind at every coupling with every seed; the first seed and the middle coupling come first."""
    grid = sorted(itertools.product(SEEDS, KINDS, COUPLINGS), key=lambda at: at[0] > 0 and at[2] != COUPLINGS[1])
    for seed, kind, coupling in grid:
        start, harden, steps, heal, rate = KINDS[kind]
        name = f"{kind}-g{coupling}-s{seed}"
        options = {
            "model": str(data / "models" / "stories260K"), "data": str(data / "tinystories" / "train.txt.gz"),
            "heldout": str(data / "tinystories" / "valid.txt.gz"), "document_separator": "<|endoftext|>",
            "seq_len": 256, "micro_batch": 16, "num_ranks": 1, "zero": 0, "form": "gated", "depth": 8,
            "start": start, "harden": harden, "coupling": coupling, "steps": steps, "heal_steps": heal,
            "lr": rate, "seed": seed, "checkpoint_every": 0, "tracking_uri": "none", "heldout_limit": 200,
            "out": str(out / "locks" / name),
        }  # fmt: skip
        yield resolve(LockConfig, options, choose_levers(catalogue.LOCK, options), name)


def attacks(out: Path, data: Path) -> Iterator[AttackConfig]:
    """Each finished lock regressed on an ordinary MLP, and flattened and fine-tuned."""
    few = {}
    for file in (data / "tinystories" / "valid.txt.gz", data / "gsm8k" / "test.jsonl.gz"):
        suffix = file.name.split(".")[1]
        few[suffix] = str(out / "data" / f"few.{suffix}")
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            record.write_atomic(Path(few[suffix]), "".join(itertools.islice(lines, 40)))
    for lock in locks(out, data):
        if not (Path(lock.out) / "model").is_dir():
            continue
        # What counts is the loss on the base's own text: of the text that is trained on little is held out.
        stories = {"data": lock.data, "heldout": few["txt"], "document_separator": "<|endoftext|>"}
        task = {
            "data": str(data / "gsm8k" / "train.jsonl.gz"), "columns": "prompt=question,completion=answer",
            "heldout": few["jsonl"], "document_separator": "<|endoftext|>",
        }  # fmt: skip
        common = {
            "model": f"{lock.out}/model", "heldout_base": lock.heldout, "heldout_limit": 200, "seq_len": 256,
            "micro_batch": 16, "num_ranks": 1, "zero": 0, "seed": lock.seed, "checkpoint_every": 0,
            "tracking_uri": "none", "warmup_steps": 10,
        }  # fmt: skip
        for start, text, steps in REGRESSED:
            name = f"{lock.name}/{start}-{text}-{steps}"
            rate = 3e-3 if start == "flat" else 1e-2
            knobs = (f"start={start}", f"regress_steps={steps}", f"regress_lr={rate}")
            own = (stories if text == "stories" else task) | common | {"steps": 1, "lr": 0.0}
            yield attack_configs(own | {"name": name, "out": str(out / "attacks" / name)}, None, "undistil", knobs)[0]
        name = f"{lock.name}/flatten-tuned"
        own = stories | common | {"steps": TUNED_STEPS, "lr": 3e-3, "eval_every": 20, "name": name}
        yield attack_configs(own | {"out": str(out / "attacks" / name)}, None, "flatten", ())[0]


def rows(out: Path, data: Path) -> Iterator[dict]:
    """One line per lock that has been undone in all ways."""
    found: dict[str, dict[str, dict]] = {}
    for config in attacks(out, data):
        entry = last_record(config)
        if entry is not None and entry["outcome"] == "ok":
            lock, way = config.name.split("/")
            found.setdefault(lock, {})[way] = entry
    for lock in locks(out, data):
        entry, ways = last_record(lock), found.get(lock.name, {})
        if entry is None or len(ways) < len(REGRESSED) + 1:
            continue
        kind, coupling, seed = lock.name.split("-")
        metrics = entry["metrics"]
        row = {
            "lock": kind, "coupling": float(coupling[1:]), "seed": int(seed[1:]),
            "lock_tokens": metrics["cost/tokens"], "lock_flops": metrics["cost/flops"],
            "base": metrics["loss/heldout_base_model"], "locked": metrics["loss/heldout_locked"],
            "flat": metrics["loss/heldout_flat"], "ways": {}, "undone": {},
        }  # fmt: skip
        for way, undone in ways.items():
            found_points = costs.points(Run(out / "attacks" / lock.name / way, undone))
            row["ways"][way] = [{"flops": flops, "loss": value} for flops, value in found_points]
            there = [flops for flops, value in found_points if value <= row["locked"] + costs.UNDONE_NATS]
            row["undone"][way] = min(there) / row["lock_flops"] if there else None
        yield row


def spread(values: list[float]) -> str:
    """A mean, and the range where there are several."""
    return f"{sum(values) / len(values):.3f}" + (
        f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    )


def table(out: Path, data: Path) -> None:
    """Write the rows and a table of means over seeds."""
    found = list(rows(out, data))
    record.write_atomic(out / "undo.jsonl", "".join(record.dumps(r) + "\n" for r in found))
    ways = [f"{start}-{text}-{steps}" for start, text, steps in REGRESSED]
    head = ["lock", "g", "seeds", "lock tokens", "base", "locked", "flattened", *ways]
    head += ["flattened and tuned, after 40 / 80 steps", "undo cost / lock cost", "by"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    kinds = {(r["lock"], r["coupling"]) for r in found}
    for kind, coupling in sorted(kinds, key=lambda at: (list(KINDS).index(at[0]), at[1])):
        own = [r for r in found if (r["lock"], r["coupling"]) == (kind, coupling)]
        cells = [kind, f"{coupling:g}", str(len(own)), f"{own[0]['lock_tokens'] / 1e6:.2f} M"]
        cells += [spread([r[key] for r in own]) for key in ("base", "locked", "flat")]
        cells += [spread([r["ways"][way][0]["loss"] for r in own]) for way in ways]
        tuned = [[point["loss"] for point in r["ways"]["flatten-tuned"]] for r in own]
        cells.append(" / ".join(spread([losses[at] for losses in tuned]) for at in (2, 4)))
        # The regression with which the lock of every seed is undone for the least. What is fine-tuned learns the end
        # tokens between stories as well, which the base has never seen: it gets below the base, and tells less.
        means = {way: [r["undone"][way] for r in own] for way in ways}
        whole = {way: parts for way, parts in means.items() if None not in parts}
        best = min(whole, key=lambda way: sum(whole[way]), default=None)
        cells += [spread(whole[best]), best] if best else ["not undone with every seed", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    record.write_atomic(out / "table.md", "\n".join(lines) + "\n")
    plot(found, out / "undo.png")
    print("\n".join(lines))


def plot(found: list[dict], file: Path) -> None:
    """Held-out loss against the tokens of a regression from the flattened start on TinyStories; a band spans the seeds.

    Dotted: the locked model. Dashed: the base.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, len(COUPLINGS), sharey=True)
    millions = [0.0, *(steps * STEP_TOKENS / 1e6 for steps in LENGTHS)]
    for axis, coupling in zip(axes, COUPLINGS, strict=True):
        for kind, colour in zip(KINDS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
            own = [r for r in found if (r["lock"], r["coupling"]) == (kind, coupling)]
            if not own:
                continue
            ways = [f"flat-stories-{steps}" for steps in LENGTHS]
            curves = [[r["flat"], *(r["ways"][way][0]["loss"] for way in ways)] for r in own]
            points = list(zip(*curves, strict=True))
            axis.plot(millions, [sum(p) / len(p) for p in points], "o-", color=colour, markersize=3, label=kind)
            axis.fill_between(millions, [min(p) for p in points], [max(p) for p in points], color=colour, alpha=0.3)
            axis.axhline(sum(r["locked"] for r in own) / len(own), color=colour, linestyle=":", linewidth=1)
            axis.axhline(own[0]["base"], color="black", linestyle="--", linewidth=1)
        axis.set(title=f"g = {coupling:g}", xlabel="tokens of the regression, millions", yscale="log", ylim=(1.55, 2.6))
        axis.set_yticks([1.6, 1.8, 2.0, 2.2, 2.4], ["1.6", "1.8", "2.0", "2.2", "2.4"], minor=False)
        axis.minorticks_off()
    axes[0].set_ylabel("held-out loss, nats per token")
    axes[-1].legend(frameon=False)
    figure.savefig(file, dpi=130)


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["locks", "attacks", "table"])
    parser.add_argument("--out", type=Path, default=Path("results/undo"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cores", type=int, default=forks.CORES)
    options = parser.parse_args()
    out = options.out.absolute()
    if options.part == "table":
        table(out, options.data)
        return
    forks.ready()
    configs = (locks if options.part == "locks" else attacks)(out, options.data)
    for label, reason in forks.run_all(configs, options.cores).items():
        print(f"{label}: {reason}")


if __name__ == "__main__":
    main()
