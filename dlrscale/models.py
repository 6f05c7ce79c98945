"""Load causal language models and tokenizers, find their MLPs, and register the locked classes.

Importing this module registers the classes of `modeling/` with transformers, so that a locked folder loads
here without remote code.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from dlrscale import folders, shapes
from dlrscale.config import PretrainConfig
from dlrscale.dlr import MLPWeights
from dlrscale.errors import ConfigError, SurgeryError
from dlrscale.folders import Stored
from dlrscale.shapes import Family, ModelShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def locked_classes(family: Family) -> tuple[type, type[PreTrainedModel]]:
    """The configuration and model classes of a locked model of this family."""
    module = importlib.import_module(f"dlrscale.modeling.{family.locked_model_type}")
    return getattr(module, f"{family.class_prefix}Config"), getattr(module, f"{family.class_prefix}ForCausalLM")


def _register() -> None:
    for family in shapes.FAMILIES.values():
        config_class, model_class = locked_classes(family)
        AutoConfig.register(family.locked_model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        # So that save_pretrained copies the modelling files, wherever the model was loaded.
        config_class.register_for_auto_class()
        model_class.register_for_auto_class("AutoModelForCausalLM")


_register()


def load_model(folder: str | Path, dtype: str = "fp32") -> PreTrainedModel:
    """Load a causal language model on the CPU, in eval mode, with nothing missing.

    Args:
        folder: A Hugging Face folder, locked or not.
        dtype: `fp32`, `bf16` or `fp16`.

    Returns:
        The model.

    Raises:
        ConfigError: If the folder holds no loadable model, or its weights do not match its config.
    """
    shapes.read_config(folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=DTYPES[dtype], output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder} does not load as a causal language model: {error}") from error
    wrong = {key: sorted(map(str, info[key])) for key in ("missing_keys", "mismatched_keys") if info.get(key)}
    if wrong:
        raise ConfigError(f"{folder}: config.json and weights contradict each other: {wrong}. Fetch the model again.")
    return model.eval()


def stored_dtype(folder: str | Path) -> str:
    """The precision that a folder's config names, `fp32` where it names none."""
    config = shapes.read_config(folder)
    return {"bfloat16": "bf16", "float16": "fp16"}.get(str(config.get("dtype") or config.get("torch_dtype")), "fp32")


def check_folder(folder: str | Path) -> None:
    """Refuse a model folder whose files are not whole (`folders.check_weights`) or contradict its config.json.

    No weight is read: transformers loads empty tensors of the stored names and shapes into a model without
    memory, so that what it allows (ties, prefixes, renamed tensors) is allowed here.

    Args:
        folder: A Hugging Face folder, locked or not.

    Raises:
        ConfigError: With what is wrong.
    """
    stored = folders.check_weights(folder)
    file = Path(folder) / "config.json"
    bars = logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        state = {name: torch.empty(entry.shape, device="meta") for name, entry in stored.items()}
        _, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=state,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # a config can be wrong in any way, and each class says so in its own
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{file} describes no model that transformers can build: {reason}. Mend it.") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    faults = [
        f"{_place(stored, name)} has shape {tuple(own)}, and config.json asks for {tuple(asked)}"
        for name, own, asked in sorted(info["mismatched_keys"])
    ]
    faults += [f"config.json asks for {name}, which no weight file holds" for name in sorted(info["missing_keys"])]
    # Old folders store masks and rotary tables, which are no parameters.
    faults += [
        f"{_place(stored, name)} is no part of the model that config.json describes"
        for name in sorted(info["unexpected_keys"])
        if name.endswith((".weight", ".bias")) and name in stored and len(stored[name].shape) <= 2
    ]
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ConfigError(
            f"{file} and the weights contradict each other: {'; '.join(faults[:3])}{more}. Fetch the model again."
        )


def _place(stored: Mapping[str, Stored], name: str) -> str:
    """A stored tensor with its file, in words; of a renamed tensor only the model's own name is known."""
    return f"{name} in {stored[name].file}" if name in stored else name


def check_generation(folder: str | Path) -> None:
    """Refuse generation settings that transformers cannot read or would not save again at the end of a lock.

    Args:
        folder: A Hugging Face folder.

    Raises:
        ConfigError: If there are such.
    """
    file = Path(folder) / "generation_config.json"
    if not file.is_file():
        return
    try:
        with tempfile.TemporaryDirectory() as place:
            GenerationConfig.from_pretrained(str(folder), local_files_only=True).save_pretrained(place)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file}: transformers refuses these generation settings: {' '.join(str(error).split())} "
            "Mend the file, or remove it for the model's own defaults."
        ) from error


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies in a model folder.

    Args:
        folder: A Hugging Face folder, locked or not.

    Returns:
        The tokenizer.

    Raises:
        ConfigError: If there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no tokenizer that loads: {error}") from error


