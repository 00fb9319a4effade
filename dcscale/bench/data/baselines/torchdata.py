"""torchdata's StatefulDataLoader over webdataset, with one row per sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import webdataset
from torchdata.stateful_dataloader import StatefulDataLoader

from dcscale.bench.data.corpus import Corpus
from dcscale.bench.data.reader import LoaderReader
from dcscale.files import write_json


class Stateful(LoaderReader):
    """webdataset divides the shards over ranks and workers; to resume, torchdata skips the samples that were read."""

    format = "rows"

    @classmethod
    def write(cls, corpus: Corpus, folder: Path) -> None:
        names = [f"shard-{shard:05d}.tar" for shard in range(len(corpus.ends))]
        write_json(folder / "index.json", names)
        for shard, name in enumerate(names):
            with webdataset.TarWriter(str(folder / name), mtime=0) as writer:
                for number, row in enumerate(corpus.rows(shard)):
                    writer.write({"__key__": f"{shard:05d}-{number:06d}", "tokens.npy": row})

    def open(self) -> Any:
        settings = self.settings
        names = json.loads(Path(settings.root, "index.json").read_text())
        urls = [f"{settings.root}/{name}" for name in names]
        dataset = webdataset.WebDataset(
            urls, nodesplitter=webdataset.split_by_node, empty_check=False, shardshuffle=False
        )
        samples = dataset.decode().map(_tokens)
        return StatefulDataLoader(samples, batch_size=settings.batch, num_workers=settings.workers)


def _tokens(sample: dict) -> Any:
    return sample["tokens.npy"]
