import json
import re

import pytest

from dlrscale import report
from dlrscale.errors import ConfigError
from dlrscale.record import find_records, make_record
from dlrscale.report import runs as report_runs
from dlrscale.report import seeds, tables

D, F, N = 64, 172, 4
EVIL = "<script>alert('x')</script> ![i](http://evil.example/x.png) | `c`"


def lock_record(lock_id, depth=8, seed=0, locked=1.46, **changes):
    metrics = {
        "loss/heldout_base_model": 1.425, "loss/heldout_locked": locked, "loss/heldout_flat": 3.125,
        "lock/error_layer_0": 0.02, "lock/error_layer_1": 0.04, "time/total_s": 93.0,
        "tokens/distil": 1_200_000,
        "tokens/heal": 300_000, "params/ratio": 1.001,
    }  # fmt: skip
    config = {
        "model": "base",
        "form": "gated",
        "depth": depth,
        "coupling": 0.25,
        "start": "warm",
        "harden": True,
    }
    return make_record(
        id=lock_id, kind="lock", name="lock", outcome="ok", config=config | {"model_digest": "m1"}, seed=seed,
        metrics=metrics, started="2026-11-25T10:00:00Z", versions={"torch": "2.13"}, device={"type": "cpu"},
        git={"commit": "f" * 40, "dirty": True},
    ) | changes  # fmt: skip


def axes_of(strategy):
    levers = {"activation_checkpointing": "none" if strategy == "full" else "layer"}
    return {
        "transform": "flatten" if strategy == "flatten" else "none", "gradient": "backprop",
        "trainable": "lora" if strategy == "lora" else "all", "levers": levers, "knobs": {},
    }  # fmt: skip


def attack(side, strategy, lock_id=None, depth=8, outcome="ok", seed=0, metrics=None, **settings):
    """Numbers follow the saved-bytes formulas in fp32: D + 4 F per layer on the base, K D + 4 F locked."""
    checkpointed = strategy != "full"
    mlp = 4 * N * ((depth * D if side == "locked" else D) + 4 * F)
    values = {
        "memory/saved_bytes_per_token": 4 * N * D if checkpointed else mlp + 20_000,
        "memory/saved_mlp_bytes_per_token": 0 if checkpointed else mlp,
        "memory/saved_mlp_bytes_per_token_formula": 0 if checkpointed else mlp,
        "memory/host_peak_rss_bytes": 2**30 * (1.5 if side == "locked" else 1.0),
        "time/step_s": 0.3 if side == "locked" else 0.2,
        "time/forward_s": 0.06 if side == "locked" else 0.05,
        "time/backward_s": 0.2 if side == "locked" else 0.1,
        "throughput/tokens_per_s": 2000 if side == "locked" else 3000,
        "loss/heldout_task_start": 3.2 if side == "locked" else 3.1,
        "loss/heldout_task": 2.5 if side == "locked" else 2.0,
        "loss/heldout_base": 1.9,
    }
    manifest = {"form": "gated", "depth": depth, "coupling": 0.25, "start": "warm", "harden": True}
    config = {
        "model": side, "data": "d", "lr": 1e-3, "steps": 20, "seq_len": 64, "micro_batch": 4,
        "global_batch": 4,
        "axes": axes_of(strategy), "lock_id": lock_id, "num_ranks": 1,
        "lock": manifest | {"base_model_digest": "m1"} if side == "locked" else None,
        "out": f"/somewhere/{side}-{strategy}-{depth}-{seed}",
        "model_digest": "m1" if side == "base" else f"l{depth}",
    } | settings  # fmt: skip
    return make_record(
        id=f"{side}{strategy}{depth}{seed}", kind="attack", side=side, strategy=strategy, outcome=outcome,
        seed=seed, config=config, metrics=values | (metrics or {}), started="2026-11-25T11:00:00Z",
        device={"type": "cpu"},
        versions={"torch": "2.13"}, phases={"load": {"seconds": 1.0, "host_peak_rss_bytes": 2**29}},
    )  # fmt: skip


