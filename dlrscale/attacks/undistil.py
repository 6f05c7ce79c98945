"""The transform `undistil`: an ordinary MLP is regressed on each DLR-Net, which is the lock run backwards.

Each MLP learns, from the DLR-Net's own input x on the locked model's own stream, to give what the DLR-Net gives. Per
token the error is e = ||mlp(x) - dlr(x)||^2 / (||dlr(x)||^2 + f), as while locking (distil.py), without hardening: the
same code with the teacher and the student changed over. `start` = flat begins with the flattened net, fresh with random
weights of the base's inner width; `text` = public regresses on a text that is not the task's.

The levers of the strategy hold here too: ZeRO and offload through the DeepSpeed configuration, tiles on the MLPs. The
teacher's forward keeps nothing for backward and one MLP's activations live at a time, so checkpointing and storage have
nothing to act on.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from dlrscale import export, models, shapes, surgery
from dlrscale.attacks import students, tile_tokens
from dlrscale.attacks.students import Job, Lesson
from dlrscale.distil import Distiller


def apply(run: Job, folder: Path, out: Path) -> Path:
    """Regress, and export a model of the base's own architecture; all ranks call it.

    Args:
        run: The run.
        folder: The attacked model's folder.
        out: Where the transformed folder goes.

    Returns:
        `out`; or `folder` itself where the model is not locked, since there is nothing to undo.

    Raises:
        SurgeryError: If it is to start flat and the form is no ordinary MLP.
    """
    from torch.distributed import get_rank

    shape, knobs = shapes.model_shape(shapes.read_config(folder)), run.config.knobs
    if not shape.locked:
        return folder
    weights = regress(run, folder)
    students.release()
    if get_rank() == 0:
        made = ordinary(models.load_model(folder, models.stored_dtype(folder)), str(knobs["start"]), run.config.seed)
        for layer, mlp in mlps_of(made, shape.ranks).items():
            mlp.load_state_dict(weights[layer])
        export.save_folder(made, models.load_tokenizer(folder), out, {})
    return out


def regress(run: Job, folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    """The weights of the regressed MLPs by layer, on rank 0."""
    config, knobs = run.config, run.config.knobs
    locked = models.load_model(folder, config.dtype)
    shape = shapes.model_shape(locked.config.to_dict())
    nets = mlps_of(ordinary(locked, str(knobs["start"]), config.seed), shape.ranks)
    for net in nets.values() if config.tiles > 1 else ():
        net.forward = partial(tile_tokens.forward, net.forward, config.tiles)
    distiller = Distiller(surgery.install_students(locked, shape, nets), metrics="transform")
    lesson = Lesson(
        name="undistil",
        steps=int(knobs["regress_steps"]),
        lr=float(knobs["regress_lr"]),
        text=run.corpora.public if knobs["text"] == "public" else run.corpora.train,
        step=lambda made: made.distil_step,
        calibrated=True,
        errors=True,
    )
    return students.train(run, locked, distiller, lesson)


def ordinary(locked: PreTrainedModel, start: str, seed: int) -> PreTrainedModel:
    """The model of the base's own class whose MLPs the regression starts from."""
    return export.flattened_model(locked) if start == "flat" else export.fresh_model(locked, seed)


def mlps_of(model: PreTrainedModel, layers: dict[int, tuple[int, ...]]) -> dict[int, nn.Module]:
    """The MLPs of some layers of a model of the base's own class."""
    return models.find_mlps(model, shapes.model_shape(model.config.to_dict()), layers)
