"""Pretraining of a small model and its tokenizer, from random numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dlrscale import data, export, models
from dlrscale.config import PretrainConfig
from dlrscale.jobs.common import MODEL_FOLDER, Run, evaluator, load_corpora, make_batches, parameter_counts, whole_state
from dlrscale.train import LanguageModelling, Loop, Stage


def pretrain(run_: Run) -> None:
    """Train a small Llama and its tokenizer on text from random numbers; exported to `<out>/model` in bf16."""
    config: PretrainConfig = run_.config
    with run_.phases.phase("load"):
        tokenizer = shared_tokenizer(config, run_.out / "tokenizer")
        corpora = load_corpora(config, tokenizer)
        torch.manual_seed(config.seed)
        model = models.build_llama(config, tokenizer).train()
        ds = run_.start_engine(model, list(model.parameters()))
    run_.metrics |= corpora.counts() | parameter_counts(model)
    loss = evaluator(run_, ds, corpora)

    def evaluate() -> dict[str, float]:
        return {"loss/heldout_task": loss(corpora.heldout)}

    loop = Loop(
        config=config,
        engine=ds,
        batches=make_batches(config, corpora, ds.rank, ds.world_size),
        phases=run_.phases,
        out=run_.out,
        sink=run_.sink,
        evaluate=evaluate,
    )
    objective = LanguageModelling()
    loop.run(
        Stage(name="train", steps=config.steps, lr=config.lr, warmup=config.warmup_steps, objective=objective),
        loop.resume(),
    )
    with run_.phases.phase("evaluate"):
        run_.metrics |= loop.summary("train") | evaluate() | {"tokens/total": loop.rows[-1]["tokens"]}
    with run_.phases.phase("save"):
        state = whole_state(ds, model)
        if ds.rank == 0:
            small = models.build_llama(config, tokenizer).to(torch.bfloat16)
            small.load_state_dict(state, strict=False)
            small.tie_weights()
            card = export.pretrained_card(config, run_.metrics)
            export.save_folder(small, tokenizer, run_.out / MODEL_FOLDER, {"README.md": card})
        ds.barrier()


def shared_tokenizer(config: PretrainConfig, folder: Path) -> PreTrainedTokenizerBase:
    """Let rank 0 train the tokenizer, once per run folder; every rank loads the same one."""
    import torch.distributed as dist

    if dist.get_rank() == 0 and not folder.exists():
        texts = data.documents(
            config.data, config.document_separator, dict.fromkeys(data.COUNT_KEYS, 0), config.columns
        )
        temporary = folder.with_name(".tokenizer.tmp")
        models.train_tokenizer(texts, config.vocabulary).save_pretrained(temporary)
        temporary.rename(folder)
    dist.barrier()
    return models.load_tokenizer(folder)
