"""What autograd keeps for backward, and the FLOPs of a pass, from the operations alone: a tape without tensors.

Each operation follows the backward formula of PyTorch's own (tools/autograd/derivatives.yaml): it saves what its
derivative needs, if that derivative is needed. One storage counts once, however many views of it are saved; weights and
buffers do not count. Elements and bytes are exact integers. FLOPs count matrix products alone, two per multiplication
and addition, as torch.utils.flop_counter does; causal attention counts whole.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from dlrscale.catalogue import PARTS

FP32, INT64 = 4, 8


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor without values: elements, bytes of one, whether a gradient flows to it, and whose storage it views."""

    elements: int
    size: int
    grad: bool
    storage: int
    compact: bool = True  # whether joining its leading dimensions is a view


@dataclass(frozen=True, kw_only=True)
class Training:
    """What of a model is trained: the weights of the parts in `trained`, adapters of `rank` on those in `adapted`.

    `biases`: all biases besides, whatever part they belong to. Decoder layers before `first` are frozen whole. `side`
    is the width of a side network beside the frozen model, whose passes then keep nothing.
    """

    trained: frozenset[str] = PARTS
    adapted: frozenset[str] = frozenset()
    rank: int = 0
    adapter_dropout: float = 0.0
    biases: bool = False
    first: int = 0
    side: int = 0

    def has(self, part: str, bias: bool = False, layer: int | None = None) -> bool:
        """Whether tensors of a part are trained, outside of the decoder layers or in one of them."""
        return (layer is None or layer >= self.first) and (part in self.trained or (bias and self.biases))

    def of_layer(self, layer: int) -> Training:
        """What of one decoder layer is trained."""
        return self if layer >= self.first else replace(self, trained=frozenset(), adapted=frozenset(), biases=False)


