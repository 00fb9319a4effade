"""webdataset, with packing in user code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader

from dcscale.bench.data.corpus import Corpus, write_bundles, write_documents
from dcscale.bench.data.reader import LoaderReader
from dcscale.data.shards.manifest import read_manifest

SHUFFLE_SHARDS, SHUFFLE_SAMPLES = 100, 1000


class Tars(LoaderReader):
    """One document per sample, decoded, shuffled with a buffer of samples, packed and batched; nothing is verified."""

    format = "documents"
    buffer = SHUFFLE_SAMPLES

    @classmethod
    def write(cls, corpus: Corpus, folder: Path) -> None:
        write_documents(corpus, folder)

    def open(self) -> DataLoader:
        settings = self.settings
        urls = [f"{settings.root}/{shard.name}" for shard in read_manifest(settings.root).shards]
        order = {"shardshuffle": SHUFFLE_SHARDS, "detshuffle": True, "seed": settings.seed}
        dataset = webdataset.WebDataset(
            urls,
            nodesplitter=webdataset.split_by_node,
            empty_check=False,
            **(order if settings.shuffle else {"shardshuffle": False}),
        ).decode()
        if settings.shuffle:
            dataset = dataset.shuffle(self.buffer)
        dataset = dataset.compose(lambda samples: _batches(samples, settings.length, settings.batch))
        return DataLoader(
            dataset, batch_size=None, num_workers=settings.workers, persistent_workers=settings.workers > 0
        )


class BundleTars(Tars):
    """The same on bundles of documents, with a buffer of about as many documents."""

    format = "bundles"
    buffer = SHUFFLE_SAMPLES // 80

    @classmethod
    def write(cls, corpus: Corpus, folder: Path) -> None:
        write_bundles(corpus, folder)


def _batches(samples: Iterable[dict], length: int, batch: int) -> Iterator[torch.Tensor]:
    """Batches of rows cut from the concatenated samples; complete rows at the end form a smaller batch."""
    pending, count = [], 0
    for sample in samples:
        pending.append(sample["tokens.npy"])
        count += len(pending[-1])
        if count >= batch * length:
            tokens = np.concatenate(pending)
            used = count // (batch * length) * batch * length
            for rows_NL in tokens[:used].astype(np.int64).reshape(-1, batch, length):
                yield torch.from_numpy(rows_NL)
            pending, count = [tokens[used:]], count - used
    if count >= length:
        tokens = np.concatenate(pending)[: count // length * length]
        yield torch.from_numpy(tokens.astype(np.int64).reshape(-1, length))
