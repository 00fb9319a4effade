"""Data: from text to token shards, and from shards to batches in a fixed order.

- :mod:`dcscale.data.shards`: what a shard is.
- :mod:`dcscale.data.storage`: where the bytes of shards are stored.
- :mod:`dcscale.data.prepare`: makes shards from text.
- :mod:`dcscale.data.stream`: makes batches from shards.
"""

from dcscale.data.errors import DataError
from dcscale.data.prepare.build import BuildReport, build_shards
from dcscale.data.shards.manifest import Manifest, read_manifest
from dcscale.data.shards.skipped import SkippedShard
from dcscale.data.storage import RetryPolicy, StorageOptions
from dcscale.data.stream.loader import Batch, BatchLoader
from dcscale.data.stream.mixture import MixedStream, open_mixture
from dcscale.data.stream.stream import SequenceStream, Stream, StreamConfig, open_stream
from dcscale.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    load_shard_tokenizer,
    load_tokenizer,
    tokenizer_files,
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
    "load_shard_tokenizer",
    "load_tokenizer",
    "open_mixture",
    "open_stream",
    "read_manifest",
    "tokenizer_files",
]
