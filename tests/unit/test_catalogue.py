"""The catalogue: strategies, levers, knobs and what is refused."""

import dataclasses

import pytest

from dlrscale import catalogue
from dlrscale.catalogue import Levers
from dlrscale.errors import ConfigError

NAMES = (
    "full", "full-offload", "ckpt-layer", "ckpt-nested", "ckpt-offload", "act-offload", "act-int8", "tile-tokens",
    "reverse", "lora", "lora-attn", "flatten", "undistil", "drop-blocks", "norms", "last-k",
    "head", "ladder", "mezo", "mezo-lora", "lomo", "best-memory", "lora-mlp",
)  # fmt: skip


def levers_of(name, **by_hand):
    """(ZeRO stage, optimizer offloaded, parameters offloaded, checkpointing, storage, tiles, optimizer)"""
    return dataclasses.astuple(catalogue.strategy(name).resolve(Levers(**by_hand)))


def test_the_strategies_and_their_defaults():
    assert tuple(catalogue.STRATEGIES) == NAMES
    rest = ("device", 1, "AdamW")
    assert levers_of("full") == (2, False, False, "none", *rest)
    assert levers_of("full-offload") == (3, True, True, "none", *rest)
    for name in ("ckpt-layer", "reverse", "lora", "lora-attn", "flatten", "undistil", "drop-blocks"):
        assert levers_of(name) == (2, False, False, "layer", *rest)
    assert levers_of("ckpt-nested")[3:] == ("nested", *rest)
    assert levers_of("ckpt-offload")[3:] == ("layer", "host", 1, "AdamW")
    assert levers_of("act-offload")[3:] == ("none", "host", 1, "AdamW")
    assert levers_of("act-int8")[3:] == ("none", "int8", 1, "AdamW")
    assert levers_of("tile-tokens")[3:] == ("layer", "device", 8, "AdamW")
    for name in ("mezo", "mezo-lora"):
        assert levers_of(name) == (0, False, False, "none", "device", 1, "none")
    assert levers_of("lomo") == (0, False, False, "layer", "device", 1, "none")


def test_the_other_axes():
    rows = {n: (s.transform, s.trainable, s.gradient) for n, s in catalogue.STRATEGIES.items()}
    for name in ("full", "full-offload", "ckpt-layer", "ckpt-nested", "ckpt-offload", "act-offload", "tile-tokens"):
        assert rows[name] == ("none", "all", "backprop")
    assert rows["reverse"] == ("none", "all", "reverse")
    assert rows["lora"] == ("none", "lora", "backprop")
    assert rows["lora-attn"] == ("none", "lora-attn", "backprop")
    for name in ("flatten", "undistil", "drop-blocks"):
        assert rows[name] == (name, "all", "backprop")
    assert [rows[n] for n in ("mezo", "mezo-lora", "lomo")] == [
        ("none", "all", "mezo"), ("none", "lora", "mezo"), ("none", "all", "lomo")
    ]  # fmt: skip


def test_axes_by_hand_bring_their_knobs_and_fixed_levers():
    mixed = catalogue.combined("reverse", transform="flatten", trainable="lora")
    assert (mixed.name, mixed.transform, mixed.trainable, mixed.gradient) == ("reverse", "flatten", "lora", "reverse")
    assert [k.name for k in mixed.knobs] == ["group", "rank", "alpha", "dropout", "anchor"]
    assert mixed.trains == catalogue.strategy("lora").trains
    plain = catalogue.combined("lora", trainable="all")
    assert plain.knobs == ()
    assert plain.trains == catalogue.Trains()
    assert catalogue.combined("lora") == catalogue.strategy("lora")
    with pytest.raises(ConfigError, match="--trainable lara: unknown. Did you mean lora"):
        catalogue.combined("full", trainable="lara")


def test_a_gradient_method_that_updates_by_itself_brings_its_levers_and_stage():
    mixed = catalogue.combined("lora", gradient="mezo")
    assert mixed.resolve(Levers()) == catalogue.strategy("mezo-lora").resolve(Levers())
    assert {k.name for k in mixed.knobs} == {k.name for k in catalogue.combined("mezo-lora").knobs}
    assert (mixed.exact, catalogue.strategy("lomo").exact) == (False, True)
    for by_hand, words in (
        ({"zero": 2}, "--zero 2: stages 1 and 2 cut gradients"),
        ({"optimizer": "SGD"}, "--optimizer SGD contradicts the strategy mezo"),
        ({"activation_checkpointing": "layer"}, "--activation-checkpointing layer contradicts the strategy mezo"),
        ({"zero": 3, "offload_optimizer": True}, "there is no optimizer to offload"),
    ):
        with pytest.raises(ConfigError, match=words):
            catalogue.strategy("mezo").resolve(Levers(**by_hand))
    with pytest.raises(ConfigError, match="--optimizer none: nothing would update the weights"):
        catalogue.strategy("full").resolve(Levers(optimizer="none"))


def test_every_row_says_what_it_is():
    for entry in catalogue.STRATEGIES.values():
        assert all((entry.idea, entry.source, entry.saved, entry.cost)), entry.name


def test_levers_by_hand_win():
    assert levers_of("ckpt-layer", zero=3, offload_optimizer=True) == (3, True, False, "layer", "device", 1, "AdamW")
    assert levers_of("full", activation_checkpointing="layer") == (2, False, False, "layer", "device", 1, "AdamW")
    assert levers_of("full-offload", offload_param=False, zero=1)[:4] == (1, True, False, "none")