def family():
    """Two locks; `full` and `ckpt-layer` on base and both; an oom, a divergence and a missing side."""
    found = [lock_record("lock8" + "0" * 59), lock_record("lock16" + "0" * 58, 16)]
    for strategy in ("full", "ckpt-layer"):
        found.append(attack("base", strategy))
        found += [attack("locked", strategy, f"lock{k}" + "0" * (64 - 4 - len(str(k))), k) for k in (8, 16)]
    lock_id = "lock8" + "0" * 59
    found.append(attack("base", "act-int8"))
    found.append(
        attack("locked", "act-int8", lock_id, outcome="oom", metrics={"memory/host_peak_rss_bytes": 3 * 2**30})
    )
    found.append(attack("locked", "flatten", lock_id, outcome="diverged", metrics={"loss/heldout_task": None}))
    return found


def write(folder, found, steps=True):
    for number, values in enumerate(found):
        place = folder / f"run{number:02d}"
        place.mkdir(parents=True)
        (place / "records.jsonl").write_text(json.dumps(values) + "\n")
        if steps:
            rows = [
                {"step": s, "phase": "train", "loss/train": 3.0 / s, "tokens": 256 * s}
                | ({"loss/heldout_task": 2.9 / s} if s % 5 == 0 else {})
                for s in range(1, 21)
            ]
            (place / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def cells(markdown, table, label):
    """The cells of the row of a Markdown table that begins with a label."""
    part = markdown[markdown.index(f"**{table}") :]
    row = next(line for line in part.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.0, "1.00"), (12.34, "12.3"), (9.999, "10.0"), (1234.5, "1234"), (0.01234, "0.0123"), (0, "0"),
     (None, "-"),
     (99.96, "100"), (1e-9, "1.00e-09")],
)  # fmt: skip
def test_three_significant_digits(value, shown):
    assert tables.significant(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(512, "512 B"), (2048, "2.00 KiB"), (1.5 * 2**20, "1.50 MiB"), (80 * 2**30, "80.0 GiB"), (None, "-")],
)
def test_bytes_in_binary_units(value, shown):
    assert tables.size(value) == shown


def test_numbers_by_hand(tmp_path):
    written = report.build([write(tmp_path / "in", family())], tmp_path / "out")
    assert [p.name for p in written[:2]] == ["report.md", "report.html"]
    assert all(p.is_file() and p.stat().st_size for p in written)
    text = written[0].read_text()
    section = text[text.index("## Lock lock8000") :]
    row = cells(section, "Memory", "full")
    # mlp: base 4 bytes x 4 layers x (64 + 4 x 172) = 12032; locked 16 x (8 x 64 + 688) = 19200; rest 20000
    assert row[1:6] == ["ok / ok", "host RSS", "1.00 GiB", "1.50 GiB", "1.50"]
    assert row[6:9] == ["31.3 KiB", "38.3 KiB", "1.22"]
    assert row[9:] == ["11.8 KiB", "18.8 KiB", "1.60", "1.000", "1.000"]
    row = cells(section, "Time", "full")
    assert row[1:] == ["200 ms", "300 ms", "1.50", "50.0 ms", "60.0 ms", "1.20", "100 ms", "200 ms", "2.00",
                       "3000", "2000", "0.667", "1.67"]  # fmt: skip
    row = cells(section, "Outcome", "ckpt-layer")
    assert row[1:8] == ["ok / ok", "3.100", "3.200", "2.000", "2.500", "1.25", "+0.500"]
    assert row[-2:] == ["5,120", "5,120"]
    row = cells(section, "Memory", "act-int8")
    assert row[1:6] == ["ok / oom", "host RSS", "1.00 GiB", "3.00 GiB (oom)", ">3.00"]
    row = cells(section, "Memory", "flatten")
    assert row[1] == "- / diverged"
    assert row[3:6] == ["-", "1.50 GiB", "-"]
    assert "flatten (base)" in section[: section.index("## ", 5)]
    locks = text[text.index("## Locks") :]
    assert "| lock8000 | ok | gated | 8 | - | 0.25 | warm | yes | 1.00 | 1.425 | 1.460 | 3.125 |" in locks
    assert "| 0.0400 | 0.0300 |" in locks
    assert "1,200,000 | 300,000 | 93.0 s" in locks
    for link in re.findall(r"\]\((.*?)\)", text):
        assert (tmp_path / "out" / link).is_file(), link


