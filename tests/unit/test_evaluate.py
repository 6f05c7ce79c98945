"""Held-out loss: sum of nats over sum of label tokens, whatever the batch and the ranks."""

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlrscale import data, evaluate
from dlrscale.errors import ConfigError

SHARED = Path(__file__).resolve().parents[3] / "shared"
STORIES = SHARED / "data" / "models" / "stories260K"
VOCABULARY = 11


def reference(logits, labels):
    """Sum of -log softmax in plain Python floats, and the number of terms."""
    total, count = 0.0, 0
    for scores, targets in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for row, target in zip(scores[:-1], targets[1:], strict=True):
            if target != -100:
                total += math.log(sum(map(math.exp, row))) - row[target]
                count += 1
    return total, count


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, VOCABULARY, generator=generator)
    labels = torch.randint(0, VOCABULARY, (3, 6), generator=generator)
    labels[0, :3] = -100
    labels[2] = -100
    return logits, labels


@pytest.mark.parametrize("chunk", [1, 2 * VOCABULARY, 1 << 25])
def test_cross_entropy_sum(case, chunk, monkeypatch):
    monkeypatch.setattr(evaluate, "_CHUNK_ELEMENTS", chunk)
    logits, labels = case
    nats, count = evaluate.cross_entropy_sum(logits, labels)
    expected, terms = reference(logits, labels)
    assert (count, terms) == (8, 8)
    assert nats.dtype == torch.float32
    assert nats.item() == pytest.approx(expected, rel=1e-6)


def test_uniform_logits_give_the_logarithm_of_the_vocabulary():
    nats, count = evaluate.cross_entropy_sum(torch.zeros(2, 5, 512), torch.ones(2, 5, dtype=torch.long))
    assert count == 8
    assert nats.item() == pytest.approx(8 * math.log(512), rel=1e-6)


def test_half_precision_is_summed_in_float32(case):
    logits, labels = case[0].bfloat16(), case[1]
    nats, _ = evaluate.cross_entropy_sum(logits, labels)
    assert nats.item() == pytest.approx(reference(logits, labels)[0], rel=1e-6)


def test_no_label_gives_zero_and_a_zero_gradient(case):
    logits, labels = case[0].clone().requires_grad_(), torch.full_like(case[1], -100)
    nats, count = evaluate.cross_entropy_sum(logits, labels)
    nats.backward()
    assert (nats.item(), count) == (0.0, 0)
    assert not logits.grad.any()


def test_gradient_is_that_of_the_plain_sum(case):
    logits, labels = case[0].clone().requires_grad_(), case[1]
    evaluate.cross_entropy_sum(logits, labels)[0].backward()
    plain = case[0].clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        plain[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), reduction="sum"
    )
    loss.backward()
    assert torch.allclose(logits.grad, plain.grad, atol=1e-7)


def over_ranks(forward, loaded, batch, world, pad=0):
    """Every rank in turn; the last one's `reduce` adds what the others left."""
    partial = []
    for rank in range(world):

        def reduce(sums, last=rank == world - 1):
            partial.append(sums.clone())
            assert sums.dtype == torch.float64
            return sum(partial) if last else torch.ones(2, dtype=torch.float64)

        result = evaluate.heldout_loss(
            forward, loaded, batch=batch, rank=rank, world_size=world, pad_id=pad, device="cpu", reduce=reduce
        )
    return result


def unequal(count=7):
    generator = np.random.default_rng(0)
    lengths = np.linspace(5, 40, count).astype(int)
    ids = [generator.integers(3, VOCABULARY, n) for n in lengths]
    return data.token_data(ids, ids, packed=False, counts={})


def test_the_loss_does_not_depend_on_batch_and_ranks():
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))

    def forward(input_ids, attention_mask):
        assert not torch.is_grad_enabled()
        assert input_ids.shape == attention_mask.shape
        return table[input_ids]

    loaded = unequal()
    terms = [reference(table[torch.from_numpy(x)][None], torch.from_numpy(x)[None]) for x in loaded.input_ids]
    expected = sum(t for t, _ in terms) / sum(n for _, n in terms)
    for world in (1, 2):
        for batch in (1, 2, 3, 7):
            result = over_ranks(forward, loaded, batch, world)
            assert result["label_tokens"] == sum(len(x) - 1 for x in loaded.input_ids)
            assert result["loss"] == pytest.approx(expected, rel=1e-6)
    alone = evaluate.heldout_loss(forward, loaded, batch=3, rank=0, world_size=1, pad_id=0, device="cpu", reduce=None)
    assert alone["loss"] == pytest.approx(expected, rel=1e-6)


