"""What a whole model keeps for backward, how much of it at once, and its FLOPs: layers added up from their tapes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from dlrscale.planner import forward
from dlrscale.planner.forward import Layer, Pass


@dataclass(frozen=True)
class Activations:
    """The saved bytes and FLOPs of one micro-batch; the bytes are those that saved-tensor hooks count (measure)."""

    run: Pass

    @cached_property
    def layers(self) -> list[Layer]:
        """One entry per layer that is trained or not; equal layers share one tape. Of a side network its own."""
        if self.run.training.side:
            return [forward.side_layer(self.run)] * self.run.shape.layers
        return self._decoder

    @cached_property
    def _decoder(self) -> list[Layer]:
        ranks, first, found = self.run.shape.ranks or {}, self.run.training.first, {}
        keys = [(ranks.get(i), forward.flows(self.run, i), i >= first) for i in range(self.run.shape.layers)]
        for layer, key in enumerate(keys):
            if key not in found:
                found[key] = forward.decoder_layer(self.run, layer)
        return [found[key] for key in keys]

    @property
    def _beside(self) -> list[Layer]:
        """The layers of the frozen model that a side network stands beside."""
        return self._decoder if self.run.training.side else []

    @cached_property
    def _ends(self) -> tuple[forward.Tape, forward.Tape]:
        return forward.embedding(self.run), forward.head(self.run)

    @cached_property
    def _inputs(self) -> list[int]:
        """With checkpointing, the bytes of the inputs that are kept of all layers up to each."""
        return list(accumulate(layer.input_bytes for layer in self.layers))

    @property
    def table_bytes(self) -> int:
        """The rotary tables, which all layers share."""
        kept = any(layer.shared & set(layer.tape.saved) for layer in self.layers)
        return 2 * self.run.length * self.run.parts.rotary * self.run.size if kept else 0

    @property
    def head_bytes(self) -> int:
        """What final norm, head and loss keep."""
        return self._ends[1].saved_bytes

    @property
    def norm_bytes(self) -> int:
        """What the final norm keeps."""
        return self._ends[1].by_part().get("norm", 0)

    @cached_property
    def layer_bytes(self) -> list[int]:
        """What each layer keeps while all of it is there; with checkpointing, without its input."""
        return [layer.bytes(without_input=self.run.checkpointing == "layer") for layer in self.layers]

    @property
    def mask_bytes(self) -> int:
        """GPT-2 hands its mask to a checkpointed layer as an input, where its attention is written out."""
        run = self.run
        taken = run.checkpointing == "layer" and self._inputs[-1] and not run.training.side
        if taken and run.shape.family.model_type == "gpt2" and run.attention == "eager":
            return run.batch * run.length**2 * run.size
        return 0

    @property
    def stream_held_bytes(self) -> int:
        """What is held of embedding and layers between forward and backward."""
        ends = self._ends[0].saved_bytes
        if self.run.checkpointing == "layer":
            return ends + self._inputs[-1] + self.mask_bytes
        return ends + sum(self.layer_bytes) + self.table_bytes

    @property
    def held_bytes(self) -> int:
        """Everything saved when forward ends."""
        return self.stream_held_bytes + self.head_bytes

    def alive_bytes(self, layer: int) -> int:
        """What is saved while backward goes through a layer: what lies before it, and all of its own."""
        ends = self._ends[0].saved_bytes + self.table_bytes
        if self.run.checkpointing == "layer":
            return ends + self.mask_bytes + self._inputs[layer] + self.layer_bytes[layer]
        return ends + self._running[layer]

    def mlp_bytes(self, layer: int) -> int:
        """What a layer's MLP or DLR-Net keeps."""
        return self.layers[layer].tape.by_part().get("mlp", 0)

    @cached_property
    def _running(self) -> list[int]:
        return list(accumulate(self.layer_bytes))

    @property
    def peak_bytes(self) -> int:
        """The most that is saved at once: at the end of forward, or while one layer is there again."""
        if self.run.checkpointing == "none":
            return self.held_bytes
        return max(self.held_bytes, *map(self.alive_bytes, range(self.run.shape.layers)))

    def by_part(self) -> dict[str, int]:
        """Bytes that one forward saves by part, as if nothing were checkpointed; the rotary tables with attention."""
        found: Counter[str] = Counter()
        for tape in self._ends:
            found.update(tape.by_part())
        for layer in self.layers:
            for storage, (part, size) in layer.tape.saved.items():
                found[part] += 0 if storage in layer.shared else size
        found["attention"] += self.table_bytes
        return dict(found)

    def fused_flops(self) -> int:
        """FLOPs of fused attention kernels in all of forward, backward and what is run again."""
        inside = sum(layer.tape.kernel_flops for layer in self.layers)  # one product; backward has 4 more
        again = 2 * inside if self.run.checkpointing == "layer" else 0
        return sum(layer.tape.fused_flops for layer in (*self.layers, *self._beside)) + 5 * inside + again

    def flops(self) -> dict[str, int]:
        """FLOPs of forward, of backward, of what is run again in backward, and inside fused kernels."""
        tapes = [*self._ends, *(layer.tape for layer in (*self.layers, *self._beside))]
        again = sum(layer.tape.recomputed_flops for layer in self.layers) if self.run.checkpointing == "layer" else 0
        return {
            "forward": sum(tape.forward_flops.total() for tape in tapes),
            "backward": sum(tape.backward_flops.total() for tape in tapes),
            "recompute": again,
            "in_kernels": sum(tape.kernel_flops for tape in tapes),
        }