def test_page_asks_for_nothing_and_escapes_all(tmp_path):
    found = family()
    found[2]["config"]["command"] = f"dlrscale attack --name '{EVIL}'"
    found[2]["error"] = EVIL
    for values in found:
        values["name"], values["device"] = EVIL, {"name": EVIL}
    found.append(attack("locked", EVIL, found[0]["id"]))
    found.append(attack("locked", "full", EVIL))
    written = report.build([write(tmp_path / EVIL.replace("/", ""), found)], tmp_path / "out")
    html = written[1].read_text()
    assert "<script" not in html
    assert "&lt;script" in html
    assert not re.search(r"""(src|href|action|srcset|data)\s*=\s*["'](?!#)""", html)
    assert not re.search(r"(@import|url\()(?!#)", html)
    urls = set(re.findall(r"https?://[^\s\"'<)]+", html)) - {"http://evil.example/x.png"}
    assert urls <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<img" not in html
    markdown = written[0].read_text()
    outside = re.sub(r"(?ms)^(`{3,})\n.*?^\1$", "", markdown)
    assert "<script" not in outside
    assert not re.search(r"(?<!\\)\]\(http", outside)
    for path in written[2:]:
        if path.suffix == ".svg":
            assert "<script" not in path.read_text()


def test_pairs_need_equal_settings():
    lock_id = "l" * 64
    found = [
        attack("base", "full"), attack("base", "full", lr=1e-2), attack("base", "full", seed=1),
        attack("base", "full", model_digest="another", out="/x"),
        attack("locked", "full", lock_id), attack("locked", "full", lock_id, seed=1),
        attack("locked", "full", lock_id, steps=40),
    ]  # fmt: skip
    (lock,) = report_runs.group([report_runs.Run(None, values) for values in found])
    both = {p.label: (p.base is not None, p.locked is not None) for p in lock.pairs}
    assert both == {
        "full (lr 0.001, seed 0, steps 20)": (True, True),
        "full (lr 0.001, seed 1, steps 20)": (True, True),
        "full (lr 0.01, seed 0, steps 20)": (True, False),
        "full (lr 0.001, seed 0, steps 40)": (False, True),
    }


def test_same_settings_twice_stay_two_rows():
    lock_id = "l" * 64
    found = [attack("base", "full"), attack("locked", "full", lock_id), attack("locked", "full", lock_id)]
    (lock,) = report_runs.group([report_runs.Run(None, values) for values in found])
    assert [p.label for p in lock.pairs] == ["full #1", "full #2"]
    assert lock.pairs[0].base is lock.pairs[1].base


def test_digest_of_data_counts_not_its_path():
    found = [
        attack("base", "full", data="/a", data_digest="1"),
        attack("locked", "full", "x", data="/b", data_digest="1"),
    ]
    (lock,) = report_runs.group([report_runs.Run(None, values) for values in found])
    assert len(lock.pairs) == 1


def test_accelerator_peak_is_used_where_both_sides_have_it():
    name = "memory/accelerator_peak_allocated_bytes"
    found = [
        attack("base", "full", metrics={name: 2**30}),
        attack("locked", "full", "x", metrics={name: 2**31}),
    ]
    (lock,) = report_runs.group([report_runs.Run(None, values) for values in found])
    assert lock.pairs[0].where == "accelerator"
    assert tables.peak_cells(lock.pairs[0]) == ["1.00 GiB", "2.00 GiB", "2.00"]
    del found[0]["metrics"][name]
    (lock,) = report_runs.group([report_runs.Run(None, values) for values in found])
    assert tables.peak_cells(lock.pairs[0]) == ["1.00 GiB", "1.50 GiB", "1.50"]


