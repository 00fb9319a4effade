"""Data: from text to token shards, and from shards to batches in a fixed order.

Building: :mod:`corpus <dcscale.data.corpus>` -> :mod:`tokenizers <dcscale.data.tokenizers>` ->
:mod:`scatter <dcscale.data.scatter>` -> :mod:`shards <dcscale.data.shards>` and
:mod:`manifest <dcscale.data.manifest>` (which describes the format), all called by :mod:`build <dcscale.data.build>`;
:mod:`survey <dcscale.data.survey>` looks at the result, :mod:`adopt <dcscale.data.adopt>` takes the tars of others.
Reading: manifest -> :mod:`order <dcscale.data.order>` -> shards, from their :mod:`source <dcscale.data.sources>` ->
:mod:`packing <dcscale.data.packing>` -> :mod:`windows <dcscale.data.windows>` -> :mod:`stream <dcscale.data.stream>`
(-> :mod:`mixture <dcscale.data.mixture>`) -> :mod:`loader <dcscale.data.loader>`.
"""

from dcscale.data.build import BuildReport, build_shards
from dcscale.data.errors import DataError
from dcscale.data.loader import Batch, BatchLoader
from dcscale.data.manifest import Manifest, read_manifest
from dcscale.data.mixture import MixedStream, Stream, open_mixture
from dcscale.data.skipping import SkippedShard
from dcscale.data.sources import Access, Patience
from dcscale.data.stream import SequenceStream, open_stream
from dcscale.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer_files,
    tokenizer_of_shards,
)

__all__ = [
    "Access",
    "Batch",
    "BatchLoader",
    "BuildReport",
    "ByteTokenizer",
    "DataError",
    "HuggingFaceTokenizer",
    "Manifest",
    "MixedStream",
    "Patience",
    "SequenceStream",
    "SkippedShard",
    "Stream",
    "Tokenizer",
    "build_shards",
    "load_tokenizer",
    "open_mixture",
    "open_stream",
    "read_manifest",
    "tokenizer_files",
    "tokenizer_of_shards",
]
