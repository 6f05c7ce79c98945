"""Hugging Face folders in and out: the locked model with its manifest, and the flattened one without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from dlrscale import dlr, folders, models, record, shapes
from dlrscale.config import PretrainConfig
from dlrscale.dlr import MLPWeights
from dlrscale.errors import SurgeryError
from dlrscale.shapes import Family, ModelShape

SHARD_SIZE = "5GB"


def locked_model(
    base_folder: str | Path, dtype: str, form: str, nets: dict[int, dict[str, torch.Tensor]]
) -> PreTrainedModel:
    """Build the locked model from the base model's folder and the weights of its DLR-Nets.

    Args:
        base_folder: The base model's folder.
        dtype: `fp32` or `bf16`.
        form: The form of the DLR-Nets.
        nets: State of each DLR-Net by layer (`Distiller.weights`).

    Returns:
        The locked model on the CPU, in eval mode.
    """
    return with_nets(models.load_model(base_folder, dtype), form, nets)


def with_nets(source: PreTrainedModel, form: str, nets: Mapping[int, dict[str, torch.Tensor]]) -> PreTrainedModel:
    """Build a locked model from another model, locked in the same layers or not at all, and DLR-Nets.

    Args:
        source: The model that all but the DLR-Nets comes from; it stays as it is.
        form: The form of the DLR-Nets.
        nets: State of each DLR-Net by layer.

    Returns:
        The locked model on the CPU, in the source's dtype and in eval mode.
    """
    shape = shapes.model_shape(source.config.to_dict())
    config_class, model_class = models.locked_classes(shape.family)
    ranks = {str(layer): _ranks(state) for layer, state in nets.items()}
    values = source.config.to_dict() | {"dlr": {"form": form, "ranks": ranks}}
    for key in ("model_type", "architectures", "auto_map"):
        values.pop(key, None)
    locked = model_class._from_config(config_class(**values), dtype=source.dtype)
    state = _without_mlps(source, shape, nets)
    for layer, net in nets.items():
        state |= {f"{shape.family.mlp.format(layer)}.{k}": v for k, v in net.items()}
    return _finish(locked, state, source)


def _without_mlps(model: PreTrainedModel, shape: ModelShape, layers: Iterable[int]) -> dict[str, torch.Tensor]:
    """State of a model without that of some layers' MLPs or DLR-Nets."""
    prefixes = tuple(prefix for layer in layers for prefix in shape.family.state_prefixes(layer))
    return {k: v for k, v in model.state_dict().items() if not k.startswith(prefixes)}


def _ranks(state: dict[str, torch.Tensor]) -> list[int]:
    depth = sum(key.endswith("b_proj.weight") for key in state)
    return [state[f"blocks.{k}.b_proj.weight"].shape[1] for k in range(depth)]


def _finish(model: PreTrainedModel, state: dict[str, torch.Tensor], source: PreTrainedModel) -> PreTrainedModel:
    """Load a complete state, keep ties and the source's generation settings, and go to eval mode."""
    model.load_state_dict(state, strict=True)
    model.tie_weights()
    if source.generation_config is not None:
        model.generation_config = source.generation_config
    return model.eval()


def flattened_model(locked: PreTrainedModel) -> PreTrainedModel:
    """Turn every DLR-Net of a locked model into one ordinary MLP of the base's own architecture.

    By form and family (`shapes.check_flattens`): gated on a gated MLP and plain on a two-matrix MLP are exact; plain
    on a gated MLP becomes gate = A, up with weight 0 and bias 1. Layers of unequal widths are zero-padded to the
    widest.
    What the flat model loses is the coupling alone.

    Args:
        locked: A locked model; it stays as it is.

    Returns:
        A model of the base's own class, in the same dtype and in eval mode.

    Raises:
        SurgeryError: If the form is no ordinary MLP of this family.
    """
    shape = shapes.model_shape(locked.config.to_dict())
    if not shape.locked:
        raise SurgeryError("flatten: the model is not locked; there is nothing to flatten.")
    shapes.check_flattens(shape)
    biased = _needs_bias(shape)
    left = models.find_mlps(locked, shape, (i for i in range(shape.layers) if i not in shape.ranks))
    flat = {layer: models.mlp_weights(mlp, shape.family) for layer, mlp in left.items()}
    for layer in shape.ranks:
        net = locked.get_submodule(shape.family.mlp.format(layer))
        flat[layer] = _as_family(dlr.flat_weights(net), shape)
    inner = max(weights.up.shape[0] for weights in flat.values())
    model = _ordinary(locked, shape, inner, biased)
    state = _without_mlps(locked, shape, flat)
    for layer, weights in flat.items():
        home = shape.family.home(layer)
        state |= {f"{home}.{k}": v for k, v in _mlp_state(weights, shape.family, inner, biased).items()}
    return _finish(model, state, locked)


