"""Records as locks and attacks leave them, with numbers that can be checked by hand."""

import hashlib

from dlrscale.record import make_record

LOCK_ID = "lock8" + "0" * 59
PASSED = {"gradient": {"holds": True, "cosine": 0.99999}, "engaged": {"holds": True}}
D, F, N = 64, 172, 4


def lock_record(lock_id, depth=8, seed=0, locked=1.46, **changes):
    metrics = {
        "loss/heldout_base_model": 1.425, "loss/heldout_locked": locked, "loss/heldout_flat": 3.125,
        "lock/error_layer_0": 0.02, "lock/error_layer_1": 0.04, "time/total_s": 93.0,
        "tokens/distil": 1_200_000,
        "tokens/heal": 300_000, "params/ratio": 1.001,
    }  # fmt: skip
    config = {
        "model": "base",
        "form": "gated",
        "depth": depth,
        "coupling": 0.25,
        "start": "warm",
        "harden": True,
    }
    return make_record(
        id=lock_id, kind="lock", name="lock", outcome="ok", config=config | {"model_digest": "m1"}, seed=seed,
        metrics=metrics, started="2026-11-25T10:00:00Z", versions={"torch": "2.13"}, device={"type": "cpu"},
        git={"commit": "f" * 40, "dirty": True},
    ) | changes  # fmt: skip


def axes_of(strategy):
    levers = {"activation_checkpointing": "none" if strategy == "full" else "layer"}
    levers |= {"activation_storage": "int8"} if strategy == "act-int8" else {}
    return {
        "transform": strategy if strategy in ("flatten", "undistil") else "none", "gradient": "backprop",
        "trainable": "lora" if strategy == "lora" else "all", "levers": levers, "knobs": {},
    }  # fmt: skip


def attack(side, strategy, lock_id=None, depth=8, outcome="ok", seed=0, metrics=None, **settings):
    """Numbers follow the saved-bytes formulas in fp32: D + 4 F per layer on the base, K D + 4 F locked."""
    checkpointed = strategy != "full"
    mlp = 4 * N * ((depth * D if side == "locked" else D) + 4 * F)
    values = {
        "memory/saved_bytes_per_token": 4 * N * D if checkpointed else mlp + 20_000,
        "memory/saved_mlp_bytes_per_token": 0 if checkpointed else mlp,
        "memory/saved_mlp_bytes_per_token_formula": 0 if checkpointed else mlp,
        "memory/host_peak_rss_bytes": 2**30 * (1.5 if side == "locked" else 1.0),
        "time/step_s": 0.3 if side == "locked" else 0.2,
        "time/forward_s": 0.06 if side == "locked" else 0.05,
        "time/backward_s": 0.2 if side == "locked" else 0.1,
        "throughput/tokens_per_s": 2000 if side == "locked" else 3000,
        "loss/heldout_task_start": 3.2 if side == "locked" else 3.1,
        "loss/heldout_task": 2.5 if side == "locked" else 2.0,
        "loss/heldout_base": 1.9,
    }
    manifest = {"form": "gated", "depth": depth, "coupling": 0.25, "start": "warm", "harden": True}
    config = {
        "model": side, "data": "d", "lr": 1e-3, "steps": 20, "seq_len": 64, "micro_batch": 4,
        "global_batch": 4,
        "axes": axes_of(strategy), "lock_id": lock_id, "num_ranks": 1,
        "lock": manifest | {"base_model_digest": "m1"} if side == "locked" else None,
        "out": f"/somewhere/{side}-{strategy}-{depth}-{seed}",
        "model_digest": "m1" if side == "base" else f"l{depth}",
    } | settings  # fmt: skip
    name = hashlib.sha256(f"{side}{depth}{seed}{config}".encode()).hexdigest()
    return make_record(
        id=name, kind="attack", side=side, strategy=strategy, outcome=outcome,
        seed=seed, config=config, metrics=values | (metrics or {}), started="2026-11-25T11:00:00Z",
        device={"type": "cpu"},
        versions={"torch": "2.13"}, phases={"load": {"seconds": 1.0, "host_peak_rss_bytes": 2**29}},
    )  # fmt: skip
