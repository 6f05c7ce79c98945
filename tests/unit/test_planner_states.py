"""Model states by hand: each number below is worked out on paper, not by the code."""

import time

import pytest

from dlrscale.engine import lever_config
from dlrscale.errors import ConfigError
from dlrscale.planner.states import ALWAYS, BACKWARD, STEP, Term, Weight, model_states, optimizer_of

# Llama-2-7B: embedding, 32 layers of four 4096^2, three 4096 x 11008 and two norms, norm, head.
LLAMA_7B = [
    Weight(numel=32000 * 4096, trained=True),
    *[w for _ in range(32) for w in (
        Weight(numel=4096 * 4096, trained=True, count=4),
        Weight(numel=4096 * 11008, trained=True, count=3),
        Weight(numel=4096, trained=True, count=2),
    )],
    Weight(numel=4096, trained=True),
    Weight(numel=32000 * 4096, trained=True),
]  # fmt: skip
PARAMETERS_7B = 6_738_415_616


def config(zero, offload_optimizer=False, offload_param=False, accumulation=1, **section):
    merged = lever_config(zero, offload_optimizer, offload_param) | {"gradient_accumulation_steps": accumulation}
    merged["zero_optimization"] |= section
    return merged


def test_7b_has_its_published_count():
    assert sum(w.numel * w.count for w in LLAMA_7B) == PARAMETERS_7B


def test_7b_at_stage_3_on_8_ranks():
    """Every tensor divides by 8: no padding. 65 norms of 4096 lie below the threshold of 100000 and stay whole."""
    terms = model_states(LLAMA_7B, config(3), 8, "bf16")
    share = PARAMETERS_7B // 8  # 842,301,952
    assert terms["parameters"] == Term(device=2 * share)
    assert terms["persistent"] == Term(device=2 * 65 * 4096)
    assert terms["gradients"] == Term(device=2 * share)
    assert terms["master"] == Term(device=4 * share)
    assert terms["optimizer"] == Term(device=8 * share, host=4)  # one group below 1e9 elements: one count of steps
    assert terms["buckets"] == Term(device=1_000_000_000)
    held = [terms[name].device for name in ("parameters", "gradients", "master", "optimizer", "persistent")]
    assert held == [1_684_603_904, 1_684_603_904, 3_369_207_808, 6_738_415_616, 532_480]  # docs/memory-model.md
    # 1e9 live elements and the tensor that passes them; beside them 5e7 elements of prefetch and the same tensor.
    largest = 32000 * 4096
    assert terms["gathered"].device == 2 * (1_000_000_000 + largest + 50_000_000 + largest)


def test_7b_at_stage_3_with_everything_offloaded():
    terms = model_states(LLAMA_7B, config(3, True, True), 8, "bf16")
    share = PARAMETERS_7B // 8
    assert terms["parameters"] == Term(host=2 * share)
    assert terms["gradients"] == Term(host=2 * share + 4 * share)  # those added up, and their fp32 copy for the step
    assert terms["master"] == Term(host=4 * share)
    assert terms["optimizer"] == Term(host=8 * share)  # DeepSpeed's CPU Adam counts its steps in a Python number
    assert sum(terms[k].host for k in ("parameters", "gradients", "master", "optimizer")) == 20 * share


def test_7b_whole_on_every_rank():
    terms = model_states(LLAMA_7B, config(0), 8, "bf16")
    held = sum(terms[k].device for k in ("parameters", "gradients", "master", "optimizer"))
    assert held == 16 * PARAMETERS_7B
    assert terms["optimizer"].host == 4 * 291  # one count of steps for each of 291 tensors
    assert terms["step"].device == (4 + 4) * PARAMETERS_7B  # fp32 gradients, and the workspace of a step over lists


def test_padding_and_whole_gradients_by_hand():
    """Tensors of 5, 4 and 1, three ranks: T = 10, padded to a multiple of 6: P = 12, parts of 4.

    Part 0 (0-3) touches the 5: 5. Part 1 (4-7) touches the 5 and the 4: 9. Part 2 (8-11) touches the 4 and the 1: 5,
    and has 2 elements of zeros. So the second rank holds most: 9.
    """
    weights = [Weight(numel=n, trained=True) for n in (5, 4, 1)] + [Weight(numel=7, trained=False)]
    for zero in (1, 2):
        terms = model_states(weights, config(zero, reduce_bucket_size=6), 3, "bf16")
        assert terms["parameters"].device == 2 * (12 + 7)
        assert terms["gradients"] == Term(device=2 * 9, during=(BACKWARD, STEP))
        assert terms["master"].device == 4 * 4
        assert terms["optimizer"] == Term(device=8 * 4, host=4)
        assert terms["buckets"] == Term(device=2 * 6, during=(BACKWARD,))
    cut = model_states(weights, config(3), 3, "bf16")  # shares of 2, 2, 1, and 3 frozen
    held = [cut[name].device for name in ("parameters", "gradients", "master", "optimizer")]
    assert held == [16, 10, 20, 40]
    twice = model_states(weights, config(2, reduce_bucket_size=6, overlap_comm=True), 3, "bf16")
    assert twice["buckets"].device == 2 * 2 * 6


