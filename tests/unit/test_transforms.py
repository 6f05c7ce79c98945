"""The transforms of a locked model: grouped, shortened and regressed nets against plain computations in float64."""

import copy
import json

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dlrscale import data, distil, dlr, export, folders, models, shapes, surgery
from dlrscale.attacks import drop_blocks, flatten, undistil
from dlrscale.config import AttackConfig
from dlrscale.errors import ConfigError
from dlrscale.jobs.common import Corpora, Run
from dlrscale.measure import Phases
from dlrscale.planner.model import transformed_shape

CPU = torch.device("cpu")
FORMS = [
    ("gated", "llama", {}),
    ("gated", "llama", {"mlp_bias": True}),
    ("plain", "gpt2", {}),
    ("prenorm", "llama", {}),
]


@pytest.fixture(scope="module")
def group():
    """A real process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run_of(tmp_path):
    """Factory of a run with some knobs, and random tokens as its data."""

    def make(knobs, **changes):
        config = AttackConfig(model="", data="", out=str(tmp_path), knobs=knobs, micro_batch=2, **changes)
        generator = torch.Generator().manual_seed(1)
        ids = [torch.randint(3, 260, (12,), generator=generator).numpy() for _ in range(8)]
        text = data.token_data(ids, ids, packed=True, counts={})
        ds_config = {"zero_optimization": {"stage": config.zero}}
        return Run(config, ds_config, Phases(CPU), tmp_path, "0" * 64, corpora=Corpora(text, text, None, 0))

    return make


@pytest.fixture
def net_of(make_llama, make_gpt2, start_nets):
    """Factory of a started DLR-Net with b 0.4 and every weight, bias and B moved."""

    def make(form, family, changes, depth=5):
        base = (make_llama if family == "llama" else make_gpt2)(**changes)
        model = export.with_nets(base, form, start_nets(base, scale=0.4, form=form, depth=depth))
        net = drop_blocks.nets_of(model, shapes.model_shape(model.config.to_dict()))[0]
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return net

    return make


def activation(family):
    return F.silu if family == "llama" else (lambda v: F.gelu(v, approximate="tanh"))


def by_hand(net, x, size, act):
    """Blocks in groups of `size`, each of which reads x + b d with the d in front of its group, in float64."""
    state = {k: v.double() for k, v in net.state_dict().items()}
    x, d = x.double(), torch.zeros_like(x, dtype=torch.float64)
    for start in range(0, len(net.blocks), size):
        u = x + state["b"] * d
        if net.form == "prenorm":
            u = u / (u.square().mean(-1, keepdim=True).sqrt() + 1e-6)
        for k in range(start, min(start + size, len(net.blocks))):
            hidden = u @ state[f"blocks.{k}.a_proj.weight"].T + state.get(f"blocks.{k}.a_proj.bias", 0.0)
            if net.gated:
                gate, up = hidden.chunk(2, dim=-1)
                hidden = act(gate) * up
            else:
                hidden = act(hidden)
            d = d + hidden @ state[f"blocks.{k}.b_proj.weight"].T
    return d + state.get("bias", 0.0)


def net_from(net, state):
    """A DLR-Net of a state, in float64."""
    depth = sum(key.endswith("b_proj.weight") for key in state)
    ranks = [state[f"blocks.{k}.b_proj.weight"].shape[1] for k in range(depth)]
    made = type(net)(32, ranks, net.form, net.activation, bias=net.bias is not None)
    made.load_state_dict(state)
    return made.double()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(("form", "family", "changes"), FORMS)
def test_a_group_is_one_wider_block(net_of, form, family, changes, size):
    net, x = net_of(form, family, changes), torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(3))
    made = net_from(net, dlr.grouped(net, size))
    assert len(made.blocks) == -(-5 // size)
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in net.parameters())
    wanted = by_hand(net, x, size, activation(family))
    torch.testing.assert_close(made(x.double()), wanted, rtol=1e-9, atol=1e-11)
    if size > 1:  # the coupling inside groups is what is lost
        assert (net.double()(x.double()) - wanted).norm() > 1e-3 * wanted.norm()
        net.b.zero_()
        made.b.zero_()
        torch.testing.assert_close(made(x.double()), net(x.double()), rtol=1e-9, atol=1e-11)


def test_shares_and_a_block_that_writes_nothing(net_of):
    """Its share is 0, it goes first, and the net without it is the same function to the last bit."""
    net, x = net_of("gated", "llama", {"mlp_bias": True}), torch.randn(7, 32)
    with torch.no_grad():
        net.blocks[2].b_proj.weight.zero_()
    shares = dlr.block_shares(net, x)
    assert shares.shape == (5, 7)
    assert (shares[2] == 0).all()
    wanted = (net(x) - net.bias).norm(dim=-1)
    first = net.blocks[0].b_proj(net.code(net.blocks[0], x)).norm(dim=-1)
    torch.testing.assert_close(shares[0], first / wanted, rtol=1e-4, atol=1e-6)
    left = drop_blocks.stay(shares.mean(-1).tolist(), shapes.blocks_left(5, 0.2))
    assert left == [0, 1, 3, 4]
    made = net_from(net, dlr.without_others(net, left)).float()
    assert torch.equal(made(x), net(x))


@pytest.mark.parametrize(("depth", "drop", "left"), [(8, 0.25, 6), (8, 0.2, 7), (10, 0.3, 7), (4, 0.9, 1), (1, 0.9, 1)])
def test_how_many_blocks_stay(depth, drop, left):
    assert shapes.blocks_left(depth, drop) == left


@pytest.fixture
def locked_folder(make_llama, save_base, make_locked, tmp_path):
    return make_locked(save_base(make_llama(), tmp_path / "base"), depth=5)


def test_ranking_over_a_model(group, run_of, locked_folder):
    """The mean over the real tokens of all calibration sequences, as hooks on each net's input find it."""
    run, model = run_of({}), models.load_model(locked_folder)
    seen = {0: [], 1: []}
    for layer, found in seen.items():
        net = model.model.layers[layer].mlp
        net.register_forward_hook(lambda net, args, out, found=found: found.append(dlr.block_shares(net, args[0])))
    shares, tokens, flops = drop_blocks.rank_blocks(model, run.corpora.train)
    assert tokens == 8 * 12
    assert flops > 2 * tokens * sum(p.numel() for n, p in model.named_parameters() if "mlp" in n)
    for layer, found in seen.items():
        assert shares[layer] == pytest.approx(torch.cat(found, dim=1).mean(-1).tolist(), rel=1e-5)


