"""Model folders: which one a name means, and whether its files are whole, before anything is loaded.

Only headers of weight files are read, but for a locked folder, whose files are compared with the digests in its
lock.json (cached, and needed for the run's id anyhow).
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlrscale import record, shapes
from dlrscale.errors import ConfigError

MANIFEST = "lock.json"
# Keys of a manifest that the attack, its record and the report read. `files` may be taken out by hand.
MANIFEST_KEYS = (
    "lock_id",
    "base",
    "form",
    "depth",
    "ranks",
    "layers",
    "coupling",
    "b",
    "start",
    "harden",
    "param_ratio",
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", INDEX, "tokenizer*", "vocab*", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model",
)  # fmt: skip
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a weight file: the file's name and the tensor's shape."""

    file: str
    shape: tuple[int, ...]


def find_model(text: str, option: str = "--model") -> Path:
    """The local folder that `--model` or `--base` means: a folder, or a model of the Hugging Face hub.

    What exists is a folder. What looks like a path, or has a similar name beside it, is a mistyped path; the
    network is not asked then. Anything else of the form `name` or `organisation/name` is fetched into the hub's
    cache, unless HF_HUB_OFFLINE says that what is cached must do.

    Args:
        text: The option's value.
        option: The option's name, for messages.

    Returns:
        The folder's absolute path.

    Raises:
        ConfigError: If there is no such folder, or the hub has no such model or cannot be reached.
    """
    path = Path(os.path.abspath(text))
    if not path.exists() and text.startswith("~"):
        path = Path(os.path.abspath(os.path.expanduser(text)))
    if text and path.is_dir():
        return path
    if text and path.exists():
        raise ConfigError(f"{option} {path} is a file. Name the folder of a model, with config.json and weights.")
    near = shapes.near_names(path)
    if near or not _may_be_hub_id(text):
        raise ConfigError(f"No such model folder: {path}{near}. Name a local folder with config.json and weights.")
    return _fetch(text, option, path)


def _may_be_hub_id(text: str) -> bool:
    """Whether a name that is no folder has the hub's form, `name` or `organisation/name`, and no such parent here."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", text, re.ASCII):
        return False
    parent, slash, _ = text.partition("/")
    return not (slash and Path(parent).exists())


def _fetch(hub_id: str, option: str, path: Path) -> Path:
    """Fetch the files of a hub model that are needed here, or find them in the cache.

    Weight files that are pickles are not fetched.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    head = f"{option} {hub_id}: no such folder ({path})"
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ConfigError(
            f"{head}, and the Hugging Face hub has no model {hub_id!r} that you may read. Mend the name, or log in "
            "with `hf auth login`."
        ) from None
    except Exception as error:  # the hub's client passes on errors of its transport, whichever that is
        if constants.HF_HUB_OFFLINE:
            raise ConfigError(
                f"{head}, and the Hugging Face hub is switched offline (HF_HUB_OFFLINE) with no copy in its cache. "
                "Name a local folder, or unset HF_HUB_OFFLINE to fetch the model."
            ) from None
        reason = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"{head}, and the Hugging Face hub gave no model {hub_id!r} ({reason}). Name a local folder, or try again "
            "when the hub can be reached."
        ) from None


def shown_name(folder: str | Path) -> str:
    """What a model is called in records: the folder's name, or its hub id where it lies in the hub's cache."""
    path = Path(folder)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name


def check_weights(folder: str | Path) -> dict[str, Stored]:
    """Refuse a folder whose weight files are not safetensors, not whole or not those of its index or manifest.

    Args:
        folder: A Hugging Face folder, locked or not.

    Returns:
        File and shape of every stored tensor by its name.

    Raises:
        ConfigError: With every fault that was found.
    """
    folder = Path(folder)
    config = shapes.read_config(folder)
    manifest = read_manifest(folder)
    listed = _listed_files(folder)
    faults: list[str] = []
    found: dict[str, Stored] = {}
    for name, tensors in listed.items():
        try:
            held = read_header(folder / name)
        except ConfigError as error:
            faults += error.faults
            continue
        lacking = sorted((tensors or set()) - set(held))
        if lacking:
            faults.append(
                f"{folder / name} does not hold {_some(lacking)}, which {INDEX} says it does. Fetch the model again."
            )
        found |= {tensor: Stored(name, shape) for tensor, shape in held.items()}
    if not faults and manifest is not None:
        faults = list(_manifest_faults(folder, config, manifest))
    if faults:
        raise ConfigError(faults)
    return found


