"""The forward passes of the families, operation by operation on a tape, as transformers 5 writes them.

tests/unit/test_planner_saved.py holds every family, base and locked, against saved-tensor hooks on live models, in
whole bytes. Taken as given: training mode, and no cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlrscale import shapes
from dlrscale.planner.tape import FP32, INT64, Tape, Tensor, Training
from dlrscale.shapes import FORMS, ModelShape
from dlrscale.shapes.layout import GEMMA, LAYER, Layout

LOSS_CHUNK_ELEMENTS = 1 << 25  # of logits that the loss turns to fp32 at a time (evaluate.py)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass: the model, the micro-batch, what is trained, and which kernels run.

    `size` is the bytes of one element of the model's precision, `checkpointing` `none` or `layer`. `hardened`: each
    DLR-Net runs once more with every block reading x alone, as the heal's hardening does. `masked`: some sequence is
    padded. `zero3`: DeepSpeed's linear map at stage 3 is in use. `label_tokens`: those of the micro-batch, where not
    every token but the last of a sequence has a label.
    """

    shape: ModelShape
    parts: Layout
    batch: int
    length: int
    size: int
    training: Training
    checkpointing: str = "none"
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

    def bytes(self, *, without_input: bool = False) -> int:
        """Bytes saved, without the tables that all layers share; with checkpointing its input is kept in any case."""
        left_out = self.shared | ({t.storage for t in (self.source, *self.beside)} if without_input else set())
        return sum(size for storage, (_, size) in self.tape.saved.items() if storage not in left_out)

    @property
    def input_bytes(self) -> int:
        """What is kept of it where it is checkpointed: its input, or nothing where no gradient goes through it."""
        return sum(t.elements * t.size for t in (self.source, *self.beside)) if self.tape.saved else 0


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
    return "embedding" in run.training.trained or bool(run.training.adapted and run.checkpointing != "none")


def embedding(run: Pass) -> Tape:
    """Token (and position) embedding: a trained table keeps the indices."""
    tape, parts = run.tape("embedding"), run.parts
    trained = tape.weights_trained()
    if trained:
        tape.save(tape.new(tape.tokens, False, INT64))
    x = tape.new(tape.tokens * parts.embedding_width, embedded_flows(run))
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
    x = tape.new(tape.tokens * shape.width, flows(run, shape.layers))
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
    x = tape.new(tape.tokens * shape.width, flows(run, layer))
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
    tape.linear(tape.new(tape.tokens * run.shape.width, False), run.shape.width, run.training.side)


def side_layer(run: Pass) -> Layer:
    """A layer of a side network, on what it has so far and a frozen layer's output (attacks/ladder.py)."""
    tape, width, side = run.tape("side"), run.shape.width, run.training.side
    tokens, heads = tape.tokens, shapes.side_heads(side)
    s, h = tape.new(tokens * side, True), tape.new(tokens * width, False)
    seen = tape.linear(h, width, side)
    difference = tape.add(s, seen)
    stream = tape.add(seen, tape.multiply(tape.kept_output(tape.new(1, True)), difference))
    qkv = tape.linear(rms_divided(tape, stream), side, 3 * side)
    attended = tape.new(tokens * side, True)
    for kept in (qkv, attended, tape.new(tokens * heads, False, FP32)):
        tape.save(kept)
    products = 2 * run.batch * run.length**2 * side
    tape.forward_flops[tape.part] += 2 * products
    tape.fused_flops += 2 * products
    tape.backward_flops[tape.part] += 4 * products
    tape.kernel_flops += products
    stream = tape.add(stream, tape.linear(attended, side, side))
    both = tape.linear(rms_divided(tape, stream), side, 4 * side)
    gate, up = (tape.view(both, 2 * tokens * side) for _ in range(2))
    hidden = tape.multiply(tape.activation(gate, "silu"), up)
    tape.add(stream, tape.linear(hidden, 2 * side, side))
    return Layer(tape, s, frozenset(), (h,))


