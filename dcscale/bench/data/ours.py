"""dcscale's own data path."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dcscale.bench.data.corpus import VOCAB_SIZE, Corpus
from dcscale.bench.data.formats import write_bundles, write_documents
from dcscale.bench.data.reader import Reader, Settings
from dcscale.data import BatchLoader, open_stream


class Ours(Reader):
    """Bundles of documents, checksums verified, packed with targets and document ids."""

    format = "bundles"

    @classmethod
    def write(cls, corpus: Corpus, folder: Path) -> None:
        write_bundles(corpus, folder)

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.stream = open_stream(
            settings.root,
            vocab_size=VOCAB_SIZE,
            sequence_length=settings.length,
            seed=settings.seed,
            shuffle_shards=settings.shuffle_shards,
            slots=settings.slots,
            document_mask=True,
            verify=settings.verify,
            shuffle=settings.shuffle,
            read_ahead=settings.read_ahead,
        )
        self._batch = settings.batch * settings.world_size
        self._loader = BatchLoader(
            self.stream,
            global_batch_size=self._batch,
            micro_batch_size=settings.batch,
            rank=settings.rank,
            world_size=settings.world_size,
            workers=settings.workers,
        )
        self._consumed = 0
        self._steps: Iterator | None = None

    def epoch(self) -> Iterator[torch.Tensor]:
        """The rows of an epoch are a multiple of the batch, as :class:`Corpus` is cut."""
        self._steps = self._steps or self._loader.steps(self._consumed)
        rows = self.stream.sequences_per_epoch
        for step in islice(self._steps, (rows - self._consumed % rows) // self._batch):
            self._consumed += self._batch
            yield step[0].input_ids

    def state(self) -> Any:
        return {"consumed": self._consumed, "fingerprint": self.stream.fingerprint}

    def restore(self, state: Any) -> None:
        if state["fingerprint"] != self.stream.fingerprint:
            raise ValueError("the data or the order are not those of the state")
        self._consumed = state["consumed"]

    def close(self) -> None:
        self._loader.close()


class OursDocuments(Ours):
    """The same with a sample for each document, as WebDataset's users write tars."""

    format = "documents"

    @classmethod
    def write(cls, corpus: Corpus, folder: Path) -> None:
        write_documents(corpus, folder)
