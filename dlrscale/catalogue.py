"""The catalogue of attacker strategies: a strategy is a named choice on four axes, never a loop of its own.

The axes are the transform of the locked model, the trainable set, the gradient method and the memory levers.
`attacks/` holds one file per idea, found by the names that stand here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

from dlrscale.errors import ConfigError

TRANSFORMS = {"none": "the model as it is", "flatten": "each DLR-Net becomes one ordinary MLP, for nothing"}
TRAINABLE = {
    "all": "all parameters",
    "lora": "LoRA on all linear maps, the factors of the DLR-Nets among them",
    "lora-attn": "LoRA on the attention's linear maps; DLR-Nets frozen",
}
GRADIENTS = {"backprop": "plain backpropagation"}
CHECKPOINTING = {
    "none": "keep all activations",
    "layer": "keep each layer's input, run it again going backward",
}


@dataclass(frozen=True, kw_only=True)
class Levers:
    """The memory levers. None means: not chosen by hand, the strategy's default holds."""

    zero: int | None = None
    offload_optimizer: bool | None = None
    offload_param: bool | None = None
    activation_checkpointing: str | None = None


DEFAULT_LEVERS = Levers(zero=2, offload_optimizer=False, offload_param=False, activation_checkpointing="layer")


@dataclass(frozen=True, kw_only=True)
class Knob:
    """A number of a strategy's own, set by `--set name=value`, from `low` to `high`."""

    name: str
    default: float
    low: float
    high: float
    text: str


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


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One row of the catalogue.

    `levers` are the strategy's own defaults; those in `fixed` are its idea and cannot be set otherwise by hand.
    `exact` says whether its gradient is that of plain autograd on its trainable set.
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
    exact: bool = True

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
        if faults:
            raise ConfigError(faults)
        return merged

    def resolve_knobs(self, given: dict[str, str]) -> dict[str, float]:
        """The strategy's knobs, with those given by `--set`.

        Args:
            given: Values as text, by knob name.

        Returns:
            The value of every knob, by name.

        Raises:
            ConfigError: If a knob is unknown or its value is no number.
        """
        knobs, faults = {knob.name: knob for knob in self.knobs}, []
        values = {knob.name: knob.default for knob in self.knobs}
        for name, text in given.items():
            knob = knobs.get(name)
            if knob is None:
                faults.append(f"--set {name}: {self.name} has no such knob. It has: {', '.join(knobs) or 'none'}.")
                continue
            try:
                value = type(knob.default)(text)
            except ValueError:
                value = None
            if value is None or not knob.low <= value <= knob.high:
                kind = "whole number" if isinstance(knob.default, int) else "number"
                faults.append(f"--set {name}={text}: must be a {kind} from {knob.low} to {knob.high}.")
                continue
            values[name] = value
        if faults:
            raise ConfigError(faults)
        return values


_LORA_KNOBS = (
    Knob(name="rank", default=8, low=1, high=65536, text="rank of the adapters"),
    Knob(name="alpha", default=16, low=1, high=65536, text="scale of the adapters, alpha / rank"),
    Knob(name="dropout", default=0.0, low=0.0, high=0.99, text="dropout on the adapters' input"),
)

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(
            name="full",
            idea="all parameters, AdamW, plain autograd: the reference for claim C1",
            source="reference",
            saved="all activations: N layers of K D + 4 sum(R) (gated) against D + 4 F per token, and the rest",
            cost="1 forward, 1 backward",
            levers=Levers(activation_checkpointing="none"),
        ),
        Strategy(
            name="full-offload",
            idea="full, with optimizer states and parameters offloaded to host memory",
            source="ZeRO-Offload, arXiv 2101.06840; ZeRO-Infinity, arXiv 2104.07857",
            saved="as full",
            cost="as full, and the copies between host and device",
            levers=Levers(zero=3, offload_optimizer=True, offload_param=True, activation_checkpointing="none"),
            fixed=("offload_optimizer",),
        ),
        Strategy(
            name="ckpt-layer",
            idea="full, with activation checkpointing per transformer layer: the stock attacker",
            source="Chen et al., arXiv 1604.06174",
            saved="each layer's input, D per token; one layer's activations at a time going backward",
            cost="2 forwards, 1 backward",
            fixed=("activation_checkpointing",),
            levers=Levers(activation_checkpointing="layer"),
        ),
        Strategy(
            name="lora",
            idea="low-rank adapters on all linear maps, the DLR factors too; checkpointed per layer",
            source="Hu et al., arXiv 2106.09685",
            saved="as ckpt-layer",
            cost="2 forwards, 1 backward without most weight gradients",
            trainable="lora",
            knobs=_LORA_KNOBS,
        ),
        Strategy(
            name="lora-attn",
            idea="low-rank adapters on the attention only, DLR-Nets frozen; checkpointed per layer",
            source="Hu et al., arXiv 2106.09685",
            saved="as ckpt-layer; inside a layer a frozen DLR-Net saves 3 sum(R) (gated)",
            cost="2 forwards, 1 backward without most weight gradients",
            trainable="lora-attn",
            knobs=_LORA_KNOBS,
        ),
        Strategy(
            name="flatten",
            idea="let every block read the same input, which makes each DLR-Net one ordinary MLP; then ckpt-layer",
            source="ours; FFN Fusion, arXiv 2503.18908, as a relative",
            saved="as ckpt-layer on the base model",
            cost="no training for the transform, then as ckpt-layer",
            transform="flatten",
        ),
    )
}


# A lock is no strategy, but has levers as they have: it keeps all activations of the one DLR-Net that it visits.
LOCK = Strategy(name="lock", idea="", source="", saved="", cost="", levers=Levers(activation_checkpointing="none"))


def lever_faults(levers: Levers) -> list[str]:
    """What contradicts itself among resolved levers, one sentence each."""
    faults = []
    if levers.offload_param and levers.zero != 3:
        faults.append(f"--offload-param needs --zero 3 (only stage 3 partitions parameters), not --zero {levers.zero}.")
    if levers.offload_optimizer and not levers.zero:
        faults.append("--offload-optimizer needs --zero 1, 2 or 3, not --zero 0.")
    return faults


def strategy(name: str) -> Strategy:
    """The row of a name.

    Args:
        name: The strategy's name, as `--strategy` takes it.

    Returns:
        The strategy.

    Raises:
        ConfigError: If there is none; near names are offered.
    """
    import difflib

    if name in STRATEGIES:
        return STRATEGIES[name]
    near = difflib.get_close_matches(name, STRATEGIES, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"--strategy {name}: unknown.{hint} There are: {', '.join(STRATEGIES)}.")


def axes(entry: Strategy, levers: Levers, knobs: dict[str, float]) -> dict[str, object]:
    """The resolved choice on the four axes, as the record holds it; this, not the name, identifies a run."""
    return {
        "transform": entry.transform,
        "trainable": entry.trainable,
        "gradient": entry.gradient,
        "levers": {f.name: getattr(levers, f.name) for f in fields(levers)},
        "knobs": dict(knobs),
    }
