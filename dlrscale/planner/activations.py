"""What a whole model keeps for backward, how much of it at once, and its FLOPs: layers added up from their tapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from dlrscale.planner import forward
from dlrscale.planner.forward import Layer, Pass
from dlrscale.planner.tape import DEVICE, HOST, Tape

BEHIND = frozenset({"norm", "projection", "side", "head", "loss"})  # the parts of what lies behind the last layer


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

    def _of_each(self, count: Callable[[Layer], int]) -> list[int]:
        """A number of each layer; equal layers are counted once."""
        found = {key: count(layer) for key, layer in {id(layer): layer for layer in self.layers}.items()}
        return [found[id(layer)] for layer in self.layers]

    @property
    def _beside(self) -> list[Layer]:
        """The layers of the frozen model that a side network stands beside."""
        return self._decoder if self.run.training.side else []

    @cached_property
    def _ends(self) -> tuple[Tape, Tape]:
        return forward.embedding(self.run), forward.head(self.run)

    @cached_property
    def table_bytes(self) -> int:
        """The rotary tables, which all layers share."""
        kept = any(layer.shared & set(layer.tape.saved) for layer in self.layers)
        return 2 * self.run.length * self.run.parts.rotary * self.run.size if kept else 0

    @cached_property
    def _inputs(self) -> list[int]:
        """With checkpointing, the bytes of the inputs that are kept of all layers up to each."""
        return list(accumulate(self._of_each(lambda at: at.inputs().kept_bytes(self.run.storage))))

    @cached_property
    def mask_bytes(self) -> int:
        """GPT-2 hands its mask to a checkpointed layer as an input, where its attention is written out."""
        run, tape = self.run, self.run.tape()
        taken = run.checkpointed and self._inputs[-1] and not run.training.side
        if taken and run.shape.family.model_type == "gpt2" and run.attention == "eager":
            tape.save(tape.new(run.batch * run.length**2, False, row=run.length))
        return tape.kept_bytes(run.storage)

    @property
    def _layer_storage(self) -> str:
        """Where what a layer saves lies: with checkpointing on the device, since it is there for a moment only."""
        return DEVICE if self.run.checkpointed else self.run.storage

    @cached_property
    def _input_counts(self) -> bool:
        """Whether a layer's input lies on the device already while the layer runs again."""
        return self.run.checkpointed and self.run.storage == DEVICE

    @cached_property
    def layer_bytes(self) -> list[int]:
        """What each layer keeps while all of it is there, on host or device; where it was kept on, without its input.

        The tables are not among it.
        """
        return self._of_each(lambda at: at.bytes(self._layer_storage, without_input=self._input_counts))

    @cached_property
    def _layer_peaks(self) -> list[int]:
        """The most that each layer keeps on the device at once, as `layer_bytes`."""
        return self._of_each(lambda at: at.peak_bytes(self._layer_storage, without_input=self._input_counts))

    @cached_property
    def _embedding_bytes(self) -> int:
        """What the embedding keeps."""
        return self._ends[0].kept_bytes(self.run.storage)

    @property
    def _stored_parts(self) -> set[str]:
        """Of what lies behind the last layer, what a storage acts on: the backbone's, or a side network's alone."""
        return {"side"} if self.run.training.side else {"norm", "projection"}

    def _stored_bytes(self) -> int:
        """What embedding, layers and final norm keep between forward and backward, where the storage has it."""
        run = self.run
        around = self._embedding_bytes + self._ends[1].kept_bytes(run.storage, parts=self._stored_parts)
        if run.checkpointed:
            return around + self._inputs[-1] + self.mask_bytes
        return around + sum(self.layer_bytes) + self.table_bytes

    @property
    def stream_held_bytes(self) -> int:
        """What of embedding, layers and final norm is saved on the device when forward ends."""
        return 0 if self.run.storage == HOST else self._stored_bytes()

    @cached_property
    def held_bytes(self) -> int:
        """Everything saved on the device when forward ends."""
        return self.stream_held_bytes + self._ends[1].kept_bytes(parts=BEHIND - self._stored_parts)

    @property
    def behind_loss_bytes(self) -> int:
        """What of it is there when backward has gone through loss and head."""
        return self.held_bytes - self._ends[1].kept_bytes(parts={"head", "loss"})

    @cached_property
    def host_bytes(self) -> int:
        """What is saved in host memory when forward ends."""
        return self._stored_bytes() if self.run.storage == HOST else 0

    def _before(self, layer: int) -> int:
        """What is on the device before and beside a layer's own while backward goes through it."""
        run, tables = self.run, self.table_bytes
        if run.storage == HOST:
            return tables if run.checkpointed else 0
        ends = self._embedding_bytes + tables
        if run.checkpointed:
            return ends + self.mask_bytes + self._inputs[layer]
        return ends + self._running[layer]

    def alive_bytes(self, layer: int) -> int:
        """The most saved on the device while backward goes through a layer: what lies before it, and of its own."""
        return self._before(layer) + self._layer_peaks[layer]

    def attention_bytes(self, layer: int) -> int:
        """What is saved on the device when backward has gone through a layer's MLP and comes to its attention."""
        if self._layer_storage == HOST:
            return self._before(layer)
        return self._before(layer) + self.layer_bytes[layer] - self._mlp_kept[layer]

    @cached_property
    def _mlp_kept(self) -> list[int]:
        """What the MLP of each layer keeps on the device while its layer is there."""
        return self._of_each(lambda at: at.tape.kept_bytes(self._layer_storage, parts={"mlp"}))

    def mlp_bytes(self, layer: int) -> int:
        """What a layer's MLP or DLR-Net keeps on the device, as if no layer were checkpointed."""
        return self.layers[layer].tape.by_part().get("mlp", 0)

    @cached_property
    def _running(self) -> list[int]:
        """What the layers before each keep."""
        return list(accumulate(self.layer_bytes, initial=0))

    @cached_property
    def peak_bytes(self) -> int:
        """The most that is saved on the device at once: at the end of forward, or while a layer or a part of it is
        there again. What a reversed DLR-Net rebuilds is not saved, nor what comes back from the host or out of codes.
        """
        return max(self.held_bytes, *map(self.alive_bytes, range(self.run.shape.layers)))

    def by_part(self) -> dict[str, int]:
        """Bytes that one forward saves by part, as if no layer were checkpointed and all of it lay on the device.

        The rotary tables count with attention; of an MLP in tiles or reversed counts what it keeps.
        """
        found: Counter[str] = Counter()
        for tape in self._ends:
            found.update(tape.by_part())
        for layer in self.layers:
            for storage, (part, size) in layer.tape.saved.items():
                found[part] += 0 if storage in layer.shared else size
        found["attention"] += self.table_bytes
        return dict(found)

    @property
    def again_bytes(self) -> int:
        """What checkpointing saves again going backward, summed over all layers and what is checkpointed inside."""
        inside = sum(layer.tape.again_bytes for layer in self.layers)
        return inside + (sum(self.layer_bytes) if self.run.checkpointed else 0)

    def fused_flops(self) -> int:
        """FLOPs of fused attention kernels in all of forward, backward and what is run again."""
        inside = sum(layer.tape.kernel_flops for layer in self.layers)  # one product; backward has 4 more
        again = 2 * inside if self.run.checkpointed else 0
        return sum(layer.tape.fused_flops for layer in (*self.layers, *self._beside)) + 5 * inside + again

    def flops(self) -> dict[str, int]:
        """FLOPs of forward, of backward, of what is run again in backward, and inside fused kernels.

        What `reverse` runs again is its backward's own.
        """
        tapes = [*self._ends, *(layer.tape for layer in (*self.layers, *self._beside))]
        again = sum(layer.tape.again_flops for layer in self.layers)
        if self.run.checkpointed:
            again += sum(layer.tape.recomputed_flops for layer in self.layers)
        return {
            "forward": sum(tape.forward_flops.total() for tape in tapes),
            "backward": sum(tape.backward_flops.total() for tape in tapes),
            "recompute": again,
            "in_kernels": sum(tape.kernel_flops for tape in tapes),
        }
