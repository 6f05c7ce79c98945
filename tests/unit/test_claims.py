"""The verdicts on the five claims, on records whose numbers are known."""

import json
import shutil
from pathlib import Path

import pytest
from report_records import LOCK_ID, PASSED, attack, lock_record

from dlrscale import report
from dlrscale.record import find_records
from dlrscale.report import runs as report_runs


def claim_of(found, number):
    return report.claims(found)[number - 1]


# --- C1, C2, C5 -------------------------------------------------------------------------------------------------


def timed(backward, seeds=3, gates=PASSED, **metrics):
    """`full` on an accelerator; the forward ratio is 1.2, the base's backward 0.1 s."""
    peak = {"memory/accelerator_peak_allocated_bytes": 2**30} | metrics
    found = []
    for seed in range(seeds):
        own = peak | {"time/backward_s": backward + seed / 1000}
        found += [attack("base", "full", seed=seed, metrics=peak) | {"gates": gates},
                  attack("locked", "full", "x", seed=seed, metrics=own) | {"gates": gates}]  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("backward", "others", "verdict"),
    [
        (0.150, {}, "stands"),  # 1.25 and more
        (0.130, {}, "not decided"),  # 1.083 to 1.1: within 10 %
        (0.100, {}, "falls"),  # 0.833 to 0.85
        (0.150, {"seeds": 2}, "not decided"),
        (0.150, {"gates": None}, "not decided"),
        (0.150, {"memory/accelerator_peak_allocated_bytes": None}, "not decided"),  # on a CPU
    ],
)
def test_backward_needs_seeds_gates_and_an_accelerator(backward, others, verdict):
    assert claim_of(timed(backward, **others), 2).verdict == verdict


def test_times_of_a_cpu_do_not_speak_for_the_accelerator():
    cpu = timed(0.9, **{"memory/accelerator_peak_allocated_bytes": None, "time/step_s": 9.0})
    for values in cpu:
        values["device"], values["id"] = {"type": "cpu2"}, values["id"] + "cpu"
    claim = claim_of(timed(0.15) + cpu, 2)
    assert claim.verdict == "stands"
    assert "d: backward / forward, on the accelerator: full" in claim.text
    assert "d: backward / forward, on the CPU: full" in claim.text
    assert claim_of(timed(0.13) + cpu, 2).verdict == "not decided"


def test_memory_falls_when_nothing_more_is_saved():
    saved = {"memory/saved_bytes_per_token": 1000}
    found = [attack("base", "full", metrics=saved), attack("locked", "full", "x", metrics=saved)]
    assert claim_of(found, 1).verdict == "falls"


def test_a_row_that_is_not_what_it_claims_is_left_out():
    found = [attack("base", "full"), attack("locked", "full", "x")]
    assert claim_of(found, 1).verdict == "stands"
    found[1]["gates"] = {"engaged": {"holds": False, "why": "nothing saved"}}
    claim = claim_of(found, 1)
    assert claim.verdict == "not decided"
    assert "left out, a gate fails: full" in claim.text


def test_records_without_axes_decide_nothing():
    found = [attack("base", "full"), attack("locked", "full", "x")]
    for values in found:
        del values["config"]["axes"]
    assert all(claim.verdict == "not decided" for claim in report.claims(found))
    assert "no axes in the records: full" in claim_of(found, 1).text


def test_a_slope_is_of_locks_that_differ_in_depth_alone():
    found = [attack("base", "full")]
    for depth, coupling in ((8, 0.25), (16, 0.25), (32, 0.5)):
        run = attack("locked", "full", f"k{depth}", depth)
        run["config"]["lock"]["coupling"] = coupling
        found.append(run)
    text = claim_of(found, 1).text
    assert "at K = 8" in text
    assert "at K = 16; 1.00 KiB per block and token (from two depths)" in text
    assert "K = 32;" not in text


@pytest.mark.parametrize(
    ("locked", "verdict"),
    [((1.430, 1.431, 1.432), "stands"), ((1.60, 1.61, 1.62), "falls"), ((1.42, 1.50, 1.55), "not decided"),
     ((1.430, 1.431), "not decided")],
)  # fmt: skip
def test_capability_needs_an_interval_over_seeds(locked, verdict):
    found = [lock_record(f"{seed}" * 64, seed=seed, locked=value) for seed, value in enumerate(locked)]
    for values in found:
        values["config"]["seed"] = values["seed"]
    found[0]["config"]["resumed"] = {"step": 4}  # what happened to it is no setting
    assert claim_of(found, 5).verdict == verdict


