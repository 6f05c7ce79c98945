"""What the parts of the benchmark share: sizes, the model, the data, blocks of steps in turns, live bytes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from dlrscale import data

WIDTH, INNER, LAYERS, VOCABULARY, LENGTH = 256, 688, 6, 2048, 256
QUICK_SIZES = {"width": 64, "inner": 96, "layers": 2, "vocabulary": 256, "length": 32}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model and its batches: D, F, layers, vocabulary, T and sequences per rank."""

    width: int = WIDTH
    inner: int = INNER
    layers: int = LAYERS
    vocabulary: int = VOCABULARY
    length: int = LENGTH
    batch: int = 2

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch of one rank."""
        return self.batch * self.length

    def llama_config(self, **changes: Any) -> LlamaConfig:
        """The configuration of a Llama of these sizes; its heads are 32 wide."""
        values = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(2, self.width // 32),
            "num_key_value_heads": max(2, self.width // 64),
            "max_position_embeddings": self.length,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        return LlamaConfig(**(values | changes))

    def llama(self) -> LlamaForCausalLM:
        """A Llama of random weights, the same at every call."""
        torch.manual_seed(0)
        return LlamaForCausalLM(self.llama_config())

    def data(self, items: int) -> data.TokenData:
        """Windows of random tokens, each with a label on every token."""
        generator = np.random.default_rng(0)
        ids = list(generator.integers(2, self.vocabulary, size=(items, self.length), dtype=np.int64))
        return data.TokenData(ids, ids, True, dict.fromkeys(data.COUNT_KEYS, 0))


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that operators made inside, while their storages live; `peak` is the highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
                self._watch(leaf.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._held:
            return

        def died(_: weakref.ref) -> None:
            del self._held[key]
            self.now -= size

        self._held[key] = weakref.ref(storage, died)
        self.now += size
        self.peak = max(self.peak, self.now)


def reset_rss_peak() -> None:
    """Let the kernel's high-water mark of this process start at its present size."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def rss_peak() -> int:
    """VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def in_turns(sides: dict[str, Callable[[], float]], pairs: int) -> dict[str, list[float]]:
    """Call all sides once per round, in the order A B A B; each call gives its own seconds."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(pairs):
        for name, side in sides.items():
            found[name].append(side())
    return found
