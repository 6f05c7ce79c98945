"""What the ranks of the distributed tests run: many small cases one after the other, their results as JSON.

A process that has imported all forks the ranks when it is asked to, since DeepSpeed's launcher and the imports cost more
than most cases do. It is asked by lines of JSON: `ranks`, `env`, `cwd`, and a `folder` with `cases.json`, a list of
dictionaries with a `run` key that names a function here. Rank 0 writes `results.json` there; then comes `codes.json`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dlrscale import data, engine, record, shapes, surgery
from dlrscale.config import AttackConfig, LockConfig
from dlrscale.distil import Distiller
from dlrscale.measure import Phases
from dlrscale.train import LanguageModelling
from held_case import run as held  # noqa: F401, a case
from own_update_cases import drift, updates  # noqa: F401, cases

sys.path.append(str(Path(__file__).resolve().parents[1] / "matrix"))
import forks

GLOBAL_BATCH = 4
STEPS, HEAL_STEPS = 3, 2
LR = 1e-2


def tiny_llama(layers: int = 2) -> LlamaForCausalLM:
    """A Llama of fixed random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_data() -> data.TokenData:
    """Twelve padded records of 6 to 16 tokens, each with a loss on its last half."""
    generator = np.random.default_rng(5)
    ids = [generator.integers(3, 61, size=n).astype(np.int64) for n in generator.integers(6, 17, size=12)]
    labels = [np.where(np.arange(len(x)) >= len(x) // 2, x, data.IGNORE) for x in ids]
    return data.TokenData(ids, labels, False, dict.fromkeys(data.COUNT_KEYS, 0))


def settings(kind: type, case: dict):
    """The configuration of a case; the micro-batch keeps the global batch whatever the ranks and the accumulation."""
    return kind(
        model="",
        data="",
        out="",
        dtype=case.get("dtype", "fp32"),
        zero=case["zero"],
        offload_optimizer=case.get("offload_optimizer", False),
        offload_param=case.get("offload_param", False),
        accumulation=case.get("accumulation", 1),
        num_ranks=case["ranks"],
        micro_batch=GLOBAL_BATCH // (case["ranks"] * case.get("accumulation", 1)),
        lr=LR,
        **case.get("config", {}),
    )


def merged(config) -> dict:
    """The DeepSpeed configuration, with small parameters partitioned too, which DeepSpeed would keep whole."""
    ds_config = engine.merge(config)
    if config.zero == 3:
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return ds_config


def batches(config, ds: engine.Engine) -> data.Batches:
    """The batches of this rank."""
    return data.Batches(
        tiny_data(),
        seed=0,
        micro_batch=config.micro_batch,
        accumulation=config.accumulation,
        rank=ds.rank,
        world_size=ds.world_size,
        pad_id=0,
    )


def norms_and_sums(tensors: dict[str, torch.Tensor]) -> dict[str, list]:
    """Tensors as nested lists, small enough for JSON."""
    return {name: t.float().tolist() for name, t in tensors.items()}


def lock(case: dict) -> dict:
    """Calibrate, distil and heal; the losses of each step and the final weights of the DLR-Nets."""
    config = settings(LockConfig, case | {"config": {"depth": 4, "form": "gated", **case.get("config", {})}})
    model = tiny_llama()
    if config.dtype == "bf16":
        model = model.bfloat16()
    distiller = Distiller(surgery.install(model, shapes.model_shape(model.config.to_dict()), config), config)
    ds = engine.Engine(model, distiller.parameters, merged(config))
    scales = distiller.calibrate(ds, data.calibration(tiny_data(), 5))
    phases, found = Phases(ds.device), []
    plan = batches(config, ds)
    for step in range(STEPS):
        ds.set_lr(LR)
        found.append(distiller.distil_step(ds, plan.step(step), phases))
    for step in range(STEPS, STEPS + HEAL_STEPS):
        ds.set_lr(LR / 10)
        found.append(distiller.heal_step(ds, plan.step(step), phases))
    errors = distiller.layer_errors(ds, tiny_data(), 2, 0)
    weights = distiller.weights(ds)
    flat = {f"{layer}.{k}": v for layer, net in weights.items() for k, v in net.items()}
    return {
        "losses": [row["loss/train"] for row in found],
        "norms": [row["optim/grad_norm"] for row in found],
        "b": scales,
        "floors": distiller.floors,
        "errors": errors,
        "weights": norms_and_sums(flat),
        "optimizer": ds.optimizer_class,
    }


def attack(case: dict) -> dict:
    """Three steps of next-token training on all parameters; losses, rates and final weights."""
    config = settings(AttackConfig, case)
    model = tiny_llama().train()
    if config.dtype == "bf16":
        model = model.bfloat16()
    ds = engine.Engine(model, list(model.parameters()), merged(config))
    plan, objective, phases = batches(config, ds), LanguageModelling(), Phases(ds.device)
    rows = []
    for step in range(STEPS):
        ds.set_lr(LR * (step + 1))
        rows.append(objective(ds, plan.step(step), phases) | {"lr": ds.lr})
    return {
        "losses": [row["loss/train"] for row in rows],
        "rates": [row["lr"] for row in rows],
        "norms": [row["optim/grad_norm"] for row in rows],
        "weights": norms_and_sums(whole(ds, model)),
    }


def checkpoint(case: dict) -> dict:
    """Train 2 steps, save, train 2 more; then a fresh engine goes on from the checkpoint for the same 2.

    With `only_resume` the checkpoint is there already, of another layout.
    """
    config = replace(settings(AttackConfig, case), keep_checkpoints=1)
    folder = Path(case["folder"])

    def fresh() -> engine.Engine:
        model = tiny_llama().train()
        found = engine.find_checkpoint(folder, engine.Layout(config.num_ranks, config.zero))
        return engine.Engine(model, list(model.parameters()), merged(config), found)

    def steps(ds: engine.Engine, first: int) -> list[float]:
        plan, objective, phases = batches(config, ds), LanguageModelling(), Phases(ds.device)
        found = []
        for step in range(first, first + 2):
            ds.set_lr(LR)
            found.append(objective(ds, plan.step(step % 3), phases)["loss/train"])
        return found

    whole = None
    if not case.get("only_resume"):
        ds = fresh()
        steps(ds, 0)
        ds.save(folder, 2, {"note": "kept"}, keep=1)
        whole = steps(ds, 2)
    again = fresh()
    state = again.load()
    resumed = steps(again, 2)
    if whole is None:  # and what it writes then is of its own layout
        again.save(folder, 4, state, keep=1)
        assert fresh().load() == state
    return {"whole": whole, "resumed": resumed, "state": state, "found": engine.checkpoints(folder)}


def gate(case: dict) -> dict:
    """The gradient check on LoRA adapters and a trained head norm, and the losses of a training with and without it.

    `broken`: layers are checkpointed in the reentrant way, through which no gradient passes where their inputs ask for
    none: adapters stay at their start, and the loss falls all the same, by the norm.
    """
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    from dlrscale.attacks import lora
    from dlrscale.attacks.levers import Levers
    from dlrscale.jobs import gates

    losses, found = [], {}
    for checked in (True, False):
        config = settings(AttackConfig, case)
        model = tiny_llama().train()
        shape = shapes.model_shape(model.config.to_dict())
        torch.manual_seed(1)
        adapted = lora.choose(model, shape, {"rank": 2, "alpha": 4, "dropout": 0.0})
        model.model.norm.requires_grad_(True)
        for layer in model.model.layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=case["broken"])
        levers = Levers(model, shape, config)
        ds = engine.Engine(adapted, [p for p in adapted.parameters() if p.requires_grad], merged(config))
        plan, objective, phases = batches(config, ds), LanguageModelling(), Phases(ds.device)
        if checked:
            found = gates.gradient(ds, levers, plan.step(0).micro_batches[0], "device")
        for step in range(STEPS):
            ds.set_lr(LR)
            row = objective(ds, plan.step(step), phases)
            losses.append([row["loss/train"], row["optim/grad_norm"]])
    return {"gate": found, "with": losses[:STEPS], "without": losses[STEPS:]}


def job(case: dict) -> dict:
    """A whole job, from its configuration to its record."""
    from dlrscale import config, jobs

    return {"code": jobs.run(config.from_json(json.dumps(case["config"])), jobs.make_tracker)}


def decayed(case: dict) -> dict:
    """How far weights move, relative to the largest, in making an engine and one step at rate 0; decay is on."""
    config = settings(AttackConfig, case)
    model = tiny_llama().train()
    if config.dtype == "bf16":
        model = model.bfloat16()
    ds_config = merged(config)
    ds_config["optimizer"]["params"] |= {"weight_decay": 0.5, "lr": 0.5}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ds = engine.Engine(model, list(model.parameters()), ds_config)
    decay = {group["weight_decay"] for group in ds.optimizer.param_groups}
    ds.set_lr(0.0)
    LanguageModelling()(ds, batches(config, ds).step(0), Phases(ds.device))
    moved = max(float((after - before[n]).abs().max() / before[n].abs().max()) for n, after in whole(ds, model).items())
    return {"moved": moved, "decay": sorted(decay)}


def whole(ds: engine.Engine, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The engine's weights by name."""
    from dlrscale.jobs.common import whole_state

    return whole_state(ds, model)


def cut_job(case: dict) -> dict:
    """A job that breaks right after its first checkpoint; the same job run again goes on from there.

    `part` says of which training: the run's own, "", or that of its transform.
    """
    from dlrscale.train import Loop

    save = Loop.save

    def save_and_break(self, done: int) -> None:
        save(self, done)
        if self.part == case.get("part", ""):
            raise RuntimeError("cut")

    Loop.save = save_and_break
    try:
        return job(case)
    finally:
        Loop.save = save


def run_cases(folder: Path) -> int:
    """Run all cases and write their results."""
    rank, _ = engine.start_distributed()
    results = []
    for case in json.loads((folder / "cases.json").read_text()):
        try:
            results.append(globals()[case["run"]](case))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
            if rank == 0:
                traceback.print_exc()
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    engine.stop_distributed()
    return 0


def answer(asked: dict) -> None:
    """Fork ranks as asked, and wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    folder = Path(asked["folder"])
    codes = forks.wait(forks.fork(asked["ranks"], lambda: run_cases(folder), folder / "ranks.log"))
    record.write_atomic(folder / "codes.json", json.dumps(codes))
    os._exit(0)


def main() -> None:
    """Fork for each line; end with the process that asks, and with all that was forked."""
    forks.ready()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            answer(json.loads(line))
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