def test_a_rank_whose_part_is_padding_alone_holds_zeros():
    """One element on four ranks: P = 8, parts of 2; the first holds 1 gradient and 1 zero, the others 2 zeros."""
    terms = model_states([Weight(numel=1, trained=True)], config(2), 4, "fp32")
    assert terms["gradients"].device == 4 * 2
    assert terms["parameters"].device == 4 * 8


def test_stage_1_backward_holds_all_gradients_less_the_first_bucket():
    """Tensors of 5, 4 and 1 on three ranks, a bucket of 6: the first takes the 5 before it is full."""
    weights = [Weight(numel=n, trained=True) for n in (5, 4, 1)]
    terms = model_states(weights, config(1, reduce_bucket_size=6, reduce_scatter=False), 3, "bf16")
    assert terms["backward"].device == 2 * (10 - 5)
    assert terms["gradients"].device + terms["backward"].device == 2 * (10 - 5 + 9)


def test_offloaded_states_by_hand():
    """Tensors of 5, 4 and 1 on three ranks, parts of 4; the largest tensor, 5, is staged on both sides."""
    weights = [Weight(numel=n, trained=True) for n in (5, 4, 1)]
    terms = model_states(weights, config(2, True), 3, "bf16")
    assert terms["gradients"] == Term(host=4 * 4)
    assert terms["master"] == Term(host=4 * 4)
    assert terms["offload"] == Term(device=2 * 5, host=2 * (4 + 5))
    added = model_states(weights, config(2, True, accumulation=2), 3, "bf16")
    assert added["offload"].host == 2 * (4 + 5 + 9)


