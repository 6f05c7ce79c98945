"""Our attack step against transformers' Trainer: one DeepSpeed configuration, one model, the same batches."""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import LiveBytes, Sizes, reset_rss_peak, rss_peak
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from dlrscale import data, engine
from dlrscale.config import AttackConfig
from dlrscale.measure import Phases
from dlrscale.train import LanguageModelling, Loop, Stage

LR, WARMUP, SCHEDULE_STEPS = 1e-4, 3, 10
BUCKET = 1_000_000  # elements


def configure(sizes: Sizes, ranks: int, steps: int) -> tuple[AttackConfig, dict[str, Any]]:
    """The attack `full` at ZeRO 2 and its DeepSpeed configuration, with a schedule so that both sides follow one."""
    config = AttackConfig(
        model="", data="", out="", strategy="full", zero=2, num_ranks=ranks, micro_batch=sizes.batch,
        seq_len=sizes.length, lr=LR, steps=steps, warmup_steps=0, checkpoint_every=0,
    )  # fmt: skip
    rates = {"warmup_min_lr": 0, "warmup_max_lr": LR, "warmup_num_steps": SCHEDULE_STEPS}
    merged = engine.merge(config) | {"scheduler": {"type": "WarmupLR", "params": rates}}
    # The usual buckets of 2 GB would be most of what lives here, on both sides.
    merged["zero_optimization"] |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    return config, merged


class Ours:
    """The training loop with its engine, as the job builds it (jobs/attack.py)."""

    def __init__(self, sizes: Sizes, config: AttackConfig, ds_config: dict[str, Any], batches: data.Batches, out: Path):
        model = sizes.llama().train()
        model.requires_grad_(True)
        self.engine = engine.Engine(model, list(model.parameters()), ds_config)
        self.phases = Phases(self.engine.device)
        self.loop = Loop(config=config, engine=self.engine, batches=batches, phases=self.phases, out=out)
        self.stage = Stage(name="train", steps=config.steps, lr=LR, warmup=0, objective=LanguageModelling())
        self.done = 0

    def steps(self, count: int) -> float:
        """Do some steps, rows written as always; the seconds of all of them."""
        start = time.perf_counter()
        for _ in range(count):
            self.loop.write(self.loop.step(self.stage, self.done))
            self.done += 1
        return time.perf_counter() - start

    @property
    def model(self) -> torch.nn.Module:
        """The model."""
        return self.engine.module


class InOrder(Dataset):
    """The items of our batches in our order, as the Trainer takes them: one dict per sequence."""

    def __init__(self, batches: data.Batches, steps: int):
        self.tokens = batches.data.input_ids
        self.items = [int(i) for k in range(steps) for i in batches.items(k).reshape(-1)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.tokens[self.items[place]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class OrderedTrainer(Trainer):
    """A Trainer that takes its data in their order."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def make_trainer(
    sizes: Sizes, config: AttackConfig, ds_config: dict[str, Any], batches: data.Batches, out: Path,
    callback: TrainerCallback,
) -> OrderedTrainer:  # fmt: skip
    """A Trainer with its own defaults (it logs every 500 steps), but for what must be the same on both sides."""
    arguments = TrainingArguments(
        output_dir=str(out), use_cpu=engine.device_type() == "cpu", deepspeed=ds_config, max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch, learning_rate=LR, report_to=[], save_strategy="no",
        disable_tqdm=True, warmup_steps=SCHEDULE_STEPS,
    )  # fmt: skip
    return OrderedTrainer(
        model=sizes.llama(), args=arguments, train_dataset=InOrder(batches, config.steps), callbacks=[callback],
        data_collator=default_data_collator,
    )  # fmt: skip


class Turns(TrainerCallback):
    """After each block of the Trainer's steps, a block of ours; the seconds of each block."""

    def __init__(self, ours: Ours, block: int):
        self.ours, self.block = ours, block
        self.seconds: dict[str, list[float]] = {"ours": [], "trainer": []}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first block starts."""
        self._begin()

    def _begin(self) -> None:
        engine.barrier()
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """At the end of a block, it is our turn."""
        if state.global_step <= WARMUP:
            if state.global_step == WARMUP:
                self.ours.steps(WARMUP)
                self._begin()
        elif (state.global_step - WARMUP) % self.block == 0:
            self.seconds["trainer"].append(time.perf_counter() - self._start)
            engine.barrier()
            self.seconds["ours"].append(self.ours.steps(self.block))
            self._begin()


def batches_of(sizes: Sizes, config: AttackConfig, rank: int) -> data.Batches:
    """The batches of one rank."""
    return data.Batches(
        sizes.data(64), seed=0, micro_batch=config.micro_batch, accumulation=1, rank=rank,
        world_size=config.num_ranks, pad_id=0,
    )  # fmt: skip


def time_both(sizes: Sizes, rank: int, ranks: int, *, pairs: int, block: int) -> dict[str, Any]:
    """Seconds per step of both sides in one process and one process group, block by block in turns."""
    config, ds_config = configure(sizes, ranks, WARMUP + pairs * block)
    batches = batches_of(sizes, config, rank)
    with tempfile.TemporaryDirectory() as out:
        ours = Ours(sizes, config, ds_config, batches, Path(out))
        turns = Turns(ours, block)
        trainer = make_trainer(sizes, config, ds_config, batches, Path(out) / "trainer", turns)
        trainer.train()
    moved = distance(sizes.llama(), trainer.model)
    apart = distance(ours.model, trainer.model) / moved
    assert apart < 1e-2, f"weights moved by {moved}, and the sides differ by {apart} of it: not the same work"
    seconds = {name: [s / block for s in blocks] for name, blocks in turns.seconds.items()}
    return {"seconds": seconds, "weights_moved": moved, "weights_apart": apart, "phases": ours.phases.phases}


def distance(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """The largest difference of two weights."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


class Peak(TrainerCallback):
    """Starts the high-water marks anew once the warm-up is over."""

    def __init__(self, counter: LiveBytes):
        self.counter = counter

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """The states are there after the warm-up."""
        if state.global_step == WARMUP:
            reset_rss_peak()
            self.counter.peak = self.counter.now


def peak(sizes: Sizes, rank: int, ranks: int, *, side: str, live: bool, steps: int) -> dict[str, Any]:
    """Peak of one side alone in its process over steps after the warm-up: resident memory, or live bytes of tensors.

    Live bytes are counted in a run of their own, since counting holds Python objects.
    """
    config, ds_config = configure(sizes, ranks, WARMUP + steps)
    batches = batches_of(sizes, config, rank)
    counter = LiveBytes()
    with tempfile.TemporaryDirectory() as out, counter if live else contextlib.nullcontext():
        if side == "ours":
            ours = Ours(sizes, config, ds_config, batches, Path(out))
            ours.steps(WARMUP)
            ours.phases.phases.clear()
            reset_rss_peak()
            counter.peak = counter.now
            ours.steps(steps)
            phases = [p["host_peak_rss_bytes"] for p in ours.phases.phases.values()]
            found = max(rss_peak(), *phases)  # each phase starts the mark anew
        else:
            make_trainer(sizes, config, ds_config, batches, Path(out) / "trainer", Peak(counter)).train()
            found = rss_peak()
    return {"bytes": counter.peak if live else found}
