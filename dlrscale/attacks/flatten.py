"""The transform `flatten`: every block reads x alone, so each DLR-Net is one ordinary MLP, without training."""

from __future__ import annotations

from pathlib import Path

from dlrscale import models, shapes
from dlrscale.export import flattened_model, save_folder


def apply(folder: Path, out: Path) -> Path:
    """Export the flattened model as a folder of the base's own architecture.

    Args:
        folder: The attacked model's folder.
        out: Where the transformed folder goes.

    Returns:
        `out`; or `folder` itself where the model is not locked, since there is nothing to flatten.

    Raises:
        SurgeryError: If the form is no ordinary MLP.
    """
    if not shapes.model_shape(shapes.read_config(folder)).locked:
        return folder
    save_folder(
        flattened_model(models.load_model(folder, models.stored_dtype(folder))),
        models.load_tokenizer(folder),
        out,
        {},
    )
    return out
