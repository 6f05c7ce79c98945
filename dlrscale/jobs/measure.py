"""The measurement: a few steps of an attack, timed without a hook and then counted, and the speed of inference."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

from dlrscale import engine, models, record, shapes
from dlrscale.attacks.levers import Levers, mlp_parts
from dlrscale.config import MeasureConfig
from dlrscale.data import StepBatch, token_data
from dlrscale.engine import Engine
from dlrscale.jobs.attack import build, compare, saved_formula, transform
from dlrscale.jobs.common import Corpora, Run, load_corpora, make_batches, parameter_counts
from dlrscale.measure import ATTENTION_COUNTED, Flops, LiveBytes, SavedBytes, speeds, spread, synchronise
from dlrscale.train import TIMING_WARMUP_STEPS, Diverged, LanguageModelling, Loop, Stage, described, not_finite

SAVED_FILE = "saved.json"
RANDOM_STEPS = 4  # steps until random token ids come again


def measure(run_: Run) -> None:
    """Measure one model under one strategy: inference, timed steps, then saved bytes, FLOPs and live bytes."""
    config: MeasureConfig = run_.config
    folder = Path(config.model)
    with run_.phases.phase("load"):
        shape = shapes.model_shape(shapes.read_config(folder))
        corpora = load_corpora(config, models.load_tokenizer(folder)) if config.data else random_corpora(config, shape)
        run_.corpora = corpora
    folder = transform(run_, folder)
    if config.inference_batches:
        with run_.phases.phase("inference"):
            run_.metrics |= inference(config)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what inference has reserved is none of the training's
    with run_.phases.phase("load"):
        model, shape, levers = build(config, folder)
        ds = run_.start_engine(model, [p for p in model.parameters() if p.requires_grad])
    run_.metrics |= corpora.counts() if config.data else {}
    run_.metrics |= parameter_counts(model)
    batches = make_batches(config, corpora, ds.rank, ds.world_size)
    loop = Loop(config=config, engine=ds, batches=batches, phases=run_.phases, out=run_.out, sink=run_.sink)
    loop.resume()
    objective = LanguageModelling()
    stage = Stage(name="train", steps=config.steps, lr=config.lr, warmup=config.warmup_steps, objective=objective)
    run_.metrics |= timed_steps(loop, stage)
    counts = Counts(ds, objective, batches.step(config.steps), config.dtype, levers)
    with run_.phases.phase("count"):
        run_.metrics |= counts.saved(mlp_parts(ds.module, shape), run_.out)
        run_.metrics |= saved_formula(config, run_.ds_config, shape)
        run_.metrics |= counts.flops(run_.metrics["time/step_s"])
        run_.metrics |= counts.live()
    live = [v for k, v in run_.metrics.items() if k.startswith("memory/live_peak_bytes_")]
    compare(run_, objective.seen, max(live, default=None))
    run_.notes["flops_attention"] = ATTENTION_COUNTED


def timed_steps(loop: Loop, stage: Stage) -> dict[str, float]:
    """The steps of a stage as `Loop` does them, and beside each the same step with a clock around it alone.

    Args:
        loop: The loop; its rows are those of the first kind.
        stage: The stage.

    Returns:
        The rows' summary, tokens per step, and what phases, rows and tracking add to a step.
    """
    ds = loop.engine

    def dressed(done: int) -> None:
        with ds.every_gradient() if done == 0 else contextlib.nullcontext():
            row = loop.step(stage, done)
        loop.write(row)
        fault = not_finite(row, loop.config.dtype)
        if fault is not None:
            raise Diverged(f"step {done + 1}: {fault}")

    def bare(done: int) -> None:
        stage.objective(ds, loop.batches.step(done), Around(contextlib.nullcontext))

    added = []
    for done in range(stage.steps):
        seconds = {}
        for kind in (dressed, bare) if done % 2 == 0 else (bare, dressed):  # neither always comes first
            synchronise(ds.device)
            start = time.perf_counter()
            kind(done)
            synchronise(ds.device)
            seconds[kind] = time.perf_counter() - start
        added.append(seconds[dressed] / seconds[bare] - 1)
    added = added[TIMING_WARMUP_STEPS:]
    overhead = {"measure/overhead_ratio": median(added), "measure/overhead_ratio_iqr": spread(added)}
    return loop.summary(stage.name) | token_counts(loop) | overhead


def random_corpora(config: MeasureConfig, shape: shapes.ModelShape) -> Corpora:
    """Random token ids of the vocabulary in sequences of --seq-len, each with a label: cost does not depend on them."""
    rows = config.global_batch * RANDOM_STEPS
    ids = list(np.random.default_rng(config.seed).integers(shape.vocabulary, size=(rows, config.seq_len)))
    train = token_data(ids, ids, packed=True, counts={})
    return Corpora(train, train, None, 0)


def token_counts(loop: Loop) -> dict[str, float]:
    """Real, processed and label tokens of a step over all ranks: medians over the timed steps."""
    totals = [0, *(row["tokens"] for row in loop.rows)]
    real = [after - before for before, after in zip(totals, totals[1:], strict=False)]
    rows = loop.rows[TIMING_WARMUP_STEPS:]
    return {
        "tokens/step": median(real[TIMING_WARMUP_STEPS:]),
        "tokens/step_processed": median(row["processed_tokens"] for row in rows),
        "tokens/step_label": median(row["label_tokens"] for row in rows),
    }


def inference(config: MeasureConfig) -> dict[str, float]:
    """Prefill and decode on rank 0: of the model as it was published, and of the base beside it where one is named."""
    found: dict[str, float] = {}
    device = engine.device()
    if torch.distributed.get_rank() == 0:
        places = {"inference_base": Path(config.base)} if config.base else {}
        sides = {
            side: models.load_model(place, config.dtype).to(device)
            for side, place in (places | {"inference": Path(config.model)}).items()
        }
        vocabulary = min(model.config.vocab_size for model in sides.values())
        prompt = config.seq_len - config.new_tokens
        measured = speeds(
            sides, config.inference_batches, vocabulary, prompt, config.new_tokens, config.repeats, device
        )
        for side, metrics in measured.items():
            found |= {name.replace("inference/", f"{side}/"): value for name, value in metrics.items()}
    engine.barrier()
    return found


@dataclass
class Around:
    """Puts a context of its own around each phase of a step, where `Phases` would take time and peaks.

    `phase` gives the context by the phase's name.
    """

    phase: Callable[[str], contextlib.AbstractContextManager]


@dataclass
class Counts:
    """What is counted in steps of its own, each a whole optimizer step on the same batch; never timed."""

    engine: Engine
    objective: LanguageModelling
    batch: StepBatch
    dtype: str
    levers: Levers

    def _step(self, context: Callable[[str], contextlib.AbstractContextManager]) -> None:
        self.objective(self.engine, self.batch, Around(context))

    def saved(self, parts: Mapping[str, nn.Module], out: Path) -> dict[str, float]:
        """Saved bytes of the first micro-batch, after forward and at their peak; by module into `saved.json`."""
        counter = SavedBytes(self.engine.module, dict(parts), self.levers.storage)
        phases_left, on_host = ["forward", "backward"], []

        @contextlib.contextmanager
        def context(name: str) -> Iterator[None]:
            if not phases_left or name != phases_left[0]:
                yield
                return
            phases_left.pop(0)
            if name == "forward":
                counter.__enter__()
            try:
                yield
            except BaseException:
                counter.__exit__()
                raise
            if name == "forward":
                counter.forward_done()
                on_host.append(counter.on_host_bytes)
            else:
                counter.__exit__()

        self._step(context)
        tokens = self.batch.micro_batches[0]["input_ids"].numel()
        counted = {"saved_bytes": counter.total, "saved_peak_bytes": counter.peak}
        found = {
            "memory/saved_bytes_per_token": counter.total / tokens,
            "memory/saved_mlp_bytes_per_token": sum(counter.by_part.values()) / tokens,
            "memory/saved_peak_bytes_per_token": counter.peak / tokens,
            "memory/saved_recomputed_bytes_per_token": counter.recomputed / tokens,
        }
        if on_host[0] is not None:
            counted["offloaded_activation_bytes"] = on_host[0]
            found["memory/offloaded_activation_bytes_per_token"] = on_host[0] / tokens
        self.objective.seen |= described(self.batch.micro_batches[0]) | counted
        if self.engine.rank == 0:
            by_module = {"tokens": tokens, "saved": counter.by_module, "recomputed": counter.recomputed_by_module}
            record.write_atomic(out / SAVED_FILE, record.dumps(by_module, indent=1) + "\n")
        return found

    def flops(self, step_s: float) -> dict[str, float]:
        """FLOPs of a step on this rank, and MFU where the device's peak is known."""
        flops = Flops()
        passes = {"forward": flops.forward_pass, "backward": flops.backward_pass}
        self._step(lambda name: passes.get(name, contextlib.nullcontext)())
        found = {
            "flops/forward": flops.forward,
            "flops/backward": flops.backward,
            "flops/recompute": flops.recompute,
        }
        if len(self.batch.micro_batches) == 1:  # then they are the micro-batch's whose saved bytes were counted
            self.objective.seen["flops"] = {name.partition("/")[2]: value for name, value in found.items()}
        mfu = flops.mfu(step_s, self.engine.device, self.dtype)
        return found if mfu is None else found | {"mfu": mfu}

    def live(self) -> dict[str, float]:
        """Live bytes of all tensors by phase, on a CPU; an accelerator's allocator counts by itself."""
        if self.engine.device.type != "cpu":
            return {}
        with LiveBytes() as live:
            start = live.now
            self._step(live.phase)
        peaks = {f"memory/live_peak_bytes_{name}": value for name, value in live.peaks.items()}
        return {"memory/live_start_bytes": start} | peaks


def describe_measured(metrics: Mapping[str, float]) -> list[str]:
    """The lines of a measurement for people, from its metrics."""
    names = [k for k in sorted(metrics) if not k.startswith(("data/", "loss/", "optim/"))]
    width = max(map(len, names))
    return [f"{name:<{width}}  {metrics[name]:,.6g}" for name in names]
