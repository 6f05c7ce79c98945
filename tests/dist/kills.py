"""Kill a job at random moments, again and again, and see that it ends as if nothing had been.

    python tests/dist/kills.py --kills 20 --seed 0

Locks a tiny model once in peace. Then it starts the same lock in another folder and sends SIGKILL, SIGTERM or SIGINT
to the command, DeepSpeed's launcher, a rank, or all of them, at a random moment; every process must be gone within 60 s and nothing half-written be there. The same command is started again until it has been hit as often
as asked for, and then runs to its end: its step rows and weights must be those of the peaceful run.
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
import time
from pathlib import Path

from commands import (
    GONE_S,
    LOCK,
    SIGNALS,
    TARGETS,
    all_gone,
    check_end,
    check_nothing_is_half_written,
    hit,
    rows,
    start,
    write_texts,
)


def make_place(folder: Path) -> Path:
    """A folder with a tiny base model, its tokenizer and text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dlrscale.models import train_tokenizer

    write_texts(folder)
    tokenizer = train_tokenizer([(folder / "text.txt").read_text()], 264)
    config = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


def main() -> None:
    """Do it, and print one line per kill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        place = make_place(Path(name))
        line = ("lock", "--model", "base", "--data", "text.txt", *LOCK, "--steps", "150", "--heal-steps", "50")
        begun = time.monotonic()
        assert start(place, *line, "--out", "peace").wait(600) == 0, (place / "said.log").read_text()
        span = time.monotonic() - begun
        done, war = 0, place / "war0"
        while done < options.kills:
            command = start(place, *line, "--out", war.name)
            time.sleep(dice.uniform(0.2, 1.0) * span)
            target, number, pick = dice.choice(TARGETS), dice.choice(SIGNALS), dice.randrange(2)
            if command.poll() is not None:  # it has come to its end
                check_end(command, war, place / "peace")
                war = place / f"war{done}"
                continue
            steps, hit_at = len(rows(war)), time.monotonic()
            processes = hit(command, target, number, pick)
            if not processes:
                target, processes = "command", hit(command, "command", number)
            command.wait(GONE_S)
            assert all_gone(processes), f"left after {GONE_S} s: {processes}"
            seconds = time.monotonic() - hit_at
            check_nothing_is_half_written(war)
            done += 1
            print(f"kill {done}: {signal.Signals(number).name} to {target} at step {steps}: gone in {seconds:.1f} s", flush=True)
        check_end(start(place, *line, "--out", war.name), war, place / "peace")
        print(f"{done} kills; rows and weights are those of the run in peace")


if __name__ == "__main__":
    main()
