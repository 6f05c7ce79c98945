"""The forward passes of the families, operation by operation on a tape, as transformers 5 writes them.

tests/unit/test_planner_saved.py holds every family, base and locked, against saved-tensor hooks on live models, in
whole bytes. Taken as given: training mode, and no cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dlrscale import shapes
from dlrscale.planner.tape import DEVICE, FP32, HOST, INT64, Tape, Tensor, Training
from dlrscale.shapes import FORMS, ModelShape
from dlrscale.shapes.layout import GEMMA, LAYER, Layout

LOSS_CHUNK_ELEMENTS = 1 << 25  # of logits that the loss turns to fp32 at a time (evaluate.py)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass: the model, the micro-batch, what is trained, and which kernels run.

    `size` is the bytes of one element of the model's precision. `checkpointing`, `storage` and `tiles` are the memory
    levers, `anchor` is None but for the gradient method `reverse`, whose knob it is. `hardened`: each DLR-Net runs once
    more with every block reading x alone, as the heal's hardening does. `masked`: some sequence is padded. `zero3`:
    DeepSpeed's linear map at stage 3 is in use. `label_tokens`: those of the micro-batch, where not every token but the
    last of a sequence has a label.
    """

    shape: ModelShape
    parts: Layout
    batch: int
    length: int
    size: int
    training: Training
    checkpointing: str = "none"
    storage: str = DEVICE
    tiles: int = 1
    anchor: int | None = None
    attention: str = "sdpa"
    device: str = "cuda"
    hardened: bool = False
    masked: bool = False
    zero3: bool = False
    label_tokens: int | None = None

    def tape(self, part: str = "", layer: int | None = None) -> Tape:
        """A fresh tape, for a decoder layer or for what lies outside of them."""
        training = self.training if layer is None else self.training.of_layer(layer)
        return Tape(self.batch, self.length, self.size, training, self.device, part, self.zero3)

    @property
    def checkpointed(self) -> bool:
        """Whether each layer is checkpointed."""
        return self.checkpointing != "none"

    @property
    def labels(self) -> int:
        """Label tokens; the last position of each sequence predicts nothing."""
        return self.batch * (self.length - 1) if self.label_tokens is None else self.label_tokens


@dataclass(frozen=True)
class Layer:
    """What one decoder layer keeps: its tape, its input's storage, and the rotary tables that all layers share.

    `beside` is what it takes besides its input from outside (a side network reads the frozen layer's output).
    """

    tape: Tape
    source: Tensor
    shared: frozenset[int]
    beside: tuple[Tensor, ...] = ()

    def left_out(self, without_input: bool) -> frozenset[int]:
        """The storages that do not count as the layer's own: the shared tables; with checkpointing its input too."""
        return self.shared | ({t.storage for t in (self.source, *self.beside)} if without_input else set())

    def bytes(self, storage: str = DEVICE, *, without_input: bool = False) -> int:
        """Bytes of what is saved as a storage has it (`Tape.kept_bytes`), without what is left out."""
        return self.tape.kept_bytes(storage, without=self.left_out(without_input))

    def peak_bytes(self, storage: str = DEVICE, *, without_input: bool = False) -> int:
        """The most of its own bytes on the device while its backward runs, with what is checkpointed inside."""
        at_once = 0 if storage == HOST else self.bytes(storage, without_input=without_input)
        return max(at_once, self.tape.inner_peak_bytes(storage, without=self.left_out(without_input)))

    @property
    def input_bytes(self) -> int:
        """What is kept of it on the device where it is checkpointed (`inputs`)."""
        return self.inputs().kept_bytes()

    def inputs(self) -> Tape:
        """What is kept of it where it is checkpointed: its input, or nothing where no gradient goes through it."""
        tape = self.tape.inside()
        for tensor in (self.source, *self.beside) if self.tape.saved else ():
            tape.save(tensor)
        return tape


def stream_flows(run: Pass) -> bool:
    """Whether a gradient is asked of the first layer's input: only where something before it is trained."""
    projected = run.parts.embedding_width != run.shape.width
    changed = run.training.trained | run.training.adapted
    return embedded_flows(run) or (projected and "projection" in changed)