def test_no_label_is_refused():
    ids = [np.array([3, 4])]
    empty = data.token_data(ids, [np.array([-100, -100])], packed=False, counts={})
    with pytest.raises(ConfigError, match="no label"):
        evaluate.heldout_loss(
            lambda i, _: torch.zeros(*i.shape, VOCABULARY),
            empty, batch=1, rank=0, world_size=1, pad_id=0, device="cpu",
        )  # fmt: skip


@pytest.fixture(scope="module")
def stories():
    if not STORIES.is_dir():
        pytest.skip("needs the shared model stories260K")
    model = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    return AutoTokenizer.from_pretrained(STORIES), lambda i, a: model(input_ids=i, attention_mask=a).logits


def test_padding_does_not_change_a_real_model(stories):
    tokenizer, forward = stories
    texts = ["Once upon a time", "The dog ran to the big red house and sat down.", "Tim was sad. He cried."]
    ids = [np.array(tokenizer(t).input_ids) for t in texts]
    loaded = data.token_data(ids, ids, packed=False, counts={})
    losses = [over_ranks(forward, loaded, b, w, pad=2)["loss"] for b in (1, 3) for w in (1, 2)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_records_do_not_see_each_other(stories):
    """C13: three records of 5, 7 and 4 tokens cost the same together in a batch as one by one."""
    tokenizer, forward = stories
    whole = tokenizer("Once upon a time there was a big dog who ran to the red house.").input_ids
    ids = [np.array([1, *whole[a:b]]) for a, b in ((1, 5), (5, 11), (11, 14))]
    assert [len(x) for x in ids] == [5, 7, 4]
    loaded = data.token_data(ids, [np.where(np.arange(len(x)) < 2, -100, x) for x in ids], packed=False, counts={})
    alone = [over_ranks(forward, loaded.subset([i]), 1, 1) for i in range(3)]
    nats = sum(x["loss"] * x["label_tokens"] for x in alone)
    together = over_ranks(forward, loaded, 3, 1, pad=2)
    assert together["loss"] * together["label_tokens"] == pytest.approx(nats, rel=1e-6)


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(8, 1, 1), (4, 2, 1), (1, 8, 1), (4, 1, 2), (1, 4, 2)])
def test_the_training_loss_does_not_depend_on_the_layout(micro, accumulation, world):
    """C08: the sum of nats of a step's micro-batches over its label tokens, whatever the split."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))
    loaded = unequal(8)
    terms = [reference(table[torch.from_numpy(x)][None], torch.from_numpy(x)[None])[0] for x in loaded.input_ids]
    nats, labels = 0.0, set()
    for rank in range(world):
        plan = data.Batches(
            loaded, seed=0, micro_batch=micro, accumulation=accumulation, rank=rank, world_size=world, pad_id=0
        )
        step = plan.step(0)
        labels.add(step.label_tokens)
        for inputs in step.micro_batches:
            nats += evaluate.cross_entropy_sum(table[inputs["input_ids"]], inputs["labels"])[0].item()
    assert labels == {sum(len(x) - 1 for x in loaded.input_ids)}
    assert nats == pytest.approx(sum(terms), rel=1e-6)


def test_known_loss_of_stories260k(stories):
    """1.359 nats: each story alone, with its first token and without an end, cut at the context of 512."""
    tokenizer, forward = stories
    path = SHARED / "data" / "tinystories" / "valid.txt.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    documents = [d.strip("\n") for d in text.split("<|endoftext|>")]
    ids = [np.array(tokenizer(d, verbose=False).input_ids) for d in documents if d]
    assert (len(ids), sum(map(len, ids))) == (271, 115_178)
    ids = sorted((x[:512] for x in ids), key=len)
    loaded = data.token_data(ids, ids, packed=False, counts={})
    result = over_ranks(forward, loaded, 16, 1, pad=2)
    assert result["loss"] == pytest.approx(1.359, abs=5e-4)
    assert result["label_tokens"] == 102_154


def test_known_loss_of_stories260k_packed(stories):
    """Packed windows of 256, as `load` gives them: ends at every join, which this model has never seen."""
    tokenizer, forward = stories
    path = str(SHARED / "data" / "tinystories" / "valid.txt.gz")
    loaded = data.load(path, tokenizer, seq_len=256, document_separator="<|endoftext|>")
    assert (loaded.counts["documents"], len(loaded), loaded.counts["leftover_tokens"]) == (271, 450, 249)
    assert over_ranks(forward, loaded, 8, 1)["loss"] == pytest.approx(1.591, abs=1e-3)