def _ordinary(locked: PreTrainedModel, shape: ModelShape, inner: int, biased: bool) -> PreTrainedModel:
    """A model of random weights of the base's own class, with MLPs of some inner width."""
    values = locked.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "dlr"):
        values.pop(key, None)
    values[shape.family.inner] = inner
    if biased and isinstance(shape.family.bias, str):
        values[shape.family.bias] = True
    config = AutoConfig.for_model(shape.family.model_type, **values)
    return _base_class(shape.family)._from_config(config, dtype=locked.dtype)


def fresh_model(locked: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Put MLPs of random weights, as the family starts them, in the place of a locked model's DLR-Nets.

    Args:
        locked: A locked model; it stays as it is. Its configuration keeps the base's inner width.
        seed: Of the random weights.

    Returns:
        A model of the base's own class, in the same dtype and in eval mode.
    """
    shape = shapes.model_shape(locked.config.to_dict())
    torch.manual_seed(seed)
    model = _ordinary(locked, shape, shape.inner, shape.mlp_bias)
    prefixes = tuple(prefix for layer in shape.ranks for prefix in shape.family.state_prefixes(layer))
    new = {k: v for k, v in model.state_dict().items() if k.startswith(prefixes)}
    return _finish(model, _without_mlps(locked, shape, shape.ranks) | new, locked)


def _base_class(family: Family) -> type[PreTrainedModel]:
    _, locked_class = models.locked_classes(family)
    return locked_class.__bases__[-1]


def _needs_bias(shape: ModelShape) -> bool:
    return shape.mlp_bias or (shape.form == "plain" and shape.family.gated)


def _as_family(weights: MLPWeights, shape: ModelShape) -> MLPWeights:
    """Write flat weights as an MLP of the family: the same function in the family's own matrices."""
    if (weights.gate is not None) == shape.family.gated:
        return weights
    ones = weights.up.new_ones(weights.up.shape[0])
    return MLPWeights(
        gate=weights.up,
        up=torch.zeros_like(weights.up),
        down=weights.down,
        gate_bias=weights.up_bias,
        up_bias=ones,
        down_bias=weights.down_bias,
    )


def _mlp_state(weights: MLPWeights, family: Family, inner: int, biased: bool) -> dict[str, torch.Tensor]:
    """State of one base MLP of width `inner`, zero-padded; absent biases are zeros where the family has them."""
    missing = inner - weights.up.shape[0]
    state: dict[str, torch.Tensor] = {}
    for name, weight, bias, pad in (
        (family.gate, weights.gate, weights.gate_bias, (0, 0, 0, missing)),
        (family.up, weights.up, weights.up_bias, (0, 0, 0, missing)),
        (family.down, weights.down, weights.down_bias, (0, missing)),
    ):
        if name is None:
            continue
        padded = nn.functional.pad(weight, pad)
        padded_bias = nn.functional.pad(
            weight.new_zeros(weight.shape[0]) if bias is None else bias, (0, padded.shape[0] - weight.shape[0])
        )
        new = {f"{name}.weight": padded.t() if family.transposed else padded} | (
            {f"{name}.bias": padded_bias} if biased else {}
        )
        for key, value in new.items():  # a fused matrix comes twice: its gate rows, then its up rows
            state[key] = torch.cat([state[key], value]) if key in state else value.contiguous()
    return state


def save_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    files: dict[str, str],
    manifest: dict[str, Any] | None = None,
) -> None:
    """Write a model folder so that it appears whole or not at all, in the place of an older one of ours.

    Args:
        model: The model; a locked one carries its modelling files along.
        tokenizer: Its tokenizer.
        folder: Where to.
        files: Further text files by name.
        manifest: A locked model's; its lock.json also gets the digests of the files as they lie there.
    """

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(temporary)
        _drop_absolute_paths(temporary / "config.json")
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        if manifest is not None:
            text = record.dumps(manifest | {"files": folders.file_digests(temporary)}, indent=2) + "\n"
            (temporary / folders.MANIFEST).write_text(text, encoding="utf-8")

    write_folder(folder, write)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder so that it appears whole or not at all, in the place of an older one of ours.

    Args:
        folder: The folder.
        write: Writes its content into the folder that it is given.
    """
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():  # a save was killed between its two renames
        old.rename(folder)
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, the room is for the record
        raise
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save_attacked(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    source: Path,
    run_id: str,
    strategy: str,
) -> None:
    """Write an attacked model's folder; that of a locked one keeps its manifest, which then names the attack.

    Args:
        model: The attacked model.
        tokenizer: Its tokenizer.
        folder: Where to.
        source: The folder that it was loaded from.
        run_id: The attack's id.
        strategy: The attack's strategy.
    """
    manifest = folders.read_manifest(source)
    if manifest is not None:
        manifest |= {"attacked": {"id": run_id, "strategy": strategy}}
    save_folder(model, tokenizer, folder, {}, manifest)


def transformed_manifest(folder: Path, model: PreTrainedModel, transform: str, knobs: Mapping[str, Any]) -> dict | None:
    """The manifest of a locked model that a transform has made of another one, by its shape.

    Args:
        folder: The folder of the model that was transformed.
        model: What it was transformed into.
        transform: The transform.
        knobs: The strategy's knobs.

    Returns:
        The content of its lock.json; None where the first one has none. `ranks` is by layer where layers differ.
    """
    manifest, shape = folders.read_manifest(folder), shapes.model_shape(model.config.to_dict())
    if manifest is None:
        return None
    ratios = [shapes.param_ratio(shape.form, shape, ranks) for ranks in shape.ranks.values()]
    by_layer = {str(layer): list(ranks) for layer, ranks in shape.ranks.items()}
    first = next(iter(by_layer.values()))
    return manifest | {
        "depth": max(map(len, by_layer.values())),
        "ranks": first if all(ranks == first for ranks in by_layer.values()) else by_layer,
        "param_ratio": sum(ratios) / len(ratios),
        "transformed": {"transform": transform, "knobs": dict(knobs)},
    }


def _drop_absolute_paths(config_file: Path) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def model_card(manifest: dict[str, Any]) -> str:
    """The README.md of a locked folder, from its manifest."""
    losses = manifest["losses"]
    errors = manifest["layer_errors"].values()
    harden = manifest["harden"]
    return f"""---
