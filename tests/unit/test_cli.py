"""The command: help at once, dry runs that write nothing, and bad input in one message with exit code 2."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlrscale import catalogue, cli
from dlrscale import config as configuration
from dlrscale.cli.run import parse_columns
from dlrscale.errors import ConfigError


@pytest.fixture
def place(no_rank_starts, tmp_path, monkeypatch):
    """An empty folder to stand in, with a text to train on; on the CPU, and no rank starts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    data = tmp_path / "data.txt"
    data.write_text("Once upon a time there was a small fox.\n" * 200)
    return work, data


@pytest.fixture
def call(place, capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def call(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in args])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


@pytest.fixture(scope="module")
def locked_folder(llama_folder, make_locked):
    folder = make_locked(llama_folder, "locked-llama")
    manifest = json.loads((folder / "lock.json").read_text())
    manifest["base"]["digest"] = configuration.digest(str(llama_folder))
    (folder / "lock.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def gpt2_gated_folder(gpt2_folder, make_locked):
    return make_locked(gpt2_folder, "locked-gpt2", form="gated")


def written(work):
    return sorted(str(p.relative_to(work)) for p in work.rglob("*"))


# --- Help and lists ---------------------------------------------------------------------------------------------


def test_help_is_fast_and_loads_no_torch():
    code = (
        "import sys\nfrom dlrscale.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'mlflow', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert "Usage: dlrscale" in done.stdout
    assert min(times) < 0.5, times


@pytest.mark.parametrize("command", ["lock", "attack", "strategies", "report", "ui", "mirror", "pretrain", "demo"])
def test_every_command_has_help_with_an_example(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert f"dlrscale {command}" in out.split("Options:")[0].split("\n", 1)[1]


def test_version(call):
    from dlrscale import __version__

    assert call("--version")[:2] == (0, f"dlrscale, version {__version__}\n")


def test_strategies_list(call):
    code, out, _ = call("strategies")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(catalogue.STRATEGIES)


def test_strategies_show(call):
    code, out, _ = call("strategies", "lora")
    assert code == 0
    for part in (
        "lora\n",
        "rank=8",
        "alpha=16",
        "zero 2",
        "activation-checkpointing layer",
        "2106.09685",
        "exact",
    ):
        assert part in out


def test_an_unknown_strategy_names_a_near_one(call):
    code, out, err = call("strategies", "lora-atn")
    assert (code, out) == (2, "")
    assert err.startswith("Error: --strategy lora-atn: unknown. Did you mean lora-attn?")
    assert err.count("\n") == 1


# --- Dry runs ---------------------------------------------------------------------------------------------------


def split_dry_run(out):
    """The merged DeepSpeed configuration and the argv of a dry run; the predicted peak is a comment before it."""
    merged, end = json.JSONDecoder().raw_decode(out)
    *peak, line = out[end:].strip().splitlines()
    assert all(words.startswith("# predicted peak of a device: ") for words in peak)
    return merged, shlex.split(line)


def test_lock_dry_run(call, place, llama_folder):
    work, data = place
    code, out, err = call(
        "lock", "--model", llama_folder, "--data", data, "--seq-len", 32, "--depth", 4, "--zero", 3,
        "--offload-optimizer", "--num-ranks", 2, "--accumulation", 2,
        "--document-separator", "<|o u't|>", "--dry-run",
    )  # fmt: skip
    assert (code, err) == (0, "")
    merged, line = split_dry_run(out)
    assert merged["zero_optimization"]["stage"] == 3
    assert merged["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert (merged["train_batch_size"], merged["train_micro_batch_size_per_gpu"]) == (16, 4)
    assert "auto" not in out.split("}\n")[0]
    config = configuration.from_json(line[-1])
    assert (config.form, config.start, config.depth, config.zero) == ("gated", "warm", 4, 3)
    assert (config.document_separator, config.dtype, config.num_ranks) == ("<|o u't|>", "fp32", 2)
    assert config.model == str(llama_folder)
    assert os.path.isabs(config.data)
    resume_id = configuration.run_ids(config, merged)[1]
    assert config.out == str(work / "results" / f"lock-{resume_id[:8]}")
    assert written(work) == []


def test_best_memory_is_resolved_before_the_run(call, place, llama_folder, locked_folder):
    """Base and locked have winners of their own; the run is the one that its axes say, whatever they were called."""
    work, data = place
    shared = ("attack", "--data", data, "--seq-len", 32, "--dry-run", "--zero", 2, "--no-offload-optimizer")
    searched = (*shared, "--strategy", "best-memory", "--set", "cap=2", "--activation-storage", "device")
    code, out, err = call(*searched, "--model", locked_folder, "--base", llama_folder)
    assert (code, err) == (0, "")
    assert out.count("# best-memory: smallest peak at up to 2.0 x the FLOPs of full on the base") == 2
    configs = [configuration.from_json(shlex.split(line)[-1]) for line in out.splitlines() if "attack" in line[-4000:]
               and line[0] not in "#{} "]  # fmt: skip
    assert [config.strategy for config in configs] == ["best-memory"] * 2
    for config in configs:
        best = config.lever_search["best"][0]
        assert best["gradient"] == config.gradient
        assert all(best[name] == getattr(config, name) for name in ("zero", "tiles", "activation_checkpointing"))
        assert "cap" not in config.knobs
        given = {"zero": 2, "offload_optimizer": False, "activation_storage": "device"}
        assert config.lever_search["given"] == given
    locked = configs[1]
    by_hand = ("--activation-checkpointing", locked.activation_checkpointing, "--tiles", locked.tiles)
    _, out, _ = call(*shared, "--strategy", "full", "--gradient", locked.gradient, *by_hand, "--model", locked_folder)
    same = configuration.from_json(shlex.split(out.strip().splitlines()[-1])[-1])
    assert configuration.run_ids(same, {}) == configuration.run_ids(locked, {})
    assert written(work) == []
    code, _, err = call(*shared, "--strategy", "best-memory", "--set", "cap=1", "--activation-checkpointing", "layer",
                        "--model", llama_folder)  # fmt: skip
    assert code == 2
    assert "Take a larger cap" in err


@pytest.mark.parametrize(
    ("options", "rate"),
    [(("ckpt-layer",), 3e-3), (("mezo",), 3e-5), (("lomo",), 3e-2), (("ckpt-layer", "--optimizer", "SGD"), 3e-2),
     (("mezo", "--lr", 1e-4), 1e-4)],
)  # fmt: skip
def test_the_default_rate_is_of_what_updates(call, place, llama_folder, options, rate):
    _, data = place
    _, out, _ = call("attack", "--model", llama_folder, "--data", data, "--seq-len", 32, "--dry-run", "--strategy",
                     *options)  # fmt: skip
    assert configuration.from_json(split_dry_run(out)[1][-1]).lr == rate


def test_lock_defaults_follow_the_family(call, place, gpt2_folder):
    _, data = place
    _, out, _ = call("lock", "--model", gpt2_folder, "--data", data, "--seq-len", 32, "--depth", 4, "--dry-run")
    config = configuration.from_json(split_dry_run(out)[1][-1])
    assert (config.form, config.start, config.coupling, config.harden, config.zero) == (
        "plain",
        "warm",
        0.25,
        True,
        2,
    )
    arguments = ("lock", "--model", gpt2_folder, "--data", data, "--seq-len", 32, "--depth", 4)
    _, out, _ = call(*arguments, "--form", "gated", "--dry-run")
    config = configuration.from_json(split_dry_run(out)[1][-1])
    assert (config.form, config.start) == ("gated", "cold")


def test_the_same_job_elsewhere_has_the_same_name(call, place, llama_folder, tmp_path):
    """The folder's eight digits follow the bytes of model and data, not their paths; nor the ZeRO stage."""
    import shutil

    work, data = place
    shutil.copytree(llama_folder, tmp_path / "copy")
    shutil.copy(data, tmp_path / "copy.txt")
    names = []
    for model, text, extra in (
        (llama_folder, data, ()),
        (tmp_path / "copy", tmp_path / "copy.txt", ("--zero", 3)),
        (llama_folder, data, ("--seed", 1)),
    ):
        _, out, _ = call("lock", "--model", model, "--data", text, "--seq-len", 32, "--depth", 4, "--dry-run", *extra)
        names.append(Path(configuration.from_json(split_dry_run(out)[1][-1]).out).name)
    assert names[0] == names[1] != names[2]


def test_lock_with_a_deepspeed_file(call, place, llama_folder, tmp_path):
    _, data = place
    own = {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "train_batch_size": 6,
        "gradient_clipping": 0.1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.007}},
    }
    (tmp_path / "own.json").write_text(json.dumps(own))
    code, out, _ = call(
        "lock", "--model", llama_folder, "--data", data, "--seq-len", 32, "--depth", 4, "--accumulation", 3,
        "--deepspeed_config", tmp_path / "own.json", "--dry-run",
    )  # fmt: skip
    assert code == 0
    merged, line = split_dry_run(out)
    config = configuration.from_json(line[-1])
    assert (config.zero, config.dtype, config.micro_batch, config.accumulation) == (1, "bf16", 2, 3)
    assert merged["gradient_clipping"] == 0.1
    assert config.lr == merged["optimizer"]["params"]["lr"] == 0.007
    assert merged["train_batch_size"] == 6


def test_attack_dry_run_shows_both_sides(call, place, llama_folder, locked_folder):
    work, data = place
    code, out, _ = call(
        "attack", "--model", locked_folder, "--base", llama_folder, "--strategy", "lora", "--set", "rank=4",
        "--data", data, "--seq-len", 32, "--zero", 3, "--out", "here", "--dry-run",
    )  # fmt: skip
    assert code == 0
    lines = [shlex.split(line) for line in out.splitlines() if "__main__.py" in line]
    base, locked = (configuration.from_json(line[-1]) for line in lines)
    assert (base.model, locked.model) == (str(llama_folder), str(locked_folder))
    assert (base.name, locked.name) == ("lora-base", "lora-locked-k4")
    assert (base.out, locked.out) == (str(work / "here" / "base"), str(work / "here" / "locked"))
    for config in (base, locked):
        assert config.knobs == {"rank": 4, "alpha": 16, "dropout": 0.0}
        assert (config.zero, config.activation_checkpointing) == (3, "layer")
        assert config.lock_id == "0" * 64
    assert written(work) == []


def test_pretrain_dry_run(call, place):
    work, data = place
    code, out, _ = call("pretrain", "--data", data, "--seq-len", 32, "--width", 16, "--dry-run")
    assert code == 0
    assert configuration.from_json(split_dry_run(out)[1][-1]).width == 16
    assert written(work) == []


# --- Refusals ---------------------------------------------------------------------------------------------------


def refuse(call, work, args, *parts):
    """Exit code 2, one message with all parts, no traceback, nothing written."""
    code, out, err = call(*args)
    assert code == 2, (code, out, err)
    for part in parts:
        assert str(part) in err, (part, err)
    assert err.count("Error") == 1, err
    assert "Traceback" not in err
    assert out == ""
    assert written(work) == []
    return err


def lock_line(place, model, *extra):
    return ("lock", "--model", model, "--data", place[1], "--seq-len", 32, "--depth", 4, *extra)


def attack_line(place, model, *extra):
    return ("attack", "--model", model, "--data", place[1], "--seq-len", 32, *extra)


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_missing_model_names_a_near_one(call, place, llama_folder, dry):
    wrong = llama_folder.with_name("lama-tiny")
    refuse(call, place[0], lock_line(place, wrong, *dry), "No such model folder", wrong, "near: llama-tiny")
    refuse(
        call,
        place[0],
        attack_line(place, wrong, "--strategy", "full", *dry),
        "No such model folder",
        "llama-tiny",
    )


def test_a_locked_model_cannot_be_locked(call, place, locked_folder):
    refuse(call, place[0], lock_line(place, locked_folder), f"--model {locked_folder} is locked already")


def test_an_unknown_family(call, place, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "mamba"}')
    refuse(call, place[0], lock_line(place, tmp_path / "m"), "'mamba'", "(MambaMixer: ", "llama, mistral")
    refuse(call, place[0], attack_line(place, tmp_path / "m", "--strategy", "full"), "'mamba'")


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        (("--zero", 2, "--offload-param"), ("--offload-param needs --zero 3", "--zero 2")),
        (("--zero", 0, "--offload-optimizer"), ("--offload-optimizer needs --zero 1, 2 or 3",)),
        (("--zero", 4), ("--zero", "4")),
        (("--start", "warm", "--form", "prenorm"), ("--start warm", "--form prenorm", "--start cold")),
        (("--start", "warm", "--form", "plain"), ("--start warm", "--form plain", "gated")),
        (("--form", "wide"), ("--form", "'wide'", "gated")),
        (("--seq-len", 65), ("--seq-len 65", "at most 64")),
        (("--seq-len", 1), ("--seq-len 1", "at least 2")),
        (("--depth", 49), ("--depth 49", "1 to 48")),
        (("--depth", 0, "--rank", 4), ("--depth 0",)),
        (("--rank", 0), ("--rank 0",)),
        (("--layers", "0-5"), ("--layers '0-5'", "0 to 1")),
        (("--layers", "all"), ("--layers 'all'",)),
        (("--lr", "nan"), ("--lr nan",)),
        (("--coupling", "-1"), ("--coupling -1",)),
        (("--micro-batch", 0), ("--micro-batch 0",)),
        (("--accumulation", 0), ("--accumulation 0",)),
        (("--micro-batch", 100_000), ("one global batch of 100000",)),
        (("--dtype", "fp16"), ("--dtype fp16",)),
        (("--columns", "prompt"), ("--columns prompt", "prompt=KEY,completion=KEY")),
        (("--columns", "prompt=a"), ("--columns prompt=a",)),
        (("--heldout", "missing.txt"), ("missing.txt",)),
        (("--deepspeed_config", "missing.json"), ("--deepspeed_config", "missing.json", "no such file")),
        (("--tracking-uri", "file:./mlruns"), ("--tracking-uri file:./mlruns",)),
        (("--depht", 3), ("--depht",)),
        (("--steps", "many"), ("--steps", "'many'")),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry"])
def test_lock_refuses(call, place, llama_folder, extra, parts, dry):
    refuse(call, place[0], lock_line(place, llama_folder, *extra, *dry), *parts)


def test_lock_tells_all_faults_at_once(call, place, llama_folder):
    err = refuse(
        call, place[0], lock_line(place, llama_folder, "--steps", 0, "--coupling", -1, "--heal-steps", -2),
        "--steps 0", "--coupling -1", "--heal-steps -2",
    )  # fmt: skip
    assert len(err.strip().splitlines()) == 3


@pytest.mark.parametrize(
    ("own", "extra", "parts"),
    [
        ({"zero_optimization": {"stage": 1}}, ("--zero", 2), ("--zero 2", "zero_optimization.stage 1")),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            ("--no-offload-param",),
            ("offload-param", "offload_param True", "own.json"),
        ),
        (
            {"zero_optimization": {"stage": 2}},
            ("--offload-optimizer",),
            ("--offload-optimizer", "offload_optimizer False", "own.json"),
        ),
        ({"train_micro_batch_size_per_gpu": 8}, ("--micro-batch", 2), ("--micro-batch 2", "per_gpu 8")),
        (
            {"gradient_accumulation_steps": 8},
            ("--accumulation", 2),
            ("--accumulation 2", "accumulation_steps 8"),
        ),
        ({"train_batch_size": 7}, ("--micro-batch", 2), ("train_batch_size 7", "micro-batch 2")),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, ("--lr", 0.2), ("--lr 0.2", "params.lr 0.1")),
        ({"bf16": {"enabled": True}}, ("--dtype", "fp32"), ("--dtype fp32", "bf16.enabled")),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, (), ("bf16.enabled", "fp16.enabled")),
    ],
)
def test_a_deepspeed_file_that_contradicts(call, place, llama_folder, tmp_path, own, extra, parts):
    file = tmp_path / "own.json"
    file.write_text(json.dumps(own))
    refuse(call, place[0], lock_line(place, llama_folder, "--deepspeed_config", file, *extra), *parts)


