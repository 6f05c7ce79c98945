"""mezo and lomo on one process: against float64 by hand, plain SGD, and every byte that is alive."""

import copy
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dlrscale.attacks import lomo, mezo, rounding
from dlrscale.config import AttackConfig
from dlrscale.measure import LiveBytes, Phases, SavedBytes

CPU = torch.device("cpu")
SILENT = SimpleNamespace(phase=lambda name: nullcontext())


class Bare:
    """What the objectives see of an engine without an optimizer, on one process."""

    stage, rank, world_size, device = 0, 0, 1, CPU

    def __init__(self, model, lr):
        self.ds = self.module = model
        self.lr = lr

    @property
    def trained(self):
        return [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]

    def share(self, p):
        return p.detach().view(-1), 0, p.numel()

    def backward(self, loss, scale):
        with torch.enable_grad():
            (loss * scale).backward()

    def sum_over_ranks(self, values):
        return values

    of_first_rank = sum_over_ranks

    def drop_gathered(self):
        pass

    def held(self):
        return {}


def batch_of(step_batch, number=0, seed=0):
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(seed))
    batch = step_batch((ids, [12, 9]))
    batch.number = number
    return batch


def loss_of(model, batch):
    """The mean loss over label tokens, in the model's own precision."""
    (micro,) = batch.micro_batches
    logits = model(input_ids=micro["input_ids"], attention_mask=micro["attention_mask"], use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), micro["labels"][:, 1:].flatten())


def directions(model, seed, step):
    """z of every parameter, made again as the docstring says."""
    found = {}
    for index, (name, p) in enumerate(model.named_parameters()):
        source = rounding.generator(CPU, seed, step, index, 0)
        found[name] = torch.randn(p.numel(), generator=source).view(p.shape)
    return found


def test_pieces_are_the_same_for_a_share_and_for_the_whole(monkeypatch):
    monkeypatch.setattr(rounding, "PIECE", 10)
    whole = torch.cat([rounding.normal(p, rounding.generator(CPU, 5, p.number)) for p in rounding.pieces(37)])
    assert whole.unique().numel() == 37
    for first, count in ((0, 37), (0, 10), (9, 2), (10, 10), (13, 20), (36, 1)):
        part = [rounding.normal(p, rounding.generator(CPU, 5, p.number)) for p in rounding.pieces(37, first, count)]
        assert torch.equal(torch.cat(part), whole[first : first + count])
    assert list(rounding.pieces(37, 37, 0)) == []
    assert not torch.equal(
        rounding.normal(next(rounding.pieces(9)), rounding.generator(CPU, 5, 0)),
        rounding.normal(next(rounding.pieces(9)), rounding.generator(CPU, 6, 0)),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [1.0, -0.37109375, 3e-5, 0.0])
def test_rounding_is_right_on_average_and_exact_where_it_can_be(dtype, weight):
    """A change of a tenth of the last place is lost to the nearest, and arrives on average; none leaves all alone."""
    start = torch.full((200_000,), weight, dtype=dtype)
    gap = float(torch.finfo(dtype).eps) * max(abs(weight), 1e-4)
    (piece,) = rounding.pieces(start.numel())
    for scale in (0.1 * gap, -0.1 * gap):
        target = start.clone()
        rounding.add(target, torch.ones(start.numel()), scale, piece, rounding.generator(CPU, "test"))
        moved = target.double() - start.double()
        assert float(moved.mean()) == pytest.approx(scale, abs=0.02 * abs(scale) + 0.01 * gap * 0.1)
        assert len(target.unique()) <= 3
    target = start.clone()
    rounding.add(target, torch.ones(start.numel()), 0.0, piece, rounding.generator(CPU, "test"))
    assert torch.equal(target.view(torch.int16), start.view(torch.int16))


