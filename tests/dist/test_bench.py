"""The benchmark's own smoke run: that it runs, and that it compares what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

BENCH = Path(__file__).resolve().parents[1] / "bench" / "bench.py"


def test_the_quick_benchmark_runs_to_its_record(tmp_path):
    line = [sys.executable, str(BENCH), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    header, *rows = [json.loads(text) for text in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert header["versions"]["torch"]
    assert len(rows) == 15
    assert all(row["q1"] <= row["median"] <= row["q3"] for row in rows)
    found = {row["what"]: row for row in rows}
    assert all(r["bytes"] == r["planned_bytes"] for r in rows if "planned_bytes" in r)
    assert found["lock step / one graph, K = 4: saved bytes at once"]["median"] == pytest.approx(0.5, rel=0.01)
    live = found["attack step / Trainer step: peak live tensor bytes"]["bytes"]
    assert min(live["ours"] + live["trainer"]) > 16 * 60_000  # weights, gradients, moments of 60 k parameters
    told = (tmp_path / "README.md").read_text()
    assert all(row["what"] in told for row in rows)
    assert str(tmp_path) not in told
    assert str(BENCH.parents[2]) not in told