def test_a_deepspeed_file_that_says_the_same_is_no_contradiction(call, place, llama_folder, tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 2}))
    extra = ("--deepspeed_config", file, "--zero", 1, "--micro-batch", 2, "--no-offload-param", "--dry-run")
    assert call(*lock_line(place, llama_folder, *extra))[0] == 0


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        (("--strategy", "ckpt-layr"), ("--strategy ckpt-layr", "Did you mean ckpt-layer?")),
        (
            ("--strategy", "ckpt-layer", "--activation-checkpointing", "none"),
            ("--activation-checkpointing none", "ckpt-layer"),
        ),
        (
            ("--strategy", "full-offload", "--no-offload-optimizer"),
            ("--no-offload-optimizer", "full-offload"),
        ),
        (("--strategy", "full", "--zero", 2, "--offload-param"), ("--offload-param needs --zero 3",)),
        (("--strategy", "lora", "--set", "rnk=4"), ("--set rnk", "rank, alpha, dropout")),
        (("--strategy", "lora", "--set", "rank=few"), ("--set rank=few",)),
        (("--strategy", "lora", "--set", "rank"), ("--set rank",)),
        (("--strategy", "full", "--seq-len", 65), ("--seq-len 65", "at most 64")),
        (("--strategy", "full", "--columns", "a=b"), ("--columns a=b",)),
        (("--strategy", "full", "--heldout-base", "missing.txt"), ("missing.txt",)),
        (("--strategy", "undistil", "--set", "text=public"), ("text=public", "--public-data")),
        (("--strategy", "full", "--public-data", "missing.txt"), ("--public-data", "does not read it")),
        (("--strategy", "undistil", "--set", "text=public", "--public-data", "missing.txt"), ("missing.txt",)),
        (("--strategy", "drop-blocks", "--set", "drop=0.95"), ("--set drop=0.95", "0.0 to 0.9")),
        (("--strategy", "full", "--data", "missing.txt"), ("missing.txt",)),
        ((), ("--strategy",)),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry"])
