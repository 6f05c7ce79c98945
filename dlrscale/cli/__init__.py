"""The `dlrscale` command. Heavy imports stand inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from dlrscale import __version__, catalogue, launcher
from dlrscale.cli.measure import measure
from dlrscale.cli.options import (
    DATA_OPTIONS,
    ENGINE_OPTIONS,
    PATH,
    PLAN_OPTIONS,
    RUN_OPTIONS,
    SEARCH_OPTIONS,
    STRATEGY_OPTIONS,
    TRAIN_OPTIONS,
)
from dlrscale.cli.plan import plan
from dlrscale.errors import ConfigError, DlrscaleError, JobError, describe

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="dlrscale")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def dlrscale() -> None:
    """Measure what a fine-tuning lock on open weights really costs an attacker.

    \b
    dlrscale demo                 the whole line on an embedded model, in minutes, without a download
    dlrscale plan --help          what base and locked model will need, without a GPU
    dlrscale lock --help          replace a model's MLPs by deep low-rank residual networks
    dlrscale attack --help        fine-tune base and locked model by one strategy, on DeepSpeed
    dlrscale measure --help       memory, time and FLOPs of a few such steps, and the speed of inference
    dlrscale report results       tables, plots and verdicts from the records
    dlrscale doctor               what this machine lacks for a run, and what a bug report needs
    """


dlrscale.add_command(plan)
dlrscale.add_command(measure)


def main(argv: list[str] | None = None) -> None:
    """Run the command; errors that are written for people end in one message and their exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    os.environ.update(launcher.usable_home())
    debug = "--debug" in argv  # anywhere, also behind the command's name
    argv = [word for word in argv if word != "--debug"]
    try:
        dlrscale.main(args=argv, prog_name="dlrscale", standalone_mode=False, obj=argv)
        code = 0
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.Abort:
        code = 130
        _say("interrupted; the same command goes on from the last checkpoint")
    except click.ClickException as error:
        code = 2
        if _speaks():
            error.show()
    except DlrscaleError as error:
        code = error.exit_code
        if debug:
            traceback.print_exc()
        _say(str(error))
    except Exception as error:
        message = describe(error)
        if debug or message is None:
            raise
        code = JobError.exit_code
        _say(message)
    sys.exit(code)


def _speaks() -> bool:
    """Whether this process may print: it is no rank, or it is the first one."""
    return os.environ.get("RANK", "0") == "0"


def _say(message: str) -> None:
    if _speaks():
        click.echo(f"Error: {message}", err=True)


@dlrscale.command(context_settings=CONTEXT)
@click.option("--model", required=True, type=PATH, help="Folder of the pretrained base model.")
@DATA_OPTIONS
@TRAIN_OPTIONS
@click.option(
    "--form",
    type=click.Choice(["gated", "plain", "prenorm"]),
    help="[default: gated; plain on two-matrix MLPs]",
)
@click.option("--depth", type=int, default=32, show_default=True, help="Blocks in each DLR-Net.")
@click.option("--rank", type=int, help="One rank for all blocks.  [default: as many parameters as the MLP]")
@click.option("--start", type=click.Choice(["warm", "cold"]), help="[default: warm where it is defined, else cold]")
@click.option(
    "--coupling",
    type=float,
    default=0.25,
    show_default=True,
    help="How strongly blocks depend on one another.",
)
@click.option("--harden/--no-harden", default=True, show_default=True, help="Train the flattened model to be useless.")
@click.option(
    "--harden-weight",
    type=float,
    default=0.03,
    show_default=True,
    help="Weight of hardening; a tenth while healing.",
)
@click.option(
    "--harden-target", type=float, default=1.0, show_default=True, help="Flat error at which hardening stops."
)
@click.option("--layers", help="Layers to lock, such as 2-10,15.  [default: all]")
@click.option("--heal-steps", type=int, default=75, show_default=True, help="Steps of end-to-end distillation.")
@click.option("--heal-lr", type=float, default=1e-3, show_default=True)
@RUN_OPTIONS
@ENGINE_OPTIONS
@PLAN_OPTIONS
def lock(dry_run: bool, local_rank: int | None, **options: Any) -> None:
    """Lock a model: distil a DLR-Net for each MLP, heal, evaluate, export.

    \b
    dlrscale lock --model ./base --data corpus.txt --document-separator '<|endoftext|>' --depth 32 --zero 2
    dlrscale lock --model ./base --data corpus.jsonl --num-ranks 8 --zero 3 --offload-optimizer --dry-run
    deepspeed launch/lock.py --model ./base --data corpus.txt --deepspeed_config ds_configs/zero2.json
    """
    from dlrscale import folders, shapes
    from dlrscale.cli.levers import choose_levers
    from dlrscale.cli.run import check_family, execute, inside_launch, resolve, run_rank
    from dlrscale.config import LockConfig

    options["model"] = str(folders.find_model(options["model"]))
    check_family(options["model"])
    shape = shapes.model_shape(shapes.read_config(options["model"]))
    options["form"] = options["form"] or ("gated" if shape.family.gated else "plain")
    if options["start"] is None:
        options["start"] = "warm" if shapes.FORMS[options["form"]].start_on == shape.kind else "cold"
    config = resolve(LockConfig, options, choose_levers(catalogue.LOCK, options), "lock")
    if inside_launch():
        run_rank(config, dry_run)
    if not dry_run:
        click.echo(f"lock {config.name}: form {config.form}, depth {config.depth}, {config.start} start", err=True)
    execute(config, dry_run=dry_run)


