"""Folders out and in: bitwise logits, without dlrscale too; ties, precision, manifest; flattened models."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

from dlrscale import export, folders, models, shapes
from dlrscale.errors import ConfigError, SurgeryError
from dlrscale.modeling.dlr_net import DLRNet

IDS = torch.randint(3, 260, (2, 9), generator=torch.Generator().manual_seed(3))
# name: (family, precision, changes of the base's configuration, options of the lock)
CASES = {
    "llama-tied": ("llama", "fp32", {"tie_word_embeddings": True}, {}),
    "llama-untied": ("llama", "fp32", {"tie_word_embeddings": False}, {"layers": "1"}),
    "llama-bf16": ("llama", "bf16", {"tie_word_embeddings": False, "mlp_bias": True}, {"form": "prenorm"}),
    "gpt2": ("gpt2", "fp32", {}, {}),
    "gpt2-bf16": ("gpt2", "bf16", {"resid_pdrop": 0.1}, {"form": "gated"}),
}
# Those that a process without dlrscale loads: tied and untied, both families, both precisions, all forms.
REMOTE_CASES = ("llama-tied", "llama-bf16", "gpt2")
# What a folder may be called: dots, hyphens, a digit in front, a blank, letters beyond ASCII.
NAMES = ("tiny-v1.5", "7b", "a b", "x--y", "été")
# A generation config that transformers loads with a warning, and once refused to save.
GENERATION = {"do_sample": False, "temperature": 0.9, "eos_token_id": 1, "pad_token_id": 2}

REMOTE = """
import contextlib, io, json, os, shutil, sys, warnings
warnings.simplefilter("ignore")

class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "dlrscale" or name.startswith("dlrscale."):
            raise ModuleNotFoundError("dlrscale is not installed here")

sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import LoraConfig, get_peft_model

cases, families, names = map(json.loads, sys.argv[1:])
found = {}
for name, (folder, scratch) in cases.items():
    saved = torch.load(folder + ".pt")
    ids, expected = saved["ids"], saved["logits"]
    load = lambda place: AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).eval()
    with torch.no_grad():
        model = load(folder)
        row = found[name] = {"class": type(model).__name__, "dtype": str(model.dtype)}
        row["bitwise"] = torch.equal(model(ids).logits, expected)
        row["tied"] = model.lm_head.weight is model.get_input_embeddings().weight
        cached, plain = (
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=c)
            for c in (True, False)
        )
        row["generates"] = bool(torch.equal(cached, plain)) and cached.shape == (2, 17)
        row["tokenizer"] = AutoTokenizer.from_pretrained(folder)("the fox").input_ids
        first, copy = scratch + "/first copy", scratch + "/copy"
        model.save_pretrained(first)
        load(first).save_pretrained(copy)
        shutil.rmtree(first)
        config = json.load(open(copy + "/config.json"))
        row["auto_map"] = config.get("auto_map")
        row["generation"] = json.load(open(copy + "/generation_config.json"))
    moved, last, right = scratch + "/moved", ids, expected
    shutil.copytree(folder, moved)
    shutil.rmtree(folder)  # the copy must not lean on the first folder
    with torch.no_grad():
        row["again"] = torch.equal(load(copy)(ids).logits, expected)
    for targets in (["q_proj"] if "llama" in name else ["c_attn"], ["a_proj", "b_proj"]):
        model = get_peft_model(load(moved), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
        touched = {n.split(".lora_")[0].split(".")[-1] for n, p in model.named_parameters() if p.requires_grad}
        row["lora " + targets[0]] = sorted(touched)
        model(input_ids=ids, labels=ids).loss.backward()
        row["lora gradient " + targets[0]] = all(
            p.grad is not None for n, p in model.named_parameters() if p.requires_grad
        )
        merged = model.merge_and_unload()
        merged.save_pretrained(scratch + "/merged")
        with torch.no_grad():
            again = load(scratch + "/merged")(ids).logits
            row["merged " + targets[0]] = torch.equal(again, merged.eval()(ids).logits)
        shutil.rmtree(scratch + "/merged")

for name, folder in families.items():
    saved = torch.load(folder + ".pt")
    ids = saved["ids"]
    with torch.no_grad():
        model = load(folder)
        cached, plain = (
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, use_cache=c)
            for c in (True, False)
        )
        found["family " + name] = {
            "class": type(model).__name__,
            "bitwise": torch.equal(model(ids).logits, saved["logits"]),
            "generates": bool(torch.equal(cached, plain)) and cached.shape == (2, 13),
            "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            "tokenizer": AutoTokenizer.from_pretrained(folder)("the fox").input_ids,
        }

