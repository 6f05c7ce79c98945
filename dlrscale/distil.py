"""Module-wise distillation of DLR-Nets, hardening, and the end-to-end heal that follows; the lock run backwards too.

Per token: e = ||student(x) - y||^2 / (||y||^2 + f), with y the base MLP's output on the same x and f the layer's
median of ||y||^2 on the calibration set; the loss is the mean of e over the tokens of all ranks. Hardening adds
w max(0, t - e_flat), where e_flat is the same error with every block reading x alone. No gradient crosses a
layer: each layer's backward runs inside its own visit, so one DLR-Net's activations live at a time.

An attacker's regression of MLPs on DLR-Nets, and the heal of shortened ones, are the same with the locked model as the
teacher and without hardening.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from dlrscale import dlr
from dlrscale.config import LockConfig
from dlrscale.data import StepBatch, TokenData, eval_batches
from dlrscale.engine import Engine
from dlrscale.measure import Phases
from dlrscale.surgery import Switch, mode


def token_error(student: torch.Tensor, target: torch.Tensor, floor: float) -> torch.Tensor:
    """||student - target||^2 / (||target||^2 + floor) per token, in fp32; (..., D) twice -> (tokens,).

    Tokens are flat here and below: some families (OPT) give their MLPs (B T, D), others (B, T, D).
    """
    target = target.float()
    return ((student.float() - target).square().sum(-1) / (target.square().sum(-1) + floor)).flatten()


def forward(engine: Engine, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (B, T, V) of the engine's model."""
    return engine.ds(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


@dataclass
class Distiller:
    """The objectives of a lock, or of an attack on one, on the switches of one model.

    `config` is None where no lock is made: students get no b, and are not hardened. `floors` is f by layer, set by
    `calibrate` or from a checkpoint. `metrics` is what the names of the error's metrics begin with.
    """

    switches: list[Switch]
    config: LockConfig | None = None
    floors: dict[int, float] = field(default_factory=dict)
    metrics: str = "lock"

    @property
    def hardens(self) -> bool:
        """Whether students are trained to be useless when flattened."""
        return self.config is not None and self.config.harden

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of all students."""
        return [p for s in self.switches for p in s.net.parameters()]

    @torch.no_grad()
    def calibrate(self, engine: Engine, batches: Iterable[dict[str, torch.Tensor]]) -> dict[int, float]:
        """Set every b of a lock, once, and every floor, by forward passes of the teacher.

        Every rank runs the same sequences one by one, so that the medians are the same at any number of
        ranks; rank 0's are taken for all.

        Args:
            engine: The engine that holds the model.
            batches: `input_ids` and `attention_mask`, int64 (B, T) each, the same on every rank.

        Returns:
            b by layer; empty where no lock is made.
        """
        norms: dict[int, list[torch.Tensor]] = {s.layer: [] for s in self.switches}

        def visit(switch: Switch, x: torch.Tensor, y: torch.Tensor) -> None:
            pair = torch.stack([x.float().norm(dim=-1).flatten(), y.float().norm(dim=-1).flatten()])
            norms[switch.layer].append(pair[:, mask].cpu())

        with mode(self.switches, "teacher", visit):
            for batch in batches:
                batch = {k: v.to(engine.device) for k, v in batch.items()}
                mask = batch["attention_mask"].bool().flatten()
                forward(engine, batch)
        found = torch.empty(len(self.switches), 2, dtype=torch.float64)
        for row, switch in enumerate(self.switches):
            inputs, outputs = torch.cat(norms[switch.layer], dim=1)
            found[row, 0] = dlr.coupling_scale(self.config.coupling, inputs, outputs) if self.config else 0.0
            found[row, 1] = outputs.square().median()
        found = found.to(engine.device)
        if engine.rank:
            found.zero_()
        engine.sum_over_ranks(found)
        scales = {s.layer: float(found[i, 0]) for i, s in enumerate(self.switches)} if self.config else {}
        self.floors = {s.layer: float(found[i, 1]) for i, s in enumerate(self.switches)}
        self.set_scales(scales)
        return scales

    def set_scales(self, scales: dict[int, float]) -> None:
        """Write b into the buffer of every DLR-Net."""
        for switch in self.switches if scales else ():
            switch.net.b.fill_(scales[switch.layer])

    def distil_step(self, engine: Engine, batch: StepBatch, phases: Phases) -> dict[str, float]:
        """One step of module-wise distillation; see `train.Objective`.

        `loss/train` is the mean over tokens and layers of e and its hardening term together.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
        scale = engine.world_size * len(batch.micro_batches) / batch.tokens
        last_switch = self.switches[-1]

        def visit(switch: Switch, x: torch.Tensor, y: torch.Tensor) -> None:
            if engine.stage == 0:
                engine.boundary(last and switch is last_switch)
            with torch.enable_grad():
                x, floor = x.detach(), self.floors[switch.layer]
                error = token_error(switch.net(x), y.detach(), floor)
                per_token = error
                if self.hardens:
                    flat = token_error(switch.net(x, flat=True), y.detach(), floor)
                    per_token = error + self.config.harden_weight * F.relu(self.config.harden_target - flat)
                loss = (per_token * mask).sum()
            engine.backward(loss, scale)
            sums[0] += loss.detach().double()
            sums[1] += (error.detach() * mask).sum().double()

        with phases.phase("distil"), engine.many_backwards(), mode(self.switches, "teacher", visit):
            for index, micro in enumerate(batch.micro_batches):
                last = index == len(batch.micro_batches) - 1
                micro = {k: v.to(engine.device) for k, v in micro.items()}
                mask = micro["attention_mask"].float().flatten()
                with torch.no_grad():
                    forward(engine, micro)
        with phases.phase("optimizer"):
            norm = engine.step()
        loss, error = (engine.sum_over_ranks(sums) / (batch.tokens * len(self.switches))).tolist()
        return {"loss/train": loss, f"{self.metrics}/error_mean": error, "optim/grad_norm": norm}

    def heal_step(self, engine: Engine, batch: StepBatch, phases: Phases) -> dict[str, float]:
        """One step of end-to-end distillation: KL(teacher || student) on the logits, in nats per token.

        Hardening stays, against the student's own detached output, summed over layers. The students answer while going
        backward too, where layers may be run again.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
        scale = engine.world_size * len(batch.micro_batches) / batch.tokens
        penalties: list[torch.Tensor] = []

        def visit(switch: Switch, x: torch.Tensor, out: torch.Tensor) -> None:
            flat = token_error(switch.net(x.detach(), flat=True), out.detach(), self.floors[switch.layer])
            penalties.append((F.relu(self.config.harden_target - flat) * mask).sum())

        for index, micro in enumerate(batch.micro_batches):
            engine.boundary(index == len(batch.micro_batches) - 1)
            micro = {k: v.to(engine.device) for k, v in micro.items()}
            mask = micro["attention_mask"].float().flatten()
            penalties.clear()
            with phases.phase("forward"), torch.no_grad(), mode(self.switches, "teacher"):
                teacher = forward(engine, micro).float().log_softmax(-1)
            with mode(self.switches, "student", visit if self.hardens else None):
                with phases.phase("forward"):
                    student = forward(engine, micro).float().log_softmax(-1)
                    kl = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
                    divergence = (kl.flatten() * mask).sum()
                    loss = divergence
                    if penalties:
                        loss = loss + self.config.heal_harden_weight * torch.stack(penalties).sum()
                with phases.phase("backward"):
                    engine.backward(loss, scale)
            sums += torch.stack([loss.detach(), divergence.detach()]).double()
        with phases.phase("optimizer"):
            norm = engine.step()
        loss, divergence = (engine.sum_over_ranks(sums) / batch.tokens).tolist()
        return {"loss/train": loss, f"{self.metrics}/kl": divergence, "optim/grad_norm": norm}

    @torch.no_grad()
    def layer_errors(self, engine: Engine, data: TokenData, batch: int, pad_id: int) -> dict[int, float]:
        """sum ||student(x) - y||^2 / sum ||y||^2 over held-out tokens, by layer, on the teacher's stream."""
        sums = torch.zeros(len(self.switches), 2, dtype=torch.float64, device=engine.device)
        rows = {s.layer: i for i, s in enumerate(self.switches)}

        def visit(switch: Switch, x: torch.Tensor, y: torch.Tensor) -> None:
            wrong = (switch.net(x).float() - y.float()).square().sum(-1).flatten()
            right = y.float().square().sum(-1).flatten()
            sums[rows[switch.layer]] += torch.stack([(v * mask).sum() for v in (wrong, right)]).double()

        batches = eval_batches(data, batch=batch, rank=engine.rank, world_size=engine.world_size, pad_id=pad_id)
        with mode(self.switches, "teacher", visit):
            for micro in batches:
                micro = {k: v.to(engine.device) for k, v in micro.items()}
                mask = (micro["labels"] != -100).float().flatten()
                forward(engine, micro)
        ratios = engine.sum_over_ranks(sums)
        return {s.layer: float(ratios[i, 0] / ratios[i, 1]) for i, s in enumerate(self.switches)}

    def weights(self, engine: Engine) -> dict[int, dict[str, torch.Tensor]]:
        """Whole weights and buffers of every student on the CPU of rank 0 (elsewhere empty); all ranks call it."""
        taken: dict[int, dict[str, torch.Tensor]] = {}
        for switch in self.switches:
            with engine.gathered(list(switch.net.parameters())):
                if engine.rank == 0:
                    taken[switch.layer] = {k: v.detach().cpu().clone() for k, v in switch.net.state_dict().items()}
        return taken