library_name: transformers
tags: [dlr-lock, dlrscale]
base_model: {manifest["base"]["name"]}
---
# {manifest["base"]["name"]}, locked

The MLPs of this model were replaced by deep low-rank residual networks (DLR-Nets) by module-wise distillation.
It follows our reading of the abstract of DLR-Lock (arXiv 2605.10777); the paper's own recipe is not known to us.

| | |
|---|---|
| form, depth K | {manifest["form"]}, {manifest["depth"]} |
| parameters against the MLPs replaced | {manifest["param_ratio"]:.4f} |
| start, coupling | {manifest["start"]}, {manifest["coupling"]} |
| hardening | {f"weight {harden['weight']}, target {harden['target']}" if harden else "none"} |
| held-out loss, base model | {losses["base"]:.4f} nats per token |
| held-out loss, this model | {losses["locked"]:.4f} |
| held-out loss, flattened without training | {losses["flat"]:.4f} |
| per-layer error, mean and largest | {sum(errors) / len(errors):.5f}, {max(errors):.5f} |
| lock id | `{manifest["lock_id"]}` |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this-folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("this-folder")
```

The lock raises what a fine-tune costs; it does not forbid one. What it costs which attacker is measured with
`dlrscale attack`. The recipe and all figures stand in `lock.json`.
"""


def pretrained_card(config: PretrainConfig, metrics: dict[str, float]) -> str:
    """The README.md of a model that `dlrscale pretrain` made."""
    line = " ".join(
        f"--{key.replace('_', '-')} {getattr(config, key)}"
        for key in ("data", "heldout", "seq_len", "micro_batch", "accumulation", "num_ranks", "steps", "lr",
                    "warmup_steps", "seed", "zero", "dtype", "width", "inner", "num_layers", "heads", "kv_heads",
                    "vocabulary")
    )  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in record.versions().items())
    return f"""---
library_name: transformers
---
# A small Llama for trials

{metrics["params/total"]:,} parameters, trained from random numbers on {metrics["tokens/total"]:,} tokens. It knows
the source text of a Python standard library and nothing else; it is here so that a demonstration needs no download.

- made by: `dlrscale pretrain {line}`
- with: {versions}
- held-out loss: {metrics["loss/heldout_task"]:.4f} nats per token on `{config.heldout or "the last 5 % of the data"}`
  ({metrics["data/heldout_label_tokens"]:,} label tokens)
- data: {metrics["data/train_documents"]:,} documents, {metrics["data/train_tokens"]:,} tokens
"""


def export_locked(
    base_folder: str | Path,
    folder: Path,
    dtype: str,
    form: str,
    nets: dict[int, dict[str, torch.Tensor]],
    manifest: dict[str, Any],
) -> None:
    """Write a locked model's folder: weights, config, modelling files, tokenizer, manifest and model card."""
    model = locked_model(base_folder, dtype, form, nets)
    tokenizer = models.load_tokenizer(base_folder)
    save_folder(model, tokenizer, folder, {"README.md": model_card(manifest)}, manifest)