@dlrscale.command(context_settings=CONTEXT)
@click.option("--model", required=True, type=PATH, help="Folder of the model to attack, locked or not.")
@click.option("--base", type=PATH, help="Folder of the base model: attacked in the same way, for the ratios.")
@click.option("--strategy", required=True, help="One of `dlrscale strategies`.")
@click.option(
    "--set",
    "knobs",
    multiple=True,
    metavar="KNOB=VALUE",
    help="A strategy's own knob; `dlrscale strategies NAME` lists them.",
)
@DATA_OPTIONS
@click.option(
    "--heldout-base",
    type=PATH,
    help="Held-out data of the base model's own domain, of any keys.",
)
@click.option("--public-data", type=PATH, help="A public text, for strategies that regress on one (undistil).")
@TRAIN_OPTIONS
@STRATEGY_OPTIONS
@SEARCH_OPTIONS
@click.option("--save-model", is_flag=True, help="Write the attacked model to <out>/model, beside the adapters.")
@RUN_OPTIONS
@ENGINE_OPTIONS
@PLAN_OPTIONS
def attack(
    base: str | None,
    strategy: str,
    knobs: tuple[str, ...],
    dry_run: bool,
    local_rank: int | None,
    **options: Any,
) -> None:
    """Fine-tune a locked model, and with --base the unlocked one, by one strategy.

    \b
    dlrscale attack --model ./locked --base ./base --strategy ckpt-layer --data task.jsonl --heldout test.jsonl
    dlrscale attack --model ./locked --strategy lora --set rank=16 --data gsm8k.jsonl.gz \\
        --columns prompt=question,completion=answer --zero 3 --offload-optimizer
    dlrscale attack --model ./locked --base ./base --strategy lora --data task.jsonl --heldout test.jsonl \\
        --trials 16 --seeds 0,1,2 --target base+0.05 --out results/lora-searched
    """
    from dlrscale import report
    from dlrscale.cli.run import inside_launch, run_rank
    from dlrscale.cli.search import attack_many, read_wanted

    wanted = read_wanted(options, knobs, base)
    jobs_ = attack_configs(options, base, strategy, knobs)
    if inside_launch():
        if wanted:
            raise ConfigError(
                "--trials, --seeds and --target: a direct launch is one run. Use dlrscale attack, which launches each."
            )
        if base:
            raise ConfigError(
                "--base: a direct launch attacks one model. Launch it again with --model BASE, or use dlrscale attack."
            )
        run_rank(jobs_[0], dry_run)
    records = attack_many(jobs_, wanted, dry_run) if wanted else run_all(jobs_, dry_run)
    if len(records) > 1:
        click.echo(report.summary_table(records))


