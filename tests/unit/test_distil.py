"""Distillation, hardening and heal against the design's formulas, in float64 and without DeepSpeed."""

import copy
import weakref

import pytest
import torch
from torch.nn import functional as F

from dlrscale import distil, shapes, surgery
from dlrscale.measure import Phases

PHASES = Phases(torch.device("cpu"))
FLOOR = {0: 0.3, 1: 0.7}
TARGET, WEIGHT = 1.0, 0.5


def ids(rows=2, length=7, seed=3):
    return torch.randint(3, 260, (rows, length), generator=torch.Generator().manual_seed(seed))


def distiller_of(base, lock_config, perturb=0.02, **changes):
    """A distiller on a copy of the base, whose students differ from their MLPs by coupling and noise."""
    model = copy.deepcopy(base)
    shape = shapes.model_shape(model.config.to_dict())
    changes = {"form": "gated" if shape.family.gated else "plain", "harden_weight": WEIGHT} | changes
    config = lock_config(**changes)
    made = distil.Distiller(surgery.install(model, shape, config), config, floors=FLOOR)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for switch in made.switches:
            switch.net.b.fill_(0.6)
            for parameter in switch.net.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * perturb)
    return model, made


def teacher_pairs(base, inputs, mask):
    """x and y of every MLP of the base model, in float64."""
    model = copy.deepcopy(base).double()
    path = shapes.find_family(model.config.to_dict()).mlp
    pairs = {}
    for layer in range(2):
        model.get_submodule(path.format(layer)).register_forward_hook(
            lambda module, args, out, layer=layer: pairs.update({layer: (args[0], out)})
        )
    with torch.no_grad():
        model(input_ids=inputs, attention_mask=mask)
    return pairs


def activation_of(model):
    gated = shapes.find_family(model.config.to_dict()).gated
    return F.silu if gated else (lambda v: F.gelu(v, approximate="tanh"))


def errors(reference_net, net, state, x, y, floor, activation):
    """e and e_flat per token: ||student(x) - y||^2 / (||y||^2 + f)."""
    coupled = reference_net(state, net.form, x, activation)
    flat = reference_net({**state, "b": torch.zeros(())}, net.form, x, activation)
    scale = y.square().sum(-1) + floor
    return tuple((v - y).square().sum(-1) / scale for v in (coupled, flat))


@pytest.fixture(params=["llama", "gpt2"])
def base(request, make_llama, make_gpt2):
    return make_llama() if request.param == "llama" else make_gpt2()


def reference_distil(base, made, batch, reference_net, harden):
    """The design's loss over all real tokens and layers, and its gradients by switch layer and parameter."""
    total, error_total, gradients = 0.0, 0.0, {}
    for switch in made.switches:
        state = {k: v.detach().double().requires_grad_(k != "b") for k, v in switch.net.state_dict().items()}
        loss = torch.zeros((), dtype=torch.float64)
        for micro in batch.micro_batches:
            x, y = teacher_pairs(base, micro["input_ids"], micro["attention_mask"])[switch.layer]
            real = micro["attention_mask"].bool()
            floor = FLOOR[switch.layer]
            e, flat = errors(reference_net, switch.net, state, x[real], y[real], floor, activation_of(base))
            error_total += float(e.detach().sum())
            loss = loss + (e + WEIGHT * (TARGET - flat).clamp_min(0) if harden else e).sum()
        (loss / batch.tokens).backward()
        total += float(loss.detach())
        gradients[switch.layer] = {k: v.grad for k, v in state.items() if k != "b"}
    count = batch.tokens * len(made.switches)
    return total / count, error_total / count, gradients


@pytest.mark.parametrize("harden", [True, False])
def test_distil_step_is_the_formula(base, lock_config, fake_engine, step_batch, reference_net, harden):
    """Two micro-batches with padding; `tokens` counts the real ones alone."""
    batch = step_batch((ids(), [7, 4]), (ids(seed=4), [2, 6]))
    assert batch.tokens == 19
    model, made = distiller_of(base, lock_config, harden=harden)
    engine = fake_engine(model, accumulation=2)
    found = made.distil_step(engine, batch, PHASES)
    loss, error, gradients = reference_distil(base, made, batch, reference_net, harden)
    assert found["loss/train"] == pytest.approx(loss, rel=1e-4)
    assert found["lock/error_mean"] == pytest.approx(error, rel=1e-4)
    if harden:
        assert loss > error + 1e-3  # hardening is active here
    paths = {s.layer: next(n for n, m in model.named_modules() if m is s.net) for s in made.switches}
    assert len(engine.gradients) == sum(len(g) for g in gradients.values())
    for layer, expected in gradients.items():
        for name, gradient in expected.items():
            got = engine.gradients[f"{paths[layer]}.{name}"].double()
            assert (got - gradient).norm() <= 2e-4 * gradient.norm() + 1e-7, (layer, name)