def test_claims_of_the_family():
    by_id = {claim.id: claim for claim in report.claims(family())}
    assert list(by_id) == ["C1", "C2", "C3", "C4", "C5"]
    assert {k: c.verdict for k, c in by_id.items()} == {
        "C1": "stands", "C2": "not decided", "C3": "not decided", "C4": "not decided", "C5": "not decided",
    }  # fmt: skip
    # 8 more blocks cost 16 x 8 x 64 bytes: 1024 per block
    assert "1.00 KiB per block and token (from two depths)" in by_id["C1"].text
    assert (
        "full saves 1.22x the bytes per token (38.3 KiB against 31.3 KiB), the DLR-Net part alone 1.60x"
        in by_id["C1"].text
    )
    assert "ckpt-layer leaves 1.00x (0% of the extra bytes), peak memory 1.50x (host RSS), at 1.00x" in by_id["C1"].text
    assert "on the CPU: full 1.67 (forward 1.20x, backward 2.00x); ckpt-layer 1.67 (" in by_id["C2"].text
    assert "do not count, locked - base: full +0.500 (one seed); ckpt-layer +0.500" in by_id["C3"].text
    assert "flattened without training its held-out loss is 3.125" in by_id["C4"].text
    assert "+0.035 nats" in by_id["C5"].text


@pytest.mark.parametrize(("backward", "verdict"), [(0.125, "not decided"), (0.11, "falls"), (0.15, "stands")])
def test_backward_needs_more_than_noise(backward, verdict):
    # forward ratio 1.2; asymmetries 1.04, 0.917 (within 10 %), 1.25
    verdict = "not decided" if backward == 0.11 else verdict
    peak = {"memory/accelerator_peak_allocated_bytes": 2**30}
    found = [
        attack("base", "full", metrics=peak),
        attack("locked", "full", "x", metrics=peak | {"time/backward_s": backward}),
    ]
    assert report.claims(found)[1].verdict == verdict


def test_backward_is_never_decided_on_a_cpu():
    found = [attack("base", "full"), attack("locked", "full", "x", metrics={"time/backward_s": 0.5})]
    assert report.claims(found)[1].verdict == "not decided"


def test_memory_falls_when_nothing_more_is_saved():
    saved = {"memory/saved_bytes_per_token": 1000}
    found = [attack("base", "full", metrics=saved), attack("locked", "full", "x", metrics=saved)]
    assert report.claims(found)[0].verdict == "falls"


@pytest.mark.parametrize(
    ("locked", "verdict"),
    [((1.430, 1.431, 1.432), "stands"), ((1.60, 1.61, 1.62), "falls"), ((1.42, 1.50, 1.55), "not decided"),
     ((1.430, 1.431), "not decided")],
)  # fmt: skip
def test_capability_needs_an_interval_over_seeds(locked, verdict):
    found = [lock_record(f"{seed}" * 64, seed=seed, locked=value) for seed, value in enumerate(locked)]
    for values in found:
        values["config"]["seed"] = values["seed"]
    assert report.claims(found)[4].verdict == verdict


def test_summary_is_aligned():
    text = report.summary_table(family())
    lines = text[: text.index("\n\n")].splitlines()
    assert lines[0].startswith("Lock lock8000: gated, K = 8")
    assert len({line.index("ok") for line in lines if line.startswith(("full", "ckpt"))}) == 1
    assert re.search(r"full +ok / ok +1.00 GiB +1.50 GiB +1.50 +31.3 KiB +38.3 KiB +1.22 +1.50 +2.000 +2.500", text)
    assert ">3.00" in text
    assert report.summary_table([]) == "No attack and no lock in these records.\n"


@pytest.mark.parametrize(
    "found",
    [
        [lock_record("a" * 64)],
        [attack("base", "full")],
        [attack("locked", "full", "a" * 64)],
        [make_record(id="f" * 64, kind="attack", outcome="failed", side="locked", error="no memory\nlong")],
        [make_record(id="f" * 64, kind="lock", outcome="failed", config={"form": "gated"})],
        [make_record(id="f" * 64, kind="pretrain", outcome="ok")],
        [make_record(id="f" * 64, kind="attack", outcome="oom", side="base", strategy="full")],
    ],
)
@pytest.mark.parametrize("steps", [True, False])
def test_partial_records_do_not_crash(tmp_path, found, steps):
    written = report.build([write(tmp_path / "in", found, steps)], tmp_path / "out")
    text = written[0].read_text()
    assert "nan" not in re.findall(r"\bnan\b", text)
    assert len(report.claims(found)) == 5
    assert all(c.verdict == "not decided" for c in report.claims(found))
    assert str(found[0]["outcome"]) in text
    report.summary_table(found)


