"""The whole check of a user's DeepSpeed file, before any rank starts: every key, every value, all faults at once.

What is valid is asked of DeepSpeed itself: its pydantic models, the signatures of its optimizers and schedules, and
at the end its own reader. Only what it reads key by key stands here as tables. DeepSpeed is imported when a file is
checked, and not before.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import json
import logging
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlrscale.engine.devices import import_deepspeed
from dlrscale.engine.optimizers import (
    AUTO,
    cpu_adam_faults,
    has_async_io,
    nearest,
    optimizer_faults,
    scatter_faults,
    scheduler_faults,
)
from dlrscale.errors import ConfigError

if typing.TYPE_CHECKING:
    from pydantic import BaseModel

# What DeepSpeed reads key by key: a type, (type, least value), or a tuple of the words it takes; a dictionary is a
# section.
COUNT, NUMBER, WORDS = (int, 1), (float, 0), ("fp32", "fp16", "bf16")
TABLE: dict[str, Any] = {
    "train_batch_size": COUNT, "train_micro_batch_size_per_gpu": COUNT, "gradient_accumulation_steps": COUNT,
    "steps_per_print": COUNT, "gradient_clipping": NUMBER, "gradient_predivide_factor": (float, 1e-12),
    "gradient_allreduce_op": ("mean", "sum"), "managed_gradient_accumulation": bool,
    "prescale_gradients": bool, "disable_allgather": bool, "dump_state": bool, "disable_python_gc": bool,
    "wall_clock_breakdown": bool, "memory_breakdown": bool, "dataloader_drop_last": bool,
    "zero_allow_untested_optimizer": bool, "zero_force_ds_cpu_optimizer": bool,
    "use_data_before_expert_parallelism": bool, "vocabulary_size": COUNT, "log_level": str,
    "communication_data_type": WORDS, "seq_parallel_communication_data_type": WORDS,
    "optimizer": {"type": str, "params": dict, "legacy_fusion": bool},
    "scheduler": {"type": str, "params": dict},
    "activation_checkpointing": {
        "partition_activations": bool, "number_checkpoints": COUNT, "contiguous_memory_optimization": bool,
        "synchronize_checkpoint_boundary": bool, "profile": bool, "cpu_checkpointing": bool,
    },
    "flops_profiler": {
        "enabled": bool, "recompute_fwd_factor": NUMBER, "profile_step": COUNT, "module_depth": (int, -1),
        "top_modules": COUNT, "detailed": bool, "output_file": (str, None),
    },
    "checkpoint": {
        "tag_validation": str, "load_universal": bool, "use_node_local_storage": bool,
        "parallel_write": {"pipeline_stage": bool}, "checkpoint_serialization": bool, "writer": dict,
    },
    "data_types": {
        "grad_accum_dtype": WORDS, "param_dtype": WORDS, "buffer_dtype": WORDS, "keep_in_fp32_modules": list,
    },
    "torch_autocast": {"enabled": bool, "dtype": str, "lower_precision_safe_modules": list},
    "aio": {
        "block_size": COUNT, "queue_depth": COUNT, "intra_op_parallelism": COUNT, "single_submit": bool,
        "overlap_events": bool, "use_gds": bool,
    },
}  # fmt: skip

# Sections that dlrscale refuses whatever they hold, unless they say `enabled: false`; those that this DeepSpeed has
# removed are refused by its own words.
REFUSED = {
    "pipeline": "dlrscale does not split a model into pipeline stages",
    "tensor_parallel": "dlrscale does not split single weights over ranks",
    "expert_parallel": "dlrscale knows no mixtures of experts",
    "sequence_parallel_size": "dlrscale does not split sequences over ranks",
    "hybrid_engine": "dlrscale does not generate text while it trains",
    "autotuning": "the settings of a run are part of what it measures",
    "data_efficiency": "dlrscale draws the data itself, so that runs compare",
    "weight_quantization": "it would change the weights that are measured",
    "datastates_ckpt": "dlrscale checks its checkpoints when they are written, and this writes them later",
    "compile": "what a compiled graph saves for backward is not what dlrscale counts",
}
# Single settings that would make a run another one than its record says: path to (values that are refused, why).
REFUSED_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "gradient_allreduce_op": (lambda v: v == "sum", "gradients are means over the step's tokens"),
    "managed_gradient_accumulation": (lambda v: v is False, "dlrscale leaves the accumulation to DeepSpeed"),
    "torch_autocast.enabled": (bool, "it would change the precision unseen; take --dtype, or bf16.enabled"),
    "data_types.param_dtype": (bool, "it would change the precision unseen; take --dtype, or bf16.enabled"),
    "checkpoint.load_universal": (bool, "dlrscale converts checkpoints itself, when another layout reads them"),
    "checkpoint.use_node_local_storage": (bool, "dlrscale checks checkpoints in the folder that all ranks see"),
    "checkpoint.writer": (bool, "dlrscale checks its checkpoints when they are written, and this writes them later"),
    "zero_optimization.zenflow": (bool, "its updates come later than the gradients: not the training measured here"),
    "zero_optimization.zero_quantized_weights": (bool, "it rounds weights, so that gradients are not exact"),
    "zero_optimization.zero_quantized_nontrainable_weights": (bool, "it rounds the weights that are measured"),
    "zero_optimization.zero_quantized_gradients": (bool, "it rounds gradients, which dlrscale records as exact"),
    "zero_optimization.elastic_checkpoint": (bool, "dlrscale converts checkpoints for other numbers of ranks itself"),
    "zero_optimization.offload_optimizer.super_offload": (bool, "nobody has tried it here"),
    "comet.api_key": (bool, "it would stand in the record; set COMET_API_KEY in the environment"),
    "zero_optimization.compute_grad_norm": (lambda v: v is False, "dlrscale records the norm of every step"),
}
RENAMED = {"bfloat16": "bf16", "allgather_size": "zero_optimization.allgather_bucket_size"}
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml", "csv_monitor": None}
# Of DeepSpeed's `ge=0` fields those that it divides by.
BUCKETS = ("reduce_bucket_size", "allgather_bucket_size")
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|-?(?:NaN|Infinity)')


def parse(path: str) -> dict[str, Any]:
    """Read a DeepSpeed file as strict JSON.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        ConfigError: If it cannot be read or is no JSON object; one message with line and column.
    """
    name = f"--deepspeed_config {path}"
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such file. Name one of ds_configs/ or your own.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name}: cannot be read ({reason}). Name one of ds_configs/ or your own.") from None
    if raw.startswith(b"\xef\xbb\xbf"):
        raise ConfigError(f"{name}: line 1, column 1: a byte order mark. Save the file as UTF-8 without it.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise ConfigError(f"{name}: line {line}, column {column}: not UTF-8. Save the file as UTF-8.") from None
    if not text.strip():
        raise ConfigError(f"{name}: line 1, column 1: the file is empty. Write {{}} to leave everything to dlrscale.")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        mend = " JSON takes no comments: take it out." if text[error.pos : error.pos + 2] in ("//", "/*") else ""
        mend = " JSON takes no comments: take it out." if text[error.pos : error.pos + 1] == "#" else mend
        raise ConfigError(f"{name}: no JSON: line {error.lineno}, column {error.colno}: {error.msg}.{mend}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: no JSON that can be read: {error}.") from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"{name}: line 1, column 1: must hold one JSON object, not {type(value).__name__}. Put it into {{}}."
        )
    found = token_faults(text)
    if found:
        raise ConfigError([f"{name}: {fault}" for fault in found])
    return value


def token_faults(text: str) -> list[str]:
    """Duplicate keys and numbers that JSON does not have, in a text that Python reads as JSON."""
    found: list[str] = []
    stack: list[tuple[str, set[str]]] = []  # the path of each open object or array, and the keys seen in it
    key, word = "", None

    def place(at: int) -> str:
        return f"line {text.count(chr(10), 0, at) + 1}, column {at - text.rfind(chr(10), 0, at)}"

    for match in TOKEN.finditer(text):
        token = match.group()
        if token in "{[":
            path = ".".join(filter(None, (stack[-1][0] if stack else "", key)))
            stack.append((path, set()))
            key = ""
        elif token in "}]":
            stack.pop()
        elif token == ":":
            key, seen = json.loads(word.group()), stack[-1][1]
            if key in seen:
                path = ".".join(filter(None, (stack[-1][0], key)))
                found.append(f"{place(word.start())}: {path} stands there twice. Keep one.")
            seen.add(key)
        elif token == ",":
            key = ""
        elif token.endswith(("NaN", "Infinity")) and not token.startswith('"'):
            found.append(f"{place(match.start())}: {token} is no JSON number. Give a finite one.")
        word = match
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed, which logs to stdout, silent while it is imported and asked."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def check(file: dict[str, Any]) -> list[str]:
    """All that is wrong with the content of a DeepSpeed file; whole numbers written as 5e8 become integers in place.

    Args:
        file: The content, as `parse` gives it.

    Returns:
        One sentence or two for each fault, each with its JSON path; empty when all is well.
    """
    with quiet():
        walk = Check(models())
        walk.section(file, TABLE, "")
        found = walk.faults
        # Parts with faults of their own are left out, but the stage and the offload decide the optimizer's class.
        whole = {k: v for k, v in file.items() if not any(re.match(rf"{re.escape(k)}[.: ]", f) for f in found)}
        zero = file.get("zero_optimization")
        if "zero_optimization" not in whole and isinstance(zero, dict):
            kinds = {"stage": int, "offload_optimizer": dict}
            parts = {k: zero[k] for k, kind in kinds.items() if isinstance(zero.get(k), kind)}
            whole["zero_optimization"] = parts
        found += crossed(whole)
        return found or deepspeed_faults(file)


def models() -> dict[str, type[BaseModel]]:
    """DeepSpeed's models of the sections of its file, by the section's key."""
    import_deepspeed()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    monitors = {key: DeepSpeedMonitorConfig.model_fields[key].annotation for key in MONITORS}
    return monitors | {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }


@dataclass
class Check:
    """A walk through a file that collects its faults."""

    models: dict[str, type[BaseModel]]
    faults: list[str] = field(default_factory=list)

    def section(self, value: Any, table: Mapping[str, Any], path: str) -> None:
        """Check an object against a table of its keys."""
        from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS as removed

        top = not path
        valid = set(table) | (set(self.models) - {"timers.throughput"} | {"timers"} if top else set())
        if not self.is_object(value, path):
            return
        for key in list(value):
            own = f"{path}.{key}".lstrip(".")
            if top and key in removed:
                self.faults.append(f"{own}: {removed[key].split('See http')[0].strip()} Take it out.")
            elif top and key in REFUSED:
                off = isinstance(value[key], dict) and value[key].get("enabled") is False
                if not off:
                    self.faults.append(f"{own}: {REFUSED[key]}. Take it out.")
            elif top and key in RENAMED:
                self.faults.append(f"{own}: the old name of {RENAMED[key]}. Write that.")
            elif top and key == "timers":
                if self.is_object(value[key], own):
                    for inner in value[key]:
                        if inner == "throughput":
                            self.model(value[key][inner], self.models["timers.throughput"], "timers.throughput")
                        else:
                            self.faults.append(f"timers.{inner}: no such key.{nearest(inner, ['throughput'])}")
            elif top and key in self.models:
                self.model(value[key], self.models[key], own)
            elif key not in table:
                self.faults.append(f"{own}: no such key.{nearest(key, valid | set(REFUSED) if top else valid)}")
            elif isinstance(table[key], dict):
                self.section(value[key], table[key], own)
            else:
                self.leaf(value, key, table[key], own)
            self.refused(value[key], own)

    def is_object(self, value: Any, path: str) -> bool:
        """Whether a value is a JSON object; a fault where it is not."""
        if isinstance(value, dict):
            return True
        self.faults.append(f"{path} is {shown(value)}: must be an object, {{...}}; or leave it out.")
        return False

    def refused(self, value: Any, path: str) -> None:
        """A fault where a valid setting is one that dlrscale does not honour."""
        test, why = REFUSED_VALUES.get(path, (None, ""))
        if test is not None and value != "auto" and test(value):
            told = path if path.endswith("api_key") else f"{path} {shown(value)}"  # a secret is not repeated
            self.faults.append(f"{told}: {why}. Take it out.")

    def leaf(self, holder: dict[str, Any], key: str, kind: Any, path: str) -> None:
        """Check a value against an entry of a table; a whole float becomes an integer where one is due."""
        value, low = holder[key], None
        if value == "auto" and path in AUTO:
            return
        if isinstance(kind, tuple) and isinstance(kind[0], str):
            if value not in kind:
                self.faults.append(f"{path} is {shown(value)}: one of {', '.join(kind)}.")
            return
        if isinstance(kind, tuple):
            kind, low = kind
            if value is None and low is None:
                return
        fault = type_fault(holder, key, kind)
        if fault is None and low is not None and holder[key] < low:
            fault = "must be more than 0" if 0 < low < 1 else f"must be at least {low}"
        if fault:
            self.faults.append(f"{path} is {shown(value)}: {fault}.{self.no_auto(value, path)}")

    def no_auto(self, value: Any, path: str) -> str:
        """What to say further where "auto" stands that nothing resolves."""
        return ' dlrscale does not resolve "auto" there: give a value, or leave it out.' if value == "auto" else ""

    def model(self, value: Any, model: type[BaseModel], path: str) -> None:
        """Check a section against DeepSpeed's own model of it."""
        from pydantic import ValidationError

        if not self.is_object(value, path):
            return
        fields = dict(model.model_fields) | {info.alias: info for info in model.model_fields.values() if info.alias}
        before = len(self.faults)
        for key in list(value):
            own = f"{path}.{key}"
            if key not in fields:
                self.unknown(key, path, fields)
                continue
            extra = fields[key].json_schema_extra or {}
            if extra.get("deprecated"):
                self.faults.append(f"{own}: out of use. Write {path}.{extra['new_param']}.")
                continue
            inner, optional = kind_of(fields[key].annotation)
            if value[key] is None and optional or value[key] == "auto" and own in AUTO:
                continue
            if hasattr(inner, "model_fields"):
                self.model(value[key], inner, own)
                continue
            fault = type_fault(value, key, inner)
            if fault is None and key in BUCKETS and value[key] < 1:
                fault = "must be at least 1"
            if fault:
                self.faults.append(f"{own} is {shown(value[key])}: {fault}.{self.no_auto(value[key], own)}")
            else:
                self.refused(value[key], own)
        if len(self.faults) == before:
            try:
                model(**value)
            except ValidationError as error:
                for entry in error.errors():
                    own = ".".join([path, *map(str, entry["loc"])])
                    given = "" if not entry["loc"] else f" is {shown(entry['input'])}"
                    self.faults.append(f"{own}{given}: {entry['msg'].removeprefix('Assertion failed, ').rstrip('.')}.")

    def unknown(self, key: str, path: str, fields: Mapping[str, Any]) -> None:
        """A fault for a key that a section does not have."""
        from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS as removed

        if path == "zero_optimization" and key in removed:
            self.faults.append(f"{path}.{key}: {removed[key].split('See http')[0].strip()} Take it out.")
        else:
            self.faults.append(f"{path}.{key}: no such key.{nearest(key, fields)}")


