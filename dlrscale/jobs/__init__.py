"""What one rank runs: a lock, an attack, a measurement or a pretraining, from its configuration to its record."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dlrscale import config as configuration
from dlrscale import data, engine, folders, launcher, models, record, shapes, tracking
from dlrscale.attacks.students import PART
from dlrscale.config import AttackConfig, LockConfig, PretrainConfig, RunConfig
from dlrscale.errors import ConfigError
from dlrscale.errors import describe as describe_error
from dlrscale.jobs import forecast
from dlrscale.jobs.attack import attack, gradient_file
from dlrscale.jobs.common import MODEL_FOLDER, Run, load_corpora
from dlrscale.jobs.lock import lock
from dlrscale.jobs.measure import describe_measured, measure
from dlrscale.jobs.pretrain import pretrain
from dlrscale.launcher.guard import Guard
from dlrscale.launcher.ranks import OUT_OF_MEMORY, RankNote
from dlrscale.measure import Phases, check_clean
from dlrscale.planner.model import attacked
from dlrscale.record import Outcome
from dlrscale.train import CHECKPOINT_FOLDER, Diverged

BODIES: dict[str, Callable[[Run], None]] = {
    "lock": lock,
    "attack": attack,
    "measure": measure,
    "pretrain": pretrain,
}

LEFTOVER_S = 60.0  # the longest that ranks of an earlier start take to go
CLAIMED_S = 5.0  # the longest that a rank takes to write the record that it has claimed
PEER_S = 20.0  # longer than the launcher takes to see that a rank has ended
LOCK_KEYS = ("lock_id", "form", "depth", "ranks", "coupling", "start", "param_ratio")


def preflight(config: RunConfig) -> dict[str, Any]:
    """Check everything that can be checked before a rank starts.

    Args:
        config: The resolved configuration.

    Returns:
        The merged DeepSpeed configuration.

    Raises:
        ConfigError: With what is wrong; nothing was written.
    """
    configuration.check(config)
    if isinstance(config, AttackConfig) and (faults := getattr(gradient_file(config), "faults", None)):
        refused = faults(config)
        if refused:
            raise ConfigError(refused)
    if config.dtype == "fp16" and engine.device_type() == "cpu":
        raise ConfigError("--dtype fp16 needs an accelerator; on the CPU take fp32 or bf16.")
    merged = engine.merge(config)
    if isinstance(config, PretrainConfig):
        return merged
    shape = shapes.model_shape(shapes.read_config(config.model))
    models.check_folder(config.model)
    if shape.max_length and config.seq_len > shape.max_length:
        raise ConfigError(f"--seq-len {config.seq_len}: {config.model} takes at most {shape.max_length} tokens.")
    if isinstance(config, LockConfig):
        if shape.locked:
            raise ConfigError(f"--model {config.model} is locked already. Name the base model's folder.")
        models.check_generation(config.model)
        shapes.resolve_ranks(config.form, shape, config.depth, config.rank)
        shapes.parse_layers(config.layers, shape.layers)
        start_on = shapes.FORMS[config.form].start_on
        if config.start == "warm" and start_on != shape.kind:
            raise ConfigError(
                f"--start warm is not defined for --form {config.form} on {shape.family.model_type}, whose MLPs are "
                f"{shape.kind}. Take --start cold."
            )
    else:
        check_levers(config)
    if isinstance(config, AttackConfig):
        if shape.locked and config.entry.transform != "none":
            models.check_generation(config.model)
        check_trained(config, shape)
    if config.data:
        load_corpora(config, models.load_tokenizer(config.model))
    return merged


def check_levers(config: AttackConfig) -> None:
    """Refuse what the levers of an attack cannot do together.

    Args:
        config: The attack.

    Raises:
        ConfigError: If there is such.
    """
    if config.entry.gradient == "reverse" and config.knobs.get("dropout"):
        raise ConfigError(
            f"--set dropout={config.knobs['dropout']}: --gradient reverse runs each block again, and another dropout "
            "would give another code. Take dropout=0, or --gradient backprop."
        )


def check_trained(config: AttackConfig, shape: shapes.ModelShape) -> None:
    """Refuse a trainable set that the model does not have, or that cannot be saved as was asked.

    Args:
        config: The attack.
        shape: The shape of its model.

    Raises:
        ConfigError: If it is so.
    """
    attacked(shapes.read_config(config.model), shape, config.entry, config.knobs)
    if config.save_model and not config.entry.trains.merges:
        raise ConfigError(
            f"--save-model: what --trainable {config.entry.trainable} trains stands beside the model and does not "
            "merge into its weights. Leave --save-model out: it is written to the folder adapter in any case."
        )


def check_checkpoints(config: RunConfig) -> None:
    """Refuse checkpoints of this run that its ranks cannot go on from; nothing was started.

    Args:
        config: The resolved configuration; its folder is this run's own.

    Raises:
        ConfigError: As `engine.check_layout`.
    """
    for part in ("", PART):
        engine.check_layout(Path(config.out) / f"{part}{CHECKPOINT_FOLDER}", config.num_ranks, config.zero)


def run(
    config: RunConfig,
    make_sink: Callable[[RunConfig, dict[str, Any]], Any] | None = None,
    guard: Guard | None = None,
) -> int:
    """Run a job on this rank to its record.

    Args:
        config: The resolved configuration.
        make_sink: Builds the tracker of rank 0 from the configuration and the record so far.
        guard: What ends this rank when its launcher goes, if anything does.

    Returns:
        The exit code of this rank.
    """
    rank, world_size = engine.start_distributed()
    out, device = Path(config.out), engine.device()
    ds_config = engine.merge(config)
    run_id, resume_id = configuration.run_ids(config, ds_config)
    entry = describe(config, ds_config, run_id, resume_id) | {"started": record.now(), "device": device_name(device)}
    job = Run(config, ds_config, Phases(device), out, run_id, notes=check_clean(device))
    if rank == 0:
        configuration.claim_folder(out, run_id, resume_id)
    with record.held(out / configuration.RANK_LOCK, LEFTOVER_S) if rank == 0 else contextlib.nullcontext(True) as alone:
        if not alone:
            print(configuration.taken(out))
            return launcher.EXIT_CONFIG
        ending = Ending(job, entry, guard, rank)
        if rank == 0:
            tracking.write_description(out, entry)
            ending.marker.unlink(missing_ok=True)
            if make_sink is not None:
                job.sink = make_sink(config, entry)
        engine.barrier()  # no rank may claim the outcome before rank 0 has cleared the way
        job.phases.note = RankNote(out, rank)
        outcome, error, code = Outcome.OK, None, 0
        try:
            BODIES[config.kind](job)
            job.notes |= job.engine.describe()  # with the states that the optimizer made in its first step
        except Diverged as reason:
            outcome, error, code = Outcome.DIVERGED, str(reason), launcher.EXIT_DIVERGED
        except ConfigError as reason:
            outcome, error, code = Outcome.FAILED, str(reason), launcher.EXIT_CONFIG
        except Exception as reason:
            with contextlib.suppress(OSError):  # the log may lie on the disk that is full
                traceback.print_exc()
            if lost_a_peer(reason) and world_size > 1:
                time.sleep(PEER_S)  # the launcher ends this rank meanwhile, and tells of the one that ended first
            outcome, code = Outcome.FAILED, launcher.EXIT_FAILED
            error = describe_error(reason, out) or f"rank {rank}: {type(reason).__name__}: {reason}"
            for left in out.glob(f"*{CHECKPOINT_FOLDER}/tmp-*"):  # on a full disk, the room is for the record
                shutil.rmtree(left, ignore_errors=True)
            if is_out_of_memory(reason):
                outcome, code = Outcome.OOM, launcher.EXIT_OOM
                error = f"out of memory in the phase {job.phases.broken or 'start'}, {error}"
        if rank == 0 or outcome in (Outcome.OOM, Outcome.FAILED):
            ending.write(outcome, error)
    return code


class Ending:
    """How a rank writes the run's record, once: by itself, or by its guard when it is ended from outside.

    `marker` is the file whose maker among all ranks writes the record.
    """

    def __init__(self, job: Run, entry: dict[str, Any], guard: Guard | None, rank: int):
        self.job, self.entry = job, entry
        self.marker = job.out / ".outcome"
        self.before = self._records()
        self._lock = guard.busy if guard is not None else contextlib.nullcontext()
        if guard is not None and rank == 0:
            guard.last_words = lambda reason: self._write(Outcome.FAILED, reason)

    def write(self, outcome: Outcome, error: str | None) -> None:
        """Append the record and end the MLflow run, if no other rank was faster."""
        with self._lock:
            self._write(outcome, error)

    def _write(self, outcome: Outcome, error: str | None) -> None:
        job = self.job
        if claim_outcome(self.marker):
            job.metrics |= job.phases.peaks()
            self.entry |= {
                "outcome": outcome.value,
                "metrics": {k: v for k, v in job.metrics.items() if isinstance(v, (int, float)) and math.isfinite(v)},
                "phases": job.phases.phases,
                "error": error,
            }
            self.entry["config"] |= job.notes
            if job.gates:
                self.entry["gates"] = job.gates
            if self.entry.get("plan") is not None:
                self.entry["plan"] |= job.plan
            record.append_line(job.out / record.RECORDS_FILE, self.entry)
            if outcome is Outcome.OK:
                # A finished run is not gone on with, and its optimizer states are large.
                shutil.rmtree(job.out / CHECKPOINT_FOLDER, ignore_errors=True)
        if job.sink is not None:
            until = time.monotonic() + CLAIMED_S  # another rank may have claimed it, and not written it yet
            while len(found := self._records()) <= len(self.before) and time.monotonic() < until:
                time.sleep(0.1)
            if len(found) > len(self.before):
                names = (record.RECORDS_FILE, record.STEPS_FILE, f"{PART}{record.STEPS_FILE}")
                files = [job.out / name for name in names]
                job.sink.finish(found[-1], [file for file in files if file.exists()])

    def _records(self) -> list[dict[str, Any]]:
        file = self.job.out / record.RECORDS_FILE
        return list(record.read_lines(file)) if file.exists() else []


def describe(config: RunConfig, ds_config: dict[str, Any], run_id: str, resume_id: str) -> dict[str, Any]:
    """A run's record before it has ended: everything that is known from its configuration."""
    settings = dataclasses.asdict(config)
    side = None
    if isinstance(config, AttackConfig):
        manifest = folders.read_manifest(config.model)
        side = "locked" if manifest else "base"
        settings |= {"axes": config.axes, "lock": None}
        if manifest:
            settings["lock"] = {k: manifest[k] for k in LOCK_KEYS} | {
                "base_digest": manifest["base"]["digest"],
                "harden": manifest["harden"] is not None,
                "harden_weight": (manifest["harden"] or {}).get("weight"),
            }
            settings["lock_id"] = manifest["lock_id"]
    for key in configuration.PLACES:
        if settings.get(key):
            settings[f"{key}_digest"] = configuration.digest(settings[key])
            settings[key] = configuration.shown(settings[key])
    for key in (
        "out",
        "deepspeed_config",
        "hostfile",
    ):  # where things lie on this machine is nobody's business
        settings[key] = settings[key] and Path(settings[key]).name
    settings["hardware_file"] = settings["hardware_file"] and Path(settings["hardware_file"]).name
    plan = forecast.forecast(config, ds_config)
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
        plan=forecast.summary(plan, forecast.hardware_of(config)) if plan is not None else None,
    )


