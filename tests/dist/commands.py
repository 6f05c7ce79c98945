"""Running and hitting the `dlrscale` command on a tiny model; what the tests and kills.py share."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil

from dlrscale import record

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "far", "away", "from", "home"]
LOCK = ["--depth", "4", "--num-ranks", "2", "--seq-len", "32", "--micro-batch", "2", "--steps", "40",
        "--heal-steps", "12", "--checkpoint-every", "4", "--heldout-limit", "4", "--zero", "2"]  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TARGETS = ("command", "launcher", "rank", "all")
GONE_S = 60.0


def environment(**changes: str | None) -> dict[str, str]:
    """The environment of a command: the CPU, and no rank's variables; None takes a variable away.

    Coverage is not measured there: it would make each start by a third dearer.
    """
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    found = os.environ | {"DS_ACCELERATOR": "cpu"} | changes
    return {
        key: value
        for key, value in found.items()
        if value is not None and key not in left_out and not key.startswith(("COVERAGE_PROCESS_", "COV_CORE_"))
    }


def dlrscale(place: Path, *options: str) -> subprocess.CompletedProcess:
    """Run the command `dlrscale` in a folder to its end, inside this process, which has imported it already."""
    from dlrscale import cli

    out, err, here = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(place)
    try:
        with (
            mock.patch.dict(os.environ, environment(), clear=True),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            cli.main(list(options))
    except SystemExit as end:
        return subprocess.CompletedProcess(options, end.code, out.getvalue(), err.getvalue())
    finally:
        os.chdir(here)
    raise AssertionError("the command did not end")


def process(place: Path, *options: str, **changes) -> subprocess.CompletedProcess:
    """Run `dlrscale` in a folder to its end, in a process of its own."""
    line = [sys.executable, "-c", "from dlrscale.cli import main; main()", *options]
    return subprocess.run(line, cwd=place, env=environment(), capture_output=True, text=True, timeout=300, **changes)


def start(place: Path, *options: str) -> subprocess.Popen:
    """Start `dlrscale` in a folder; what it says goes to `said.log` there."""
    line = [sys.executable, "-c", "from dlrscale.cli import main; main()", *options]
    with open(place / "said.log", "ab") as log:
        return subprocess.Popen(line, cwd=place, env=environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def family(command: subprocess.Popen) -> dict[str, list[psutil.Process]]:
    """The processes of a job by their part in it."""
    found: dict[str, list[psutil.Process]] = {"command": [psutil.Process(command.pid)]}
    for process in psutil.Process(command.pid).children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if any(word.endswith("jobs/__main__.py") for word in words):
            part = "launcher" if any(word.endswith("launcher/node.py") for word in words) else "rank"
            found.setdefault(part, []).append(process)
    found["all"] = [process for processes in found.values() for process in processes]
    return found


def hit(command: subprocess.Popen, target: str, number: int, pick: int = 0) -> list[psutil.Process]:
    """Send a signal to a part of a job.

    Args:
        command: The command.
        target: One of `TARGETS`.
        number: The signal.
        pick: Which rank, of several.

    Returns:
        All processes that the job had then; empty if the part was not there (yet).
    """
    parts = family(command)
    chosen = parts.get(target, [])
    if target == "rank" and chosen:
        chosen = [chosen[pick % len(chosen)]]
    for process in chosen:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
    return parts["all"] if chosen else []


def all_gone(processes: list[psutil.Process], patience_s: float = GONE_S) -> bool:
    """Whether every process has ended in time."""
    return not psutil.wait_procs(processes, timeout=patience_s)[1]


def rows_file(folder: Path) -> int | None:
    """What tells one file of step rows from the next: each start of a run writes a new one."""
    file = folder / record.STEPS_FILE
    return file.stat().st_ino if file.exists() else None


def wait_for_rows(
    place: Path, command: subprocess.Popen, count: int, before: int | None, patience_s: float = 120.0
) -> None:
    """Wait until a start of a run has as many step rows, those of before included; `before` is its old `rows_file`."""
    deadline = time.monotonic() + patience_s
    while rows_file(place) == before or len(rows(place)) < count:
        assert command.poll() is None, (place.parent / "said.log").read_text()[-2000:]
        assert time.monotonic() < deadline, f"{count} steps have not come"
        time.sleep(0.02)


def rows(folder: Path) -> list[dict]:
    """The step rows of a run without its times."""
    file = folder / record.STEPS_FILE
    found = record.read_lines(file) if file.exists() else []
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))} for row in found]


def last(folder: Path) -> dict:
    """The newest record of a run."""
    return list(record.read_lines(folder / record.RECORDS_FILE))[-1]


def weights(folder: Path) -> bytes:
    """The bytes of an exported model's weights."""
    return (folder / "model" / "model.safetensors").read_bytes()


def check_nothing_is_half_written(folder: Path) -> None:
    """What is there under its final name is whole: records, step rows, model."""
    for file in (folder / record.RECORDS_FILE, folder / record.STEPS_FILE):
        if file.exists():
            list(record.read_lines(file))
    if (folder / "model").exists():
        for name in ("config.json", "lock.json"):
            json.loads((folder / "model" / name).read_text())
        from safetensors import safe_open

        with safe_open(folder / "model" / "model.safetensors", "pt") as file:
            assert file.keys()


def check_end(command: subprocess.Popen, war: Path, peace: Path) -> None:
    """A run that was hit and goes on now ends as the one in peace: the same rows, the same weights."""
    assert command.wait(600) == 0, (war.parent / "said.log").read_text()[-3000:]
    assert rows(war) == rows(peace)
    assert weights(war) == weights(peace)


def write_texts(folder: Path) -> None:
    """Text, and prompt/completion records, for a tiny model."""
    text = "\n".join(" ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(40)) for i in range(60))
    (folder / "text.txt").write_text(text)
    pairs = [{"prompt": " ".join(WORDS[i % 9 : i % 9 + 3]) + " ", "completion": WORDS[i % 13]} for i in range(40)]
    (folder / "task.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
