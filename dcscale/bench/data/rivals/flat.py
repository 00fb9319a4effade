"""A flat file of tokens, mapped into memory: what nanoGPT and, in essence, Megatron-LM read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dcscale.bench.data.corpus import Corpus
from dcscale.bench.data.reader import LoaderReader


class Flat(LoaderReader):
    """Rows in a random order; nothing is packed or verified, and the file must lie on a local disk."""

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
