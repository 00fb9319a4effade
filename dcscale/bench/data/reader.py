"""What a reader is, for all measurements: a library, a format it reads, and how far it can be taken up again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from dcscale.bench.data.corpus import Corpus


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
