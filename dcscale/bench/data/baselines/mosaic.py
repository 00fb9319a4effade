"""mosaicml-streaming."""

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
    """Rows that were cut when the data were written, as its documentation has them; nothing is packed or verified."""

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
            **self.places(),
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

    def places(self) -> dict[str, Any]:
        return {"local": self.settings.root}

    def epoch(self) -> Iterator[torch.Tensor]:
        if self.loader is None:
            self.loader = self.open()
        for batch in self.loader:
            yield batch["tokens"].long()


class HashedMds(Mds):
    """With hashes written, and asked to be validated, which is done when a shard is fetched from elsewhere."""

    format = "mds-hashed"
    hashes: ClassVar[list[str]] = ["sha256"]

    def places(self) -> dict[str, Any]:
        self._copies = tempfile.TemporaryDirectory()
        return {"remote": self.settings.root, "local": self._copies.name, "validate_hash": self.hashes[0]}