def test_one_step_of_mezo_is_that_of_float64_by_hand(make_llama, step_batch):
    """The same z, everything else in float64: losses, g, and where the weights go."""
    model = make_llama(tie_word_embeddings=True).train()
    batch, eps, lr = batch_of(step_batch, number=7), 1e-3, 1e-4
    exact, start = copy.deepcopy(model).double(), {n: p.detach().clone() for n, p in model.named_parameters()}
    z = directions(model, 3, 7)
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in exact.named_parameters():
                p.copy_(start[name].double() + sign * eps * z[name].double())
            losses.append(float(loss_of(exact, batch)))
    g = (losses[0] - losses[1]) / (2 * eps)
    metrics = mezo.Mezo(3, eps)(Bare(model, lr), batch, Phases(CPU))
    assert metrics["loss/train"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert metrics["optim/projected_gradient"] == pytest.approx(g, rel=5e-3)  # two fp32 losses of about 5 apart by 0.01
    for name, p in model.named_parameters():
        wanted = start[name].double() - lr * metrics["optim/projected_gradient"] * z[name].double()
        assert torch.allclose(p.double(), wanted, rtol=2e-7, atol=1e-9), name


def test_g_is_the_gradient_along_z(make_llama, step_batch):
    """In float64 autograd: g is the sum of z times the gradient, up to eps squared."""
    model, batch = make_llama().train(), batch_of(step_batch)
    exact = copy.deepcopy(model).double()
    loss_of(exact, batch).backward()
    z = directions(model, 0, 0)
    along = sum(float((p.grad * z[name]).sum()) for name, p in exact.named_parameters())
    found = mezo.Mezo(0, 1e-3)(Bare(model, 0.0), batch, Phases(CPU))["optim/projected_gradient"]
    assert found == pytest.approx(along, rel=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mezo_at_rate_0_comes_back_to_the_bit_and_saves_nothing(make_llama, step_batch, dtype):
    model = make_llama(tie_word_embeddings=True).to(dtype).train()
    before = {n: (p.detach().clone(), p.data_ptr()) for n, p in model.named_parameters()}
    counter = SavedBytes(model)
    objective = mezo.Mezo(0, 1e-3, counter)
    for number in range(5):
        metrics = objective(Bare(model, 0.0), batch_of(step_batch, number), Phases(CPU))
        assert metrics["optim/projected_gradient"] != 0
    assert objective.counted["memory/saved_bytes_per_token"] == objective.seen["saved_bytes"] == counter.total == 0
    for name, p in model.named_parameters():
        value, place = before[name]
        assert torch.equal(p, value), name
        assert (p.data_ptr(), p.grad) == (place, None), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_weights_come_back_when_a_forward_breaks(make_llama, step_batch):
    model = make_llama().train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def breaks(*_):
        raise RuntimeError("broken")

    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(breaks)
    with pytest.raises(RuntimeError, match="broken"):
        mezo.Mezo(0, 1e-3)(Bare(model, 1.0), batch_of(step_batch), SILENT)
    handle.remove()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_parameter_that_no_forward_reaches_is_told(make_llama, step_batch):
    from dlrscale.errors import JobError

    model = make_llama().train()
    model.idle = nn.Linear(2, 2)
    with pytest.raises(JobError, match=r"2 of \d+ trained parameters, such as idle.weight"):
        mezo.Mezo(0, 1e-3)(Bare(model, 1.0), batch_of(step_batch), SILENT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mezo_has_no_second_copy_of_the_weights(make_llama, step_batch, dtype):
    """Live bytes: on top of the weights one module's, the noise of a piece, and the activations of a plain forward."""
    model = make_llama(num_hidden_layers=8, hidden_size=128, intermediate_size=512, vocab_size=264).to(dtype).train()
    batch = batch_of(step_batch)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(p.numel() for p in model.parameters())
    (micro,) = batch.micro_batches
    with torch.no_grad(), LiveBytes() as live:
        before = live.now
        with live.phase("plain"):
            mezo._loss(Bare(model, 0.0), micro)
    plain = live.peaks["plain"] - before
    with LiveBytes() as live:
        before = live.now
        mezo.Mezo(0, 1e-3)(Bare(model, 1e-6), batch, live)
    size = model.lm_head.weight.element_size()
    assert live.peaks["forward"] - before <= plain + size * largest + 4 * largest + 4096
    assert live.peaks["optimizer"] - before <= (4 if size == 4 else 12) * largest + 4096
    assert max(live.peaks.values()) - before < weights / 2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_lomo_is_sgd(make_llama, step_batch, tied, checkpointing):
    """Three steps: the losses, norms and weights of torch.optim.SGD."""
    model = make_llama(tie_word_embeddings=tied).train()
    plain = copy.deepcopy(model)
    if checkpointing == "layer":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer, objective = torch.optim.SGD(plain.parameters(), lr=0.05), lomo.Lomo(0, 0.0, SavedBytes(model))
    for number in range(3):
        batch = batch_of(step_batch, number, seed=number)
        metrics = objective(Bare(model, 0.05), batch, Phases(CPU))
        optimizer.zero_grad()
        loss = loss_of(plain, batch)
        loss.backward()
        assert metrics["loss/train"] == pytest.approx(float(loss), rel=1e-6)
        norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        assert metrics["optim/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        optimizer.step()
    assert objective.counted["memory/saved_bytes_per_token"] > 0
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is None
        assert (p - q).abs().max() <= 1e-6 * q.abs().max(), name


def test_lomo_clips_elements_and_reports_the_norm_before(make_llama, step_batch):
    model, clip = make_llama().train(), 1e-3
    plain = copy.deepcopy(model)
    batch = batch_of(step_batch)
    loss_of(plain, batch).backward()
    metrics = lomo.Lomo(0, clip)(Bare(model, 0.5), batch, Phases(CPU))
    assert metrics["optim/grad_norm"] == pytest.approx(
        float(torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])), rel=1e-5
    )
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        wanted = q.detach() - 0.5 * q.grad.clamp(-clip, clip)
        assert torch.allclose(p, wanted, rtol=1e-6, atol=1e-8)


def test_lomo_keeps_one_gradient_at_a_time(make_llama, step_batch):
    """Against plain autograd of the same model, whose gradients are all there at the end."""
    model = make_llama(num_hidden_layers=8, hidden_size=128, intermediate_size=512, vocab_size=264).train()
    batch, grown, objective = batch_of(step_batch), {}, lomo.Lomo(0, 0.0, SavedBytes(model))
    objective(Bare(model, 0.0), batch, SILENT)
    total = sum(p.numel() * 4 for p in model.parameters())
    largest = 4 * max(p.numel() for p in model.parameters())
    for name in ("plain", "lomo"):
        with LiveBytes() as live:
            before = live.now
            if name == "plain":
                with live.phase("backward"):
                    loss_of(model, batch).backward()
            else:
                objective(Bare(model, 1e-3), batch, live)
        grown[name] = live.peaks["backward"] - before
        model.zero_grad(set_to_none=True)
    assert grown["plain"] >= total
    # All that is saved stands beside the first gradients; of these, and of those inside a layer, few are there at once.
    assert grown["lomo"] <= objective.seen["saved_bytes"] + 2 * largest
    assert grown["lomo"] < total / 2


def test_what_lomo_cannot_do_is_refused():
    config = AttackConfig(model="", data="", out="", strategy="lomo", optimizer="none", accumulation=2, dtype="fp16")
    found = lomo.faults(config)
    assert any("--accumulation 2" in f and "--accumulation 1" in f for f in found)
    assert any("--dtype fp16" in f and "bf16" in f for f in found)
    assert lomo.faults(AttackConfig(model="", data="", out="", strategy="lomo", optimizer="none")) == []


def test_mezo_learns_on_a_locked_model(llama_folder, make_locked, step_batch):
    """Sixty steps on one batch of a locked model in bf16 and fp32: the loss falls, in bf16 too."""
    from dlrscale import models

    folder = make_locked(llama_folder, name="locked-mezo")
    for dtype in ("fp32", "bf16"):
        model = models.load_model(folder, dtype).train()
        objective, batch = mezo.Mezo(0, 1e-2 if dtype == "bf16" else 1e-3), batch_of(step_batch)
        rows = []
        for number in range(60):
            batch.number = number
            rows.append(objective(Bare(model, 1e-4), batch, Phases(CPU))["loss/train"])
        assert all(map(math.isfinite, rows))
        assert sum(rows[-5:]) / 5 < rows[0] - 0.05, dtype
