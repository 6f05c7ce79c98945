"""Tiny models, tokenizers and folders that the tests share. Heavy imports stand inside the fixtures."""

import dataclasses
import os

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

WIDTH, INNER, LAYERS, LENGTH, VOCABULARY = 32, 48, 2, 64, 264
TEXT = "Once upon a time there was a small fox. It sat in the grass and saw the sun go down.\n"


def pytest_addoption(parser):
    """More examples of the fuzz tests, for a longer look."""
    parser.addoption("--fuzz-examples", type=int, default=200, help="examples of each fuzz test")


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer of 264 tokens."""
    from dlrscale.models import train_tokenizer

    return train_tokenizer([TEXT], VOCABULARY)


def _spread(model, seed):
    """Give biases values too: tests on zeros would see nothing."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture(scope="session")
def make_llama():
    """Factory of tiny Llamas (D 32, F 48, 2 layers); keywords change the configuration."""

    def make(seed=0, **changes):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        values = {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": LENGTH,
            "initializer_range": 0.15,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        }
        torch.manual_seed(seed)
        return _spread(LlamaForCausalLM(LlamaConfig(**(values | changes))), seed)

    return make


@pytest.fixture(scope="session")
def make_gpt2():
    """Factory of tiny GPT-2s (D 32, F 64, 2 layers, no dropout); keywords change the configuration."""

    def make(seed=0, **changes):
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        values = {
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_inner": 64,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": LENGTH,
            "initializer_range": 0.15,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        }
        torch.manual_seed(seed)
        return _spread(GPT2LMHeadModel(GPT2Config(**(values | changes))), seed)

    return make


# What the configurations of other families need, or call differently, beside the common sizes of `make_model`.
FAMILY_VALUES = {
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "phi": {},
    "phi3": {"num_key_value_heads": 2},
    "gpt_neox": {},
    "opt": {"ffn_dim": INNER, "init_std": 0.15, "dropout": 0.0},
    "falcon": {"ffn_hidden_size": INNER},
}


@pytest.fixture(scope="session")
def make_model(make_llama, make_gpt2):
    """Factory of a tiny model of any family (D 32, F 48 or GPT-2's 64); keywords change the configuration."""

    def make(family, seed=0, **changes):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        if family in ("llama", "gpt2"):
            return (make_llama if family == "llama" else make_gpt2)(seed, **changes)
        values = {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": LENGTH,
            "initializer_range": 0.15,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        }
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **(values | FAMILY_VALUES[family] | changes))
        return _spread(AutoModelForCausalLM.from_config(config), seed)

    return make