def test_masters_of_16_bits_on_the_host():
    """Parts of 4 as above: masters, gradients and, if asked for, moments take half; moments alone cannot."""
    weights = [Weight(numel=n, trained=True) for n in (5, 4, 1)]
    halved = config(2, True) | {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
    terms = model_states(weights, halved, 3, "bf16")
    assert [terms[k].host for k in ("gradients", "master", "optimizer")] == [2 * 4, 2 * 4, 8 * 4]
    halved["bf16"]["bf16_optimizer_states"] = True
    assert model_states(weights, halved, 3, "bf16")["optimizer"].host == 4 * 4
    whole = config(2, True)
    whole["optimizer"]["params"]["fp32_optimizer_states"] = False  # "as the masters", which are fp32
    assert model_states(weights, whole, 3, "bf16")["optimizer"].host == 8 * 4


def test_nothing_trained_costs_nothing_but_its_weights():
    for zero in range(4):
        terms = model_states([Weight(numel=8, trained=False)], config(zero, reduce_bucket_size=1), 2, "bf16")
        held = {k: t.device for k, t in terms.items() if t.device and k not in ("buckets", "gathered", "persistent")}
        assert held == {"parameters": 8 if zero == 3 else 16}


def test_stage_3_pads_each_tensor_and_keeps_small_ones():
    """Two ranks: 5 -> 3, 4 -> 2, 1 -> 1, so 6 trained; frozen 7 -> 4. Up to 4 elements: the 4 and the 1 (padded 2)."""
    weights = [Weight(numel=n, trained=True) for n in (5, 4, 1)] + [Weight(numel=7, trained=False)]
    terms = model_states(weights, config(3, stage3_param_persistence_threshold=4), 2, "bf16")
    assert terms["parameters"].device == 2 * (6 + 4)
    assert terms["persistent"].device == 2 * (4 + 2)
    assert terms["gradients"].device == 2 * 6
    assert terms["master"].device == 4 * 6
    # Not all fits below the limits here: both the 5 (padded 6) and the 7 (padded 8) may be whole, and in a flat buffer.
    assert terms["gathered"].device == 2 * (14 + 14)
    alone = model_states(weights, config(3), 1, "bf16")
    assert alone["persistent"].device == alone["gathered"].device == 0  # the share is the whole


def test_groups_of_a_step_at_stage_3():
    """Two ranks, shares 3, 2, 2, 2, 1 in groups that close at 4: (3, 2), (2, 2), (1): three counts of steps."""
    weights = [
        Weight(numel=5, trained=True), Weight(numel=4, trained=True, count=3), Weight(numel=1, trained=True),
    ]  # fmt: skip
    terms = model_states(weights, config(3, sub_group_size=4), 2, "fp32")
    assert terms["optimizer"] == Term(device=8 * 10, host=4 * 3)
    assert terms["step"].device == max(8 * 3, 4 * 5 + 4 * 5)  # the norm of one share, or a group's copy and workspace
    halved = config(3, True, sub_group_size=4)
    halved["zero_optimization"]["offload_optimizer"]["ratio"] = 0.5
    half = model_states(weights, halved, 2, "fp32")  # of three groups, int(1.5) = 1 stays on the device: 5 elements
    assert half["master"] == Term(device=4 * 5, host=4 * 5)
    assert half["optimizer"] == Term(device=8 * 5, host=8 * 5)


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("ranks", [1, 2, 7, 64])
def test_equal_tensors_count_as_they_would_one_by_one(zero, ranks):
    runs = [Weight(numel=7, trained=True, count=5), Weight(numel=30, trained=False, count=2)]
    runs += [Weight(numel=11, trained=True, count=9), Weight(numel=1, trained=True, count=3)]
    single = [Weight(numel=w.numel, trained=w.trained) for w in runs for _ in range(w.count)]
    small = {"stage3_param_persistence_threshold": 7, "sub_group_size": 9} if zero == 3 else {}
    merged = config(zero, reduce_bucket_size=20, accumulation=2, **small)
    assert model_states(runs, merged, ranks, "bf16") == model_states(single, merged, ranks, "bf16")


def test_what_stays_between_micro_batches():
    weights = [Weight(numel=8, trained=True)]
    assert model_states(weights, config(2), 2, "bf16")["gradients"].during == (BACKWARD, STEP)
    assert model_states(weights, config(2, accumulation=2), 2, "bf16")["gradients"].during == ALWAYS
    assert model_states(weights, config(3), 2, "bf16")["gradients"].during == ALWAYS


def test_optimizers():
    def kept(kind, offload=False, **params):
        found = optimizer_of({"optimizer": {"type": kind, "params": params}}, offload)
        return found.moments, found.counts

    assert kept("AdamW", torch_adam=True) == (2, True)
    assert kept("AdamW", torch_adam=True, amsgrad=True) == (3, True)
    assert kept("Adam") == (2, False)
    assert kept("SGD") == (0, False)
    assert kept("SGD", momentum=0.9) == (1, False)
    assert kept("Adagrad") == (1, True)
    assert kept("Adagrad", offload=True) == (1, False)
    assert kept("Lion") == (1, False)
    assert kept("Lion", offload=True) == (2, False)
    assert kept("RMSprop", centered=True, momentum=0.5) == (3, True)
    assert kept("Adafactor") == (1, True)
    with pytest.raises(ConfigError, match="Muon: the memory of its states is not known"):
        kept("Muon")


def test_adafactor_factors_whole_matrices_alone():
    """A matrix of 4 x 3 and a vector of 5: 7 + 5 numbers where they are whole, 17 in flat shares."""
    weights = [Weight(numel=12, trained=True), Weight(numel=5, trained=True)]
    for zero, kept in ((0, 12), (1, 10), (2, 10), (3, 6 + 3)):  # 17 padded to a multiple of 4: 20 / 2
        merged = config(zero) | {"optimizer": {"type": "Adafactor", "params": {}}}
        terms = model_states(weights, merged, 2, "fp32", factored=7 + 5)
        assert terms["optimizer"] == Term(device=4 * kept, host=4 * (2 if zero == 0 else 1))


def test_deepspeeds_own_estimate_where_it_counts_the_same():
    """`estimate_zero3_model_states_mem_needs` of 7B on 8 ranks, without the layer in use and its factor for buffers.

    It says 18 bytes a parameter: 2 + 4 + 8, and 4 for the gradient in fp32, which we have in `step`. Where the
    optimizer is offloaded it says 16 on the host, with the parameters 18: it leaves out that DeepSpeed keeps the
    gradient there twice, in bf16 too.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    def theirs(**offload):
        host, device, layer = estimate_zero3_model_states_mem_needs(
            PARAMETERS_7B, 4096 * 11008, 8, 1, additional_buffer_factor=1, **offload
        )
        return device - layer, host

    share = PARAMETERS_7B // 8
    whole = model_states(LLAMA_7B, config(3), 8, "bf16")
    states = sum(whole[k].device for k in ("parameters", "master", "optimizer"))
    assert states + 4 * share == theirs(cpu_offload=False, cpu_offload_params=False)[0]
    for offload_param in (False, True):
        terms = model_states(LLAMA_7B, config(3, True, offload_param), 8, "bf16")
        device, host = theirs(cpu_offload=True, cpu_offload_params=offload_param)
        assert terms["parameters"].device == device
        assert 8 * (sum(term.host for name, term in terms.items() if name != "step") - 2 * share) == host


def test_405b_takes_milliseconds():
    layer = [
        Weight(numel=16384**2, trained=True), Weight(numel=1024 * 16384, trained=True, count=2),
        Weight(numel=16384**2, trained=True), Weight(numel=53248 * 16384, trained=True, count=3),
        Weight(numel=16384, trained=True, count=2),
    ]  # fmt: skip
    weights = [Weight(numel=128256 * 16384, trained=True), *(layer * 126), Weight(numel=128256 * 16384, trained=True)]
    for zero in range(4):
        merged = config(zero)
        start = time.perf_counter()
        model_states(weights, merged, 512, "bf16")
        assert time.perf_counter() - start < 0.05  # about 3 ms on an idle machine
