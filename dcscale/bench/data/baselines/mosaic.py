"""mosaicml-streaming with its MDS format."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

from dcscale.bench.data.corpus import Corpus
from dcscale.bench.data.reader import LoaderReader


class Mds(LoaderReader):
    """Rows that are cut when the data is written, as its documentation recommends; nothing is packed or verified."""

    format = "mds"
    hashes: ClassVar[list[str]] = []

    @classmethod
    def write(cls, corpus: Corpus, folder: Path) -> None:
        columns = {"tokens": f"ndarray:uint16:{corpus.row_tokens}"}
        shard_bytes = corpus.tokens_ST.nbytes // len(corpus.ends)
        with MDSWriter(out=str(folder), columns=columns, size_limit=shard_bytes, hashes=cls.hashes) as writer:
            for shard in range(len(corpus.ends)):
                for row in corpus.rows(shard):
                    writer.write({"tokens": row})

    def open(self) -> Any:
        settings = self.settings
        dataset = StreamingDataset(
            **self.locations(),
            shuffle=settings.shuffle,
            shuffle_seed=settings.seed,
            batch_size=settings.batch,
            num_canonical_nodes=1,
        )
        return StreamingDataLoader(
            dataset,
            batch_size=settings.batch,
            num_workers=settings.workers,
            persistent_workers=settings.workers > 0,
        )

    def locations(self) -> dict[str, Any]:
        """Where the dataset is."""
        return {"local": self.settings.root}

    def epoch(self) -> Iterator[torch.Tensor]:
        if self.loader is None:
            self.loader = self.open()
        for batch in self.loader:
            yield batch["tokens"].long()


class HashedMds(Mds):
    """With hashes written and validated. They are validated only for remote shards, so the data is copied."""

    format = "mds-hashed"
    hashes: ClassVar[list[str]] = ["sha256"]

    def locations(self) -> dict[str, Any]:
        self._copies = tempfile.TemporaryDirectory()
        return {"remote": self.settings.root, "local": self._copies.name, "validate_hash": self.hashes[0]}