def test_a_lock_that_was_not_attacked_is_judged_by_its_capability_alone():
    found = [lock_record("a" * 64), attack("base", "full"), attack("locked", "full", "b" * 64)]
    locks = report_runs.group([report_runs.Run(None, values) for values in found])
    assert [len(lock.pairs) for lock in locks] == [0, 1]
    told = {claim.id: "aaaaaaaa" in claim.text for claim in report.claims(found)}
    assert told == {"C1": False, "C2": False, "C3": False, "C4": False, "C5": True}


# --- C3, C4 -----------------------------------------------------------------------------------------------------


def judged(
    folder, locked=(2.01, 2.02, 2.00), strategy="ckpt-layer", first=4, transform=0.0, base=2.0, data="d", **gates
):
    """A tuned attack on both sides with its steps: the base gets to `base` after step 2, the locked side at `first`.

    A step is 100 tokens at 1e6 FLOPs each, five times as much on the locked side.
    """
    passed = PASSED | {"base_reaches": {"holds": True}, "equal_search": {"holds": True}} | gates
    for side in ("base", "locked"):
        for seed, last in enumerate(locked):
            end = base if side == "base" else last
            metrics = {"loss/heldout_task": end, "transform/flops": transform if side == "locked" else 0.0}
            searched = {"search": f"{strategy} {data}", "search_trials": 4, "data": data}
            values = attack(side, strategy, LOCK_ID, seed=seed, metrics=metrics, **searched)
            values["config"] |= {"micro_batch": 1, "seq_len": 1}
            flops = {"forward": 4e5, "backward": 6e5} if side == "base" else {"forward": 5e6}
            place = folder / f"{strategy}-{Path(data).parent.name}-{side}-{seed}"
            place.mkdir(parents=True)
            record = values | {"gates": passed, "plan": {"flops_per_micro_batch": flops}}
            (place / "records.jsonl").write_text(json.dumps(record) + "\n")
            reaches = 2 if side == "base" else first
            rows = [{"step": step, "phase": "train", "tokens": 100 * step, "processed_tokens": 100,
                     "loss/heldout_task": end if step >= reaches else 3.0} for step in range(1, 9)]  # fmt: skip
            (place / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def claims_of(folder):
    found = find_records([folder]) + [(folder, lock_record(LOCK_ID))]
    return {claim.id: claim for claim in report.claims(found)}


@pytest.mark.parametrize(
    ("locked", "gates", "verdict"),
    [
        ((2.20, 2.21, 2.22), {}, "stands"),
        ((2.00, 2.01, 2.02), {}, "falls"),
        ((2.00, 2.10, 2.20), {}, "not decided"),  # the interval holds the limit
        ((2.20, 2.21), {}, "not decided"),  # two seeds
        ((2.20, 2.21, 2.22), {"gradient": {"holds": False, "cosine": 0.5}}, "not decided"),
        ((2.20, 2.21, 2.22), {"equal_search": {"holds": None, "why": "no search"}}, "not decided"),
    ],
)
def test_optimisation_is_judged_by_the_rows_that_count(tmp_path, locked, gates, verdict):
    judged(tmp_path, locked, **gates)
    claim = claims_of(tmp_path)["C3"]
    assert claim.verdict == verdict, claim.text
    if verdict == "stands":  # mean 0.21, 4.303 x 0.01 / sqrt(3) = 0.0248
        assert "(2.210) and ckpt-layer on the base (2.000): +0.210 [+0.185, +0.235] nats" in claim.text


def test_the_attackers_best_is_held_against_the_bases_best(tmp_path):
    judged(tmp_path, (2.20, 2.21, 2.22))
    judged(tmp_path, (1.90, 1.91, 1.92), "act-int8", engaged={"holds": False})  # is not what it claims
    judged(tmp_path, (2.02, 2.025, 2.03), "lora", base=2.02)
    assert claims_of(tmp_path)["C3"].verdict == "falls"  # lora's 2.025 against ckpt-layer's 2.00


def test_a_strategy_that_is_weak_on_both_sides_does_not_hide_a_lock(tmp_path):
    judged(tmp_path, (2.31, 2.31, 2.31))
    judged(tmp_path, (2.30, 2.30, 2.30), "lora", base=2.29)
    assert claims_of(tmp_path)["C3"].verdict == "stands"  # +0.30, although lora itself loses 0.01


def test_tasks_with_data_of_one_name_stay_two(tmp_path):
    judged(tmp_path, (2.2, 2.2, 2.2), data="gsm8k/train.jsonl")
    judged(tmp_path, (0.9, 0.9, 0.9), "lora", base=0.8, data="style/train.jsonl")
    text = claims_of(tmp_path)["C4"].text
    assert "target 2.050" in text
    assert "target 0.850" in text


def test_a_base_run_that_lies_in_two_folders_counts_once(tmp_path):
    judged(tmp_path / "a", (2.06, 2.10, 2.14))
    for place in list((tmp_path / "a").glob("*base*")):
        shutil.copytree(place, tmp_path / "b" / place.name)
    claim = claims_of(tmp_path)["C3"]
    assert "+0.100 [+0.001, +0.199]" in claim.text
    assert claim.verdict == "not decided"


def test_two_searches_that_end_with_the_same_run_are_two_rows():
    found = []
    for search in ("a", "b"):
        base, locked = attack("base", "full", search=search), attack("locked", "full", LOCK_ID, search=search)
        found += [base | {"id": "one"}, locked | {"id": "other"}]
    (lock,) = report_runs.group([report_runs.Run(None, values) for values in found])
    assert len(lock.pairs) == 2
    assert all(pair.base and pair.locked for pair in lock.pairs)


def test_a_seed_that_diverged_is_told_and_spoils_nothing(tmp_path):
    judged(tmp_path, (2.20, 2.21, 2.22, 2.20))
    file = tmp_path / "ckpt-layer--locked-3" / "records.jsonl"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"outcome": "diverged", "gates": None}) + "\n")
    claim = claims_of(tmp_path)["C3"]
    assert claim.verdict == "stands"
    assert "(1 diverged)" in claim.text


