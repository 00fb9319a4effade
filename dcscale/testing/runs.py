"""Tiny runs for tests: shards of generated text, a config for them, and training in this process or in several.

Folders of token shards with known content, written without the text side of the data path.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dcscale.config import Config, check_config, load_config, raise_problems
from dcscale.data.prepare.build import build_shards
from dcscale.data.prepare.packing import Row, pack_best_fit
from dcscale.data.shards.manifest import Manifest, TokenizerInfo, read_manifest, write_manifest
from dcscale.data.shards.shard import read_shard, write_shard
from dcscale.data.shards.text import open_text_reader
from dcscale.data.storage import open_storage
from dcscale.data.tokenizers import ByteTokenizer
from dcscale.observe import Console
from dcscale.parallel import Engine, discover, share_cores, start_distributed, stop_distributed
from dcscale.train import StopReason, Trainer, build_trainer, write_summary

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
        "parallel.param_persistence_threshold=0",
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


def train_here(config: Config) -> tuple[Trainer, StopReason]:
    """Trains in this process, which is one rank of the process group it is in (or joins as its only rank)."""
    environment = discover()
    raise_problems(check_config(config, environment.world_size))
    share_cores(environment)
    start_distributed(environment, config.parallel.start_timeout_minutes)
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


Documents = Sequence[Sequence[int]]


def write_token_shards(
    folder: Path,
    shards: Sequence[Documents],
    *,
    dtype: str = "uint16",
    vocab_size: int = 257,
    bundle: int = 3,
    row_tokens: int | None = None,
) -> Manifest:
    """Writes each list of documents as a shard, ``bundle`` documents a sample, and the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for number, documents in enumerate(shards):
        arrays = [np.array(document, dtype=dtype) for document in documents]
        bundles = [(f"{number:03d}-{i:03d}", arrays[i : i + bundle]) for i in range(0, len(arrays), bundle)]
        infos.append(
            write_shard(folder, f"shard-{number:03d}.tar", bundles, dtype=dtype, text_bytes=sum(map(len, documents)))
        )
    largest = max(max(document) for documents in shards for document in documents)
    tokenizer = TokenizerInfo("byte", ByteTokenizer.fingerprint, vocab_size, 256)
    manifest = Manifest(dtype, tokenizer, largest, tuple(infos), row_tokens)
    write_manifest(folder, manifest)
    return manifest


def numbered_shards(sizes: Sequence[int], *, longest: int = 12, seed: int = 0) -> list[list[list[int]]]:
    """Shards of ``sizes`` tokens in which token number k of the whole is k, so that each can be recognised."""
    generator = random.Random(seed)
    shards, token = [], 0
    for size in sizes:
        documents = []
        while size:
            length = min(size, generator.randint(1, longest))
            documents.append(list(range(token, token + length)))
            token, size = token + length, size - length
        shards.append(documents)
    return shards


def packed_shards(
    shards: Sequence[Documents],
    row_tokens: int,
    pack: Callable[[Sequence[int], int], list[Row]] = pack_best_fit,
    eos_id: int = 256,
) -> list[list[list[int]]]:
    """The same documents, each shard in rows of ``row_tokens`` that are filled up with documents of one token."""
    packed = []
    for documents in shards:
        filled = []
        for row in pack([len(document) for document in documents], row_tokens):
            filled += [list(documents[i][start:stop]) for i, start, stop in row]
            filled += [[eos_id]] * (row_tokens - sum(stop - start for _, start, stop in row))
        packed.append(filled)
    return packed


def documents_of(folder: Path) -> list[list[int]]:
    """The token ids of every document in a folder of shards."""
    manifest, source = read_manifest(folder), open_storage(folder)
    vocab_size, text = manifest.tokenizer.vocab_size, open_text_reader(source, manifest)
    return [
        document.tolist()
        for info in manifest.shards
        for document in read_shard(source, info, dtype=manifest.dtype, vocab_size=vocab_size, verify=True, text=text)
    ]


def change_entry(folder: Path, number: int, **changes: Any) -> None:
    """Changes what the manifest of a folder says of a shard."""
    manifest = read_manifest(folder)
    shards = list(manifest.shards)
    shards[number] = dataclasses.replace(shards[number], **changes)
    write_manifest(folder, dataclasses.replace(manifest, shards=tuple(shards)))
