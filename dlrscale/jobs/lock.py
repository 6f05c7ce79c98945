"""The lock: distil, heal, evaluate and export."""

from __future__ import annotations

from typing import Any

from dlrscale import config as configuration
from dlrscale import data, distil, export, folders, models, record, search, shapes, surgery
from dlrscale.config import LockConfig
from dlrscale.engine import Engine
from dlrscale.jobs import forecast
from dlrscale.jobs.common import MODEL_FOLDER, Corpora, Run, evaluator, load_corpora, make_batches
from dlrscale.train import Loop, Stage


def lock(run_: Run) -> None:
    """Distil, heal, evaluate and export a locked model."""
    config: LockConfig = run_.config
    with run_.phases.phase("load"):
        tokenizer = models.load_tokenizer(config.model)
        corpora = load_corpora(config, tokenizer)
        model = models.load_model(config.model, config.dtype)
        shape = shapes.model_shape(model.config.to_dict())
        distiller = distil.Distiller(surgery.install(model, shape, config), config)
        ds = run_.start_engine(model, distiller.parameters)
    batches = make_batches(config, corpora, ds.rank, ds.world_size)
    loop = Loop(config=config, engine=ds, batches=batches, phases=run_.phases, out=run_.out, sink=run_.sink)
    done = loop.resume()
    if done:
        distiller.floors = loop.state["floors"]
        distiller.set_scales(loop.state["b"])
    else:
        scales = distiller.calibrate(ds, data.calibration(corpora.train))
        loop.state = {"b": scales, "floors": distiller.floors}
    run_.metrics |= corpora.counts()
    stages = [
        Stage(
            name="distil",
            steps=config.steps,
            lr=config.lr,
            warmup=config.warmup_steps,
            objective=distiller.distil_step,
        ),
        Stage(
            name="heal",
            steps=config.heal_steps,
            lr=config.heal_lr,
            warmup=min(config.warmup_steps, config.heal_steps),
            objective=distiller.heal_step,
            offset=config.steps,
        ),
    ]
    for stage in stages:
        done = loop.run(stage, done)
    loss = evaluator(run_, ds, corpora)
    with run_.phases.phase("evaluate"):
        losses = {}
        for name, mode in (("base", "teacher"), ("locked", "student"), ("flat", "flat")):
            with surgery.mode(distiller.switches, mode):
                losses[name] = loss(corpora.heldout)
        errors = distiller.layer_errors(ds, corpora.heldout, config.micro_batch, corpora.pad)
    run_.notes["ranks"] = ranks = shapes.resolve_ranks(config.form, shape, config.depth, config.rank)
    run_.metrics |= {
        **loop.summary("distil"),
        "loss/heldout_base_model": losses["base"],
        "loss/heldout_locked": losses["locked"],
        "loss/heldout_flat": losses["flat"],
        **{f"lock/error_layer_{layer}": value for layer, value in errors.items()},
        "tokens/distil": sum(row["tokens"] for row in loop.rows if row["step"] == config.steps),
        "tokens/total": loop.rows[-1]["tokens"],
        "time/total_s": sum(row["time/step_s"] for row in loop.rows),
        "params/ratio": shapes.param_ratio(config.form, shape, ranks),
    }
    run_.metrics["tokens/heal"] = run_.metrics["tokens/total"] - run_.metrics["tokens/distil"]
    run_.metrics |= cost(run_, loop.rows, corpora)
    with run_.phases.phase("save"):
        nets = distiller.weights(ds)
        if ds.rank == 0:
            manifest = lock_manifest(run_, ds, ranks, loop.state["b"], losses, errors)
            dtype = models.stored_dtype(config.model)  # the base's own, whatever the lock was trained in
            export.export_locked(config.model, run_.out / MODEL_FOLDER, dtype, config.form, nets, manifest)
        ds.barrier()


def cost(run_: Run, rows: list[dict[str, Any]], corpora: Corpora) -> dict[str, float]:
    """What the lock has cost its maker, evaluations apart: `cost/tokens`, planned `cost/flops`, `cost/device_hours`.

    Each rank calibrates for itself, by forward passes of the teacher; their time is not in the hours.
    """
    config: LockConfig = run_.config
    planned = forecast.forecast(config, run_.ds_config).flops()
    per_token = {stage: sum(f.values()) / (config.micro_batch * config.seq_len) for stage, f in planned.items()}
    per_pass = planned["distil"]["teacher"] / (config.micro_batch * config.seq_len)
    calibration = sum(int(batch["attention_mask"].sum()) for batch in data.calibration(corpora.train))
    flops = calibration * config.num_ranks * per_pass
    flops += sum(row["processed_tokens"] * per_token[row["phase"]] for row in rows)
    seconds = sum(row["time/step_s"] + row["time/data_s"] for row in rows)
    return search.Cost(rows[-1]["tokens"] + calibration, flops, seconds * config.num_ranks / 3600).metrics("cost")


def lock_manifest(
    run_: Run,
    ds: Engine,
    ranks: tuple[int, ...],
    scales: dict[int, float],
    losses: dict[str, float],
    errors: dict[int, float],
) -> dict[str, Any]:
    """The manifest `lock.json` of a locked folder; it holds no absolute path."""
    config: LockConfig = run_.config
    recipe_keys = (
        "steps",
        "lr",
        "warmup_steps",
        "heal_steps",
        "heal_lr",
        "seq_len",
        "dtype",
        "seed",
        "global_batch",
    )
    return {
        "schema": record.SCHEMA,
        "lock_id": run_.id,
        "base": {"name": folders.shown_name(config.model), "digest": configuration.digest(config.model)},
        "form": config.form,
        "depth": config.depth,
        "ranks": list(ranks),
        "layers": sorted(scales),
        "coupling": config.coupling,
        "b": {str(layer): value for layer, value in scales.items()},
        "start": config.start,
        "harden": {"weight": config.harden_weight, "target": config.harden_target} if config.harden else None,
        "param_ratio": run_.metrics["params/ratio"],
        "recipe": {key: getattr(config, key) for key in recipe_keys},
        "data": {"name": configuration.shown(config.data), "digest": configuration.digest(config.data)},
        "losses": losses,
        "layer_errors": {str(layer): value for layer, value in errors.items()},
        "optimizer": ds.optimizer_class,
        "versions": record.versions(),
        "created": record.now(),
    }
