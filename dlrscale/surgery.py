"""Put a student beside each MLP or DLR-Net of a model, so that teacher and student share one backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from dlrscale import models
from dlrscale.config import LockConfig
from dlrscale.dlr import cold_start, warm_start
from dlrscale.modeling.dlr_net import DLRNet
from dlrscale.shapes import ModelShape, parse_layers, resolve_ranks

Visit = Callable[["Switch", torch.Tensor, torch.Tensor], None]


class Switch(nn.Module):
    """A teacher and the net that learns from it in one place; `mode` says which of them answers.

    A lock teaches a DLR-Net what the MLP does, `undistil` an MLP what the DLR-Net does, `drop-blocks` a DLR-Net what a
    deeper one does. `teacher`: the teacher answers. `student`: the net. `flat`: the net, a DLR-Net, with every block
    reading x alone. With a `visit` set, it is called with (switch, x, output) in the modes teacher and student.
    """

    def __init__(self, layer: int, teacher: nn.Module, net: nn.Module):
        super().__init__()
        self.layer = layer
        self.teacher = teacher
        self.net = net
        self.mode = "teacher"
        self.visit: Visit | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Answer as `mode` says; x and the answer are (..., D)."""
        if self.mode == "flat":
            return self.net(x, flat=True)
        out = self.teacher(x) if self.mode == "teacher" else self.net(x)
        if self.visit is not None:
            self.visit(self, x, out)
        return out


def install(model: PreTrainedModel, shape: ModelShape, config: LockConfig) -> list[Switch]:
    """Put a started DLR-Net beside the MLP of each chosen layer; only DLR-Nets stay trainable.

    Args:
        model: The base model, on the CPU.
        shape: Its shape.
        config: Form, depth, rank, start, layers and seed of the lock.

    Returns:
        The switches, by layer.

    Raises:
        SurgeryError: If an MLP is not where the table says, or the start is not defined.
    """
    layers = parse_layers(config.layers, shape.layers)
    mlps = models.find_mlps(model, shape, layers)
    ranks = resolve_ranks(config.form, shape, config.depth, config.rank)
    switches = []
    for layer, mlp in mlps.items():
        weights = models.mlp_weights(mlp, shape.family)
        net = DLRNet(
            shape.width,
            ranks,
            config.form,
            getattr(mlp, shape.family.activation_module),
            bias=weights.down_bias is not None,
            dropout=shape.dropout,
        ).to(weights.up.dtype)
        generator = torch.Generator().manual_seed(config.seed * 100_003 + layer)
        if config.start == "warm":
            warm_start(net, weights, generator)
        else:
            cold_start(net, generator)
        # A DLR-Net has the MLP's dropout, which a teacher's student has not.
        switches.append(Switch(layer, mlp, net).eval())
    # Nothing of the model changes before all of them are there.
    put(model, shape, switches)
    return switches


def install_students(model: PreTrainedModel, shape: ModelShape, nets: Mapping[int, nn.Module]) -> list[Switch]:
    """Put a net of an attacker's beside the DLR-Net of each locked layer; only these nets stay trainable.

    Args:
        model: The locked model, on the CPU.
        shape: Its shape.
        nets: What is to learn from each DLR-Net, by layer.

    Returns:
        The switches, by layer.
    """
    switches = [
        Switch(layer, model.get_submodule(shape.family.mlp.format(layer)), net).eval() for layer, net in nets.items()
    ]
    put(model, shape, switches)
    return switches


def put(model: PreTrainedModel, shape: ModelShape, switches: list[Switch]) -> None:
    """Put switches in their places in a model, and leave nothing but their nets trainable."""
    model.requires_grad_(False)
    for switch in switches:
        switch.net.requires_grad_(True)
        models.put_mlp(model, shape.family, switch.layer, switch)


@contextmanager
def mode(switches: list[Switch], name: str, visit: Visit | None = None):
    """Set the mode and the visit of all switches while inside."""
    before = [(s.mode, s.visit) for s in switches]
    for switch in switches:
        switch.mode, switch.visit = name, visit
    try:
        yield
    finally:
        for switch, (old, old_visit) in zip(switches, before, strict=True):
            switch.mode, switch.visit = old, old_visit