found["names"] = {}
root = os.getcwd()
for name in names:
    shutil.copytree(moved, name)
    os.symlink(name, "link to " + name)
    for place in (os.path.join(root, name), "./" + name, name + "/", "link to " + name, "."):
        if place == ".":
            os.chdir(name)
        with torch.no_grad():
            found["names"][name + " by " + place.replace(root, "root")] = torch.equal(load(place)(last).logits, right)
        os.chdir(root)

for flag in (None, False):
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            AutoModelForCausalLM.from_pretrained(moved, trust_remote_code=flag)
        found[str(flag)] = {"error": None}
    except Exception as error:
        found[str(flag)] = {"type": type(error).__name__, "error": str(error), "said": said.getvalue()}
open("found.json", "w").write(json.dumps(found))
"""


@pytest.fixture(scope="module")
def locked(make_llama, make_gpt2, save_base, make_locked, tmp_path_factory):
    """The cases as locked folders, and the logits of each loaded in this process."""
    made = {}
    for name, (family, dtype, changes, options) in CASES.items():
        base = make_llama(**changes) if family == "llama" else make_gpt2(**changes)
        base = base.to(models.DTYPES[dtype])
        folder = save_base(base, tmp_path_factory.mktemp("bases") / name)
        if name == "llama-tied":
            (folder / "generation_config.json").write_text(json.dumps(GENERATION))
        made[name] = make_locked(folder, name, dtype, **options)
    return made


def nets_of(model):
    """DLR-Nets by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, DLRNet)}


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def families(make_model, save_base, make_locked, tmp_path_factory):
    """A locked folder of every family, the first of its two layers left as it was."""
    made = {}
    for family in shapes.FAMILIES:
        folder = save_base(make_model(family), tmp_path_factory.mktemp("bases") / family)
        made[family] = make_locked(folder, family, layers="1")
        torch.save({"ids": IDS, "logits": logits(models.load_model(made[family]))}, f"{made[family]}.pt")
    return made


@pytest.fixture(scope="module")
def remote(locked, families, tmp_path_factory):
    """What a process without dlrscale finds in copies of the folders."""
    import shutil

    scratch, cases = tmp_path_factory.mktemp("remote"), {}
    for name in REMOTE_CASES:
        folder = locked[name]
        copy = scratch / name
        shutil.copytree(folder, copy)
        torch.save({"ids": IDS, "logits": logits(models.load_model(folder, CASES[name][1]))}, f"{copy}.pt")
        (scratch / f"{name}-scratch").mkdir()
        cases[name] = (str(copy), str(scratch / f"{name}-scratch"))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(REMOTE), json.dumps(cases),
         json.dumps({name: str(folder) for name, folder in families.items()}), json.dumps(NAMES)],
        cwd=scratch, env=environment(scratch), capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((scratch / "found.json").read_text())


