"""The plan of one attack: every term of its memory per device and per host, when the peak is, FLOPs and least time.

What is exact and what is an estimate stands in docs/memory-model.md: model states and saved tensors are exact; what
lives for a moment (`workspace`, the states' `backward`, `gathered` and `step`) is a bound or an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dlrscale.catalogue import Strategy
from dlrscale.planner import own_update, workspace
from dlrscale.planner.activations import Activations
from dlrscale.planner.forward import Pass
from dlrscale.planner.model import Model
from dlrscale.planner.needs import Needs, states_in
from dlrscale.planner.states import (
    ALWAYS,
    BACKWARD,
    DTYPE_BYTES,
    FORWARD,
    STEP,
    Term,
    Weight,
    model_states,
    zero3_linear,
)


def inside(levers: Any, entry: Strategy, knobs: Mapping[str, float]) -> dict[str, Any]:
    """The levers that act inside a model, as a plan takes them.

    Args:
        levers: Levers, or a configuration that has them; a lever that is None is left out.
        entry: The strategy, or a combination by hand.
        knobs: Its knobs.

    Returns:
        Values of a plan's fields by name.
    """
    return {
        "checkpointing": levers.activation_checkpointing or "none",
        "storage": levers.activation_storage or "device",
        "tiles": levers.tiles or 1,
        "anchor": int(knobs["anchor"]) if entry.gradient == "reverse" else None,
        "gradient": entry.gradient,
    }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one attack needs on the fullest device and host.

    Attributes:
        model: The model and what of it is trained.
        ds_config: The merged DeepSpeed configuration.
        dtype: `fp32`, `bf16` or `fp16`.
        checkpointing: `none`, `layer` or `nested`.
        micro_batch: Sequences per rank and forward.
        seq_len: Tokens of a sequence.
        num_ranks: Devices.
        nodes: Hosts that they are spread over.
        ranks_per_node: Devices of the fullest host.
        attention: `sdpa` or `eager`.
        device: `cuda` or `cpu`, where operations keep different things.
        storage: `device`, `host` or `int8`, where what the layers keep lies.
        tiles: Pieces in which the tokens go through each MLP or DLR-Net.
        anchor: The knob of the gradient method `reverse`; None: another method.
        gradient: The gradient method.
    """

    model: Model
    ds_config: Mapping[str, Any]
    dtype: str
    checkpointing: str
    micro_batch: int
    seq_len: int
    num_ranks: int = 1
    nodes: int = 1
    ranks_per_node: int = 1
    attention: str = "sdpa"
    device: str = "cuda"
    storage: str = "device"
    tiles: int = 1
    anchor: int | None = None
    gradient: str = "backprop"

    @cached_property
    def activations(self) -> Activations:
        """The saved tensors of one micro-batch."""
        run = Pass(
            shape=self.model.shape,
            parts=self.model.parts,
            batch=self.micro_batch,
            length=self.seq_len,
            size=DTYPE_BYTES[self.dtype],
            training=self.model.training,
            checkpointing=self.checkpointing,
            storage=self.storage,
            tiles=self.tiles,
            anchor=self.anchor,
            attention=self.attention,
            device=self.device,
            zero3=zero3_linear(self.ds_config),
        )
        return own_update.ForwardOnly(run) if self.gradient in own_update.FORWARD_ONLY else Activations(run)

    @cached_property
    def states(self) -> dict[str, Term]:
        """Model states and DeepSpeed's buffers on one rank."""
        weights = [Weight(numel=n, trained=trained, count=count) for n, trained, count in self.model.tensors()]
        adafactor = str((self.ds_config.get("optimizer") or {}).get("type")).lower() == "adafactor"
        factored = self.model.factored if adafactor else None
        found = model_states(weights, self.ds_config, self.num_ranks, self.dtype, factored)
        if self.gradient not in own_update.UPDATES:
            return found
        largest = max((w.numel for w in weights if w.trained), default=0)
        return own_update.states(found, self.gradient, largest, DTYPE_BYTES[self.dtype], self._waiting)

    def with_micro_batch(self, micro_batch: int) -> Plan:
        """The same plan for another micro-batch; model states do not depend on it."""
        plan = replace(self, micro_batch=micro_batch)
        plan.__dict__["states"] = self.states
        return plan

    @cached_property
    def needs(self) -> Needs:
        """The memory of the attack: the highest moments of forward, backward and optimizer step."""
        kept = self.activations
        if self.gradient in own_update.FORWARD_ONLY:
            alive = max(own_update.loss_bytes(kept.run), own_update.forward_bytes(kept.run))
            passes = {FORWARD: states_in(self.states, FORWARD) | {"inside a layer": alive}}
            return self._needs(passes | {STEP: states_in(self.states, STEP)})
        forward_pass = states_in(self.states, FORWARD) | {
            "saved tensors": kept.held_bytes,
            "logits and loss": workspace.loss_forward_bytes(kept.run),
        }
        if self.model.training.first:  # layers that keep nothing take their room in passing
            passing = states_in(self.states, FORWARD) | workspace.passing_bytes(kept.run)
            forward_pass = max(forward_pass, passing, key=lambda terms: sum(terms.values()))
        return self._needs({FORWARD: forward_pass, BACKWARD: self._backward(), STEP: states_in(self.states, STEP)})

    def _needs(self, phases: dict[str, dict[str, int]]) -> Needs:
        on_host = self.activations.host_bytes if BACKWARD in phases else 0
        kept_on_host = {"activations": Term(host=on_host, during=(BACKWARD,))} if on_host else {}
        return Needs(
            states=self.states | kept_on_host,
            phases=phases,
            model_bytes=self.model.total * DTYPE_BYTES[self.dtype],
            ranks_per_node=self.ranks_per_node,
        )

    def _backward(self) -> dict[str, int]:
        """The highest moment of backward: at the loss, while one of the layers is gone through, or at its end.

        Saved tensors go layer by layer while gradients come, in proportion to the trained parameters gone through,
        where they are not held for good: that of the last map stands beside all that its layer saved, the others of an
        MLP at the latest when what it saved has gone. At the loss there are none yet, nothing is done with them
        (`backward`), and DeepSpeed asks for buckets with the first of them. Stage 0 sums them when all are there, in a
        flat copy (`buckets`). In tiles an MLP's gradients are whole sums that wait for its first piece, beside the
        largest that one piece has made.
        """
        kept, always = self.activations, states_in(self.states, BACKWARD)
        whole, summing = always.pop("gradients"), {"buckets": always["buckets"]}
        always |= {} if self.stage else {"buckets": 0}
        growing, asked_for = self.states["gradients"].during != ALWAYS, self.states["buckets"].during == (BACKWARD,)

        def moment(done: int, saved: int, beside: str, size: int) -> dict[str, int]:
            grown = whole * done // max(1, self.model.trained) if growing else whole
            return always | {"gradients": grown, "saved tensors": saved, beside: size}

        model = self.model
        done = model.outside("head") + (model.outside("embedding") if model.shape.tied else 0)
        done += model.training.side * model.shape.width
        at_loss = moment(0, kept.held_bytes, "logits and loss", workspace.loss_backward_bytes(kept.run))
        moments = [at_loss | dict.fromkeys(("backward", *(["buckets"] if asked_for else [])), 0)]
        if model.training.side:
            moments.append(moment(0, kept.behind_loss_bytes, "inside a layer", workspace.norm_bytes(kept)))
        of_mlp, of_layer = self.model.trained_by_layer
        for layer in reversed(range(self.model.shape.layers)):
            if not kept.layers[layer].tape.saved:  # no gradient comes so far
                break
            alive = kept.alive_bytes(layer)
            if model.training.side:
                moments.append(moment(done, alive, "inside a layer", workspace.side_bytes(kept)))
                done += of_layer[layer]
                continue
            inside, last = workspace.mlp_bytes(kept, layer), self.model.last_map(layer)
            if self.tiles > 1:
                inside, last = inside + kept.run.size * (of_mlp[layer] + last), 0
            moments.append(moment(done + last, alive, "inside a layer", inside))
            left, beside = kept.attention_bytes(layer), workspace.attention_bytes(kept)
            moments.append(moment(done + of_mlp[layer], left, "inside a layer", beside))
            done += of_layer[layer]
        moments.append(moment(self.model.trained, 0, "inside a layer", 0) | summing)
        return max(moments, key=lambda terms: sum(terms.values()))

    @property
    def _waiting(self) -> int:
        """Elements of a tied embedding's gradient, whose first part waits for the other through all of backward."""
        tied = self.model.shape.tied and "embedding" in self.model.training.trained
        return self.model.shape.vocabulary * self.model.parts.embedding_width if tied else 0

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int((self.ds_config.get("zero_optimization") or {}).get("stage", 0))

    @property
    def stays_whole(self) -> int:
        """At stage 3, elements of the weights that need not be gathered: DeepSpeed may keep them from use to use."""
        section = self.ds_config.get("zero_optimization") or {}
        reused = int(section.get("stage3_max_reuse_distance", 1_000_000_000))
        return reused + self.states["persistent"].device // DTYPE_BYTES[self.dtype]

    @property
    def gone_through(self) -> int:
        """Elements of the weights that backward reads: all but those of layers that no gradient goes through."""
        model = self.model
        if model.training.side:
            return model.trained
        skipped = sum(not layer.tape.saved for layer in self.activations.layers)  # the first ones
        return model.total - sum(model.layer_elements[:skipped])

    def offloads(self, key: str) -> bool:
        """Whether `offload_optimizer` or `offload_param` is in force."""
        section = (self.ds_config.get("zero_optimization") or {}).get(key) or {}
        return section.get("device", "none") != "none"

    @property
    def accumulation(self) -> int:
        """Micro-batches of one optimizer step."""
        return int(self.ds_config.get("gradient_accumulation_steps", 1))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all devices."""
        return self.micro_batch * self.seq_len * self.accumulation * self.num_ranks
