"""What a strategy is made of: the four axes, the memory levers and the knobs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from dlrscale.errors import ConfigError

CHECKPOINTING = {
    "none": "keep all activations",
    "layer": "keep each layer's input, run it again going backward",
    "nested": "as layer, and inside it keep the stream between segments of a DLR-Net's blocks alone",
}
STORAGE = {
    "device": "as autograd has it",
    "host": "in host memory, copied back going backward",
    "int8": "in 8 bits with a scale per row",
}
PARTS = frozenset({"embedding", "projection", "attention", "norm", "mlp", "head"})


@dataclass(frozen=True, kw_only=True)
class Levers:
    """The memory levers. None means: not chosen by hand, the strategy's default holds.

    `activation_storage` is where what the decoder layers keep for backward lies: with checkpointing their inputs, else
    all that they save. `tiles` counts the pieces in which a micro-batch's tokens go through each MLP or DLR-Net.
    `optimizer` is a type that a DeepSpeed file may name, or `none` where the gradient method updates by itself.
    """

    zero: int | None = None
    offload_optimizer: bool | None = None
    offload_param: bool | None = None
    activation_checkpointing: str | None = None
    activation_storage: str | None = None
    tiles: int | None = None
    optimizer: str | None = None


DEFAULT_LEVERS = Levers(
    zero=2,
    offload_optimizer=False,
    offload_param=False,
    activation_checkpointing="layer",
    activation_storage="device",
    tiles=1,
    optimizer="AdamW",
)


@dataclass(frozen=True, kw_only=True)
class Knob:
    """A setting of a strategy's own, set by `--set name=value`: a number from `low` to `high`, or one of `choices`.

    `search` is the range in which `--trials` looks, `log` whether it does so in powers; without one it stays.
    """

    name: str
    default: float | str
    text: str
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()
    search: tuple[float, float] | None = None
    log: bool = False

    @property
    def allowed(self) -> str:
        """What values it takes, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        kind = "whole number" if isinstance(self.default, int) else "number"
        return f"a {kind} from {self.low} to {self.high}"

    def read(self, text: str) -> float | str | None:
        """The value that a text means; None where it is none that is allowed."""
        if self.choices:
            return text if text in self.choices else None
        try:
            value = type(self.default)(text)
        except ValueError:
            return None
        return value if self.low <= value <= self.high else None


@dataclass(frozen=True, kw_only=True)
class Trains:
    """What a trainable set trains of a model, by the parts that the planner knows.

    `adapted` parts get low-rank adapters. `biases`: all biases, whatever part they belong to. `last` names the knob
    that counts the last decoder layers, which alone train then. `untied`: a tied head gets a matrix of its own. `side`
    names the knob that says by how much narrower a side network is than the frozen model that it stands beside.
    `merges`: what is trained can be written into the model's own folder.
    """

    parts: frozenset[str] = PARTS
    adapted: frozenset[str] = frozenset()
    biases: bool = False
    last: str | None = None
    untied: bool = False
    side: str | None = None
    merges: bool = True


def flag(name: str, value: object) -> str:
    """A lever and its value as they are typed: `--zero 2`, `--offload-param`, `--no-offload-param`.

    Args:
        name: The lever's name.
        value: Its value.

    Returns:
        The words.
    """
    words = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{words}"
    return f"--{words} {value}"


