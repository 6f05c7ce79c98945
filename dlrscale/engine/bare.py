"""An engine without an optimizer, for gradient methods that update by themselves: shares of weights, checkpoints.

DeepSpeed runs without an optimizer at stages 0 and 3 (`DeepSpeedZeRoOffload`), and there neither goes backward nor
writes a checkpoint. What it lacks stands here. A checkpoint holds, for every rank at stage 3 and for rank 0 alone at
stage 0, this rank's share of each trained parameter and the run's state, as `torch.save` writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dlrscale.engine.core import Engine


def share(engine: Engine, parameter: nn.Parameter) -> tuple[torch.Tensor, int, int]:
    """What this rank holds of a parameter, to be written in place.

    Args:
        engine: The engine.
        parameter: One of its parameters.

    Returns:
        The share, flat and in memory of its own; the number of its first element; the elements of the whole.
    """
    if engine.stage < 3:
        return parameter.detach().view(-1), 0, parameter.numel()
    part, numel = parameter.ds_tensor, parameter.ds_numel
    size = part.ds_numel
    first = min(engine.rank * size, numel)
    return part.detach().view(-1)[: min(size, numel - first)], first, numel


def drop_gathered(engine: Engine) -> None:
    """Forget whole parameters that stage 3 keeps from use to use: their shares have been written."""
    if engine.stage == 3:
        engine.wrapper.partition_all_parameters()


def accumulators(engine: Engine, trained: list[nn.Parameter]) -> list[Any]:
    """Autograd's nodes that add up the gradients of stage 3's parameters, made while these are whole.

    One that is made when its parameter is cut takes gradients of no shape but the empty one. As long as they are held,
    autograd takes them (DeepSpeed's optimizer does the same).
    """
    found = []
    for parameter in trained if engine.stage == 3 else ():
        with engine.gathered([parameter]):
            found.append(parameter.expand_as(parameter).grad_fn.next_functions[0][0])
    return found


def _file(folder: Path, rank: int) -> Path:
    return folder / f"trained_rank_{rank}.pt"


def save(engine: Engine, folder: Path, state: dict[str, Any]) -> None:
    """Write this rank's file of a checkpoint; all ranks call it."""
    import torch

    if engine.rank and engine.stage < 3:
        return
    folder.mkdir(parents=True, exist_ok=True)
    shares = {name: share(engine, p)[0].cpu().clone() for name, p in engine.trained}
    torch.save({"shares": shares, "state": state}, _file(folder, engine.rank))


def load(engine: Engine, folder: Path, ranks: int) -> dict[str, Any]:
    """Read the weights of a checkpoint into this rank's shares.

    Args:
        engine: The engine.
        folder: The checkpoint's folder.
        ranks: How many ranks wrote it.

    Returns:
        The state that `save` was given.
    """
    import torch

    same = engine.stage < 3 or ranks == engine.world_size
    if same:
        files = [_file(folder, engine.rank if engine.stage == 3 else 0)]
    else:
        files = [_file(folder, rank) for rank in range(ranks)]
    read = [torch.load(file, weights_only=True, mmap=True) for file in files]
    with torch.no_grad():
        for name, parameter in engine.trained:
            own, first, _ = share(engine, parameter)
            parts = [held["shares"][name] for held in read]
            own.copy_(parts[0] if same else torch.cat(parts)[first : first + own.numel()])
    drop_gathered(engine)
    return read[0]["state"]