def flows(run: Pass, layer: int) -> bool:
    """Whether a gradient is asked of the input of a decoder layer, or, behind the last one, of the final norm."""
    return stream_flows(run) or layer > run.training.first


def embedded_flows(run: Pass) -> bool:
    """Whether a gradient is asked of the token embedding: peft asks for it where adapters meet checkpointing."""
    return "embedding" in run.training.trained or bool(run.training.adapted and run.checkpointed)


def embedding(run: Pass) -> Tape:
    """Token (and position) embedding: a trained table keeps the indices."""
    tape, parts = run.tape("embedding"), run.parts
    trained = tape.weights_trained()
    if trained:
        tape.save(tape.new(tape.tokens, False, INT64))
    x = tape.new(tape.tokens * parts.embedding_width, embedded_flows(run), row=parts.embedding_width)
    if parts.embedding_width != run.shape.width:
        tape.part = "projection"
        x = tape.linear(x, parts.embedding_width, run.shape.width)
        tape.part = "embedding"
    if parts.positions and trained:
        per_sequence = run.shape.family.model_type == "gpt2"  # its position indices are (1, T)
        tape.save(tape.new(run.length if per_sequence else tape.tokens, False, INT64))
    tape.dropout(x, parts.dropout["embedding"])
    if run.training.side:
        side_start(tape, run)
    return tape


def head(run: Pass) -> Tape:
    """Final norm, language-model head and loss (evaluate.cross_entropy_sum), on the stream behind the last layer."""
    tape, parts, shape = run.tape("norm"), run.parts, run.shape
    x = tape.new(tape.tokens * shape.width, flows(run, shape.layers), row=shape.width)
    if run.training.side:
        x = tape.add(x, side_update(tape, run))
    if parts.final_norm:
        x = norm(tape, parts, x, shape.width)
    if parts.embedding_width != shape.width:
        tape.part = "projection"
        if run.training.side:  # the frozen model has gone through it too
            tape.product(tape.tokens * shape.width * parts.embedding_width, False, False)
        x = tape.linear(x, shape.width, parts.embedding_width)
    tape.part = "head"
    tape.linear(x, parts.embedding_width, shape.vocabulary, bias=parts.head_bias)
    tape.part = "loss"
    tape.save(tape.new(run.labels, False, INT64))  # the places of labels: one storage for all chunks
    for rows in loss_chunks(run):
        tape.save(tape.new(rows * shape.vocabulary, False, FP32))  # log-probabilities
        tape.save(tape.new(rows, False, INT64))  # their targets
        tape.save(tape.new(1, False, FP32))  # the sum of class weights
    return tape


