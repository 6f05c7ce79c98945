"""The demonstration: the whole line on the embedded model, small enough for two CPU cores."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from dlrscale import catalogue

EMBEDDED_MODEL = Path(__file__).parent.parent / "embedded_model"
STRATEGIES = ("ckpt-layer", "full-offload", "lora-attn", "flatten")
SHARED = {
    "seq_len": 256,
    "heldout_limit": 32,
    "checkpoint_every": 0,
    "dtype": "fp32",
}
LOCK = {
    "data": "embedded:stdlib",
    "heldout": "embedded:stdlib-heldout",
    "form": "gated",
    "start": "warm",
    "depth": 16,
    "steps": 50,
    "heal_steps": 15,
    "num_ranks": 2,
    "micro_batch": 4,
}
ATTACK = {
    "data": "embedded:topics",
    "heldout": "embedded:topics-heldout",
    "heldout_base": "embedded:stdlib-heldout",
    "steps": 16,
    "warmup_steps": 4,
    "num_ranks": 1,  # two ranks on two cores are not faster, and start more slowly
    "micro_batch": 8,
}
RATES = {"lora-attn": 1e-2}


def run_demo(out: Path, tracking_uri: str | None) -> None:
    """Lock, attack, report.

    Args:
        out: Folder of all runs and of the report.
        tracking_uri: MLflow store, or None for the default one.
    """
    from dlrscale import report, tracking
    from dlrscale.cli import attack_configs, run_all
    from dlrscale.cli.run import execute, resolve
    from dlrscale.config import LockConfig

    start = time.monotonic()
    uri = tracking_uri or tracking.default_uri()
    shared = SHARED | {"tracking_uri": uri}
    levers = catalogue.Strategy(name="", idea="", source="", saved="", cost="").resolve(
        catalogue.Levers(activation_checkpointing="none")
    )
    click.echo(f"1/3  lock the embedded model ({LOCK['depth']} blocks for each MLP) on 2 DeepSpeed ranks")
    lock_options = shared | LOCK | {"model": str(EMBEDDED_MODEL), "out": str(out / "lock")}
    records = [execute(resolve(LockConfig, lock_options, levers, "lock"))]
    locked = str(out / "lock" / "model")
    for number, name in enumerate(STRATEGIES, 1):
        click.echo(f"2/3  attack {number} of {len(STRATEGIES)}: {name}: {catalogue.strategy(name).idea}")
        options: dict[str, Any] = shared | ATTACK | {"model": locked, "out": str(out / name)}
        options |= {"lr": RATES.get(name, 2e-3)}
        records += run_all(attack_configs(options, str(EMBEDDED_MODEL), name, ()), quiet=True)
    click.echo("3/3  report\n")
    click.echo(report.summary_table(records))
    click.echo("\nWhat it means, claim by claim (one seed, untuned learning rates, a model of 2 M parameters):")
    for claim in report.claims(records):
        click.echo(f"\n{claim.id} {claim.title}: {claim.verdict}")
        for line in claim.text.splitlines():
            click.echo(f"   {line}")
    files = report.build([out], out)
    click.echo(f"\nDone in {time.monotonic() - start:.0f} s. Report: {next(f for f in files if f.suffix == '.html')}")
    click.echo(f"Compare the runs in MLflow: dlrscale ui --tracking-uri {uri}")
