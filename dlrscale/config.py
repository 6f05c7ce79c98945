"""What a run is: frozen dataclasses, checked as a whole so that all faults are told at once.

Paths are made absolute by the command that builds a configuration; `identify` replaces them by the digests of
what they point at, so that a run is the same run wherever its files lie.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlrscale import catalogue, folders, record, shapes
from dlrscale.errors import ConfigError

NAMED = ("embedded:", "hf:")  # data with a name and no path
DTYPES = ("fp32", "bf16", "fp16")
# Of a DeepSpeed configuration: where and in what pieces a run computes, not what it computes.
LAYOUT_KEYS = (
    "zero_optimization", "zero_force_ds_cpu_optimizer", "train_batch_size", "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps", "steps_per_print",
)  # fmt: skip

# Held while a command, and while the ranks, write into a run's folder.
COMMAND_LOCK, RANK_LOCK = ".command.lock", ".rank.lock"
OWN_FILES = (COMMAND_LOCK, RANK_LOCK, ".ranks")  # what a start may leave that was killed at once


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that every kind of run has. None means: derived, see `resolve`."""

    model: str
    data: str
    out: str
    kind: str = "run"
    columns: dict[str, str] | None = None
    document_separator: str | None = None
    chat_template: str | None = None
    heldout: str | None = None
    heldout_limit: int = 0
    command: str | None = None
    name: str = "run"
    seed: int = 0
    dtype: str = "fp32"
    seq_len: int = 512
    micro_batch: int = 4
    accumulation: int = 1
    steps: int = 300
    lr: float = 3e-3
    warmup_steps: int = 10
    zero: int = 2
    offload_optimizer: bool = False
    offload_param: bool = False
    activation_checkpointing: str = "none"
    activation_storage: str = "device"
    tiles: int = 1
    optimizer: str = "AdamW"
    deepspeed_config: str | None = None
    num_ranks: int = 1
    hostfile: str | None = None
    tracking_uri: str | None = None
    eval_every: int = 0
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    hardware: str | None = None
    hardware_file: str | None = None
    force: bool = False

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step, over all ranks and micro-batches."""
        return self.micro_batch * self.accumulation * self.num_ranks

    def faults(self) -> list[str]:
        """What is wrong with these settings, one sentence each; empty when all is well."""
        found = []
        for name, low in (("seq_len", 2), ("micro_batch", 1), ("accumulation", 1), ("steps", 1), ("num_ranks", 1),
                          ("warmup_steps", 0), ("heldout_limit", 0), ("eval_every", 0),
                          ("checkpoint_every", 0), ("keep_checkpoints", 1)):  # fmt: skip
            if getattr(self, name) < low:
                found.append(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {low}.")
        if not (0 <= self.lr < float("inf")):
            found.append(f"--lr {self.lr}: must be a finite number, 0 or more.")
        if self.dtype not in DTYPES:
            found.append(f"--dtype {self.dtype}: one of {', '.join(DTYPES)}.")
        levers = catalogue.Levers(**{f.name: getattr(self, f.name) for f in dataclasses.fields(catalogue.Levers)})
        return found + catalogue.lever_faults(levers)


@dataclass(frozen=True, kw_only=True)
class LockConfig(RunConfig):
    """A lock: module-wise distillation of DLR-Nets, then heal (docs/glossary.md)."""

    kind: str = "lock"
    form: str = "gated"
    depth: int = 32
    rank: int | None = None
    start: str = "warm"
    coupling: float = 0.25
    harden: bool = True
    harden_weight: float = 0.03
    harden_target: float = 1.0
    layers: str | None = None
    heal_steps: int = 75
    heal_lr: float = 1e-3

    @property
    def heal_harden_weight(self) -> float:
        """Weight of the hardening while healing: a tenth of that while distilling."""
        return self.harden_weight / 10

    def faults(self) -> list[str]:
        """What is wrong with these settings, one sentence each."""
        found = super().faults()
        if self.form not in shapes.FORMS:
            found.append(f"--form {self.form}: one of {', '.join(shapes.FORMS)}.")
        for name in ("coupling", "harden_weight", "harden_target", "heal_lr"):
            if not (0 <= getattr(self, name) < float("inf")):
                found.append(f"--{name.replace('_', '-')} {getattr(self, name)}: must be a finite number, 0 or more.")
        if self.heal_steps < 0:
            found.append(f"--heal-steps {self.heal_steps}: must be at least 0.")
        if self.depth < 1:
            found.append(f"--depth {self.depth}: must be at least 1.")
        if self.rank is not None and self.rank < 1:
            found.append(f"--rank {self.rank}: must be at least 1.")
        if self.dtype == "fp16":
            found.append("--dtype fp16: a lock is distilled in fp32 or bf16; fp16 overflows on the error's squares.")
        return found


# What a search of the levers chooses (`lever_search`), each side for itself.
CHOSEN_KEYS = frozenset({
    "axes", "knobs", "gradient", "zero", "offload_optimizer", "offload_param", "activation_checkpointing",
    "activation_storage", "tiles", "optimizer_groups", "optimizer_class", "master_dtype", "deepspeed_layout",
})  # fmt: skip


def not_chosen(lever_search: Mapping[str, Any], axes: Mapping[str, Any]) -> dict[str, Any]:
    """What two attacks have in common whose levers the planner has chosen, in the place of `CHOSEN_KEYS`.

    Args:
        lever_search: What was found (`AttackConfig.lever_search`).
        axes: The resolved axes.

    Returns:
        The cap, the levers given by hand, transform, trainable set, and the knobs but those of `reverse`.
    """
    own = {knob.name for knob in catalogue.strategy("reverse").knobs}
    knobs = {k: v for k, v in (axes.get("knobs") or {}).items() if k not in own}
    kept = {"cap": lever_search.get("cap"), "given": lever_search.get("given"), "knobs": knobs}
    return kept | {axis: axes.get(axis) for axis in ("transform", "trainable")}


@dataclass(frozen=True, kw_only=True)
class AttackConfig(RunConfig):
    """An attack: one strategy on one model, locked or not; an axis that is None is the strategy's own.

    `heldout_part` is the part of the held-out task data that is used: `tune` in the trials of a search, `report` in the
    runs that repeat its best settings, None for all. `search` is the id of such a search, of `search_trials` trials;
    `trial` the number of the trial that a run is, or whose settings it repeats. A trial ends early where its best loss
    at its n-th evaluation is above the n-th of `stop_above`. `target` is a loss in nats; `base_result` is what the same
    attack did on the base (`search.base_result`), for the gates. `lever_search` is what the planner found where the
    strategy searches its levers (`planner.search`), whose winner the levers, gradient and knobs are.
    """

    kind: str = "attack"
    strategy: str = "ckpt-layer"
    transform: str | None = None
    trainable: str | None = None
    gradient: str | None = None
    knobs: dict[str, float | str] = dataclasses.field(default_factory=dict)
    heldout_base: str | None = None
    public_data: str | None = None
    save_model: bool = False
    lock_id: str | None = None
    heldout_part: str | None = None
    search: str | None = None
    search_trials: int = 0
    trial: int | None = None
    stop_above: list[float | None] = dataclasses.field(default_factory=list)
    target: float | None = None
    base_result: dict[str, Any] | None = None
    lever_search: dict[str, Any] | None = None

    @property
    def is_trial(self) -> bool:
        """Whether this is a trial of a search, and no result."""
        return self.heldout_part == "tune"

    @property
    def entry(self) -> catalogue.Strategy:
        """The strategy with the axes that were chosen by hand."""
        return catalogue.combined(self.strategy, self.transform, self.trainable, self.gradient)

    @property
    def axes(self) -> dict[str, object]:
        """The resolved choice on the four axes."""
        levers = catalogue.Levers(**{f.name: getattr(self, f.name) for f in dataclasses.fields(catalogue.Levers)})
        return catalogue.axes(self.entry, levers, self.knobs)

    def faults(self) -> list[str]:
        """What is wrong with these settings, one sentence each."""
        found, asked = super().faults(), self.knobs.get("text") == "public"
        if asked and not self.public_data:
            found.append("--set text=public needs a public text: name it with --public-data.")
        if self.public_data and not asked:
            found.append(
                f"--public-data {self.public_data}: this strategy does not read it. Leave it out, or take --strategy "
                "undistil with --set text=public."
            )
        if self.dtype == "fp16" and self.entry.transform in ("undistil", "drop-blocks"):
            found.append(f"--dtype fp16: {self.entry.transform} distils, as a lock does, in fp32 or bf16 alone.")
        return found


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(AttackConfig):
    """A measurement of an attack's steps that trains to no end; without `data`, on random token ids.

    `steps` are the timed ones. `base` is the unlocked model whose inference is measured beside the model's own.
    """

    kind: str = "measure"
    data: str | None = None
    base: str | None = None
    inference_batches: list[int] = dataclasses.field(default_factory=lambda: [1, 4])
    new_tokens: int = 16
    repeats: int = 5

    def faults(self) -> list[str]:
        """What is wrong with these settings, one sentence each."""
        found = super().faults()
        for name, low in (("steps", 3), ("new_tokens", 1), ("repeats", 1)):  # two steps warm up
            if getattr(self, name) < low:
                found.append(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {low}.")
        wrong = [batch for batch in self.inference_batches if batch < 1]
        if wrong:
            found.append(f"--inference-batches {wrong[0]}: each must be at least 1.")
        if self.inference_batches and self.new_tokens >= self.seq_len:
            found.append(
                f"--new-tokens {self.new_tokens}: prompt and new tokens together are --seq-len {self.seq_len} long, so "
                "take fewer."
            )
        return found


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Training of a small Llama and its tokenizer from text, from random numbers; `model` is then unused."""

    kind: str = "pretrain"
    model: str = ""
    width: int = 160
    inner: int = 432
    num_layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 2048