def attack_configs(
    options: dict[str, Any], base: str | None, strategy: str, knobs: tuple[str, ...], kind: type | None = None
) -> list[Any]:
    """The configurations of an attack, or of a measurement: of the base model, if given, and of the model itself."""
    from dlrscale import config as configuration
    from dlrscale import folders, shapes
    from dlrscale.cli.levers import choose_levers, with_best_levers
    from dlrscale.cli.run import check_family, resolve
    from dlrscale.config import AttackConfig, MeasureConfig

    entry = catalogue.combined(strategy, *(options.get(axis) for axis in catalogue.AXES))
    pairs = dict(knob.partition("=")[::2] for knob in knobs)
    levers = choose_levers(entry, options)
    options = options | {"model": str(folders.find_model(options["model"]))}
    chosen = {axis: getattr(entry, axis) for axis in catalogue.AXES}
    shared = options | chosen | {"strategy": strategy, "knobs": entry.resolve_knobs(pairs)}
    base = base and str(folders.find_model(base, "--base"))
    with launcher.imports.many():
        from dlrscale import models  # torch and transformers: a mistyped name was told before

    for folder in filter(None, (options["model"], base)):
        check_family(folder)
        models.check_folder(folder)
    manifest = folders.read_manifest(options["model"])
    if manifest is None and shapes.model_shape(shapes.read_config(options["model"])).locked:
        raise ConfigError(
            f"--model {options['model']} is locked, but has no lock.json. Copy it from the lock's own folder."
        )
    shared["lock_id"] = manifest["lock_id"] if manifest else None
    if base and manifest is None:
        raise ConfigError(f"--base is for a locked --model; {options['model']} has no lock.json. Leave --base out.")
    if base and shapes.model_shape(shapes.read_config(base)).locked:
        raise ConfigError(f"--base {base} is a locked model itself. Name the unlocked one.")
    if base and configuration.digest(base) != manifest["base"]["digest"]:
        raise ConfigError(
            f"--base {base} is not the model that {options['model']} was made from ({manifest['base']['name']}, by the "
            "digest in its lock.json). Name that one, or there is nothing to compare."
        )
    found = []
    for side, folder in (("base", base), ("locked" if manifest else "base", options["model"])):
        if folder is None:
            continue
        own = shared | {"model": folder}
        if kind is MeasureConfig and base:  # both models take turns in one process, that of the locked one's job
            own |= {"inference_batches": []} if side == "base" else {"base": base}
        if base and options.get("out"):
            own["out"] = str(Path(options["out"]) / side)
        if options.get("name"):
            own["name"] = f"{options['name']}-{side}" if base else options["name"]
        default = f"{strategy}-locked-k{manifest['depth']}" if side == "locked" else f"{strategy}-base"
        config = resolve(kind or AttackConfig, own, levers, f"measure-{default}" if kind else default)
        if entry.searches:
            config = with_best_levers(config, entry, options, own)
        found.append(config)
    return found


def run_all(configs: list[Any], dry_run: bool = False, quiet: bool = False) -> list[dict[str, Any]]:
    """Run jobs one after the other; one that fails does not keep the next from running.

    Args:
        configs: The configurations of the jobs, in the order to run them.
        dry_run: Print the merged DeepSpeed configurations and the launch lines instead.
        quiet: Do not print the summaries.

    Returns:
        The records, in the order of the jobs; empty after a dry run.

    Raises:
        PlanError: If one cannot fit, before any has run.
        JobError: If one failed, after all have run.
    """
    from dlrscale.cli.run import execute, refuse_unfit

    if not dry_run:
        refuse_unfit(configs)
    records, failures = [], []
    for config in configs:
        try:
            entry = execute(config, dry_run=dry_run, quiet=quiet)
        except JobError as error:
            failures.append(str(error))
            continue
        if entry is not None:
            records.append(entry)
    if failures:
        raise JobError("\n".join(failures))
    return records


