"""The options that several commands share; each has one name everywhere."""

from __future__ import annotations

from collections.abc import Callable

import click

from dlrscale.catalogue import CHECKPOINTING, STORAGE


def options(*choices: Callable) -> Callable:
    """Apply several option decorators in the order in which they are to be shown."""

    def decorate(function: Callable) -> Callable:
        for choice in reversed(choices):
            function = choice(function)
        return function

    return decorate


PATH = click.Path(path_type=str)
DATA_OPTIONS = options(
    click.option(
        "--data",
        required=True,
        type=PATH,
        help="Training data: text or JSON lines, .gz or not, a data set's folder, hf:ORG/NAME, or embedded:NAME.",
    ),
    click.option(
        "--columns",
        help="Names of the keys of records: prompt=question,completion=answer, text=story or messages=chat.",
    ),
    click.option("--chat-template", type=PATH, help="Template file (jinja) of chats.  [default: the tokenizer's]"),
    click.option("--document-separator", help="Text that stands between the documents of a plain text file."),
    click.option("--heldout", type=PATH, help="Held-out data of the same kind.  [default: the last 5 % of --data]"),
    click.option(
        "--heldout-limit",
        type=int,
        default=0,
        show_default=True,
        help="Held-out sequences at most, the first ones; 0: all.",
    ),
    click.option("--seq-len", type=int, default=512, show_default=True, help="Tokens per sequence."),
)
TRAIN_OPTIONS = options(
    click.option("--steps", type=int, default=300, show_default=True, help="Optimizer steps."),
    click.option(
        "--lr",
        type=float,
        help="Peak learning rate.  [default: the DeepSpeed file's, or 3e-3; 3e-2 for SGD and lomo, 3e-5 for mezo]",
    ),
    click.option("--warmup-steps", type=int, help="Steps of linear warm-up.  [default: 10]"),
)
STRATEGY_OPTIONS = options(
    click.option("--transform", help="Another transform than the strategy's; `dlrscale strategies --axes` lists all."),
    click.option("--trainable", help="Another trainable set than the strategy's."),
    click.option("--gradient", help="Another gradient method than the strategy's."),
    click.option(
        "--activation-checkpointing", type=click.Choice(list(CHECKPOINTING)), help="[default: the strategy's]"
    ),
    click.option(
        "--activation-storage",
        type=click.Choice(list(STORAGE)),
        help="Where what the layers keep for backward lies.  [default: the strategy's]",
    ),
    click.option(
        "--tiles",
        type=click.IntRange(1),
        help="Pieces in which tokens go through each MLP or DLR-Net.  [default: the strategy's]",
    ),
    click.option(
        "--optimizer",
        help="AdamW, or a lighter type that a DeepSpeed file may name: SGD, Adafactor.  [default: the strategy's]",
    ),
)
SEARCH_OPTIONS = options(
    click.option(
        "--trials",
        type=click.IntRange(1),
        help="Tune rate, warm-up, batch and the strategy's own knobs in so many trials, on each side.",
    ),
    click.option("--lr-range", metavar="LOW,HIGH", help="Learning rates to try.  [default: the strategy's]"),
    click.option("--seeds", help="Seeds such as 0,1,2, one run each, of the best trial's settings.  [default: --seed]"),
    click.option(
        "--target",
        help="Held-out task loss to reach: nats per token, or base+MARGIN. Gives tokens, FLOPs and device-hours to it.",
    ),
)
RUN_OPTIONS = options(
    click.option("--out", type=PATH, help="Folder of the run.  [default: results/<name>-<8 digits>]"),
    click.option("--name", help="Name of the run, in the record and in MLflow."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
    click.option(
        "--dtype",
        type=click.Choice(["fp32", "bf16", "fp16"]),
        help="[default: bf16 on an accelerator, fp32 on the CPU]",
    ),
    click.option("--micro-batch", type=int, help="Sequences per rank and forward.  [default: 4]"),
    click.option("--accumulation", type=int, help="Micro-batches per optimizer step.  [default: 1]"),
    click.option(
        "--eval-every",
        type=int,
        default=0,
        show_default=True,
        help="Steps between held-out evaluations; 0: at the end.",
    ),
    click.option(
        "--checkpoint-every",
        type=int,
        default=50,
        show_default=True,
        help="Steps between checkpoints; 0: none.",
    ),
    click.option("--keep-checkpoints", type=int, default=2, show_default=True, help="How many checkpoints stay."),
)
ENGINE_OPTIONS = options(
    click.option("--zero", type=click.IntRange(0, 3), help="ZeRO stage.  [default: 2, or the strategy's]"),
    click.option("--offload-optimizer/--no-offload-optimizer", default=None, help="Optimizer states in host memory."),
    click.option("--offload-param/--no-offload-param", default=None, help="Parameters in host memory (ZeRO-3)."),
    click.option("--deepspeed_config", type=PATH, help="A DeepSpeed file of your own, or one of ds_configs/."),
    click.option(
        "--num-ranks", type=click.IntRange(1), help="Processes.  [default: one per accelerator; 1 on the CPU]"
    ),
    click.option("--hostfile", type=PATH, help="DeepSpeed hostfile, for several nodes."),
    click.option("--tracking-uri", help="MLflow store, or none.  [default: sqlite in ./results]"),
    click.option("--local_rank", type=int, hidden=True, help="What the DeepSpeed launcher adds by itself."),
    click.option(
        "--dry-run",
        is_flag=True,
        help="Print the merged DeepSpeed configuration, the launch line and the predicted peak; run nothing.",
    ),
)
PLAN_OPTIONS = options(
    click.option("--hardware", help="Device that the job must fit (docs/hardware.md).  [default: the one in use]"),
    click.option("--hardware-file", type=PATH, help="A file of your own devices."),
    click.option("--force", is_flag=True, help="Run where the plan says that it cannot fit."),
)
