"""The corpus as token shards, which dcscale and webdataset both read."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import webdataset

from dcscale.bench.data.corpus import EOS_ID, VOCAB_SIZE, Corpus
from dcscale.data.manifest import Manifest, ShardInfo, TokenizerInfo, write_manifest
from dcscale.data.shards import write_shard
from dcscale.data.tokenizers import ByteTokenizer

BUNDLE_TOKENS = 1 << 16
"""As tools/make_shards.py makes them."""

_TOKENIZER = TokenizerInfo("byte", ByteTokenizer.fingerprint, VOCAB_SIZE, EOS_ID)


def write_bundles(corpus: Corpus, folder: Path) -> None:
    """Samples of many documents, in dcscale's format."""
    infos = []
    for shard in range(len(corpus.ends)):
        bundles, held = [[]], 0
        for document in corpus.documents(shard):
            if held >= BUNDLE_TOKENS:
                bundles.append([])
                held = 0
            bundles[-1].append(document)
            held += len(document)
        keyed = [(f"{shard:05d}-{number:05d}", bundle) for number, bundle in enumerate(bundles)]
        infos.append(write_shard(folder, f"shard-{shard:05d}.tar", keyed, dtype="uint16", text_bytes=0))
    _write_manifest(folder, infos)


def write_documents(corpus: Corpus, folder: Path) -> None:
    """A sample for each document, as WebDataset's users write them, and dcscale's manifest."""
    infos = []
    for shard in range(len(corpus.ends)):
        documents, buffer = corpus.documents(shard), io.BytesIO()
        with webdataset.TarWriter(buffer, mtime=0) as writer:
            for number, document in enumerate(documents):
                writer.write({"__key__": f"{shard:05d}-{number:06d}", "tokens.npy": document})
        data, name = buffer.getvalue(), f"shard-{shard:05d}.tar"
        (folder / name).write_bytes(data)
        counts = (len(documents), len(documents), len(corpus.tokens_ST[shard]), 0)
        infos.append(ShardInfo(name, len(data), hashlib.sha256(data).hexdigest(), *counts))
    _write_manifest(folder, infos)


def _write_manifest(folder: Path, infos: list[ShardInfo]) -> None:
    write_manifest(folder, Manifest("uint16", _TOKENIZER, EOS_ID, tuple(infos)))
