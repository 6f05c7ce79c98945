"""The transform `flatten`: blocks read the same input, so that they are one wider block, without training.

All blocks of a DLR-Net: sum_k B_k s(A_k x) is one ordinary MLP with A = [A_1; ..; A_K] and B = [B_1 ..]. With the knob
`group` = m, each m consecutive blocks become one block that reads what the first of them does: a DLR-Net of
ceil(K / m) blocks of the same form, which loses the coupling inside its groups alone. prenorm groups too, since n(u) is
the same for all that read u; but one group of all its blocks is no ordinary MLP.
"""

from __future__ import annotations

from pathlib import Path

from dlrscale import dlr, export, models, shapes
from dlrscale.attacks.students import Job


def apply(run: Job, folder: Path, out: Path) -> Path:
    """Export the flattened model: of the base's own architecture, or locked with fewer blocks. Rank 0 does it.

    Args:
        run: The run.
        folder: The attacked model's folder.
        out: Where the transformed folder goes.

    Returns:
        `out`; or `folder` itself where the model is not locked, since there is nothing to flatten.

    Raises:
        SurgeryError: If the form is no ordinary MLP and would have to be one.
    """
    from torch.distributed import get_rank

    shape, group = shapes.model_shape(shapes.read_config(folder)), int(run.config.knobs["group"])
    if not shape.locked:
        return folder
    if get_rank() == 0:
        locked, manifest = models.load_model(folder, models.stored_dtype(folder)), None
        if shapes.flattens_whole(shape, group):
            made = export.flattened_model(locked)
        else:
            nets = {i: locked.get_submodule(shape.family.mlp.format(i)) for i in shape.ranks}
            made = export.with_nets(locked, shape.form, {i: dlr.grouped(net, group) for i, net in nets.items()})
            manifest = export.transformed_manifest(folder, made, "flatten", run.config.knobs)
        export.save_folder(made, models.load_tokenizer(folder), out, {}, manifest)
    return out
