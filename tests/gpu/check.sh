#!/usr/bin/env bash
# The GPU checks in one call: the tests of this folder, then a random-weight Llama of LAYERS layers at 7B width,
# locked for a few steps and attacked on both sides by every strategy, with and without offload and at two
# micro-batches; at the end a table of the predicted against the allocator's peak, $OUT/plan.md. Memory and speed do
# not depend on the weights' values. Never run so far: no GPU was at hand when it was written.
# Usage: OUT=some-folder LAYERS=32 bash tests/gpu/check.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-results/gpu-check}
LAYERS=${LAYERS:-8}
mkdir -p "$OUT"
python -m pytest tests/gpu | tee "$OUT/tests.txt"
python - "$OUT/base" "$LAYERS" <<'PY'
import sys

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dlrscale.cli.demo import EMBEDDED_MODEL

tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
config = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
    num_hidden_layers=int(sys.argv[2]), max_position_embeddings=4096, dtype="bfloat16",
)
torch.set_default_dtype(torch.bfloat16)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
PY
common=(--seq-len 1024 --num-ranks 1 --heldout-limit 4 --checkpoint-every 0 --force)
dlrscale lock --model "$OUT/base" --data embedded:stdlib --depth 64 --steps 4 --heal-steps 2 \
    --zero 3 --offload-optimizer --micro-batch 1 "${common[@]}" --out "$OUT/lock"
attack() { # name, then options
    local name=$1
    shift
    dlrscale attack --model "$OUT/lock/model" --base "$OUT/base" --data embedded:topics --steps 6 \
        "${common[@]}" "$@" --out "$OUT/$name"
}
for strategy in full ckpt-layer lora lora-attn flatten full-offload; do
    attack "$strategy" --strategy "$strategy" --zero 3 --micro-batch 1
done
attack ckpt-layer-offload --strategy ckpt-layer --zero 3 --offload-optimizer --micro-batch 1
attack ckpt-layer-zero2 --strategy ckpt-layer --zero 2 --micro-batch 1
attack ckpt-layer-batch4 --strategy ckpt-layer --zero 3 --micro-batch 4
dlrscale report "$OUT"
python tests/gpu/plans.py "$OUT" | tee "$OUT/plan.md"
