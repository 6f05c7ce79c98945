"""The memory levers that act inside a model, put on it and taken off again for the gradient check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from dlrscale import attacks
from dlrscale.attacks import act_int8, act_offload, ckpt_nested, tile_tokens
from dlrscale.config import AttackConfig
from dlrscale.modeling.dlr_net import DLRNet
from dlrscale.shapes import ModelShape

Forward = Callable[[torch.Tensor], torch.Tensor]


class Levers:
    """The levers in force on one model.

    Args:
        model: The model; layer checkpointing is on already, where it was asked for.
        shape: Its shape.
        config: The attack.
        side: A side network that is trained in the place of the model, if there is one.
    """

    def __init__(self, model: nn.Module, shape: ModelShape, config: AttackConfig, side: nn.Module | None = None):
        self.model = model
        self.side = side
        self.on = True
        self.taken = 0  # how often a part ran in another way than its own
        self._other_way = self._inside = False
        parts = mlp_parts(model, shape)
        for label, part in parts.items():
            if not label.isdigit():  # a piece of an MLP that is no module
                continue
            rest = [] if isinstance(part, DLRNet) else [p for name, p in parts.items() if name.startswith(f"{label}.")]
            ways = [part.forward]
            if isinstance(part, DLRNet):
                ways += self._through_net(part, config, shape.activation)
            if config.tiles > 1:
                whole = partial(self._all_of, ways[-1], rest) if rest else ways[-1]
                ways.append(partial(tile_tokens.forward, whole, config.tiles))
            if len(ways) > 1:
                trained = any(p.requires_grad for module in (part, *rest) for p in module.parameters())
                part.forward = partial(self._choose, ways[0], ways[-1], trained)
                for piece in rest:
                    piece.forward = partial(self._pass_on, piece.forward)
        self.storage = None
        if config.activation_storage != "device":
            self.storage = {"host": act_offload, "int8": act_int8}[config.activation_storage].Storage(
                model, attention_modules(model, shape)
            )
            own = model.get_base_model() if hasattr(model, "get_base_model") else model  # inside peft's wrapper
            backbone = side or own.get_submodule(shape.family.mlp.partition(".{}")[0].rpartition(".")[0])
            backbone.forward = partial(self._stored, backbone.forward)

    def _through_net(self, net: DLRNet, config: AttackConfig, activation: str) -> list[Forward]:
        """Another way through a DLR-Net, if there is one."""
        method = config.entry.gradient
        if method != "backprop" and hasattr(attacks.find(method), "forward"):
            return [partial(attacks.find(method).forward, net, knobs=config.knobs)]
        if config.activation_checkpointing == "nested":
            return [partial(ckpt_nested.forward, net, activation)]
        return []

    def _choose(self, plain: Forward, way: Forward, trained: bool, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Through the module as it is, or the other way, where it is asked for a gradient."""
        asked = torch.is_grad_enabled() and (trained or x.requires_grad)
        self._other_way = self.on and asked and not kwargs
        self.taken += self._other_way
        return way(x) if self._other_way else plain(x, **kwargs)

    def _all_of(self, first: Forward, rest: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
        """An MLP that is no module, whose decoder layer calls it piece by piece."""
        out, self._inside = first(x), True
        try:
            for piece in rest:
                out = piece(out)
        finally:
            self._inside = False
        return out

    def _pass_on(self, own: Forward, x: torch.Tensor) -> torch.Tensor:
        """A later piece of an MLP that is no module: where the first has done all of it in tiles, nothing is left."""
        return x if self._other_way and not self._inside else own(x)

    def _stored(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if not (self.on and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        with self.storage:
            return forward(*args, **kwargs)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """The model as plain autograd takes it while inside: nothing checkpointed, offloaded, compressed or tiled."""
        modules = [*self.model.modules(), *(self.side.modules() if self.side else ())]
        checkpointed = [m for m in modules if getattr(m, "gradient_checkpointing", False) is True]
        for module in checkpointed:
            module.gradient_checkpointing = False
        self.on = False
        try:
            yield
        finally:
            self.on = True
            for module in checkpointed:
                module.gradient_checkpointing = True


def mlp_parts(model: nn.Module, shape: ModelShape) -> dict[str, nn.Module]:
    """The MLP or DLR-Net of every layer by its index, also inside peft's wrapper.

    Where a family has no MLP module, its parts are listed one by one as `<layer>.<name>`.
    """
    family = shape.family
    paths = {family.mlp.format(layer): str(layer) for layer in range(shape.layers)}
    if family.inline:
        rest = (family.activation_module, family.down)
        paths |= {f"{family.home(i)}.{name}": f"{i}.{name}" for i in range(shape.layers) for name in rest}
    return {
        label: module
        for name, module in model.named_modules()
        for path, label in paths.items()
        if name == path or name.endswith("." + path)
    }


def attention_modules(model: nn.Module, shape: ModelShape) -> list[nn.Module]:
    """The modules in which the attention's linear maps lie."""
    ends = tuple("." + name for name in shape.family.attention)
    names = {name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith(ends)}
    return [model.get_submodule(name) for name in sorted(names)]