def loss_chunks(run: Pass) -> list[int]:
    """Label tokens by chunk of the loss."""
    step = max(1, LOSS_CHUNK_ELEMENTS // run.shape.vocabulary)
    return [min(step, run.labels - start) for start in range(0, run.labels, step)]


def norm(tape: Tape, parts: Layout, x: Tensor, width: int) -> Tensor:
    """A norm of the family's kind, within the present part."""
    part, tape.part = tape.part, "norm"
    if parts.norm == LAYER:
        y = tape.layer_norm(x, width, parts.norm_affine)
    else:
        y = tape.gemma_norm(x, width) if parts.norm == GEMMA else tape.rms_norm(x, width)
    tape.part = part
    return y


def decoder_layer(run: Pass, layer: int) -> Layer:
    """One decoder layer: attention and MLP or DLR-Net, in the family's wiring."""
    tape, shape, parts = run.tape(layer=layer), run.shape, run.parts
    x = tape.new(tape.tokens * shape.width, flows(run, layer), row=shape.width)
    tables = tuple(tape.new(run.length * parts.rotary, False) for _ in range(2))
    before = parts.norm_first
    y = norm(tape, parts, x, shape.width) if before else x
    attended = tape.dropout(attention(tape, run, y, tables), parts.dropout["residual"])
    if shape.parallel:
        inside = y if shape.shared_input else norm(tape, parts, x, shape.width)
        mlp(tape, run, inside, layer)
    else:
        stream = tape.add(x, attended)
        if not before:
            stream = norm(tape, parts, stream, shape.width)
        out = mlp(tape, run, norm(tape, parts, stream, shape.width) if before else stream, layer)
        if not before:
            norm(tape, parts, tape.add(stream, out), shape.width)
    return Layer(tape, x, frozenset(t.storage for t in tables))


def side_start(tape: Tape, run: Pass) -> None:
    """What a side network reads of the embedding's output, which is normalised without a gradient: s_0 = P_0 h_0."""
    tape.part = "side"
    stream = tape.new(tape.tokens * run.shape.width, False, row=run.shape.width)
    tape.linear(stream, run.shape.width, run.training.side)


def side_layer(run: Pass) -> Layer:
    """A layer of a side network, on what it has so far and a frozen layer's output (attacks/ladder.py)."""
    tape, width, side = run.tape("side"), run.shape.width, run.training.side
    tokens, heads = tape.tokens, shapes.side_heads(side)
    s, h = tape.new(tokens * side, True, row=side), tape.new(tokens * width, False, row=width)
    seen = tape.linear(h, width, side)
    difference = tape.add(s, seen)
    stream = tape.add(seen, tape.multiply(tape.kept_output(tape.new(1, True)), difference))
    qkv = tape.linear(rms_divided(tape, stream), side, 3 * side)
    attended = tape.new(tokens * side, True, row=side // heads)
    into = (tape.view(qkv, tokens * side, row=side // heads) for _ in range(3))
    for kept in (*into, attended, tape.new(tokens * heads, False, FP32, row=run.length)):
        tape.save(kept)
    products = 2 * run.batch * run.length**2 * side
    tape.forward_flops[tape.part] += 2 * products
    tape.fused_flops += 2 * products
    tape.backward_flops[tape.part] += 4 * products
    tape.kernel_flops += products
    stream = tape.add(stream, tape.linear(tape.view(attended, attended.elements, row=side), side, side))
    both = tape.linear(rms_divided(tape, stream), side, 4 * side)
    gate, up = (tape.view(both, 2 * tokens * side, row=2 * side) for _ in range(2))
    hidden = tape.multiply(tape.activation(gate, "silu"), up)
    tape.add(stream, tape.linear(hidden, 2 * side, side))
    return Layer(tape, s, frozenset(), (h,))


def side_update(tape: Tape, run: Pass) -> Tensor:
    """What a side network adds to the last layer's output: U n(s_N)."""
    tape.part = "side"
    last = tape.new(tape.tokens * run.training.side, True, row=run.training.side)
    return tape.linear(rms_divided(tape, last), run.training.side, run.shape.width)


def mlp(tape: Tape, run: Pass, x: Tensor, layer: int) -> Tensor:
    """A base MLP or a DLR-Net, whole or in tiles, and the dropout behind it."""
    shape = run.shape
    tape.part, tape.joined = "mlp", shape.family.inline
    if not (x.grad or tape.changes("mlp", shape.mlp_bias)):  # the levers leave alone what asks for no gradient
        run = replace(run, tiles=1, anchor=None, checkpointing="none")
    out = module(tape, run, x, layer) if run.tiles == 1 else tiled(tape, run, x, layer)
    if run.hardened and shape.ranks and layer in shape.ranks:
        flat_error(tape, shape, x, shape.ranks[layer])
    if not shape.family.dropout:
        out = tape.dropout(out, run.parts.dropout["residual"])
    tape.part, tape.joined = "", False
    return out


def module(tape: Tape, run: Pass, x: Tensor, layer: int) -> Tensor:
    """The module of an MLP or DLR-Net, with the dropout that GPT-2's has inside."""
    shape = run.shape
    ranks = (shape.ranks or {}).get(layer)
    if ranks is None:
        out = base_mlp(tape, shape, x, shape.family.own_maps)
    elif run.anchor is not None:
        out = reversed_net(tape, run, x, ranks)
    elif run.checkpointing == "nested":
        out = nested_net(tape, shape, x, ranks)
    else:
        out = dlr_net(tape, shape, x, ranks)
    return tape.dropout(out, run.parts.dropout["residual"]) if shape.family.dropout else out


def tiled(tape: Tape, run: Pass, x: Tensor, layer: int) -> Tensor:
    """The module on one piece of the tokens after the other, each checkpointed (attacks/tile_tokens.py)."""
    width, pieces = run.shape.width, min(run.tiles, tape.tokens)
    least, longer = divmod(tape.tokens, pieces)
    known: dict[int, tuple[Tape, bool]] = {}
    for index in range(pieces):
        rows = least + (index < longer)
        piece = tape.view(x, rows * width)
        if rows not in known:
            inside = tape.inside(rows)
            known[rows] = inside, module(inside, run, piece, layer).grad
        tape.checkpoint(known[rows][0], piece)
    return tape.new(x.elements, any(grad for _, grad in known.values()), row=width)


def base_mlp(tape: Tape, shape: ModelShape, x: Tensor, own: bool) -> Tensor:
    """down(s(gate x) * up x), or down(s(up x))."""
    inner = shape.inner
    if not shape.family.gated:
        hidden = tape.activation(tape.linear(x, shape.width, inner, own, shape.mlp_bias), shape.activation)
    else:
        if shape.family.fused:
            both = tape.linear(x, shape.width, 2 * inner, bias=shape.mlp_bias)
            gate, up = (tape.view(both, tape.tokens * inner, row=inner) for _ in range(2))
        else:
            gate, up = (tape.linear(x, shape.width, inner, bias=shape.mlp_bias) for _ in range(2))
        hidden = tape.multiply(tape.activation(gate, shape.activation), up)
    return tape.linear(hidden, inner, shape.width, own, shape.mlp_bias)


def dlr_net(tape: Tape, shape: ModelShape, x: Tensor, ranks: tuple[int, ...], flat: bool = False) -> Tensor:
    """d_{k+1} = d_k + B_k s(A_k n(x + b d_k)), as modeling/dlr_net.py writes it; `flat`: each block reads x alone."""
    return through(tape, shape, ranks, x, None, flat)


def through(
    tape: Tape, shape: ModelShape, ranks: Sequence[int], x: Tensor, d: Tensor | None, flat: bool = False
) -> Tensor:
    """Some consecutive blocks of a DLR-Net: d before them (None: zero) to d behind them."""
    for rank in ranks:
        u = x if d is None or flat else tape.add(x, tape.scale(d))
        out = tape.linear(code(tape, shape, u, rank), rank, shape.width)
        d = out if d is None else tape.add(d, out)
    return d


def code(tape: Tape, shape: ModelShape, u: Tensor, rank: int) -> Tensor:
    """What goes into B_k, s(A_k n(u))."""
    form, tokens = FORMS[shape.form], tape.tokens
    if form.norm:
        u = rms_divided(tape, u)
    hidden = tape.linear(u, shape.width, rank * (2 if form.gated else 1), bias=shape.mlp_bias)
    if not form.gated:
        return tape.activation(hidden, shape.activation)
    gate, up = (tape.view(hidden, tokens * rank, row=rank) for _ in range(2))
    return tape.multiply(tape.activation(gate, shape.activation), up)


_segment_length = functools.cache(shapes.segment_length)


def nested_net(tape: Tape, shape: ModelShape, x: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """A DLR-Net whose blocks are checkpointed in segments (attacks/ckpt_nested.py)."""
    length, d = _segment_length(shape.form, shape.width, ranks, shape.activation), None
    for start in range(0, len(ranks), length):
        inside = tape.inside()
        before, d = d, through(inside, shape, ranks[start : start + length], x, d)
        tape.checkpoint(inside, *((x,) if before is None else (x, before)))
    return d


def reversed_net(tape: Tape, run: Pass, x: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """A DLR-Net that keeps x, its codes, its last d and d at anchors, whatever is trained (attacks/reverse.py).

    Its backward runs every block once more, which torch's counter counts as backward, and goes through it as autograd
    would were a gradient asked of every block's input.
    """
    shape, wide = run.shape, max(tape.size, FP32)
    scratch = tape.inside()
    for rank in ranks:
        code(scratch, shape, tape.new(x.elements, True, row=shape.width), rank)
        scratch.linear(tape.new(tape.tokens * rank, True, row=rank), rank, shape.width)
    tape.forward_flops += scratch.forward_flops
    tape.backward_flops += scratch.forward_flops + scratch.backward_flops
    d = tape.new(x.elements, True, wide, row=shape.width)
    anchors = len(range(run.anchor, len(ranks), run.anchor)) if run.anchor else 0
    kept = [x, d, *(tape.new(tape.tokens * rank, True, row=rank) for rank in ranks)]
    for tensor in kept + [tape.new(x.elements, False, wide, row=shape.width) for _ in range(anchors)]:
        tape.save(tensor)
    return tape.cast(d, tape.size)


def flat_error(tape: Tape, shape: ModelShape, x: Tensor, ranks: tuple[int, ...]) -> None:
    """The hardening term w max(0, t - e_flat) on a detached x (distil.py)."""
    detached = replace(x, grad=False)
    error = token_error(tape, dlr_net(tape, shape, detached, ranks, flat=True))
    tape.kept_output(tape.scale(error))


def token_error(tape: Tape, student: Tensor) -> Tensor:
    """||student - y||^2 / (||y||^2 + f) per token in fp32: keeps the difference and the divisor."""
    difference = tape.add(tape.cast(student, FP32), tape.new(student.elements, False, FP32))
    tape.kept_input(difference)
    sums = tape.new(tape.tokens, True, FP32)
    return tape.multiply(sums, tape.new(tape.tokens, False, FP32))


def rms_divided(tape: Tape, u: Tensor) -> Tensor:
    """u / (||u|| D^-1/2 + eps): keeps u, the fp32 norm and the divisor."""
    length = tape.new(tape.tokens, u.grad, FP32, row=1)
    if u.grad:
        tape.save(u)
        tape.save(length)
    return tape.multiply(u, tape.cast(tape.scale(length), u.size))


def attention(tape: Tape, run: Pass, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
    """Self-attention: maps, rotation, the products or the fused kernel, and the output map."""
    parts, width, own = run.parts, run.shape.width, run.shape.family.own_maps
    tape.part, tape.coded = "attention", False
    inner, narrow = parts.heads * parts.head_dim, parts.kv_heads * parts.head_dim
    if parts.fused:
        q, k, v = split_heads(tape, run, tape.linear(x, width, parts.qkv_width, own, parts.qkv_bias))
    else:
        q, k, v = (tape.linear(x, width, outputs, bias=parts.qkv_bias) for outputs in (inner, narrow, narrow))
        q, k, v = (tape.view(t, t.elements, compact=False) for t in (q, k, v))
    if run.shape.family.model_type == "opt":
        q = tape.scale(q)
        q = tape.view(q, q.elements, compact=False)
    if parts.qk_norm:
        q, k = (qk_norm(tape, parts, t) for t in (q, k))
    if parts.rotary:
        q, k = (rotate(tape, parts, t, tables) for t in (q, k))
    fused = run.attention == "sdpa" and not falls_back(run)
    out = fused_attention(tape, run, q, k, v) if fused else eager_attention(tape, run, q, k, v)
    tape.coded = True
    return tape.linear(tape.view(out, out.elements, row=inner), inner, width, own, parts.out_bias)


def falls_back(run: Pass) -> bool:
    """Whether no fused kernel takes a model's attention: a Falcon's single key head goes to plain products.

    In 16 bits these keep fp32 copies besides, which are not counted here.
    """
    return run.shape.family.model_type == "falcon" and run.parts.kv_heads == 1


def split_heads(tape: Tape, run: Pass, both: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values out of one fused map; views of it, but in Falcon's indexed and regrouped ones."""
    parts, tokens = run.parts, tape.tokens
    inner, narrow = parts.heads * parts.head_dim, parts.kv_heads * parts.head_dim
    q, k, v = (tape.view(both, tokens * n, compact=False) for n in (inner, narrow, narrow))
    if run.shape.family.model_type != "falcon" or not (parts.grouped or parts.kv_heads == 1):
        return q, k, v
    if both.grad:
        for _ in range(2):
            tape.save(tape.new(1, False, INT64))  # the indices that pick keys and values
    if parts.grouped:  # broadcast to all heads and flattened: copies
        k, v = (tape.new(tokens * inner, both.grad, compact=False) for _ in range(2))
        q = tape.new(tokens * inner, both.grad, compact=False) if parts.kv_heads > 1 else q
    else:  # picked by an index: copies
        k, v = (tape.new(tokens * narrow, both.grad) for _ in range(2))
    return q, k, v


def qk_norm(tape: Tape, parts: Layout, x: Tensor) -> Tensor:
    """A norm over each head of queries or keys."""
    part, tape.part, tape.coded = tape.part, "norm", True  # a module of its own
    y = (tape.layer_norm if parts.qk_norm == LAYER else tape.rms_norm)(replace(x, row=parts.head_dim), parts.head_dim)
    tape.part, tape.coded = part, False
    return tape.view(y, y.elements, compact=False)


def rotate(tape: Tape, parts: Layout, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
    """x cos + rotate_half(x) sin; the tables are kept, once for all layers."""
    for table in tables:
        if x.grad:
            tape.save(table)
    return tape.new(x.elements, x.grad, compact=parts.joined_rotary)


def repeated(tape: Tape, run: Pass, x: Tensor) -> Tensor:
    """Keys or values for every query head: a copy where several heads share them."""
    parts = run.parts
    if parts.grouped or parts.heads == parts.kv_heads:
        return x
    if run.shape.family.model_type == "falcon":  # its product broadcasts over heads, which joins without a copy
        return x if tape.batch == 1 else tape.new(x.elements * parts.heads, x.grad)
    return tape.new(x.elements * (parts.heads // parts.kv_heads), x.grad)


def eager_attention(tape: Tape, run: Pass, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v written out: the probabilities of all pairs are kept, in fp32 and in the model's precision."""
    parts = run.parts
    pairs = run.batch * parts.heads * run.length**2
    k, v = repeated(tape, run, k), repeated(tape, run, v)
    scores = tape.matmul(q, k, pairs * parts.head_dim, pairs)
    narrow = run.shape.family.model_type in ("falcon", "gpt2")  # their softmax stays in the model's precision
    weights = tape.cast(tape.kept_output(scores, run.size if narrow else FP32), run.size)
    tape.coded = narrow  # theirs is a module, other families call a function
    weights = tape.dropout(replace(weights, row=run.length), parts.dropout["attention"])
    tape.coded = False
    return tape.scale(tape.matmul(weights, v, pairs * parts.head_dim, tape.tokens * parts.heads * parts.head_dim))


def fused_attention(tape: Tape, run: Pass, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """scaled_dot_product_attention as a flash kernel: q, k, v, the output, and fp32 log-sum-exp per head and token.

    Its backward computes the scores once more inside itself, beside 4 products for forward's 2. With padding (and in
    Falcon always) it gets a mask, which each layer turns to numbers and keeps, and repeated keys and values.
    """
    parts, masked = run.parts, run.masked or run.shape.family.model_type == "falcon"
    if masked:
        k, v = repeated(tape, run, k), repeated(tape, run, v)
    out = tape.new(q.elements, q.grad or k.grad or v.grad)
    if out.grad:
        for kept in (q, k, v, out, tape.new(tape.tokens * parts.heads, False, FP32)):
            tape.save(kept)
        if masked:
            tape.save(tape.new(run.batch * run.length**2, False))
    products = 2 * run.batch * parts.heads * run.length**2 * parts.head_dim
    tape.forward_flops[tape.part] += 2 * products
    tape.fused_flops += 2 * products
    if out.grad:
        tape.backward_flops[tape.part] += 4 * products
        tape.kernel_flops += products
    # The kernel lays its output out as q is; where heads lie before tokens, joining them copies.
    return tape.scale(out) if q.compact else out
