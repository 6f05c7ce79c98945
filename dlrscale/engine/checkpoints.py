"""Which checkpoints of a run are whole, and in which layout they were written."""

from __future__ import annotations

import json
from pathlib import Path

from dlrscale.errors import ConfigError


def checkpoints(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, oldest first."""
    found = []
    for marker in folder.glob("step*/whole.json"):
        try:
            whole = json.loads(marker.read_text(encoding="utf-8"))
            step, sizes = int(whole["step"]), {name: (marker.parent / name).stat().st_size for name in whole["files"]}
        except (OSError, ValueError, KeyError):
            continue
        if sizes == whole["files"]:
            found.append(step)
    return sorted(found)


def check_layout(folder: Path, world_size: int, stage: int) -> None:
    """Refuse to go on from checkpoints of another number of ranks or another ZeRO stage.

    Args:
        folder: The folder of the run's checkpoints; may be missing.
        world_size: The number of ranks now.
        stage: The ZeRO stage now.

    Raises:
        ConfigError: If the newest whole checkpoint has another layout.
    """
    for step in checkpoints(folder)[-1:]:
        whole = json.loads((folder / f"step{step}" / "whole.json").read_text(encoding="utf-8"))
        if (whole["world_size"], whole["stage"]) != (world_size, stage):
            raise ConfigError(
                f"{folder}/step{step} was written by {whole['world_size']} ranks at ZeRO stage {whole['stage']}; this "
                f"run has {world_size} ranks at stage {stage}. Go on with --num-ranks {whole['world_size']} --zero "
                f"{whole['stage']}, or start anew in another --out."
            )