def test_attack_refuses(call, place, llama_folder, extra, parts, dry):
    refuse(call, place[0], attack_line(place, llama_folder, *extra, *dry), *parts)


def test_attack_checks_base_and_model(call, place, llama_folder, locked_folder):
    line = attack_line(place, llama_folder, "--strategy", "full", "--base", llama_folder)
    refuse(call, place[0], line, "--base is for a locked --model", "no lock.json")
    line = attack_line(place, locked_folder, "--strategy", "full", "--base", locked_folder)
    refuse(call, place[0], line, f"--base {locked_folder} is a locked model itself")


def test_attack_wants_the_lock_s_own_base_and_manifest(call, place, llama_folder, locked_folder, tmp_path):
    other, bare = tmp_path / "other", tmp_path / "bare"
    shutil.copytree(llama_folder, other)
    (other / "tokenizer_config.json").write_text("{}")
    line = attack_line(place, locked_folder, "--strategy", "full", "--base", other)
    refuse(call, place[0], line, f"--base {other} is not the model that", "lock.json")
    shutil.copytree(locked_folder, bare)
    (bare / "lock.json").unlink()
    refuse(call, place[0], attack_line(place, bare, "--strategy", "full"), "is locked, but has no lock.json")
    line = attack_line(place, locked_folder, "--strategy", "full", "--base", bare)
    refuse(call, place[0], line, f"--base {bare} is a locked model itself")


