"""The readers by name."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable
from typing import NamedTuple

from dcscale.bench.data.reader import Reader


class Kind(NamedTuple):
    """Where a reader is, so that no library is imported that is not asked for."""

    module: str
    name: str
    library: str | None
    meaning: str

    def load(self) -> type[Reader]:
        return getattr(importlib.import_module(f"dcscale.bench.data.{self.module}"), self.name)


KINDS = {
    "dcscale": Kind("ours", "Ours", None, "bundles; verified, packed, targets, document ids"),
    "dcscale-documents": Kind("ours", "OursDocuments", None, "the same on tars of a document a sample"),
    "webdataset": Kind("rivals.tars", "Tars", "webdataset", "a document a sample, decoded; packed by its user"),
    "webdataset-bundles": Kind("rivals.tars", "BundleTars", "webdataset", "the same on dcscale's bundles"),
    "flat": Kind("rivals.flat", "Flat", None, "rows of a file that is mapped into memory, in random order"),
    "litdata": Kind("rivals.chunks", "Chunks", "litdata", "TokensLoader: rows cut beforehand"),
    "mosaic": Kind("rivals.mds", "Mds", "mosaicml-streaming", "rows cut beforehand"),
    "mosaic-hashed": Kind("rivals.mds", "HashedMds", "mosaicml-streaming", "with hashes written and validated"),
    "torchdata": Kind("rivals.stateful", "Stateful", "torchdata", "StatefulDataLoader over webdataset, a row a sample"),
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