@dlrscale.command(context_settings=CONTEXT)
@click.argument("name", required=False)
@click.option("--axes", is_flag=True, help="List the axes and what can be chosen on each.")
def strategies(name: str | None, axes: bool) -> None:
    """List the attacker strategies, or show one with its axes, levers, knobs, exactness, cost and source.

    \b
    dlrscale strategies
    dlrscale strategies lora
    dlrscale strategies --axes
    """
    if axes:
        for axis in catalogue.AXES:
            click.echo(axis)
            for value, idea in catalogue.choices(axis).items():
                click.echo(f"  {value:<12} {idea}")
        for lever, values in (("checkpointing", catalogue.CHECKPOINTING), ("storage", catalogue.STORAGE)):
            click.echo(f"activation-{lever}")
            for value, text in values.items():
                click.echo(f"  {value:<12} {text}")
        click.echo("zero, offload-optimizer, offload-param, tiles, optimizer: see dlrscale attack --help")
        return
    if name is None:
        width = max(map(len, catalogue.STRATEGIES))
        for entry in catalogue.STRATEGIES.values():
            click.echo(f"{entry.name:<{width}}  {entry.idea}")
        return
    entry = catalogue.strategy(name)
    levers = dataclasses.asdict(entry.resolve(catalogue.Levers()))
    lines = {
        "idea": entry.idea,
        "source": entry.source,
        **{axis: f"{getattr(entry, axis)}: {catalogue.choices(axis)[getattr(entry, axis)]}" for axis in catalogue.AXES},
        "exact": "yes, plain autograd's gradient" if catalogue.is_exact(entry, levers["activation_storage"]) else "no",
        "stages": f"ZeRO {', '.join(map(str, entry.stages))}" + (f". {entry.why_not}" if entry.why_not else ""),
        "levers": ", ".join(f"{k.replace('_', '-')} {v}" for k, v in levers.items()),
        "saved": entry.saved,
        "cost": entry.cost,
        "knobs": "; ".join(f"{k.name}={k.default} ({k.text}; {k.allowed})" for k in entry.knobs) or "none",
    }
    click.echo(entry.name)
    for key, value in lines.items():
        click.echo(f"  {key:<10} {value}")


@dlrscale.command(context_settings=CONTEXT)
@click.argument("places", nargs=-1, type=PATH)
@click.option("--out", type=PATH, help="Folder of the report.  [default: the first place]")
def report(places: tuple[str, ...], out: str | None) -> None:
    """Turn the records below some folders into report.md and one self-contained report.html.

    \b
    dlrscale report
    dlrscale report results/demo --out results/demo
    """
    from dlrscale import report as reporting

    folders = [Path(p) for p in places] or [Path("results")]
    for file in reporting.build(folders, Path(out) if out else folders[0]):
        click.echo(file)


@dlrscale.command(context_settings=CONTEXT)
@click.option("--tracking-uri", help="MLflow store to show.  [default: sqlite in ./results]")
@click.option("--port", type=int, default=5000, show_default=True)
def ui(tracking_uri: str | None, port: int) -> None:
    """Open the MLflow UI on the loopback interface.

    \b
    dlrscale ui
    dlrscale ui --port 5001
    """
    from dlrscale import tracking

    tracking.serve(tracking_uri or tracking.default_uri(), port=port)


