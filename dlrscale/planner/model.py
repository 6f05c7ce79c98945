"""The model that a plan is about: base or locked, transformed, with what is trained of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dlrscale import catalogue, shapes
from dlrscale.planner.tape import Training
from dlrscale.shapes import ModelShape
from dlrscale.shapes.layout import Layout, layer_tensors, layout, maps, parameters


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model's shape and layout, and what of it is trained."""

    shape: ModelShape
    parts: Layout
    training: Training

    def tensors(self) -> Iterator[tuple[int, bool, int]]:
        """Its parameter tensors: elements, whether trained, and how many equal ones follow one another."""
        for part, numel, count in parameters(self.shape, self.parts):
            yield numel, part in self.training.trained, count
        yield from self._adapters()

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
            matrices, adapted = matrices + own, adapted + own
        pairs = [(rows, columns) for part, rows, columns in matrices if part in training.trained]
        for part, inputs, outputs in adapted if training.adapted else ():
            pairs += [(training.rank, inputs), (training.rank, outputs)] if part in training.adapted else []
        return self.trained - sum(rows * columns - rows - columns for rows, columns in pairs)

    def trained_by_layer(self) -> tuple[list[int], list[int]]:
        """Trained parameters of the MLP of each decoder layer, and of the whole layer."""
        found: dict[object, tuple[int, int]] = {}
        ranks, training = self.shape.ranks or {}, self.training
        for layer in range(self.shape.layers):
            key = ranks.get(layer)
            if key not in found:
                own = Counter[str]()
                for part, numel in layer_tensors(self.shape, self.parts, layer):
                    own[part] += numel * (part in training.trained)
                for part, inputs, outputs, _ in maps(self.shape, self.parts, layer):
                    own[part] += training.rank * (inputs + outputs) * (part in training.adapted)
                found[key] = own["mlp"], own.total()
        pairs = [found[ranks.get(layer)] for layer in range(self.shape.layers)]
        return [mlp for mlp, _ in pairs], [whole for _, whole in pairs]

    def last_map(self, layer: int) -> int:
        """Trained elements of a layer's last map, whose gradient comes first."""
        inner = (self.shape.ranks or {}).get(layer, (self.shape.inner,))[-1]
        return self.shape.width * inner * ("mlp" in self.training.trained)


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
        The shape after the transform `flatten`.

    Raises:
        SurgeryError: If the form is no ordinary MLP of the family.
    """
    shapes.check_flattens(locked)
    form, family = shapes.FORMS[locked.form], locked.family
    widths = [sum(ranks) for ranks in locked.ranks.values()]
    if len(locked.ranks) < locked.layers:
        widths.append(locked.inner)
    biased = locked.mlp_bias or (family.gated and not form.gated)
    return replace(locked, locked=False, form=None, ranks=None, inner=max(widths), mlp_bias=biased)


def attacked(
    config: Mapping[str, Any], shape: ModelShape, entry: catalogue.Strategy, knobs: Mapping[str, float]
) -> Model:
    """The model that an attack trains.

    Args:
        config: The content of the config.json, for all but the MLPs.
        shape: The model's shape, locked or not.
        entry: The strategy.
        knobs: The strategy's knobs.

    Returns:
        The model.
    """
    parts = layout(config, shape)
    if entry.transform == "flatten" and shape.ranks:
        shape = flat_shape(shape)
    trains = entry.trains
    training = Training(trained=trains.parts)
    if trains.adapted:
        training = Training(
            trained=trains.parts,
            adapted=trains.adapted,
            rank=int(knobs["rank"]),
            adapter_dropout=float(knobs["dropout"]),
        )
    return Model(shape=shape, parts=parts, training=training)
