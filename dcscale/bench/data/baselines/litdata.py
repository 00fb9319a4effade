"""litdata with its TokensLoader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import litdata
import torch
from litdata.streaming.cache import Cache
from litdata.streaming.item_loader import TokensLoader

from dcscale.bench.data.corpus import Corpus
from dcscale.bench.data.reader import LoaderReader


class Chunks(LoaderReader):
    """Rows that are cut when the data is written; nothing is packed or verified."""

    format = "litdata"

    @classmethod
    def write(cls, corpus: Corpus, folder: Path) -> None:
        cache = Cache(str(folder), chunk_size=corpus.tokens_ST.shape[1], item_loader=TokensLoader(corpus.row_tokens))
        number = 0
        for shard in range(len(corpus.ends)):
            for row in corpus.rows(shard):
                cache._add_item(number, torch.from_numpy(row))
                number += 1
        cache.done()
        cache.merge()

    def open(self) -> Any:
        settings = self.settings
        dataset = litdata.StreamingDataset(
            settings.root,
            item_loader=TokensLoader(settings.length),
            shuffle=settings.shuffle,
            drop_last=False,
            seed=settings.seed,
        )
        return litdata.StreamingDataLoader(
            dataset,
            batch_size=settings.batch,
            num_workers=settings.workers,
            persistent_workers=settings.workers > 0,
        )