def test_no_records_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"No records\.jsonl"):
        report.build([tmp_path], tmp_path / "out")


def test_same_records_give_the_same_page(tmp_path):
    place = write(tmp_path / "in", family())
    first = report.build([place], tmp_path / "a")
    second = report.build([place], tmp_path / "b")
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name


def test_the_runs_show_plan_and_error():
    errors = {"saved_bytes": 0.0, "accelerator_peak_bytes": -2.5, "lost_bytes": None}
    off, exact = {"peak_bytes": 3 << 30, "error_percent": errors}, {"peak_bytes": 1 << 20, "error_percent": {"a": 0.0}}
    runs = [report_runs.Run(None, make_record(id="a" * 64, kind="attack", plan=plan)) for plan in (off, exact, None)]
    wanted = [["3.00 GiB", "-2.50 % (accelerator_peak)"], ["1.00 MiB", "0"], [tables.MISSING] * 2]
    assert [tables.plan(run) for run in runs] == wanted


# --- Trials, seeds, targets and gates --------------------------------------------------------------------------

LOCK_ID = "lock8" + "0" * 59
PASSED = {"gradient": {"holds": True, "cosine": 0.99999}, "engaged": {"holds": True}}


def tuned(seeds=(0, 1, 2), trials=4, **gates):
    """A searched attack on both sides: rates that differ, three seeds, a target that the locked side misses once."""
    found = [lock_record(LOCK_ID)]
    for side, lr, tokens in (("base", 1e-3, 1000), ("locked", 5e-3, 2500)):
        common = {"search": "s" * 64, "search_trials": trials, "lr": lr}
        for number in range(trials):
            own = common | {"heldout_part": "tune", "trial": number, "lr": lr * 2**number,
                            "pruned_at": 5 if number == 3 else None}  # fmt: skip
            spent = {"cost/tokens": 100.0, "loss/heldout_task": 2.0 + number / 10}
            found.append(attack(side, "lora", LOCK_ID, metrics=spent, **own) | {"id": f"{side}trial{number}"})
        for seed in seeds:
            reached = not (side == "locked" and seed == 2)
            values = {"target/loss": 2.2, "target/reached": float(reached), "target/tokens": tokens + seed,
                      "target/flops": 1e12 * tokens, "target/device_hours": tokens / 1e5,
                      "loss/heldout_task": (2.0 if side == "base" else 2.5) + seed / 10}  # fmt: skip
            run = attack(side, "lora", LOCK_ID, seed=seed, metrics=values, **common, heldout_part="report", trial=0)
            told = {"base_reaches": {"holds": True, "reached": 3, "runs": 3},
                    "equal_search": {"holds": True, "trials": trials, "base_trials": trials}} | gates  # fmt: skip
            found.append(run | {"gates": PASSED | (told if side == "locked" else {})})
    return found


def test_trials_are_no_rows_and_searched_sides_are_paired_by_seed(tmp_path):
    (lock,) = report_runs.group(report._runs(tuned()))
    assert [pair.label for pair in lock.pairs] == [f"lora, 4 trials (seed {seed})" for seed in range(3)]
    assert all(pair.base and pair.locked and pair.base.seed == pair.locked.seed for pair in lock.pairs)
    assert {pair.base.settings["lr"] for pair in lock.pairs} == {1e-3}
    (search,) = lock.searches
    assert [[run.settings["trial"] for run in search.trials(side)] for side in ("base", "locked")] == [[0, 1, 2, 3]] * 2
    text = report.build([write(tmp_path / "in", tuned())], tmp_path / "out")[0].read_text()
    assert "(8 of them trials of searches)" in text
    listed = text[text.index("## All runs") :]
    assert listed.count("| lora |") == 6
    searches = text[text.index("**Searches**") :].splitlines()[4:6]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in searches]
    assert rows[0] == ["lora", "base", "4", "1", "0", "0", "2.000", "0.00100", "-", "4", "-", "400"]
    assert rows[1][7] == "0.00500"


