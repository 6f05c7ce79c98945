"""The attack: transform, choose what is trained, fine-tune, measure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dlrscale import attacks, catalogue, export, folders, models, record, search, shapes
from dlrscale.attacks.levers import Levers, mlp_parts
from dlrscale.attacks.students import forget, release
from dlrscale.config import AttackConfig
from dlrscale.data import Batches
from dlrscale.engine import Engine, barrier
from dlrscale.jobs import forecast, gates
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

TRANSFORMED = "transformed"


def attack(run_: Run) -> None:
    """Fine-tune one model by one strategy and measure what it cost."""
    config: AttackConfig = run_.config
    run_.gates |= search.gates(config, "locked" if folders.read_manifest(config.model) else "base")
    with run_.phases.phase("load"):
        folder = Path(config.model)
        tokenizer = models.load_tokenizer(folder)
        corpora = run_.corpora = load_corpora(config, tokenizer)
    folder = transform(run_, folder)
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
        stop_above=config.stop_above,
    )
    done = loop.resume()
    if done:  # counted in the first step, and carried by the checkpoint
        objective.counter, objective.counted, objective.seen = None, loop.state["counted"], loop.state["seen"]
        run_.gates |= loop.state["gates"]
    else:
        with run_.phases.phase("evaluate"):
            start = evaluate("_start")
        with run_.phases.phase("check"):
            run_.gates |= check_gradient(config, ds, levers, batches)
        loop.state = {"start": start, "counted": objective.counted, "seen": objective.seen, "gates": dict(run_.gates)}
    stage = Stage(name="train", steps=config.steps, lr=config.lr, warmup=config.warmup_steps, objective=objective)
    try:
        loop.run(stage, done)
        if loop.pruned_at is None:
            with run_.phases.phase("evaluate"):
                run_.metrics |= evaluate()
        else:
            run_.notes["pruned_at"] = loop.pruned_at
            run_.metrics |= {k: v for k, v in loop.rows[-1].items() if k.startswith("loss/heldout_")}
    except BaseException:
        with suppress(Exception):  # whatever fails here must not hide how the run ended
            compare(run_, objective.seen, alone=True)
        raise
    finally:
        run_.metrics |= loop.summary("train") | loop.state["start"] | objective.counted
        run_.metrics |= saved_formula(config, run_.ds_config, shape)
        run_.metrics |= bill(run_, loop.rows)
    compare(run_, objective.seen)
    run_.gates["engaged"] = gates.engaged(config, levers, run_.plan, ds.describe(), run_.metrics, done < config.steps)
    run_.metrics |= gates.metrics(run_.gates)
    if config.is_trial:
        return
    with run_.phases.phase("save"):
        save(run_, ds, model, folder, tokenizer)


def check_gradient(config: AttackConfig, ds: Engine, levers: Levers, batches: Batches) -> dict[str, Any]:
    """The gate `gradient` of a run that goes backward; none where the method has no gradient to compare."""
    entry = config.entry
    if config.is_trial:
        return {"gradient": {"holds": None, "why": "a trial of a search; the runs that follow it are checked"}}
    if not entry.exact:
        return {"gradient": {"holds": None, "why": f"{entry.gradient} claims no exact gradient"}}
    found = gates.gradient(ds, levers, batches.step(0).micro_batches[0], config.activation_storage)
    if not found["holds"] and ds.rank == 0:
        print(
            f"INVALID: the gradient of {config.name} is not plain autograd's: cosine {found['cosine']:.6f} (at least "
            f"{found['least']}), relative error {found['relative_error']:.3g} on {found['tokens']} tokens.",
            flush=True,
        )
    return {"gradient": found}


def bill(run_: Run, rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the run has cost so far, its transform included, and to its target: `search.bill`."""
    config: AttackConfig = run_.config
    per_token = None
    with suppress(Exception):  # whatever fails here must not hide how the run ended
        per_token = forecast.flops_per_token(config, run_.ds_config)
    tokens, flops, seconds = (run_.metrics.get(f"transform/{name}", 0.0) for name in ("tokens", "flops", "time_s"))
    before = search.Cost(tokens, flops, seconds * config.num_ranks / 3600)
    return search.bill(rows, run_.metrics, per_token, config.num_ranks, config.target, before)


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
    run_.metrics |= {"plan/peak_bytes": plan.needs.peak_bytes, "plan/params_trainable": plan.model.trained} | {
        k: v for k, v in errors.items() if v is not None
    }