KINDS: dict[str, type[RunConfig]] = {
    "lock": LockConfig,
    "attack": AttackConfig,
    "measure": MeasureConfig,
    "pretrain": PretrainConfig,
}
# Settings whose value is a place, which counts by what lies there.
PLACES = ("model", "base", "data", "heldout", "heldout_base", "public_data", "chat_template")


def to_json(config: RunConfig) -> str:
    """One line of JSON that `from_json` reads back; what the launch line carries."""
    return json.dumps(dataclasses.asdict(config), allow_nan=False, ensure_ascii=False)


def from_json(text: str) -> RunConfig:
    """Rebuild a configuration from `to_json`'s line."""
    values = json.loads(text)
    return KINDS[values["kind"]](**values)


def check(config: RunConfig) -> None:
    """Refuse a configuration that has faults.

    Args:
        config: The configuration of a run, of any kind.

    Raises:
        ConfigError: With all faults in one message.
    """
    faults = config.faults()
    if faults:
        raise ConfigError(faults)


def identify(config: RunConfig, deepspeed_config: Mapping[str, Any]) -> dict[str, Any]:
    """The flat settings that a run's id is made of: paths count by the digests of their bytes."""
    values = dataclasses.asdict(config)
    if isinstance(config, AttackConfig):
        # The resolved axes stand for the strategy's name, which is a label.
        for key in ("strategy", "lever_search", *catalogue.AXES):
            values.pop(key)
        values["axes"] = {k: v for k, v in config.axes.items() if k != "levers"}
        if config.heldout_part is None:
            values.pop("heldout_part")
    for key in PLACES:
        if values.get(key):
            values[key] = digest(values[key])
    values["deepspeed_layout"], values["deepspeed_config"] = split_layout(deepspeed_config)
    values["global_batch"] = config.global_batch
    return values


