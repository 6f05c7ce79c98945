"""The training loop: rates, rows, medians and the language-modelling objective."""

import contextlib
import copy
import json
import math
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from dlrscale import record, train
from dlrscale.config import RunConfig
from dlrscale.measure import Phases, SavedBytes
from dlrscale.train import Diverged, LanguageModelling, Loop, Stage

CPU = torch.device("cpu")


def test_learning_rate():
    rates = [train.learning_rate(step, 100, 0.5, 10) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.05 * step for step in range(1, 11)])
    assert max(rates) == rates[9] == 0.5
    assert rates[54] == pytest.approx(0.25)  # half way down the cosine
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert rates[32] == pytest.approx(0.25 * (1 + math.cos(math.pi * 23 / 90)))


def test_learning_rate_without_and_with_nothing_but_warm_up():
    assert train.learning_rate(1, 10, 1.0, 0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 10)))
    assert train.learning_rate(10, 10, 1.0, 0) == pytest.approx(0.0, abs=1e-12)
    assert [train.learning_rate(s, 3, 1.0, 3) for s in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert train.learning_rate(1, 1, 1.0, 1) == 1.0
    assert train.learning_rate(1, 1, 1.0, 0) == pytest.approx(0.0, abs=1e-12)


class Engine:
    """What the loop itself sees of an engine."""

    rank, world_size, checkpoint = 0, 2, None

    def __init__(self):
        self.rates, self.saved, self.checked = [], [], 0

    def every_gradient(self):
        self.checked += 1
        return contextlib.nullcontext()

    def set_lr(self, lr):
        self.rates.append(lr)

    @property
    def lr(self):
        return self.rates[-1]

    def barrier(self):
        pass

    def save(self, folder, done, state, keep):
        self.saved.append((folder.name, done, dict(state), keep))


class Batches:
    """Step k holds 10 + k tokens."""

    def step(self, k):
        class Batch:
            micro_batches = []
            tokens, label_tokens, processed_tokens = 10 + k, 9 + k, 20

        return Batch


class Sink(list):
    def log_step(self, row, step):
        self.append((step, row))


@pytest.fixture
def make_loop(tmp_path):
    def make(**changes):
        values = {"eval_every": 0, "checkpoint_every": 0} | changes
        config = RunConfig(model="/m", data="/d", out=str(tmp_path), **values)
        return Loop(config=config, engine=Engine(), batches=Batches(), phases=Phases(CPU), out=tmp_path, sink=Sink())

    return make


def stage(objective=lambda *a: {"loss/train": 1.0}, **changes):
    return Stage(**({"name": "train", "steps": 5, "lr": 0.5, "warmup": 2, "objective": objective} | changes))


def test_rows(make_loop, tmp_path):
    loop = make_loop()
    assert loop.run(stage(), 0) == 5
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert rows == json.loads(json.dumps(loop.rows))
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5]
    assert [r["tokens"] for r in rows] == [10, 21, 33, 46, 60]
    assert [r["optim/lr"] for r in rows] == pytest.approx([train.learning_rate(s, 5, 0.5, 2) for s in range(1, 6)])
    for row in rows:
        assert row["throughput/tokens_per_s_per_device"] == pytest.approx(row["throughput/tokens_per_s"] / 2)
        assert row["throughput/tokens_per_s"] == pytest.approx((9 + row["step"]) / row["time/step_s"])
    assert [step for step, _ in loop.sink] == [1, 2, 3, 4, 5]
    assert all("/" in key for _, row in loop.sink for key in row)


@pytest.mark.parametrize(
    ("limits", "pruned"),
    [([], None), ([None, 3.0], None), ([None, 2.9], 4), ([3.9, 1.0], 2), ([4.0, None, 1.9], 6), ([4.0, 3.0], None),
     ([None] * 4 + [0.5], None)],
)  # fmt: skip
def test_a_hopeless_run_ends_at_the_evaluation_that_shows_it(make_loop, tmp_path, limits, pruned):
    """Losses at steps 2, 4 ... are 4, 3, 2, 2.5 and 1; the best so far counts, and the last step prunes nothing."""
    losses = iter([4.0, 3.0, 2.0, 2.5, 1.0])
    loop = make_loop(eval_every=2, checkpoint_every=1)
    loop.evaluate = lambda: {"loss/heldout_task": next(losses)}
    loop.stop_above, loop.engine.gather = limits, lambda value: [value]
    assert loop.run(stage(steps=10), 0) == (pruned or 10)
    assert loop.pruned_at == pruned
    assert len(loop.rows) == len((tmp_path / "steps.jsonl").read_text().splitlines()) == (pruned or 10)
    assert [step for _, step, *_ in loop.engine.saved] == list(range(1, pruned or 11))


