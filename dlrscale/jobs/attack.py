"""The attack: transform, choose what is trained, fine-tune, measure."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dlrscale import attacks, catalogue, export, models, shapes
from dlrscale.attacks.levers import Levers, mlp_parts
from dlrscale.config import AttackConfig
from dlrscale.engine import Engine
from dlrscale.jobs import forecast
from dlrscale.jobs.common import (
    ADAPTER_FOLDER,
    MODEL_FOLDER,
    Run,
    evaluator,
    load_corpora,
    make_batches,
    parameter_counts,
    whole_state,
)
from dlrscale.measure import SavedBytes
from dlrscale.planner.states import DTYPE_BYTES, zero3_linear
from dlrscale.train import LanguageModelling, Loop, Stage


def attack(run_: Run) -> None:
    """Fine-tune one model by one strategy and measure what it cost (design: attacking)."""
    config: AttackConfig = run_.config
    entry = config.entry
    with run_.phases.phase("load"):
        folder = Path(config.model)
        tokenizer = models.load_tokenizer(folder)
        corpora = load_corpora(config, tokenizer)
    if entry.transform != "none":
        with run_.phases.phase("transform"):
            folder = transform(run_, entry.transform, folder)
    with run_.phases.phase("load"):
        model, shape, levers = build(config, folder)
        ds = run_.start_engine(model, [p for p in model.parameters() if p.requires_grad])
    run_.metrics |= corpora.counts() | parameter_counts(model)
    loss = evaluator(run_, ds, corpora)

    def evaluate(suffix: str = "") -> dict[str, float]:
        found = {f"loss/heldout_task{suffix}": loss(corpora.heldout)}
        if corpora.heldout_base is not None:
            found[f"loss/heldout_base{suffix}"] = loss(corpora.heldout_base)
        return found

    objective = make_objective(config, SavedBytes(ds.module, mlp_parts(ds.module, shape), levers.storage))
    batches = make_batches(config, corpora, ds.rank, ds.world_size)
    loop = Loop(
        config=config,
        engine=ds,
        batches=batches,
        phases=run_.phases,
        out=run_.out,
        sink=run_.sink,
        evaluate=evaluate,
    )
    done = loop.resume()
    if done:  # counted in the first step, and carried by the checkpoint
        objective.counter, objective.counted, objective.seen = None, loop.state["counted"], loop.state["seen"]
    else:
        with run_.phases.phase("evaluate"):
            loop.state = {"start": evaluate("_start"), "counted": objective.counted, "seen": objective.seen}
    stage = Stage(name="train", steps=config.steps, lr=config.lr, warmup=config.warmup_steps, objective=objective)
    try:
        loop.run(stage, done)
        with run_.phases.phase("evaluate"):
            run_.metrics |= evaluate()
    except BaseException:
        with suppress(Exception):  # whatever fails here must not hide how the run ended
            compare(run_, objective.seen, alone=True)
        raise
    finally:
        run_.metrics |= loop.summary("train") | loop.state["start"] | objective.counted
        run_.metrics |= saved_formula(config, run_.ds_config, shape)
    compare(run_, objective.seen)
    with run_.phases.phase("save"):
        save(run_, ds, model, folder, tokenizer)


def make_objective(config: AttackConfig, counter: SavedBytes | None = None) -> Any:
    """What a step of the strategy does: the loop's own, or that of a gradient method that updates by itself."""
    own = gradient_file(config)
    return own.objective(config, counter) if hasattr(own, "objective") else LanguageModelling(counter)


def gradient_file(config: AttackConfig) -> ModuleType | None:
    """The file of the strategy's gradient method; None for plain backpropagation."""
    name = config.entry.gradient
    return None if name == catalogue.AXES["gradient"] else attacks.find(name)


def compare(run_: Run, seen: dict[str, Any], live_peak: float | None = None, alone: bool = False) -> None:
    """Put what was measured beside the plan; of the ranks, the one that holds most of a term counts.

    Args:
        run_: The run.
        seen: What an objective has seen (`train.LanguageModelling`), or a measurement's like it.
        live_peak: The most bytes of live tensors on this rank, where they were counted.
        alone: Do not ask the other ranks, which may have gone.
    """
    allocated = run_.phases.peaks().get("memory/accelerator_peak_allocated_bytes")
    mine = {"seen": seen, "accelerator_peak_bytes": allocated, "live_peak_bytes": live_peak}
    ranks = [mine] if alone else run_.engine.gather(mine)
    holding = [rank["seen"]["held"] for rank in ranks if "held" in rank["seen"]]
    held = {name: max((h[name] for h in holding), key=lambda h: sum(h.values())) for name in (holding or [{}])[0]}
    peaks = {k: max(rank[k] for rank in ranks) for k in ("accelerator_peak_bytes", "live_peak_bytes") if ranks[0][k]}
    plan = forecast.forecast(run_.config, run_.ds_config)
    run_.plan |= forecast.measured(plan, seen if "saved_bytes" in seen else {}, held, peaks)
    errors = {f"plan/error_percent_{k.removesuffix('_bytes')}": v for k, v in run_.plan["error_percent"].items()}
    run_.metrics |= {"plan/peak_bytes": plan.needs.peak_bytes} | {k: v for k, v in errors.items() if v is not None}


