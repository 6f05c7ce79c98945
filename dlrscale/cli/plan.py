"""`dlrscale plan`: what base and locked will need, without a GPU and without torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import click

from dlrscale import catalogue
from dlrscale.cli.options import PATH
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
@swept("--strategy", kind=str, default="ckpt-layer", help="One of `dlrscale strategies`, or all.")
@click.option("--set", "knobs", multiple=True, metavar="KNOB=VALUE", help="A strategy's own knob.")
@swept("--zero", kind=click.IntRange(0, 3), help="ZeRO stage.  [default: the strategy's]")
@click.option("--offload-optimizer/--no-offload-optimizer", default=None, help="Optimizer states in host memory.")
@click.option("--offload-param/--no-offload-param", default=None, help="Parameters in host memory (ZeRO-3).")
@click.option("--activation-checkpointing", type=click.Choice(["none", "layer"]), help="[default: the strategy's]")
@click.option("--deepspeed_config", type=PATH, help="A DeepSpeed file of your own, or one of ds_configs/.")
@swept("--num-ranks", kind=click.IntRange(1), default=1, help="Devices.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Hosts that they are spread over.")
@swept("--micro-batch", kind=click.IntRange(1), help="Sequences per device and forward.  [default: 4]")
@click.option("--accumulation", type=click.IntRange(1), help="Micro-batches per optimizer step.  [default: 1]")
@swept("--seq-len", kind=click.IntRange(2), default=512, help="Tokens per sequence.")
@swept("--depth", kind=click.IntRange(1), default=32, help="Blocks in each DLR-Net.")
@swept("--form", kind=click.Choice(["gated", "plain", "prenorm"]), help="[default: gated; plain on two-matrix MLPs]")
@click.option(
    "--rank", type=click.IntRange(1), help="One rank for all blocks.  [default: as many parameters as the MLP]"
)
@click.option("--layers", help="Layers that are locked, such as 2-10,15.  [default: all]")
@swept("--dtype", kind=click.Choice(["fp32", "bf16", "fp16"]), default="bf16")
@click.option("--attention", type=click.Choice(["sdpa", "eager"]), default="sdpa", show_default=True)
@swept("--hardware", kind=str, default="h100-80", help="An entry of docs/hardware.md, or of your --hardware-file.")
@click.option("--hardware-file", type=PATH, help="A file of your own devices, of the form of docs/hardware.md.")
@click.option("--tokens", type=click.IntRange(1), help="Tokens to the target, from a study: device-hours and cost.")
@click.option("--lock", is_flag=True, help="Plan the lock itself instead of an attack.")
@click.option("--heal/--no-heal", default=True, show_default=True, help="With --lock: with the end-to-end stage.")
@click.option("--harden/--no-harden", default=True, show_default=True, help="With --lock: with hardening.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--plot", type=PATH, help="Draw the peaks of a sweep into this PNG file.")
def plan(**options: Any) -> None:
    """Say what base and locked will need per device and host, whether it fits, and how long it takes at least.

    \b
    dlrscale plan --model llama-2-7b --strategy ckpt-layer --zero 3 --num-ranks 8 --depth 64 --hardware h100-80
    dlrscale plan --model llama-3-70b --strategy all --depth 8,16,32,64 --num-ranks 64 --nodes 8 --plot peaks.png
    dlrscale plan --model ./base --lock --zero 2 --num-ranks 2 --json
    """
    from dlrscale.planner import show

    questions = list(ask(options))
    if options["lock"]:
        answers = [show.describe_lock(q, harden=options["harden"], heal=options["heal"]) for q in questions]
    else:
        answers = [show.describe(q, tokens=options["tokens"]) for q in questions]
    click.echo(show.as_json(answers) if options["as_json"] else show.text(answers))
    if options["plot"]:
        show.draw(answers, options["plot"])
        click.echo(f"plot: {options['plot']}", err=True)


def ask(options: dict[str, Any]) -> Iterator[Any]:
    """Every combination of a command's options as a question.

    Args:
        options: The command's options.

    Yields:
        A question for each combination, the option named last varying fastest.

    Raises:
        ConfigError: If the options contradict one another, or name something that there is not.
    """
    from dlrscale import shapes
    from dlrscale.planner import hardware, sides

    config = sides.read_model(options["model"])
    shape = shapes.model_shape(config)
    names = options["strategy"]
    if names == ("all",):
        names = tuple(catalogue.STRATEGIES)
    for name in names:
        catalogue.strategy(name)
    forms = options["form"] or ("gated" if shape.family.gated else "plain",)
    depths, many = options["depth"], len(names) > 1
    if shape.ranks:  # a locked model says its own form and depth
        forms, depths = (shape.form,), (max(map(len, shape.ranks.values())),)
    pairs = dict(knob.partition("=")[::2] for knob in options["knobs"])
    axes = (names, options["zero"] or (None,), options["hardware"], options["dtype"], options["num_ranks"],
            options["micro_batch"] or (None,), options["seq_len"], forms, depths)  # fmt: skip
    for name, zero, device, dtype, ranks, micro, length, form, depth in itertools.product(*axes):
        entry = catalogue.strategy(name)
        try:
            levers, ds_config = decide(
                catalogue.LOCK if options["lock"] else entry, options | {"zero": zero}, micro, ranks, dtype
            )
        except ConfigError:
            if many:  # a lever given for all contradicts one strategy's idea
                continue
            raise
        yield sides.Question(
            config=config,
            strategy=name,
            levers=levers,
            knobs=entry.resolve_knobs(pairs),
            ds_config=ds_config,
            dtype=dtype,
            micro_batch=ds_config["train_micro_batch_size_per_gpu"],
            seq_len=length,
            num_ranks=ranks,
            nodes=options["nodes"],
            depth=depth,
            form=form,
            rank=options["rank"],
            layers=options["layers"],
            attention=options["attention"],
            hardware=hardware.find(device, options["hardware_file"]),
        )


def decide(
    entry: catalogue.Strategy, options: dict[str, Any], micro: int | None, ranks: int, dtype: str
) -> tuple[catalogue.Levers, dict[str, Any]]:
    """The levers in force, and what DeepSpeed would get.

    Args:
        entry: The strategy, or the lock.
        options: The command's options, with one stage.
        micro: Sequences per rank and forward, if given.
        ranks: The number of ranks.
        dtype: The precision.

    Returns:
        The levers and the merged configuration.
    """
    from dlrscale import engine
    from dlrscale.cli.run import choose_levers
    from dlrscale.config import RunConfig

    levers = choose_levers(entry, options)
    place, accumulation = options["deepspeed_config"], options["accumulation"]
    file = engine.read_file(place) if place else {}
    micro, accumulation = engine.resolve_batch(file, micro, accumulation, ranks)
    if not place:  # without torch, which would say what this machine has: a plan is for another one
        merged = engine.lever_config(levers.zero, levers.offload_optimizer, levers.offload_param)
        return levers, merged | {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            dtype: {"enabled": True},
        }
    config = RunConfig(
        model="", data="", out="", dtype=engine.resolve_dtype(file, dtype), deepspeed_config=place, num_ranks=ranks,
        micro_batch=micro, accumulation=accumulation, zero=levers.zero, offload_optimizer=levers.offload_optimizer,
        offload_param=levers.offload_param,
    )  # fmt: skip
    return levers, engine.merge(config)
