"""`dlrscale measure`: what a step of a strategy and inference cost, without training to an end."""

from __future__ import annotations

from typing import Any

import click

from dlrscale.cli.options import ENGINE_OPTIONS, PATH, PLAN_OPTIONS, STRATEGY_OPTIONS
from dlrscale.errors import ConfigError


def parse_batches(text: str) -> list[int]:
    """Read `1,4,16`; an empty text is an empty list.

    Args:
        text: The option's value.

    Returns:
        Batch sizes.

    Raises:
        ConfigError: If it is not of that form.
    """
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise ConfigError(f"--inference-batches {text}: write different numbers such as 1,4,16, or '' for none.")
    return [int(word) for word in words]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--model", required=True, type=PATH, help="Folder of the model to measure, locked or not.")
@click.option("--base", type=PATH, help="Folder of the base model: measured in the same way, for the ratios.")
@click.option("--strategy", required=True, help="One of `dlrscale strategies`.")
@click.option("--set", "knobs", multiple=True, metavar="KNOB=VALUE", help="A strategy's own knob.")
@click.option("--data", type=PATH, help="Training data as `attack` takes them.  [default: random token ids]")
@click.option("--public-data", type=PATH, help="A public text, for strategies that regress on one (undistil).")
@click.option("--columns", help="Names of the keys of records, as `attack` takes them.")
@click.option("--chat-template", type=PATH, help="Template file (jinja) of chats.  [default: the tokenizer's]")
@click.option("--document-separator", help="Text that stands between the documents of a plain text file.")
@click.option("--seq-len", type=int, default=512, show_default=True, help="Tokens per sequence.")
@click.option("--steps", type=int, default=12, show_default=True, help="Steps; the first two warm up.")
@click.option("--micro-batch", type=int, help="Sequences per rank and forward.  [default: 4]")
@click.option("--accumulation", type=int, help="Micro-batches per optimizer step.  [default: 1]")
@STRATEGY_OPTIONS
@click.option("--inference-batches", default="1,4", show_default=True, help="Batch sizes of inference; '': none.")
@click.option("--new-tokens", type=int, default=16, show_default=True, help="Tokens to decode behind the prompt.")
@click.option("--repeats", type=int, default=5, show_default=True, help="Timed repeats of inference.")
@click.option("--out", type=PATH, help="Folder of the run.  [default: results/<name>-<8 digits>]")
@click.option("--name", help="Name of the run, in the record and in MLflow.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="[default: bf16 on an accelerator, fp32 on the CPU]"
)
@ENGINE_OPTIONS
@PLAN_OPTIONS
def measure(
    base: str | None,
    strategy: str,
    knobs: tuple[str, ...],
    inference_batches: str,
    dry_run: bool,
    local_rank: int | None,
    **options: Any,
) -> None:
    """Measure memory, time and FLOPs of a strategy's steps, and the speed of inference; nothing is kept of the model.

    \b
    dlrscale measure --model ./locked --base ./base --strategy ckpt-layer --seq-len 512
    dlrscale measure --model ./locked --strategy full --data task.jsonl --num-ranks 8 --zero 3 --inference-batches ''
    """
    from dlrscale.cli import attack_configs, run_all
    from dlrscale.cli.run import inside_launch, run_rank
    from dlrscale.config import MeasureConfig

    options |= {"inference_batches": parse_batches(inference_batches), "checkpoint_every": 0}
    jobs_ = attack_configs(options, base, strategy, knobs, MeasureConfig)
    if inside_launch():
        if base:
            raise ConfigError("--base: a direct launch measures one model. Take dlrscale measure for both.")
        run_rank(jobs_[0], dry_run)
    records = run_all(jobs_, dry_run)
    if len(records) > 1:
        click.echo(side_by_side(*(entry["metrics"] for entry in records)))


def side_by_side(base: dict[str, float], locked: dict[str, float]) -> str:
    """The metrics that both sides have, with their ratio, as lines of text.

    Args:
        base: Metrics of the base model's record.
        locked: Metrics of the locked model's, those of the base's inference among them as `inference_base/...`.

    Returns:
        The lines.
    """
    beside = {k.replace("_base/", "/"): v for k, v in locked.items() if k.startswith("inference_base/")}
    base = base | beside
    names = [name for name in locked if name in base and not name.startswith(("loss/", "optim/", "data/", "measure/"))]
    names = [name for name in names if "_iqr_" not in name and (base[name] or locked[name])]
    width = max(map(len, names))
    lines = [f"{'locked / base':<{width}}  {'base':>14}  {'locked':>14}  {'ratio':>8}"]
    for name in sorted(names):
        ratio = f"{locked[name] / base[name]:8.3f}" if base[name] else f"{'-':>8}"
        lines.append(f"{name:<{width}}  {base[name]:>14,.6g}  {locked[name]:>14,.6g}  {ratio}")
    return "\n".join(lines)
