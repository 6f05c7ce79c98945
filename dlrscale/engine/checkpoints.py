"""Checkpoints of a run: which are whole, in which layout they were written, and how another layout reads them.

A checkpoint is a folder `step<N>` with DeepSpeed's files and `whole.json`, which is written last and holds the
layout and the size and SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlrscale.errors import ConfigError

WHOLE = "whole.json"
UNIVERSAL = "universal-step"


@dataclass(frozen=True)
class Layout:
    """What DeepSpeed's files depend on: the number of ranks and the ZeRO stage."""

    ranks: int
    stage: int

    def __str__(self) -> str:
        return f"{self.ranks} {'rank' if self.ranks == 1 else 'ranks'} at ZeRO stage {self.stage}"

    def reads(self, written: Layout) -> str | None:
        """How this layout goes on from a checkpoint of another one.

        Args:
            written: The layout of the checkpoint.

        Returns:
            `plain`, `universal` (after DeepSpeed's own conversion), or None where there is no way.
        """
        if self == written or self.stage == written.stage == 0:
            return "plain"
        same = self.stage == written.stage or {self.stage, written.stage} == {1, 2}
        return "universal" if same and self.stage else None


def sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def files_of(folder: Path) -> list[str]:
    """Names of a checkpoint's files but `whole.json`, relative to its folder and sorted."""
    names = (str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if name != WHOLE)


def read_whole(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's `whole.json`.

    Args:
        folder: The checkpoint's folder.

    Returns:
        `step`, `world_size`, `stage` and `files`.

    Raises:
        ValueError: If it is missing or wrong, or a file of the checkpoint is missing or has another size.
    """
    try:
        whole = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
        files = {name: (size, digest) for name, (size, digest) in whole["files"].items()}
        if f"step{int(whole['step'])}" != folder.name or not {"world_size", "stage", "trained"} <= set(whole):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{WHOLE} is missing or wrong") from None
    for name, (size, _) in files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{name} has {file.stat().st_size} bytes instead of {size}")
    return whole


def check_bytes(folder: Path, share: int = 0, shares: int = 1) -> None:
    """Compare the files of a checkpoint, or one of equal shares of them, with their digests.

    Args:
        folder: The checkpoint's folder.
        share: Which share, from 0.
        shares: How many shares there are.

    Raises:
        ValueError: Naming the first file that differs.
    """
    whole = read_whole(folder)
    for name in sorted(whole["files"])[share::shares]:
        if sha256(folder / name) != whole["files"][name][1]:
            raise ValueError(f"{name} is not what was written")


def _steps(folder: Path) -> list[int]:
    return sorted(int(p.name[4:]) for p in folder.glob("step*") if p.name[4:].isdecimal() and p.is_dir())


def checkpoints(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, oldest first; bytes are not read."""
    found = []
    for step in _steps(folder):
        try:
            read_whole(folder / f"step{step}")
        except ValueError:
            continue
        found.append(step)
    return found


def broken(folder: Path) -> dict[int, str]:
    """Steps whose checkpoint is not whole, and why, newest first."""
    found = {}
    for step in reversed(_steps(folder)):
        try:
            read_whole(folder / f"step{step}")
        except ValueError as why:
            found[step] = str(why)
    return found


def refuse_broken(folder: Path, why: dict[int, str]) -> ConfigError:
    """The error where checkpoints are there and none is whole.

    Args:
        folder: The folder of the run's checkpoints.
        why: What is wrong with each, by step.

    Returns:
        The error, to be raised.
    """
    listed = "; ".join(f"step{step}: {reason}" for step, reason in why.items())
    return ConfigError(f"{folder}: no checkpoint is whole ({listed}). Delete that folder to start the run anew.")


def check_layout(folder: Path, ranks: int, stage: int, step: int | None = None) -> None:
    """Refuse to go on from a checkpoint that this layout cannot read, or where none is whole.

    Args:
        folder: The folder of the run's checkpoints; may be missing.
        ranks: The number of ranks now.
        stage: The ZeRO stage now.
        step: Which checkpoint; None for the newest whole one.

    Raises:
        ConfigError: If there is no way from its layout to this one, or all checkpoints are broken.
    """
    if step is None:
        steps, why = checkpoints(folder), broken(folder)
        if not steps and why:
            raise refuse_broken(folder, why)
        if not steps:
            return
        step = steps[-1]
    written, now = layout(folder, step), Layout(ranks, stage)
    if now.reads(written) is None:
        other = f" or {3 - written.stage}" if written.stage in (1, 2) else ""
        raise ConfigError(
            f"{folder}/step{step} was written by {written}; this run has {now}. DeepSpeed converts its files for "
            "another number of ranks, and between the stages 1 and 2, but not for this stage. Go on with the same "
            f"command and --zero {written.stage}{other}, on any number of ranks, or start anew in another --out."
        )


def layout(folder: Path, step: int) -> Layout:
    """The layout in which a whole checkpoint was written."""
    whole = read_whole(folder / f"step{step}")
    return Layout(whole["world_size"], whole["stage"])


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint that a run goes on from; `skipped` says of newer ones why they were not taken."""

    folder: Path
    step: int
    written: Layout
    skipped: dict[int, str]


def find_checkpoint(folder: Path, now: Layout) -> Checkpoint | None:
    """The newest checkpoint whose bytes are those that were written; all ranks call it and share the reading.

    Args:
        folder: The folder of the run's checkpoints; may be missing.
        now: The layout of this run.

    Returns:
        The checkpoint, or None where there is none at all.

    Raises:
        ConfigError: If none is whole, or this layout cannot go on from the newest whole one.
    """
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    skipped = broken(folder)
    for step in reversed(checkpoints(folder)):
        reasons: list[str | None] = [None] * ranks
        try:
            check_bytes(folder / f"step{step}", rank, ranks)
            reason = None
        except ValueError as why:
            reason = str(why)
        dist.all_gather_object(reasons, reason)
        reason = next(filter(None, reasons), None)
        if reason is None:
            check_layout(folder, now.ranks, now.stage, step)
            newer = {s: why for s, why in skipped.items() if s > step}
            return Checkpoint(folder, step, layout(folder, step), newer)
        skipped[step] = reason
    if skipped:
        raise refuse_broken(folder, skipped)
    return None


def convert(folder: Path, step: int) -> str:
    """Turn a checkpoint into DeepSpeed's universal format, which other numbers of ranks read; one process does it.

    Args:
        folder: The folder of the run's checkpoints.
        step: The checkpoint's step.

    Returns:
        The name of the converted folder beside it.

    Raises:
        ConfigError: If DeepSpeed's converter fails.
    """
    name = f"{UNIVERSAL}{step}"
    temporary = folder / f"tmp-{name}"
    for left in (temporary, folder / name):
        shutil.rmtree(left, ignore_errors=True)
    line = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(folder / f"step{step}"),
        "--output_folder", str(temporary), "--inject_missing_state",
    ]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(
            f"{folder}/step{step}: DeepSpeed does not convert it for another number of ranks ({said}). Go on with "
            f"those that wrote it: {layout(folder, step)}."
        )
    temporary.rename(folder / name)
    return name
