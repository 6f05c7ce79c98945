"""Options and DeepSpeed files at random: a dry run ends with a valid configuration or with one message, never worse."""

import contextlib
import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlrscale import cli, launcher

SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([0.5, 1e9, -1.0, 15099494.4, 1e-5]),
    st.sampled_from(["auto", "2", "", "cpu", "none", "fp16"]),
    st.just([]),
    st.just({}),
    st.just([0.9, 0.99]),
).map(lambda value: value)  # fmt: skip  (one branch where it stands in one_of)


def mostly(*good):
    """Good values, and now and then anything."""
    return st.sampled_from(range(40)).flatmap(lambda n: SCALAR if n == 39 else st.sampled_from(good))


def some(required=None, **optional):
    """An object with some of these keys, now and then one that is no key."""
    whole = st.fixed_dictionaries(required or {}, optional=optional)
    odd = st.one_of(SCALAR, st.builds(lambda d, k, v: d | {k: v}, whole, st.text(max_size=6), SCALAR))
    return st.sampled_from(range(40)).flatmap(lambda n: odd if n == 39 else whole)


OFFLOAD = some({"device": mostly("cpu", "none")}, pin_memory=mostly(True, False), ratio=mostly(1.0))
FILES = some(
    zero_optimization=some(
        {"stage": mostly(0, 1, 2, 3)}, reduce_bucket_size=mostly(5e8, 100, "auto"),
        allgather_bucket_size=mostly("auto", 7), stage3_prefetch_bucket_size=mostly("auto", 0, 5),
        offload_optimizer=OFFLOAD, offload_param=OFFLOAD, overlap_comm=mostly(True), contiguous_gradients=mostly(True),
    ),
    optimizer=some(
        {"type": mostly("AdamW", "Adam", "SGD", "Lion", "Adagrad")},
        params=some(
            lr=mostly("auto", 1e-3), betas=mostly("auto", [0.9, 0.99]), eps=mostly("auto", 1e-8),
            weight_decay=mostly(0.1, "auto"), adam_w_mode=mostly(True, False), torch_adam=mostly(True),
        ),
    ),
    scheduler=some(
        {"type": mostly("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")},
        params=some(
            {"warmup_num_steps": mostly("auto", 3)},
            total_num_steps=mostly("auto", 9), warmup_max_lr=mostly("auto", 0.1),
        ),
    ),
    bf16=some(enabled=mostly(True, False, "auto")),
    fp16=some(enabled=mostly(False, "auto"), loss_scale=mostly(0)),
    train_batch_size=mostly("auto", 4, 8), train_micro_batch_size_per_gpu=mostly("auto", 2, 4),
    gradient_accumulation_steps=mostly("auto", 1, 2), gradient_clipping=mostly("auto", 1.0, 0.0),
    steps_per_print=mostly(10), wall_clock_breakdown=mostly(True), zero_allow_untested_optimizer=mostly(True),
    comms_logger=some(enabled=mostly(True)), flops_profiler=some(enabled=mostly(True), profile_step=mostly(2)),
    zero_force_ds_cpu_optimizer=mostly(False), data_types=some(grad_accum_dtype=mostly("fp32", "bf16")),
)  # fmt: skip
ODD_TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(["[", '{"a":1,"a":2}', "{}//"]))
TEXTS = st.sampled_from(range(20)).flatmap(lambda n: ODD_TEXTS if n == 19 else FILES.map(json.dumps))


def option(good, bad):
    """Values of an option, one in ten of them wrong."""
    return st.sampled_from(range(10)).flatmap(lambda n: st.sampled_from(bad if n == 9 else good))


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "--micro-batch": option("124", ["0", "-1", "x"]), "--accumulation": option("12", "0"),
        "--num-ranks": option("12", "0"), "--zero": option("0123", "4"), "--dtype": option(["fp32", "bf16"], ["fp16"]),
        "--lr": option(["1e-3", "0"], ["nan", "-1"]), "--warmup-steps": option("03", ["-2"]),
        "--steps": option(["1", "20"], "0"), "--seq-len": option(["16"], ["1", "100000"]),
        "--seed": option("0", ["-1"]),
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory, llama_folder):
    """Model, data and the start of a command line."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "data.txt").write_text("Once upon a time there was a small fox.\n" * 100)
    line = ["--model", str(llama_folder), "--data", str(folder / "data.txt"), "--tracking-uri", "none", "--dry-run"]
    return folder, line


def run(words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        cli.main(words)
    return stop.value.code, out.getvalue(), err.getvalue()


def test_a_dry_run_ends_well_or_with_one_message(place, request, monkeypatch):
    folder, line = place
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(launcher, "run", lambda *_: pytest.fail("a rank would have started"))
    ends = []

    @settings(
        max_examples=request.config.getoption("--fuzz-examples"), derandomize=True, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(text=TEXTS, options=OPTIONS, job=st.sampled_from(["lock", "attack"]), few=st.booleans())
    def trial(text, options, job, few):
        file, target = folder / "own.json", folder / "out"
        file.write_text(text, encoding="utf-8", errors="replace")
        chosen = dict(list(options.items())[:1]) if few else options
        words = [job, *line, "--out", str(target), "--deepspeed_config", str(file), "--seq-len", "16"]
        words += [] if job == "lock" else ["--strategy", "full"]
        code, out, err = run(words + [word for pair in chosen.items() for word in pair])
        ends.append(code)
        assert not target.exists()
        assert "Traceback" not in out + err
        if code == 0:
            assert err == ""
            merged, _ = json.JSONDecoder().raw_decode(out)
            assert '"auto"' not in out
            ranks = int(chosen.get("--num-ranks", 1))
            micro, steps = merged["train_micro_batch_size_per_gpu"], merged["gradient_accumulation_steps"]
            assert merged["train_batch_size"] == micro * steps * ranks
        else:
            assert code == 2, err
            assert err.count("Error:") == 1
            assert out == ""

    trial()
    assert min(ends.count(0), ends.count(2)) >= len(ends) // 10  # both ways were tried
