"""Cases of ranks.py: gradient methods that update by themselves (mezo, lomo), on a tiny tied Llama."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from dlrscale import attacks, engine, models
from dlrscale.config import AttackConfig
from dlrscale.measure import Phases


def made(case: dict):
    """The configuration, an engine on the tiny model, its batches and the objective."""
    import ranks

    config = ranks.settings(AttackConfig, case | {"config": {"optimizer": "none", **case.get("config", {})}})
    model = ranks.tiny_llama() if "model" not in case else models.load_model(Path(case["model"]), config.dtype)
    if config.dtype == "bf16":
        model = model.bfloat16()
    model.requires_grad_(True).train()
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case.get("lora"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = None
    if case.get("folder"):
        found = engine.find_checkpoint(Path(case["folder"]), engine.Layout(config.num_ranks, config.zero))
    ds = engine.Engine(model, trained, config_of(config, case), found)
    return config, ds, model, ranks.batches(config, ds), attacks.find(case["method"]).objective(config)


def config_of(config: AttackConfig, case: dict) -> dict:
    """The DeepSpeed configuration; small parameters are partitioned too, unless the case wants them whole."""
    import ranks

    merged = engine.merge(config) if case.get("persistent") else ranks.merged(config)
    assert "optimizer" not in merged
    return merged


def digest(ds: engine.Engine, model: torch.nn.Module) -> list[str]:
    """The SHA-256 of the whole weights as each rank gathers them."""
    own = hashlib.sha256()
    for parameter in model.parameters():
        with ds.gathered([parameter]):
            own.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return ds.gather(own.hexdigest())


def updates(case: dict) -> dict:
    """Some steps at a rate; losses, hashes by rank after each, and the final weights.

    With `folder`: a checkpoint after `save_at` steps, or on from the one that is there.
    """
    import ranks

    config, ds, model, plan, objective = made(case)
    phases, rows, hashes, first = Phases(ds.device), [], [], 0
    state = None
    if ds.checkpoint is not None:
        state, first = ds.load(), ds.checkpoint.step
    start = digest(ds, model)
    for step in range(first, case["steps"]):
        ds.set_lr(case["lr"])
        torch.manual_seed(step * 7 + ds.rank)
        rows.append(objective(ds, plan.step(step), phases) | {"lr": ds.lr})
        hashes.append(digest(ds, model))
        if case.get("folder") and step + 1 == case.get("save_at"):
            ds.save(Path(case["folder"]), step + 1, {"note": "kept"}, keep=1)
    return {
        "rows": rows,
        "start": start,
        "hashes": hashes,
        "state": state,
        "first": first,
        "describe": ds.describe(),
        "held": ds.held(),
        "seen": objective.seen,
        "weights": ranks.norms_and_sums(ranks.whole(ds, model)) if case.get("weights") else None,
    }


def drift(case: dict) -> dict:
    """Fifty steps of mezo at rate 0 on the model of a folder: the hashes before and after, by rank."""
    return updates(case | {"lr": 0.0, "steps": 50})