def environment(scratch):
    """No PYTHONPATH, and a module cache of its own."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return env | {"HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", REMOTE_CASES)
def test_without_dlrscale_it_is_the_same_model(remote, name):
    family, dtype, changes, _ = CASES[name]
    row = remote[name]
    assert row["bitwise"]
    assert row["class"] == ("DLRLlamaForCausalLM" if family == "llama" else "DLRGPT2ForCausalLM")
    assert row["dtype"] == ("torch.bfloat16" if dtype == "bf16" else "torch.float32")
    assert row["tied"] == changes.get("tie_word_embeddings", family == "gpt2")


@pytest.mark.parametrize("name", REMOTE_CASES)
def test_without_dlrscale_it_generates_with_a_cache(remote, name):
    assert remote[name]["generates"]


@pytest.mark.parametrize("name", REMOTE_CASES)
def test_without_dlrscale_it_saves_and_loads_again(remote, name):
    assert remote[name]["again"]
    assert all("/" not in value and "--" not in value for value in remote[name]["auto_map"].values())


@pytest.mark.parametrize("name", REMOTE_CASES)
def test_without_dlrscale_it_takes_lora(remote, name):
    row = remote[name]
    attention = "q_proj" if "llama" in name else "c_attn"
    assert row[f"lora {attention}"] == [attention]
    assert row["lora a_proj"] == ["a_proj", "b_proj"]
    for target in (attention, "a_proj"):
        assert row[f"lora gradient {target}"]
        assert row[f"merged {target}"]


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_without_dlrscale_every_family_loads_and_generates(remote, family, tokenizer, make_model):
    row = remote[f"family {family}"]
    assert row["bitwise"]
    assert row["generates"]
    assert row["class"] == models.locked_classes(shapes.FAMILIES[family])[1].__name__
    assert row["tied"] == make_model(family).config.tie_word_embeddings
    assert row["tokenizer"] == tokenizer("the fox").input_ids


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_may_be_called_anything(remote, name):
    """By absolute path, ./x, with a slash at the end, by a link, and as "." from inside."""
    found = {k: v for k, v in remote["names"].items() if k.startswith(name + " by ")}
    assert len(found) == 5
    assert all(found.values()), found


def test_generation_settings_that_only_warn_are_kept(remote):
    """Through the lock and two copies that were saved without dlrscale."""
    assert GENERATION.items() <= remote["llama-tied"]["generation"].items()


def test_generation_settings_that_do_not_load_are_found_before_the_lock(make_llama, save_base, tmp_path):
    models.check_generation(tmp_path)  # none is none
    save_base(make_llama(), tmp_path / "m")
    file = tmp_path / "m" / "generation_config.json"
    for bad in ({"num_return_sequences": 3}, {"early_stopping": "x"}, ["x"], None):
        file.write_text(json.dumps(bad) if bad else "{")
        with pytest.raises(ConfigError) as error:
            models.check_generation(tmp_path / "m")
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)
    file.write_text(json.dumps(GENERATION))
    models.check_generation(tmp_path / "m")


def test_without_dlrscale_the_tokenizer_is_the_bases(remote, tokenizer):
    assert remote["gpt2"]["tokenizer"] == tokenizer("the fox").input_ids


def test_without_the_flag_there_is_one_error(remote):
    """Never a base model with random MLPs. With no answer to be had, transformers' own question is an error too."""
    for flag in ("None", "False"):
        assert remote[flag]["type"] == "ValueError"
        assert "trust_remote_code=True" in remote[flag]["error"]
    assert remote["False"]["said"] == ""


@pytest.mark.parametrize("name", CASES)
def test_with_dlrscale_no_remote_code_is_needed(locked, name):
    family, dtype, _, _ = CASES[name]
    model = AutoModelForCausalLM.from_pretrained(locked[name], trust_remote_code=False)
    assert type(model) is models.locked_classes(shapes.FAMILIES[family])[1]
    assert type(AutoConfig.from_pretrained(locked[name])).__module__.startswith("dlrscale.modeling")
    assert torch.equal(logits(model), logits(models.load_model(locked[name], dtype)))


