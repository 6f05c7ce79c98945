"""What autograd keeps for backward, and the FLOPs of a pass, from the operations alone: a tape without tensors.

Each operation follows the backward formula of PyTorch's own (tools/autograd/derivatives.yaml): it saves what its
derivative needs, if that derivative is needed. One storage counts once, however many views of it are saved; weights and
buffers do not count. Elements and bytes are exact integers. FLOPs count matrix products alone, two per multiplication
and addition, as torch.utils.flop_counter does; causal attention counts whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from itertools import count, islice

from dlrscale.catalogue import PARTS

FP32, INT64 = 4, 8
SHORTEST_ROW = 16  # attacks/act_int8.py leaves shorter rows as they are
DEVICE, HOST, INT8 = "device", "host", "int8"  # what `--activation-storage` takes


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor without values: elements, bytes of one, whether a gradient flows to it, and whose storage it views.

    `row` is the length of its last dimension, 0 where it has no other or where nobody asks; `view` tells the views of
    one storage apart.
    """

    elements: int
    size: int
    grad: bool
    storage: int
    compact: bool = True  # whether joining its leading dimensions is a view
    row: int = 0
    view: int = 0


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


@dataclass(frozen=True)
class Region:
    """A part of a pass that is checkpointed by itself: it keeps its inputs, and runs again going backward.

    `tape` records what is inside, `inputs` are what it is given, and `mark` counts the storages and views that the tape
    around it had kept when it began, its inputs among them: what came later has gone when it runs again.
    """

    tape: Tape
    inputs: tuple[Tensor, ...]
    mark: tuple[int, int]

    def peak_bytes(self, alive: Set[int], fresh: Mapping[int, int]) -> int:
        """The most that it keeps beside what is alive, while it is there again.

        Args:
            alive: The storages that are there already.
            fresh: Bytes of inputs that come back as tensors of their own, by the storage that they once viewed.

        Returns:
            Bytes.
        """
        own = {key: fresh.get(key, size) for key, (_, size) in self.tape.saved.items() if key not in alive}
        found = sum(own.values())
        for region in self.tape.regions:
            before = set(islice(self.tape.saved, region.mark[0]))
            there = sum(size for key, size in own.items() if key in before)
            found = max(found, there + region.peak_bytes(alive | before, {}))
        return found


