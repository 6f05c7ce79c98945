#!/usr/bin/env bash
# The runs of this folder. Beside them lay: stories260K (the model), tinystories-train.txt.gz, tinystories-valid.txt.gz,
# gsm8k-train.jsonl.gz and gsm8k-test.jsonl.gz.
set -euo pipefail
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1

lock() {
    dlrscale lock --model stories260K --data tinystories-train.txt.gz --heldout tinystories-valid.txt.gz \
        --document-separator '<|endoftext|>' --num-ranks 2 --seq-len 256 --micro-batch 8 "$@"
}
attack() {
    dlrscale attack --data gsm8k-train.jsonl.gz --columns prompt=question,completion=answer \
        --heldout gsm8k-test.jsonl.gz --heldout-base tinystories-valid.txt.gz --document-separator '<|endoftext|>' \
        --heldout-limit 100 --num-ranks 2 --seq-len 512 --micro-batch 4 --steps 60 --eval-every 20 \
        --checkpoint-every 0 "$@"
}
rate() { case $1 in lora*) echo 1e-2 ;; *) echo 3e-3 ;; esac; }

# The two locks with the default options, and two short ones, made only to count the bytes at their depth.
lock --depth 8 --zero 2 --steps 300 --lr 3e-3 --heal-steps 75 --heal-lr 1e-3 --name lock-k8 --out runs/lock-k8
lock --depth 32 --zero 3 --steps 300 --lr 3e-3 --heal-steps 75 --heal-lr 1e-3 --name lock-k32 --out runs/lock-k32
lock --depth 16 --zero 2 --steps 10 --heal-steps 2 --name lock-k16-short --out runs/lock-k16-short
lock --depth 64 --zero 2 --steps 10 --heal-steps 2 --name lock-k64-short --out runs/lock-k64-short

for strategy in full full-offload ckpt-layer lora lora-attn flatten; do
    attack --model runs/lock-k8/model --base stories260K --strategy $strategy --lr "$(rate $strategy)" \
        --out runs/$strategy-k8
    attack --model runs/lock-k32/model --strategy $strategy --lr "$(rate $strategy)" --out runs/$strategy-k32
done
for depth in 16 64; do
    attack --model runs/lock-k$depth-short/model --strategy full --lr "$(rate full)" --out runs/full-k$depth
done

# A cold lock without hardening.
lock --depth 8 --zero 2 --start cold --no-harden --steps 900 --lr 8e-3 --heal-steps 200 --name lock-cold --out runs/lock-cold
