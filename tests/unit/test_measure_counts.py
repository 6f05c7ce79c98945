"""FLOPs and live bytes against hand counts; inference in turns."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dlrscale.data import Batches, token_data
from dlrscale.measure import Flops, LiveBytes, flops, speeds
from dlrscale.measure.inference import spread, weight_bytes

T, D, F = 6, 8, 20


def passes(model, x, checkpointed=False, frozen=False):
    model.requires_grad_(not frozen)
    counted = Flops()
    with counted.forward_pass():
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
    with counted.backward_pass():
        y.sum().backward()
    return counted


def test_flops_of_two_matrices_by_hand():
    """2 m n k a product; going back one product for x and one for each trained weight."""
    model = nn.Sequential(nn.Linear(D, F), nn.SiLU(), nn.Linear(F, D))
    x = torch.randn(T, D, requires_grad=True)
    forward = 2 * 2 * T * D * F
    plain, again, frozen = passes(model, x), passes(model, x, checkpointed=True), passes(model, x, frozen=True)
    assert (plain.forward, plain.backward, plain.recompute) == (forward, 2 * forward, 0)
    # The last linear's product is not run again: all that it saved is there by then.
    assert (again.forward, again.backward) == (forward, 2 * forward)
    assert again.recompute == forward // 2
    assert (frozen.forward, frozen.backward) == (forward, forward)


def test_flops_of_nested_checkpoints_count_once():
    """An inner segment runs again inside the outer one's second run, and once more by itself."""
    inner = nn.Sequential(nn.Linear(D, F, bias=False), nn.SiLU(), nn.Linear(F, D, bias=False), nn.SiLU())
    x = torch.randn(T, D, requires_grad=True)
    counted = Flops()
    with counted.forward_pass():
        y = checkpoint(lambda h: checkpoint(inner, h, use_reentrant=False).sin(), x, use_reentrant=False)
    with counted.backward_pass():
        y.sum().backward()
    forward = 2 * 2 * T * D * F
    assert counted.forward == forward
    assert counted.backward == 2 * forward
    assert counted.recompute == 2 * forward


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_counts_the_same_whatever_kernel_runs(make_llama, implementation):
    """The whole model by hand: the full square of positions, forward once and backward twice."""
    model = make_llama(attn_implementation=implementation, num_key_value_heads=4).train()
    ids = torch.randint(3, 260, (2, 10))
    counted = Flops()
    with counted.forward_pass():
        logits = model(input_ids=ids, use_cache=False).logits
    with counted.backward_pass():
        logits.sum().backward()
    tokens, width, inner, vocabulary, layers = 20, 32, 48, 264, 2
    products = 2 * tokens * (4 * width * width + 3 * width * inner)
    square = 2 * 2 * 2 * 10 * 10 * width
    head = 2 * tokens * width * vocabulary
    rotary = counted.forward - layers * (products + square) - head
    assert 0 <= rotary <= 2 * 10 * 4 * 2  # the angles: positions by frequencies, no gradient
    assert counted.backward == 2 * (layers * (products + square) + head)


def test_no_mfu_without_a_known_peak(monkeypatch):
    counted = Flops()
    counted.forward, counted.backward, counted.recompute = 200, 400, 10**9
    assert counted.mfu(1.0, torch.device("cpu"), "bf16") is None
    monkeypatch.setattr(flops, "peak_flops", lambda device: 1200.0)
    assert counted.mfu(0.5, torch.device("cuda"), "bf16") == 1.0
    assert counted.mfu(0.5, torch.device("cuda"), "fp32") is None


