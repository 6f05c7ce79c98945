"""Locks and attacks give the same numbers at every ZeRO stage, offload, number of ranks and accumulation.

The failures that this guards against are silent: losses still fall. All cases of one number of ranks run in one
start of the DeepSpeed launcher; `reference` computes the same in plain PyTorch on one process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
import ranks as cases_module

pytestmark = pytest.mark.dist

LAYOUTS = [
    {"zero": zero, "ranks": ranks, "accumulation": accumulation}
    for zero in (0, 1, 2, 3)
    for ranks, accumulation in ((1, 1), (1, 2), (2, 1), (2, 2))
]
OFFLOADS = [
    {"zero": 1, "ranks": 2, "offload_optimizer": True},
    {"zero": 2, "ranks": 2, "offload_optimizer": True, "accumulation": 2},
    {"zero": 3, "ranks": 2, "offload_optimizer": True},
    {"zero": 3, "ranks": 2, "offload_optimizer": True, "offload_param": True},
    {"zero": 3, "ranks": 2, "offload_optimizer": True, "offload_param": True, "accumulation": 2},
]
LOCKS = [{"run": "lock", **layout} for layout in LAYOUTS + OFFLOADS]
BF16_LOCKS = [{"run": "lock", "dtype": "bf16", **layout} for layout in LAYOUTS[2::4] + OFFLOADS]
ATTACKS = [{"run": "attack", **layout} for layout in LAYOUTS[2:] + OFFLOADS]
CHECKPOINTS = [{"run": "checkpoint", "zero": zero, "ranks": 2} for zero in (0, 1, 2, 3)]
DECAYED = [{"run": "decayed", "zero": zero, "ranks": 1, "dtype": "bf16"} for zero in (0, 1, 2, 3)]
WRITTEN_BY_ONE = [{"run": "checkpoint", "zero": zero, "ranks": 1} for zero in (0, 1, 3)]
READ_BY_TWO = [
    {"run": "checkpoint", "zero": zero, "ranks": 2, "only_resume": written["zero"]}
    for zero, written in zip((0, 2, 3), WRITTEN_BY_ONE, strict=True)
]


@pytest.fixture(scope="module")
def results(tmp_path_factory, start_ranks) -> dict[str, dict]:
    """Results of all cases by the case's JSON."""
    folder = tmp_path_factory.mktemp("ranks")
    found = {}
    everything = LOCKS + BF16_LOCKS + ATTACKS + CHECKPOINTS + DECAYED + WRITTEN_BY_ONE + READ_BY_TWO
    for num_ranks in (1, 2):
        chosen = [case for case in everything if case["ranks"] == num_ranks]
        sent = [
            case | {"folder": str(folder / place(case)), "only_resume": "only_resume" in case}
            if case["run"] == "checkpoint"
            else case
            for case in chosen
        ]
        for case, result in zip(chosen, start_ranks(num_ranks, sent), strict=True):
            found[name(case)] = result
    return found


def place(case: dict) -> str:
    """The folder of a case's checkpoints; one that only reads has that of the case that wrote."""
    if "only_resume" in case:
        return f"written-by-1-at-{case['only_resume']}"
    return f"written-by-{case['ranks']}-at-{case['zero']}"


def name(case: dict) -> str:
    """A case as a test's name."""
    return "-".join(f"{k}{v}" if not isinstance(v, str) else v for k, v in case.items())


def get(results: dict[str, dict], case: dict) -> dict:
    """The result of a case, which must not be an error."""
    result = results[name(case)]
    assert "error" not in result, result["error"]
    return result