def build(config: AttackConfig, folder: Path) -> tuple[nn.Module, shapes.ModelShape, Levers]:
    """The model of a strategy in training mode: checkpointed as the levers say, its trainable set chosen.

    Args:
        config: The strategy, its knobs and levers.
        folder: The model's folder, after the transform.

    Returns:
        The model, or peft's model around it, its shape, and the levers that act inside it.
    """
    model = models.load_model(folder, config.dtype)
    shape = shapes.model_shape(model.config.to_dict())
    if config.activation_checkpointing != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainable, chosen = config.entry.trainable, model
    if trainable == "all":
        model.requires_grad_(True)
    else:
        torch.manual_seed(config.seed)  # the adapters' start
        chosen = attacks.find(trainable).choose(model, shape, config.knobs)
    return chosen.train(), shape, Levers(model, shape, config)


def save(run_: Run, ds: Engine, model: nn.Module, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what the attack has made: adapters always, the whole model where it was asked for.

    Args:
        run_: The run.
        ds: Its engine.
        model: The trained model, or peft's model around it.
        folder: The folder that the model was loaded from, after the transform.
        tokenizer: Its tokenizer.
    """
    config: AttackConfig = run_.config
    trainable = config.entry.trainable
    own = attacks.find(trainable) if trainable != "all" else None
    adapted = hasattr(own, "save")
    if not adapted and not config.save_model:
        return
    state = whole_state(ds, model, trained_only=True)
    if ds.rank == 0:
        name = Path(config.model).name
        if adapted:
            own.save(model, state, run_.out / ADAPTER_FOLDER, name)
        if config.save_model:
            whole = models.load_model(folder, models.stored_dtype(folder))
            if adapted:
                whole = own.merged(whole, run_.out / ADAPTER_FOLDER)
            else:
                whole.load_state_dict(state, strict=False)
                whole.tie_weights()
            export.save_attacked(whole, tokenizer, run_.out / MODEL_FOLDER, folder, run_.id, config.strategy)
    ds.barrier()


def transform(run_: Run, name: str, folder: Path) -> Path:
    """Let rank 0 transform the model into `<out>/transformed`; all ranks get the folder to train."""
    import torch.distributed as dist

    target = run_.out / "transformed"
    result = [None]
    if dist.get_rank() == 0:
        result = [str(attacks.find(name).apply(folder, target))]
    dist.broadcast_object_list(result, src=0)
    return Path(result[0])


def saved_formula(config: AttackConfig, ds_config: Mapping[str, Any], shape: shapes.ModelShape) -> dict[str, float]:
    """Derived bytes per token saved by all MLP parts, for strategies that keep them.

    Left out where layers are checkpointed, where adapters sit inside the MLPs, and where a dropout is on, in the
    MLPs (its mask's size depends on the device) or before adapters that would keep the MLP's own input.
    """
    trainable = config.entry.trainable
    dropout = shape.dropout or (shape.shared_input and config.knobs.get("dropout"))
    plain = config.activation_checkpointing == "none" and config.activation_storage == "device" and config.tiles == 1
    whole = config.entry.gradient in ("backprop", "lomo")
    if not plain or not whole or trainable not in ("all", "lora-attn") or dropout:
        return {}
    size, total = DTYPE_BYTES[config.dtype], 0
    for layer in range(shape.layers):
        # DeepSpeed's linear map of ZeRO-3 keeps its input also where its weight is frozen, if a gradient passes at all.
        own = shape.family.own_maps and layer not in (shape.ranks or {})
        passed = not (shape.parallel and layer == 0)
        kept = zero3_linear(ds_config) and passed and not own
        total += shapes.saved_bytes(shape, layer, size, trainable == "all" or kept)
    return {"memory/saved_mlp_bytes_per_token_formula": total}