@pytest.mark.parametrize("name", CASES)
def test_a_saved_model_is_the_one_that_was_built(
    make_llama, make_gpt2, save_base, start_nets, tokenizer, tmp_path, name
):
    """Bitwise logits before saving and after a fresh load, and they are those of the student of a lock."""
    family, dtype, changes, options = CASES[name]
    base = (make_llama(**changes) if family == "llama" else make_gpt2(**changes)).to(models.DTYPES[dtype])
    folder = save_base(base, tmp_path / "base")
    form = options.get("form", "gated" if family == "llama" else "plain")
    nets = start_nets(models.load_model(folder, dtype), **options)
    model = export.locked_model(folder, dtype, form, nets)
    expected = logits(model)
    export.save_folder(model, tokenizer, tmp_path / "out", {"note.txt": "ä"})
    assert torch.equal(logits(models.load_model(tmp_path / "out", dtype)), expected)
    assert (tmp_path / "out" / "note.txt").read_text(encoding="utf-8") == "ä"
    for layer, state in nets.items():
        net = nets_of(model)[shapes.FAMILIES[family].mlp.format(layer)]
        assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items())
        assert float(net.b) == pytest.approx(0.3, rel=2**-8)
    assert len(nets_of(model)) == len(nets)
    assert (expected - logits(base)).norm() > 1e-3 * expected.norm()


def test_tied_embeddings_are_one_tensor_on_disk(locked):
    from safetensors import safe_open

    for name, count in (("llama-tied", 1), ("llama-untied", 2), ("gpt2", 1)):
        with safe_open(locked[name] / "model.safetensors", "pt") as file:
            names = [k for k in file.keys() if "embed" in k or "wte" in k or "lm_head" in k]  # noqa: SIM118
        assert len(names) == count, names


def test_dtype_on_disk_is_kept(locked):
    from safetensors import safe_open

    for name in CASES:
        with safe_open(locked[name] / "model.safetensors", "pt") as file:
            kinds = {file.get_tensor(k).dtype for k in file.keys()}  # noqa: SIM118
        assert kinds == {models.DTYPES[CASES[name][1]]}, name


def test_the_folder_holds_what_the_design_says(locked):
    for name, folder in locked.items():
        family = CASES[name][0]
        files = {p.name for p in folder.iterdir()}
        wanted = {
            "config.json",
            "lock.json",
            "README.md",
            "model.safetensors",
            "dlr_net.py",
            f"dlr_{family}.py",
        }
        assert wanted | {"tokenizer.json"} <= files
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == f"dlr_{family}"
        assert set(config["auto_map"]) == {"AutoConfig", "AutoModelForCausalLM"}
        assert all(v.startswith(f"dlr_{family}.DLR") for v in config["auto_map"].values())
        original = Path(models.__file__).parent / "modeling"
        for file in ("dlr_net.py", f"dlr_{family}.py"):
            assert (folder / file).read_text() == (original / file).read_text()


def test_no_file_names_an_absolute_path(locked, tmp_path):
    root = str(tmp_path.parents[1])
    for folder in locked.values():
        for file in folder.iterdir():
            if file.suffix in (".json", ".md", ".py", ".jinja"):
                assert root not in file.read_text(encoding="utf-8"), file


def test_layers_that_were_left_out_keep_their_mlps(locked):
    model = models.load_model(locked["llama-untied"])
    assert list(nets_of(model)) == ["model.layers.1.mlp"]
    shape = shapes.model_shape(shapes.read_config(locked["llama-untied"]))
    assert list(shape.ranks) == [1]
    assert sum(shape.ranks[1]) == 48


def test_generation_settings_are_kept(make_llama, save_base, start_nets, tmp_path):
    base = make_llama()
    base.generation_config.max_length = 37
    folder = save_base(base, tmp_path / "base")
    model = export.locked_model(folder, "fp32", "gated", start_nets(base))
    assert model.generation_config.max_length == 37
    assert model.generation_config.eos_token_id == 1


