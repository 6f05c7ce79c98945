"""Shapes without tensors: the tables of model families (families.py) and of DLR-Net forms, and what follows.

Legend: D model width, F inner width of an MLP, R rank of one block, K blocks of one DLR-Net, N layers.
Everything here is exact integer arithmetic on a Hugging Face `config.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlrscale.errors import ConfigError, SurgeryError
from dlrscale.shapes.families import FAMILIES, Family, find_family, mlp_bias, wiring

__all__ = ["FAMILIES", "Family", "find_family"]


@dataclass(frozen=True, kw_only=True)
class Form:
    """One row of the table of DLR-Net forms.

    With inner width R, a block computes B s(A1 u) * (A2 u) when `gated` and B s(A u) otherwise; `norm` puts
    n(u) = u / rms(u) in front. `start_on` is the kind of MLP whose neurons can start it warm.
    """

    name: str
    gated: bool
    norm: bool
    start_on: str | None
    formula: str

    @property
    def matrices(self) -> int:
        """Matrices of shape (R, D) or (D, R) in one block."""
        return 3 if self.gated else 2


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form(name="gated", gated=True, norm=False, start_on="gated", formula="B (s(A1 u) * (A2 u))"),
        Form(name="plain", gated=False, norm=False, start_on="two-matrix", formula="B s(A u)"),
        Form(name="prenorm", gated=False, norm=True, start_on=None, formula="B s(A u / rms(u))"),
    )
}

# Elements per inner unit that an activation saves for backward beyond what its neighbours save already:
# (its own saved tensors when everything is trainable, the same when the factors are frozen). SiLU and GELU
# save their input. ReLU saves its output, which the next linear saves too. GPT-2's gelu_new is written in
# five operations: x, x/2, tanh and 1 + tanh are saved; GPT-NeoX's gelu_fast in more.
ACTIVATION_SAVES: dict[str, tuple[int, int]] = {
    "silu": (1, 1),
    "gelu": (1, 1),
    "gelu_pytorch_tanh": (1, 1),
    "relu": (0, 1),
    "gelu_new": (4, 4),
    "gelu_fast": (7, 7),
}
ACTIVATION_ALIASES = {"swish": "silu"}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What of a causal language model's configuration matters here."""

    family: Family
    locked: bool
    layers: int
    width: int
    inner: int
    vocabulary: int
    tied: bool
    activation: str
    mlp_bias: bool
    dropout: float
    max_length: int | None
    parallel: bool = False  # the MLP runs beside its layer's attention
    shared_input: bool = False  # both read one tensor
    form: str | None = None
    ranks: dict[int, tuple[int, ...]] | None = None

    @property
    def kind(self) -> str:
        """`gated` (three matrices) or `two-matrix`."""
        return "gated" if self.family.gated else "two-matrix"

    @property
    def mlp_params(self) -> int:
        """Parameters of one base MLP, biases included."""
        matrices = 3 if self.family.gated else 2
        biases = (matrices - 1) * self.inner + self.width if self.mlp_bias else 0
        return matrices * self.width * self.inner + biases


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the config.json of a model folder.

    Args:
        folder: A Hugging Face folder, locked or not.

    Returns:
        Its content.

    Raises:
        ConfigError: If there is no such folder or file, or it is no JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        near = near_names(folder)
        raise ConfigError(
            f"No such model folder: {folder.absolute()}{near}. Name a local folder with config.json and weights."
        )
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"{file.absolute()} is missing: the folder holds no Hugging Face model.") from None
    except ValueError as error:
        raise ConfigError(f"{file.absolute()} is no JSON: {error}. Fetch the model again.") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file.absolute()} holds no JSON object. Fetch the model again.")
    return config


