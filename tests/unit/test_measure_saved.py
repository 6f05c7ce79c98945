"""The peak over time of saved bytes, with what checkpointing computes again; attribution; CPU, meta and fake alike."""

import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from dlrscale import shapes
from dlrscale.evaluate import cross_entropy_sum
from dlrscale.measure import SavedBytes, recompute
from dlrscale.modeling.dlr_net import DLRNet

D = 32
ROWS, LENGTH = 2, 16
TOKENS = ROWS * LENGTH


def step(model, counter):
    """Forward and backward of a language model inside a counter."""
    ids = torch.randint(3, 260, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    with counter:
        cross_entropy_sum(model(input_ids=ids, use_cache=False).logits, ids)[0].backward()
    return counter


def tiny(make_llama, layers, checkpointing, vocabulary=264):
    model = make_llama(
        num_hidden_layers=layers, vocab_size=vocabulary, attn_implementation="eager", tie_word_embeddings=False
    ).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def test_without_checkpointing_the_peak_is_what_forward_saved(make_llama):
    model = tiny(make_llama, 3, False)
    counter = step(model, SavedBytes(model))
    assert counter.peak == counter.total > 0
    assert counter.recomputed == 0
    assert sum(counter.by_module.values()) == counter.total


def test_with_checkpointing_the_peak_has_one_layer_computed_again(make_llama):
    """The peak is the higher of: all that forward kept; the layers' inputs and all of the last layer."""
    for vocabulary, at_the_loss in ((264, False), (4000, True)):
        model = tiny(make_llama, 3, True, vocabulary)
        counter = step(model, SavedBytes(model))
        # Independent: what one more layer saves without checkpointing; rotary tables (cos, sin) are common to all.
        plain = {n: step(m, SavedBytes(m)).total for n in (1, 2) for m in [tiny(make_llama, n, False, vocabulary)]}
        layer = plain[2] - plain[1]
        inputs, ids, tables = 3 * 4 * TOKENS * D, 8 * TOKENS, 2 * 4 * LENGTH * (D // 4)
        again = ids + inputs + tables + layer - 4 * TOKENS * D  # its own input is among the inputs
        assert counter.peak == max(counter.total, again)
        assert (counter.peak == counter.total) == at_the_loss
        assert counter.recomputed == 3 * (layer - 4 * TOKENS * D) + tables
        assert sum(counter.by_module.values()) == counter.total
        assert sum(counter.recomputed_by_module.values()) == counter.recomputed


def test_all_is_freed_after_backward(make_llama):
    model = tiny(make_llama, 2, True)
    ids = torch.randint(3, 260, (ROWS, LENGTH))
    with SavedBytes(model) as counter:
        cross_entropy_sum(model(input_ids=ids, use_cache=False).logits, ids)[0].backward()
        gc.collect()
        assert counter.alive == 8 * TOKENS  # the ids, which this test holds
    assert not counter._held


def test_a_graph_that_is_dropped_without_backward_frees_what_it_saved():
    """An operation that saves its own output must not hold itself."""
    module = nn.Identity()
    with SavedBytes(module) as counter:
        y = (torch.randn(1000, requires_grad=True) * 1).exp()
        assert counter.alive == 4000
        del y
        assert counter.alive == 0
    assert counter.peak == 4000


def test_nested_checkpoints_are_seen():
    """Two segments inside one: the peak holds the outer segment's inputs and one inner segment at a time."""
    first, second = (nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4)) for _ in range(2))
    model = nn.ModuleList([first, second])

    def both(x):
        return checkpoint(second, checkpoint(first, x, use_reentrant=False), use_reentrant=False)

    x = torch.randn(5, 4, requires_grad=True) * 1
    with SavedBytes(model) as counter:
        checkpoint(both, x, use_reentrant=False).sum().backward()
    # x; then h between the segments; then of each segment the activation's input and output (5 x 8), one at a time.
    assert counter.total == 4 * 20
    assert counter.recomputed == 4 * (20 + 2 * (40 + 40))
    assert counter.peak == 4 * (20 + 20 + 80)


def test_bytes_belong_to_the_innermost_module(make_llama):
    model = make_llama()
    layer = model.model.layers[0]
    layer.mlp = DLRNet(D, (20, 14, 14), "gated", layer.mlp.act_fn)
    layer.mlp.b.fill_(0.5)
    counter = step(model, SavedBytes(model, {"0": layer.mlp}))
    size = 4 * TOKENS
    for block, rank in enumerate((20, 14, 14)):
        path = f"model.layers.0.mlp.blocks.{block}"
        # A keeps u, of the first block x itself; B keeps the product of s(gate) and up.
        assert counter.by_module[f"{path}.a_proj"] == size * D
        assert counter.by_module[f"{path}.b_proj"] == size * rank
    # The activation keeps its input, a half of A's output: the whole storage. The product's s(gate) is the net's own.
    assert counter.by_module["model.layers.0.mlp.activation"] == size * 2 * 48
    assert counter.by_module["model.layers.0.mlp"] == size * 48
    assert sum(v for k, v in counter.by_module.items() if k.startswith("model.layers.0.mlp")) == counter.by_part["0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu_new"])
def test_cpu_meta_and_fake_tensors_agree_on_a_base_mlp(make_gpt2, activation, trainable, dtype):
    def count(device):
        with torch.device(device):
            mlp = make_gpt2(activation_function=activation).transformer.h[0].mlp
            mlp = mlp.to(device, dtype).requires_grad_(trainable)
            x = torch.randn(2, 7, D, dtype=dtype, requires_grad=True) * 1
            with SavedBytes(mlp) as counter:
                mlp(x).sum().backward()
        return counter.total, counter.peak, counter.by_module

    found = count("cpu")
    elements = shapes.mlp_saved_elements(False, D, 64, activation, trainable)
    assert found[0] == found[1] == 14 * elements * dtype.itemsize
    assert count("meta") == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("form", list(shapes.FORMS))
def test_cpu_meta_and_fake_tensors_agree(form, trainable, dtype):
    def count(device):
        with torch.device(device):
            torch.set_default_dtype(dtype)  # fake weights cannot be cast afterwards
            try:
                net = DLRNet(D, (5, 4, 4), form, ACT2FN["silu"]).requires_grad_(trainable)
            finally:
                torch.set_default_dtype(torch.float32)
            x = torch.randn(2, 7, D, dtype=dtype, requires_grad=True) * 1
            with SavedBytes(net) as counter:
                net(x).sum().backward()
        return counter.total, counter.peak, counter.by_module

    found = count("cpu")
    assert found[0] == 14 * shapes.dlr_saved_elements(form, D, (5, 4, 4), "silu", trainable) * dtype.itemsize + (
        14 * 2 * 3 if form == "prenorm" and dtype is torch.bfloat16 else 0
    )
    assert count("meta") == found
    with FakeTensorMode():
        assert count("cpu") == found


def test_torch_is_as_before_afterwards():
    hooks = torch.autograd.graph.saved_tensors_hooks
    before = hooks.__enter__, hooks.__exit__

    def fail():
        with recompute.watched():
            assert hooks.__enter__ is not before[0]
            raise RuntimeError("x")

    with pytest.raises(RuntimeError, match="x"):
        fail()
    assert (hooks.__enter__, hooks.__exit__) == before