def test_a_deepspeed_file_does_not_cancel_a_strategy(call, place, locked_folder):
    file = Path(__file__).resolve().parents[2] / "ds_configs" / "zero2.json"
    line = attack_line(place, locked_folder, "--strategy", "full-offload", "--deepspeed_config", file)
    refuse(call, place[0], line, "contradicts the strategy full-offload", "zero2.json")


def test_settings_that_a_run_would_ignore_are_refused(call, place, llama_folder):
    work, _ = place
    (work.parent / "hosts").write_text("a slots=2\nb slots=2\n")
    line = lock_line(place, llama_folder, "--hostfile", work.parent / "hosts", "--num-ranks", 2)
    refuse(call, work, line, "--num-ranks 2", "4 slots", "hosts")
    (work.parent / "own.json").write_text('{"scheduler": {"type": "WarmupLR"}}')
    line = lock_line(place, llama_folder, "--deepspeed_config", work.parent / "own.json")
    refuse(call, work, line, "scheduler", "own.json", "--heal-lr")


def test_flattening_what_is_no_mlp_is_refused_before_anything_starts(call, place, gpt2_gated_folder):
    line = attack_line(place, gpt2_gated_folder, "--strategy", "flatten")
    refuse(call, place[0], line, "--strategy flatten", "gated", "gpt2", "undistil")
    line = attack_line(place, gpt2_gated_folder, "--strategy", "undistil")
    refuse(call, place[0], line, "undistil with start=flat", "gated", "gpt2", "--set start=fresh")


