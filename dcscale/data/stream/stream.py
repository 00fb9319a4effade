"""A folder of shards as an endless, numbered stream of packed sequences."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dcscale.config import Config
from dcscale.data.errors import DataError
from dcscale.data.shards.manifest import MANIFEST_NAME, Manifest, TokenizerInfo, read_manifest
from dcscale.data.shards.shard import check_shards
from dcscale.data.storage import RetryPolicy, Storage, StorageOptions, open_storage
from dcscale.data.stream.block_builder import BlockBuilder
from dcscale.data.stream.block_reader import BlockPrefetcher, Key
from dcscale.data.stream.lookahead import Group, Numbers, made_ahead, placed
from dcscale.data.stream.order import ORDER_VERSION, Order
from dcscale.data.stream.sequences import SequenceBuffer, Sequences


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Which sequences a stream has, in which order, and how their shards are read. Can be sent to other processes.

    Raises:
        DataError: a value is out of range.
    """

    vocab_size: int
    """The model's; at least the tokenizer's."""

    sequence_length: int
    """L, inputs (and targets) of a sequence."""

    seed: int
    """Seed of the order, any whole number."""

    shuffle_shards: int
    """Shards whose documents are shuffled together: a block."""

    slots: int
    """Independent read positions over an epoch."""

    document_mask: bool
    """Mask targets in another document than their input, and make document ids."""

    verify: bool
    """Check every shard's SHA-256 when it is read."""

    shuffle: bool = True
    """False reads the documents in the manifest's order, the same in every epoch, one shard at a time, from one slot;
    ``seed``, ``shuffle_shards`` and ``slots`` are then not used."""

    source_number: int = 0
    """Number of the source in a mixture, whose sources share a seed."""

    storage_options: StorageOptions | None = None
    """How a root outside this machine is read; None takes the defaults."""

    read_ahead: int | None = None
    """Blocks that are read before a sequence needs them, where :meth:`SequenceStream.each` knows which; None is one for
    each slot."""

    read_threads: int = 8
    """Shards read at once."""

    on_error: str = "fail"
    """``fail``, or ``skip`` to skip a shard that cannot be used: masked padding takes its place, so that no sequence
    outside its block changes."""

    max_skipped: float = 0.0
    """Largest part of the tokens that may be lost so."""

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
    def of(cls, config: Config, **changes: Any) -> StreamConfig:
        """What the config of a run says of its training data."""
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


def open_stream(
    root: str | Path | Storage, stream_config: StreamConfig, *, skipped: Collection[str] = ()
) -> SequenceStream:
    """Open a folder of shards. Only its manifest is read here.

    Args:
        root: folder with a ``manifest.json``, as ``tools/make_shards.py`` writes it, or see
            :func:`dcscale.data.storage.open_storage`.
        stream_config: which sequences, and how they are read.
        skipped: checksums of shards that were skipped before.

    Raises:
        DataError: the manifest is missing or malformed, the tokenizer's vocabulary is larger than ``vocab_size``, or
            the data do not fill one sequence, give no target or are rows of another length.
    """
    vocab_size, sequence_length = stream_config.vocab_size, stream_config.sequence_length
    document_mask = stream_config.document_mask
    source = open_storage(root, stream_config.storage_options)
    manifest = read_manifest(source)
    path = source.where(MANIFEST_NAME)
    if manifest.tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{path}: tokenizer.vocab_size is {manifest.tokenizer.vocab_size}, but model.vocab_size is {vocab_size}: "
            f"tokens could lie outside the embedding; set model.vocab_size to at least {manifest.tokenizer.vocab_size}"
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
    in_order = {"slots": 1, "shuffle_shards": 1, "seed": 0, "shuffle": False}
    order_settings = (
        in_order if not stream_config.shuffle else {name: getattr(stream_config, name) for name in in_order}
    )
    order = Order(
        [shard.tokens for shard in manifest.shards],
        sequence_length=sequence_length,
        source=stream_config.source_number,
        rows=manifest.row_tokens is not None,
        **order_settings,
    )
    identity = {
        "order_version": ORDER_VERSION,
        "data": manifest.fingerprint,
        "sequence_length": sequence_length,
        "document_mask": document_mask,
        **order_settings,
        **({"source": stream_config.source_number} if stream_config.source_number else {}),
    }
    builder = BlockBuilder(
        source,
        manifest,
        order,
        vocab_size=vocab_size,
        verify=stream_config.verify,
        on_error=stream_config.on_error,
        max_skipped=stream_config.max_skipped,
        skipped=skipped,
    )
    reopen = partial(open_stream, root, stream_config)
    return SequenceStream(source, manifest, order, identity, builder, reopen, stream_config)