@dataclass
class Tape:
    """Records one forward pass of a part of a model.

    `saved` is bytes by storage with the part that saved it first; `views` by storage and view the bytes that it takes
    as 8-bit codes with a scale per row, None where it stays as it is (attacks/act_int8.py: short rows, whole numbers,
    and what is not `coded`, inside attention but outside of its modules). `regions` are its checkpointed parts.
    `recomputed_flops` are forward's up to the last thing that is saved: torch's checkpointing stops there when it runs
    a part again. `kernel_flops` are what fused kernels compute again inside themselves in backward, `fused_flops` those
    that they compute in forward. `device` is `cuda` or `cpu`, where they differ. `zero3`: DeepSpeed's own function
    stands in the place of torch's linear map (zero/linear.py, `LinearFunctionForZeroStage3`); it keeps its input, when
    it has run, also where the weight is frozen. `joined`: the tokens of all sequences lie in one dimension.
    """

    batch: int
    length: int
    size: int
    training: Training
    device: str = "cuda"
    part: str = ""
    zero3: bool = False
    coded: bool = True
    joined: bool = False
    saved: dict[int, tuple[str, int]] = field(default_factory=dict)
    views: dict[tuple[int, int, bool], tuple[str, int | None]] = field(default_factory=dict)
    regions: list[Region] = field(default_factory=list)
    recomputed_flops: int = 0
    forward_flops: Counter[str] = field(default_factory=Counter)
    backward_flops: Counter[str] = field(default_factory=Counter)
    kernel_flops: int = 0
    fused_flops: int = 0
    _storages: dict[int, int] = field(default_factory=dict)
    _views: Iterator[int] = field(default_factory=lambda: count(1))

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

    def kept_bytes(
        self,
        storage: str = DEVICE,
        *,
        without: Set[int] = frozenset(),
        parts: Set[str] | None = None,
        mark: tuple[int, int] | None = None,
    ) -> int:
        """Bytes of what is saved, as a storage has it: of `host` those on the host, else those on the device.

        Args:
            storage: A value of `--activation-storage`.
            without: Storages that do not count.
            parts: The parts that count; None: all.
            mark: What had been saved at a moment (`Region.mark`); None: at the end.

        Returns:
            Bytes.
        """
        first, views = mark or (None, None)
        whole = {
            key: size
            for key, (part, size) in islice(self.saved.items(), first)
            if key not in without and (parts is None or part in parts)
        }
        if storage != INT8:
            return sum(whole.values())
        as_codes = [(key, codes) for (key, *_), (_, codes) in islice(self.views.items(), views) if key in whole]
        as_it_is = {key for key, codes in as_codes if codes is None}
        return sum(codes or 0 for _, codes in as_codes) + sum(whole[key] for key in as_it_is)

    def inner_peak_bytes(self, storage: str = DEVICE, *, without: Set[int] = frozenset()) -> int:
        """The most bytes on the device while a region is there again, with what was kept before it; 0 without regions.

        Args:
            storage: How what is saved around the regions is kept.
            without: Storages that count elsewhere; they are alive.

        Returns:
            Bytes.
        """
        found = 0
        for region in self.regions:
            fresh = {}
            if storage == DEVICE:
                alive = set(islice(self.saved, region.mark[0])) | without
            else:  # inputs come back from the host whole, and from codes one by one
                alive = set(without)
                views = {x: self.views[x.storage, x.view, False][1] for x in region.inputs}
                alive |= {x.storage for x, codes in views.items() if storage == INT8 and codes is None}
                fresh = {x.storage: x.elements * x.size for x in region.inputs} if storage == INT8 else {}
            before = 0 if storage == HOST else self.kept_bytes(storage, without=without, mark=region.mark)
            found = max(found, before + region.peak_bytes(alive, fresh))
        return found

    @property
    def again_bytes(self) -> int:
        """Bytes that the regions save when they run again, their inputs left out."""
        return sum(region.peak_bytes({x.storage for x in region.inputs}, {}) for region in self.regions)

    @property
    def again_flops(self) -> int:
        """FLOPs that the regions run again, each up to the last thing that it saves."""
        return sum(region.tape.recomputed_flops + region.tape.again_flops for region in self.regions)

    def new(self, elements: int, grad: bool, size: int | None = None, compact: bool = True, row: int = 0) -> Tensor:
        """A tensor with a storage of its own."""
        size = self.size if size is None else size
        storage = len(self._storages)
        self._storages[storage] = elements * size
        return Tensor(elements, size, grad, storage, compact, row)

    def like(self, x: Tensor, size: int | None = None) -> Tensor:
        """A new tensor of another one's shape."""
        return self.new(x.elements, x.grad, x.size if size is None else size, row=x.row)

    def view(self, x: Tensor, elements: int, compact: bool = True, row: int = 0) -> Tensor:
        """A part of a tensor, or another shape of it, in the same storage."""
        return Tensor(elements, x.size, x.grad, x.storage, compact, row or x.row, next(self._views))

    def save(self, x: Tensor, joined: bool = False) -> None:
        """Keep a tensor's whole storage for backward; `joined`: as a view in which all tokens lie in one dimension."""
        self.recomputed_flops = self.forward_flops.total()
        self.saved.setdefault(x.storage, (self.part, self._storages[x.storage]))
        fits = self.coded and x.row >= SHORTEST_ROW and x.size in (2, FP32)
        codes = x.elements + 4 * (x.elements // x.row) if fits else None
        self.views.setdefault((x.storage, x.view, joined and not self.joined), (self.part, codes))

    def inside(self, tokens: int | None = None) -> Tape:
        """A tape for a part of this pass, on some of its tokens, that knows its storages."""
        rows = {} if tokens is None else {"batch": 1, "length": tokens}
        own = {"coded": True, "saved": {}, "views": {}, "regions": [], "recomputed_flops": 0, "kernel_flops": 0,
               "forward_flops": Counter(), "backward_flops": Counter()}  # fmt: skip
        return replace(self, **own, **rows)

    def checkpoint(self, inside: Tape, *inputs: Tensor) -> None:
        """Checkpoint what another tape has recorded: its inputs are kept, whether they ask for a gradient or not."""
        for x in inputs:
            self.save(x)
        self.regions.append(Region(inside, inputs, (len(self.saved), len(self.views))))
        self.forward_flops += inside.forward_flops
        self.backward_flops += inside.backward_flops

    def changes(self, part: str, biased: bool) -> bool:
        """Whether anything of a part is trained: weights, adapters, or its biases, where it has some."""
        training = self.training
        return part in training.trained | training.adapted or (biased and training.biases)

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
        replaced, adapted = self.zero3 and not own, self.part in training.adapted
        biased, coded, self.coded = bias and training.biases, self.coded, True
        self._map(x, rows * width * outputs, trained, replaced, biased)
        if adapted:
            inside = self.dropout(x, training.adapter_dropout)
            self._map(inside, rows * width * training.rank, True, self.zero3)
            code = self.new(rows * training.rank, True, row=training.rank)
            self._map(code, rows * training.rank * outputs, True, self.zero3)
        self.coded = coded
        return self.new(rows * outputs, x.grad or trained or biased or adapted, row=outputs)

    def _map(self, x: Tensor, multiplications: int, trained: bool, replaced: bool, biased: bool = False) -> None:
        if trained and not replaced:
            self.save(x, joined=True)
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
        return self.new(max(a.elements, b.elements), a.grad or b.grad, a.size, row=max(a.row, b.row))

    def scale(self, x: Tensor) -> Tensor:
        """x times a number or a buffer without a dimension: nothing that counts is kept."""
        return self.like(x)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b: nothing is kept."""
        return self.new(a.elements, a.grad or b.grad, max(a.size, b.size), row=a.row)

    def cast(self, x: Tensor, size: int) -> Tensor:
        """Another precision: a new tensor, or the same one where nothing changes."""
        return x if x.size == size else self.like(x, size)

    def kept_output(self, x: Tensor, size: int | None = None) -> Tensor:
        """An operation whose derivative needs its output: tanh, relu, rsqrt, softmax."""
        y = self.like(x, size)
        if x.grad:
            self.save(y)
        return y

    def kept_input(self, x: Tensor) -> Tensor:
        """An operation whose derivative needs its input: pow, SiLU, GELU."""
        if x.grad:
            self.save(x)
        return self.like(x)

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Dropout in training: on CUDA a mask of a byte, on the CPU one of the tensor's own precision."""
        if not probability:
            return x
        if x.grad:
            self.save(self.like(x, 1 if self.device == "cuda" else x.size))
        return self.like(x)

    def layer_norm(self, x: Tensor, width: int, affine: bool = True) -> Tensor:
        """native_layer_norm keeps its input, and mean and 1 / std of each row, on CUDA in fp32."""
        trained = affine and self.weights_trained()
        if x.grad or trained:
            self.save(x)
            for _ in range(2):
                self.save(self.new(x.elements // width, False, FP32 if self.device == "cuda" else x.size, row=1))
        return self.new(x.elements, x.grad or trained, row=x.row)

    def rms_norm(self, x: Tensor, width: int) -> Tensor:
        """Llama's: in fp32 x / rms(x), back in the model's precision times the weight."""
        wide = self._normalised(x, width)
        narrow = self.cast(wide, x.size)
        if self.weights_trained():
            self.save(narrow)
        return self.new(x.elements, x.grad or self.weights_trained(), row=x.row)

    def gemma_norm(self, x: Tensor, width: int) -> Tensor:
        """Gemma's: times (1 + weight) while still in fp32; the fp32 (1 + weight), of D numbers, is kept too."""
        wide = self._normalised(x, width)
        factor = self.new(width, self.weights_trained(), FP32)
        return self.cast(self.multiply(wide, factor), x.size)

    def _normalised(self, x: Tensor, width: int) -> Tensor:
        wide = self.cast(x, FP32)
        squares = self.kept_input(wide)
        root = self.kept_output(self.new(x.elements // width, squares.grad, FP32, row=1))
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