def side_update(tape: Tape, run: Pass) -> Tensor:
    """What a side network adds to the last layer's output: U n(s_N)."""
    tape.part = "side"
    last = tape.new(tape.tokens * run.training.side, True)
    return tape.linear(rms_divided(tape, last), run.training.side, run.shape.width)


def mlp(tape: Tape, run: Pass, x: Tensor, layer: int) -> Tensor:
    """A base MLP or a DLR-Net, and the dropout behind it."""
    shape = run.shape
    tape.part = "mlp"
    if shape.ranks and layer in shape.ranks:
        out = dlr_net(tape, shape, x, shape.ranks[layer])
        if run.hardened:
            flat_error(tape, shape, x, shape.ranks[layer])
    else:
        out = base_mlp(tape, shape, x, run.shape.family.own_maps)
    out = tape.dropout(out, run.parts.dropout["residual"])
    tape.part = ""
    return out


def base_mlp(tape: Tape, shape: ModelShape, x: Tensor, own: bool) -> Tensor:
    """down(s(gate x) * up x), or down(s(up x))."""
    tokens, inner = tape.tokens, shape.inner
    if not shape.family.gated:
        hidden = tape.activation(tape.linear(x, shape.width, inner, own, shape.mlp_bias), shape.activation)
    else:
        if shape.family.fused:
            both = tape.linear(x, shape.width, 2 * inner, bias=shape.mlp_bias)
            gate, up = tape.view(both, tokens * inner), tape.view(both, tokens * inner)
        else:
            gate, up = (tape.linear(x, shape.width, inner, bias=shape.mlp_bias) for _ in range(2))
        hidden = tape.multiply(tape.activation(gate, shape.activation), up)
    return tape.linear(hidden, inner, shape.width, own, shape.mlp_bias)


def dlr_net(tape: Tape, shape: ModelShape, x: Tensor, ranks: tuple[int, ...], flat: bool = False) -> Tensor:
    """d_{k+1} = d_k + B_k s(A_k n(x + b d_k)), as modeling/dlr_net.py writes it; `flat`: each block reads x alone."""
    form, tokens, d = FORMS[shape.form], tape.tokens, None
    for rank in ranks:
        u = x if d is None or flat else tape.add(x, tape.scale(d))
        if form.norm:
            u = rms_divided(tape, u)
        hidden = tape.linear(u, shape.width, rank * (2 if form.gated else 1), bias=shape.mlp_bias)
        if form.gated:
            gate, up = tape.view(hidden, tokens * rank), tape.view(hidden, tokens * rank)
            hidden = tape.multiply(tape.activation(gate, shape.activation), up)
        else:
            hidden = tape.activation(hidden, shape.activation)
        out = tape.linear(hidden, rank, shape.width)
        d = out if d is None else tape.add(d, out)
    return d


def flat_error(tape: Tape, shape: ModelShape, x: Tensor, ranks: tuple[int, ...]) -> None:
    """The hardening term w max(0, t - e_flat) on a detached x (distil.py)."""
    detached = Tensor(x.elements, x.size, False, x.storage, x.compact)
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
    length = tape.new(tape.tokens, u.grad, FP32)
    if u.grad:
        tape.save(u)
        tape.save(length)
    return tape.multiply(u, tape.cast(tape.scale(length), u.size))


def attention(tape: Tape, run: Pass, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
    """Self-attention: maps, rotation, the products or the fused kernel, and the output map."""
    parts, width, own = run.parts, run.shape.width, run.shape.family.own_maps
    tape.part = "attention"
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
    return tape.linear(out, inner, width, own, parts.out_bias)


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
    part, tape.part = tape.part, "norm"
    y = (tape.layer_norm if parts.qk_norm == LAYER else tape.rms_norm)(x, parts.head_dim)
    tape.part = part
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
    weights = tape.dropout(weights, parts.dropout["attention"])
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