def _listed_files(folder: Path) -> dict[str, set[str] | None]:
    """The weight files that make up the model, with the tensors that an index says are in each (None: no index)."""
    here = sorted(p.name for p in folder.glob("*.safetensors"))
    if not here:
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ConfigError(
                f"{folder} holds its weights as a pickle alone ({_some(pickles)}); loading one can run any code, so it "
                "is not read. If you trust it, load it with transformers and save it again by "
                "`save_pretrained`, which writes safetensors."
            )
        raise ConfigError(f"{folder} holds no *.safetensors weights. Fetch the model again, or convert its weights.")
    shards = {name for name in here if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)}
    if WEIGHTS in here:
        stale = shards | ({INDEX} if (folder / INDEX).exists() else set())
        if stale:
            raise ConfigError(
                f"{folder} holds {WEIGHTS} and also {_some(sorted(stale))}: the parts of another save. Delete "
                "those of the two that are old."
            )
        return {WEIGHTS: None}
    if not (folder / INDEX).exists():
        if shards:
            raise ConfigError(f"{folder / INDEX} is missing: its shards alone are no model. Fetch the model again.")
        raise ConfigError(f"{folder} holds {_some(here)}, but neither {WEIGHTS} nor {INDEX}. Fetch the model again.")
    listed = _read_index(folder / INDEX)
    missing = sorted(name for name in listed if not (folder / name).is_file())
    stale = sorted(shards - set(listed))
    faults = [f"{folder / name} is missing, but {INDEX} names it. Fetch the model again." for name in missing]
    faults += [f"{folder / name} is in no line of {INDEX}: a shard of another save. Delete it." for name in stale]
    if faults:
        raise ConfigError(faults)
    return listed


def _read_index(file: Path) -> dict[str, set[str] | None]:
    """The tensors by shard, as an index lists them."""
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        listed: dict[str, set[str] | None] = {}
        for tensor, name in weight_map.items():
            if Path(name).name != name:
                raise ConfigError(f"{file}: {name!r} is no name of a file beside it. Fetch the model again.")
            listed.setdefault(name, set()).add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{file} is no JSON object with a weight_map. Fetch the model again.") from None
    if not listed:
        raise ConfigError(f"{file} lists no tensor. Fetch the model again.")
    return listed


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, whose size must be what its header says.

    Args:
        file: The file.

    Returns:
        Shape by name.

    Raises:
        ConfigError: If the file is cut off, too long, or no safetensors file.
    """
    mend = "Fetch or copy it again."
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            length = struct.unpack("<Q", handle.read(8))[0] if size >= 8 else 0
            text = handle.read(length) if length <= min(size - 8, MAX_HEADER_BYTES) else b""
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None
    if size < 8 or (length > size - 8 and length <= MAX_HEADER_BYTES):
        raise ConfigError(f"{file} is cut off: {size} bytes are less than its header. {mend}")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found, spans = {}, []
        for name, entry in header.items():
            found[name] = tuple(map(int, entry["shape"]))
            first, last = map(int, entry["data_offsets"])
            spans.append((first, last))
            bits = DTYPE_BITS.get(entry["dtype"])
            if min(found[name], default=0) < 0 or (bits and 8 * (last - first) != bits * math.prod(found[name])):
                raise ValueError
        end = 0
        for first, last in sorted(spans):
            if first != end:
                raise ValueError
            end = last
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{file} is no safetensors file: its header is broken. {mend}") from None
    if size != 8 + length + end:
        what = "is cut off" if size < 8 + length + end else "is too long"
        raise ConfigError(f"{file} {what}: {size} bytes, and its header says {8 + length + end}. {mend}")
    return found


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a locked folder, or None where there is none.

    Args:
        folder: A model folder.

    Returns:
        The content of its lock.json, or None.

    Raises:
        ConfigError: If it is no JSON object, or lacks a key.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        return None
    mend = "Copy it again from the folder that the lock wrote."
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: no JSON: {error}. {mend}") from None
    if not isinstance(manifest, dict):
        raise ConfigError(f"{file}: holds no JSON object. {mend}")
    lacking = [key for key in MANIFEST_KEYS if key not in manifest]
    base = manifest.get("base")
    if "base" in manifest:
        lacking += [f"base.{key}" for key in ("name", "digest") if not isinstance(base, dict) or key not in base]
    if not isinstance(manifest.get("harden"), (dict, type(None))):
        lacking.append("harden.weight")
    if lacking:
        raise ConfigError(f"{file}: lacks {', '.join(lacking)}. {mend}")
    return manifest


def _manifest_faults(folder: Path, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> Iterator[str]:
    """Where a manifest is not that of the model that lies beside it."""
    file = folder / MANIFEST
    dlr = config.get("dlr")
    if not isinstance(dlr, dict):
        yield f"{file} lies beside a model that is not locked (config.json has no dlr). Delete it, or name another."
        return
    layers = manifest["layers"] if isinstance(manifest["layers"], list) else []
    ranks = manifest["ranks"]
    by_layer = ranks if isinstance(ranks, dict) else {str(layer): ranks for layer in layers}
    told = {"form": manifest["form"], "ranks": by_layer}
    wrong = [key for key, value in told.items() if dlr.get(key) != value]
    if wrong:
        yield (
            f"{file} is the manifest of another model: its {' and '.join(wrong)} are not those of dlr in "
            "config.json. Copy the lock.json from the folder that the lock wrote."
        )
        return
    files = manifest.get("files")
    for name, digest in files.items() if isinstance(files, dict) else ():
        if not (folder / name).is_file():
            yield f"{folder / name} is missing, but {MANIFEST} names it. Copy the folder that the lock wrote again."
        elif record.digest_file(folder / name) != digest:
            yield (
                f"{folder / name} is not what the lock wrote (its digest is another than in {MANIFEST}). Copy it again "
                f"from the lock's own folder; if you changed it on purpose, take `files` out of {MANIFEST}."
            )


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 by name of the files that make a locked model what it is: weights, config.json and modelling files."""
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".py") or p.name == "config.json")
    return {name: record.digest_file(folder / name) for name in names}


def _some(names: list[str], most: int = 3) -> str:
    """A few names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