def logits(model, ids=None):
    ids = torch.arange(3, 15)[None] if ids is None else ids
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("form", ["gated", "prenorm"])
def test_flatten_in_groups_exports_a_locked_folder(group, run_of, make_llama, save_base, make_locked, tmp_path, form):
    source = make_locked(save_base(make_llama(), tmp_path / "base"), depth=5, form=form)
    run = run_of({"group": 2})
    out = flatten.apply(run, source, tmp_path / "transformed")
    folders.check_weights(out)
    models.check_folder(out)
    manifest = folders.read_manifest(out)
    assert (manifest["depth"], manifest["lock_id"]) == (3, "0" * 64)
    assert manifest["transformed"] == {"transform": "flatten", "knobs": {"group": 2}}
    again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    nets = {i: again.model.layers[i].mlp for i in (0, 1)}
    whole = models.load_model(source)
    for layer, net in nets.items():  # each group reads its own input
        x = torch.randn(6, 32)
        theirs = by_hand(whole.model.layers[layer].mlp, x, 2, F.silu)
        torch.testing.assert_close(net(x).double(), theirs, rtol=1e-4, atol=1e-5)
    shape = shapes.model_shape(shapes.read_config(out))
    assert (
        shape.ranks == transformed_shape(shapes.model_shape(shapes.read_config(source)), "flatten", {"group": 2}).ranks
    )


def test_flatten_of_whole_nets_and_of_a_base(group, run_of, locked_folder, llama_folder, tmp_path):
    run = run_of({"group": 0})
    assert flatten.apply(run, llama_folder, tmp_path / "x") == llama_folder
    assert not (tmp_path / "x").exists()
    for size in (0, 5, 9):
        out = flatten.apply(run_of({"group": size}), locked_folder, tmp_path / f"flat{size}")
        assert folders.read_manifest(out) is None
        assert type(models.load_model(out)).__name__ == "LlamaForCausalLM"