def crossed(file: Mapping[str, Any]) -> list[str]:
    """Faults between the parts of a file whose single keys and values are right."""
    section = file.get("zero_optimization") or {}
    found = []
    if all((file.get(key) or {}).get("enabled") is True for key in ("bf16", "fp16")):
        found.append("The DeepSpeed file enables bf16 and fp16 at once (bf16.enabled, fp16.enabled). Keep one.")
    for key in ("offload_optimizer", "offload_param"):
        place = section.get(key) or {}
        if place.get("device") == "nvme" and not place.get("nvme_path"):
            found.append(f"zero_optimization.{key}.nvme_path: missing, and the device is nvme. Name a folder there.")
        if place.get("device") == "nvme" and section.get("stage") != 3:
            found.append(f"zero_optimization.{key}.device nvme: needs zero_optimization.stage 3. Take cpu.")
        elif place.get("device") == "nvme" and not has_async_io():
            found.append(f"zero_optimization.{key}.device nvme: DeepSpeed's async_io cannot be built here. Take cpu.")
    for key, package in MONITORS.items():
        if package and (file.get(key) or {}).get("enabled") and not importable(package):
            found.append(f"{key}.enabled: the package {package} is not installed. Install it, or take the section out.")
    if "optimizer" in file:
        found += optimizer_faults(file["optimizer"], file)
    if "scheduler" in file:
        found += scheduler_faults(file["scheduler"])
    return found + scatter_faults(file, section) + cpu_adam_faults(file, section)


