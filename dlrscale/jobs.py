"""What one rank runs: a lock, an attack or a pretraining, from its configuration to its record.

The launch line names this file: `deepspeed ... dlrscale/jobs.py '<configuration as JSON>'`.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # the script's own folder, whose modules must not hide others of the same name

import dataclasses
import math
import os
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlrscale import (
    attacks,
    catalogue,
    data,
    distil,
    engine,
    export,
    launcher,
    models,
    record,
    shapes,
    surgery,
)
from dlrscale import config as configuration
from dlrscale.config import AttackConfig, LockConfig, PretrainConfig, RunConfig
from dlrscale.data import Batches, TokenData
from dlrscale.engine import Engine
from dlrscale.errors import ConfigError
from dlrscale.evaluate import heldout_loss
from dlrscale.measure import Phases, SavedBytes
from dlrscale.record import Outcome
from dlrscale.train import Diverged, LanguageModelling, Loop, Stage

MODEL_FOLDER = "model"
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass
class Corpora:
    """The token data of a run. `heldout` is of the same task; `heldout_base` of the base model's own domain."""

    train: TokenData
    heldout: TokenData
    heldout_base: TokenData | None
    pad: int

    def counts(self) -> dict[str, float]:
        """What was read, truncated and dropped, as metrics."""
        named = {"train": self.train, "heldout": self.heldout, "heldout_base": self.heldout_base}
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

    def start_engine(self, model: nn.Module, trainable: list[nn.Parameter]) -> Engine:
        """Start DeepSpeed on a model; the record names the optimizer's class."""
        ds = Engine(model, trainable, self.ds_config)
        self.notes["optimizer"] = ds.optimizer_class
        return ds


