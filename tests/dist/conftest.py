"""Folders of tiny models for the tests that start ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from commands import LOCK, process, write_texts
from dlrscale import launcher
from dlrscale.config import RunConfig, to_json

LIMIT_S = 500.0  # of one start of ranks


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, make_llama, tokenizer) -> Path:
    """A tiny pretrained Llama's folder with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "base"
    make_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory, tiny_folder) -> Path:
    """A folder with a tiny base model, text and prompt/completion records."""
    folder = tmp_path_factory.mktemp("commands")
    shutil.copytree(tiny_folder, folder / "base")
    write_texts(folder)
    return folder


@pytest.fixture(scope="session")
def locked(place: Path) -> Path:
    """A lock that ran without interruption, with MLflow on."""
    done = process(place, "lock", "--model", "base", "--data", "text.txt", *LOCK, "--out", "whole")
    assert done.returncode == 0, done.stderr
    unused, model, losses, errors = done.stdout.strip().splitlines()[1:]
    assert unused.startswith("data not used: train ")
    assert str(place / "whole" / "model") in model
    assert all(word in losses for word in ("base", "locked", "flattened"))
    assert errors.startswith("error by layer: 0: ")
    return place / "whole"


@pytest.fixture(scope="session")
def start_ranks(tmp_path_factory) -> Iterator[Callable[..., list[dict]]]:
    """Run cases of ranks.py on some ranks, which one process forks, and return their results."""
    log = tmp_path_factory.mktemp("forks") / "forks.log"
    env = launcher.environment(2) | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(Path(__file__).with_name("ranks.py"))]
    with open(log, "wb") as file:
        forking = subprocess.Popen(
            line, env=env, stdin=subprocess.PIPE, stdout=file, stderr=file, text=True, start_new_session=True
        )

    def start(num_ranks: int, cases: list[dict], look: Callable[[], object] = lambda: None) -> list[dict]:
        folder = tmp_path_factory.mktemp("ranks")
        (folder / "cases.json").write_text(json.dumps(cases))
        own = launcher.environment(num_ranks) | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        asked = {"ranks": num_ranks, "env": own, "cwd": os.getcwd(), "folder": str(folder)}
        forking.stdin.write(json.dumps(asked) + "\n")
        forking.stdin.flush()
        deadline = time.monotonic() + LIMIT_S
        while not (folder / "codes.json").exists():
            assert forking.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, (folder / "ranks.log").read_text()[-3000:]
            look()
            time.sleep(0.02)
        codes = json.loads((folder / "codes.json").read_text())
        assert codes == [0] * num_ranks, (folder / "ranks.log").read_text()[-3000:]
        return json.loads((folder / "results.json").read_text())

    yield start
    forking.stdin.close()
    forking.wait(60)


@pytest.fixture(scope="session")
def on_forked_ranks(start_ranks) -> Callable[..., int]:
    """What takes `launcher.run`'s place in a command where the start of ranks is not what is tested."""

    def run(config: RunConfig, look: Callable[[], object] = lambda: None) -> int:
        (result,) = start_ranks(config.num_ranks, [{"run": "job", "config": json.loads(to_json(config))}], look)
        return result["code"]

    return run