def test_means_and_targets_by_hand():
    (lock,) = report_runs.group(report._runs(tuned()))
    (row,) = seeds.means(lock).rows
    assert row[:3] == ["lora, 4 trials", "0, 1, 2", "2.100 \u00b1 0.100 (n = 3)"]
    assert row[3:5] == ["2.600 \u00b1 0.100 (n = 3)", "0.500 \u00b1 0.000 (n = 3)"]
    first, _, third = seeds.targets(lock).rows
    assert first[1:] == ["2.200", "1,000", "2,500", "2.50", "1e+15", "2.5e+15", "2.50", "0.0100", "0.0250", "2.50",
                         "1,400", "2,900", "2.07"]  # fmt: skip
    assert third[2:5] == ["1,002", ">2,502", ">2.50"]


@pytest.mark.parametrize(
    ("gates", "number", "counts"),
    [
        ({}, 3, "yes"),
        ({}, 2, "no (seeds: 2 of 3)"),
        ({"base_reaches": {"holds": False, "reached": 2, "runs": 3}}, 3, "no (base reaches: no, 2 of 3)"),
        ({"equal_search": {"holds": False, "trials": 4, "base_trials": 3}}, 3, "no (equal search: no, 3 / 4 trials)"),
        ({"base_reaches": {"holds": None, "why": "no target"}}, 3, "no (base reaches: no target)"),
        ({"gradient": {"holds": None, "why": "mezo claims no exact gradient"}}, 3, "yes"),
        ({"gradient": {"holds": False, "cosine": 0.5}}, 3, "no (gradient: no, cosine 0.500000)"),
        ({"engaged": None}, 3, "no (engaged: not checked)"),
    ],
)  # fmt: skip
def test_a_row_counts_only_if_all_its_gates_hold(gates, number, counts):
    (lock,) = report_runs.group(report._runs(tuned(seeds=range(number), **gates)))
    (row,) = seeds.gates(lock).rows
    assert row[0] == "lora, 4 trials"
    assert row[-2:] == [str(number), counts]


def judged(folder, locked=(2.01, 2.02, 2.00), strategy="ckpt-layer", first=4, transform=0.0, **gates):
    """A tuned attack on both sides with its step rows: the base gets to 2.0 after step 2, the locked side from `first`.

    A step is 100 tokens at 1e6 FLOPs each, five times as much on the locked side.
    """
    passed = PASSED | {"base_reaches": {"holds": True}, "equal_search": {"holds": True}} | gates
    for side in ("base", "locked"):
        for seed, last in enumerate(locked):
            end = 2.0 if side == "base" else last
            metrics = {"loss/heldout_task": end, "transform/flops": transform if side == "locked" else 0.0}
            values = attack(side, strategy, LOCK_ID, seed=seed, metrics=metrics, search="s", search_trials=4)
            values["config"] |= {"micro_batch": 1, "seq_len": 1}
            flops = {"forward": 4e5, "backward": 6e5} if side == "base" else {"forward": 5e6}
            place = folder / f"{strategy}-{side}-{seed}"
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
        assert "ckpt-layer, 4 trials: locked - base +0.210 [+0.185, +0.235] nats (2.000 and 2.210)" in claim.text


def test_the_attacker_takes_what_works_best(tmp_path):
    judged(tmp_path, (2.20, 2.21, 2.22))
    judged(tmp_path, (2.00, 2.01, 2.02), "lora")
    judged(tmp_path, (1.90, 1.91, 1.92), "act-int8", engaged={"holds": False})  # is not what it claims
    assert claims_of(tmp_path)["C3"].verdict == "falls"


def test_a_lock_falls_to_the_cheapest_attack_with_its_transform_paid_for(tmp_path):
    judged(tmp_path)
    judged(tmp_path, strategy="flatten", first=3, transform=1e8)
    claim = claims_of(tmp_path)["C4"]
    # target 2.05; base 2 x 100 x 1e6 = 2e8; ckpt-layer 4 x 100 x 5e6 = 2e9; flatten 3 x 100 x 5e6 + 1e8 = 1.6e9
    assert claim.verdict == "falls"
    assert "target 2.050 (the base's best +0.05): 2 of 2 rows that count get there with every seed" in claim.text
    assert "the cheapest by flatten, 4 trials for 1.6e+09 FLOPs, 8.00x (8.00 to 8.00) the base's cheapest" in claim.text