def test_a_second_stage_has_its_own_schedule(make_loop):
    loop = make_loop()
    done = loop.run(stage(name="distil"), 0)
    assert loop.run(stage(name="heal", steps=3, lr=0.1, warmup=1, offset=5), done) == 8
    assert loop.engine.rates[5:] == pytest.approx([train.learning_rate(s, 3, 0.1, 1) for s in (1, 2, 3)])
    assert [(r["step"], r["phase"]) for r in loop.rows[4:6]] == [(5, "distil"), (6, "heal")]


def test_a_stage_that_is_done_does_nothing(make_loop):
    loop = make_loop()
    assert loop.run(stage(), 7) == 7
    assert loop.rows == []


def test_randomness_depends_on_the_step_alone(make_loop):
    def numbers(first):
        seen = []
        loop = make_loop()
        loop.run(stage(lambda *a: seen.append(torch.rand(1).item()) or {"loss/train": 0.0}), first)
        return seen

    whole = numbers(0)
    torch.manual_seed(99)
    assert numbers(3) == whole[3:]
    assert len(set(whole)) == 5


def test_checkpoints(make_loop):
    loop = make_loop(checkpoint_every=2, keep_checkpoints=3)
    loop.state = {"b": 1}
    loop.run(stage(), 0)
    assert loop.engine.saved == [("checkpoints", done, {"b": 1}, 3) for done in (2, 4, 5)]


def test_evaluations(make_loop):
    loop = make_loop(eval_every=2)
    loop.evaluate = lambda: {"loss/heldout_task": 7.0}
    loop.run(stage(), 0)
    assert [r["step"] for r in loop.rows if "loss/heldout_task" in r] == [2, 4]


def test_a_loss_that_is_not_finite_ends_the_run(make_loop, tmp_path):
    losses = iter([1.0, math.inf, 1.0])
    loop = make_loop(checkpoint_every=1)
    with pytest.raises(Diverged, match=r"train step 2: the loss is inf"):
        loop.run(stage(lambda *a: {"loss/train": next(losses)}), 0)
    rows = list(record.read_lines(tmp_path / "steps.jsonl"))
    assert [(r["step"], r["loss/train"]) for r in rows] == [(1, 1.0), (2, None)]
    assert [done for _, done, _, _ in loop.engine.saved] == [1]


@pytest.mark.parametrize(
    ("norm", "dtype", "fault"),
    [(1.0, "fp32", None), (math.nan, "fp32", "the gradient norm is nan"), (math.inf, "fp16", None),
     (math.inf, "bf16", "the gradient norm is inf"), (-1.0, "bf16", "the gradient norm is -1.0")],
)  # fmt: skip
def test_a_gradient_that_is_not_finite_is_divergence(norm, dtype, fault):
    assert train.not_finite({"loss/train": 1.0, "optim/grad_norm": norm}, dtype) == fault
    assert train.not_finite({"loss/train": math.inf, "optim/grad_norm": norm}, dtype) == "the loss is inf"


def test_resume_cuts_the_rows_after_the_checkpoint(make_loop, tmp_path):
    for step in range(1, 6):
        record.append_line(tmp_path / "steps.jsonl", {"step": step, "tokens": step * 10})
    loop = make_loop()
    loop.engine.checkpoint = SimpleNamespace(step=3)
    loop.engine.load = lambda: {"loaded": 3}
    assert loop.resume() == 3
    assert loop.state == {"loaded": 3}
    assert [r["step"] for r in record.read_lines(tmp_path / "steps.jsonl")] == [1, 2, 3]
    loop.run(stage(), 3)
    assert [r["tokens"] for r in record.read_lines(tmp_path / "steps.jsonl")] == [10, 20, 30, 43, 57]
    assert loop.engine.checked == 1  # the first step of each start


def test_a_fresh_start_has_no_rows(make_loop, tmp_path):
    record.append_line(tmp_path / "steps.jsonl", {"step": 1, "tokens": 10})
    loop = make_loop()
    assert loop.resume() == 0
    assert loop.rows == []
    assert (tmp_path / "steps.jsonl").read_text() == ""