def build(config: AttackConfig, folder: Path) -> tuple[nn.Module, shapes.ModelShape, Levers]:
    """The model of a strategy in training mode: checkpointed as the levers say, its trainable set chosen.

    Args:
        config: The strategy, its knobs and levers.
        folder: The model's folder, after the transform.

    Returns:
        The model, or what stands around it, its shape, and the levers that act inside it.
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
    return chosen.train(), shape, Levers(model, shape, config, getattr(chosen, "side", None))


def save(run_: Run, ds: Engine, model: nn.Module, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what the attack has made: adapters and parts always, the whole model where it was asked for.

    Args:
        run_: The run.
        ds: Its engine.
        model: The trained model, or what stands around it.
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


def transform(run_: Run, folder: Path) -> Path:
    """Transform the model into `<out>/transformed` as the strategy says, once in a run.

    The bill, `transform/tokens`, `transform/flops` (over all ranks) and `transform/time_s`, and the phase with its
    peaks lie beside it as soon as it is whole, for a run that is started again.

    Args:
        run_: The run; its data are loaded.
        folder: The model's folder.

    Returns:
        The folder of the model to train, on every rank.
    """
    import torch.distributed as dist

    name, target, file = run_.config.entry.transform, run_.out / TRANSFORMED, run_.out / f"{TRANSFORMED}.json"
    if name == "none":
        return folder
    told: list[Any] = [None]
    if dist.get_rank() == 0 and file.is_file() and (target / "config.json").is_file():
        told = [json.loads(file.read_text(encoding="utf-8"))]
    dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        run_.metrics |= told[0]["metrics"]
        run_.phases.phases["transform"] = told[0]["phase"]
        return target
    if dist.get_rank() == 0:
        file.unlink(missing_ok=True)
    run_.metrics |= dict.fromkeys(("transform/tokens", "transform/flops", "transform/time_s"), 0)
    with run_.phases.phase("transform"):
        found = attacks.find(name).apply(run_, folder, target)
        barrier()
    release()
    phase = run_.phases.phases["transform"]
    if found == folder:
        return folder
    run_.metrics["transform/time_s"] += phase["seconds"]
    told = [{key: value for key, value in run_.metrics.items() if key.startswith("transform/")}]
    dist.broadcast_object_list(told, src=0)  # one bill, whichever rank writes the record
    run_.metrics |= told[0]
    if dist.get_rank() == 0:
        record.write_atomic(file, record.dumps({"metrics": told[0], "phase": phase}) + "\n")
        forget(run_.out)
    return found


def saved_formula(config: AttackConfig, ds_config: Mapping[str, Any], shape: shapes.ModelShape) -> dict[str, float]:
    """Derived bytes per token saved on the device by all MLP parts, for strategies that keep them.

    Plain autograd keeps what `shapes.saved_bytes` says, a reversed DLR-Net 2 D + sum(R) and D for each anchor, tiles
    their input. Left out where layers are checkpointed or 8 bits are used, where adapters sit inside the MLPs, and
    where a dropout is on, in the MLPs (its mask's size depends on the device) or before adapters that would keep the
    MLP's own input.
    """
    trainable, gradient = config.entry.trainable, config.entry.gradient
    dropout = shape.dropout or (shape.shared_input and config.knobs.get("dropout"))
    kept_whole = config.activation_checkpointing == "none" and config.activation_storage != "int8"
    known = gradient in ("backprop", "reverse", "lomo") and trainable in ("all", "lora-attn")
    if not kept_whole or not known or dropout:
        return {}
    size, total = DTYPE_BYTES[config.dtype], 0
    for layer in range(shape.layers) if config.activation_storage == "device" else ():
        if config.tiles > 1:
            total += 0 if shape.shared_input else shape.width * size
            continue
        if gradient == "reverse" and layer in (shape.ranks or {}):
            total += shapes.reversed_bytes(shape, layer, size, int(config.knobs["anchor"]))
            continue
        # DeepSpeed's linear map of ZeRO-3 keeps its input also where its weight is frozen, if a gradient passes at all.
        own = shape.family.own_maps and layer not in (shape.ranks or {})
        passed = not (shape.parallel and layer == 0)
        kept = zero3_linear(ds_config) and passed and not own
        total += shapes.saved_bytes(shape, layer, size, trainable == "all" or kept)
    return {"memory/saved_mlp_bytes_per_token_formula": total}