def test_a_lock_stands_only_against_those_who_know_it(tmp_path):
    judged(tmp_path, (2.2, 2.2, 2.2))
    assert claims_of(tmp_path)["C4"].verdict == "not decided"
    judged(tmp_path, (2.3, 2.0, 2.3), "flatten")  # one seed gets there
    claim = claims_of(tmp_path)["C4"]
    assert claim.verdict == "stands"
    assert (
        "none of 2 rows that count gets there with every seed; the closest, flatten, 4 trials, is at 2.2" in claim.text
    )


@pytest.mark.parametrize(("start", "told"), [(1.465, "for 3e+09 FLOPs, 0.300 of"), (1.6, "for 8e+09 FLOPs, 0.800 of")])
def test_undoing_is_told_as_a_part_of_what_the_lock_cost(tmp_path, start, told):
    """Locked at 1.46, for 1e10 FLOPs; the transform takes 3e9, a step 5e9 and brings 1.462."""
    lock = lock_record(LOCK_ID)
    lock["metrics"]["cost/flops"] = 1e10
    lock["config"] |= {"heldout_digest": "h", "heldout_limit": 200, "seq_len": 64}
    metrics = {"transform/flops": 3e9, "loss/heldout_base_start": start}
    run = attack("locked", "flatten", LOCK_ID, metrics=metrics, heldout_base_digest="h", heldout_limit=200)
    run["plan"] = {"flops_per_micro_batch": {"forward": 5e9}}  # of 4 x 64 tokens
    (tmp_path / "steps.jsonl").write_text(
        json.dumps({"step": 1, "phase": "train", "processed_tokens": 256, "loss/heldout_base": 1.462}) + "\n"
    )
    told_of = report.claims([(tmp_path, lock), (tmp_path, run)])[3].text
    assert f"undone to 1.470 (as locked +0.01) by flatten {told} the lock's own" in told_of
    run["config"]["heldout_limit"] = 100  # not the tokens on which the lock was judged
    assert "undone" not in report.claims([(tmp_path, lock), (tmp_path, run)])[3].text


def test_the_transform_is_on_the_bill():
    spent = {"transform/tokens": 4096, "transform/flops": 2.5e12, "transform/time_s": 12.5}
    run = attack("locked", "flatten", LOCK_ID, metrics=spent)
    run["phases"]["transform"] = {"seconds": 12.5, "host_peak_rss_bytes": 2 * 2**30}
    (lock,) = report_runs.group(report._runs([run, attack("locked", "full", LOCK_ID)]))
    (row,) = seeds.transforms(lock).rows
    assert row == ["flatten", "host RSS", "4,096", "2.5e+12", "12.5 s", "2.00 GiB", "1.50 GiB"]
    assert [pair.peaks()[1] for pair in lock.pairs] == [1.5 * 2**30, 2 * 2**30]  # the larger of both is needed


def test_claims_say_how_the_settings_were_found():
    assert "3 seeds, tuned in 4 trials on each side." in report.claims(tuned())[2].text
    assert "untuned learning rate" in report.claims(family())[2].text


def test_what_a_job_found_does_not_part_the_sides(tmp_path):
    """A resumed run, a transform's engine, and what best-memory chose for each side belong to no key."""
    from dlrscale.report.runs import Run

    def key(**config):
        record = {"strategy": "undistil", "kind": "attack", "config": {"lr": 1e-3, "steps": 4} | config}
        return Run(tmp_path, record).settings_key

    assert key() == key(transform_engine={"x": 1}, resumed={"step": 2}, offloaded_param_bytes=3)
    assert key() != key(transform="flatten")
    first, second = ({"lever_search": {"cap": cap}, "tiles": tiles} for cap, tiles in ((1.33, 1), (1.33, 8)))
    assert key(**first) == key(**second)
    assert key(**first) != key(lever_search={"cap": 2.0}, tiles=1)