def refuse_family(config: Mapping[str, Any]) -> NoReturn:
    """Say why a model whose `model_type` is not in the table of families cannot be locked.

    The model is built without memory, so that the message can name the module that was looked at.

    Args:
        config: The content of its config.json.

    Raises:
        SurgeryError: Always.
    """
    try:
        found = AutoConfig.for_model(**{**config, "model_type": str(config.get("model_type"))})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(found)
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
        stack, modules = max(layers, key=_size)
        parts = [(f"{stack}.{i}.{n}", m) for i, layer in enumerate(modules) for n, m in layer.named_children()]
        path, part = max(parts, key=_size)
    except Exception as error:  # whatever transformers makes of a configuration that nobody here knows
        why = " ".join(str(error).split()).partition(". ")[0]
        looked = f"transformers builds no causal language model of it whose layers one could look at ({why})."
    else:
        names = ", ".join(name for name, _ in part.named_children())
        looked = (
            f"looked at {path} ({type(part).__name__}: {names or 'no modules'}), the largest part of a layer; looked "
            "for an MLP of two or three linear maps where one of the families in docs/lock.md has it."
        ) + (" A mixture of experts is no such MLP." if "expert" in names else "")
    raise SurgeryError(
        f"config.json: model_type {config.get('model_type')!r} is not a family that dlrscale can lock: {looked} "
        f"Name a model of one of these: {', '.join(shapes.FAMILIES)}."
    )


def _size(named: tuple[str, nn.Module]) -> int:
    return sum(p.numel() for p in named[1].parameters())


class InlineMLP(nn.Module):
    """The parts of an MLP that lie in a decoder layer itself, as the one module that they are elsewhere.

    Args:
        layer: The decoder layer.
        family: Its family's row in the table.
    """

    def __init__(self, layer: nn.Module, family: Family):
        super().__init__()
        for name in (family.up, family.activation_module, family.down):
            self.add_module(name, getattr(layer, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The parts one after the other; x and the answer are (..., D)."""
        for part in self.children():
            x = part(x)
        return x


def find_mlps(model: PreTrainedModel, shape: ModelShape, layers: Iterable[int]) -> dict[int, nn.Module]:
    """The MLP modules of some layers.

    Args:
        model: A model of the family, not locked in these layers.
        shape: Its shape.
        layers: Indices of the layers, from 0.

    Returns:
        The MLP by layer.

    Raises:
        SurgeryError: If a module is not where the table says, lacks a part, or has one of another size.
    """
    family = shape.family
    found = {}
    for layer in layers:
        path = family.home(layer)
        try:
            mlp = model.get_submodule(path)
        except AttributeError:
            raise SurgeryError(f"{type(model).__name__} has no module {path}, where its MLP should be.") from None
        lacking = [name for name in (*family.matrices, family.activation_module) if not hasattr(mlp, name)]
        if lacking:
            raise SurgeryError(
                f"{path} ({type(mlp).__name__}) has no {', '.join(lacking)}: not an MLP of the kind that the table "
                f"gives for {family.model_type}. Mixture-of-experts layers are not supported."
            )
        for name in family.matrices:
            rows, columns = (shape.width, shape.inner) if name == family.down else (shape.inner, shape.width)
            rows *= 2 if family.fused and name == family.up else 1
            wanted = (columns, rows) if family.transposed else (rows, columns)
            weight = getattr(getattr(mlp, name), "weight", None)
            if weight is None or tuple(weight.shape) != wanted:
                raise SurgeryError(
                    f"{path}.{name} ({type(getattr(mlp, name)).__name__}) is no linear map with a weight of shape "
                    f"{wanted}, which config.json says. Name the folder of an unchanged {family.model_type} model."
                )
        found[layer] = InlineMLP(mlp, family) if family.inline else mlp
    return found


def put_mlp(model: PreTrainedModel, family: Family, layer: int, module: nn.Module) -> None:
    """Put a module in the place of a layer's MLP, wherever the family has it."""
    parent, _, name = family.mlp.format(layer).rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    if family.inline:
        for rest in (family.activation_module, family.down):
            setattr(model.get_submodule(parent), rest, nn.Identity())


def mlp_weights(mlp: nn.Module, family: Family) -> MLPWeights:
    """The matrices of a base MLP in one orientation, whatever the family calls and stores them."""

    def halves(tensor: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return tensor.chunk(2) if family.fused and tensor is not None else (tensor, tensor)

    def weight(name: str) -> torch.Tensor:
        matrix = getattr(mlp, name).weight.detach()
        return matrix.t() if family.transposed else matrix

    def bias(name: str) -> torch.Tensor | None:
        value = getattr(mlp, name).bias
        return None if value is None else value.detach()

    return MLPWeights(
        gate=halves(weight(family.gate))[0] if family.gate else None,
        up=halves(weight(family.up))[1],
        down=weight(family.down),
        gate_bias=halves(bias(family.gate))[0] if family.gate else None,
        up_bias=halves(bias(family.up))[1],
        down_bias=bias(family.down),
    )


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with `<s>` put in front, `</s>` for the end and `<pad>`.

    Args:
        texts: The documents to learn from.
        vocabulary: Tokens in all, special ones included.

    Returns:
        The tokenizer; it pads on the right.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )


def build_llama(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A small Llama of random weights, embeddings tied; its seed is torch's global one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=config.inner,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.seq_len,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
