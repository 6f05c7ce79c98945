#!/usr/bin/env bash
# The runs of this folder, from a checkout with the package installed. BASE is a folder with stories260K.
set -euo pipefail
BASE=$1
OUT=results/plan
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
mkdir -p "$OUT"
# ds_configs/ with buckets of 100,000 elements: DeepSpeed's usual 5e8 would hide all else on so small a model.
python - "$OUT" <<'PY'
import json, sys
for zero in (0, 2, 3):
    file = json.load(open(f"ds_configs/zero{zero}.json"))
    section = file["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        if key in section:
            section[key] = 100_000
    if zero == 3:
        section["stage3_param_persistence_threshold"] = 0
    json.dump(file, open(f"{sys.argv[1]}/zero{zero}.json", "w"))
PY
for depth in 8 64; do # made only to be measured
    dlrscale lock --model "$BASE" --data embedded:topics --depth $depth --seq-len 128 --steps 2 --heal-steps 0 \
        --num-ranks 1 --tracking-uri none --heldout-limit 4 --out "$OUT/lock-$depth"
done
measure() { # name, then options
    local name=$1
    shift
    dlrscale measure "$@" --steps 3 --inference-batches '' --tracking-uri none --num-ranks 2 --micro-batch 4 \
        --seq-len 256 --out "$OUT/$name"
}
for side in base 8 64; do
    model=$BASE
    [ $side = base ] || model=$OUT/lock-$side/model
    measure $side-full-z2 --model "$model" --strategy full --deepspeed_config "$OUT/zero2.json"
    measure $side-ckpt-z0 --model "$model" --strategy ckpt-layer --deepspeed_config "$OUT/zero0.json"
    measure $side-ckpt-z2 --model "$model" --strategy ckpt-layer --deepspeed_config "$OUT/zero2.json"
    measure $side-ckpt-z3-bf16 --model "$model" --strategy ckpt-layer --dtype bf16 --deepspeed_config "$OUT/zero3.json"
    measure $side-lora-z2-bf16 --model "$model" --strategy lora --dtype bf16 --deepspeed_config "$OUT/zero2.json"
done
