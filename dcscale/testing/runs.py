"""Tiny runs for tests: shards of generated text, a config for them, and training in this process or in several."""

from __future__ import annotations

import random
from pathlib import Path

from torch import Tensor

from dcscale.config import Config, check_config, load_config, raise_problems
from dcscale.data.build import build_shards
from dcscale.observe import Console
from dcscale.parallel import Engine, discover, share_cores, start_distributed, stop_distributed
from dcscale.train import Ending, Trainer, build_trainer, write_summary

WORDS = ("attention", "heads", "are", "composed", "by", "small", "matrices", "before", "and", "after", "softmax")


def make_text(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """Writes ``documents`` text files of 20 to 200 words into ``folder``."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        words = generator.choices(WORDS, k=generator.randint(20, 200))
        (folder / f"doc{number:03d}.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    return folder


def make_shards(folder: Path, tokenizer: str | Path = "byte") -> Path:
    """Makes ``folder/train`` and ``folder/validation`` of tokens; of bytes, a few dozen sequences of 32."""
    text = make_text(folder.with_name(folder.name + "-text"))
    build_shards(
        [text],
        folder,
        tokenizer=str(tokenizer),
        suffixes=[".txt"],
        hold_out=0.2,
        shard_tokens=6000,
        bundle_tokens=1000,
    )
    return folder


def tiny_settings(run: Path, shards: Path) -> list[str]:
    """Overrides for a run that takes about a second."""
    return [
        f"run.folder={run}",
        f"data.train={shards / 'train'}",
        f"data.validation={shards / 'validation'}",
        "data.sequence_length=32",
        "data.shuffle_shards=2",
        "data.slots=4",
        "model.vocab_size=257",
        "model.layers=2",
        "model.dim=32",
        "model.heads=4",
        "model.ffn_dim=48",
        "model.windows=[8,null]",
        "train.steps=8",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "train.precision=fp32",
        "optimizer.learning_rate=0.01",
        "schedule.warmup_steps=2",
        "parallel.whole_elements=0",
        "validation.interval=4",
        "validation.sequences=6",
        "checkpoint.interval=0",
        "log.interval=1",
        "log.compose_interval=4",
        "log.progress=false",
    ]


def tiny_config(run: Path, shards: Path, *overrides: str) -> Config:
    """:func:`tiny_settings` and ``overrides``, which win, as a config."""
    return load_config([], [*tiny_settings(run, shards), *overrides]).config


def train_here(config: Config) -> tuple[Trainer, Ending]:
    """Trains in this process, which is one rank of the process group it is in (or joins as its only rank)."""
    environment = discover()
    raise_problems(check_config(config, environment.world_size))
    share_cores(environment)
    start_distributed(environment, config.parallel.timeout_minutes)
    trainer = build_trainer(config, environment, Console(enabled=False))
    try:
        ending = trainer.fit()
        write_summary(trainer, ending)
    finally:
        trainer.close()
    return trainer, ending


def train_all(configs: list[Config]) -> None:
    """Trains one config after the other on this rank; for :func:`dcscale.testing.distributed.run_distributed`."""
    for config in configs:
        train_here(config)
    stop_distributed()


def whole_weights(engine: Engine) -> dict[str, Tensor]:
    """Copies of all parameters; every rank must call it."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with engine._deepspeed.zero.GatheredParameters([parameter], enabled=engine.stage == 3):
            weights[name] = parameter.detach().cpu().clone()
    return weights
