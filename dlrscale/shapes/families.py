"""The table of model families: where the MLPs of a family are, what they are made of, and how its config says so.

It follows the source of transformers 5; tests/unit/test_families.py holds every row against a live model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dlrscale.errors import SurgeryError


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table.

    `mlp` is the swap point: the module whose place a DLR-Net takes. `up`, `gate` and `down` name the matrices of
    an MLP; `gate` is None where it has two, and is `up` where both lie in one fused matrix, gate rows first.
    `inline`: there is no MLP module; `up`, activation and `down` lie in the decoder layer itself, the DLR-Net takes
    the place of `up` and the other two become identities.
    `inner_default` says that a config without inner width means 4 D. `activation_renames` holds pairs of a name
    in a config and the activation that it means there. `bias` is the config's key for biases in the MLPs, or whether
    there are any. `dropout` is the key of a dropout inside the MLP module; one outside stays the decoder layer's own.
    `transposed` says that weights are stored as (in, out), as GPT-2's Conv1D does.
    """

    model_type: str
    mlp: str
    attention: tuple[str, ...]
    gate: str | None
    up: str
    down: str
    activation_module: str
    class_prefix: str
    layers: str = "num_hidden_layers"
    width: str = "hidden_size"
    inner: str = "intermediate_size"
    inner_default: bool = False
    positions: str = "max_position_embeddings"
    activation: str = "hidden_act"
    default_activation: str
    activation_renames: tuple[tuple[str, str], ...] = ()
    bias: str | bool = False
    default_bias: bool = False
    dropout: str | None = None
    tied: bool = False
    transposed: bool = False
    inline: bool = False

    @property
    def gated(self) -> bool:
        """Whether the base MLP is SwiGLU-like: down(s(gate(x)) * up(x))."""
        return self.gate is not None

    @property
    def fused(self) -> bool:
        """Whether gate and up are one matrix."""
        return self.gate == self.up

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of the MLP's linear maps, each once."""
        return tuple(dict.fromkeys(name for name in (self.gate, self.up, self.down) if name))

    @property
    def own_maps(self) -> bool:
        """Whether the base model's maps are no linear maps of torch's: GPT-2's Conv1D, Falcon's product."""
        return self.model_type in ("gpt2", "falcon")

    @property
    def locked_model_type(self) -> str:
        """The `model_type` of a locked model of this family."""
        return f"dlr_{self.model_type}"

    def home(self, layer: int) -> str:
        """Path of the module that holds the MLP's matrices: the MLP itself, or the decoder layer."""
        path = self.mlp.format(layer)
        return path.rpartition(".")[0] if self.inline else path

    def state_prefixes(self, layer: int) -> tuple[str, ...]:
        """What the names of all weights of a layer's MLP or DLR-Net begin with."""
        names = self.matrices if self.inline else ("",)
        return tuple(f"{self.home(layer)}.{name}".rstrip(".") + "." for name in names)


_LLAMA = Family(
    model_type="llama",
    mlp="model.layers.{}.mlp",
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    activation_module="act_fn",
    class_prefix="DLRLlama",
    default_activation="silu",
    bias="mlp_bias",
)
_ROWS = (
    _LLAMA,
    replace(_LLAMA, model_type="mistral", class_prefix="DLRMistral", bias=False),
    replace(_LLAMA, model_type="qwen2", class_prefix="DLRQwen2", bias=False),
    replace(_LLAMA, model_type="qwen3", class_prefix="DLRQwen3", bias=False),
    replace(
        _LLAMA,
        model_type="gemma",
        class_prefix="DLRGemma",
        bias=False,
        default_activation="gelu_pytorch_tanh",
        activation_renames=(("gelu", "gelu_pytorch_tanh"),),  # what its first release wrote
        tied=True,
    ),
    replace(
        _LLAMA,
        model_type="phi3",
        class_prefix="DLRPhi3",
        attention=("qkv_proj", "o_proj"),
        gate="gate_up_proj",
        up="gate_up_proj",
        activation_module="activation_fn",
        bias=False,
    ),
    Family(
        model_type="phi",
        mlp="model.layers.{}.mlp",
        attention=("q_proj", "k_proj", "v_proj", "dense"),
        gate=None,
        up="fc1",
        down="fc2",
        activation_module="activation_fn",
        class_prefix="DLRPhi",
        default_activation="gelu_new",
        bias=True,
    ),
    Family(
        model_type="gpt_neox",
        mlp="gpt_neox.layers.{}.mlp",
        attention=("attention.query_key_value", "attention.dense"),
        gate=None,
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation_module="act",
        class_prefix="DLRGPTNeoX",
        default_activation="gelu",
        bias=True,
    ),
    Family(
        model_type="opt",
        mlp="model.decoder.layers.{}.fc1",
        inline=True,
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
        gate=None,
        up="fc1",
        down="fc2",
        activation_module="activation_fn",
        class_prefix="DLROPT",
        inner="ffn_dim",
        activation="activation_function",
        default_activation="relu",
        bias="enable_bias",
        default_bias=True,
        tied=True,
    ),
    Family(
        model_type="falcon",
        mlp="transformer.h.{}.mlp",
        attention=("self_attention.query_key_value", "self_attention.dense"),
        gate=None,
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation_module="act",
        class_prefix="DLRFalcon",
        inner="ffn_hidden_size",
        inner_default=True,
        activation="activation",
        default_activation="gelu",
        bias="bias",
        tied=True,
    ),
    Family(
        model_type="gpt2",
        mlp="transformer.h.{}.mlp",
        attention=("attn.c_attn", "attn.c_proj"),
        gate=None,
        up="c_fc",
        down="c_proj",
        activation_module="act",
        class_prefix="DLRGPT2",
        layers="n_layer",
        width="n_embd",
        inner="n_inner",
        inner_default=True,
        positions="n_positions",
        activation="activation_function",
        default_activation="gelu_new",
        bias=True,
        dropout="resid_pdrop",
        tied=True,
        transposed=True,
    ),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ROWS}


def find_family(config: Mapping[str, Any]) -> Family:
    """The row of a configuration's `model_type`, locked or not.

    Args:
        config: The content of a config.json.

    Returns:
        The family.

    Raises:
        SurgeryError: If the family is not in the table.
    """
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type.removeprefix("dlr_"))
    if family is None:
        raise SurgeryError(
            f"model_type {model_type!r} (config.json) is not a family that dlrscale can lock: its MLPs are not in "
            f"the table of families. Known: {', '.join(FAMILIES)}."
        )
    return family


def mlp_bias(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether the MLPs of a configuration have biases."""
    return family.bias if isinstance(family.bias, bool) else bool(config.get(family.bias, family.default_bias))


def wiring(config: Mapping[str, Any]) -> tuple[bool, bool]:
    """How the MLP of a layer stands to its attention.

    Args:
        config: The content of a config.json of a family in the table.

    Returns:
        Whether it runs beside the attention and reads nothing that this wrote; and whether both read the very same
        tensor (Phi and most Falcons have one norm before both), which is kept for backward once.
    """
    model_type = str(config["model_type"]).removeprefix("dlr_")
    if model_type == "phi":
        return True, True
    if model_type == "gpt_neox":
        return bool(config.get("use_parallel_residual", True)), False
    if model_type == "falcon" and config.get("new_decoder_architecture"):
        return True, config.get("num_ln_in_parallel_attn") == 1
    parallel = model_type == "falcon" and bool(config.get("parallel_attn", True))
    return parallel, parallel