def fingerprint_of(identity: dict[str, Any]) -> str:
    """Hash of what decides the content of every sequence."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


class Place(NamedTuple):
    """Where sequences of a group lie that follow each other in a lane and a window, or a part of one."""

    rows_n: np.ndarray
    """Their rows in the group."""

    lane: int
    window: Key

    column: int
    start: int
    stop: int
    """See :class:`dcscale.data.stream.order.Stretch`."""


class SequenceStream:
    """Packed sequences by global number; made by :func:`open_stream`. Any thread may read.

    Memory: position g belongs to lane g mod ``slots``, and the stream keeps the window in which each lane that it was
    asked for stands, shared between lanes, and those that are read ahead. Of a stream read by one of R ranks that is

        at most min(slots / gcd(slots, R), windows in use) windows, and ``read_ahead`` or as many once more,
        plus max(``read_threads``, ``shuffle_shards``) raw shards of those in the making, and a copy of one,

    where a window is ``shuffle_shards`` shards of 2 (uint16) or 4 (uint32) bytes a token and 8 a document, and a raw
    shard is the bytes of its file and 128 a document. Beside these a process has some MB of libraries and of sequences
    in the making, and what its C library keeps of freed blocks: glibc in an arena for each thread, of blocks below
    32 MB, which can be half as much again with shards of 2 MB; ``MALLOC_ARENA_MAX=1`` in the environment keeps it from
    that.
    To go on at any place, at most the two windows are read that a lane's first sequence lies in, 2 ``shuffle_shards``
    shards a lane: its documents may come from any shard of the window. So two shards a slot is with one shard a window.
    Reading: an epoch reads each of its windows once and once more for each slot that begins inside it, as long as the
    number of ranks divides ``slots``; otherwise each rank visits more slots and reads what those need.
    """

    def __init__(
        self,
        source: Storage,
        manifest: Manifest,
        order: Order,
        identity: dict[str, Any],
        builder: BlockBuilder,
        reopen: Callable[[], SequenceStream],
        stream_config: StreamConfig,
    ) -> None:
        self.source = source
        self.manifest = manifest
        self.identity = identity
        """What decides the content of every sequence, for messages about what has changed."""
        self.fingerprint = fingerprint_of(identity)
        """Hash of :attr:`identity`: equal fingerprints mean the same sequence under every number."""
        self._order, self._builder, self._reopen = order, builder, reopen
        self._windows = BlockPrefetcher(builder.shards, builder.read, builder.pack, stream_config.read_threads)
        self._read_ahead = stream_config.read_ahead
        self._lock = threading.Lock()
        self._lanes: dict[int, Key] = {}
        self._expected: deque[Place] = deque()
        self._wanted: dict[Key, None] = {}
        self._room = 0

    @property
    def reopen(self) -> Callable[[], SequenceStream]:
        """Opens the same stream in another process, to which it can be sent."""
        return partial(self._reopen, skipped=self.skipped)

    @property
    def skipped(self) -> frozenset[str]:
        """Checksums of the shards that were given up."""
        return self._builder.skipped

    @property
    def shards_read(self) -> int:
        """Shards read so far, repetitions included."""
        return self._builder.shards_read

    @property
    def tokenizer(self) -> TokenizerInfo:
        """The tokenizer that made the tokens."""
        return self.manifest.tokenizer

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences in an epoch; numbers [e * this, (e + 1) * this) are epoch e."""
        return self._order.sequences_per_epoch

    def epochs(self, count: int) -> dict[str, float]:
        """How many epochs the first ``count`` sequences are, by the source's name: the only one has none."""
        return {"": count / self.sequences_per_epoch}

    @property
    def targets_per_epoch(self) -> int:
        """Targets with a loss in an epoch."""
        totals = self.manifest.totals
        return totals["tokens"] - (totals["documents"] if self.identity["document_mask"] else 1)

    @property
    def text_bytes_per_target(self) -> float | None:
        """UTF-8 bytes of text a target stands for, on average; None where the text is not known.

        Bits per byte = (mean loss in nats a target) / ln 2 / this.
        """
        return self.manifest.totals["text_bytes"] / self.targets_per_epoch or None

    def check_shard_files(self, rank: int = 0, world_size: int = 1) -> None:
        """Check, without reading them, that this rank's share of the shards is there with the right sizes.

        Where shards may be given up, a defect is told when its shard is needed, and not here.

        Raises:
            DataError: a shard is missing or has another size.
        """
        if self._builder.on_error == "skip":
            return
        check_shards(self.source, self.manifest.shards[rank::world_size])

    def sequence(self, g: int) -> Sequences:
        """Sequence ``g`` as one row, N = 1; see :meth:`sequences`."""
        return self.sequences([g])

    def sequences(self, numbers: Numbers) -> Sequences:
        """The sequences with these global numbers, a row each; None gives a row of padding.

        Raises:
            DataError: a shard that they lie in cannot be used, or a number is negative.
        """
        return next(self.each([numbers]))

    def each(self, steps: Iterable[Numbers]) -> Iterator[Sequences]:
        """:meth:`sequences` of each step, reading ahead what the next ones need; ends what an earlier call reads."""
        self.begin()
        groups = placed(steps, self._needed, self._places, self.identity["sequence_length"])
        yield from made_ahead(groups, self.expect, self.hungry, self._make)

    def skip(self, sha256: Collection[str]) -> None:
        """Give up the shards with these checksums too; no call of :meth:`each` may be running.

        Raises:
            DataError: more would be lost than may be.
        """
        self._builder.skip(sha256)
        self._windows.close()

    def close(self) -> None:
        """Free who waits for a sequence, with a DataError, and keep nothing; the next call reads anew."""
        self._windows.close()
        self.source.close()

    def _make(self, group: Group[Place]) -> Iterator[Sequences]:
        buffer = self.buffer(len(group))
        for place in group:
            self.append(buffer, place)
        return buffer.finish(self.identity["document_mask"]).split(group.sizes)

    def _needed(self, numbers_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.windows(*self._order.locate(numbers_N))

    def _places(self, numbers_N: np.ndarray, group_N: np.ndarray, row_N: np.ndarray) -> Iterator[tuple[int, Place]]:
        return self.places(numbers_N % self._order.slots, *self._order.locate(numbers_N), group_N, row_N)

    def buffer(self, count: int) -> SequenceBuffer:
        """Room for ``count`` sequences."""
        return SequenceBuffer(count, self._order.sequence_length, self.tokenizer.eos_id)

    # -- for what leads several streams: it says what comes next, and takes it in that order ------------------------

    def windows(self, epoch_N: np.ndarray, index_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`dcscale.data.stream.order.Order.windows`."""
        return self._order.windows(epoch_N, index_N)

    def places(
        self, lane_N: np.ndarray, epoch_N: np.ndarray, index_N: np.ndarray, group_N: np.ndarray, row_N: np.ndarray
    ) -> Iterator[tuple[int, Place]]:
        """Where sequences ``index`` of an epoch lie that ``lane`` is to read for rows of groups, and in which group."""
        by_lane = np.lexsort((row_N, lane_N, group_N))
        lane_N, group_N, row_N = lane_N[by_lane], group_N[by_lane], row_N[by_lane]
        lanes, groups = lane_N.tolist(), group_N.tolist()
        for stretch in self._order.stretches(epoch_N[by_lane], index_N[by_lane], group_N * self._order.slots + lane_N):
            first, count, epoch, window, column, start, stop = stretch
            rows_n = row_N[first : first + count]
            yield groups[first], Place(rows_n, lanes[first], (epoch, window), column, start, stop)

    def begin(self) -> None:
        """Expect nothing any more."""
        with self._lock:
            if self._windows.open():
                self._lanes.clear()
            self._expected.clear()
            self._look_ahead()

    def expect(self, place: Place) -> None:
        """Say that a place will be asked for, after those said before."""
        with self._lock:
            self._expected.append(place)
            if self._room > 0 and place.window not in self._wanted:
                self._want([*self._wanted, place.window])

    def hungry(self) -> bool:
        """Whether it would read ahead if it were told of more sequences."""
        return self._room > 0

    def append(self, buffer: SequenceBuffer, place: Place) -> None:
        """Put sequences into their rows.

        Raises:
            DataError: a shard that they lie in cannot be used.
        """
        with self._lock:
            if self._expected and self._expected[0] is place:
                self._expected.popleft()
            if self._lanes.get(place.lane) != place.window:
                self._lanes[place.lane] = place.window
                self._look_ahead()
            window, stride = self._windows.get(place.window), self._order.stride
            buffer.append(place.rows_n, place.column, window, place.start, place.stop, stride)

    def _look_ahead(self) -> None:
        """Let go of windows that no lane stands in any more, and read those that are needed next."""
        wanted = dict.fromkeys(self._lanes.values())
        most = len(wanted) + self._most_ahead()
        for place in self._expected:
            if len(wanted) >= most:
                break
            wanted[place.window] = None
        self._want(list(wanted)[:most])

    def _most_ahead(self) -> int:
        if self._read_ahead is not None:
            return self._read_ahead
        return len(self._lanes.keys() | {place.lane for place in islice(self._expected, self._order.slots)})

    def _want(self, windows: list[Key]) -> None:
        self._wanted = dict.fromkeys(windows)
        self._room = self._most_ahead() - len(self._wanted.keys() - self._lanes.values())
        self._windows.want(windows)
