"""Everything of a model beside its MLPs, from its Hugging Face configuration: attention, norms, embeddings, head.

It follows the source of transformers 5; tests/unit/test_layout.py holds every family's parameters against a live model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dlrscale.errors import SurgeryError
from dlrscale.shapes import FORMS, ModelShape

RMS, GEMMA, LAYER = "rms", "gemma", "layer"  # how a family writes its norms


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Attention, norms, embeddings and head of one model.

    `rotary` counts the rotated dimensions of a head. `norms` is how many norms a decoder layer has. `qk_norm` is the
    kind of norm on the heads of queries and keys. `positions` counts the rows of a learned position embedding.
    `embedding_width` differs from the model's width in some OPTs, which project in and out. `dropout` holds the
    probabilities by place: `embedding`, `attention`, `residual` (behind attention and MLP). `joined_rotary`: rotated
    and other dimensions are joined again, which copies. `grouped`: Falcon's new architecture, which repeats keys and
    values itself.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    fused: bool
    qkv_bias: bool
    out_bias: bool
    norm: str
    norm_affine: bool = True
    norms: int = 2
    qk_norm: str | None = None
    positions: int = 0
    embedding_width: int
    final_norm: bool = True
    head_bias: bool = False
    alibi: bool = False
    grouped: bool = False
    joined_rotary: bool = False
    norm_first: bool = True
    dropout: Mapping[str, float]

    @property
    def qkv_width(self) -> int:
        """Outputs of the maps to queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


def layout(config: Mapping[str, Any], shape: ModelShape) -> Layout:
    """Read a model's layout.

    Args:
        config: The content of a config.json.
        shape: The model's shape.

    Returns:
        The layout.

    Raises:
        SurgeryError: If a number is missing, of another kind or out of range, or heads do not divide.
    """
    name = shape.family.model_type
    check(config, shape)
    heads = config["n_head" if name == "gpt2" else "num_attention_heads"]
    head_dim = config.get("head_dim") or {"gemma": 256, "qwen3": 128}.get(name) or shape.width // heads
    usual_kv = {"mistral": 8, "qwen2": 32, "qwen3": 32, "gemma": 16}.get(name, heads)
    values: dict[str, Any] = {
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads", usual_kv) or heads,
        "head_dim": head_dim,
        "rotary": int(head_dim * rotary_fraction(name, config)),
        "joined_rotary": name in ("phi", "phi3", "gpt_neox"),
        "fused": name in ("phi3", "gpt_neox", "falcon", "gpt2"),
        "norm": {"gemma": GEMMA, **dict.fromkeys(("phi", "gpt_neox", "opt", "falcon", "gpt2"), LAYER)}.get(name, RMS),
        "embedding_width": shape.width,
        "dropout": _dropouts(name, config),
    }
    bias = bool(config.get("attention_bias", name == "gpt_neox"))
    values["qkv_bias"], values["out_bias"] = {
        "qwen2": (True, False), "phi": (True, True), "gpt2": (True, True), "mistral": (False, False),
        "phi3": (False, False), "opt": (bool(config.get("enable_bias", True)),) * 2,
        "falcon": (bool(config.get("bias", False)),) * 2,
    }.get(name, (bias, bias))  # fmt: skip
    if name == "qwen3":
        values["qk_norm"] = RMS
    elif name == "phi":
        values |= {"norms": 1, "head_bias": True, "qk_norm": LAYER if config.get("qk_layernorm") else None}
    elif name == "gpt_neox":
        values["kv_heads"] = heads
    elif name == "gpt2":
        values |= {"kv_heads": heads, "rotary": 0, "positions": config.get("n_positions", 1024)}
    elif name == "opt":
        before = config.get("do_layer_norm_before", True)
        values |= {
            "kv_heads": heads,
            "rotary": 0,
            "positions": config.get("max_position_embeddings", 2048) + 2,
            "embedding_width": config.get("word_embed_proj_dim") or shape.width,
            "norm_affine": bool(config.get("layer_norm_elementwise_affine", True)),
            "final_norm": bool(before and not config.get("_remove_final_layer_norm", False)),
            "norm_first": bool(before),
        }
    elif name == "falcon":
        values |= _falcon(config, heads)
    return Layout(**values)