def test_layers_that_keep_other_ranks(group, run_of, locked_folder, tmp_path):
    """Where nets lose blocks of different ranks, the manifest has them by layer, and the folder can be attacked."""
    model = models.load_model(locked_folder)
    shape = shapes.model_shape(model.config.to_dict())
    assert len(set(shape.ranks[0])) == 2
    kept = {0: [0, 1, 2], 1: [2, 3, 4]}
    nets = {i: dlr.without_others(net, kept[i]) for i, net in drop_blocks.nets_of(model, shape).items()}
    made = export.with_nets(model, "gated", nets)
    manifest = export.transformed_manifest(locked_folder, made, "drop-blocks", {"drop": 0.4})
    assert manifest["ranks"] == {str(i): [shape.ranks[i][k] for k in blocks] for i, blocks in kept.items()}
    assert manifest["param_ratio"] == pytest.approx(0.6, abs=0.03)
    export.save_folder(made, models.load_tokenizer(locked_folder), tmp_path / "out", {}, manifest)
    folders.check_weights(tmp_path / "out")
    manifest["ranks"]["1"] = [1, 2, 3]
    (tmp_path / "out" / "lock.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="manifest of another model"):
        folders.check_weights(tmp_path / "out")


class Learning:
    """`FakeEngine` whose steps move the weights, by torch's Adam."""

    def __new__(cls, fake, model, parameters, lr):
        engine = fake(model)
        adam = torch.optim.Adam(parameters, lr=lr)

        def step():
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
            adam.step()
            adam.zero_grad()
            return norm

        engine.step = step
        return engine


STARTS = [("gated", "flat"), ("gated", "fresh"), ("prenorm", "fresh"), ("plain", "flat")]


@pytest.mark.parametrize(("form", "start"), STARTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_regression_makes_ordinary_mlps(make_model, start_nets, fake_engine, step_batch, family, form, start):
    """The error of each layer falls to less than a half, and the exported model is what the regression has made."""

    def lock():
        model = export.with_nets(base, form, start_nets(base, scale=0.4, form=form, depth=3))
        for net in drop_blocks.nets_of(model, shapes.model_shape(model.config.to_dict())).values():
            for block in net.blocks if (form, family) not in (("gated", "llama"), ("plain", "gpt2")) else ():
                block.b_proj.weight.data.mul_(20)  # a cold start's output is small; make it count
        return model

    base = make_model(family)
    locked = lock()
    shape = shapes.model_shape(locked.config.to_dict())
    if (family, form, start) == ("gpt2", "gated", "flat"):  # its third matrix has no place there
        with pytest.raises(ConfigError, match="--set start=fresh"):
            transformed_shape(shape, "undistil", {"start": start})
        return
    made = undistil.ordinary(locked, start, 0)
    assert type(made) is type(base)
    nets = undistil.mlps_of(made, shape.ranks)
    distiller = distil.Distiller(surgery.install_students(locked, shape, nets), metrics="transform")
    assert distiller.parameters == [p for net in nets.values() for p in net.parameters()]
    assert {id(p) for p in locked.parameters() if p.requires_grad} == {id(p) for p in distiller.parameters}
    engine = Learning(fake_engine, locked, distiller.parameters, 1e-3 if start == "flat" else 3e-3)
    ids = torch.randint(3, 260, (8, 24), generator=torch.Generator().manual_seed(4))
    batch = step_batch((ids, [24] * 8))
    distiller.calibrate(engine, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    text = data.token_data(list(ids.numpy()), list(ids.numpy()), packed=True, counts={})
    before = distiller.layer_errors(engine, text, 4, 0)
    rows = [distiller.distil_step(engine, batch, Phases(CPU)) for _ in range(60)]
    after = distiller.layer_errors(engine, text, 4, 0)
    assert all(after[layer] < 0.5 * before[layer] for layer in after), (before, after)
    assert rows[-1]["transform/error_mean"] == rows[-1]["loss/train"] < 0.5 * rows[0]["loss/train"]
    with surgery.mode(distiller.switches, "student"):
        wanted = logits(locked)
    again = undistil.ordinary(lock(), start, 0)
    weights = {s.layer: s.net.state_dict() for s in distiller.switches}
    for layer, mlp in undistil.mlps_of(again, shape.ranks).items():
        mlp.load_state_dict(weights[layer])
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-4)
    assert shapes.model_shape(again.config.to_dict()) == transformed_shape(shape, "undistil", {"start": start})


def test_the_regression_is_the_lock_s_formula(make_llama, start_nets, fake_engine, step_batch, reference_net):
    """Loss and gradient of one step in float64: e = ||mlp(x) - dlr(x)||^2 / (||dlr(x)||^2 + f) on the locked stream."""
    base = make_llama()
    locked = export.with_nets(base, "gated", start_nets(base, scale=0.4))
    shape, wide, pairs = shapes.model_shape(locked.config.to_dict()), copy.deepcopy(locked).double(), {}
    for layer in shape.ranks:
        wide.model.layers[layer].mlp.register_forward_hook(lambda m, a, out, i=layer: pairs.update({i: (a[0], out)}))
    nets = undistil.mlps_of(undistil.ordinary(locked, "flat", 0), shape.ranks)
    distiller = distil.Distiller(surgery.install_students(locked, shape, nets), floors={0: 0.3, 1: 0.7})
    ids = torch.randint(3, 260, (2, 7), generator=torch.Generator().manual_seed(4))
    batch, engine = step_batch((ids, [7, 4])), fake_engine(locked)
    found = distiller.distil_step(engine, batch, Phases(CPU))
    with torch.no_grad():
        wide(input_ids=ids, attention_mask=batch.micro_batches[0]["attention_mask"])
    real, total = batch.micro_batches[0]["attention_mask"].bool(), 0.0
    for layer, (x, y) in pairs.items():
        state = {k: v.double().detach().requires_grad_() for k, v in nets[layer].state_dict().items()}
        inner = F.silu(x @ state["gate_proj.weight"].T) * (x @ state["up_proj.weight"].T)
        error = (inner @ state["down_proj.weight"].T - y).square().sum(-1) / (y.square().sum(-1) + (0.3, 0.7)[layer])
        loss = error[real].sum() / 11
        loss.backward()
        total += float(loss.detach())
        for name, value in state.items():
            got = engine.gradients[f"model.layers.{layer}.mlp.net.{name}"].double()
            assert (got - value.grad).norm() <= 2e-4 * value.grad.norm(), (layer, name)
    assert found["loss/train"] == pytest.approx(total / 2, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon"])
@pytest.mark.parametrize(
    "levers",
    [
        {"activation_checkpointing": "layer"},
        {"activation_checkpointing": "nested"},
        {"activation_checkpointing": "layer", "tiles": 3},
        {"activation_checkpointing": "layer", "activation_storage": "host"},
        {"activation_checkpointing": "layer", "gradient": "reverse", "knobs": {"anchor": 2}},
    ],
    ids=lambda levers: "-".join(map(str, levers.values())),
)
def test_the_heal_under_levers_has_the_same_gradient(make_model, start_nets, fake_engine, step_batch, family, levers):
    """Layers are run again going backward: the students must answer then, without dropout."""
    dropout = {"llama": {}, "gpt2": {"resid_pdrop": 0.3}, "opt": {"dropout": 0.3}, "falcon": {"hidden_dropout": 0.3}}
    base = make_model(family, **dropout[family])
    form = "gated" if family == "llama" else "plain"
    found = []
    for changes in ({}, levers):
        locked = export.with_nets(base, form, start_nets(base, scale=0.4, form=form, depth=5))
        shape = shapes.model_shape(locked.config.to_dict())
        config = AttackConfig(model="", data="", out="", **changes)
        distiller = drop_blocks.students_in(locked, shape, {0: [0, 1, 3], 1: [1, 2, 4]}, config)
        engine = fake_engine(locked)
        batch = step_batch((torch.randint(3, 260, (2, 7), generator=torch.Generator().manual_seed(4)), [7, 4]))
        row = distiller.heal_step(engine, batch, Phases(CPU))
        assert row["transform/kl"] > 1e-4
        assert all(".net." in name for name in engine.gradients)
        assert len(engine.gradients) == len(distiller.parameters)
        found.append((row, engine.gradients))
    (row, gradients), (other, others) = found
    assert other["loss/train"] == pytest.approx(row["loss/train"], rel=1e-5)
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name


def test_what_is_refused(make_llama, start_nets):
    def config(knobs, **changes):
        return AttackConfig(model="", data="", out="", strategy="undistil", knobs=knobs, **changes).faults()

    assert not config({"text": "public"}, public_data="x")
    assert "--public-data" in config({"text": "public"})[0]
    assert "does not read it" in config({"text": "task"}, public_data="x")[0]
    assert "--dtype fp16" in config({}, dtype="fp16")[0]
    base = make_llama()
    locked = export.with_nets(base, "prenorm", start_nets(base, form="prenorm", depth=5))
    shape = shapes.model_shape(locked.config.to_dict())
    for size in (0, 5):
        with pytest.raises(ConfigError, match=r"prenorm .* \(undistil\)"):
            transformed_shape(shape, "flatten", {"group": size})
    assert len(transformed_shape(shape, "flatten", {"group": 4}).ranks[0]) == 2
    with pytest.raises(ConfigError, match="--set start=fresh"):
        transformed_shape(shape, "undistil", {"start": "flat"})
    assert transformed_shape(shape, "undistil", {"start": "fresh"}).inner == 48
    assert list(map(len, transformed_shape(shape, "drop-blocks", {"drop": 0.4}).ranks.values())) == [3, 3]


def test_phases_inside_leave_their_peaks(monkeypatch):
    """What runs inside begins new peaks; the phase around it keeps the highest, also that from before."""
    from dlrscale.measure import phases as measured

    now = {"peak": 0}
    monkeypatch.setattr(measured, "host_peak_bytes", lambda: now["peak"])
    monkeypatch.setattr(measured, "_reset_host_peak", lambda: now.update(peak=1))
    outer = Phases(CPU)
    with outer.phase("transform"):
        now["peak"] = 50
        inner = outer.inside("transform")
        with inner.phase("optimizer"):
            now["peak"] = 30
    assert inner.phases["optimizer"]["host_peak_rss_bytes"] == 30
    assert outer.phases["transform"]["host_peak_rss_bytes"] == 50
    assert set(outer.phases) == {"transform"}