# Where learning rates of optimizers are looked for. A step of plain SGD is as long as the gradient.
ADAM_RATES, SGD_RATES = (1e-5, 3e-2), (1e-3, 1.0)
ADAM_RATE = 3e-3  # where none is given


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One row of the catalogue, or a combination by hand of what several rows bring.

    `levers` are the strategy's own defaults; those in `fixed` are its idea and cannot be set otherwise by hand. What a
    row says of the value that it brings to an axis holds wherever that value is chosen: `trains` of a trainable set;
    `exact` (the gradient is plain autograd's), `rates` (where `--trials` looks for a learning rate) and `stages` (the
    ZeRO stages where it makes sense, else `why_not`) of a gradient method; `knobs` of any. `searches`: levers, and the
    gradient method, that were not given by hand are searched with the planner (planner/search.py).
    """

    name: str
    idea: str
    source: str
    saved: str
    cost: str
    transform: str = "none"
    trainable: str = "all"
    gradient: str = "backprop"
    levers: Levers = Levers()
    fixed: tuple[str, ...] = ()
    knobs: tuple[Knob, ...] = ()
    trains: Trains = Trains()
    rates: tuple[float, float] = ADAM_RATES
    exact: bool = True
    stages: tuple[int, ...] = (0, 1, 2, 3)
    why_not: str = ""
    searches: bool = False

    def resolve(self, by_hand: Levers) -> Levers:
        """The levers in force: by hand, else the strategy's own, else the defaults.

        Args:
            by_hand: The levers that the user gave; None where one was not given.

        Returns:
            The levers, none of them None.

        Raises:
            ConfigError: If a lever given by hand contradicts the strategy's idea, or levers contradict another.
        """
        faults = []
        for name in self.fixed:
            wanted, given = getattr(self.levers, name), getattr(by_hand, name)
            if given is not None and given != wanted:
                faults.append(
                    f"{flag(name, given)} contradicts the strategy {self.name}, whose idea is {flag(name, wanted)}. "
                    "Leave it out or choose another --strategy."
                )
        merged = DEFAULT_LEVERS
        for layer in (self.levers, by_hand):
            merged = replace(merged, **{k: v for k, v in asdict(layer).items() if v is not None})
        faults += lever_faults(merged)
        if merged.optimizer == "none" and "optimizer" not in self.fixed:
            faults.append(
                f"--optimizer none: nothing would update the weights with --gradient {self.gradient}. Leave it out, or "
                "take a gradient method that updates by itself (mezo, lomo)."
            )
        if merged.zero not in self.stages:
            faults.append(
                f"--zero {merged.zero}: {self.why_not} Take --zero {' or '.join(map(str, self.stages))} with "
                f"{self.name}."
            )
        if self.gradient == "reverse" and merged.activation_checkpointing == "nested":
            faults.append(
                "--activation-checkpointing nested keeps the stream of a DLR-Net, which --gradient reverse rebuilds. "
                "Choose one of them."
            )
        if faults:
            raise ConfigError(faults)
        return merged

    def searched_rates(self, optimizer: str | None) -> tuple[float, float]:
        """Where `--trials` looks for a peak learning rate with an optimizer."""
        return SGD_RATES if optimizer == "SGD" and self.rates == ADAM_RATES else self.rates

    def default_rate(self, optimizer: str | None) -> float:
        """The peak learning rate where none is given: the middle of the rates, in powers of ten, or `ADAM_RATE`."""
        low, high = self.searched_rates(optimizer)
        return ADAM_RATE if (low, high) == ADAM_RATES else float(f"{math.sqrt(low * high):.0e}")

    def resolve_knobs(self, given: dict[str, str]) -> dict[str, float | str]:
        """The strategy's knobs, with those given by `--set`.

        Args:
            given: Values as text, by knob name.

        Returns:
            The value of every knob, by name.

        Raises:
            ConfigError: If a knob is unknown or its value is not allowed.
        """
        knobs, faults = {knob.name: knob for knob in self.knobs}, []
        values = {knob.name: knob.default for knob in self.knobs}
        for name, text in given.items():
            knob = knobs.get(name)
            if knob is None:
                faults.append(f"--set {name}: {self.name} has no such knob. It has: {', '.join(knobs) or 'none'}.")
                continue
            value = knob.read(text)
            if value is None:
                faults.append(f"--set {name}={text}: must be {knob.allowed}.")
                continue
            values[name] = value
        if faults:
            raise ConfigError(faults)
        return values


def lever_faults(levers: Levers) -> list[str]:
    """What contradicts itself among resolved levers, one sentence each."""
    faults = []
    if levers.offload_param and levers.zero != 3:
        faults.append(f"--offload-param needs --zero 3 (only stage 3 partitions parameters), not --zero {levers.zero}.")
    if levers.offload_optimizer and not levers.zero:
        faults.append("--offload-optimizer needs --zero 1, 2 or 3, not --zero 0.")
    if levers.offload_optimizer and levers.optimizer == "none":
        faults.append("--offload-optimizer: there is no optimizer to offload (--optimizer none). Leave it out.")
    if levers.tiles is not None and levers.tiles < 1:
        faults.append(f"--tiles {levers.tiles}: must be at least 1.")
    return faults