@pytest.mark.parametrize("dry", [True, False])
def test_a_job_that_cannot_fit_stops_with_exit_code_3(call, place, llama_folder, tmp_path, dry):
    work, data = place
    small = tmp_path / "small.json"
    small.write_text(json.dumps({"tiny": {"memory_bytes": 2**29, "host_memory_bytes": 2**40, "devices_per_node": 1}}))
    line = [*attack_line(place, llama_folder), "--strategy", "full", "--hardware", "tiny", "--hardware-file", small]
    if dry:
        code, out, _ = call(*line, "--dry-run")
        assert code == 0
        assert "does not fit tiny" in out
        return
    code, _, err = call(*line)
    assert code == 3
    assert "cannot fit: a device needs" in err
    assert "--force runs anyway" in err
    assert written(work) == []
    with pytest.raises(AssertionError, match="would have started"):
        call(*line, "--force")


def test_all_jobs_of_a_command_are_planned_before_the_first_runs(call, place, llama_folder, locked_folder, tmp_path):
    small = tmp_path / "small.json"
    small.write_text(json.dumps({"tiny": {"memory_bytes": 2**29, "host_memory_bytes": 2**40, "devices_per_node": 1}}))
    line = [*attack_line(place, locked_folder), "--base", llama_folder, "--strategy", "full"]
    code, _, err = call(*line, "--hardware", "tiny", "--hardware-file", small)
    assert code == 3
    assert "full-base cannot fit" in err
    assert "full-locked-k4 cannot fit" in err
    assert written(place[0]) == []


