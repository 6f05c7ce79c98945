"""The one training loop: locks, heals, attacks and pretraining differ in the objective of a step alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from dlrscale import record
from dlrscale.config import RunConfig
from dlrscale.data import IGNORE, Batches, StepBatch
from dlrscale.engine import Engine
from dlrscale.evaluate import cross_entropy_sum
from dlrscale.measure import Phases, SavedBytes

TIMING_WARMUP_STEPS = 2
CHECKPOINT_FOLDER = "checkpoints"
HELDOUT = "loss/heldout_task"


class Diverged(Exception):
    """The loss or the gradient is not finite any more."""


class Objective(Protocol):
    """What one optimizer step does: forward, backward and update over all micro-batches of a batch."""

    def __call__(self, engine: Engine, batch: StepBatch, phases: Phases) -> dict[str, float]:
        """Do the step; returns `loss/train` (the mean over the step's tokens of all ranks) and other metrics."""


class Sink(Protocol):
    """Where step rows go besides the file: the tracker, on rank 0."""

    def log_step(self, row: dict[str, Any], step: int) -> None:
        """Take one row."""


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """The rate of optimizer step 1..steps: linear to `peak` at step `warmup`, then half a cosine to 0."""
    if step <= warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def not_finite(row: dict[str, Any], dtype: str) -> str | None:
    """What of a step says that the training has diverged, or None.

    DeepSpeed leaves out a step whose gradients are not finite, silently. With fp16 that is how its loss scale is
    found; otherwise such a run would go on and learn nothing.
    """
    if not math.isfinite(row["loss/train"]):
        return f"the loss is {row['loss/train']}"
    norm = row.get("optim/grad_norm", 0.0)
    if dtype != "fp16" and not (math.isfinite(norm) and norm >= 0):
        return f"the gradient norm is {norm}"
    return None


@dataclass(kw_only=True)
class Stage:
    """A stretch of steps with one objective and one schedule. `offset` steps of earlier stages came before."""

    name: str
    steps: int
    lr: float
    warmup: int
    objective: Objective
    offset: int = 0


@dataclass(kw_only=True)
class Loop:
    """Everything that the steps of a run share.

    `state` travels with every checkpoint; `evaluate` gives held-out metrics when `--eval-every` asks for them. Where
    the best held-out loss at the n-th evaluation is above the n-th of `stop_above`, the run ends `pruned_at` that step.
    `part` is what the names of its files in `out` begin with, where it is not the run's own training.
    """

    config: RunConfig
    engine: Engine
    batches: Batches
    phases: Phases
    out: Path
    sink: Sink | None = None
    state: dict[str, Any] = field(default_factory=dict)
    evaluate: Callable[[], dict[str, float]] | None = None
    stop_above: Sequence[float | None] = ()
    pruned_at: int | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    part: str = ""

    @property
    def checkpoint_folder(self) -> Path:
        """Where this run's checkpoints lie."""
        return self.out / f"{self.part}{CHECKPOINT_FOLDER}"

    @property
    def steps_file(self) -> Path:
        """Where this run's step rows lie."""
        return self.out / f"{self.part}{record.STEPS_FILE}"

    def resume(self) -> int:
        """Go on from the checkpoint that the engine has found; returns the steps done, 0 for a fresh start."""
        done = 0
        if self.engine.checkpoint is not None:
            self.state = self.engine.load()
            done = self.engine.checkpoint.step
        steps = self.steps_file
        if steps.exists():
            self.rows = [row for row in record.read_lines(steps) if row["step"] <= done]
        if self.engine.rank == 0:
            record.write_atomic(steps, "".join(record.dumps(row) + "\n" for row in self.rows))
        self.engine.barrier()
        return done

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` steps."""
        with self.phases.phase("save"):
            self.engine.save(self.checkpoint_folder, done, self.state, self.config.keep_checkpoints)

    def run(self, stage: Stage, done: int) -> int:
        """Run a stage from the `done`-th step of the whole run on.

        Args:
            stage: The stage.
            done: The steps of the whole run that are done so far.

        Returns:
            The steps that are done now.

        Raises:
            Diverged: If the loss or the gradient is not finite.
        """
        last = stage.offset + stage.steps
        first = done
        while done < last:
            step = done + 1
            with self.engine.every_gradient() if done == first else nullcontext():
                row = self.step(stage, done)
            fault = not_finite(row, self.config.dtype)
            if fault is not None:
                self.write(row)
                raise Diverged(f"{stage.name} step {step}: {fault}")
            done = step
            if self.evaluate and self.config.eval_every and done % self.config.eval_every == 0:
                with self.phases.phase("evaluate"):
                    row |= self.evaluate()
            self.write(row)
            if done < last and self.is_hopeless():
                self.pruned_at = done
                break
            if self.config.checkpoint_every and (done % self.config.checkpoint_every == 0 or done == last):
                self.save(done)
        return done

    def is_hopeless(self) -> bool:
        """Whether the newest row has an evaluation by which this run is not worth its end; rank 0 decides for all."""
        if not self.stop_above or HELDOUT not in self.rows[-1]:
            return False
        losses = [row[HELDOUT] for row in self.rows if HELDOUT in row]
        limit = self.stop_above[len(losses) - 1] if len(losses) <= len(self.stop_above) else None
        return self.engine.gather(limit is not None and min(losses) > limit)[0]

    def step(self, stage: Stage, done: int) -> dict[str, Any]:
        """Do one step; returns its row."""
        config, engine = self.config, self.engine
        self.phases.take_step()
        start = time.perf_counter()
        batch = self.batches.step(done)
        data_s = time.perf_counter() - start
        # Whatever is random in a step depends on the step alone, so that a resumed run repeats it.
        torch.manual_seed((config.seed * 1_000_003 + done) * 4_099 + engine.rank)
        engine.set_lr(learning_rate(done - stage.offset + 1, stage.steps, stage.lr, stage.warmup))
        rate = engine.lr
        start = time.perf_counter()
        metrics = stage.objective(engine, batch, self.phases)
        step_s = time.perf_counter() - start
        tokens_before = self.rows[-1]["tokens"] if self.rows else 0
        return {
            "step": done + 1,
            "phase": stage.name,
            **metrics,
            "tokens": tokens_before + batch.tokens,
            "processed_tokens": batch.processed_tokens,
            "label_tokens": batch.label_tokens,
            "optim/lr": rate,
            "time/step_s": step_s,
            "time/data_s": data_s,
            **{f"time/{name}_s": value for name, value in self.phases.take_step().items()},
            "throughput/tokens_per_s": batch.tokens / step_s,
            "throughput/tokens_per_s_per_device": batch.tokens / step_s / engine.world_size,
        }

    def write(self, row: dict[str, Any]) -> None:
        """Add a row to the run's file and tell the tracker."""
        self.rows.append(row)
        if self.engine.rank == 0:
            record.append_line(self.steps_file, row)
            if self.sink is not None:
                self.sink.log_step({k: v for k, v in row.items() if "/" in k}, row["step"])

    def summary(self, stage: str) -> dict[str, float]:
        """Medians over the steps of a stage without its first ones, which warm up, and the last loss."""
        rows = [row for row in self.rows if row["phase"] == stage]
        timed = rows[TIMING_WARMUP_STEPS:] or rows
        if not rows:
            return {}
        keys = [k for k in timed[-1] if k.startswith(("time/", "throughput/"))]
        found = {k: median(row[k] for row in timed if k in row) for k in keys}
        return {"loss/train": rows[-1]["loss/train"], **found}


def described(micro: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What of a micro-batch decides what it costs: its shape, its label tokens, and whether it is padded."""
    batch, length = micro["input_ids"].shape
    return {
        "batch": batch,
        "length": length,
        "labels": int((micro["labels"][:, 1:] != IGNORE).sum()),
        "masked": not bool(micro["attention_mask"].all()),
    }


class LanguageModelling:
    """Next-token cross-entropy, the mean over all label tokens of the step, whatever rank holds them.

    `counted` holds metrics of the first micro-batch, `seen` what the plan is compared with: that micro-batch's shape
    and bytes, and under `held` what the engine held before the second update, the first that knows all states.

    Args:
        counter: Counts the bytes saved for backward in the first micro-batch that is seen, if given.
    """

    def __init__(self, counter: SavedBytes | None = None):
        self.counter = counter
        self.counted: dict[str, float] = {}
        self.seen: dict[str, Any] = {}
        self._steps = 0

    def __call__(self, engine: Engine, batch: StepBatch, phases: Phases) -> dict[str, float]:
        """One step; see `Objective`."""
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        scale = engine.world_size * len(batch.micro_batches) / batch.label_tokens
        norm = math.nan
        for index, micro in enumerate(batch.micro_batches):
            engine.boundary(index == len(batch.micro_batches) - 1)
            micro = {k: v.to(engine.device) for k, v in micro.items()}
            with phases.phase("forward"):
                nats = self._forward(engine, micro)
            with phases.phase("backward"):
                engine.backward(nats, scale)
            total += nats.detach().double()
        self._steps += 1
        if self._steps == TIMING_WARMUP_STEPS:  # the last one that is not timed
            self.seen["held"] = engine.held()
        with phases.phase("optimizer"):
            norm = engine.step()
        return {
            "loss/train": float(engine.sum_over_ranks(total)) / batch.label_tokens,
            "optim/grad_norm": norm,
        }

    def _forward(self, engine: Engine, micro: dict[str, torch.Tensor]) -> torch.Tensor:
        def loss() -> torch.Tensor:
            logits = engine.ds(
                input_ids=micro["input_ids"], attention_mask=micro["attention_mask"], use_cache=False
            ).logits
            return cross_entropy_sum(logits, micro["labels"])[0]

        if self.counter is None:
            return loss()
        with self.counter:
            nats = loss()
        tokens = micro["input_ids"].numel()
        self.counted["memory/saved_bytes_per_token"] = self.counter.total / tokens
        self.counted["memory/saved_mlp_bytes_per_token"] = sum(self.counter.by_part.values()) / tokens
        self.seen |= described(micro) | {"saved_bytes": self.counter.total}
        if self.counter.on_host_bytes is not None:
            self.counted["memory/offloaded_activation_bytes_per_token"] = self.counter.on_host_bytes / tokens
            self.seen["offloaded_activation_bytes"] = self.counter.on_host_bytes
        self.counter = None
        return nats