def deepspeed_faults(file: Mapping[str, Any]) -> list[str]:
    """What DeepSpeed's own reader, which has the last word, says of a file."""
    from deepspeed.runtime.config import DeepSpeedConfig

    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    passed = {key: value for key, value in without_auto(file).items() if key not in batch}
    try:
        DeepSpeedConfig(passed | {"train_micro_batch_size_per_gpu": 1})
    except Exception as error:  # whatever it refuses, it would refuse in every rank
        return [f"DeepSpeed refuses the file: {' '.join(str(error).split()) or type(error).__name__}"]
    return []


def without_auto(value: Any) -> Any:
    """A copy of a DeepSpeed file's content without the keys that hold "auto"."""
    if isinstance(value, Mapping):
        return {k: without_auto(v) for k, v in value.items() if not (isinstance(v, str) and v == "auto")}
    return [without_auto(v) for v in value] if isinstance(value, list) else value


def importable(package: str) -> bool:
    """Whether a package is installed, without importing it."""
    import importlib.util

    return importlib.util.find_spec(package) is not None


def shown(value: Any) -> str:
    """A value as it stands in JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def kind_of(annotation: Any) -> tuple[Any, bool]:
    """The type that a field takes, without its Optional, and whether it takes null."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if part is not type(None)]
        return (parts[0] if len(parts) == 1 else object), len(parts) < len(typing.get_args(annotation))
    return annotation, annotation is typing.Any


def type_fault(holder: dict[str, Any], key: str, kind: Any) -> str | None:
    """What is wrong with the type of a value; DeepSpeed would bend it (true to 1, "2" to 2). Whole floats are mended.

    Args:
        holder: The object that holds the value.
        key: Its key.
        kind: The type that is due: of Python, an enum, or anything else, which goes unchecked.

    Returns:
        The fault without its path, or None.
    """
    value = holder[key]
    kind = typing.get_origin(kind) or kind
    if inspect.isclass(kind) and issubclass(kind, enum.Enum):
        choices = [member.value for member in kind]
        kind = int if issubclass(kind, int) else str
        if isinstance(value, bool) or not isinstance(value, kind) or value not in choices:
            return f"one of {', '.join(map(str, dict.fromkeys(choices)))}"
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is bool:
        return None if isinstance(value, bool) else "must be true or false"
    if kind is float:
        return None if number else "must be a number"
    if kind is int:
        if not number or value != int(value):
            return "must be a whole number"
        holder[key] = int(value)
        return None
    if kind in (str, Path):
        return None if isinstance(value, str) else "must be text"
    if kind in (list, dict):
        return None if isinstance(value, kind) else "must be a list" if kind is list else "must be an object, {...}"
    return None