def load_corpora(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Corpora:
    """Read and tokenise all data of a run; without --heldout, the last 5 % of the data are set apart.

    Raises:
        ConfigError: If a file is wrong, or there is less than one global batch.
    """

    def read(place: str) -> TokenData:
        return data.load(
            place,
            tokenizer,
            seq_len=config.seq_len,
            columns=config.columns,
            document_separator=config.document_separator,
        )

    train = read(config.data)
    if config.heldout:
        heldout = read(config.heldout)
    else:
        train, heldout = data.split_heldout(train)
    base = getattr(config, "heldout_base", None)
    own = read(base) if base else None
    if config.heldout_limit:
        limit = slice(config.heldout_limit)
        heldout, own = heldout.subset(limit), own and own.subset(limit)
    corpora = Corpora(train, heldout, own, data.pad_id(tokenizer))
    make_batches(config, corpora, 0, config.num_ranks)  # refuses less than one global batch
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


def preflight(config: RunConfig) -> dict[str, Any]:
    """Check everything that can be checked before a rank starts.

    Returns:
        The merged DeepSpeed configuration.

    Raises:
        ConfigError: With what is wrong; nothing was written.
    """
    configuration.check(config)
    if config.dtype == "fp16" and engine.device_type() == "cpu":
        raise ConfigError("--dtype fp16 needs an accelerator; on the CPU take fp32 or bf16.")
    merged = engine.merge(config)
    engine.check_layout(Path(config.out) / "checkpoints", config.num_ranks, config.zero)
    if isinstance(config, PretrainConfig):
        return merged
    shape = shapes.model_shape(shapes.read_config(config.model))
    if shape.max_length and config.seq_len > shape.max_length:
        raise ConfigError(f"--seq-len {config.seq_len}: {config.model} takes at most {shape.max_length} tokens.")
    if isinstance(config, LockConfig):
        if shape.locked:
            raise ConfigError(f"--model {config.model} is locked already. Name the base model's folder.")
        shapes.resolve_ranks(config.form, shape, config.depth, config.rank)
        shapes.parse_layers(config.layers, shape.layers)
        start_on = shapes.FORMS[config.form].start_on
        if config.start == "warm" and start_on != shape.kind:
            raise ConfigError(
                f"--start warm is not defined for --form {config.form} on {shape.family.model_type}, whose MLPs are "
                f"{shape.kind}. Take --start cold."
            )
    elif shape.locked and catalogue.strategy(config.strategy).transform == "flatten":
        export.check_flattens(shape)
    load_corpora(config, models.load_tokenizer(config.model))
    return merged


def run(config: RunConfig, make_sink: Callable[[RunConfig, str, str], Any] | None = None) -> int:
    """Run a job on this rank to its record.

    Args:
        config: The resolved configuration.
        make_sink: Builds the tracker of rank 0 from the configuration, the run's id and its resume_id.

    Returns:
        The exit code of this rank.
    """
    rank, _ = engine.start_distributed()
    started = record.now()
    ds_config = engine.merge(config)
    run_id, resume_id = configuration.run_ids(config, ds_config)
    device = (
        torch.device(engine.device_type(), int(os.environ["LOCAL_RANK"]))
        if engine.device_type() == "cuda"
        else torch.device("cpu")
    )
    job = Run(config, ds_config, Phases(device), Path(config.out), run_id)
    outcome_file = job.out / ".outcome"
    if rank == 0:
        configuration.claim_folder(job.out, resume_id)
        outcome_file.unlink(missing_ok=True)
        if make_sink is not None:
            job.sink = make_sink(config, run_id, resume_id)
    outcome, error, code = Outcome.OK, None, 0
    try:
        BODIES[config.kind](job)
    except Diverged as reason:
        outcome, error, code = Outcome.DIVERGED, str(reason), launcher.EXIT_DIVERGED
    except ConfigError as reason:
        outcome, error, code = Outcome.FAILED, str(reason), launcher.EXIT_CONFIG
    except Exception as reason:
        traceback.print_exc()
        if is_out_of_memory(reason):
            outcome, code = Outcome.OOM, launcher.EXIT_OOM
        else:
            outcome, code = Outcome.FAILED, launcher.EXIT_FAILED
        error = f"rank {rank}: {type(reason).__name__}: {reason}"
    job.metrics |= job.phases.peaks()
    entry = describe(config, ds_config, run_id, resume_id) | {
        "outcome": outcome.value,
        "device": device_name(device),
        "started": started,
        "metrics": {k: v for k, v in job.metrics.items() if isinstance(v, (int, float)) and math.isfinite(v)},
        "phases": job.phases.phases,
        "error": error,
    }
    entry["config"] |= job.notes
    if (rank == 0 or outcome in (Outcome.OOM, Outcome.FAILED)) and claim_outcome(outcome_file):
        record.append_line(job.out / record.RECORDS_FILE, entry)
        if outcome is Outcome.OK:
            # A finished run is not gone on with, and its optimizer states are large.
            shutil.rmtree(job.out / "checkpoints", ignore_errors=True)
    if job.sink is not None:
        job.sink.finish(entry, [p for p in (job.out / record.RECORDS_FILE, job.out / record.STEPS_FILE) if p.exists()])
    return code


def describe(config: RunConfig, ds_config: dict[str, Any], run_id: str, resume_id: str) -> dict[str, Any]:
    """A run's record before it has ended: everything that is known from its configuration."""
    settings = dataclasses.asdict(config)
    side = None
    if isinstance(config, AttackConfig):
        manifest = export.read_manifest(config.model)
        side = "locked" if manifest else "base"
        settings |= {"axes": config.axes, "lock": None}
        if manifest:
            settings["lock"] = {k: manifest[k] for k in LOCK_KEYS} | {"base_digest": manifest["base"]["digest"]}
            settings["lock_id"] = manifest["lock_id"]
    for key in ("model", "data", "heldout", "heldout_base"):
        if settings.get(key):
            settings[f"{key}_digest"] = configuration.digest(settings[key])
            settings[key] = settings[key] if settings[key].startswith("embedded:") else Path(settings[key]).name
    for key in (
        "out",
        "deepspeed_config",
        "hostfile",
    ):  # where things lie on this machine is nobody's business
        settings[key] = settings[key] and Path(settings[key]).name
    settings["tracking_uri"] = str(settings["tracking_uri"]).split(":")[0]
    settings["global_batch"] = config.global_batch
    return record.make_record(
        id=run_id,
        resume_id=resume_id,
        kind=config.kind,
        name=config.name,
        side=side,
        strategy=getattr(config, "strategy", None),
        config=settings,
        deepspeed_config=ds_config,
        versions=record.versions(),
        git=record.git_state(),
        seed=config.seed,
    )


LOCK_KEYS = ("lock_id", "form", "depth", "ranks", "coupling", "start", "harden", "param_ratio")


def claim_outcome(file: Path) -> bool:
    """Whether this rank is the one that writes the run's record: the first that comes."""
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of the device or of the host, ran out."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)
    )