@pytest.fixture(scope="session")
def save_base(tokenizer):
    """Write a base model and the tokenizer as a Hugging Face folder; returns the folder."""

    def save(model, folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def llama_folder(make_llama, save_base, tmp_path_factory):
    """A folder with a tiny fp32 Llama."""
    return save_base(make_llama(), tmp_path_factory.mktemp("models") / "llama-tiny")


@pytest.fixture(scope="session")
def gpt2_folder(make_gpt2, save_base, tmp_path_factory):
    """A folder with a tiny fp32 GPT-2."""
    return save_base(make_gpt2(), tmp_path_factory.mktemp("models") / "gpt2-tiny")


@pytest.fixture(scope="session")
def lock_config():
    """Factory of lock configurations with places that nobody reads."""

    def make(**changes):
        from dlrscale.config import LockConfig

        values = {"model": "/nowhere", "data": "/nowhere", "out": "/nowhere", "depth": 4}
        return LockConfig(**(values | changes))

    return make


@pytest.fixture(scope="session")
def start_nets(lock_config):
    """The states of started DLR-Nets by layer, with b set: what a lock without training would export."""

    def start(base, scale=0.3, **changes):
        import copy

        from dlrscale import shapes, surgery

        model = copy.deepcopy(base)
        shape = shapes.model_shape(model.config.to_dict())
        changes.setdefault("form", "gated" if shape.family.gated else "plain")
        if shapes.FORMS[changes["form"]].start_on != shape.kind:
            changes.setdefault("start", "cold")
        switches = surgery.install(model, shape, lock_config(**changes))
        for switch in switches:
            switch.net.b.fill_(scale)
        return {s.layer: {k: v.detach().clone() for k, v in s.net.state_dict().items()} for s in switches}

    return start


@pytest.fixture(scope="session")
def make_locked(start_nets, tmp_path_factory):
    """Write a locked folder of a base folder, with a manifest; keywords are those of the lock."""

    def make(base_folder, name="locked", dtype="fp32", **changes):
        from dlrscale import export, models, shapes

        folder = tmp_path_factory.mktemp("locked") / name
        base = models.load_model(base_folder, dtype)
        gated = shapes.find_family(base.config.to_dict()).gated
        form = changes.setdefault("form", "gated" if gated else "plain")
        nets = start_nets(base, **changes)
        export.export_locked(base_folder, folder, dtype, form, nets, manifest(form, nets))
        return folder

    return make


def manifest(form, nets):
    """A manifest as `jobs.lock_manifest` builds it, with made-up figures."""
    some = next(iter(nets.values()))
    depth = sum(key.endswith("b_proj.weight") for key in some)
    return {
        "schema": 1,
        "lock_id": "0" * 64,
        "base": {"name": "base", "digest": "1" * 64},
        "form": form,
        "depth": depth,
        "ranks": [some[f"blocks.{k}.b_proj.weight"].shape[1] for k in range(depth)],
        "layers": sorted(nets),
        "coupling": 0.25,
        "b": {str(layer): 0.3 for layer in nets},
        "start": "warm",
        "harden": {"weight": 0.03, "target": 1.0},
        "param_ratio": 1.0,
        "recipe": {},
        "losses": {"base": 1.0, "locked": 1.1, "flat": 3.0},
        "layer_errors": {str(layer): 0.01 for layer in nets},
        "versions": {},
    }


class FakeEngine:
    """What the objectives see of `engine.Engine`, for one process and plain autograd.

    `gradients` holds, after `step`, the gradient of each parameter by name; the weights stay as they are.
    """

    stage, rank, world_size = 2, 0, 1

    def __init__(self, model, accumulation=1):
        import torch

        self.ds = self.module = model
        self.device = torch.device("cpu")
        self.accumulation = accumulation
        self.boundaries, self.gradients, self.inside, self.lr = [], {}, False, 0.0

    def backward(self, loss, scale):
        import torch

        with torch.enable_grad():  # as the engine does: the call may come from a visit inside no_grad
            (loss * scale / self.accumulation).backward()

    def boundary(self, last):
        self.boundaries.append(last)

    def set_lr(self, lr):
        self.lr = lr

    def barrier(self):
        pass

    def held(self):
        return {}

    def step(self):
        import torch

        self.gradients = {n: p.grad for n, p in self.module.named_parameters() if p.grad is not None}
        self.module.zero_grad(set_to_none=True)
        return float(torch.nn.utils.get_total_norm(list(self.gradients.values())))

    def sum_over_ranks(self, values):
        return values

    def many_backwards(self):
        import contextlib

        return contextlib.nullcontext()


@pytest.fixture(scope="session")
def fake_engine():
    """The class `FakeEngine`."""
    return FakeEngine


@pytest.fixture(scope="session")
def reference_net():
    """The recurrence of a DLR-Net in float64: d_{k+1} = d_k + B_k s(A_k n(x + b d_k))."""
    return _reference_net


def _reference_net(state, form, x, activation):
    import torch

    values = {k: v.double() for k, v in state.items()}
    b = values["b"]
    d = torch.zeros_like(x, dtype=torch.float64)
    for k in range(sum(key.endswith("b_proj.weight") for key in values)):
        a = values[f"blocks.{k}.a_proj.weight"]
        u = x.double() + b * d
        if form == "prenorm":
            u = u / (u.square().mean(-1, keepdim=True).sqrt() + 1e-6)
        hidden = u @ a.T
        if f"blocks.{k}.a_proj.bias" in values:
            hidden = hidden + values[f"blocks.{k}.a_proj.bias"]
        if form == "gated":
            rank = a.shape[0] // 2
            inner = activation(hidden[..., :rank]) * hidden[..., rank:]
        else:
            inner = activation(hidden)
        d = d + inner @ values[f"blocks.{k}.b_proj.weight"].T
    return d + values["bias"] if "bias" in values else d


@dataclasses.dataclass
class Batch:
    """A step's batch as the objectives read it (`data.StepBatch`)."""

    micro_batches: list
    tokens: int
    label_tokens: int
    processed_tokens: int = 0


@pytest.fixture(scope="session")
def step_batch():
    """Make a step's batch from (ids, lengths) pairs: right-padded rows, labels on all real tokens."""

    def make(*micros):
        import torch

        found, tokens, labels_count, processed = [], 0, 0, 0
        for ids, lengths in micros:
            mask = (torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
            labels = torch.where(mask.bool(), ids, -100)
            found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
            tokens += int(mask.sum())
            labels_count += int((labels[:, 1:] != -100).sum())
            processed += ids.numel()
        return Batch(found, tokens, labels_count, processed)

    return make


@pytest.fixture
def no_rank_starts(monkeypatch):
    """A command on the CPU, outside of a launch; it fails where it would start ranks."""
    from dlrscale import launcher

    def start(*args):
        raise AssertionError("a rank would have started")

    monkeypatch.setattr(launcher, "run", start)
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