def test_a_folder_of_another_run_is_refused(call, place, llama_folder, tmp_path):
    out = tmp_path / "taken"
    configuration.claim_folder(out, "1" * 64, "f" * 64)
    refuse(call, place[0], lock_line(place, llama_folder, "--out", out), out, "another run", "ffffffff")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "x.tex").write_text("x")
    refuse(
        call,
        place[0],
        lock_line(place, llama_folder, "--out", tmp_path / "thesis"),
        "thesis",
        "no folder of a run",
    )
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["x.tex"]


def test_weights_that_do_not_load_are_refused(call, place, llama_folder, tmp_path):
    """The folder's faults are told before a rank starts, not by a rank."""
    import shutil

    shutil.copytree(llama_folder, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    refuse(call, place[0], lock_line(place, tmp_path / "m"), tmp_path / "m")


def test_debug_shows_the_traceback(call, place, llama_folder):
    line = lock_line(place, llama_folder, "--depth", 49)
    for args in (("--debug", *line), (*line, "--debug")):
        code, _, err = call(*args)
        assert code == 2
        assert "Traceback" in err
        assert err.strip().splitlines()[-1].startswith("Error: --depth 49")


def test_only_rank_zero_speaks(call, place, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert call("strategies", "x") == (2, "", "")
    assert call("lock") == (2, "", "")
    monkeypatch.setenv("RANK", "0")
    assert "unknown" in call("strategies", "x")[2]


def test_report_refuses_a_folder_without_records(call, place):
    refuse(call, place[0], ("report", "missing"), "missing")
    refuse(call, place[0], ("report", "."), "records.jsonl")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, None),
        ("prompt=question,completion=answer", {"prompt": "question", "completion": "answer"}),
        ("completion=a,prompt=q", {"prompt": "q", "completion": "a"}),
        ("text=story", {"text": "story"}),
    ],
)
def test_columns(text, found):
    assert parse_columns(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "story",
        "text=",
        "prompt=q",
        "prompt=q,answer=a",
        "text=a,text=b",
        "text=a,",
        "prompt=q,completion=a,x",
    ],
)
def test_bad_columns(text):
    with pytest.raises(ConfigError, match="--columns"):
        parse_columns(text)


def test_the_launch_scripts_take_the_launchers_flag(place, llama_folder):
    """`deepspeed launch/lock.py` adds --local_rank; bad input ends every rank with 2, rank 0 speaks."""
    script = Path(__file__).resolve().parents[2] / "launch" / "lock.py"
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    for rank in ("0", "1"):
        done = subprocess.run(
            [sys.executable, script, f"--local_rank={rank}", "--model", "/nowhere", "--data", place[1]],
            env=env | {"RANK": rank, "WORLD_SIZE": "2"}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2
        assert ("No such model folder" in done.stderr) == (rank == "0")
        assert done.stdout == ""