def check(config: Mapping[str, Any], shape: ModelShape) -> None:
    """Refuse numbers of a configuration that no model can have.

    Args:
        config: The content of a config.json.
        shape: The model's shape.

    Raises:
        SurgeryError: With all that is wrong.
    """
    name = shape.family.model_type
    key = "n_head" if name == "gpt2" else "num_attention_heads"
    heads, faults = config.get(key), []
    wanted = {key: heads, "vocab_size": shape.vocabulary, shape.family.layers: shape.layers}
    optional = ("head_dim", "num_key_value_heads", "num_kv_heads", "word_embed_proj_dim")
    wanted |= {k: config[k] for k in optional if config.get(k) is not None}
    for k, value in wanted.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            faults.append(f"config.json: {k} is {value!r}: must be a whole number of at least 1. Copy the file again.")
    for k, value in config.items():
        if k.endswith(("dropout", "pdrop")) and not isinstance(value, (int, float, type(None))):
            faults.append(f"config.json: {k} is {value!r}: must be a number. Copy the file again.")
    if not isinstance(config.get("rope_parameters") or {}, Mapping):
        faults.append("config.json: rope_parameters is no object. Copy the file again.")
    if not faults and not config.get("head_dim") and name not in ("gemma", "qwen3") and shape.width % heads:
        faults.append(f"config.json: {shape.family.width} {shape.width} is no multiple of {key} {heads}.")
    shared = config.get("num_key_value_heads") if name not in ("gpt2", "opt", "falcon", "gpt_neox") else None
    if not faults and shared and heads % shared:
        faults.append(f"config.json: {key} {heads} is no multiple of num_key_value_heads {shared}.")
    if faults:
        raise SurgeryError(faults)


def rotary_fraction(name: str, config: Mapping[str, Any]) -> float:
    """The share of a head's dimensions that are rotated."""
    usual = {"phi": 0.5, "gpt_neox": 0.25}.get(name, 1.0)
    rope = config.get("rope_parameters") or {}
    flat = config.get("partial_rotary_factor") or config.get("rotary_pct") or usual
    return float(rope.get("partial_rotary_factor", flat))


