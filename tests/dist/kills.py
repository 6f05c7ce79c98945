"""Kill a job at random moments, again and again, and see that it ends as if nothing had been.

    python tests/dist/kills.py --kills 20 --seed 0

Locks a tiny model once in peace. Then it starts the same lock in another folder and sends SIGKILL, SIGTERM or SIGINT
to the command, DeepSpeed's runner, its launcher, a rank, or all of them, at a random moment; every process must be
gone within 60 s and nothing half-written be there. The same command is started again until it has been hit as often
as asked for, and then runs to its end: its step rows and weights must be those of the peaceful run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from dlrscale import record

LOCK = ["--depth", "4", "--num-ranks", "2", "--seq-len", "32", "--micro-batch", "2", "--steps", "30",
        "--heal-steps", "10", "--checkpoint-every", "2", "--heldout-limit", "4", "--zero", "2"]  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TARGETS = ("command", "runner", "launcher", "rank", "all")
GONE_S = 60.0


def environment() -> dict[str, str]:
    """The environment of a command: the CPU, and no rank's variables."""
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in left_out} | {"DS_ACCELERATOR": "cpu"}


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
            part = "rank"
            if any("deepspeed.launcher.launch" in word for word in words):
                part = "launcher"
            elif any(word.endswith("bin/deepspeed") for word in words):
                part = "runner"
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


def wait_for_rows(place: Path, command: subprocess.Popen, count: int, patience_s: float = 120.0) -> None:
    """Wait until a run has written some step rows."""
    deadline = time.monotonic() + patience_s
    while len(rows(place)) < count:
        assert command.poll() is None, (place.parent / "said.log").read_text()[-2000:]
        assert time.monotonic() < deadline, f"{count} steps have not come"
        time.sleep(0.02)


def rows(folder: Path) -> list[dict]:
    """The step rows of a run without its times."""
    file = folder / record.STEPS_FILE
    found = record.read_lines(file) if file.exists() else []
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))} for row in found]


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


def make_place(folder: Path) -> Path:
    """A folder with a tiny base model, its tokenizer and text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dlrscale.models import train_tokenizer

    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "far", "away", "from", "home"]
    text = "\n".join(" ".join(words[(i * 7 + j * 3) % len(words)] for j in range(40)) for i in range(60))
    (folder / "text.txt").write_text(text)
    tokenizer = train_tokenizer([text], 264)
    config = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


def main() -> None:
    """Do it, and print one line per kill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        place = make_place(Path(name))
        line = ("lock", "--model", "base", "--data", "text.txt", *LOCK)
        begun = time.monotonic()
        assert start(place, *line, "--out", "peace").wait(600) == 0, (place / "said.log").read_text()
        span = time.monotonic() - begun
        done, war = 0, place / "war"
        while done < options.kills:
            command = start(place, *line, "--out", "war")
            time.sleep(dice.uniform(0.2, 1.0) * span)
            target, number, pick = dice.choice(TARGETS), dice.choice(SIGNALS), dice.randrange(2)
            if command.poll() is not None:
                break  # it has come to its end
            steps, hit_at = len(rows(war)), time.monotonic()
            processes = hit(command, target, number, pick)
            if not processes:
                target, processes = "command", hit(command, "command", number)
            assert all_gone(processes), f"left after {GONE_S} s: {processes}"
            command.wait()
            seconds = time.monotonic() - hit_at
            check_nothing_is_half_written(war)
            done += 1
            print(f"kill {done}: {signal.Signals(number).name} to {target} at step {steps}: gone in {seconds:.1f} s", flush=True)
        assert start(place, *line, "--out", "war").wait(600) == 0, (place / "said.log").read_text()
        assert rows(war) == rows(place / "peace")
        assert weights(war) == weights(place / "peace")
        print(f"{done} kills; rows and weights are those of the run in peace")


if __name__ == "__main__":
    main()