def device_name(device: torch.device) -> str:
    """The device in words: the accelerator's name, or the CPU's with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = "CPU"
    return f"{name}, {os.cpu_count()} cores"


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


def lock(run_: Run) -> None:
    """Distil, heal, evaluate and export a locked model (design: locking)."""
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
    ranks = shapes.resolve_ranks(config.form, shape, config.depth, config.rank)
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
    with run_.phases.phase("save"):
        nets = distiller.weights(ds)
        if ds.rank == 0:
            manifest = lock_manifest(run_, ds, ranks, loop.state["b"], losses, errors)
            export.export_locked(config.model, run_.out / MODEL_FOLDER, config.dtype, config.form, nets, manifest)
        ds.barrier()


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
        "base": {"name": Path(config.model).name, "digest": configuration.digest(config.model)},
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
        "data": {"name": Path(config.data).name, "digest": configuration.digest(config.data)},
        "losses": losses,
        "layer_errors": {str(layer): value for layer, value in errors.items()},
        "optimizer": ds.optimizer_class,
        "versions": record.versions(),
        "created": record.now(),
    }


def attack(run_: Run) -> None:
    """Fine-tune one model by one strategy and measure what it cost (design: attacking)."""
    config: AttackConfig = run_.config
    entry = catalogue.strategy(config.strategy)
    with run_.phases.phase("load"):
        folder = Path(config.model)
        tokenizer = models.load_tokenizer(folder)
        corpora = load_corpora(config, tokenizer)
    if entry.transform != "none":
        with run_.phases.phase("transform"):
            folder = transform(run_, entry.transform, folder)
    with run_.phases.phase("load"):
        model = models.load_model(folder, config.dtype)
        shape = shapes.model_shape(model.config.to_dict())
        if config.activation_checkpointing == "layer":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if entry.trainable == "all":
            model.requires_grad_(True)
        else:
            model = attacks.find(entry.trainable).choose(model, shape, config.knobs)
        model.train()
        ds = run_.start_engine(model, [p for p in model.parameters() if p.requires_grad])
    run_.metrics |= corpora.counts() | parameter_counts(model)
    loss = evaluator(run_, ds, corpora)

    def evaluate(suffix: str = "") -> dict[str, float]:
        found = {f"loss/heldout_task{suffix}": loss(corpora.heldout)}
        if corpora.heldout_base is not None:
            found[f"loss/heldout_base{suffix}"] = loss(corpora.heldout_base)
        return found

    objective = LanguageModelling(SavedBytes(ds.module, mlp_parts(ds.module, shape)))
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
    if not done:
        with run_.phases.phase("evaluate"):
            loop.state = {"start": evaluate("_start")}
    stage = Stage(name="train", steps=config.steps, lr=config.lr, warmup=config.warmup_steps, objective=objective)
    try:
        loop.run(stage, done)
        with run_.phases.phase("evaluate"):
            run_.metrics |= evaluate()
    finally:
        # What was counted in the first step stays true however the run ends, and after a resume.
        loop.state |= objective.counted
        run_.metrics |= loop.summary("train") | loop.state["start"] | objective.counted
        run_.metrics |= saved_formula(config, shape, entry)


def transform(run_: Run, name: str, folder: Path) -> Path:
    """Let rank 0 transform the model into `<out>/transformed`; all ranks get the folder to train."""
    import torch.distributed as dist

    target = run_.out / "transformed"
    result = [None]
    if dist.get_rank() == 0:
        result = [str(attacks.find(name).apply(folder, target))]
    dist.broadcast_object_list(result, src=0)
    return Path(result[0])


def parameter_counts(model: nn.Module) -> dict[str, float]:
    """Trainable and total parameters, whole ones also where ZeRO-3 has partitioned them."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return {"params/total": sum(n for n, _ in sizes), "params/trainable": sum(n for n, grad in sizes if grad)}


def mlp_parts(model: nn.Module, shape: shapes.ModelShape) -> dict[str, nn.Module]:
    """The MLP or DLR-Net of every layer by its index, also inside peft's wrapper."""
    paths = {shape.family.mlp.format(layer): str(layer) for layer in range(shape.layers)}
    return {
        label: module
        for name, module in model.named_modules()
        for path, label in paths.items()
        if name == path or name.endswith("." + path)
    }


def saved_formula(config: AttackConfig, shape: shapes.ModelShape, entry: catalogue.Strategy) -> dict[str, float]:
    """Derived bytes per token saved by all MLP parts, for strategies that keep them.

    Left out where layers are checkpointed, where adapters sit inside the MLPs, and where the family's dropout
    is on: its mask's size depends on the device.
    """
    if config.activation_checkpointing != "none" or entry.trainable == "lora" or shape.dropout:
        return {}
    trainable = entry.trainable == "all"
    total = sum(shapes.saved_bytes(shape, i, DTYPE_BYTES[config.dtype], trainable) for i in range(shape.layers))
    return {"memory/saved_mlp_bytes_per_token_formula": total}


