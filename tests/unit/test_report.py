import json
import re

import pytest
from report_records import LOCK_ID, PASSED, attack, lock_record

from dlrscale import report
from dlrscale.errors import ConfigError
from dlrscale.record import make_record
from dlrscale.report import runs as report_runs
from dlrscale.report import seeds, tables

EVIL = "<script>alert('x')</script> ![i](http://evil.example/x.png) | `c`"


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
    assert "do not count: full, ckpt-layer +0.500 (one seed); act-int8 +0.50" in by_id["C3"].text
    assert "flattened without training its held-out loss is 3.125" in by_id["C4"].text
    assert "+0.035 nats" in by_id["C5"].text


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


def test_a_row_names_what_was_chosen_by_hand_on_its_axes(tmp_path):
    """The same strategy by two gradient methods is two rows, and each says which it is."""
    entries = [attack(side, "flatten", LOCK_ID) for side in ("base", "locked")]
    by_hand = [attack(side, "flatten", LOCK_ID) for side in ("base", "locked")]
    for entry in by_hand:
        entry["id"] += "x"
        entry["config"]["axes"] = entry["config"]["axes"] | {"gradient": "lomo"}
    pairs = [report_runs.Pair(*(report_runs.Run(tmp_path, entry) for entry in two)) for two in (entries, by_hand)]
    assert [pair.name for pair in pairs] == ["flatten", "flatten, gradient lomo"]