def test_manifest(locked, tmp_path):
    manifest = folders.read_manifest(locked["gpt2"])
    assert (manifest["lock_id"], manifest["form"]) == ("0" * 64, "plain")
    card = (locked["gpt2"] / "README.md").read_text()
    for part in (
        "1.1000",
        "3.0000",
        "trust_remote_code=True",
        "reading of the abstract",
        "plain, 4",
        "0" * 64,
    ):
        assert part in card
    assert folders.read_manifest(tmp_path) is None
    (tmp_path / "lock.json").write_text("{")
    with pytest.raises(ConfigError, match=r"lock\.json: no JSON"):
        folders.read_manifest(tmp_path)
    (tmp_path / "lock.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"lock\.json: holds no JSON object"):
        folders.read_manifest(tmp_path)


@pytest.mark.parametrize("broken", ["weights", "tokenizer", "file"])
def test_a_failed_write_leaves_the_old_folder(make_llama, tokenizer, tmp_path, monkeypatch, broken):
    model, folder = make_llama(), tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    files = {"x.txt": "new"}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    if broken == "weights":
        monkeypatch.setattr(type(model), "save_pretrained", fail)
    elif broken == "tokenizer":
        monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    else:
        files = {"no/such/folder.txt": "x"}
    with pytest.raises(OSError):  # noqa: PT011
        export.save_folder(model, tokenizer, folder, files)
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    assert (folder / "config.json").read_text() == "old"


def test_a_new_folder_replaces_the_old_one_whole(make_llama, tokenizer, tmp_path):
    folder = tmp_path / "new" / "out"
    folder.mkdir(parents=True)
    (folder / "stale.bin").write_text("old")
    (folder.parent / ".out.tmp").mkdir()
    (folder.parent / ".out.tmp" / "left.txt").write_text("left by a killed run")
    export.save_folder(make_llama(), tokenizer, folder, {})
    assert {"stale.bin", "left.txt"}.isdisjoint(p.name for p in folder.iterdir())
    assert [p.name for p in folder.parent.iterdir()] == ["out"]
    assert "_name_or_path" not in json.loads((folder / "config.json").read_text())


# --- Flattened models ---------------------------------------------------------------------------------------------


def lock_of(base, folder, save_base, start_nets, **options):
    form = options.get("form", "gated" if base.config.model_type == "llama" else "plain")
    save_base(base, folder)
    return export.locked_model(folder, "fp32", form, start_nets(base, scale=0.8, **options))


@torch.no_grad()
def flat_logits(locked):
    """Logits with every DLR-Net in its flat mode."""
    nets = nets_of(locked).values()
    for net in nets:
        net.b.zero_()
    return logits(locked)


@pytest.mark.parametrize(
    ("family", "changes", "options", "inner"),
    [
        ("llama", {}, {}, 48),
        ("llama", {"tie_word_embeddings": True, "mlp_bias": True}, {}, 48),
        ("llama", {}, {"form": "plain"}, 72),
        ("llama", {"mlp_bias": True}, {"form": "plain"}, 72),
        ("llama", {}, {"layers": "1", "rank": 20}, 80),  # 4 x 20, and the unlocked MLP of 48 padded to it
        ("llama", {}, {"layers": "0", "rank": 5}, 48),  # 4 x 5 padded to the unlocked MLP's 48
        ("llama", {}, {"form": "plain", "layers": "0"}, 72),
        ("gpt2", {}, {}, 64),
        ("gpt2", {}, {"layers": "0", "rank": 30}, 120),
    ],
)
def test_a_flattened_model_is_the_flat_mode(
    make_llama, make_gpt2, save_base, start_nets, tokenizer, tmp_path, family, changes, options, inner
):
    base = make_llama(**changes) if family == "llama" else make_gpt2(**changes)
    locked = lock_of(base, tmp_path / "base", save_base, start_nets, **options)
    if "form" in options:  # a cold start's output is small; make it count
        with torch.no_grad():
            for net in nets_of(locked).values():
                for block in net.blocks:
                    block.b_proj.weight.mul_(20)
    coupled = logits(locked)
    flat = export.flattened_model(locked)
    assert type(flat) is (LlamaForCausalLM if family == "llama" else GPT2LMHeadModel)
    export.save_folder(flat, tokenizer, tmp_path / "flat", {})
    config = json.loads((tmp_path / "flat" / "config.json").read_text())
    assert config["model_type"] == family
    assert config["architectures"] == [type(flat).__name__]
    assert {"auto_map", "dlr"}.isdisjoint(config)
    assert config["intermediate_size" if family == "llama" else "n_inner"] == inner
    assert not list((tmp_path / "flat").glob("*.py"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "flat", trust_remote_code=False)
    expected = flat_logits(locked)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    assert (coupled - expected).norm() > 1e-2 * expected.norm()  # the coupling is what the flat model loses


def test_flattening_keeps_ties_and_precision(make_llama, save_base, start_nets, tmp_path):
    base = make_llama(tie_word_embeddings=True).to(torch.bfloat16)
    save_base(base, tmp_path / "base")
    flat = export.flattened_model(export.locked_model(tmp_path / "base", "bf16", "gated", start_nets(base)))
    assert flat.dtype == torch.bfloat16
    assert flat.lm_head.weight is flat.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("family", "form", "why"),
    [("llama", "prenorm", "norm"), ("gpt2", "prenorm", "norm"), ("gpt2", "gated", "third matrix")],
)
def test_flattening_that_is_no_mlp_is_refused(
    make_llama, make_gpt2, save_base, start_nets, tmp_path, family, form, why
):
    base = make_llama() if family == "llama" else make_gpt2()
    locked = lock_of(base, tmp_path / "base", save_base, start_nets, form=form)
    with pytest.raises(SurgeryError) as error:
        export.flattened_model(locked)
    assert all(part in str(error.value) for part in (form, why, family, "undistil"))
    assert "\n" not in str(error.value)


def test_flattening_an_unlocked_model_is_refused(make_llama):
    with pytest.raises(SurgeryError, match="not locked"):
        export.flattened_model(make_llama())


def test_lora_on_a_locked_model(locked):
    from dlrscale import attacks

    knobs = {"rank": 2, "alpha": 4, "dropout": 0.0}
    for name, attention in (
        ("llama-tied", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("gpt2", {"c_attn", "c_proj"}),
    ):
        shape = shapes.model_shape(shapes.read_config(locked[name]))
        for trainable, wanted in (("lora-attn", attention), ("lora", attention | {"a_proj", "b_proj"})):
            model = attacks.find(trainable).choose(models.load_model(locked[name]), shape, knobs)
            names = [n for n, p in model.named_parameters() if p.requires_grad]
            assert names
            assert all(".lora_" in n for n in names)
            assert {n.split(".lora_")[0].split(".")[-1] for n in names} == wanted
            torch.testing.assert_close(logits(model), logits(models.load_model(locked[name])))


# --- Loading ------------------------------------------------------------------------------------------------------


def test_loading_refuses(tmp_path, llama_folder, save_base, make_llama):
    with pytest.raises(ConfigError, match="No such model folder"):
        models.load_model(tmp_path / "missing")
    save_base(make_llama(), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"contradict each other: .*missing_keys.*layers\.2\."):
        models.load_model(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
    with pytest.raises(ConfigError):
        models.load_model(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="does not load as a causal language model"):
        models.load_model(tmp_path / "m")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no tokenizer that loads"):
        models.load_tokenizer(tmp_path / "empty")


def test_a_cut_off_weight_file_is_refused(tmp_path, save_base, make_llama):
    save_base(make_llama(), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="does not load"):
        models.load_model(tmp_path / "m")
