"""The model that a plan is about: base or locked, transformed, with what is trained of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dlrscale import catalogue, shapes
from dlrscale.errors import ConfigError
from dlrscale.planner.tape import Training
from dlrscale.shapes import ModelShape
from dlrscale.shapes.layout import Layout, Tensors, layer_tensors, layout, maps, outer_tensors


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model's shape and layout, and what of it is trained."""

    shape: ModelShape
    parts: Layout
    training: Training

    def tensors(self) -> Iterator[tuple[int, bool, int]]:
        """Its parameter tensors: elements, whether trained, and how many equal ones follow one another."""
        yield from self._tensors

    @cached_property
    def _tensors(self) -> list[tuple[int, bool, int]]:
        training, ranks = self.training, self.shape.ranks or {}
        before, after = ([(t.numel, training.has(t.part, t.bias), t.count) for t in some] for some in self._outer)
        known: dict[object, list[tuple[int, bool, int]]] = {}
        for layer in range(self.shape.layers):
            key = ranks.get(layer), layer >= training.first
            if key not in known:
                own = layer_tensors(self.shape, self.parts, layer)
                known[key] = [(t.numel, training.has(t.part, t.bias, layer), t.count) for t in own]
            before += known[key]
        side = self._side() if training.side else ()
        return [*before, *after, *self._adapters(), *side]

    @cached_property
    def _outer(self) -> tuple[list[Tensors], list[Tensors]]:
        return outer_tensors(self.shape, self.parts)

    def _adapters(self) -> Iterator[tuple[int, bool, int]]:
        training, shape = self.training, self.shape
        if not training.adapted:
            return
        if "projection" in training.adapted and self.parts.embedding_width != shape.width:
            yield training.rank * shape.width, True, 2
            yield training.rank * self.parts.embedding_width, True, 2
        for layer in range(shape.layers):
            for part, inputs, outputs, _ in maps(shape, self.parts, layer):
                if part in training.adapted:
                    yield training.rank * inputs, True, 1
                    yield training.rank * outputs, True, 1

    def _side(self) -> Iterator[tuple[int, bool, int]]:
        """A side network's tensors (attacks/ladder.py): P_0, its layers, U."""
        side, width = self.training.side, self.shape.width
        yield width * side, True, 1
        for _ in range(self.shape.layers):
            for numel in side_layer_tensors(width, side):
                yield numel, True, 1
        yield side * width, True, 1

    @cached_property
    def total(self) -> int:
        """Parameters, a tied pair counted once."""
        return sum(numel * count for numel, _, count in self.tensors())

    @cached_property
    def trained(self) -> int:
        """Trained parameters."""
        return sum(numel * count for numel, trained, count in self.tensors() if trained)

    @cached_property
    def factored(self) -> int:
        """Trained elements, with rows plus columns in the place of a matrix's own: what Adafactor keeps at stage 0."""
        shape, parts, training = self.shape, self.parts, self.training
        whole, wide = parts.embedding_width, shape.width
        matrices = [("embedding", shape.vocabulary, whole)]
        matrices += [("embedding", parts.positions, wide)] if parts.positions else []
        matrices += [("embedding", whole, wide)] * 2 if whole != wide else []
        matrices += [] if shape.tied else [("head", shape.vocabulary, whole)]
        adapted = [("projection", whole, wide)] * 2 if whole != wide else []
        for layer in range(shape.layers):
            own = [(part, inputs, outputs) for part, inputs, outputs, _ in maps(shape, parts, layer)]
            matrices += [entry for entry in own if training.has(entry[0], layer=layer)]
            adapted += own
        pairs = [(rows, columns) for part, rows, columns in matrices if part in training.trained]
        for part, inputs, outputs in adapted if training.adapted else ():
            pairs += [(training.rank, inputs), (training.rank, outputs)] if part in training.adapted else []
        return self.trained - sum(rows * columns - rows - columns for rows, columns in pairs)

    @cached_property
    def layer_elements(self) -> list[int]:
        """Parameters of each decoder layer, without adapters."""
        ranks, found = self.shape.ranks or {}, {}
        for layer in range(self.shape.layers):
            if ranks.get(layer) not in found:
                tensors = layer_tensors(self.shape, self.parts, layer)
                found[ranks.get(layer)] = sum(t.numel * t.count for t in tensors)
        return [found[ranks.get(layer)] for layer in range(self.shape.layers)]

    @cached_property
    def trained_by_layer(self) -> tuple[list[int], list[int]]:
        """Trained parameters of the MLP of each decoder layer, and of the whole layer."""
        found: dict[object, tuple[int, int]] = {}
        ranks, training = self.shape.ranks or {}, self.training
        if training.side:
            each = sum(side_layer_tensors(self.shape.width, training.side))
            return [0] * self.shape.layers, [each] * self.shape.layers
        keys = [(ranks.get(layer), layer >= training.first) for layer in range(self.shape.layers)]
        for layer, key in enumerate(keys):
            if key not in found:
                own = Counter[str]()
                for t in layer_tensors(self.shape, self.parts, layer):
                    own[t.part] += t.numel * t.count * training.has(t.part, t.bias, layer)
                for part, inputs, outputs, _ in maps(self.shape, self.parts, layer):
                    own[part] += training.rank * (inputs + outputs) * (part in training.adapted)
                found[key] = own["mlp"], own.total()
        pairs = [found[key] for key in keys]
        return [mlp for mlp, _ in pairs], [whole for _, whole in pairs]

    def last_map(self, layer: int) -> int:
        """Trained elements of a layer's last map, whose gradient comes first."""
        inner = (self.shape.ranks or {}).get(layer, (self.shape.inner,))[-1]
        return self.shape.width * inner * self.training.has("mlp", layer=layer)

    def outside(self, part: str) -> int:
        """Trained elements of a part outside of the decoder layers."""
        found = (t for some in self._outer for t in some if t.part == part)
        return sum(t.numel * t.count for t in found if self.training.has(t.part, t.bias))


