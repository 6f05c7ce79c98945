"""`dlrscale plan`: what base and locked will need, without a GPU and without torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import click

from dlrscale import catalogue
from dlrscale.cli.options import PATH, STRATEGY_OPTIONS
from dlrscale.errors import ConfigError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Swept(click.ParamType):
    """One value, or several with commas between them: every combination is planned."""

    name = "value[,value...]"

    def __init__(self, kind: click.ParamType):
        self.kind = click.types.convert_type(kind)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """The values in the order given."""
        if isinstance(value, tuple):
            return value
        return tuple(self.kind.convert(part.strip(), param, ctx) for part in str(value).split(","))


def swept(*names: str, kind: Any, default: Any = None, **more: Any) -> Any:
    """An option that can be swept."""
    shown = {} if default is None else {"default": str(default), "show_default": True}
    return click.option(*names, type=Swept(kind), **shown, **more)


@click.command(context_settings=CONTEXT)
@click.option("--model", required=True, help="A model folder, a config.json, or a built-in shape (llama-2-7b).")
@swept("--strategy", kind=str, help="One of `dlrscale strategies`, or all.  [default: ckpt-layer]")
@click.option("--set", "knobs", multiple=True, metavar="KNOB=VALUE", help="A strategy's own knob.")
@swept("--zero", kind=click.IntRange(0, 3), help="ZeRO stage.  [default: the strategy's]")
@click.option("--offload-optimizer/--no-offload-optimizer", default=None, help="Optimizer states in host memory.")
@click.option("--offload-param/--no-offload-param", default=None, help="Parameters in host memory (ZeRO-3).")
@STRATEGY_OPTIONS
@click.option("--deepspeed_config", type=PATH, help="A DeepSpeed file; DeepSpeed itself checks it, in some seconds.")
@swept("--num-ranks", kind=click.IntRange(1), default=1, help="Devices.")
@click.option(
    "--nodes", type=click.IntRange(1), help="Hosts that they are spread over.  [default: as few as hold them]"
)
@swept("--micro-batch", kind=click.IntRange(1), help="Sequences per device and forward.  [default: 4]")
@click.option("--accumulation", type=click.IntRange(1), help="Micro-batches per optimizer step.  [default: 1]")
@swept("--seq-len", kind=click.IntRange(2), default=512, help="Tokens per sequence.")
@swept("--depth", kind=click.IntRange(1), help="Blocks in each DLR-Net.  [default: 32]")
@swept("--form", kind=click.Choice(["gated", "plain", "prenorm"]), help="[default: gated; plain on two-matrix MLPs]")
@click.option(
    "--rank", type=click.IntRange(1), help="One rank for all blocks.  [default: as many parameters as the MLP]"
)
@click.option("--layers", help="Layers that are locked, such as 2-10,15.  [default: all]")
@swept("--dtype", kind=click.Choice(["fp32", "bf16", "fp16"]), help="[default: the DeepSpeed file's, or bf16]")
@click.option("--attention", type=click.Choice(["sdpa", "eager"]), default="sdpa", show_default=True)
@swept("--hardware", kind=str, default="h100-80", help="An entry of docs/hardware.md, or of your --hardware-file.")
@click.option("--hardware-file", type=PATH, help="A file of your own devices, of the form of docs/hardware.md.")
@click.option("--tokens", type=click.IntRange(1), help="Tokens to the target, from a study: device-hours and cost.")
@click.option("--lock", is_flag=True, help="Plan the lock itself instead of an attack.")
@click.option("--heal/--no-heal", default=True, show_default=True, help="With --lock: with the end-to-end stage.")
@click.option("--harden/--no-harden", default=True, show_default=True, help="With --lock: with hardening.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--plot", type=PATH, help="Draw a sweep into this PNG file: saved bytes against --depth, else peaks.")
def plan(**options: Any) -> None:
    """Say what base and locked will need per device and host, whether it fits, and how long it takes at least.

    \b
    dlrscale plan --model llama-2-7b --strategy ckpt-layer --zero 3 --num-ranks 8 --depth 64 --hardware h100-80
    dlrscale plan --model llama-3-70b --strategy all --depth 8,16,32,64 --num-ranks 64 --nodes 8 --plot saved.png
    dlrscale plan --model ./base --lock --zero 2 --num-ranks 2 --json
    """
    from dlrscale.planner import plots, show

    refuse_unused(options)
    answers, left_out = [], {}
    questions = list(ask(options))
    for question in questions:
        try:
            if options["lock"]:
                answers.append(show.describe_lock(question(), harden=options["harden"], heal=options["heal"]))
            else:
                answers.append(show.describe(question(), tokens=options["tokens"]))
        except ConfigError as error:  # what one combination of a sweep cannot have leaves that one out
            left_out[str(error)] = error
    if not answers:
        raise ConfigError([fault for error in left_out.values() for fault in error.faults])
    for reason in left_out:
        click.echo(f"left out: {reason}", err=True)
    click.echo(show.as_json(answers, len(questions) > 1) if options["as_json"] else show.text(answers))
    if options["plot"]:
        plots.draw(answers, options["plot"])
        click.echo(f"plot: {options['plot']}", err=True)


def refuse_unused(options: dict[str, Any]) -> None:
    """Refuse options that a plan of a lock would not use, and a plot that could not be written.

    Args:
        options: The command's options.

    Raises:
        ConfigError: If there are such.
    """
    from pathlib import Path

    faults = []
    for key in (
        (
            "strategy",
            *catalogue.AXES,
            "activation_checkpointing",
            "activation_storage",
            "tiles",
            "optimizer",
            "knobs",
            "tokens",
        )
        if options["lock"]
        else ()
    ):
        if options[key]:
            name = "set" if key == "knobs" else key.replace("_", "-")
            faults.append(f"--{name}: a lock has none. Leave it out, or leave out --lock.")
    folder = Path(options["plot"] or ".").absolute().parent
    if not folder.is_dir():
        faults.append(f"--plot {options['plot']}: there is no folder {folder}. Make it, or name another.")
    if faults:
        raise ConfigError(faults)


def ask(options: dict[str, Any]) -> Iterator[Callable[[], Any]]:
    """Every combination of a command's options, each as what makes its question, or refuses to.

    Args:
        options: The command's options.

    Yields:
        For each combination, the option named last varying fastest, a function that gives a `sides.Question`.

    Raises:
        ConfigError: If the options name something that there is not.
    """
    from dlrscale import shapes
    from dlrscale.planner import hardware, sides

    config = sides.read_model(options["model"])
    shape = shapes.model_shape(config)
    names = options["strategy"] or ("ckpt-layer",)
    names = tuple(catalogue.STRATEGIES) if names == ("all",) else names
    for name in names:
        catalogue.strategy(name)
    faults = [
        f"--seq-len {length}: {options['model']} takes at most {shape.max_length} tokens."
        for length in options["seq_len"]
        if shape.max_length and length > shape.max_length
    ]
    devices = [hardware.find(name, options["hardware_file"]) for name in options["hardware"]]
    for ranks, device in itertools.product(options["num_ranks"], devices):
        nodes, held = options["nodes"] or -(-ranks // device.devices_per_node), device.devices_per_node
        if not nodes <= ranks <= nodes * held:
            faults.append(
                f"--nodes {nodes} and --num-ranks {ranks}: a host of {device.name} has 1 to {held} devices. Change one."
            )
    for key in ("depth", "form", "rank", "layers") if shape.ranks else ():
        if options[key]:
            faults.append(f"--{key}: {options['model']} is locked already and has its own. Leave it out.")
    if faults:
        raise ConfigError(faults)
    forms = options["form"] or ("gated" if shape.family.gated else "plain",)
    depths = options["depth"] or (32,)
    if shape.ranks:  # a locked model says its own form and depth
        forms, depths = (shape.form,), (max(map(len, shape.ranks.values())),)
    axes = (names, options["zero"] or (None,), devices, options["dtype"] or (None,), options["num_ranks"],
            options["micro_batch"] or (None,), options["seq_len"], forms, depths)  # fmt: skip
    for name, zero, device, dtype, ranks, micro, length, form, depth in itertools.product(*axes):
        about = {"num_ranks": ranks, "seq_len": length, "form": form, "depth": depth, "hardware": device}
        about |= {key: options[key] for key in ("rank", "layers", "attention")}
        held = device.devices_per_node
        about["nodes"] = options["nodes"] or -(-ranks // held)
        about["ranks_per_node"] = -(-ranks // options["nodes"]) if options["nodes"] else min(ranks, held)
        yield partial(decide, config, axes_of(name, options), options | {"zero": zero}, micro, dtype, about)


def axes_of(name: str, options: dict[str, Any]) -> catalogue.Strategy:
    """The strategy of a name with the axes that were chosen by hand."""
    return catalogue.combined(name, *(options[axis] for axis in catalogue.AXES))


def decide(
    config: dict[str, Any],
    entry: catalogue.Strategy,
    options: dict[str, Any],
    micro: int | None,
    dtype: str | None,
    about: dict[str, Any],
) -> Any:
    """A question with the levers in force, and what DeepSpeed would get.

    Args:
        config: The content of the model's config.json.
        entry: The strategy.
        options: The command's options, with one stage.
        micro: Sequences per rank and forward, if given.
        dtype: The precision, if given.
        about: What else the question is about.

    Returns:
        The `sides.Question`.

    Raises:
        ConfigError: If options contradict one another, the strategy, or the DeepSpeed file.
    """
    from dlrscale import engine
    from dlrscale.cli.levers import choose_levers, given_levers
    from dlrscale.config import RunConfig
    from dlrscale.planner import sides

    levers = choose_levers(catalogue.LOCK if options["lock"] else entry, options)
    pairs = dict(knob.partition("=")[::2] for knob in options["knobs"])
    place, accumulation, ranks = options["deepspeed_config"], options["accumulation"], about["num_ranks"]
    file = engine.read_file(place) if place else {}
    micro, accumulation = engine.resolve_batch(file, micro, accumulation, ranks)
    dtype = dtype or engine.file_dtype(file) or "bf16"

    def configure(levers: catalogue.Levers) -> dict[str, Any]:
        if place:
            run = RunConfig(
                model="", data="", out="", dtype=engine.resolve_dtype(file, dtype), deepspeed_config=place,
                num_ranks=ranks, micro_batch=micro, accumulation=accumulation, **dataclasses.asdict(levers),
            )  # fmt: skip
            return engine.merge(run)
        # Without torch, which would say what this machine has: a plan is for another one.
        own = engine.lever_config(levers.zero, levers.offload_optimizer, levers.offload_param, levers.optimizer)
        merged = own | {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
        return merged | ({dtype: {"enabled": True}} if dtype != "fp32" else {})

    search = None
    if entry.searches and not options["lock"]:
        search = sides.Search(by_hand=given_levers(options), gradient=options["gradient"], configure=configure)
    return sides.Question(
        config=config, entry=entry, levers=levers, knobs=entry.resolve_knobs(pairs), ds_config=configure(levers),
        dtype=dtype, micro_batch=micro, search=search, **about,
    )  # fmt: skip
