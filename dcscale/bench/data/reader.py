"""The interface of all readers, and the readers that need no other library: dcscale's and a flat file's."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dcscale.bench.data import KINDS
from dcscale.bench.data.corpus import VOCAB_SIZE, Corpus, write_bundles, write_documents
from dcscale.data import BatchLoader, StreamConfig, open_stream


@dataclass(frozen=True)
class Settings:
    """Settings of a reader. They are sent to other processes as JSON."""

    root: str
    """Folder of the data in the reader's format, or its URL."""

    length: int
    """L, tokens of a row."""

    batch: int
    """Rows of a batch on one rank."""

    workers: int = 0
    """Worker processes; 0 reads in the calling process."""

    rank: int = 0
    world_size: int = 1
    seed: int = 1
    shuffle: bool = True

    slots: int = 4
    shuffle_shards: int = 2
    """Of dcscale only: the order."""

    read_ahead: int = 4
    verify: bool = True
    """Of dcscale only: shuffle blocks to prefetch, and whether to verify checksums."""


class Reader(ABC):
    """Yields int64 batches [B, L] of token ids, as a model takes them."""

    format: ClassVar[str]
    """Folder name of its format; readers may share a format."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @classmethod
    @abstractmethod
    def write(cls, corpus: Corpus, folder: Path) -> None:
        """Write the corpus in the reader's format, one file per shard if the format allows it."""

    @abstractmethod
    def epoch(self) -> Iterator[torch.Tensor]:
        """Batches of the next epoch, or the remaining ones of the epoch of a restored state."""

    def state(self) -> Any:
        """JSON from which :meth:`restore` resumes after the last yielded batch."""
        raise NotImplementedError("it has no state")

    def restore(self, state: Any) -> None:
        """Resume from a state; call it before the first batch."""
        raise NotImplementedError("it has no state")

    @abstractmethod
    def close(self) -> None:
        """Stop all worker processes."""


class LoaderReader(Reader):
    """A reader based on a DataLoader, which the first epoch creates and later ones reuse."""

    loader: Any = None

    @abstractmethod
    def open(self) -> Any:
        """Create the loader."""

    def epoch(self) -> Iterator[torch.Tensor]:
        if self.loader is None:
            self.loader = self.open()
        for batch in self.loader:
            yield batch.long()

    def state(self) -> Any:
        return self.loader.state_dict()

    def restore(self, state: Any) -> None:
        self.loader = self.open()
        self.loader.load_state_dict(state)

    def close(self) -> None:
        self.loader = None


def missing(kinds: Iterable[str]) -> dict[str, str]:
    """Kinds whose library is not installed, each with the reason to report."""
    found = {}
    for kind in kinds:
        library = KINDS[kind].library
        try:
            if library is not None:
                importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[kind] = f"not installed: {library}"
    return found


class DcscaleReader(Reader):
    """Bundles of documents, checksums verified, packed with targets and document ids."""

    format = "bundles"

    @classmethod
    def write(cls, corpus: Corpus, folder: Path) -> None:
        write_bundles(corpus, folder)

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.stream = open_stream(
            settings.root,
            StreamConfig(
                vocab_size=VOCAB_SIZE,
                sequence_length=settings.length,
                seed=settings.seed,
                shuffle_shards=settings.shuffle_shards,
                slots=settings.slots,
                document_mask=True,
                verify=settings.verify,
                shuffle=settings.shuffle,
                read_ahead=settings.read_ahead,
            ),
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
        """See :class:`Reader`. An epoch is a multiple of the batch, because of how :class:`Corpus` is cut."""
        # One endless iterator over all epochs, so that workers keep prefetching across the boundary.
        self._steps = self._steps or self._loader.steps(self._consumed)
        rows = self.stream.sequences_per_epoch
        for step in islice(self._steps, (rows - self._consumed % rows) // self._batch):
            self._consumed += self._batch
            yield step[0].input_ids  # the only micro-batch of the step

    def state(self) -> Any:
        return {"consumed": self._consumed, "fingerprint": self.stream.fingerprint}

    def restore(self, state: Any) -> None:
        # As in training: a state is valid only for the same data and order.
        if state["fingerprint"] != self.stream.fingerprint:
            raise ValueError("the state is of other data or of another order")
        self._consumed = state["consumed"]

    def close(self) -> None:
        self._loader.close()


class DcscaleDocumentsReader(DcscaleReader):
    """The same with one sample per document, as is common with WebDataset."""

    format = "documents"

    @classmethod
    def write(cls, corpus: Corpus, folder: Path) -> None:
        write_documents(corpus, folder)


class Flat(LoaderReader):
    """Rows of a memory-mapped flat file of tokens, in random order: what nanoGPT and, in essence, Megatron-LM do.

    Nothing is packed or verified, and the file must be on a local disk.
    """

    format = "flat"

    @classmethod
    def write(cls, corpus: Corpus, folder: Path) -> None:
        corpus.tokens_ST.tofile(folder / "tokens.bin")

    def open(self) -> DataLoader:
        settings = self.settings
        return DataLoader(
            _Rows(Path(settings.root) / "tokens.bin", settings.length),
            batch_size=settings.batch,
            shuffle=settings.shuffle,
            num_workers=settings.workers,
            persistent_workers=settings.workers > 0,
            generator=torch.Generator().manual_seed(settings.seed),
        )


class _Rows(Dataset):
    def __init__(self, path: Path, length: int) -> None:
        self._rows_NL = np.memmap(path, np.uint16, mode="r").reshape(-1, length)

    def __len__(self) -> int:
        return len(self._rows_NL)

    # Called by DataLoader for a batch at once, which is faster than row by row.
    def __getitems__(self, numbers: list[int]) -> list[np.ndarray]:
        return list(self._rows_NL[numbers].astype(np.int64))
