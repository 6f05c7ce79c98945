"""Saved bytes against hand counts, and peaks and seconds of phases."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from dlrscale import shapes
from dlrscale.measure import Phases, SavedBytes
from dlrscale.measure import phases as phases_file
from dlrscale.modeling.dlr_net import DLRNet

D, RANKS = 16, (5, 4, 4)
K, S, TOKENS = 3, 13, 14
F = 24

# Elements per token, counted by hand from the operations' backward formulas. `inner` is S, or F of a base MLP.
# A linear saves its input if its weight is trained; a product saves both factors; an activation saves
#   silu, gelu: its input; relu: its output; gelu_new: x/2, tanh's output, 1 + tanh and x (of pow), four in all.
# Two matrices: x -> A -> s -> B. What s saves, and B's input (which for relu is the saved output itself).
TWO = {"silu": (1, 1), "gelu": (1, 1), "gelu_pytorch_tanh": (1, 1), "relu": (0, 1), "gelu_new": (4, 4)}
# Gated with separate matrices: what s saves, s(gate) and up for the product; relu's output is s(gate).
GATED = {"silu": 3, "gelu": 3, "gelu_pytorch_tanh": 3, "relu": 2, "gelu_new": 6}
# Fused: up is a view of the (2R) output of A, whose storage counts once and whole, gate with it: silu and gelu_new's
# x cost nothing more; relu's output is the factor, but the fused storage still holds its input.
FUSED = {"silu": 3, "gelu": 3, "gelu_pytorch_tanh": 3, "relu": 3, "gelu_new": 6}
ACTIVATIONS = list(TWO)


def by_hand_mlp(gated, activation, trainable):
    own = GATED[activation] if gated else TWO[activation][0 if trainable else 1]
    return D + (1 + own) * F if trainable else own * F


def by_hand_net(form, activation, trainable):
    own = FUSED[activation] if form == "gated" else TWO[activation][0 if trainable else 1]
    elements = (K * D + (1 + own) * S) if trainable else own * S
    # The norm keeps u, the token's norm and the divisor. With trained factors A's input n(u) is another D.
    return elements + K * (D + 2) if form == "prenorm" else elements


class MLP(nn.Module):
    """A base MLP of either kind, as Llama and GPT-2 write it."""

    def __init__(self, gated, activation, bias=False):
        super().__init__()
        self.gate = nn.Linear(D, F, bias=bias) if gated else None
        self.up, self.down, self.act = nn.Linear(D, F, bias=bias), nn.Linear(F, D, bias=bias), activation

    def forward(self, x):
        up = self.up(x)
        return self.down(self.act(self.gate(x)) * up if self.gate else self.act(up))


def count(module, dtype, trainable):
    """Bytes per token that one forward of a module saves; x comes from elsewhere and needs a gradient."""
    module = module.to(dtype).requires_grad_(trainable)
    source = torch.randn(2, TOKENS // 2, D, dtype=dtype, requires_grad=True)
    with SavedBytes(module) as counter:
        module(source * 1)
    return counter.total / TOKENS


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", list(shapes.FORMS))
def test_saved_bytes_of_a_dlr_net(form, bias, activation, trainable):
    net = DLRNet(D, RANKS, form, ACT2FN[activation], bias=bias)
    with torch.no_grad():
        net.b.fill_(0.5)
    elements = by_hand_net(form, activation, trainable)
    assert shapes.dlr_saved_elements(form, D, RANKS, activation, trainable) == elements
    assert count(net, torch.float32, trainable) == 4 * elements
    # bf16: two bytes an element, but the norm of a token is kept in fp32: two bytes more per block and token.
    assert count(net, torch.bfloat16, trainable) == 2 * elements + (2 * K if form == "prenorm" else 0)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_saved_bytes_of_a_base_mlp(gated, activation, trainable):
    elements = by_hand_mlp(gated, activation, trainable)
    assert shapes.mlp_saved_elements(gated, D, F, activation, trainable) == elements
    for bias in (False, True):
        for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
            assert count(MLP(gated, ACT2FN[activation], bias), dtype, trainable) == size * elements


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_bytes_of_the_real_mlps(make_llama, make_gpt2, family, trainable):
    model = make_llama() if family == "llama" else make_gpt2()
    shape = shapes.model_shape(model.config.to_dict())
    mlp = (model.model.layers if family == "llama" else model.transformer.h)[0].mlp.requires_grad_(trainable)
    source = torch.randn(2, 7, shape.width, requires_grad=True)
    with SavedBytes(mlp) as counter:
        mlp(source * 1)
    assert counter.total == 14 * shapes.saved_bytes(shape, 0, 4, trainable)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", list(shapes.FORMS))
def test_saved_bytes_of_a_layer_by_formula(make_llama, form, dtype):
    """`saved_bytes` knows which layers are locked, the precision, and what prenorm keeps in fp32."""
    shape = shapes.model_shape(make_llama().config.to_dict())
    locked = dataclasses.replace(shape, width=D, inner=F, form=form, ranks={1: RANKS})
    size = dtype.itemsize
    for trainable in (True, False):
        net = DLRNet(D, RANKS, form, nn.SiLU())
        assert shapes.saved_bytes(locked, 1, size, trainable) == count(net, dtype, trainable)
        assert shapes.saved_bytes(locked, 0, size, trainable) == count(MLP(True, nn.SiLU()), dtype, trainable)


@pytest.mark.parametrize("pdrop", [0.0, 0.1])
def test_saved_bytes_of_a_gpt2_mlp_in_training(make_gpt2, pdrop):
    """Dropout keeps its mask besides, for the base MLP and for the DLR-Net."""
    model = make_gpt2(resid_pdrop=pdrop).train()
    shape = shapes.model_shape(model.config.to_dict())
    mlp = model.transformer.h[0].mlp
    net = DLRNet(32, (22, 21, 21), "plain", mlp.act, bias=True, dropout=pdrop).train()
    formulas = (
        shapes.mlp_saved_elements(False, 32, 64, "gelu_new"),
        shapes.dlr_saved_elements("plain", 32, (22, 21, 21), "gelu_new"),
    )
    assert shape.dropout == pdrop
    for module, elements in zip((mlp, net), formulas, strict=True):
        with SavedBytes(module) as counter:
            module(torch.randn(2, 7, 32, requires_grad=True) * 1)
        # The CPU's dropout multiplies with a mask in the output's own precision, D per token.
        assert counter.total == 4 * 14 * (elements + (32 if pdrop else 0))


def test_one_storage_counts_once_and_parameters_do_not():
    module = nn.Linear(4, 4, bias=False)
    x = torch.randn(3, 4, requires_grad=True) * 1
    with SavedBytes(module) as counter:
        y = module(x)  # saves x; the weight is a parameter
        y = y * x  # saves y and x again
        y[:, :2].sin().sum()  # saves a view: the storage of y * x, whole
    assert counter.total == 4 * (12 + 12 + 12)


def test_buffers_do_not_count():
    module = nn.Module()
    module.register_buffer("scale", torch.ones(3, 4))
    with SavedBytes(module) as counter:
        torch.randn(3, 4, requires_grad=True) * module.scale
    assert counter.total == 0


def test_a_freed_address_that_is_used_again_still_counts():
    module = nn.Identity()
    with SavedBytes(module) as counter:
        for _ in range(20):
            (torch.randn(1000, requires_grad=True) * 1).sin()
    assert counter.total == 20 * 4000


def whole(model, parts=None, length=16):
    """Count a forward of a causal language model without its loss."""
    inputs = torch.randint(3, 260, (2, length), generator=torch.Generator().manual_seed(0))
    with SavedBytes(model, parts) as counter:
        model(input_ids=inputs, use_cache=False)
    return counter


def test_by_part_is_the_share_of_each_mlp(make_llama):
    model = make_llama()
    parts = {str(i): layer.mlp for i, layer in enumerate(model.model.layers)}
    counter = whole(model, parts)
    # The MLP's input is the output of the norm before it, which nobody else saves: D + 4F a layer.
    assert counter.by_part == {"0": 4 * 32 * (32 + 4 * 48), "1": 4 * 32 * (32 + 4 * 48)}
    assert counter.total > sum(counter.by_part.values())
    assert whole(model).total == counter.total


def test_by_part_of_a_locked_model(make_llama):
    model = make_llama()
    net = DLRNet(32, (20, 14, 14), "gated", model.model.layers[1].mlp.act_fn)
    model.model.layers[1].mlp = net
    counter = whole(model, {"0": model.model.layers[0].mlp, "1": net})
    assert counter.by_part == {"0": 4 * 32 * (32 + 4 * 48), "1": 4 * 32 * (3 * 32 + 4 * 48)}


def test_layer_checkpointing_keeps_the_layers_inputs(make_llama):
    """Counted by hand: N layer inputs (B T D each), and what stands outside the layers."""
    found = {}
    for layers in (1, 2, 4):
        model = make_llama(num_hidden_layers=layers, attn_implementation="eager", tie_word_embeddings=False).train()
        plain = whole(copy.deepcopy(model)).total
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found[layers] = whole(model).total
        assert found[layers] < 0.5 * plain
    # Outside the layers: the ids for the embedding (int64); the final norm keeps its input x (the last layer's
    # output), one rsqrt a token and x rsqrt for its weight's gradient; its output is the LM head's input.
    # What the layers share (cos, sin, mask) is an argument of every checkpoint and is not saved by autograd.
    tokens = 32
    outside = tokens * 8 + tokens * 4 * (32 + 1 + 32 + 32)
    assert found == {layers: outside + layers * tokens * 32 * 4 for layers in found}


def test_hooks_are_gone_afterwards(make_llama):
    model = make_llama()
    before = whole(model).total
    with pytest.raises(RuntimeError, match="x"), SavedBytes(model):
        raise RuntimeError("x")
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    counter = SavedBytes(model)
    with counter:
        pass
    model(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    assert counter.total == 0
    assert not counter._held
    assert whole(model).total == before


def test_counting_changes_no_gradient(make_llama):
    model = make_llama()
    inputs = torch.tensor([[3, 4, 5]])
    model(input_ids=inputs).logits.logsumexp(-1).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with SavedBytes(model):
        loss = model(input_ids=inputs).logits.logsumexp(-1).sum()
    loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))


def test_a_forward_that_fails_leaves_the_stack_in_order(make_llama):
    model = make_llama()
    with SavedBytes(model) as counter:
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[3, 99999]]))
        assert counter._running == []


MB = 1 << 20


def test_a_phase_has_its_own_peak():
    phases = Phases(torch.device("cpu"))
    with phases.phase("forward"):
        block = bytearray(200 * MB)
        block[::4096] = b"x" * len(block[::4096])
        del block
    with phases.phase("optimizer"):
        small = bytearray(MB)
    del small
    large, later = (phases.phases[n]["host_peak_rss_bytes"] for n in ("forward", "optimizer"))
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("this kernel does not let a process reset its high-water mark")
    assert large - later > 150 * MB
    assert phases.peaks() == {"memory/host_peak_rss_bytes": large}


def test_a_phase_that_comes_again_keeps_its_highest_peak_and_adds_its_seconds(monkeypatch):
    peaks, clock = iter([30, 10, 20]), iter([0.0, 1.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr(phases_file, "host_peak_bytes", lambda: next(peaks))
    monkeypatch.setattr(phases_file.time, "perf_counter", lambda: next(clock))
    phases = Phases(torch.device("cpu"))
    with phases.phase("forward"):
        pass
    with phases.phase("forward"):
        pass
    assert phases.phases["forward"] == {"seconds": 3.0, "host_peak_rss_bytes": 30}
    assert phases.take_step() == {"forward": 3.0}
    with pytest.raises(RuntimeError, match="x"), phases.phase("backward"):
        raise RuntimeError("x")
    assert phases.take_step() == {"backward": 4.0}
    assert phases.phases["backward"]["host_peak_rss_bytes"] == 20


def test_peaks_are_those_of_training():
    phases = Phases(torch.device("cpu"))
    phases.phases = {
        "load": {"seconds": 1, "host_peak_rss_bytes": 99},
        "forward": {"seconds": 1, "host_peak_rss_bytes": 5},
        "backward": {"seconds": 1, "host_peak_rss_bytes": 7},
        "optimizer": {"seconds": 1, "host_peak_rss_bytes": 6},
        "save": {"seconds": 1, "host_peak_rss_bytes": 98},
    }
    assert phases.peaks() == {"memory/host_peak_rss_bytes": 7}


def test_a_lock_has_peaks_of_training_too():
    """Module-wise distillation has a phase of its own, in which forward and backward run."""
    phases = Phases(torch.device("cpu"))
    with phases.phase("distil"):
        pass
    assert phases.peaks()["memory/host_peak_rss_bytes"] > 0


def test_host_peak_without_proc(monkeypatch):
    monkeypatch.setattr(phases_file, "status_bytes", lambda field: None)
    assert phases_file.host_peak_bytes() > 10 * MB


class Device:
    """What `torch.cuda` tells, as far as `Phases` asks; the events are those of the whole process."""

    def __init__(self, monkeypatch, free=70):
        self.events = {"num_alloc_retries": 5, "num_ooms": 1}
        self.device = torch.device("cuda")
        for name, answer in (
            ("synchronize", lambda device: None),
            ("reset_peak_memory_stats", lambda device: None),
            ("max_memory_allocated", lambda device: 30),
            ("max_memory_reserved", lambda device: 40),
            ("memory_stats", lambda device: self.events),
            ("memory_reserved", lambda device: 2 << 30),
            ("mem_get_info", lambda device: (free << 30, 80 << 30)),
        ):
            monkeypatch.setattr(torch.cuda, name, answer)


def test_retries_of_the_allocator_belong_to_their_phase(monkeypatch):
    device = Device(monkeypatch)
    phases = Phases(device.device)
    for name, retries in (("load", 1), ("forward", 0), ("backward", 2), ("backward", 3)):
        with phases.phase(name):
            device.events = {**device.events, "num_alloc_retries": device.events["num_alloc_retries"] + retries}
    assert {name: entry["alloc_retries"] for name, entry in phases.phases.items()} == {
        "load": 1,
        "forward": 0,
        "backward": 5,
    }
    peaks = phases.peaks()
    assert peaks["memory/accelerator_alloc_retries"] == 5
    assert peaks["memory/accelerator_alloc_ooms"] == 0
    assert peaks["memory/accelerator_peak_allocated_bytes"] == 30


@pytest.mark.parametrize(("free", "used", "warns"), [(77.5, 0.5, False), (70, 8, True)])
def test_a_device_that_others_use_is_told(monkeypatch, recwarn, free, used, warns):
    device = Device(monkeypatch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 2**30), 80 << 30))
    assert phases_file.check_clean(device.device) == {"device_in_use_bytes": used * 2**30}
    assert [str(w.message).startswith("8.0 GiB of cuda are in use") for w in recwarn] == [True] * warns
    assert phases_file.check_clean(torch.device("cpu")) == {}


def test_the_parents_memory_is_not_in_the_childs_peak():
    """C29: Linux carries getrusage's maximum over fork and exec; the peak that is recorded is the process's own."""
    code = (
        "import resource; from dlrscale.launcher.ranks import status_bytes; "
        "print(status_bytes('VmHWM'), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )

    def child():
        line = [sys.executable, "-c", code]
        done = subprocess.run(line, capture_output=True, text=True, check=True, preexec_fn=lambda: None)
        return map(int, done.stdout.split())

    before, _ = child()
    block = bytearray(300 * MB)
    block[::4096] = b"x" * len(block[::4096])
    after, carried = child()
    del block
    assert abs(after - before) < 0.05 * before
    assert carried > 300 * MB  # what the test would see if the kernel's maximum were taken