def test_a_lock_falls_to_the_cheapest_attack_with_its_transform_paid_for(tmp_path):
    judged(tmp_path)
    judged(tmp_path, strategy="flatten", first=3, transform=1e8)
    claim = claims_of(tmp_path)["C4"]
    # target 2.05; base 2 x 100 x 1e6 = 2e8; ckpt-layer 4 x 100 x 5e6 = 2e9; flatten 3 x 100 x 5e6 + 1e8 = 1.6e9
    assert claim.verdict == "falls"
    assert "target 2.050 (the base's best +0.05): 2 of 2 rows that count get there with every seed" in claim.text
    assert "the cheapest by flatten for 1.6e+09 FLOPs, 8.00x (8.00 to 8.00) the base's cheapest" in claim.text


def test_the_best_of_a_run_is_its_lowest_loss_on_both_sides(tmp_path):
    """The base gets to 1.7 on the way to 2.0: what the locked side must reach is 1.75."""
    judged(tmp_path)
    for file in tmp_path.glob("*base*/steps.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[3]["loss/heldout_task"] = 1.7
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "target 1.750" in claims_of(tmp_path)["C4"].text


def test_a_lock_stands_only_where_its_transforms_were_tried(tmp_path):
    judged(tmp_path, (2.2, 2.2, 2.2))
    assert claims_of(tmp_path)["C4"].verdict == "not decided"
    judged(tmp_path, (2.3, 2.0, 2.3), "flatten")  # one seed gets there
    claim = claims_of(tmp_path)["C4"]
    assert claim.verdict == "not decided"
    assert "not tried by a row that counts and gets there on the base: undistil" in claim.text
    judged(tmp_path, (2.3, 2.3, 2.3), "undistil")
    claim = claims_of(tmp_path)["C4"]
    assert claim.verdict == "stands"
    assert "none of 3 rows that count gets there with every seed" in claim.text


def test_flattening_in_groups_is_not_flattening(tmp_path):
    for strategy in ("flatten", "undistil"):
        judged(tmp_path, (2.3, 2.3, 2.3), strategy)
    assert claims_of(tmp_path)["C4"].verdict == "stands"
    for file in tmp_path.glob("flatten*/records.jsonl"):
        values = json.loads(file.read_text())
        values["config"]["knobs"] = {"group": 4.0}
        file.write_text(json.dumps(values) + "\n")
    claim = claims_of(tmp_path)["C4"]
    assert claim.verdict == "not decided"
    assert "gets there on the base: flatten" in claim.text


def test_a_transform_that_fails_on_the_base_too_is_no_evidence(tmp_path):
    judged(tmp_path, (2.2, 2.2, 2.2))
    judged(tmp_path, (2.3, 2.3, 2.3), "flatten")
    judged(tmp_path, (2.3, 2.3, 2.3), "undistil", base=2.3)
    assert claims_of(tmp_path)["C4"].verdict == "not decided"


@pytest.mark.parametrize("lost", ["steps", "plan", "flops"])
def test_costs_that_are_not_told_do_not_make_a_lock_stand(tmp_path, lost):
    for strategy in ("ckpt-layer", "flatten", "undistil"):
        judged(tmp_path, strategy=strategy)
    for file in tmp_path.glob("*/records.jsonl"):
        values = json.loads(file.read_text())
        if lost == "plan":
            values["plan"] = None
        if lost == "flops":
            values["metrics"]["transform/flops"] = None
        if lost == "steps":
            (file.parent / "steps.jsonl").unlink()
        file.write_text(json.dumps(values) + "\n")
    claim = claims_of(tmp_path)["C4"]
    assert claim.verdict == "falls"
    assert "whose FLOPs are not known" in claim.text


def undoing(folder, start, knobs=None, number=0, gates=None):
    """A lock at 1.46 for 1e10 FLOPs, and a run that flattens it for 3e9; one step takes 5e9 and brings 1.462."""
    lock = lock_record(LOCK_ID)
    lock["metrics"]["cost/flops"] = 1e10
    lock["config"] |= {"heldout_digest": "h", "heldout_limit": 200, "seq_len": 64}
    metrics = {"transform/flops": 3e9, "loss/heldout_base_start": start, "loss/heldout_base": 1.462}
    own = {"heldout_base_digest": "h", "heldout_limit": 200, "knobs": knobs or {}}
    run = attack("locked", "flatten", LOCK_ID, seed=number, metrics=metrics, **own) | {"gates": gates}
    run["plan"] = {"flops_per_micro_batch": {"forward": 5e9}}  # of 4 x 64 tokens
    place = folder / str(number)
    place.mkdir()
    # The end of a run without --eval-every is told by the record alone.
    (place / "steps.jsonl").write_text(json.dumps({"step": 1, "phase": "train", "processed_tokens": 256}) + "\n")
    return lock, (place, run)


@pytest.mark.parametrize(("start", "told"), [(1.465, "for 3e+09 FLOPs, 0.300 of"), (1.6, "for 8e+09 FLOPs, 0.800 of")])
def test_undoing_is_told_as_a_part_of_what_the_lock_cost(tmp_path, start, told):
    lock, run = undoing(tmp_path, start)
    claim = claim_of([(tmp_path, lock), run], 4)
    assert f"undone to 1.470 (as locked +0.01) by flatten {told} the lock's own (1 seed)" in claim.text


def test_undoing_is_told_over_all_seeds(tmp_path):
    lock, first = undoing(tmp_path, 1.465)
    _, second = undoing(tmp_path, 1.6, number=1)
    claim = claim_of([(tmp_path, lock), first, second], 4)
    assert "for 5.5e+09 FLOPs, 0.550 (0.300 to 0.800) of the lock's own (2 seeds)" in claim.text


@pytest.mark.parametrize(
    "changed",
    [{"knobs": {"group": 4.0}}, {"gates": {"engaged": {"holds": False}}}, {"heldout_limit": 100},
     {"document_separator": "<|endoftext|>"}, {"heldout_base_digest": "another"}],
)  # fmt: skip
def test_what_undoes_no_lock_is_not_told_as_if_it_did(tmp_path, changed):
    """A flattening in groups, a run that is not what it claims, other tokens than the lock was judged on."""
    given = {name: changed[name] for name in ("knobs", "gates") if name in changed}
    lock, run = undoing(tmp_path, 1.465, **given)
    run[1]["config"] |= {name: value for name, value in changed.items() if name not in given}
    assert "undone" not in claim_of([(tmp_path, lock), run], 4).text