def near_names(path: Path) -> str:
    """` (near: NAME)` where something of a similar name lies beside a path that does not exist, else nothing."""
    import difflib

    try:
        names = [p.name for p in path.absolute().parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f" (near: {near[0]})" if near else ""


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Read the shape of a model from its Hugging Face configuration.

    Args:
        config: The content of a config.json.

    Returns:
        The shape; `form` and `ranks` are None for a base model.

    Raises:
        SurgeryError: If the family or the activation is unknown, a size is missing, or layers are left out by chance.
    """
    family = find_family(config)
    sizes = [family.layers, family.width] + ([] if family.inner_default else [family.inner])
    missing = [key for key in sizes if not isinstance(config.get(key), int) or config[key] < 1]
    if missing:
        raise SurgeryError(f"config.json of a {family.model_type} model lacks {', '.join(missing)}. Copy it again.")
    width = config[family.width]
    if config.get("layerdrop"):
        raise SurgeryError(
            f"config.json: layerdrop {config['layerdrop']} leaves out layers by chance while training, other ones on "
            "each rank. Set it to 0."
        )
    activation = str(config.get(family.activation) or family.default_activation)
    activation = (ACTIVATION_ALIASES | dict(family.activation_renames)).get(activation, activation)
    if activation not in ACTIVATION_SAVES:
        raise SurgeryError(
            f"config.json: {family.activation} {activation!r} is not in the table of activations "
            f"({', '.join(ACTIVATION_SAVES)})."
        )
    form, ranks = _read_dlr(config.get("dlr"))
    parallel, shared_input = wiring(config)
    return ModelShape(
        family=family,
        locked=str(config["model_type"]).startswith("dlr_"),
        layers=config[family.layers],
        width=width,
        inner=config.get(family.inner) or 4 * width,
        vocabulary=int(config.get("vocab_size", 0)),
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        activation=activation,
        mlp_bias=mlp_bias(family, config),
        dropout=float(config.get(family.dropout, 0.1)) if family.dropout else 0.0,
        max_length=None if config.get("alibi") else config.get(family.positions),  # Falcon's ALiBi has no limit
        parallel=parallel,
        shared_input=shared_input,
        form=form,
        ranks=ranks,
    )


def _read_dlr(dlr: Any) -> tuple[str | None, dict[int, tuple[int, ...]] | None]:
    """Form, and ranks by layer, from `dlr` of a locked model's config.json; None and None where there is none."""
    if not dlr:
        return None, None
    try:
        form, ranks = dlr["form"], {int(i): tuple(map(int, r)) for i, r in dlr["ranks"].items()}
    except (TypeError, KeyError, ValueError, AttributeError):
        form, ranks = None, None
    if form not in FORMS or not ranks:
        raise SurgeryError(f"config.json: dlr holds no form ({', '.join(FORMS)}) and ranks by layer. Copy it again.")
    return form, ranks


def parity_width(form: str, gated_mlp: bool, inner: int) -> int:
    """The sum of a DLR-Net's ranks at which it has as many matrix parameters as the MLP it replaces.

    A form with m matrices has m D sum(R) of them, an MLP with M matrices M D F; so sum(R) = M F / m, rounded
    down: gated F, plain and prenorm 3F/2 on a gated MLP; plain and prenorm F, gated 2F/3 on a two-matrix MLP.
    """
    return (3 if gated_mlp else 2) * inner // FORMS[form].matrices


def split_ranks(total: int, depth: int) -> tuple[int, ...]:
    """K ranks that differ by at most one and sum to `total`.

    Args:
        total: The sum of the ranks.
        depth: K, the number of blocks.

    Returns:
        The rank of each block, the larger ones first.

    Raises:
        SurgeryError: If there are more blocks than ranks.
    """
    if not 1 <= depth <= total:
        raise SurgeryError(
            f"--depth {depth}: a DLR-Net with {total} inner units holds 1 to {total} blocks. Take a smaller depth."
        )
    low, more = divmod(total, depth)
    return (low + 1,) * more + (low,) * (depth - more)


def resolve_ranks(form: str, shape: ModelShape, depth: int, rank: int | None) -> tuple[int, ...]:
    """The ranks of one DLR-Net: by parity, or `rank` for every block."""
    if rank is not None:
        return (rank,) * depth
    return split_ranks(parity_width(form, shape.family.gated, shape.inner), depth)


def dlr_params(form: str, width: int, ranks: Sequence[int], bias: bool) -> int:
    """Parameters of one DLR-Net, biases included (its coupling buffer is none)."""
    entry, total = FORMS[form], sum(ranks)
    inputs = entry.matrices - 1
    return entry.matrices * width * total + ((inputs * total + width) if bias else 0)


def param_ratio(form: str, shape: ModelShape, ranks: Sequence[int]) -> float:
    """Parameters of a DLR-Net over those of the MLP it replaces."""
    return dlr_params(form, shape.width, ranks, shape.mlp_bias) / shape.mlp_params


def flattens_whole(shape: ModelShape, group: int) -> bool:
    """Whether flattening in groups of so many blocks (0: all) makes one of each DLR-Net of a locked model."""
    return not group or group >= max(map(len, shape.ranks.values()))


def grouped_ranks(ranks: Sequence[int], group: int) -> tuple[int, ...]:
    """The ranks of a DLR-Net of which each `group` consecutive blocks became one."""
    return tuple(sum(ranks[start : start + group]) for start in range(0, len(ranks), group))


def blocks_left(depth: int, drop: float) -> int:
    """How many of K blocks stay when the fraction `drop` of them, rounded down, goes: at least one."""
    return max(1, depth - int(drop * depth + 1e-9))


def check_flattens(
    shape: ModelShape,
    option: str = "--strategy flatten",
    mend: str = "Regress one on it instead (undistil), or choose another --strategy.",
) -> None:
    """Refuse, from the shape alone, a model whose DLR-Nets are no ordinary MLPs of its family.

    Args:
        shape: The shape of a locked model.
        option: What asked for it, for the message.
        mend: What to do instead, for the message.

    Raises:
        SurgeryError: If the form divides per token (prenorm), is gated where MLPs have two matrices, or is plain
            where they are gated and the family's configuration knows no biases in them.
    """
    form, family, why = FORMS[shape.form], shape.family, None
    if form.norm:
        why = "divides each token by its own norm"
    elif form.gated and not family.gated:
        why = "has a third matrix"
    elif family.gated and not form.gated and not isinstance(family.bias, str):
        why = "needs biases, which its config.json cannot give to an MLP,"
    if why:
        raise SurgeryError(
            f"{option}: the form {form.name} {why} and is no ordinary MLP of {family.model_type}. {mend}"
        )


def mlp_saved_elements(
    gated: bool, width: int, inner: int, activation: str, trainable: bool = True, fused: bool = False
) -> int:
    """Elements per token that eager autograd saves for a base MLP.

    Two-matrix MLP, trainable: the input of both linears (D + F) and what the activation saves, D + 2F for
    SiLU or GELU; frozen: the activation's own, F. Gated: besides, s(gate) and up for the product; D + 4F
    and 3F. The input x counts, as if nobody else saved it. With gate and up in one fused matrix their output is
    one storage of 2F, which is kept whole even where the activation does not need its half (ReLU).
    """
    own = ACTIVATION_SAVES[activation][0 if trainable else 1]
    if not gated:
        return width + (1 + own) * inner if trainable else own * inner
    product = 3 + own - 1 if activation != "relu" else (3 if fused else 2)
    return width + (1 + product) * inner if trainable else product * inner


def dlr_saved_elements(form: str, width: int, ranks: Sequence[int], activation: str, trainable: bool = True) -> int:
    """Elements per token that eager autograd saves for one DLR-Net.

    Each block's input u_k = x + b d_k is a tensor of its own (D each; the first is x). With all trainable,
    block k saves u_k and the input of B_k (R_k), and what lies between:
    `plain` the activation's own; `gated` the fused (2R) output of A, s(A1 u) and nothing twice;
    `prenorm` as plain, and its norm keeps u_k, the token's norm and the divisor (D + 2), beside n(u_k) (D).
    Frozen factors save no linear inputs; the norm still needs D + 2 to carry gradients through.

    Sums: plain K D + 2 S, frozen S; gated K D + 4 S, frozen 3 S; prenorm K (2D + 2) + 2 S, frozen
    K (D + 2) + S, with S = sum(R) and SiLU or GELU.
    """
    entry, total, depth = FORMS[form], sum(ranks), len(ranks)
    own = ACTIVATION_SAVES[activation][0 if trainable else 1]
    # Gated: the fused output of A is one storage of 2R, whichever half is kept (gelu_new keeps x itself there),
    # and s(A1 u) is one more.
    between = 3 + (own - 1 if activation != "relu" else 0) if entry.gated else own
    elements = between * total + (total + depth * width if trainable else 0)
    if entry.norm:
        elements += depth * (width + 2)
    return elements


def segment_peak(form: str, width: int, ranks: Sequence[int], activation: str, length: int) -> int:
    """The most elements per token that a trained DLR-Net keeps whose blocks are checkpointed in segments.

    While segment j is there again, x, the d at its border and at those before it, and all that its blocks save are
    kept: D + max over j of (j D + what segment j saves without x and its first d).

    Args:
        form: The form.
        width: D.
        ranks: R_k of each block.
        activation: s.
        length: m, the blocks of a segment; the last one may be shorter.

    Returns:
        Elements per token, x among them.
    """
    segments = [ranks[start : start + length] for start in range(0, len(ranks), length)]
    inside = [dlr_saved_elements(form, width, part, activation) - width * (not j) for j, part in enumerate(segments)]
    return width + max(j * width + size for j, size in enumerate(inside))


def segment_length(form: str, width: int, ranks: Sequence[int], activation: str) -> int:
    """The length of segments at which `segment_peak` is smallest; of several, the longest: fewest are cut."""
    return min(range(len(ranks), 0, -1), key=lambda length: segment_peak(form, width, ranks, activation, length))


def reversed_bytes(shape: ModelShape, layer: int, dtype_bytes: int, anchor: int) -> int:
    """Bytes per token that a layer's DLR-Net keeps under `reverse`: x and the codes, and in fp32 or wider d_K, anchors.

    In elements 2 D + sum(R), and D more for every anchor: d before each m-th block but the first. Whether factors are
    trained does not matter. Where the attention reads the same x, x is the attention's.

    Args:
        shape: The shape of a locked model.
        layer: The layer.
        dtype_bytes: Bytes of an element of the model's precision.
        anchor: m; 0: no anchors.

    Returns:
        Bytes.
    """
    ranks = shape.ranks[layer]
    streams = 1 + (len(range(anchor, len(ranks), anchor)) if anchor else 0)
    inputs = 0 if shape.shared_input else shape.width
    return (inputs + sum(ranks)) * dtype_bytes + streams * shape.width * max(dtype_bytes, 4)


def saved_bytes(shape: ModelShape, layer: int, dtype_bytes: int, trainable: bool = True) -> int:
    """Bytes per token saved for the MLP part of one layer, base MLP or DLR-Net, without a dropout's mask.

    All elements are of the model's dtype, but for the norm of a token in each prenorm block, which is fp32.
    Where the attention reads the same x as the MLP, x is the attention's, which is trained too and runs first.
    Frozen, with adapters on the attention: where the MLP runs beside it, no gradient passes through the first one.
    """
    if shape.parallel and layer == 0 and not trainable:
        return 0
    if not shape.ranks or layer not in shape.ranks:
        family = shape.family
        elements = mlp_saved_elements(
            family.gated, shape.width, shape.inner, shape.activation, trainable, fused=family.fused
        )
        keeps_input, wide = trainable, 0
    else:
        ranks = shape.ranks[layer]
        elements = dlr_saved_elements(shape.form, shape.width, ranks, shape.activation, trainable)
        norm = FORMS[shape.form].norm
        keeps_input, wide = trainable or norm, len(ranks) if norm else 0
    if shape.shared_input and keeps_input:
        elements -= shape.width
    return elements * dtype_bytes + wide * (4 - dtype_bytes)


def side_width(width: int, reduction: int) -> int:
    """The width of a side network beside a model of `width` D: D / reduction in whole eights, at least 8."""
    return max(8, width // reduction // 8 * 8)


def side_heads(side: int) -> int:
    """The attention heads of a side network: of the largest power of two, at most 64, that divides its width."""
    return side // min(64, side & -side)


def parse_layers(text: str | None, layers: int) -> tuple[int, ...]:
    """Layer indices from text such as `2-10,15`; all layers where the text is None.

    Args:
        text: Layers and ranges, split by commas; a range includes both ends.
        layers: The number of layers of the model.

    Returns:
        Indices from 0, in rising order, each once.

    Raises:
        ConfigError: If the text is no such list or a layer does not exist.
    """
    if text is None:
        return tuple(range(layers))
    chosen: set[int] = set()
    for part in str(text).split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isascii() and first.isdigit()) or (dash and not (last.isascii() and last.isdigit())):
            raise ConfigError(f"--layers {text!r}: {part!r} is neither a layer nor a range. Write it as 2-10,15.")
        if dash and int(last) < int(first):
            raise ConfigError(f"--layers {text!r}: the range {part!r} runs backwards. Write it as 2-10,15.")
        chosen.update(range(int(first), int(last or first) + 1))
    outside = sorted(i for i in chosen if i >= layers)
    if outside or not chosen:
        raise ConfigError(f"--layers {text!r}: the model has layers 0 to {layers - 1}; not there: {outside}.")
    return tuple(sorted(chosen))