def claim_outcome(file: Path) -> bool:
    """Whether this rank is the one that writes the run's record: the first that comes."""
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of the device or of the host, ran out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, (RuntimeError, OSError)) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def lost_a_peer(error: BaseException) -> bool:
    """Whether an exception says that another rank has gone: not the fault of this one."""
    return isinstance(error, RuntimeError) and any(
        words in str(error)
        for words in ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
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


def make_tracker(config: RunConfig, entry: dict[str, Any]) -> Any:
    """The MLflow tracker of a run, or None where it is turned off (`--tracking-uri none`).

    Args:
        config: The resolved configuration.
        entry: The run's record so far (`describe`); its settings become MLflow's parameters.

    Returns:
        A `tracking.Tracker`, or None.
    """
    if config.tracking_uri == "none":
        return None
    return tracking.Tracker(config.tracking_uri, **tracking.naming(entry, config.out))


def summary_lines(entry: dict[str, Any], out: Path) -> list[str]:
    """The last lines of a job for people, from its record."""
    metrics = entry["metrics"]
    lines = [f"{entry['kind']} {entry['name']}: {entry['outcome']}, record in {out / record.RECORDS_FILE}"]
    resumed = entry["config"].get("resumed")
    if resumed:
        skipped = "".join(f"; skipped {name}: {why}" for name, why in resumed["skipped"].items())
        lines.append(f"went on from step {resumed['step']}, written by {resumed['written_by']}{skipped}")
    if entry["error"]:
        lines.append(entry["error"])
    if entry["outcome"] != Outcome.OK.value:
        return lines
    lost = data.left_out(metrics)
    if lost:
        lines.append(lost)
    if entry["kind"] == "lock":
        base, locked, flat = (metrics[f"loss/heldout_{k}"] for k in ("base_model", "locked", "flat"))
        errors = {k.rpartition("_")[2]: v for k, v in metrics.items() if k.startswith("lock/error_layer_")}
        lines += [
            f"locked model: {out / MODEL_FOLDER}",
            f"held-out loss in nats per token: base {base:.4f}, locked {locked:.4f} ({locked - base:+.4f}), "
            f"flattened without training {flat:.4f} ({flat - base:+.4f})",
            "error by layer: " + ", ".join(f"{layer}: {value:.4f}" for layer, value in errors.items()),
        ]
    elif entry["kind"] == "measure":
        lines += describe_measured(metrics)
    else:
        lines += [f"{key}: {metrics[key]:.4f}" for key in sorted(metrics) if key.startswith("loss/")]
    return lines