def split_layout(merged: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part a merged DeepSpeed configuration into where a run computes and what it computes.

    Args:
        merged: What DeepSpeed gets.

    Returns:
        The layout (ZeRO, offload, batch split, which Adam does the update) and the rest (optimizer, clipping ...).
    """
    rest = json.loads(json.dumps(merged))
    layout = {key: rest.pop(key) for key in LAYOUT_KEYS if key in rest}
    layout["torch_adam"] = rest.get("optimizer", {}).get("params", {}).pop("torch_adam", None)
    return layout, rest


def digest(place: str) -> str:
    """The digest of a data file or folder, or of a model folder.

    An embedded corpus counts by its name and interpreter, a data set of the hub by its name and fingerprint.
    """
    import platform

    if place.startswith("embedded:"):
        return f"{place} of Python {platform.python_version()}"
    if place.startswith(NAMED):
        return place
    path = Path(place)
    return record.digest_folder(path) if path.is_dir() else record.digest_file(path)


def shown(place: str) -> str:
    """What a record says of a place: where things lie on this machine is nobody's business."""
    return place if place.startswith(NAMED) else folders.shown_name(place)


def run_ids(config: RunConfig, deepspeed_config: Mapping[str, Any]) -> tuple[str, str]:
    """The id and resume_id of a run (see `record.run_ids`)."""
    return record.run_ids(identify(config, deepspeed_config))


def check_folder(out: Path, run_id: str, resume_id: str) -> dict[str, Any] | None:
    """Refuse a folder that is not this run's to write into; nothing is written.

    Args:
        out: The folder.
        run_id: The run's id.
        resume_id: Its resume_id.

    Returns:
        The record of this very run if it ended `ok` there before, else None.

    Raises:
        ConfigError: If the folder belongs to another run, holds a finished run whose layout was another one (its
            rows would be lost), holds something else, or may not be written.
    """
    marker = out / "run.json"
    if not marker.is_file():
        if out.exists() and (not out.is_dir() or not all(map(_is_own, out.iterdir()))):
            raise ConfigError(f"{out} exists and is no folder of a run. Choose another --out, or empty it yourself.")
        _check_writable(out)
        return None
    try:
        owner = json.loads(marker.read_text(encoding="utf-8")).get("resume_id")
    except ValueError:
        owner = None
    if owner != resume_id:
        raise ConfigError(
            f"{out} belongs to another run (resume_id {str(owner)[:8]}, this one is {resume_id[:8]}): some setting "
            "differs. Choose another --out, or give the settings of that run to go on with it."
        )
    records = out / record.RECORDS_FILE
    entries = list(record.read_lines(records)) if records.exists() else []
    if not entries or entries[-1]["outcome"] != record.Outcome.OK.value:
        _check_writable(out)
        return None
    if entries[-1]["id"] != run_id:
        raise ConfigError(
            f"{out} holds this run as it ended with another ZeRO stage, offload, number of ranks or split of the "
            "batch. Choose another --out: both are results of their own."
        )
    return entries[-1]


def _is_own(entry: Path) -> bool:
    return entry.name in OWN_FILES or entry.name.startswith(".run.json.")


def taken(out: Path) -> str:
    """What to say when another process holds a run's folder."""
    return f"{out}: another command writes into this folder now. Wait for its end, or choose another --out."


def _check_writable(out: Path) -> None:
    there = next(folder for folder in (out, *out.parents) if os.path.exists(folder))
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out}: {there} cannot be written. Choose another --out, or change its permissions.")


def claim_folder(out: Path, run_id: str, resume_id: str) -> None:
    """Take a run's folder, or go on in it if the same run was there before.

    Args:
        out: The folder; made if need be.
        run_id: The run's id.
        resume_id: The run's resume_id (64 hexadecimal digits).

    Raises:
        ConfigError: As `check_folder`.
    """
    check_folder(out, run_id, resume_id)
    if not (out / "run.json").is_file():
        record.write_atomic(out / "run.json", json.dumps({"resume_id": resume_id}) + os.linesep)