def test_summary_is_the_median_without_the_first_two_steps(make_loop):
    loop = make_loop()
    times = [100.0, 50.0, 3.0, 1.0, 2.0, 9.0, 4.0]
    loop.rows = [
        {
            "step": i,
            "phase": "train",
            "loss/train": 5.0 - i / 10,
            "time/step_s": t,
            "throughput/tokens_per_s": 1 / t,
        }
        for i, t in enumerate(times)
    ]
    loop.rows.append({"step": 7, "phase": "heal", "loss/train": 9.0, "time/step_s": 1000.0})
    assert loop.summary("train") == {
        "loss/train": 4.4,
        "time/step_s": median(times[2:]),
        "throughput/tokens_per_s": 1 / 3.0,
    }
    assert loop.summary("heal") == {"loss/train": 9.0, "time/step_s": 1000.0}
    assert loop.summary("none") == {}


def ids(rows=2, length=9, seed=0):
    return torch.randint(3, 260, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_language_modelling_is_the_mean_over_label_tokens(make_llama, fake_engine, step_batch):
    """Two micro-batches with different numbers of labels: not a mean of means."""
    model = make_llama()
    batch = step_batch((ids(), [9, 3]), (ids(seed=1), [2, 2]))
    assert batch.label_tokens == 8 + 2 + 1 + 1
    engine = fake_engine(model, accumulation=2)
    found = LanguageModelling()(engine, batch, Phases(CPU))

    wide, total = copy.deepcopy(model).double(), 0.0
    for micro in batch.micro_batches:
        logits = wide(input_ids=micro["input_ids"], attention_mask=micro["attention_mask"]).logits
        log_p = logits[:, :-1].log_softmax(-1).gather(-1, micro["input_ids"][:, 1:, None])[..., 0]
        total = total - (log_p * micro["attention_mask"][:, 1:]).sum()
    (total / 12).backward()
    assert found["loss/train"] == pytest.approx(float(total.detach()) / 12, rel=1e-5)
    for name, parameter in wide.named_parameters():
        difference = (engine.gradients[name].double() - parameter.grad).norm()
        assert difference <= 1e-4 * parameter.grad.norm(), name
    norm = torch.nn.utils.get_total_norm([p.grad for p in wide.parameters()])
    assert found["optim/grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert engine.boundaries == [False, True]


def test_language_modelling_counts_saved_bytes_once(make_llama, fake_engine, step_batch):
    model = make_llama()
    parts = {str(i): layer.mlp for i, layer in enumerate(model.model.layers)}
    objective = LanguageModelling(SavedBytes(model, parts))
    batch = step_batch((ids(), [9, 9]))
    objective(fake_engine(model), batch, Phases(CPU))
    counted = dict(objective.counted)
    assert counted["memory/saved_mlp_bytes_per_token"] == 2 * 4 * (32 + 4 * 48)
    assert counted["memory/saved_bytes_per_token"] > counted["memory/saved_mlp_bytes_per_token"]
    assert objective.counter is None
    objective(fake_engine(model), batch, Phases(CPU))
    assert objective.counted == counted


def test_an_overfitted_model_stops_where_the_completion_ends(tmp_path, make_llama, tokenizer):
    """With pad = eos the end token keeps its label: 60 steps on one pair teach the word and the stop."""
    from dlrscale import data

    padded = copy.deepcopy(tokenizer)
    padded.pad_token = padded.eos_token
    file = tmp_path / "pair.jsonl"
    file.write_text(json.dumps({"prompt": "Once upon a", "completion": " time"}) + "\n")
    found = data.load(str(file), padded, seq_len=32)
    batch = data.Batches(
        found, seed=0, micro_batch=1, accumulation=1, rank=0, world_size=1, pad_id=data.pad_id(padded)
    ).step(0)
    (micro,) = batch.micro_batches
    torch.manual_seed(0)
    model = make_llama(eos_token_id=padded.eos_token_id, pad_token_id=padded.pad_token_id).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        logits = model(input_ids=micro["input_ids"], attention_mask=micro["attention_mask"]).logits
        nats, count = train.cross_entropy_sum(logits, micro["labels"])
        (nats / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    prompt = padded("Once upon a", return_tensors="pt")["input_ids"]
    out = model.eval().generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert out[-1] == padded.eos_token_id
    assert padded.decode(out, skip_special_tokens=True) == " time"