def _falcon(config: Mapping[str, Any], heads: int) -> dict[str, Any]:
    new = bool(config.get("new_decoder_architecture"))
    shared = bool(config.get("multi_query", True)) and not new
    parallel = bool(config.get("parallel_attn", True))
    norms = config.get("num_ln_in_parallel_attn") or (2 if new else 1)
    return {
        "kv_heads": 1 if shared else (config.get("num_kv_heads") or heads) if new else heads,
        "rotary": 0 if config.get("alibi") else int(config["hidden_size"] // heads),
        "alibi": bool(config.get("alibi")),
        "grouped": new,
        "norms": norms if parallel else 2,
    }


def _dropouts(name: str, config: Mapping[str, Any]) -> dict[str, float]:
    keys = {
        "gpt2": ("embd_pdrop", "attn_pdrop", "resid_pdrop", 0.1),
        "phi": ("embd_pdrop", "attention_dropout", "resid_pdrop", 0.0),
        "phi3": (None, "attention_dropout", "resid_pdrop", 0.0),
        "gpt_neox": ("hidden_dropout", "attention_dropout", "hidden_dropout", 0.0),
        "opt": (None, "attention_dropout", "dropout", 0.0),
        "falcon": (None, "attention_dropout", "hidden_dropout", 0.0),
    }.get(name, (None, "attention_dropout", None, 0.0))
    usual = keys[3]
    found = {
        place: float(config.get(key, usual) or 0.0) if key else 0.0
        for place, key in zip(("embedding", "attention", "residual"), keys, strict=False)
    }
    if name == "opt":
        found["residual"] = float(config.get("dropout", 0.1))
    return found


class Tensors(NamedTuple):
    """Equal parameter tensors in a row: the part that they belong to, elements of each, and how many there are.

    `bias`: biases of linear maps, or a DLR-Net's own; those of norms count as the norm. `layer` is the decoder layer
    that they lie in, if they do.
    """

    part: str
    numel: int
    count: int = 1
    bias: bool = False
    layer: int | None = None


def parameters(shape: ModelShape, parts: Layout) -> Iterator[Tensors]:
    """The parameter tensors of a model in the order of its `parameters()`.

    Args:
        shape: The model's shape, locked or not.
        parts: Its layout.

    Yields:
        The tensors; parts are `embedding`, `projection`, `attention`, `norm`, `mlp` and `head`. A tied head has none.
    """
    before, after = outer_tensors(shape, parts)
    yield from before
    for layer in range(shape.layers):
        yield from layer_tensors(shape, parts, layer)
    yield from after


def outer_tensors(shape: ModelShape, parts: Layout) -> tuple[list[Tensors], list[Tensors]]:
    """The parameter tensors before the decoder layers, and those behind them."""
    width = shape.width
    before, after = [Tensors("embedding", shape.vocabulary * parts.embedding_width)], []
    if parts.positions:
        before.append(Tensors("embedding", parts.positions * width))
    if parts.embedding_width != width:
        before.append(Tensors("projection", parts.embedding_width * width, 2))
    if parts.final_norm:
        (before if shape.family.model_type == "opt" else after).extend(_norm(parts, width))
    if not shape.tied:
        after.append(Tensors("head", shape.vocabulary * parts.embedding_width))
    if parts.head_bias:
        after.append(Tensors("head", shape.vocabulary, bias=True))
    return before, after


def _norm(parts: Layout, width: int, layer: int | None = None) -> list[Tensors]:
    count = {RMS: 1, GEMMA: 1, LAYER: 2}[parts.norm] if parts.norm_affine else 0
    return [Tensors("norm", width, 1, False, layer)] * count


def maps(shape: ModelShape, parts: Layout, layer: int) -> Iterator[tuple[str, int, int, bool]]:
    """The linear maps of a decoder layer in order: part, inputs, outputs, and whether there is a bias."""
    width, inner = shape.width, parts.heads * parts.head_dim
    into = (parts.qkv_width,) if parts.fused else (inner, *(parts.kv_heads * parts.head_dim,) * 2)
    attention = [("attention", width, outputs, parts.qkv_bias) for outputs in into]
    out = ("attention", inner, width, parts.out_bias)
    yield from (out, *attention) if shape.family.model_type == "phi3" else (*attention, out)
    if shape.ranks and layer in shape.ranks:
        gated = FORMS[shape.form].gated
        for rank in shape.ranks[layer]:
            yield "mlp", width, rank * (2 if gated else 1), shape.mlp_bias
            yield "mlp", rank, width, False
        return
    for outputs in (2 * shape.inner,) if shape.family.fused else (shape.inner,) * (2 if shape.family.gated else 1):
        yield "mlp", width, outputs, shape.mlp_bias
    yield "mlp", shape.inner, width, shape.mlp_bias


def layer_tensors(shape: ModelShape, parts: Layout, layer: int) -> Iterator[Tensors]:
    """The parameter tensors of a decoder layer in the order of its `parameters()`."""
    attention, mlp = [], []
    if shape.mlp_bias and shape.ranks and layer in shape.ranks:
        mlp.append(Tensors("mlp", shape.width, 1, True, layer))  # the DLR-Net's own
    for part, inputs, outputs, bias in maps(shape, parts, layer):
        own = attention if part == "attention" else mlp
        own.append(Tensors(part, inputs * outputs, 1, False, layer))
        if bias:
            own.append(Tensors(part, outputs, 1, True, layer))
    if parts.qk_norm:
        count = 2 * (2 if parts.qk_norm == LAYER else 1)
        attention += [Tensors("norm", parts.head_dim, 1, False, layer)] * count
    norm = _norm(parts, shape.width, layer)
    ordered = {
        "gpt2": (norm, attention, norm, mlp),
        "gpt_neox": (norm, norm, attention, mlp),
        "opt": (attention, norm, mlp, norm),
    }.get(shape.family.model_type, (attention, mlp, *[norm] * parts.norms))
    for group in ordered:
        yield from group
