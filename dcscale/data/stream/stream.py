"""Folders of shards as an endless, numbered stream of packed sequences.

A stream plans (sequence numbers -> placements), prefetches the blocks of the placements and assembles sequences from
them. :class:`Stream` does this for any number of sources, :class:`SequenceStream` is the one of a single source, and
:class:`dcscale.data.stream.mixture.MixedStream` that of several.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dcscale.config import Config
from dcscale.data.errors import DataError
from dcscale.data.shards.manifest import MANIFEST_NAME, Manifest, TokenizerInfo, read_manifest
from dcscale.data.shards.repeated import find_repeated
from dcscale.data.shards.shard import check_shards
from dcscale.data.storage import RetryPolicy, Storage, StorageOptions, open_storage
from dcscale.data.stream.block_builder import BlockBuilder
from dcscale.data.stream.block_reader import BlockPrefetcher
from dcscale.data.stream.lookahead import BlockSchedule, Group, Numbers, assemble_ahead, plan_groups
from dcscale.data.stream.order import ORDER_VERSION, Order, Placement, Planner, SinglePlanner
from dcscale.data.stream.sequences import SequenceBuffer, Sequences


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Which sequences a stream has, in which order, and how their shards are read. Picklable.

    Raises:
        DataError: a value is out of range.
    """

    vocab_size: int
    """Of the model; at least the tokenizer's."""

    sequence_length: int
    """L, inputs (and targets) per sequence."""

    seed: int
    """Seed of the order, any whole number."""

    shuffle_shards: int
    """K, shards whose documents are shuffled together: a shuffle block."""

    slots: int
    """V, independent read positions spread over an epoch."""

    document_mask: bool
    """Ignore targets in another document than their input, and produce document ids."""

    verify: bool
    """Check every shard's SHA-256 when it is read."""

    shuffle: bool = True
    """False reads the documents in the manifest's order, the same in every epoch, one shard at a time, from one slot;
    ``seed``, ``shuffle_shards`` and ``slots`` are then not used."""

    source_number: int = 0
    """Number of the source in a mixture, whose sources share a seed."""

    storage_options: StorageOptions | None = None
    """How a remote root is read; None is the defaults."""

    read_ahead: int | None = None
    """Blocks that :meth:`Stream.each` prefetches for each source; None is one for each slot in use."""

    read_threads: int = 8
    """Shards read at once."""

    on_error: str = "fail"
    """``fail``, or ``skip`` to skip a shard that cannot be used: masked padding takes its place, so that no sequence
    outside its block changes."""

    max_skipped: float = 0.0
    """Largest fraction of the tokens that may be lost to skipped shards."""

    def __post_init__(self) -> None:
        for name, minimum in (
            ("vocab_size", 1),
            ("sequence_length", 1),
            ("slots", 1),
            ("shuffle_shards", 1),
            ("read_ahead", 0),
            ("read_threads", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise DataError(f"{name} is {value}, but must be at least {minimum}")

    @classmethod
    def from_config(cls, config: Config, **changes: Any) -> StreamConfig:
        """The settings of a run's training data, with ``changes``."""
        data = config.data
        settings = {
            "vocab_size": config.model.vocab_size,
            "sequence_length": data.sequence_length,
            "seed": config.train.seed,
            "shuffle_shards": data.shuffle_shards,
            "slots": data.slots,
            "document_mask": data.document_mask,
            "verify": data.verify,
            "storage_options": StorageOptions(
                RetryPolicy(data.timeout_seconds, data.retry_backoff_seconds, data.retry_total_seconds),
                cache=None if data.cache is None else Path(data.cache),
                cache_bytes=data.cache_bytes,
            ),
            "read_ahead": data.read_ahead,
            "read_threads": data.read_threads,
            "on_error": data.on_error,
            "max_skipped": data.max_skipped,
        }
        return cls(**{**settings, **changes})


@dataclass(frozen=True)
class Source:
    """An opened folder of shards: what it holds, in which order, and the blocks read from it."""

    storage: Storage
    manifest: Manifest
    order: Order
    identity: dict[str, Any]
    """What determines the content of every sequence."""
    builder: BlockBuilder
    blocks: BlockSchedule

    @property
    def skipped(self) -> frozenset[str]:
        """Checksums of the shards that are skipped."""
        return self.builder.skipped

    def check_shard_files(self, rank: int, world_size: int) -> None:
        """See :meth:`Stream.check_shard_files`."""
        # Where shards may be skipped, a defect is reported when its shard is needed.
        if self.builder.on_error != "skip":
            check_shards(self.storage, self.manifest.shards[rank::world_size])

    def skip(self, sha256: Collection[str]) -> None:
        """See :meth:`Stream.skip`."""
        self.builder.skip(sha256)
        self.blocks.close()  # held blocks may contain documents of the shards that are skipped from now on

    def close(self) -> None:
        """See :meth:`Stream.close`."""
        self.blocks.close()
        self.storage.close()


def open_source(root: str | Path | Storage, stream_config: StreamConfig, skipped: Collection[str] = ()) -> Source:
    """Open a folder of shards; see :func:`open_stream`."""
    storage = open_storage(root, stream_config.storage_options)
    manifest = read_manifest(storage)
    if repeated := find_repeated([(storage, manifest)]):
        raise DataError(
            f"{storage}: has the same content twice: {repeated[0]}; name each folder once, or remove the copies (and "
            f"write the manifest again with tools/inspect_shards.py --write-manifest if they are in one folder)"
        )
    _check_manifest(storage.location(MANIFEST_NAME), manifest, stream_config)
    # Without shuffling these settings have no effect. Fixed values keep them from changing the fingerprint.
    unshuffled = {"slots": 1, "shuffle_shards": 1, "seed": 0, "shuffle": False}
    settings = {name: getattr(stream_config, name) for name in unshuffled} if stream_config.shuffle else unshuffled
    order = Order(
        [shard.tokens for shard in manifest.shards],
        sequence_length=stream_config.sequence_length,
        shuffle_shards=settings["shuffle_shards"],
        seed=settings["seed"],
        shuffle=settings["shuffle"],
        source_number=stream_config.source_number,
        rows=manifest.row_tokens is not None,
    )
    identity = {
        "order_version": ORDER_VERSION,
        "data": manifest.fingerprint,
        "sequence_length": stream_config.sequence_length,
        "document_mask": stream_config.document_mask,
        **settings,
        # Only where it is not 0, so that the first source of a mixture has the identity of a single source.
        **({"source": stream_config.source_number} if stream_config.source_number else {}),
    }
    builder = BlockBuilder(
        storage,
        manifest,
        order,
        vocab_size=stream_config.vocab_size,
        verify=stream_config.verify,
        on_error=stream_config.on_error,
        max_skipped=stream_config.max_skipped,
        skipped=skipped,
    )
    prefetcher = BlockPrefetcher(order.shards, builder.read, builder.build, stream_config.read_threads)
    blocks = BlockSchedule(prefetcher, settings["slots"], stream_config.read_ahead)
    return Source(storage, manifest, order, identity, builder, blocks)


def _check_manifest(path: str, manifest: Manifest, stream_config: StreamConfig) -> None:
    """Check that shards suit the model and the sequence length.

    Raises:
        DataError: they do not.
    """
    vocab_size, sequence_length = stream_config.vocab_size, stream_config.sequence_length
    document_mask = stream_config.document_mask
    if manifest.tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{path}: tokenizer.vocab_size is {manifest.tokenizer.vocab_size}, but model.vocab_size is {vocab_size}: "
            f"tokens could be outside the embedding; set model.vocab_size to at least {manifest.tokenizer.vocab_size}"
        )
    tokens = manifest.totals["tokens"]
    if tokens < sequence_length + 1:
        raise DataError(
            f"{path}: totals.tokens is {tokens}, but a sequence takes data.sequence_length + 1, {sequence_length + 1}; "
            f"set data.sequence_length to at most {tokens - 1}, or make shards of more text"
        )
    if document_mask and tokens == manifest.totals["documents"]:
        raise DataError(
            f"{path}: totals.tokens is totals.documents, {tokens}: every document is one token, so there is nothing to "
            f"predict in it; set data.document_mask=false, or make shards of longer documents"
        )
    if manifest.row_tokens not in (None, sequence_length + 1):
        raise DataError(
            f"{path}: row_tokens is {manifest.row_tokens}, but a sequence takes data.sequence_length + 1, "
            f"{sequence_length + 1}; set data.sequence_length to {manifest.row_tokens - 1}, or make the shards again "
            f"with --sequence-length {sequence_length}"
        )
    if manifest.row_tokens is not None and not document_mask:
        raise DataError(
            f"{path}: row_tokens is {manifest.row_tokens}: the shards are rows filled up with end-of-document tokens, "
            f"which only the document mask keeps from being learned; set data.document_mask=true, or make the shards "
            f"again without --pack"
        )


def fingerprint_of(identity: dict[str, Any]) -> str:
    """Hash of what determines the content of every sequence."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


class Stream:
    """Packed sequences of one or several sources, by sequence number. Any thread may read.

    Memory of each source: the stream holds the current block of each slot that it was asked for, shared between slots,
    and the prefetched ones. For a stream that is read by one of R ranks these are

        at most min(slots / gcd(slots, R), blocks in use) blocks, and ``read_ahead`` or as many more,
        plus max(``read_threads``, ``shuffle_shards``) raw shards of blocks being built, and a copy of one,

    where a block is ``shuffle_shards`` shards of 2 (uint16) or 4 (uint32) bytes per token and 8 per document, and a raw
    shard is the bytes of its file and 128 per document. In addition a process holds some MB of libraries and of
    sequences being assembled, and freed memory that its C library keeps: glibc keeps chunks below 32 MB in one arena
    per thread, which can add half as much again with shards of 2 MB; ``MALLOC_ARENA_MAX=1`` in the environment avoids
    that.

    Reading: an epoch reads each of its blocks once, and once more for each run that begins inside it (see
    :mod:`dcscale.data.stream.order`), as long as the number of ranks divides ``slots``; otherwise each rank reads more
    slots and the blocks that those need. Resuming at any number reads at most two blocks per slot, those that the
    slot's first sequence is in: its documents may come from any of their shards. That is two shards per slot if
    ``shuffle_shards`` is 1.

    Args:
        names: name of each source; a single source has the empty name.
        sources: opened sources.
        planner: maps sequence numbers to placements in the blocks of the sources.
        identity: what determines the content of every sequence.
        reopen: opens the same stream; takes ``skipped``.
    """

    warnings: Sequence[str] = ()
    """What the user should know about the data."""

    def __init__(
        self,
        names: Sequence[str],
        sources: Sequence[Source],
        planner: Planner,
        identity: dict[str, Any],
        reopen: Callable[..., Stream],
    ) -> None:
        self.names, self.sources, self.planner = list(names), list(sources), planner
        self.identity = identity
        """What determines the content of every sequence, for messages about what has changed."""
        self.fingerprint = fingerprint_of(identity)
        """Hash of :attr:`identity`: equal fingerprints mean the same sequence under every number."""
        self._reopen = reopen

    @property
    def reopen(self) -> Callable[[], Stream]:
        """Opens the same stream in another process. Picklable."""
        return partial(self._reopen, skipped=self.skipped)

    @property
    def skipped(self) -> frozenset[str]:
        """Checksums of the shards that are skipped, of all sources."""
        return frozenset().union(*(source.skipped for source in self.sources))

    @property
    def shards_read(self) -> int:
        """Shards read so far, repetitions included."""
        return sum(source.builder.shards_read for source in self.sources)

    @property
    def tokenizer(self) -> TokenizerInfo:
        """The tokenizer that made the tokens of all sources."""
        return self.sources[0].manifest.tokenizer

    @property
    def has_packed_rows(self) -> bool:
        """Whether any source consists of packed rows, whose ends may be padding."""
        return any(source.manifest.row_tokens is not None for source in self.sources)

    def epochs(self, count: int) -> dict[str, float]:
        """How many epochs of each source the first ``count`` sequences are, by name."""
        return {
            name: self.planner.count(number, count) / source.order.sequences_per_epoch
            for number, (name, source) in enumerate(zip(self.names, self.sources))
        }

    def check_shard_files(self, rank: int = 0, world_size: int = 1) -> None:
        """Check, without reading them, that this rank's share of the shards exists with the right sizes.

        Does nothing where shards may be skipped.

        Raises:
            DataError: a shard is missing or has another size.
        """
        for source in self.sources:
            source.check_shard_files(rank, world_size)

    def sequence(self, number: int) -> Sequences:
        """A single sequence, N = 1; see :meth:`sequences`."""
        return self.sequences([number])

    def sequences(self, numbers: Numbers) -> Sequences:
        """The sequences with these numbers, one per row; None is a row of padding.

        Raises:
            DataError: a shard that they need cannot be used, or a number is negative.
        """
        return next(self.each([numbers]))

    def each(self, steps: Iterable[Numbers]) -> Iterator[Sequences]:
        """:meth:`sequences` of each step, prefetching the blocks of later steps. Cancels earlier calls."""
        for source in self.sources:
            source.blocks.restart()
        groups = plan_groups(steps, self.planner, self.identity["sequence_length"])
        yield from assemble_ahead(groups, self._announce, self._wants_more, self._assemble)

    def skip(self, sha256: Collection[str]) -> None:
        """Skip the shards with these checksums too; no call of :meth:`each` may be running.

        Raises:
            DataError: more of a source would be lost than allowed.
        """
        for source in self.sources:
            source.skip(sha256)

    def close(self) -> None:
        """Release all blocks, and fail threads that wait for one with a DataError. The next call reads again."""
        for source in self.sources:
            source.close()

    def _announce(self, placement: Placement) -> None:
        self.sources[placement.source].blocks.announce(placement)

    def _wants_more(self) -> bool:
        return any(source.blocks.wants_more for source in self.sources)

    def _assemble(self, group: Group) -> Iterator[Sequences]:
        buffer = SequenceBuffer(len(group), self.identity["sequence_length"], self.tokenizer.eos_id)
        for placement in group.placements:
            source = self.sources[placement.source]
            # Take one block at a time: taking the next may evict it.
            buffer.append(placement, source.blocks.take(placement), source.order.stride)
        return buffer.finish(self.identity["document_mask"]).split(group.sizes)


class SequenceStream(Stream):
    """Stream of a single source; made by :func:`open_stream`."""

    def __init__(self, source: Source, reopen: Callable[..., SequenceStream]) -> None:
        planner = SinglePlanner(source.order, source.identity["slots"])
        super().__init__([""], [source], planner, source.identity, reopen)

    @property
    def storage(self) -> Storage:
        """Where the shards are."""
        return self.sources[0].storage

    @property
    def manifest(self) -> Manifest:
        """What the shards hold."""
        return self.sources[0].manifest

    @property
    def sequences_per_epoch(self) -> int:
        """N, sequences in an epoch; numbers [e * N, (e + 1) * N) are epoch e."""
        return self.sources[0].order.sequences_per_epoch

    @property
    def targets_per_epoch(self) -> int:
        """Targets with a loss in an epoch."""
        totals = self.manifest.totals
        # Every token is a target but the first of each document, or of the epoch without the document mask.
        return totals["tokens"] - (totals["documents"] if self.identity["document_mask"] else 1)

    @property
    def text_bytes_per_target(self) -> float | None:
        """Mean UTF-8 bytes of text per target; None where the text is not known.

        Bits per byte = (mean loss in nats per target) / ln 2 / this.
        """
        return self.manifest.totals["text_bytes"] / self.targets_per_epoch or None


def open_stream(
    root: str | Path | Storage, stream_config: StreamConfig, *, skipped: Collection[str] = ()
) -> SequenceStream:
    """Open a folder of shards. Only its manifest is read here.

    Args:
        root: folder with a ``manifest.json``, as ``tools/make_shards.py`` writes it, or anything else that
            :func:`dcscale.data.storage.open_storage` takes.
        stream_config: which sequences, and how they are read.
        skipped: checksums of shards that were skipped before.

    Raises:
        DataError: the manifest is missing or malformed, a shard is in it twice, the tokenizer's vocabulary is larger
            than ``vocab_size``, or the data does not fill one sequence, has no target or consists of rows of another
            length.
    """
    return SequenceStream(open_source(root, stream_config, skipped), partial(open_stream, root, stream_config))