def pretrain(run_: Run) -> None:
    """Train a small Llama and its tokenizer on text from random numbers; exported to `<out>/model` in bf16."""
    config: PretrainConfig = run_.config
    with run_.phases.phase("load"):
        tokenizer = shared_tokenizer(config, run_.out / "tokenizer")
        corpora = load_corpora(config, tokenizer)
        torch.manual_seed(config.seed)
        model = models.build_llama(config, tokenizer).train()
        ds = run_.start_engine(model, list(model.parameters()))
    run_.metrics |= corpora.counts() | parameter_counts(model)
    loss = evaluator(run_, ds, corpora)

    def evaluate() -> dict[str, float]:
        return {"loss/heldout_task": loss(corpora.heldout)}

    loop = Loop(
        config=config,
        engine=ds,
        batches=make_batches(config, corpora, ds.rank, ds.world_size),
        phases=run_.phases,
        out=run_.out,
        sink=run_.sink,
        evaluate=evaluate,
    )
    objective = LanguageModelling()
    loop.run(
        Stage(name="train", steps=config.steps, lr=config.lr, warmup=config.warmup_steps, objective=objective),
        loop.resume(),
    )
    with run_.phases.phase("evaluate"):
        run_.metrics |= loop.summary("train") | evaluate() | {"tokens/total": loop.rows[-1]["tokens"]}
    with run_.phases.phase("save"):
        state = whole_state(ds, model)
        if ds.rank == 0:
            small = models.build_llama(config, tokenizer).to(torch.bfloat16)
            small.load_state_dict(state, strict=False)
            small.tie_weights()
            card = export.pretrained_card(config, run_.metrics)
            export.save_folder(small, tokenizer, run_.out / MODEL_FOLDER, {"README.md": card})
        ds.barrier()


def shared_tokenizer(config: PretrainConfig, folder: Path) -> PreTrainedTokenizerBase:
    """Let rank 0 train the tokenizer, once per run folder; every rank loads the same one."""
    import torch.distributed as dist

    if dist.get_rank() == 0 and not folder.exists():
        texts = data.documents(config.data, config.document_separator, dict.fromkeys(data.COUNT_KEYS, 0))
        temporary = folder.with_name(".tokenizer.tmp")
        models.train_tokenizer(texts, config.vocabulary).save_pretrained(temporary)
        temporary.rename(folder)
    dist.barrier()
    return models.load_tokenizer(folder)


def whole_state(ds: Engine, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Whole parameters by name on the CPU of rank 0, gathered one by one; all ranks call it."""
    state = {}
    for name, parameter in model.named_parameters():
        with ds.gathered([parameter]):
            if ds.rank == 0:
                state[name] = parameter.detach().cpu().clone()
    return state


BODIES: dict[str, Callable[[Run], None]] = {"lock": lock, "attack": attack, "pretrain": pretrain}


def make_tracker(config: RunConfig, run_id: str, resume_id: str) -> Any:
    """The MLflow tracker of a run, or None where it is turned off (`--tracking-uri none`)."""
    from dlrscale import tracking

    if config.tracking_uri == "none":
        return None
    manifest = export.read_manifest(config.model) if isinstance(config, AttackConfig) else None
    lock_id = manifest["lock_id"] if manifest else getattr(config, "lock_id", None)
    tags = {
        "dlrscale.id": run_id,
        "dlrscale.resume_id": resume_id,
        "dlrscale.kind": config.kind,
        "dlrscale.strategy": getattr(config, "strategy", None),
        "dlrscale.side": ("locked" if manifest else "base") if isinstance(config, AttackConfig) else None,
        "dlrscale.lock_id": run_id if isinstance(config, LockConfig) else lock_id,
    }
    return tracking.Tracker(
        config.tracking_uri,
        "dlrscale",
        config.name,
        config=dataclasses.asdict(config),
        tags={k: v for k, v in tags.items() if v},
        parent_lock_id=None if isinstance(config, LockConfig) else lock_id,
    )


def summary_lines(entry: dict[str, Any], out: Path) -> list[str]:
    """The last lines of a job for people, from its record."""
    metrics = entry["metrics"]
    lines = [f"{entry['kind']} {entry['name']}: {entry['outcome']}, record in {out / record.RECORDS_FILE}"]
    if entry["error"]:
        lines.append(entry["error"])
    if entry["outcome"] != Outcome.OK.value:
        return lines
    if entry["kind"] == "lock":
        base, locked, flat = (metrics[f"loss/heldout_{k}"] for k in ("base_model", "locked", "flat"))
        errors = {k.rpartition("_")[2]: v for k, v in metrics.items() if k.startswith("lock/error_layer_")}
        lines += [
            f"locked model: {out / MODEL_FOLDER}",
            f"held-out loss in nats per token: base {base:.4f}, locked {locked:.4f} ({locked - base:+.4f}), "
            f"flattened without training {flat:.4f} ({flat - base:+.4f})",
            "error by layer: " + ", ".join(f"{layer}: {value:.4f}" for layer, value in errors.items()),
        ]
    else:
        lines += [f"{key}: {metrics[key]:.4f}" for key in sorted(metrics) if key.startswith("loss/")]
    return lines


def main(argv: list[str]) -> int:
    """Run the job whose configuration is the only argument."""
    return run(configuration.from_json(argv[0]), make_tracker)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
