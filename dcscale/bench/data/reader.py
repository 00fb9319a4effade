"""What a reader is, for all measurements: a format, how far it can resume; dcscale's own, and that of a flat file."""

from __future__ import annotations

import importlib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dcscale.bench.data.corpus import VOCAB_SIZE, Corpus, write_bundles, write_documents
from dcscale.data import BatchLoader, StreamConfig, open_stream


@dataclass(frozen=True)
class Settings:
    """How a reader is to read. It is sent to other processes as JSON."""

    root: str
    """Folder of the format, or its address."""

    length: int
    """L, tokens a row."""

    batch: int
    """Rows a batch, of one rank."""

    workers: int = 0
    """Processes beside the one that asks."""

    rank: int = 0
    world_size: int = 1
    seed: int = 1
    shuffle: bool = True

    slots: int = 4
    shuffle_shards: int = 2
    """Of dcscale's order."""

    read_ahead: int = 4
    verify: bool = True
    """Of dcscale: windows read ahead, and whether checksums are verified."""


class Reader(ABC):
    """Hands over int64 batches [B, L] of token ids, as a model takes them."""

    format: ClassVar[str]
    """Folder of its format, which readers may share."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @classmethod
    @abstractmethod
    def write(cls, corpus: Corpus, folder: Path) -> None:
        """Write the corpus in the format, one file a shard where the format lets one choose."""

    @abstractmethod
    def epoch(self) -> Iterator[torch.Tensor]:
        """Batches of the next epoch, or of what is left of the one that a restored state is in."""

    def state(self) -> Any:
        """JSON from which :meth:`restore` goes on after the last batch that was handed over."""
        raise NotImplementedError("it has no state")

    def restore(self, state: Any) -> None:
        """Go on from a state, before the first batch."""
        raise NotImplementedError("it has no state")

    @abstractmethod
    def close(self) -> None:
        """Leave no process behind."""


class LoaderReader(Reader):
    """A library read through a DataLoader, which is made by the first epoch and kept."""

    loader: Any = None

    @abstractmethod
    def open(self) -> Any:
        """The loader."""

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


class Kind(NamedTuple):
    """Where a reader is, so that no library is imported that is not asked for."""

    module: str
    name: str
    library: str | None
    meaning: str

    def load(self) -> type[Reader]:
        return getattr(importlib.import_module(f"dcscale.bench.data.{self.module}"), self.name)


KINDS = {
    "dcscale": Kind("reader", "DcscaleReader", None, "bundles; verified, packed, targets, document ids"),
    "dcscale-documents": Kind("reader", "DcscaleDocumentsReader", None, "the same on tars of a document a sample"),
    "webdataset": Kind("baselines.webdataset", "Tars", "webdataset", "a document a sample; packed by its user"),
    "webdataset-bundles": Kind("baselines.webdataset", "BundleTars", "webdataset", "the same on dcscale's bundles"),
    "flat": Kind("reader", "Flat", None, "rows of a file that is mapped into memory, in random order"),
    "litdata": Kind("baselines.litdata", "Chunks", "litdata", "TokensLoader: rows cut beforehand"),
    "mosaic": Kind("baselines.mosaic", "Mds", "mosaicml-streaming", "rows cut beforehand"),
    "mosaic-hashed": Kind("baselines.mosaic", "HashedMds", "mosaicml-streaming", "with hashes written and validated"),
    "torchdata": Kind("baselines.torchdata", "Stateful", "torchdata", "StatefulDataLoader over webdataset"),
}


def missing(kinds: Iterable[str]) -> dict[str, str]:
    """Kinds whose library is not installed, with the words for it."""
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


class DcscaleDocumentsReader(DcscaleReader):
    """The same with a sample for each document, as WebDataset's users write tars."""

    format = "documents"

    @classmethod
    def write(cls, corpus: Corpus, folder: Path) -> None:
        write_documents(corpus, folder)


class Flat(LoaderReader):
    """Rows of a flat file of tokens that is mapped into memory: what nanoGPT and, in essence, Megatron-LM read.

    In random order; nothing is packed or verified, and the file must lie on a local disk."""

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

    def __getitems__(self, numbers: list[int]) -> list[np.ndarray]:
        return list(self._rows_NL[numbers].astype(np.int64))