def side_layer_tensors(width: int, side: int) -> tuple[int, ...]:
    """Elements of the tensors of a side network's layer: the gate, P, and the maps of its block in their order."""
    return 1, width * side, 3 * side**2, side**2, 4 * side**2, 2 * side**2


def locked_shape(base: ModelShape, form: str, depth: int, rank: int | None, layers: str | None) -> ModelShape:
    """The shape of a base model after a lock.

    Args:
        base: The base model's shape.
        form: The form of the DLR-Nets.
        depth: K.
        rank: One rank for all blocks; None for parity.
        layers: Layers to lock, as `--layers` takes them; None for all.

    Returns:
        The locked model's shape.
    """
    ranks = shapes.resolve_ranks(form, base, depth, rank)
    return replace(base, locked=True, form=form, ranks=dict.fromkeys(shapes.parse_layers(layers, base.layers), ranks))


def flat_shape(locked: ModelShape) -> ModelShape:
    """The shape of a locked model whose DLR-Nets were made ordinary MLPs, the narrower ones padded to one width.

    Args:
        locked: The shape of a locked model.

    Returns:
        The shape after the transform `flatten` of whole nets.
    """
    form, family = shapes.FORMS[locked.form], locked.family
    widths = [sum(ranks) for ranks in locked.ranks.values()]
    if len(locked.ranks) < locked.layers:
        widths.append(locked.inner)
    biased = locked.mlp_bias or (family.gated and not form.gated)
    return replace(locked, locked=False, form=None, ranks=None, inner=max(widths), mlp_bias=biased)


def transformed_shape(shape: ModelShape, transform: str, knobs: Mapping[str, float | str]) -> ModelShape:
    """The shape of a model after a transform; of a model that is not locked, its own.

    Which blocks `drop-blocks` takes is known to no plan; ranks of a DLR-Net differ by at most one, and those that stay
    are taken to be the largest.

    Args:
        shape: The model's shape, locked or not.
        transform: The transform.
        knobs: The strategy's knobs.

    Returns:
        The shape of what is trained then.

    Raises:
        SurgeryError: If the form is no ordinary MLP of the family and the transform would have to take it for one.
    """
    if not shape.ranks or transform == "none":
        return shape
    if transform == "drop-blocks":
        drop = float(knobs.get("drop", 0.0))
        left = {i: sorted(r, reverse=True)[: shapes.blocks_left(len(r), drop)] for i, r in shape.ranks.items()}
        return replace(shape, ranks={layer: tuple(ranks) for layer, ranks in left.items()})
    if transform == "undistil":
        if knobs.get("start") == "fresh":
            return replace(shape, locked=False, form=None, ranks=None)
        shapes.check_flattens(shape, "--strategy undistil with start=flat", "Start it with --set start=fresh.")
        return flat_shape(shape)
    group = int(knobs.get("group", 0))
    if not shapes.flattens_whole(shape, group):
        return replace(shape, ranks={i: shapes.grouped_ranks(ranks, group) for i, ranks in shape.ranks.items()})
    shapes.check_flattens(shape)
    return flat_shape(shape)


def attacked(
    config: Mapping[str, Any], shape: ModelShape, entry: catalogue.Strategy, knobs: Mapping[str, float | str]
) -> Model:
    """The model that an attack trains.

    Args:
        config: The content of the config.json, for all but the MLPs.
        shape: The model's shape, locked or not.
        entry: The strategy.
        knobs: The strategy's knobs.

    Returns:
        The model.

    Raises:
        ConfigError: If it has fewer layers than are to be trained, or nothing that is.
    """
    parts = layout(config, shape)
    shape = transformed_shape(shape, entry.transform, knobs)
    trains = entry.trains
    if trains.untied:
        shape = replace(shape, tied=False)
    last = int(knobs[trains.last]) if trains.last else shape.layers
    if last > shape.layers:
        raise ConfigError(
            f"--set {trains.last}={last}: the model has {shape.layers} decoder layers. Take at most as many."
        )
    inside = trains.biases or trains.adapted or trains.parts & {"attention", "norm", "mlp"}
    training = Training(
        trained=trains.parts | ({"side"} if trains.side else set()),
        biases=trains.biases,
        first=shape.layers - last if inside else shape.layers,
        side=shapes.side_width(shape.width, int(knobs[trains.side])) if trains.side else 0,
    )
    if trains.adapted:
        training = Training(
            trained=trains.parts,
            adapted=trains.adapted,
            rank=int(knobs["rank"]),
            adapter_dropout=float(knobs["dropout"]),
        )
    model = Model(shape=shape, parts=parts, training=training)
    if not model.trained:
        raise ConfigError(f"--trainable {entry.trainable}: the model has no such parameter. Take another set.")
    return model