def test_padding_does_not_count(make_llama, lock_config, fake_engine, step_batch):
    base, results = make_llama(), []
    for pad in (2, 77):
        inputs = ids()
        inputs[1, 4:] = pad
        model, made = distiller_of(base, lock_config)
        engine = fake_engine(model)
        found = made.distil_step(engine, step_batch((inputs, [7, 4])), PHASES)
        results.append((found["loss/train"], engine.gradients))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-4, atol=1e-6)


def test_the_split_into_micro_batches_changes_nothing(make_llama, lock_config, fake_engine, step_batch):
    base, rows, lengths = make_llama(), ids(rows=4), [7, 3, 5, 1]
    results = []
    for parts in (((rows, lengths),), tuple((rows[i : i + 2], lengths[i : i + 2]) for i in (0, 2))):
        model, made = distiller_of(base, lock_config)
        engine = fake_engine(model, accumulation=len(parts))
        results.append((made.distil_step(engine, step_batch(*parts), PHASES)["loss/train"], engine.gradients))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-4, atol=1e-6)


def test_stage_zero_marks_the_last_backward_alone(make_llama, lock_config, fake_engine, step_batch):
    model, made = distiller_of(make_llama(), lock_config)
    engine = fake_engine(model, accumulation=2)
    engine.stage = 0
    made.distil_step(engine, step_batch((ids(), [7, 7]), (ids(seed=4), [7, 7])), PHASES)
    assert engine.boundaries == [False, False, False, True]


class LiveBytes:
    """Bytes that saved tensors hold at any moment, and the most that they ever did; parameters left out."""

    def __init__(self, model):
        self.static = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.count, self.live, self.peak, self.total = {}, 0, 0, 0

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.static:
            return tensor
        holder = Holder(tensor)
        self.count[key] = self.count.get(key, 0) + 1
        if self.count[key] == 1:
            self.live += storage.nbytes()
            self.total += storage.nbytes()
            self.peak = max(self.peak, self.live)
        weakref.finalize(holder, self.release, key, storage.nbytes())
        return holder

    def release(self, key, size):
        self.count[key] -= 1
        if not self.count[key]:
            self.live -= size

    @staticmethod
    def unpack(held):
        return held.tensor if isinstance(held, Holder) else held


class Holder:
    def __init__(self, tensor):
        self.tensor = tensor


def test_peak_saved_bytes_do_not_grow_with_the_number_of_layers(make_llama, lock_config, fake_engine, step_batch):
    found = {}
    for layers in (2, 6):
        model, made = distiller_of(make_llama(num_hidden_layers=layers), lock_config)
        made.floors = dict.fromkeys(range(layers), 0.5)
        live = LiveBytes(model)
        with torch.autograd.graph.saved_tensors_hooks(live.pack, live.unpack):
            made.distil_step(fake_engine(model), step_batch((ids(), [7, 7])), PHASES)
        assert live.live == 0
        found[layers] = live
    assert found[6].total == 3 * found[2].total > 0
    assert found[6].peak == found[2].peak
    # One layer's worth: no more than the whole step of two layers saves per layer.
    assert found[2].peak <= found[2].total / 2


