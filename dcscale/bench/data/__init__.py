"""Benchmark of the data path next to other libraries: rates, costs, shuffles, and what a restart or a defect does.

The readers are listed here, so that ``--help`` of tools/bench_data.py does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dcscale.bench.data.reader import Reader


class Kind(NamedTuple):
    """Where a reader is defined. Its library is imported only if the reader is used."""

    module: str
    name: str
    library: str | None
    meaning: str

    def load(self) -> type[Reader]:
        """The reader's class."""
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
