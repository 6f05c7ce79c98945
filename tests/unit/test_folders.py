"""Which folder a name means, and that folders which are not whole are refused from their headers alone."""

import json
import shutil
import struct
import time
from pathlib import Path

import pytest

from dlrscale import cli, folders, models
from dlrscale.errors import ConfigError


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, with an empty hub cache; the hub is offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def no_network(monkeypatch):
    """Let any look at the hub fail the test."""
    import huggingface_hub

    def reach(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", reach)


def message(function, *args):
    with pytest.raises(ConfigError) as error:
        function(*args)
    return str(error.value)


# --- Names ------------------------------------------------------------------------------------------------------


def test_what_exists_is_a_folder(here, no_network, monkeypatch):
    for name in ("gpt2", "a, b", "org/name", "~x"):
        (here / name).mkdir(parents=True)
        assert folders.find_model(name) == here / name
    monkeypatch.chdir(here / "gpt2")
    assert folders.find_model(".") == here / "gpt2"
    monkeypatch.setenv("HOME", str(here))
    assert folders.find_model("~/gpt2/") == here / "gpt2"


@pytest.mark.parametrize(
    "text", ["./S_typo", "../x", "/no/such", "~/none", "a/b/c", "org/none", "gptt2", "with blank", "", "-x", "a\\b"]
)
def test_a_mistyped_path_is_refused_without_the_network(here, no_network, text):
    (here / "org").mkdir()
    (here / "gpt2").mkdir()
    start = time.monotonic()
    said = message(folders.find_model, text)
    assert time.monotonic() - start < 2
    assert "No such model folder: /" in said
    assert ("(near: gpt2)" in said) == (text == "gptt2")
    if text == "./S_typo":
        assert str(here / "S_typo") in said


def test_a_file_is_no_model(here, no_network):
    (here / "model.safetensors").touch()
    assert "model.safetensors is a file" in message(folders.find_model, "model.safetensors")


def test_a_hub_id_that_is_not_cached_says_offline(here):
    said = message(folders.find_model, "gpt2", "--base")
    assert said.startswith("--base gpt2: no such folder")
    assert "offline" in said
    assert str(here / "gpt2") in said
    assert "\n" not in said


def test_a_hub_id_in_the_cache_is_found_offline(here, llama_folder, tmp_path):
    cache = tmp_path / "hub" / "models--org--tiny.v1"
    shutil.copytree(llama_folder, cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    found = folders.find_model("org/tiny.v1")
    assert found == cache / "snapshots" / ("0" * 40)
    assert folders.shown_name(found) == "org/tiny.v1"
    assert folders.shown_name(llama_folder) == llama_folder.name


def test_a_hub_that_cannot_be_reached_is_one_message(here, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    said = message(folders.find_model, "org/name")
    assert "gave no model 'org/name'" in said
    assert "refused" in said.lower()
    assert "\n" not in said


def test_the_command_refuses_a_hub_id_offline(here, capsys):
    (here / "data.txt").write_text("x")
    for line in (["lock"], ["attack", "--strategy", "full"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([*line, "--model", "gpt2", "--data", "data.txt"])
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert "offline" in said
        assert "Traceback" not in said
    assert [p.name for p in here.iterdir()] == ["data.txt"]


def test_a_mistyped_name_is_told_in_two_seconds(tmp_path):
    """Through the command as people call it: before torch is imported."""
    import subprocess
    import sys

    (tmp_path / "data.txt").write_text("x")
    (tmp_path / "S_type").mkdir()
    code = "import sys\nfrom dlrscale.cli import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    for line in (["lock"], ["attack", "--strategy", "full", "--base", "./S_typo"]):
        line = [sys.executable, "-c", code, *line, "--model", "./S_typo", "--data", "data.txt"]
        start = time.monotonic()
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert time.monotonic() - start < 2
        assert done.returncode == 2
        assert f"{tmp_path / 'S_typo'} (near: S_type)" in done.stderr
        assert done.stdout == "False\n"


# --- Weight files -----------------------------------------------------------------------------------------------


@pytest.fixture
def single(llama_folder, tmp_path):
    """A copy of a model of one weight file."""
    return Path(shutil.copytree(llama_folder, tmp_path / "single"))


@pytest.fixture
def sharded(make_llama, save_base, tmp_path):
    """A model of several shards."""
    folder = tmp_path / "sharded"
    model = make_llama()
    save_base(model, folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def shard(folder, index=0):
    return sorted(folder.glob("*.safetensors"))[index]


def test_whole_folders_pass(single, sharded, gpt2_folder):
    for folder in (single, sharded, gpt2_folder):
        models.check_folder(folder)
    assert folders.check_weights(sharded)["model.norm.weight"].shape == (32,)
    assert {entry.file for entry in folders.check_weights(sharded).values()} == {
        p.name for p in sharded.glob("*.safetensors")
    }


def cut(file, size):
    with open(file, "r+b") as handle:
        handle.truncate(size)


@pytest.mark.parametrize(
    ("size", "said"), [(0, "is cut off: 0 bytes"), (5, "is cut off"), (200, "is cut off: 200"), (-1, "is cut off: ")]
)
def test_a_truncated_shard(single, sharded, size, said):
    for folder in (single, sharded):
        file = shard(folder, -1)
        cut(file, size if size >= 0 else file.stat().st_size - 1)
        found = message(models.check_folder, folder)
        assert f"{file} {said}" in found
        assert "Fetch or copy it again" in found


def test_all_faults_are_told_at_once(sharded):
    for index in (0, 1):
        cut(shard(sharded, index), 0)
    assert message(folders.check_weights, sharded).count("is cut off") == 2


def test_a_file_that_is_too_long(single):
    with open(single / "model.safetensors", "ab") as file:
        file.write(b"x")
    assert "is too long" in message(folders.check_weights, single)


def header_bytes(value):
    text = json.dumps(value).encode() if not isinstance(value, bytes) else value
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        header_bytes(b"not json"),
        header_bytes([]),
        header_bytes({"a": 1}),
        header_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + b"1234",
        header_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}) + b"12345678",
        header_bytes({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}),
        header_bytes({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}) + b"1234",
        header_bytes(b"\xff\xfe"),
        b"\xff" * 64,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
)
def test_a_broken_header(single, content):
    (single / "model.safetensors").write_bytes(content)
    assert "is no safetensors file: its header is broken" in message(models.check_folder, single)


def test_a_shard_that_the_index_names_is_missing(sharded):
    file = shard(sharded, 1)
    file.unlink()
    assert f"{file} is missing, but model.safetensors.index.json names it" in message(folders.check_weights, sharded)


def test_a_stale_shard(sharded, single):
    stale = sharded / "model-00009-of-00009.safetensors"
    shutil.copy(shard(sharded), stale)
    assert f"{stale} is in no line of model.safetensors.index.json" in message(folders.check_weights, sharded)
    stale.rename(single / stale.name)
    assert f"holds model.safetensors and also {stale.name}" in message(folders.check_weights, single)
    (single / stale.name).unlink()
    (single / "consolidated.safetensors").write_bytes(b"")  # of another program: transformers does not read it
    folders.check_weights(single)


def test_an_index_that_is_wrong(sharded):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    weights = index["weight_map"]
    name = weights["model.norm.weight"]
    file.write_text(json.dumps({"weight_map": weights | {"model.more.weight": name}}))
    assert f"{sharded / name} does not hold model.more.weight" in message(folders.check_weights, sharded)
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        file.write_text(text)
        assert "is no JSON object with a weight_map" in message(folders.check_weights, sharded)
    file.write_text('{"weight_map": {}}')
    assert "lists no tensor" in message(folders.check_weights, sharded)
    file.write_text('{"weight_map": {"a": "../other.safetensors"}}')
    assert "no name of a file beside it" in message(folders.check_weights, sharded)
    file.unlink()
    assert f"{file} is missing" in message(folders.check_weights, sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"])
def test_pickles_are_not_read(single, name):
    (single / "model.safetensors").rename(single / name)
    found = message(models.check_folder, single)
    assert f"pickle alone ({name})" in found
    assert "run any code" in found
    assert "save_pretrained" in found
    (single / name).unlink()
    assert "holds no *.safetensors weights" in message(models.check_folder, single)


def test_an_export_over_an_old_folder_leaves_no_stale_shard(make_llama, tokenizer, tmp_path, monkeypatch):
    from dlrscale import export

    for size in ("20KB", "60KB", "5GB", "20KB"):
        monkeypatch.setattr(export, "SHARD_SIZE", size)
        export.save_folder(make_llama(), tokenizer, tmp_path / "model", {})
        models.check_folder(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# --- Config against weights -------------------------------------------------------------------------------------


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"intermediate_size": 64}, ["mlp.down_proj.weight in model.safetensors has shape (32, 48)", "(32, 64)"]),
        ({"vocab_size": 300}, ["model.embed_tokens.weight in model.safetensors has shape (264, 32)", "(300, 32)"]),
        ({"num_hidden_layers": 3}, ["config.json asks for model.layers.2.", "no weight file holds", "and 6 more"]),
        ({"num_hidden_layers": 1}, ["model.layers.1.", "is no part of the model that config.json describes"]),
        ({"attention_bias": True}, ["asks for model.layers.0.self_attn.k_proj.bias"]),
        ({"hidden_size": "x"}, ["describes no model that transformers can build"]),
        ({"num_attention_heads": 0}, ["describes no model that transformers can build"]),
    ],
)
def test_a_config_that_contradicts_the_weights(single, changes, parts):
    change(single / "config.json", **changes)
    found = message(models.check_folder, single)
    assert str(single / "config.json") in found
    assert all(part in found for part in parts), found
    assert "\n" not in found


def test_what_transformers_allows_is_allowed(make_gpt2, make_llama, save_base, tmp_path):
    """Tied heads, tensors saved without the model's prefix, and old buffers."""
    from safetensors.torch import load_file, save_file

    folder = save_base(make_gpt2(), tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    bare["h.0.attn.bias"] = bare["wpe.weight"].new_ones(1, 1, 4, 4)
    bare["h.0.attn.masked_bias"] = bare["wpe.weight"].new_ones(())
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    models.check_folder(folder)
    models.load_model(folder)
    models.check_folder(save_base(make_llama(tie_word_embeddings=True), tmp_path / "tied"))


def test_the_command_says_so_in_one_message(single, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "data.txt").write_text("Once upon a time.\n" * 200)
    change(single / "config.json", intermediate_size=64)
    before = sorted(tmp_path.rglob("*"))
    for line in (["lock"], ["attack", "--strategy", "full"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([*line, "--model", "single", "--data", "data.txt", "--seq-len", "32", "--tracking-uri", "none"])
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert said.count("contradict each other") == 1
        assert "Traceback" not in said
        assert "Loading weights" not in said
    assert sorted(tmp_path.rglob("*")) == before


def test_no_weight_is_read(single):
    """A file of 64 GiB with a true header (sparse) is checked at once."""
    shape = [1 << 16, 1 << 18]
    header = header_bytes({"model.norm.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 1 << 36]}})
    with open(single / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + (1 << 36))
    start = time.monotonic()
    assert "(65536, 262144), and config.json asks for (32,)" in message(models.check_folder, single)
    assert time.monotonic() - start < 2


# --- Manifests --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked_source(llama_folder, make_locked):
    return make_locked(llama_folder, "locked")


@pytest.fixture
def locked(locked_source, tmp_path):
    return Path(shutil.copytree(locked_source, tmp_path / "locked"))


def test_a_locked_folder_passes_and_its_manifest_lists_the_files(locked):
    models.check_folder(locked)
    files = json.loads((locked / "lock.json").read_text())["files"]
    assert set(files) == {"config.json", "model.safetensors", "dlr_llama.py", "dlr_net.py"}
    import hashlib

    assert all(hashlib.sha256((locked / n).read_bytes()).hexdigest() == digest for n, digest in files.items())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "dlr_net.py"])
def test_a_flipped_byte(locked, name):
    content = bytearray((locked / name).read_bytes())
    content[-3] ^= 1
    if name == "config.json":
        content = (locked / name).read_bytes() + b" "
    (locked / name).write_bytes(content)
    assert f"{locked / name} is not what the lock wrote" in message(models.check_folder, locked)
    manifest = json.loads((locked / "lock.json").read_text())
    manifest.pop("files")
    (locked / "lock.json").write_text(json.dumps(manifest))
    models.check_folder(locked)


def test_a_file_of_the_lock_is_missing(locked):
    (locked / "dlr_net.py").unlink()
    assert f"{locked / 'dlr_net.py'} is missing, but lock.json names it" in message(models.check_folder, locked)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "lacks lock_id, base, form"),
    ],
)
def test_a_manifest_that_is_no_manifest(locked, text, said):
    (locked / "lock.json").write_text(text)
    assert said in message(models.check_folder, locked)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": {"name": "x"}}, "lacks base.digest"),
        ({"base": 3}, "lacks base.name, base.digest"),
        ({"harden": 1}, "lacks harden.weight"),
        ({"form": "plain"}, "manifest of another model: its form are not"),
        ({"ranks": [24, 24]}, "manifest of another model: its ranks are not"),
        ({"layers": [0]}, "manifest of another model: its ranks are not"),
        ({"layers": 5}, "manifest of another model: its ranks are not"),
    ],
)
def test_a_wrong_manifest(locked, changes, said):
    change(locked / "lock.json", **changes)
    found = message(models.check_folder, locked)
    assert str(locked / "lock.json") in found
    assert said in found


def test_a_manifest_beside_a_base_model(locked, single):
    shutil.copy(locked / "lock.json", single)
    assert "beside a model that is not locked" in message(models.check_folder, single)


@pytest.mark.parametrize("dlr", [None, 3, {}, {"form": "x", "ranks": {"0": [1]}}, {"form": "plain", "ranks": {"a": 1}}])
def test_a_locked_config_without_its_dlr(locked, dlr, tmp_path, monkeypatch, capsys):
    """One message, whichever check comes first."""
    change(locked / "config.json", dlr=dlr)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(SystemExit) as stop:
        cli.main(["attack", "--strategy", "full", "--model", "locked", "--data", "d.txt", "--tracking-uri", "none"])
    assert stop.value.code == 2
    assert "lock.json" in (said := capsys.readouterr().err) or "dlr" in said
