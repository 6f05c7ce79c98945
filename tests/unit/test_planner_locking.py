"""The plan of a lock against hooks on the real objectives of a lock, in whole bytes."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dlrscale import distil, shapes, surgery
from dlrscale.measure import Phases, SavedBytes
from dlrscale.planner.locking import LockPlan
from dlrscale.planner.model import locked_shape
from dlrscale.shapes import layout

ROWS, LENGTH, DEPTH = 2, 9, 3
DS_CONFIG = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 1}


def prepared(model, lock_config, form, dtype, harden, layers=None):
    """A distiller on a model as a lock makes it, and its plan."""
    model = model.to(dtype)
    config = model.config.to_dict()
    base = shapes.model_shape(config)
    start = "warm" if shapes.FORMS[form].start_on == base.kind else "cold"
    chosen = lock_config(form=form, depth=DEPTH, harden=harden, start=start, layers=layers)
    made = distil.Distiller(surgery.install(model, base, chosen), chosen, floors={0: 0.3, 1: 0.7})
    plan = LockPlan(
        base=base,
        shape=locked_shape(base, form, DEPTH, None, layers),
        parts=layout.layout(config, base),
        ds_config=DS_CONFIG,
        dtype={torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype],
        micro_batch=ROWS,
        seq_len=LENGTH,
        attention="eager",
        device="cpu",
        harden=harden,
    )
    return made, plan


def saved(model, step, fake_engine, step_batch):
    batch = step_batch((torch.randint(3, 260, (ROWS, LENGTH)), [LENGTH] * ROWS))
    with SavedBytes(model) as counter:
        step(fake_engine(model), batch, Phases(torch.device("cpu")))
    return counter.total


CASES = [("llama", "gated"), ("llama", "prenorm"), ("gpt2", "plain"), ("opt", "plain"), ("phi", "prenorm")]


@pytest.mark.parametrize(("family", "form"), CASES)
def test_saved_bytes_while_distilling_and_healing(make_model, lock_config, fake_engine, step_batch, family, form):
    for dtype, harden in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        model = make_model(family)
        model.set_attn_implementation("eager")
        made, plan = prepared(model, lock_config, form, dtype, harden)
        mask = ROWS * LENGTH * 4  # one tensor for all layers
        visits = sum(plan.visit(layer).saved_bytes for layer in plan.shape.ranks) - mask * (len(plan.shape.ranks) - 1)
        assert saved(model, made.distil_step, fake_engine, step_batch) == visits, (dtype, harden)
        assert saved(model, made.heal_step, fake_engine, step_batch) == plan.heal_saved_bytes, (dtype, harden)


@pytest.mark.parametrize(("family", "form"), CASES)
def test_flops_of_both_stages_are_what_torch_counts(make_model, lock_config, fake_engine, step_batch, family, form):
    for harden in (True, False):
        model = make_model(family)
        model.set_attn_implementation("eager")
        made, plan = prepared(model, lock_config, form, torch.float32, harden)
        batch = step_batch((torch.randint(3, 260, (ROWS, LENGTH)), [LENGTH] * ROWS))
        for stage, step in (("distil", made.distil_step), ("heal", made.heal_step)):
            with FlopCounterMode(display=False) as counter:
                step(fake_engine(model), batch, Phases(torch.device("cpu")))
            assert sum(plan.flops()[stage].values()) == counter.get_total_flops(), (stage, harden)


def test_tensors_of_a_lock(make_llama, lock_config):
    model = make_llama()
    _, plan = prepared(model, lock_config, "gated", torch.float32, True, layers="1")
    found = sorted((p.numel(), p.requires_grad) for p in model.parameters())
    assert sorted((n, trained) for n, trained, count in plan.tensors() for _ in range(count)) == found