@dlrscale.command(context_settings=CONTEXT)
@click.argument("places", nargs=-1, type=PATH)
@click.option("--tracking-uri", help="MLflow store to bring up to date.  [default: sqlite in ./results]")
def mirror(places: tuple[str, ...], tracking_uri: str | None) -> None:
    """Bring MLflow up to date with the runs below some folders: all that it has not yet, and how they ended.

    \b
    dlrscale mirror
    dlrscale mirror results/demo --tracking-uri http://127.0.0.1:5000
    """
    from dlrscale import tracking

    uri = tracking.resolve(tracking_uri)
    found = tracking.find([Path(p) for p in places] or [Path("results")])
    tracking.make_ready(uri)
    faults, done = [], []
    for folder in found:
        try:
            replayed = tracking.replay(folder, uri)
        except ConfigError as error:
            faults += error.faults
            continue
        except JobError as error:
            rest = len(found) - len(done) - len(faults)
            raise JobError(f"{error}\n{rest} of {len(found)} runs are left; nothing of them is lost.") from None
        done.append(replayed)
        click.echo(f"{folder}: {replayed}")
    ended = tracking.sweep(uri)
    counts = {state: sum(entry.state == state for entry in done) for state in tracking.STATES}
    click.echo(
        f"{len(done)} runs: {', '.join(f'{count} {state}' for state, count in counts.items() if count)}"
        + (f"; {len(ended)} more without a process were ended" if ended else "")
        + f"; MLflow at {tracking.shown(uri)}"
    )
    if faults:
        raise ConfigError(faults)


@dlrscale.command(context_settings=CONTEXT)
@click.option("--quick", is_flag=True, help="Leave out the start of ranks.")
@click.option("--build", is_flag=True, help="Build DeepSpeed's CPU Adam now, 30 to 120 s.")
@click.option("--tracking-uri", help="MLflow store to look at, or none.  [default: sqlite in ./results]")
@click.option("--hostfile", type=PATH, help="DeepSpeed hostfile to look at.")
def doctor(quick: bool, build: bool, tracking_uri: str | None, hostfile: str | None) -> None:
    """Say what this machine lacks for a run and how to mend it, and print what a bug report needs.

    \b
    dlrscale doctor
    dlrscale doctor --quick
    dlrscale doctor --build
    """
    from dlrscale.cli.doctor import bug_report, examine

    failed = 0
    for name, finding in examine(quick, build, tracking_uri, hostfile):
        mend = f"\n{'':16}-> {finding.mend}" if finding.mend else ""
        click.echo(f"{finding.level:<5} {name:<9} {finding.text}{mend}")
        failed += finding.level == "FAIL"
    click.echo(f"\n--- for a bug report ---\n{bug_report()}\n---")
    if failed:
        raise JobError(f"{failed} of the checks failed. Mend what the lines with FAIL say.")


@dlrscale.command(context_settings=CONTEXT)
@DATA_OPTIONS
@TRAIN_OPTIONS
@click.option("--width", type=int, default=160, show_default=True, help="Model width D.")
@click.option("--inner", type=int, default=432, show_default=True, help="Inner width F of the MLPs.")
@click.option("--num-layers", type=int, default=6, show_default=True)
@click.option("--heads", type=int, default=8, show_default=True)
@click.option("--kv-heads", type=int, default=4, show_default=True)
@click.option(
    "--vocabulary", type=int, default=2048, show_default=True, help="Tokens of the tokenizer that is trained."
)
@RUN_OPTIONS
@ENGINE_OPTIONS
def pretrain(dry_run: bool, local_rank: int | None, **options: Any) -> None:
    """Train a small Llama and its tokenizer on text, from random numbers.

    \b
    dlrscale pretrain --data embedded:stdlib --heldout embedded:stdlib-heldout --seq-len 256 --steps 2000
    """
    from dlrscale.cli.levers import choose_levers
    from dlrscale.cli.run import execute, inside_launch, resolve, run_rank
    from dlrscale.config import PretrainConfig

    levers = choose_levers(catalogue.LOCK, options)
    config = resolve(PretrainConfig, options, levers, "pretrain")
    if inside_launch():
        run_rank(config, dry_run)
    execute(config, dry_run=dry_run)


@dlrscale.command(context_settings=CONTEXT)
@click.option("--out", type=PATH, default="results/demo", show_default=True, help="Folder of all its runs.")
@click.option("--tracking-uri", help="MLflow store.  [default: sqlite in ./results]")
def demo(out: str, tracking_uri: str | None) -> None:
    """Lock the embedded model, attack base and locked with four strategies, and say what it means.

    \b
    dlrscale demo
    """
    from dlrscale.cli.demo import run_demo

    run_demo(Path(out), tracking_uri)
