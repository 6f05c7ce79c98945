"""What undoing a lock costs: cold, warm and hardened locks at three couplings, flattened and regressed, three seeds.

`python tests/matrix/undo.py locks --out DIR` makes the locks of stories260K on TinyStories.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import forks

from dlrscale import catalogue
from dlrscale.cli.levers import choose_levers
from dlrscale.cli.run import resolve
from dlrscale.config import LockConfig

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
COUPLINGS, SEEDS = (0.1, 0.25, 0.5), (0, 1, 2)
# start, hardened, distilling and healing steps of 4,096 tokens, rate
KINDS = {
    "warm": ("warm", False, 300, 75, 3e-3),
    "hardened": ("warm", True, 300, 75, 3e-3),
    "cold": ("cold", False, 450, 110, 8e-3),
}


def locks(out: Path, data: Path) -> Iterator[LockConfig]:
    """The locks: all couplings of the first seed, and the middle one of the others."""
    for seed in SEEDS:
        for kind, (start, harden, steps, heal, rate) in KINDS.items():
            for coupling in COUPLINGS if seed == 0 else (0.25,):
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


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["locks"])
    parser.add_argument("--out", type=Path, default=Path("results/undo"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cores", type=int, default=forks.CORES)
    options = parser.parse_args()
    forks.ready()
    for label, reason in forks.run_all(locks(options.out.absolute(), options.data), options.cores).items():
        print(f"{label}: {reason}")


if __name__ == "__main__":
    main()
