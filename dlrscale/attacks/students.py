"""What the transforms share that train students beside the locked model: engine, loop, data and the bill.

The steps go through `train.Loop` and DeepSpeed at the run's own levers, with a rate of their own. Rows and checkpoints
lie beside the run's under names of their own, so that a transform that was cut goes on as well, and the fine-tune that
follows takes none of its checkpoints for its own.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from dlrscale import data, engine
from dlrscale.config import AttackConfig
from dlrscale.data import StepBatch, TokenData
from dlrscale.distil import Distiller
from dlrscale.engine import Engine
from dlrscale.measure import Flops, Phases
from dlrscale.train import CHECKPOINT_FOLDER, Loop, Objective, Stage

PART = "transformed_"


class Corpora(Protocol):
    """The token data of a run, as `jobs.common.Corpora` has them."""

    train: TokenData
    heldout: TokenData
    public: TokenData | None
    pad: int


class Job(Protocol):
    """What a transform sees of a run, on every rank (`jobs.common.Run`)."""

    config: AttackConfig
    ds_config: dict[str, Any]
    phases: Phases
    out: Path
    metrics: dict[str, float]
    notes: dict[str, Any]
    corpora: Corpora


def own_config(config: AttackConfig, ds_config: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed configuration of a transform's steps.

    The run's own, without a schedule, which is of the fine-tune's rate and steps; and with AdamW where `--optimizer`
    chose another one, or none, for the fine-tune: the transform's rate is one for AdamW.
    """
    by_option = config.optimizer != "AdamW" and not config.deepspeed_config
    found = engine.merge(replace(config, optimizer="AdamW")) if by_option else ds_config
    return {key: value for key, value in found.items() if key != "scheduler"}


class Counted:
    """An objective whose first step's FLOPs are counted, those of all ranks, per token with padding.

    Args:
        objective: The objective.
        state: Gets the count as `flops_per_token`; where it has one, nothing is counted.
    """

    def __init__(self, objective: Objective, state: dict[str, Any]):
        self.objective, self.state = objective, state

    def __call__(self, engine: Engine, batch: StepBatch, phases: Phases) -> dict[str, float]:
        """One step; see `Objective`."""
        if "flops_per_token" in self.state:
            return self.objective(engine, batch, phases)
        flops = Flops()
        with flops.forward_pass():  # all of the step
            row = self.objective(engine, batch, phases)
        total = engine.sum_over_ranks(torch.tensor(float(flops.forward), dtype=torch.float64, device=engine.device))
        self.state["flops_per_token"] = float(total) / batch.processed_tokens
        return row


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """How students are trained: the rows' phase, the steps and peak rate, the text, and which step of the distiller's.

    `calibrated`: the floors of the error are needed. `errors`: the error by layer on held-out data is reported.
    """

    name: str
    steps: int
    lr: float
    text: TokenData
    step: Callable[[Distiller], Objective]
    calibrated: bool
    errors: bool


def train(run: Job, model: nn.Module, distiller: Distiller, lesson: Lesson) -> dict[int, dict[str, torch.Tensor]]:
    """Train the students in a model, add what it cost to the run's metrics, and let go of the engine.

    Args:
        run: The run.
        model: The locked model with students beside its DLR-Nets.
        distiller: Its switches.
        lesson: How.

    Returns:
        Whole weights of every student on rank 0; empty elsewhere.

    Raises:
        Diverged: If the loss or the gradient is not finite.
    """
    config, ds_config = run.config, own_config(run.config, run.ds_config)
    now = engine.Layout(config.num_ranks, int(engine.file_levers(ds_config)["zero"]))
    checkpoint = engine.find_checkpoint(run.out / f"{PART}{CHECKPOINT_FOLDER}", now)
    ds = Engine(model, distiller.parameters, ds_config, checkpoint)
    run.notes["transform_engine"] = ds.describe()
    batches = data.Batches(
        lesson.text,
        seed=config.seed,
        micro_batch=config.micro_batch,
        accumulation=config.accumulation,
        rank=ds.rank,
        world_size=ds.world_size,
        pad_id=run.corpora.pad,
    )
    loop = Loop(
        config=config, engine=ds, batches=batches, phases=run.phases.inside("transform"), out=run.out, part=PART
    )
    done = loop.resume()
    bill(run, seconds=sum(row["time/step_s"] for row in loop.rows))
    if not done:
        loop.state = calibrate(ds, distiller, lesson) if lesson.calibrated else {}
    distiller.floors = loop.state.get("floors", {})
    objective = Counted(lesson.step(distiller), loop.state)
    warmup = min(config.warmup_steps, lesson.steps)
    loop.run(Stage(name=lesson.name, steps=lesson.steps, lr=lesson.lr, warmup=warmup, objective=objective), done)
    processed = sum(row["processed_tokens"] for row in loop.rows)
    bill(run, loop.rows[-1]["tokens"], processed * loop.state["flops_per_token"])
    bill(run, *loop.state.get("calibration", (0, 0)))
    run.metrics["transform/loss"] = loop.rows[-1]["loss/train"]
    if lesson.errors:
        errors = distiller.layer_errors(ds, run.corpora.heldout, config.micro_batch, run.corpora.pad)
        run.metrics |= {f"transform/error_layer_{layer}": value for layer, value in errors.items()}
    weights = distiller.weights(ds)
    ds.close()
    return weights


def calibrate(ds: Engine, distiller: Distiller, lesson: Lesson) -> dict[str, Any]:
    """Set the floors, of the text's first sequences; returns them, and the tokens and FLOPs that it took."""
    batches, flops = data.calibration(lesson.text), Flops()
    with flops.forward_pass():
        distiller.calibrate(ds, batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return {"floors": distiller.floors, "calibration": (tokens, flops.forward)}


def bill(run: Job, tokens: float = 0, flops: float = 0, seconds: float = 0) -> None:
    """Add to what the run's transform has cost: tokens and FLOPs over all ranks, and seconds of an earlier start."""
    for name, value in (("tokens", tokens), ("flops", flops), ("time_s", seconds)):
        key = f"transform/{name}"
        run.metrics[key] = run.metrics.get(key, 0) + value


def release() -> None:
    """Give memory back that models and engines have held which nobody names any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget(out: Path) -> None:
    """Remove the checkpoints of a transform that is done."""
    shutil.rmtree(out / f"{PART}{CHECKPOINT_FOLDER}", ignore_errors=True)
