"""How seconds and saved bytes of an attack's forward and backward grow with N, K and tokens."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from common import Sizes, in_turns
from transformers import AutoConfig, AutoModelForCausalLM

from dlrscale import (
    catalogue,
    models,  # noqa: F401  registers the locked classes
    shapes,
)
from dlrscale.evaluate import cross_entropy_sum
from dlrscale.measure import SavedBytes
from dlrscale.planner import model as planned
from dlrscale.planner.activations import Activations
from dlrscale.planner.forward import Pass


class Point:
    """One size: a locked Llama (gated, at parity) that is trained whole, and one micro-batch for it."""

    def __init__(self, sizes: Sizes, depth: int):
        base = sizes.llama_config().to_dict()
        ranks = list(shapes.resolve_ranks("gated", shapes.model_shape(base), depth, None))
        dlr = {"form": "gated", "ranks": {str(layer): ranks for layer in range(sizes.layers)}}
        config = {k: v for k, v in base.items() if k != "architectures"} | {"model_type": "dlr_llama", "dlr": dlr}
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).train()
        self.ids = torch.randint(2, sizes.vocabulary, (sizes.batch, sizes.length))
        self.sizes = sizes
        shape = shapes.model_shape(config)
        attacked = planned.attacked(config, shape, catalogue.strategy("full"), {})
        self.activations = Activations(
            Pass(shape=attacked.shape, parts=attacked.parts, batch=sizes.batch, length=sizes.length, size=4,
                 training=attacked.training, device="cpu")
        )  # fmt: skip

    def loss(self) -> torch.Tensor:
        """Forward and the attack's loss."""
        mask = torch.ones_like(self.ids)
        logits = self.model(input_ids=self.ids, attention_mask=mask, use_cache=False).logits
        return cross_entropy_sum(logits, self.ids)[0]

    def seconds(self) -> float:
        """Of one forward and backward, gradients made anew."""
        self.model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        self.loss().backward()
        return time.perf_counter() - start

    def saved(self) -> int:
        """Bytes that the hooks count, in a forward of its own."""
        with SavedBytes(self.model) as counter:
            self.loss()
        return counter.total


def line(x: list[float], y: list[float]) -> dict[str, float]:
    """Least squares: slope, value at 0, R^2, and the largest distance from the line over the mean."""
    slope, start = np.polyfit(x, y, 1)
    left = np.array(y) - (slope * np.array(x) + start)
    total = np.array(y) - np.mean(y)
    r2 = 1 - float(left @ left) / float(total @ total)
    return {"slope": float(slope), "at_0": float(start), "r2": r2, "off": float(np.abs(left).max() / np.mean(y))}


def derived_slopes(sizes: Sizes, depth: int) -> dict[str, float]:
    """Bytes per layer, per block and per token, from the formulas alone."""
    found = Point(replace(sizes, layers=1), depth).activations
    per_token = Point(replace(sizes, batch=2), depth).activations.held_bytes
    per_token -= Point(replace(sizes, batch=1), depth).activations.held_bytes
    shape = found.run.shape
    one, two = (
        shapes.saved_bytes(replace(shape, ranks={0: shapes.resolve_ranks("gated", shape, k, None)}), 0, 4)
        for k in (1, 2)
    )
    return {
        "layers": found.layer_bytes[0],
        "depth": (two - one) * sizes.tokens * sizes.layers,
        "batch": per_token / sizes.length,
        "length": per_token / sizes.length,
    }


def sweeps(sizes: Sizes, depth: int, quick: bool) -> dict[str, list[tuple[float, Point]]]:
    """The points of each sweep: what is put on the x axis, and the model."""
    layers = (1, 2, 3) if quick else (2, 4, 6, 8, 12)
    depths = (1, 2, 4) if quick else (1, 2, 4, 8, 16, 32, 64)
    batches = (1, 2, 3) if quick else (1, 2, 4, 6, 8)
    lengths = (16, 32, 64) if quick else (64, 128, 256, 512)
    return {
        "layers": [(n, Point(replace(sizes, layers=n), depth)) for n in layers],
        "depth": [(k, Point(sizes, k)) for k in depths],
        "batch": [(b * sizes.length, Point(replace(sizes, batch=b), depth)) for b in batches],
        "length": [(t * sizes.batch, Point(replace(sizes, length=t), depth)) for t in lengths],
    }


def measure(sizes: Sizes, rank: int, ranks: int, *, depth: int, rounds: int, quick: bool) -> dict[str, Any]:
    """Lines through seconds and saved bytes of each sweep; the points of a sweep are timed in turns."""
    derived, found = derived_slopes(sizes, depth), {}
    for name, points in sweeps(sizes, depth, quick).items():
        x = [value for value, _ in points]
        saved = [point.saved() for _, point in points]
        for _, point in points:
            point.seconds()  # warm-up
        seconds = in_turns({str(value): point.seconds for value, point in points}, rounds)
        medians = [median(values) for values in seconds.values()]
        found[name] = {
            "x": x,
            "bytes": saved,
            "planned_bytes": [point.activations.held_bytes for _, point in points],
            "bytes_line": line(x, saved),
            "derived_slope": derived[name],
            "seconds": medians,
            "seconds_line": line(x, medians),
        }
    return found
