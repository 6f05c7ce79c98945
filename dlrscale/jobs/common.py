"""What the bodies of all jobs share: the run's state on this rank, its data, its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dlrscale import data
from dlrscale.config import RunConfig
from dlrscale.data import Batches, TokenData
from dlrscale.engine import Engine, Layout, file_levers, find_checkpoint
from dlrscale.errors import ConfigError
from dlrscale.evaluate import heldout_loss
from dlrscale.measure import Phases
from dlrscale.train import CHECKPOINT_FOLDER

MODEL_FOLDER, ADAPTER_FOLDER = "model", "adapter"


@dataclass
class Corpora:
    """The token data of a run.

    `heldout` is of the same task; `heldout_base` of the base model's own domain; `public` what an attacker can read
    besides the task.
    """

    train: TokenData
    heldout: TokenData
    heldout_base: TokenData | None
    pad: int
    public: TokenData | None = None

    def counts(self) -> dict[str, float]:
        """What was read, truncated and dropped, as metrics."""
        named = {"train": self.train, "heldout": self.heldout, "heldout_base": self.heldout_base}
        named["public"] = self.public
        return {
            f"data/{part}_{key}": value
            for part, found in named.items()
            if found is not None
            for key, value in found.counts.items()
        }


@dataclass
class Run:
    """What the body of a job works with on this rank."""

    config: RunConfig
    ds_config: dict[str, Any]
    phases: Phases
    out: Path
    id: str
    sink: Any = None
    metrics: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    gates: dict[str, Any] = field(default_factory=dict)
    engine: Engine | None = None
    corpora: Corpora | None = None

    def start_engine(self, model: nn.Module, trainable: list[nn.Parameter]) -> Engine:
        """Start DeepSpeed on a model; the record tells what is really in use, and where the run goes on from.

        Args:
            model: The model.
            trainable: The parameters to train.

        Returns:
            The engine.

        Raises:
            ConfigError: If there is nothing to train.
        """
        if not trainable:
            raise ConfigError(
                "No parameter of the model is trainable: there is nothing to train. Take another strategy."
            )
        now = Layout(self.config.num_ranks, int(file_levers(self.ds_config)["zero"]))
        checkpoint = find_checkpoint(self.out / CHECKPOINT_FOLDER, now)
        ds = Engine(model, trainable, self.ds_config, checkpoint)
        self.engine = ds
        self.notes |= ds.describe()
        if checkpoint is not None:
            self.notes["resumed"] = {"step": checkpoint.step, "written_by": str(checkpoint.written)}
            self.notes["resumed"]["skipped"] = {f"step{step}": why for step, why in checkpoint.skipped.items()}
        return ds


def load_corpora(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Corpora:
    """Read and tokenise all data of a run; without --heldout, the last 5 % of the data are set apart.

    Args:
        config: The resolved configuration.
        tokenizer: The model's tokenizer.

    Returns:
        The data for training, for evaluation, and for a transform.

    Raises:
        ConfigError: If a file is wrong, or there is less than one global batch.
    """

    chat_template = data.read_template(config.chat_template)

    def read(place: str, limit: int = 0, columns: Mapping[str, str] | None = config.columns) -> TokenData:
        return data.load(
            place,
            tokenizer,
            seq_len=config.seq_len,
            columns=columns,
            document_separator=config.document_separator,
            chat_template=chat_template,
            limit=limit,
        )

    train = read(config.data)
    if config.heldout:
        heldout = read(config.heldout, config.heldout_limit)
    else:
        train, heldout = data.split_heldout(train)
        heldout = heldout.subset(slice(config.heldout_limit or None))
    part = getattr(config, "heldout_part", None)
    heldout = data.heldout_half(heldout, part) if part else heldout
    base = getattr(config, "heldout_base", None)
    # Another domain's file may have other keys.
    own = read(base, config.heldout_limit, data.fitting_columns(base, config.columns)) if base else None
    place = getattr(config, "public_data", None)
    public = read(place, 0, data.fitting_columns(place, config.columns)) if place else None
    corpora = Corpora(train, heldout, own, data.pad_id(tokenizer), public)
    if public is not None:
        make_batches(config, replace(corpora, train=public), 0, config.num_ranks)
    batches = make_batches(config, corpora, 0, config.num_ranks)  # refuses less than one global batch
    train.counts.update(batches.unused(config.steps + getattr(config, "heal_steps", 0)))
    return corpora


def make_batches(config: RunConfig, corpora: Corpora, rank: int, world_size: int) -> Batches:
    """The training batches of one rank."""
    return Batches(
        corpora.train,
        seed=config.seed,
        micro_batch=config.micro_batch,
        accumulation=config.accumulation,
        rank=rank,
        world_size=world_size,
        pad_id=corpora.pad,
    )


def evaluator(run_: Run, ds: Engine, corpora: Corpora) -> Callable[[TokenData], float]:
    """Held-out loss in nats per label token of the engine's model as it stands, over all ranks."""

    def loss(part: TokenData) -> float:
        training = ds.module.training
        ds.module.eval()
        found = heldout_loss(
            lambda ids, mask: ds.ds(input_ids=ids, attention_mask=mask, use_cache=False).logits,
            part,
            batch=run_.config.micro_batch,
            rank=ds.rank,
            world_size=ds.world_size,
            pad_id=corpora.pad,
            device=ds.device,
            reduce=ds.sum_over_ranks,
        )["loss"]
        ds.module.train(training)
        return found

    return loss


def parameter_counts(model: nn.Module) -> dict[str, float]:
    """Trainable and total parameters, whole ones also where ZeRO-3 has partitioned them."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return {"params/total": sum(n for n, _ in sizes), "params/trainable": sum(n for n, grad in sizes if grad)}


def whole_state(ds: Engine, model: nn.Module, trained_only: bool = False) -> dict[str, torch.Tensor]:
    """Whole parameters by name on the CPU of rank 0, gathered one by one; all ranks call it."""
    state = {}
    for name, parameter in model.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        with ds.gathered([parameter]):
            if ds.rank == 0:
                state[name] = parameter.detach().cpu().clone()
    return state
