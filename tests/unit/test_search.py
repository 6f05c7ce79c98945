"""The search of an attack's settings: its space, its sampler and pruning, costs to a target and gates."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest

from dlrscale import config as configuration
from dlrscale import data, engine, record, search
from dlrscale.config import AttackConfig
from dlrscale.data import token_data
from dlrscale.errors import ConfigError, JobError
from dlrscale.search import Cost, Target, Wanted, result, space
from dlrscale.search.sampler import Sampler, settings

ROWS = [
    {"step": s, "tokens": 100 * s, "processed_tokens": 120, "time/step_s": 9.0, "time/data_s": 1.0}
    | ({"loss/heldout_task": {2: 2.5, 4: 2.2, 6: 2.3}[s]} if s % 2 == 0 else {})
    for s in range(1, 7)
]
END = {"loss/heldout_task_start": 3.0, "loss/heldout_task": 2.3}


def given(**changes):
    values = {"model": "/m", "data": "/d", "out": "/o", "strategy": "lora", "steps": 40, "micro_batch": 4,
              "accumulation": 1, "lr": 1e-3, "warmup_steps": 3, "eval_every": 8} | changes  # fmt: skip
    config = AttackConfig(**values)
    return dataclasses.replace(config, knobs=config.entry.resolve_knobs({}) | changes.get("knobs", {}))


# --- The target -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "step"), [(2.5, 2), (2.49, 4), (2.2, 4), (2.1999, None), (2.9999, 2), (3.0, 0)],
)  # fmt: skip
def test_the_first_evaluation_at_or_below_the_target_counts(target, step):
    """By hand: 100 tokens, 120 x 7 FLOPs and 2 devices x 10 s a step; between evaluations nothing is known."""
    found = search.bill(ROWS, END, 7.0, 2, target)
    steps = 6 if step is None else step
    assert found["target/reached"] == (step is not None)
    assert (found["target/tokens"], found["target/flops"]) == (100 * steps, 840 * steps)
    assert found["target/device_hours"] == pytest.approx(20 * steps / 3600)
    assert (found["cost/tokens"], found["cost/flops"]) == (600, 5040)


def test_the_end_is_an_evaluation_and_the_transform_is_paid_first():
    rows = [{k: v for k, v in row.items() if k != "loss/heldout_task"} for row in ROWS]
    before = Cost(1000, 50.0, 0.5)
    found = search.bill(rows, END, 7.0, 1, 2.3, before)
    assert (found["target/reached"], found["target/tokens"], found["target/flops"]) == (1, 1600, 5090)
    assert found["target/device_hours"] == pytest.approx(0.5 + 60 / 3600)
    at_once = search.bill(rows, END, 7.0, 1, 3.5, before)
    assert (at_once["target/tokens"], at_once["target/flops"]) == (1000, 50)
    unknown = search.bill(rows, {}, None, 1, 2.3)
    assert unknown["target/reached"] == 0
    assert "target/flops" not in unknown
    assert "cost/flops" not in unknown


def test_targets_are_read():
    assert Target.parse("2.5") == Target(loss=2.5)
    assert Target.parse("base+0.05") == Target(margin=0.05)
    assert Target.parse("base") == Target(margin=0.0)
    for wrong in ("", "low", "-1", "nan", "base+x", "2.5+base", "inf"):
        with pytest.raises(ConfigError, match="--target"):
            Target.parse(wrong)


# --- The space ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulation": 2}, {"accumulation": 3, "micro_batch": 2}, {"micro_batch": 1}, {"eval_every": 5},
     {"steps": 41}],
)  # fmt: skip
def test_every_batch_sees_as_many_sequences_and_needs_no_more_memory(changes):
    config = given(**changes)
    factors = space.batch_factors(config)
    assert 1.0 in factors
    for factor in factors:
        found = space.resized(config, factor)
        assert found.global_batch == config.global_batch * factor
        assert found.steps * found.global_batch == config.steps * config.global_batch
        assert found.eval_every * found.global_batch == config.eval_every * config.global_batch
        assert found.micro_batch <= config.micro_batch
    assert (2.0 in factors) == (config.steps % 2 == 0 and config.eval_every % 2 == 0)
    assert (0.5 in factors) == (config.micro_batch % 2 == 0 or config.accumulation % 2 == 0)


def test_the_given_settings_are_a_point_of_their_space():
    config = given()
    points = space.space(config, (1e-5, 3e-2), (), (0.5, 1.0, 2.0))
    assert points.configuration(points.start()) == config
    assert {r.name for r in points.ranges} == {
        "lr", "warmup_share", "batch", "knob.rank", "knob.alpha", "knob.dropout",
    }  # fmt: skip
    assert "lr" not in space.space(config, (1e-5, 1e-4), (), (1.0,)).start()


def test_a_knob_by_hand_stays_and_a_strategy_without_knobs_has_none():
    points = space.space(given(knobs={"rank": 3}), (1e-5, 3e-2), ("rank",), (1.0,))
    assert {r.name for r in points.ranges} == {"lr", "warmup_share", "knob.alpha", "knob.dropout"}
    assert points.configuration(points.start() | {"knob.alpha": 5}).knobs == {"rank": 3, "alpha": 5, "dropout": 0.0}
    plain = space.space(given(strategy="ckpt-layer"), (1e-5, 3e-2), (), (1.0,))
    assert {r.name for r in plain.ranges} == {"lr", "warmup_share"}


def test_drawn_points_are_configurations_without_a_fault():
    config = given()
    points = space.space(config, (1e-5, 3e-2), (), space.batch_factors(config))
    sampler = Sampler(points.ranges, 0, 30, points.start())
    seen = []
    for _ in range(30):
        params = sampler.ask()
        seen.append(points.configuration(params))
        configuration.check(seen[-1])
        sampler.tell([], random.Random(len(seen)).random())
    assert seen[0] == config
    assert all(1e-5 <= c.lr <= 3e-2 and c.warmup_steps <= 0.2 * c.steps + 0.5 for c in seen[1:])
    assert {c.global_batch for c in seen} == {2, 4, 8}
    assert all(isinstance(c.knobs["rank"], int) and 2 <= c.knobs["rank"] <= 64 for c in seen)


@pytest.mark.parametrize("text", ["1e-3", "3e-2,1e-5", "0,1", "a,b", "1e-5,inf", "1,2,3"])
def test_a_wrong_range_is_refused(text):
    with pytest.raises(ConfigError, match="--lr-range"):
        space.parse_lr_range(text)


def test_seeds_are_read():
    assert space.parse_seeds("0,1,12", 5) == (0, 1, 12)
    assert space.parse_seeds(None, 5) == (5,)
    for wrong in ("", "0,,1", "-1", "1,1", "x", "1.0"):
        with pytest.raises(ConfigError, match="--seeds"):
            space.parse_seeds(wrong, 0)


# --- The sampler ----------------------------------------------------------------------------------------------


def searched(seed, trials, loss_of, told=()):
    """All points of a search; `told` stands for the ends of its first trials."""
    ranges = (space.Range("x", 0.0, 1.0), space.Range("c", choices=(1.0, 2.0)))
    sampler, points = Sampler(ranges, seed, trials, {"x": 0.25, "c": 1.0}), []
    for number in range(trials):
        params = sampler.ask()
        points.append(params)
        value = told[number] if number < len(told) else loss_of(params)
        sampler.tell([] if value is None else [value + 1, value], value)
    return points


def test_equal_answers_give_equal_trials_and_the_first_is_the_given_one():
    def loss_of(params):
        return (params["x"] - 0.7) ** 2 + params["c"]

    whole = searched(3, 20, loss_of)
    assert whole[0] == {"x": 0.25, "c": 1.0}
    told = [loss_of(params) for params in whole[:12]]
    assert searched(3, 20, loss_of, told) == whole  # gone on from the records of the first 12
    assert searched(4, 20, loss_of) != whole
    assert searched(3, 20, lambda p: -loss_of(p))[:3] == whole[:3]  # both sides start with the same random trials


def test_what_did_not_come_to_its_end_is_avoided():
    """Where x > 0.5 diverges, later trials look elsewhere, though nothing was learned there."""
    points = searched(0, 60, lambda p: None if p["x"] > 0.5 else 1.0 + p["x"])
    assert sum(p["x"] > 0.5 for p in points[40:]) < sum(p["x"] > 0.5 for p in points[:20])


def test_limits_prune_what_optunas_median_rule_prunes():
    import optuna

    for seed in range(30):
        draw, trials = random.Random(seed), 12
        sampler = Sampler((space.Range("x", 0.0, 1.0),), seed, trials, {})
        unpruned = settings(trials)[1]
        pruner = optuna.pruners.MedianPruner(n_startup_trials=unpruned, n_warmup_steps=1)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), pruner=pruner)
        pruned = 0
        for _ in range(trials):
            sampler.ask()
            limits, trial, losses, end = sampler.limits(), study.ask(), [], None
            for n in range(5):
                losses.append(draw.random() + 1 - n / 5)
                trial.report(losses[-1], n)
                limit = limits[n] if n < len(limits) else None
                mine = limit is not None and min(losses) > limit
                assert mine == trial.should_prune()
                if mine:
                    pruned += 1
                    break
            else:
                end = losses[-1]
            sampler.tell(losses, end)
            study.tell(trial, end, state=None if end is not None else optuna.trial.TrialState.PRUNED)
        assert pruned


# --- Its result -----------------------------------------------------------------------------------------------


def entry(outcome="ok", loss=None, pruned_at=None, tokens=10.0):
    metrics = {"cost/tokens": tokens, "cost/flops": 2 * tokens, "cost/device_hours": 0.5}
    metrics |= {} if loss is None else {"loss/heldout_task": loss}
    return {"outcome": outcome, "metrics": metrics, "config": {"pruned_at": pruned_at}, "id": "i", "seed": 0}


def test_the_best_so_far_leaves_out_what_was_pruned():
    ends = [entry("diverged"), entry(loss=2.0), entry(loss=1.0, pruned_at=8, tokens=4.0), entry(loss=2.5),
            entry(loss=1.5), None, entry("oom")]  # fmt: skip
    rows = [result.trial_row(n, {"lr": 0.1 * n}, end) for n, end in enumerate(ends)]
    points = space.space(given(), (1e-5, 3e-2), (), (1.0,))
    wanted = Wanted(trials=7, lr_range=(1e-5, 3e-2), seeds=(0,), target=None)
    found = json.loads(record.dumps(result.described(points, wanted, "s", rows)))
    assert found["best_so_far"] == [None, 2.0, 2.0, 2.0, 1.5, 1.5, 1.5]
    assert found["chosen"] == {"number": 4, "params": {"lr": 0.4}, "loss": 1.5}
    assert found["spent"] == {"tokens": 54.0, "flops": 108.0, "device_hours": 3.0}
    assert [row["outcome"] for row in found["trials"]][-2:] == ["unfit", "oom"]
    with pytest.raises(JobError, match="none of 1 trials"):
        result.chosen(result.described(points, wanted, "s", rows[:1]), "out")


def test_the_cost_with_the_search_is_that_of_all_trials_more():
    run = entry(loss=1.5) | {"metrics": {"target/tokens": 100.0, "target/flops": 7.0, "target/reached": 0.0}}
    (found,) = result.repeats([run], {"tokens": 54.0, "flops": None, "device_hours": 3.0})
    assert found["target/tokens_with_search"] == 154.0
    assert "target/flops_with_search" not in found


def test_a_searchs_id_is_that_of_both_sides_and_of_all_settings(llama_folder):
    config = given(model=str(llama_folder), data=__file__, heldout_part="tune")
    points = space.space(config, (1e-5, 3e-2), (), (1.0,))

    def id_of(points, trials=4):
        return result.search_id(points, trials, engine.merge(points.given))

    other = dataclasses.replace(points, given=dataclasses.replace(config, model=str(Path(__file__).parent), out="/x"))
    assert id_of(other) == id_of(points)
    assert id_of(points, 5) != id_of(points)
    for changes in ({"lr": 2e-3}, {"seed": 1}, {"steps": 42}, {"zero": 1}):
        changed = dataclasses.replace(points, given=dataclasses.replace(config, **changes))
        assert id_of(changed) != id_of(points)
    assert id_of(space.space(config, (1e-5, 1e-2), (), (1.0,))) != id_of(points)


def test_a_search_whose_levers_are_planned_is_known_by_what_was_not(llama_folder):
    config = given(model=str(llama_folder), data=__file__, heldout_part="tune")
    points = space.space(config, (1e-5, 3e-2), (), (1.0,))

    def id_of(cap=2.0, by_hand=None, **changes):
        changes |= {"lever_search": {"cap": cap, "given": by_hand or {}}}
        given_ = dataclasses.replace(config, **changes)
        return result.search_id(dataclasses.replace(points, given=given_), 4, engine.merge(given_))

    # What was chosen: another stage, tiles, reversal with its anchor.
    assert id_of(zero=1) == id_of(zero=3, tiles=4) == id_of(gradient="reverse", knobs=config.knobs | {"anchor": 2})
    others = [
        {"cap": 4.0},
        {"by_hand": {"tiles": 1}},
        {"transform": "flatten"},
        {"trainable": "norms"},
        {"knobs": config.knobs | {"rank": 4}},
    ]
    assert len({id_of(**other) for other in [{}, *others]}) == len(others) + 1


def test_what_is_only_told_leaves_the_id_alone(llama_folder):
    config = given(model=str(llama_folder), data=__file__)

    def ids(config):
        return configuration.run_ids(config, engine.merge(config))

    told = {"search": "s", "search_trials": 4, "trial": 3, "stop_above": [None, 2.0], "target": 2.0}
    assert ids(dataclasses.replace(config, **told, base_result={"trials": 4})) == ids(config)
    assert ids(dataclasses.replace(config, heldout_part="tune")) != ids(config)
    assert "heldout_part" not in configuration.identify(config, engine.merge(config))


# --- The gates ------------------------------------------------------------------------------------------------


def test_gates_need_the_base_to_reach_the_target_by_as_many_trials():
    base = [entry() | {"metrics": {"target/loss": 2.0, "target/reached": r}} for r in (1.0, 1.0, 0.0)]
    config = given(target=2.0, search_trials=4)

    def found(entries, trials=4, config=config):
        own = dataclasses.replace(config, base_result=search.base_result(entries, trials))
        return {name: gate["holds"] for name, gate in search.gates(own, "locked").items()}

    assert found(base[:2]) == {"base_reaches": True, "equal_search": True}
    assert found(base) == {"base_reaches": False, "equal_search": True}
    assert found([]) == {"base_reaches": None, "equal_search": True}
    assert found(base[:2], 3)["equal_search"] is False
    assert found(base[:2], config=dataclasses.replace(config, target=1.9))["base_reaches"] is False
    assert found(base[:2], 0, dataclasses.replace(config, search_trials=0))["equal_search"] is None
    alone = search.gates(config, "locked")
    assert all(gate["holds"] is None and "--base" in gate["why"] for gate in alone.values())
    assert all(gate["holds"] is None for gate in search.gates(config, "base").values())


# --- The held-out halves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 8])
def test_no_item_is_tuned_and_reported_on(count):
    items = [np.full(3, i) for i in range(count)]
    whole = token_data(items, items, packed=True, counts={})
    halves = [{int(ids[0]) for ids in data.heldout_half(whole, part).input_ids} for part in ("tune", "report")]
    assert halves[0] | halves[1] == set(range(count))
    assert not halves[0] & halves[1]
    with pytest.raises(ConfigError, match="--heldout-limit"):
        data.heldout_half(whole.subset(slice(0, 1)), "report")