@pytest.mark.parametrize("harden", [True, False])
def test_heal_step_is_the_formula(base, lock_config, fake_engine, step_batch, reference_net, harden):
    """KL(teacher || student) on the logits; hardening against the student's own output at w / 10."""
    batch = step_batch((ids(), [7, 4]), (ids(seed=4), [2, 6]))
    model, made = distiller_of(base, lock_config, harden=harden)
    engine = fake_engine(model, accumulation=2)
    found = made.heal_step(engine, batch, PHASES)

    wide = copy.deepcopy(model).double()
    switches = [m for m in wide.modules() if isinstance(m, surgery.Switch)]
    teacher = copy.deepcopy(base).double()
    divergence = penalty = torch.zeros((), dtype=torch.float64)
    for micro in batch.micro_batches:
        seen = {}
        real = micro["attention_mask"].bool()
        inputs = {"input_ids": micro["input_ids"], "attention_mask": micro["attention_mask"]}
        visit = lambda s, x, y, seen=seen: seen.update({s.layer: (s, x.detach(), y.detach())})  # noqa: E731
        with surgery.mode(switches, "student", visit):
            student = wide(**inputs).logits[real]
        with torch.no_grad():
            target = teacher(**inputs).logits[real]
        p = target.softmax(-1)
        divergence = divergence + (p * (target.log_softmax(-1) - student.log_softmax(-1))).sum()
        for switch, x, y in seen.values():
            x, y = x[real], y[real]
            # The gradient of the hardening flows through the flat student alone.
            out = wide_flat(switch.net, x)
            e = (out - y).square().sum(-1) / (y.square().sum(-1) + FLOOR[switch.layer])
            penalty = penalty + (TARGET - e).clamp_min(0).sum()
    loss = divergence + (0.1 * WEIGHT * penalty if harden else 0.0)
    (loss / batch.tokens).backward()
    assert found["lock/kl"] == pytest.approx(float(divergence.detach()) / batch.tokens, rel=1e-3)
    assert found["loss/train"] == pytest.approx(float(loss.detach()) / batch.tokens, rel=1e-3)
    if harden:
        assert float(penalty.detach()) > 1
    expected = {n: p.grad for n, p in wide.named_parameters() if p.grad is not None}
    assert set(engine.gradients) == set(expected)
    assert all(".net." in name for name in expected)
    for name, gradient in expected.items():
        assert (engine.gradients[name].double() - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7, name
    assert engine.boundaries == [False, True]


def wide_flat(net, x):
    """The sum of blocks that all read x, with autograd, from the net's own float64 parameters."""
    out = 0
    for block in net.blocks:
        hidden = F.linear(x, block.a_proj.weight, block.a_proj.bias)
        if net.form == "gated":
            gate, up = hidden.chunk(2, -1)
            inner = F.silu(gate) * up
        else:
            inner = F.gelu(hidden, approximate="tanh")
        out = out + F.linear(inner, block.b_proj.weight)
    return out if net.bias is None else out + net.bias


def test_token_error_by_hand():
    student, target = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert distil.token_error(student, target, 3.0).tolist() == pytest.approx([4 / (1 + 3), 25 / (25 + 3)])
    assert distil.token_error(student.bfloat16(), target.bfloat16(), 3.0).dtype == torch.float32


def test_calibrate_sets_the_medians(base, lock_config, fake_engine):
    """b = g median(||x|| / ||y||), f = median(||y||^2), over the real tokens of the calibration set."""
    model, made = distiller_of(base, lock_config, coupling=0.25)
    made.floors = {}
    batches = [{"input_ids": ids(1, n, seed=n), "attention_mask": torch.ones(1, n, dtype=torch.long)} for n in (7, 4)]
    batches[1]["attention_mask"][0, 3] = 0
    found = made.calibrate(fake_engine(model), batches)
    for layer in (0, 1):
        xs, ys = [], []
        for batch in batches:
            x, y = teacher_pairs(base, batch["input_ids"], batch["attention_mask"])[layer]
            real = batch["attention_mask"].bool()
            xs.append(x[real]), ys.append(y[real])
        x, y = torch.cat(xs).norm(dim=-1), torch.cat(ys).norm(dim=-1)
        # The median of an even number of tokens is torch's, the lower of the two in the middle.
        ratio, square = sorted((x / y).tolist())[4], sorted(y.square().tolist())[4]
        assert found[layer] == pytest.approx(0.25 * ratio, rel=2**-8)
        assert made.floors[layer] == pytest.approx(square, rel=1e-5)
        assert float(made.switches[layer].net.b) == found[layer]


def test_weights_are_a_copy(make_llama, lock_config, fake_engine):
    import contextlib

    model, made = distiller_of(make_llama(), lock_config)
    engine = fake_engine(model)
    engine.gathered = lambda parameters: contextlib.nullcontext()
    taken = made.weights(engine)
    assert set(taken) == {0, 1}
    assert set(taken[0]) == set(made.switches[0].net.state_dict())
    taken[0]["b"].fill_(9)
    assert float(made.switches[0].net.b) != 9