def test_live_bytes_by_hand():
    """Each phase has its own peak: what lives at its start, and the most that lives at once inside."""
    weight = torch.randn(100, requires_grad=True)
    with LiveBytes([weight]) as live:
        assert live.now == 400
        with live.phase("forward"):
            y = weight * 2  # 400
            z = y.exp()  # 400, saved for backward
            del y
            loss = z.sum()  # 4
            del z
        assert live.now == 400 + 400 + 4
        with live.phase("backward"):
            loss.backward()
        del loss
        assert live.now == 400 + 400  # the gradient
        with live.phase("optimizer"), torch.no_grad():
            state = torch.zeros(1000)
            weight.add_(weight.grad)
    assert live.peaks["forward"] == 400 + 400 + 400
    # Beside the weight, exp's output, the loss and its gradient: exp's gradient.
    assert live.peaks["backward"] == 400 + 400 + 4 + 4 + 400
    assert live.peaks["optimizer"] == 400 + 400 + 4000
    assert state.numel() == 1000


def test_live_bytes_know_tensors_from_before_and_resized_ones():
    held = torch.empty(5000)
    with LiveBytes() as live:
        start = live.now
        held.untyped_storage().resize_(0)
        assert live.now == start - 20000
        held.untyped_storage().resize_(20000)
        assert live.now == start
    before = torch.UntypedStorage.resize_
    assert before.__name__ == "resize_"
    assert torch._C._len_torch_dispatch_stack() == 0


def test_models_take_turns_in_inference(make_llama, monkeypatch):
    from dlrscale.measure import inference

    calls = []
    monkeypatch.setattr(
        inference, "once", lambda model, ids, new: calls.append((model, len(ids))) or (0.5 * len(calls), 0.001)
    )
    base, locked = make_llama(), make_llama(seed=1)
    found = speeds({"base": base, "locked": locked}, [1, 3], 264, 8, 4, 3, torch.device("cpu"))
    sides = ["B" if model is base else "L" for model, _ in calls]
    assert "".join(sides) == "LBBLLBBL" * 2
    assert [rows for _, rows in calls] == [1] * 8 + [3] * 8
    # The warm-up of each size is left out: base's calls 3, 6, 7 of the first size took 1.5, 3 and 3.5 s.
    assert found["base"]["inference/prefill_tokens_per_s_b1"] == 8 / 3.0
    assert found["base"]["inference/decode_ms_per_token_b1"] == 1.0
    assert found["base"]["inference/decode_ms_per_token_iqr_b1"] == 0.0


def test_prefill_and_decode_are_those_of_generation(make_llama):
    """The cache is used: each decoded step gets one token, and greedy generation gives the same ones."""
    model, ids = make_llama(), torch.randint(3, 260, (2, 9))
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["input_ids"].clone()), with_kwargs=True
    )
    from dlrscale.measure.inference import once

    prefill, decode = once(model, ids, 4)
    handle.remove()
    assert prefill > 0
    assert decode > 0
    assert [tuple(x.shape) for x in seen] == [(2, 9)] + [(2, 1)] * 4
    made = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=2)[:, 9:]
    assert torch.equal(torch.cat(seen[1:], 1), made)


def test_spread_and_weight_bytes(make_llama):
    assert spread([5.0]) == 0.0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    model = make_llama()
    assert weight_bytes(model) == 4 * sum(p.numel() for p in model.parameters())


def test_tokens_of_padded_records(monkeypatch):
    """C09: records of 10 and 90 tokens by turns, micro-batches of 2, 4 of them, 2 ranks: 800 real, 1,440 processed."""
    ids = [np.arange(90 if i % 2 else 10) for i in range(16)]
    train = token_data(ids, ids, packed=False, counts={})
    monkeypatch.setattr(Batches, "items", lambda self, k: np.arange(16).reshape(4, 2, 2))
    for rank in (0, 1):
        plan = Batches(train, seed=0, micro_batch=2, accumulation=4, rank=rank, world_size=2, pad_id=0)
        step = plan.step(0)
        assert (step.tokens, step.processed_tokens, step.label_tokens) == (800, 1440, 800 - 16)
        assert sum(micro["input_ids"].numel() for micro in step.micro_batches) == 720
