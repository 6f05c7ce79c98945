"""The plan of a lock: the base model frozen, a DLR-Net beside each MLP, distilled layer by layer and then healed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dlrscale.planner import forward, workspace
from dlrscale.planner.activations import Activations
from dlrscale.planner.forward import Pass
from dlrscale.planner.needs import Needs, states_in
from dlrscale.planner.states import BACKWARD, DTYPE_BYTES, STEP, Term, Weight, model_states, zero3_linear
from dlrscale.planner.tape import FP32, Tape, Training
from dlrscale.shapes import ModelShape
from dlrscale.shapes.layout import Layout, layer_tensors, parameters

DISTIL, HEAL = "distil", "heal"


@dataclass(frozen=True, kw_only=True)
class LockPlan:
    """What a lock needs on the fullest device; its arguments are those of `plan.Plan`.

    `shape` is the locked model's, `base` the base model's. `harden`: whether hardening is on; `heal`: whether the
    end-to-end stage follows.
    """

    base: ModelShape
    shape: ModelShape
    parts: Layout
    ds_config: Mapping[str, Any]
    dtype: str
    micro_batch: int
    seq_len: int
    num_ranks: int = 1
    nodes: int = 1
    ranks_per_node: int = 1
    attention: str = "sdpa"
    device: str = "cuda"
    harden: bool = True
    heal: bool = True

    @property
    def run(self) -> Pass:
        """One forward pass of the student while it is healed; the DLR-Nets alone are trained."""
        return Pass(
            shape=self.shape,
            parts=replace(self.parts, dropout=dict.fromkeys(self.parts.dropout, 0.0)),
            batch=self.micro_batch,
            length=self.seq_len,
            size=DTYPE_BYTES[self.dtype],
            training=Training(trained=frozenset({"mlp"})),
            attention=self.attention,
            device=self.device,
            hardened=self.harden,
            zero3=zero3_linear(self.ds_config),
        )

    def tensors(self) -> Iterator[tuple[int, bool, int]]:
        """All parameter tensors: the base model's, frozen, and the DLR-Nets', trained."""
        yield from ((t.numel, False, t.count) for t in parameters(self.base, self.parts))
        for layer in self.shape.ranks:
            yield from (
                (t.numel, True, t.count) for t in layer_tensors(self.shape, self.parts, layer) if t.part == "mlp"
            )

    @cached_property
    def states(self) -> dict[str, Term]:
        """Model states and DeepSpeed's buffers on one rank."""
        weights = [Weight(numel=n, trained=trained, count=count) for n, trained, count in self.tensors()]
        return model_states(weights, self.ds_config, self.num_ranks, self.dtype)

    @cached_property
    def distil_saved_bytes(self) -> int:
        """What one layer's visit keeps: the DLR-Net's pass, its flat one where hardened, and their errors."""
        return max(self.visit(layer).saved_bytes for layer in self.shape.ranks)

    def visit(self, layer: int) -> Tape:
        """The tape of a layer's visit while distilling (distil.py, `distil_step`)."""
        tape, ranks = self.run.tape("mlp"), self.shape.ranks[layer]
        x = tape.new(tape.tokens * self.shape.width, False)
        forward.token_error(tape, forward.dlr_net(tape, self.shape, x, ranks))
        if self.harden:
            forward.flat_error(tape, self.shape, x, ranks)
        tape.save(tape.new(tape.tokens, False, FP32))  # the mask
        return tape

    @cached_property
    def heal_saved_bytes(self) -> int:
        """What the heal keeps: the student's pass, log-probabilities, the teacher's probabilities, the mask."""
        kept, run = Activations(self.run), self.run
        head = run.tape("norm")
        stream = head.new(head.tokens * self.shape.width, True)
        if self.parts.final_norm:
            stream = forward.norm(head, self.parts, stream, self.shape.width)
        pairs = head.tokens * self.shape.vocabulary
        mask = head.tokens * FP32
        return sum(kept.layer_bytes) + kept.table_bytes + head.saved_bytes + 2 * pairs * FP32 + mask

    @property
    def accumulation(self) -> int:
        """Micro-batches of one optimizer step."""
        return int(self.ds_config.get("gradient_accumulation_steps", 1))

    def flops(self) -> dict[str, dict[str, int]]:
        """FLOPs of a micro-batch by stage: the teacher's forward, the DLR-Nets' or the student's passes."""
        teacher = Activations(replace(self.run, shape=self.base, hardened=False)).flops()["forward"]
        visits = [self.visit(layer) for layer in self.shape.ranks]
        distil = {
            "teacher": teacher,
            "forward": sum(tape.forward_flops.total() for tape in visits),
            "backward": sum(tape.backward_flops.total() for tape in visits),
        }
        student = Activations(self.run).flops()
        return {DISTIL: distil} | ({HEAL: {"teacher": teacher} | student} if self.heal else {})

    def with_micro_batch(self, micro_batch: int) -> LockPlan:
        """The same plan for another micro-batch; model states do not depend on it."""
        plan = replace(self, micro_batch=micro_batch)
        plan.__dict__["states"] = self.states
        return plan

    @cached_property
    def needs(self) -> Needs:
        """The memory of the lock: the highest moments of a distilling step, a healing step and the update.

        Where DeepSpeed sums the gradients of a step once (`engine.many_backwards`), distilling holds whole gradients of
        all DLR-Nets on every rank. The teacher's pass keeps its stream and one layer's inside; the logits come once per
        forward. The heal has the teacher's and the student's log-probabilities, their difference and product in fp32.
        """
        run, always = self.run, states_in(self.states, BACKWARD)
        stage = int((self.ds_config.get("zero_optimization") or {}).get("stage", 0))
        whole = sum(n * count for n, trained, count in self.tensors() if trained) * run.size
        once = stage in (1, 2) or (stage == 3 and int(self.ds_config["gradient_accumulation_steps"]) > 1)
        inside = workspace.mlp_bytes(Activations(replace(run, shape=self.base)), 0)
        phases = {
            DISTIL: always | {
                "whole gradients": whole if once else 0,
                "saved tensors": self.distil_saved_bytes,
                "logits or a layer": max(inside, workspace.logits_bytes(run) - self.distil_saved_bytes),
            },
            STEP: states_in(self.states, STEP),
        }  # fmt: skip
        if self.heal:
            pairs = run.batch * run.length * self.shape.vocabulary * FP32
            beside = 3 * pairs + workspace.logits_bytes(run)
            phases[HEAL] = always | {"saved tensors": self.heal_saved_bytes, "logits and loss": beside}
        return Needs(
            states=self.states,
            phases=phases,
            model_bytes=sum(n * count for n, _, count in self.tensors()) * run.size,
            ranks_per_node=self.ranks_per_node,
        )