def clip_and_step(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Clip to a global norm of 1, as the configurations ask for, and update; returns the norm before."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


def step_batches() -> list[dict]:
    """The whole global batch of each step, padded, in one piece."""
    from dlrscale import data

    plan = data.Batches(cases_module.tiny_data(), seed=0, micro_batch=4, accumulation=1, rank=0, world_size=1, pad_id=0)
    return [plan.step(step).micro_batches[0] for step in range(cases_module.STEPS + cases_module.HEAL_STEPS)]


def net_forward(weights: dict[str, torch.Tensor], x: torch.Tensor, b: float) -> torch.Tensor:
    """The gated recurrence d <- d + B (silu(A1 u) * (A2 u)), u = x + b d, written out on plain tensors."""
    d = torch.zeros_like(x)
    for k in range(4):
        gate, up = ((x + b * d) @ weights[f"blocks.{k}.a_proj.weight"].T).chunk(2, -1)
        d = d + (F.silu(gate) * up) @ weights[f"blocks.{k}.b_proj.weight"].T
    return d


@pytest.fixture(scope="module")
def reference() -> dict:
    """Lock (calibrate, distil, heal) of the tiny model in plain PyTorch, every loss from its formula."""
    torch.set_num_threads(1)
    model = cases_module.tiny_llama()
    model.requires_grad_(False)
    mlps = [layer.mlp for layer in model.model.layers]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for mlp in mlps:
        mlp.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    nets = []
    for mlp in mlps:  # F = 48 neurons in 4 blocks of 12
        net = {}
        for k in range(4):
            rows = slice(12 * k, 12 * (k + 1))
            net[f"blocks.{k}.a_proj.weight"] = torch.cat([mlp.gate_proj.weight[rows], mlp.up_proj.weight[rows]]).clone()
            net[f"blocks.{k}.b_proj.weight"] = mlp.down_proj.weight[:, rows].clone()
        nets.append({key: value.requires_grad_() for key, value in net.items()})
    ratios, squares = [[], []], [[], []]
    for ids in cases_module.tiny_data().input_ids[:5]:
        seen.clear()
        model(torch.tensor(ids)[None])
        for i, (x, y) in enumerate(seen):
            ratios[i].append((x.norm(dim=-1) / y.norm(dim=-1)).flatten())
            squares[i].append(y.square().sum(-1).flatten())
    scales = [float((0.25 * torch.cat(r).median()).to(torch.bfloat16)) for r in ratios]
    floors = [float(torch.cat(s).median()) for s in squares]
    optimizer = torch.optim.AdamW([p for net in nets for p in net.values()], lr=1.0, weight_decay=0.0)
    losses, norms = [], []
    batches = step_batches()
    for batch in batches[: cases_module.STEPS]:
        mask = batch["attention_mask"].double()
        seen.clear()
        with torch.no_grad():
            model(batch["input_ids"], attention_mask=batch["attention_mask"])
        total = 0.0
        for (x, y), net, b, floor in zip(seen, nets, scales, floors, strict=True):
            size = y.square().sum(-1) + floor
            error = (net_forward(net, x, b) - y).square().sum(-1) / size
            flat = (net_forward(net, x, 0.0) - y).square().sum(-1) / size
            total = total + ((error + 0.03 * (1.0 - flat).clamp_min(0)) * mask).sum()
        loss = total / mask.sum()
        loss.backward()
        losses.append(float(loss.detach()) / 2)
        norms.append(clip_and_step(optimizer, cases_module.LR))
    for batch in batches[cases_module.STEPS :]:
        mask = batch["attention_mask"].double()
        with torch.no_grad():
            teacher = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
        penalties: list[torch.Tensor] = []
        originals = [mlp.forward for mlp in mlps]
        for mlp, net, b, floor in zip(mlps, nets, scales, floors, strict=True):

            def student(x, net=net, b=b, floor=floor, penalties=penalties):
                out = net_forward(net, x, b)
                target = out.detach()
                flat = net_forward(net, x.detach(), 0.0)
                error = (flat - target).square().sum(-1) / (target.square().sum(-1) + floor)
                penalties.append((1.0 - error).clamp_min(0))
                return out

            mlp.forward = student
        student_log = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
        for mlp, original in zip(mlps, originals, strict=True):
            mlp.forward = original
        divergence = (teacher.exp() * (teacher - student_log)).sum(-1)
        loss = ((divergence + 0.003 * sum(penalties)) * mask).sum() / mask.sum()
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(clip_and_step(optimizer, cases_module.LR / 10))
    weights = {f"{i}.{key}": value.detach() for i, net in enumerate(nets) for key, value in net.items()}
    return {"losses": losses, "norms": norms, "b": scales, "floors": floors, "weights": weights}


def assert_weights(result: dict, wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    """Each tensor within a tolerance of the wanted one, relative to its largest entry."""
    for key, value in wanted.items():
        got = torch.tensor(result["weights"][key])
        assert (got - value.float()).abs().max() <= tolerance * value.abs().max(), key


@pytest.mark.parametrize("case", LOCKS, ids=name)
def test_lock_equals_plain_pytorch(case: dict, results: dict, reference: dict) -> None:
    """From step 0 on: b, floors, losses, norms and final weights are those of the reference."""
    result = get(results, case)
    assert list(result["b"].values()) == reference["b"]
    assert list(result["floors"].values()) == pytest.approx(reference["floors"], rel=1e-5)
    assert result["losses"] == pytest.approx(reference["losses"], rel=2e-5)
    assert result["norms"] == pytest.approx(reference["norms"], rel=2e-4)
    assert_weights(result, reference["weights"], 1e-4)


@pytest.mark.parametrize("case", BF16_LOCKS, ids=name)
def test_bf16_lock_follows_fp32(case: dict, results: dict, reference: dict) -> None:
    """In bf16 with fp32 masters the losses stay within bf16's rounding of the fp32 ones, at every stage alike."""
    result = get(results, case)
    assert result["losses"] == pytest.approx(reference["losses"], rel=0.03)
    plain = get(results, BF16_LOCKS[0])
    assert result["losses"] == pytest.approx(plain["losses"], rel=1e-2)


@pytest.fixture(scope="module")
def attack_reference() -> dict:
    """Three steps of AdamW on the mean over label tokens, in plain PyTorch."""
    torch.set_num_threads(1)
    model = cases_module.tiny_llama().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0)
    losses, norms = [], []
    for step, batch in enumerate(step_batches()[: cases_module.STEPS]):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(clip_and_step(optimizer, cases_module.LR * (step + 1)))
    return {"losses": losses, "norms": norms, "weights": dict(model.named_parameters())}


@pytest.mark.parametrize("case", ATTACKS, ids=name)
def test_attack_equals_plain_pytorch(case: dict, results: dict, attack_reference: dict) -> None:
    """Losses (of unequal token counts per rank and micro-batch), rates and weights are those of the reference."""
    result = get(results, case)
    assert result["losses"] == pytest.approx(attack_reference["losses"], rel=2e-5)
    assert result["rates"] == pytest.approx([cases_module.LR * (step + 1) for step in range(3)])
    assert result["norms"] == pytest.approx(attack_reference["norms"], rel=1e-4)
    wanted = {k: v.detach() for k, v in attack_reference["weights"].items()}
    assert_weights(result, wanted, 2e-4)


@pytest.mark.parametrize(("written", "read"), zip(WRITTEN_BY_ONE, READ_BY_TWO, strict=True), ids=name)
def test_checkpoint_goes_on_in_another_layout(written: dict, read: dict, results: dict) -> None:
    """Two ranks, and another of the stages 1 and 2, go on from one rank's checkpoint with its losses."""
    whole, result = get(results, written), get(results, read)
    assert whole["resumed"] == whole["whole"]
    assert result["resumed"] == pytest.approx(whole["whole"], rel=1e-5)
    assert result["state"] == {"note": "kept"}
    assert result["found"] == [4]


@pytest.mark.parametrize("case", DECAYED, ids=name)
def test_making_an_engine_decays_no_weight(case: dict, results: dict) -> None:
    """DeepSpeed's empty step at stage 0 in bf16 would take a quarter of each weight here; the decay itself stays on."""
    assert get(results, case) == {"moved": 0.0, "decay": [0.5]}


@pytest.mark.parametrize("case", CHECKPOINTS, ids=name)
def test_checkpoint_goes_on_bitwise(case: dict, results: dict) -> None:
    """A fresh engine that loads a checkpoint repeats the steps that the first one went on with."""
    result = get(results, case)
    assert result["resumed"] == result["whole"]
    assert result["state"] == {"note": "kept"}
    assert result["found"] == [2]