def test_full_with_layer_checkpointing_is_ckpt_layer():
    full, stock = catalogue.strategy("full"), catalogue.strategy("ckpt-layer")
    by_hand = full.resolve(Levers(activation_checkpointing="layer"))
    assert catalogue.axes(full, by_hand, {}) == catalogue.axes(stock, stock.resolve(Levers()), {})
    assert catalogue.axes(full, full.resolve(Levers()), {}) != catalogue.axes(stock, stock.resolve(Levers()), {})


@pytest.mark.parametrize(
    ("name", "by_hand", "parts"),
    [
        (
            "ckpt-layer",
            {"activation_checkpointing": "none"},
            ("--activation-checkpointing none", "ckpt-layer", "layer"),
        ),
        ("full-offload", {"offload_optimizer": False}, ("--no-offload-optimizer", "full-offload")),
        ("full", {"zero": 2, "offload_param": True}, ("--offload-param needs --zero 3", "--zero 2")),
        (
            "lora",
            {"zero": 0, "offload_optimizer": True},
            ("--offload-optimizer needs --zero 1, 2 or 3", "--zero 0"),
        ),
        ("full-offload", {"zero": 2}, ("--offload-param needs --zero 3",)),
    ],
)
def test_contradictory_levers_are_refused(name, by_hand, parts):
    with pytest.raises(ConfigError) as error:
        catalogue.strategy(name).resolve(Levers(**by_hand))
    assert len(error.value.faults) == 1
    assert all(part in str(error.value) for part in parts)


def test_all_faults_of_levers_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        catalogue.strategy("ckpt-layer").resolve(
            Levers(zero=0, offload_optimizer=True, offload_param=True, activation_checkpointing="none")
        )
    assert len(error.value.faults) == 3


def test_knobs():
    lora = catalogue.strategy("lora")
    assert lora.resolve_knobs({}) == {"rank": 8, "alpha": 16, "dropout": 0.0}
    found = lora.resolve_knobs({"rank": "4", "dropout": "0.1"})
    assert found == {"rank": 4, "alpha": 16, "dropout": 0.1}
    assert isinstance(found["rank"], int)


@pytest.mark.parametrize(
    ("name", "given", "parts"),
    [
        ("lora", {"rnk": "4"}, ("--set rnk", "lora", "rank, alpha, dropout")),
        ("lora", {"rank": "4.5"}, ("--set rank=4.5", "whole number from 1 to")),
        ("lora", {"dropout": "much"}, ("--set dropout=much", "a number from 0.0 to 0.99")),
        ("full", {"rank": "4"}, ("--set rank", "full", "none")),
    ],
)
def test_bad_knobs_are_refused(name, given, parts):
    with pytest.raises(ConfigError) as error:
        catalogue.strategy(name).resolve_knobs(given)
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize("knob", [{"rank": "0"}, {"rank": "-1"}, {"dropout": "nan"}, {"dropout": "1.5"}])
def test_knobs_out_of_range_are_refused(knob):
    with pytest.raises(ConfigError, match="--set"):
        catalogue.strategy("lora").resolve_knobs(knob)


def test_unknown_strategy_names_a_near_one():
    with pytest.raises(ConfigError) as error:
        catalogue.strategy("ckpt-layr")
    assert all(part in str(error.value) for part in ("ckpt-layr", "Did you mean ckpt-layer?", *NAMES))
    with pytest.raises(ConfigError) as error:
        catalogue.strategy("zzz")
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize("name", ["lomo", "mezo", "mezo-lora"])
def test_a_replaced_gradient_method_takes_its_levers_with_it(name):
    """Plain backpropagation in the place of a method without an optimizer has one, at every stage."""
    mixed = catalogue.combined(name, gradient="backprop")
    levers = mixed.resolve(Levers())
    assert (levers.optimizer, levers.activation_checkpointing, levers.zero) == ("AdamW", "layer", 2)
    assert mixed.stages == (0, 1, 2, 3)
    assert mixed.rates == catalogue.strategy("full").rates
    assert not {"eps", "clip"} & {knob.name for knob in mixed.knobs}


def test_eight_bits_are_not_exact():
    entry = catalogue.strategy("act-int8")
    assert not catalogue.is_exact(entry, "int8")
    assert catalogue.is_exact(entry, "device")
    assert not catalogue.is_exact(catalogue.strategy("mezo"), "device")


@pytest.mark.parametrize(
    ("name", "optimizer", "rate", "searched"),
    [("lora", "AdamW", 3e-3, (1e-5, 3e-2)), ("lora", "SGD", 3e-2, (1e-3, 1.0)), ("lomo", "none", 3e-2, (1e-3, 1.0)),
     ("mezo", "none", 3e-5, (1e-7, 1e-2))],
)  # fmt: skip
def test_rates_are_those_of_what_updates(name, optimizer, rate, searched):
    entry = catalogue.strategy(name)
    assert (entry.default_rate(optimizer), entry.searched_rates(optimizer)) == (rate, searched)


@pytest.mark.parametrize(("name", "lever"), [("act-int8", "--activation-storage int8"), ("ckpt-layer", "layer")])
def test_a_method_that_contradicts_the_strategys_idea_is_refused(name, lever):
    with pytest.raises(ConfigError, match=f"--gradient mezo needs .*{lever}.* such as mezo"):
        catalogue.combined(name, gradient="mezo")