@dataclass
class Tape:
    """Records one forward pass of a part of a model.

    `saved` is bytes by storage with the part that saved it first. `recomputed_flops` are forward's up to the last thing
    that is saved: torch's checkpointing stops there when it runs a part again. `kernel_flops` are what fused kernels
    compute again inside themselves in backward, `fused_flops` what they do in forward. `device`: `cuda` or `cpu`, where
    they differ. `zero3`: DeepSpeed's own function stands in the place of torch's linear map (zero/linear.py,
    `LinearFunctionForZeroStage3`); it keeps its input, when it has run, also where the weight is frozen.
    """

    batch: int
    length: int
    size: int
    training: Training
    device: str = "cuda"
    part: str = ""
    zero3: bool = False
    saved: dict[int, tuple[str, int]] = field(default_factory=dict)
    recomputed_flops: int = 0
    forward_flops: Counter[str] = field(default_factory=Counter)
    backward_flops: Counter[str] = field(default_factory=Counter)
    kernel_flops: int = 0
    fused_flops: int = 0
    _storages: dict[int, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch * self.length

    @property
    def saved_bytes(self) -> int:
        """Bytes of everything saved so far."""
        return sum(size for _, size in self.saved.values())

    def by_part(self) -> dict[str, int]:
        """Bytes saved by part."""
        found: Counter[str] = Counter()
        for part, size in self.saved.values():
            found[part] += size
        return dict(found)

    def new(self, elements: int, grad: bool, size: int | None = None, compact: bool = True) -> Tensor:
        """A tensor with a storage of its own."""
        size = self.size if size is None else size
        storage = len(self._storages)
        self._storages[storage] = elements * size
        return Tensor(elements, size, grad, storage, compact)

    def view(self, x: Tensor, elements: int, compact: bool = True) -> Tensor:
        """A part of a tensor, or another shape of it, in the same storage."""
        return Tensor(elements, x.size, x.grad, x.storage, compact)

    def save(self, x: Tensor) -> None:
        """Keep a tensor's whole storage for backward."""
        self.recomputed_flops = self.forward_flops.total()
        self.saved.setdefault(x.storage, (self.part, self._storages[x.storage]))

    def weights_trained(self) -> bool:
        """Whether the weights of the present part are trained."""
        return self.part in self.training.trained

    def linear(self, x: Tensor, width: int, outputs: int, own: bool = False, bias: bool = False) -> Tensor:
        """x @ W^T (+ bias), with an adapter where the present part has one: B(A(dropout(x))) * scale beside it.

        A trained weight keeps its input. peft's adapter keeps the input of A (its own copy behind a dropout) and of B.
        `own`: the family does not call torch's linear map (GPT-2's Conv1D, Falcon's product). `bias`: there is one; a
        trained one keeps nothing, but where DeepSpeed's own function keeps the input for any gradient.
        """
        rows, training, trained = x.elements // width, self.training, self.weights_trained()
        replaced, biased = self.zero3 and not own, bias and training.biases
        self._map(x, rows * width * outputs, trained, replaced, biased)
        if self.part not in training.adapted:
            return self.new(rows * outputs, x.grad or trained or biased)
        inside = self.dropout(x, training.adapter_dropout)
        self._map(inside, rows * width * training.rank, True, self.zero3)
        self._map(self.new(rows * training.rank, True), rows * training.rank * outputs, True, self.zero3)
        return self.new(rows * outputs, True)

    def _map(self, x: Tensor, multiplications: int, trained: bool, replaced: bool, biased: bool = False) -> None:
        if trained and not replaced:
            self.save(x)
        self.product(multiplications, x.grad, trained)
        if replaced and (x.grad or trained or biased):
            self.save(x)

    def product(self, multiplications: int, first: bool, second: bool) -> None:
        """Count a matrix product, and in backward one more for each factor that needs a gradient."""
        self.forward_flops[self.part] += 2 * multiplications
        self.backward_flops[self.part] += 2 * multiplications * (first + second)

    def matmul(self, a: Tensor, b: Tensor, multiplications: int, elements: int) -> Tensor:
        """A batched product: each factor is kept where the other needs a gradient, copied where heads do not join."""
        a, b = self._joined(a), self._joined(b)
        if b.grad:
            self.save(a)
        if a.grad:
            self.save(b)
        self.product(multiplications, a.grad, b.grad)
        return self.new(elements, a.grad or b.grad)

    def _joined(self, x: Tensor) -> Tensor:
        return x if x.compact or self.batch == 1 else self.new(x.elements, x.grad, x.size)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """a * b, each kept where the other needs a gradient; the larger one's shape."""
        if b.grad:
            self.save(a)
        if a.grad:
            self.save(b)
        return self.new(max(a.elements, b.elements), a.grad or b.grad, a.size)

    def scale(self, x: Tensor) -> Tensor:
        """x times a number or a buffer without a dimension: nothing that counts is kept."""
        return self.new(x.elements, x.grad, x.size)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b: nothing is kept."""
        return self.new(a.elements, a.grad or b.grad, max(a.size, b.size))

    def cast(self, x: Tensor, size: int) -> Tensor:
        """Another precision: a new tensor, or the same one where nothing changes."""
        return x if x.size == size else self.new(x.elements, x.grad, size)

    def kept_output(self, x: Tensor, size: int | None = None) -> Tensor:
        """An operation whose derivative needs its output: tanh, relu, rsqrt, softmax."""
        y = self.new(x.elements, x.grad, size or x.size)
        if x.grad:
            self.save(y)
        return y

    def kept_input(self, x: Tensor) -> Tensor:
        """An operation whose derivative needs its input: pow, SiLU, GELU."""
        if x.grad:
            self.save(x)
        return self.new(x.elements, x.grad, x.size)

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Dropout in training: on CUDA a mask of a byte, on the CPU one of the tensor's own precision."""
        if not probability:
            return x
        if x.grad:
            self.save(self.new(x.elements, False, 1 if self.device == "cuda" else x.size))
        return self.new(x.elements, x.grad, x.size)

    def layer_norm(self, x: Tensor, width: int, affine: bool = True) -> Tensor:
        """native_layer_norm keeps its input, and mean and 1 / std of each row, on CUDA in fp32."""
        trained = affine and self.weights_trained()
        if x.grad or trained:
            self.save(x)
            for _ in range(2):
                self.save(self.new(x.elements // width, False, FP32 if self.device == "cuda" else x.size))
        return self.new(x.elements, x.grad or trained)

    def rms_norm(self, x: Tensor, width: int) -> Tensor:
        """Llama's: in fp32 x / rms(x), back in the model's precision times the weight."""
        wide = self._normalised(x, width)
        narrow = self.cast(wide, x.size)
        if self.weights_trained():
            self.save(narrow)
        return self.new(x.elements, x.grad or self.weights_trained())

    def gemma_norm(self, x: Tensor, width: int) -> Tensor:
        """Gemma's: times (1 + weight) while still in fp32; the fp32 (1 + weight), of D numbers, is kept too."""
        wide = self._normalised(x, width)
        factor = self.new(width, self.weights_trained(), FP32)
        return self.cast(self.multiply(wide, factor), x.size)

    def _normalised(self, x: Tensor, width: int) -> Tensor:
        wide = self.cast(x, FP32)
        squares = self.kept_input(wide)
        root = self.kept_output(self.new(x.elements // width, squares.grad, FP32))
        return self.multiply(wide, root)

    def activation(self, x: Tensor, name: str) -> Tensor:
        """The activations of the table in shapes, as the operations that transformers writes."""
        if name == "relu":
            return self.kept_output(x)
        if name == "gelu_new":  # 0.5 x (1 + tanh(c (x + 0.044715 x^3)))
            cube = self.kept_input(x)
            tanh = self.kept_output(self.add(x, self.scale(cube)))
            return self.multiply(self.scale(x), self.scale(tanh))
        if name == "gelu_fast":  # 0.5 x (1 + tanh(c x (1 + 0.044715 x x)))
            square = self.multiply(self.scale(x), x)
            tanh = self.kept_output(self.multiply(self.scale(x), self.scale(square)))
            return self.multiply(self.scale(x), self.scale(tanh))
        return self.kept_input(x)
