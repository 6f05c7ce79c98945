"""Folders of tiny models for the tests that start ranks."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from commands import LOCK, process, write_texts
from dlrscale import launcher, record
from dlrscale.config import RunConfig, to_json


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
def start_ranks(tmp_path_factory) -> Callable[[int, list[dict]], list[dict]]:
    """Run cases of ranks.py on some ranks, in one start of the DeepSpeed launcher, and return their results."""

    def start(num_ranks: int, cases: list[dict]) -> list[dict]:
        folder = tmp_path_factory.mktemp("ranks")
        (folder / "cases.json").write_text(json.dumps(cases))
        files = str(folder / "results.json"), str(folder / "cases.json")
        line = launcher.on_this_host(num_ranks, Path(__file__).with_name("ranks.py"), *files)
        env = launcher.environment(num_ranks) | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads((folder / "results.json").read_text())

    return start


@pytest.fixture(scope="module")
def kept_ranks(tmp_path_factory, start_ranks) -> Iterator[Callable[..., int]]:
    """What takes `launcher.run`'s place: two ranks that run job after job, where a start of ranks is not what is tested."""
    folder, numbers = tmp_path_factory.mktemp("kept"), itertools.count()

    def run(config: RunConfig, look: Callable[[], object] = lambda: None) -> int:
        assert config.num_ranks == 2
        file = folder / f"{next(numbers)}.json"
        record.write_atomic(file, to_json(config))
        while not file.with_suffix(".code").exists():
            assert not served.done(), served.result()
            look()
            time.sleep(0.02)
        return int(file.with_suffix(".code").read_text())

    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(start_ranks, 2, [{"run": "serve", "folder": str(folder)}])
        try:
            yield run
        finally:
            (folder / "end").touch()
        assert served.result() == [{"jobs": next(numbers)}]
