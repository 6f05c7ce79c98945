"""The transform `drop-blocks`: the blocks of each DLR-Net that write least go, and the rest is healed.

A block counts by the mean over the tokens of a calibration text of ||B_k s_k|| / ||d_K||, as deep models are pruned by
what a layer changes (ShortGPT, arXiv 2403.03853). Of K blocks, floor(`drop` K) go, at least one stays. The heal trains
the shortened DLR-Nets alone, end to end, by KL(locked || shortened) on the logits of the attacker's own text.

All levers of the strategy hold in the heal. Ranking needs no more than a forward: on each rank's device, or, at ZeRO-3,
where no device need hold the model, on the host.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dlrscale import data, dlr, engine, export, models, record, shapes, surgery
from dlrscale.attacks import students
from dlrscale.attacks.levers import Levers
from dlrscale.attacks.students import Job, Lesson
from dlrscale.config import AttackConfig
from dlrscale.data import TokenData
from dlrscale.distil import Distiller
from dlrscale.measure import Flops
from dlrscale.modeling.dlr_net import DLRNet
from dlrscale.shapes import ModelShape

KEPT_FILE = f"{students.PART}blocks.json"


def apply(run: Job, folder: Path, out: Path) -> Path:
    """Rank, drop, heal and export a locked model of fewer blocks; all ranks call it.

    Args:
        run: The run.
        folder: The attacked model's folder.
        out: Where the transformed folder goes.

    Returns:
        `out`; or `folder` itself where the model is not locked, since there is nothing to drop.
    """
    knobs = run.config.knobs
    if not shapes.model_shape(shapes.read_config(folder)).locked:
        return folder
    kept = choose(run, folder)
    weights = heal(run, folder, kept) if int(knobs["heal_steps"]) else {}
    students.release()
    if dist.get_rank() == 0:
        locked = models.load_model(folder, models.stored_dtype(folder))
        shape = shapes.model_shape(locked.config.to_dict())
        states = weights or {i: dlr.without_others(net, kept[i]) for i, net in nets_of(locked, shape).items()}
        made = export.with_nets(locked, shape.form, states)
        manifest = export.transformed_manifest(folder, made, "drop-blocks", knobs)
        export.save_folder(made, models.load_tokenizer(folder), out, {}, manifest)
    return out


def choose(run: Job, folder: Path) -> dict[int, list[int]]:
    """The blocks that stay, by layer; chosen once in a run, and kept beside its rows."""
    file, told = run.out / KEPT_FILE, [None]
    if dist.get_rank() == 0 and file.is_file():
        told = [json.loads(file.read_text(encoding="utf-8"))]
    dist.broadcast_object_list(told, src=0)
    if told[0] is None:
        model = models.load_model(folder, run.config.dtype)
        at_stage3 = engine.file_levers(run.ds_config)["zero"] == 3
        model.to("cpu" if at_stage3 else engine.device())
        shares, tokens, flops = rank_blocks(model, run.corpora.train)
        drop = float(run.config.knobs["drop"])
        chosen = {str(layer): stay(found, shapes.blocks_left(len(found), drop)) for layer, found in shares.items()}
        told = [{"kept": chosen, "shares": {str(k): v for k, v in shares.items()}, "tokens": tokens, "flops": flops}]
        dist.broadcast_object_list(told, src=0)
        if dist.get_rank() == 0:
            record.write_atomic(file, record.dumps(told[0]) + "\n")
    students.bill(run, told[0]["tokens"], told[0]["flops"])
    return {int(layer): blocks for layer, blocks in told[0]["kept"].items()}


def rank_blocks(model: PreTrainedModel, text: TokenData) -> tuple[dict[int, list[float]], int, float]:
    """The mean of ||B_k s_k|| / ||d_K|| over the tokens of a text's first sequences; ranks share the sequences.

    Args:
        model: The locked model, in eval mode.
        text: The text.

    Returns:
        The mean by layer and block, and the tokens and FLOPs that it took, over all ranks.
    """
    shape, device = shapes.model_shape(model.config.to_dict()), model.device
    nets, batches = nets_of(model, shape), data.calibration(text)
    sums = {layer: torch.zeros(len(net.blocks), dtype=torch.float64, device=device) for layer, net in nets.items()}

    def visit(layer: int, net: DLRNet, x: torch.Tensor) -> None:
        sums[layer] += (dlr.block_shares(net, x).double() * mask).sum(-1)

    handles = [
        net.register_forward_pre_hook(lambda net, args, layer=layer: visit(layer, net, args[0]))
        for layer, net in nets.items()
    ]
    flops, tokens = Flops(), 0
    with torch.no_grad(), flops.forward_pass():
        for batch in batches[dist.get_rank() :: dist.get_world_size()]:
            batch = {k: v.to(device) for k, v in batch.items()}
            mask = batch["attention_mask"].flatten().double()
            tokens += int(mask.sum())
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    counted = torch.tensor([tokens, flops.forward], dtype=torch.float64, device=device)
    found = torch.cat([*sums.values(), counted]).to(engine.device())
    dist.all_reduce(found)
    *means, counted = found.cpu().split([*map(len, sums.values()), 2])
    return {i: (v / counted[0]).tolist() for i, v in zip(sums, means, strict=True)}, int(counted[0]), float(counted[1])


def stay(shares: list[float], count: int) -> list[int]:
    """The blocks with the largest shares, in the order of the net; of equal ones the first."""
    return sorted(sorted(range(len(shares)), key=lambda k: -shares[k])[:count])


def heal(run: Job, folder: Path, kept: dict[int, list[int]]) -> dict[int, dict[str, torch.Tensor]]:
    """The weights of the shortened DLR-Nets by layer after the heal, on rank 0."""
    config, knobs = run.config, run.config.knobs
    model = models.load_model(folder, config.dtype)
    distiller = students_in(model, shapes.model_shape(model.config.to_dict()), kept, config)
    lesson = Lesson(
        name="heal",
        steps=int(knobs["heal_steps"]),
        lr=float(knobs["heal_lr"]),
        text=run.corpora.train,
        step=lambda made: made.heal_step,
        calibrated=False,
        errors=True,
    )
    return students.train(run, model, distiller, lesson)


def students_in(
    model: PreTrainedModel, shape: ModelShape, kept: dict[int, list[int]], config: AttackConfig
) -> Distiller:
    """A distiller of shortened DLR-Nets beside the whole ones of a locked model, with the levers on the short ones."""
    teachers = nets_of(model, shape)
    pruned = {layer: shortened(net, kept[layer], shape) for layer, net in teachers.items()}
    for layer, net in pruned.items():
        models.put_mlp(model, shape.family, layer, net)
    put_levers(model, shape, config)
    for layer, net in teachers.items():
        models.put_mlp(model, shape.family, layer, net)
    return Distiller(surgery.install_students(model, shape, pruned), metrics="transform")


def shortened(net: DLRNet, kept: list[int], shape: ModelShape) -> DLRNet:
    """A DLR-Net of some blocks of another one."""
    ranks = [net.blocks[k].b_proj.in_features for k in kept]
    found = DLRNet(shape.width, ranks, net.form, net.activation, bias=net.bias is not None, dropout=shape.dropout)
    found.to(net.b.dtype).load_state_dict(dlr.without_others(net, kept))
    return found


def put_levers(model: PreTrainedModel, shape: ModelShape, config: AttackConfig) -> None:
    """Checkpointing, storage, tiles and ways through a DLR-Net on the students, as in the fine-tune.

    transformers checkpoints layers that are in training mode, where some apply dropout by themselves: a student's heal
    has none.
    """
    Levers(model, shape, config)
    if config.activation_checkpointing == "none":
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name in ("hidden_dropout", "attention_dropout"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True
            if isinstance(getattr(layer, "dropout", None), float):
                layer.dropout = 0.0


def nets_of(model: nn.Module, shape: ModelShape) -> dict[int, DLRNet]:
    """The DLR-Nets of a locked model by layer."""
    return {layer: model.get_submodule(shape.family.mlp.format(layer)) for layer in shape.ranks}
