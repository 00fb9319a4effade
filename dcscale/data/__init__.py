"""Data: from text to token shards, and from shards to batches in a fixed order.

:mod:`shards <dcscale.data.shards>` says what a shard is, :mod:`storage <dcscale.data.storage>` where its bytes are;
:mod:`prepare <dcscale.data.prepare>` makes shards of text, :mod:`stream <dcscale.data.stream>` makes batches of shards.
"""

from dcscale.data.errors import DataError
from dcscale.data.prepare.build import BuildReport, build_shards
from dcscale.data.shards.manifest import Manifest, read_manifest
from dcscale.data.shards.skipped import SkippedShard
from dcscale.data.storage import RetryPolicy, StorageOptions
from dcscale.data.stream.loader import Batch, BatchLoader
from dcscale.data.stream.mixture import MixedStream, Stream, open_mixture
from dcscale.data.stream.stream import SequenceStream, StreamConfig, open_stream
from dcscale.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer_files,
    tokenizer_of_shards,
)

__all__ = [
    "Batch",
    "BatchLoader",
    "BuildReport",
    "ByteTokenizer",
    "DataError",
    "HuggingFaceTokenizer",
    "Manifest",
    "MixedStream",
    "RetryPolicy",
    "SequenceStream",
    "SkippedShard",
    "StorageOptions",
    "Stream",
    "StreamConfig",
    "Tokenizer",
    "build_shards",
    "load_tokenizer",
    "open_mixture",
    "open_stream",
    "read_manifest",
    "tokenizer_files",
    "tokenizer_of_shards",
]
