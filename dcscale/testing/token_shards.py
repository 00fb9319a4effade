"""Folders of token shards with known content, written without the text side of the data path."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dcscale.data.manifest import Manifest, TokenizerInfo, write_manifest
from dcscale.data.packing import Row, pack_best_fit
from dcscale.data.shards import write_shard
from dcscale.data.tokenizers import ByteTokenizer

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
