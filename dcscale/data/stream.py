"""A folder of shards as an endless, numbered stream of packed sequences."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dcscale.data.errors import DataError
from dcscale.data.manifest import MANIFEST_NAME, Manifest, TokenizerInfo, read_manifest
from dcscale.data.order import ORDER_VERSION, Order
from dcscale.data.packing import SequenceBuffer, Sequences, Window, fills_rows, pack_rows, pack_window
from dcscale.data.shards import check_shards, read_shard
from dcscale.data.sources import Source, open_source


def open_stream(
    root: str | Path | Source,
    *,
    vocab_size: int,
    sequence_length: int,
    seed: int,
    shuffle_shards: int,
    slots: int,
    document_mask: bool,
    verify: bool,
    shuffle: bool = True,
    source_number: int = 0,
) -> SequenceStream:
    """Open a folder of shards. Only its manifest is read here.

    Args:
        root: folder with a ``manifest.json``, as ``tools/make_shards.py`` writes it, or see
            :func:`dcscale.data.sources.open_source`.
        vocab_size: the model's; at least the tokenizer's.
        sequence_length: L, inputs (and targets) a sequence.
        seed: seed of the order, any whole number.
        shuffle_shards: shards whose documents are shuffled together.
        slots: independent read positions over an epoch.
        document_mask: mask targets that lie in another document than their input, and give document ids.
        verify: check every shard's SHA-256 when it is read.
        shuffle: false reads the documents in the manifest's order, the same in every epoch, one shard at a time, from
            one position; ``seed``, ``shuffle_shards`` and ``slots`` are then not used.
        source_number: number of the source in a mixture, whose sources share a seed.

    Raises:
        DataError: the manifest is missing or malformed, the tokenizer's vocabulary is larger than ``vocab_size``, the
            data do not fill one sequence or give no target or are rows of another length, or an argument is out of
            range.
    """
    reopen = partial(open_stream, **locals())
    limits = {"vocab_size": vocab_size, "sequence_length": sequence_length, "slots": slots}
    for name, value in {**limits, "shuffle_shards": shuffle_shards}.items():
        if value < 1:
            raise DataError(f"{name} is {value}, but must be at least 1")
    source = open_source(root)
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
    if not shuffle:
        slots = shuffle_shards = 1
        seed = 0
    order = Order(
        [shard.tokens for shard in manifest.shards],
        sequence_length=sequence_length,
        slots=slots,
        shuffle_shards=shuffle_shards,
        seed=seed,
        shuffle=shuffle,
        source=source_number,
        rows=manifest.row_tokens is not None,
    )
    identity = {
        "order_version": ORDER_VERSION,
        "data": manifest.fingerprint,
        "sequence_length": sequence_length,
        "slots": slots,
        "shuffle": shuffle,
        "shuffle_shards": shuffle_shards,
        "seed": seed,
        "document_mask": document_mask,
        **({"source": source_number} if source_number else {}),
    }
    return SequenceStream(source, manifest, order, identity, reopen, vocab_size=vocab_size, verify=verify)


def fingerprint_of(identity: dict[str, Any]) -> str:
    """Hash of what decides the content of every sequence."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


class SequenceStream:
    """Packed sequences by global number; made by :func:`open_stream`. Any thread may read.

    Memory: position g belongs to lane g mod ``slots``, and the stream keeps the window in which each lane that it was
    asked for stands, shared between lanes. Of a stream read by one of R ranks that is

        at most min(slots / gcd(slots, R), windows in use) windows, plus the one being made and the raw shards of it,

    where a window is ``shuffle_shards`` shards of 2 (uint16) or 4 (uint32) bytes a token.
    Reading: an epoch reads each of its windows once and once more for each slot that begins inside it, as long as the
    number of ranks divides ``slots``; otherwise each rank visits more slots and reads what those need.
    """

    def __init__(
        self,
        source: Source,
        manifest: Manifest,
        order: Order,
        identity: dict[str, Any],
        reopen: Callable[[], SequenceStream],
        *,
        vocab_size: int,
        verify: bool,
    ) -> None:
        self.source = source
        self.manifest = manifest
        self.identity = identity
        """What decides the content of every sequence, for messages about what has changed."""
        self.fingerprint = fingerprint_of(identity)
        """Hash of :attr:`identity`: equal fingerprints mean the same sequence under every number."""
        self.reopen = reopen
        """Opens the same stream in another process, to which it can be sent."""
        self.shards_read = 0
        """Shards read so far, repetitions included."""
        self._order = order
        self._vocab_size = vocab_size
        self._verify = verify
        self._lock = threading.Lock()
        self._windows: dict[tuple[int, int], Window] = {}
        self._lanes: dict[int, tuple[int, int]] = {}

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

        Raises:
            DataError: a shard is missing or has another size.
        """
        check_shards(self.source, self.manifest.shards[rank::world_size])

    def sequence(self, g: int) -> Sequences:
        """Sequence ``g`` as one row, N = 1; see :meth:`sequences`."""
        return self.sequences([g])

    def sequences(self, numbers: Sequence[int | None]) -> Sequences:
        """The sequences with these global numbers, a row each; None gives a row of padding.

        Raises:
            DataError: a shard that they lie in cannot be used, or a number is negative.
        """
        buffer = self.buffer(len(numbers))
        with self._lock:
            for row, g in enumerate(numbers):
                if g is None:
                    continue
                if g < 0:
                    raise DataError(f"sequence number {g} must not be negative")
                self._append(buffer, row, g % self._order.slots, *self._order.locate(g))
        return buffer.finish(self.identity["document_mask"])

    def buffer(self, count: int) -> SequenceBuffer:
        """Room for ``count`` sequences."""
        return SequenceBuffer(count, self._order.sequence_length, self.tokenizer.eos_id)

    def append(self, buffer: SequenceBuffer, row: int, lane: int, epoch: int, index: int) -> None:
        """Put sequence ``index`` of an epoch into a row, read by a lane that another order than its own leads.

        Raises:
            DataError: a shard that it lies in cannot be used.
        """
        with self._lock:
            self._append(buffer, row, lane, epoch, index)

    def _append(self, buffer: SequenceBuffer, row: int, lane: int, epoch: int, index: int) -> None:
        for piece in self._order.pieces(epoch, index):
            window = self._stand_in(lane, epoch, piece.window)
            buffer.append(row, window, piece.start, piece.stop)

    def _stand_in(self, lane: int, epoch: int, number: int) -> Window:
        """Move a lane to a window, which is then kept until the last lane leaves it."""
        key = (epoch, number)
        if self._lanes.get(lane) != key:
            self._lanes[lane] = key
            in_use = set(self._lanes.values())
            self._windows = {kept: window for kept, window in self._windows.items() if kept in in_use}
        if key not in self._windows:
            self._windows[key] = self._load(epoch, number)
        return self._windows[key]

    def _load(self, epoch: int, number: int) -> Window:
        documents, row_tokens = [], self.manifest.row_tokens
        for shard in self._order.shards(epoch, number):
            info = self.manifest.shards[shard]
            found = read_shard(
                self.source, info, dtype=self.manifest.dtype, vocab_size=self._vocab_size, verify=self._verify
            )
            self.shards_read += 1
            if row_tokens is not None and not fills_rows(found, row_tokens):
                raise DataError(
                    f"{self.source.where(info.name)}: a document lies across the end of a row, but the manifest says "
                    f"that the shards are rows of {row_tokens} tokens; make the shards again with tools/make_shards.py"
                )
            documents += found
        if row_tokens is None:
            return pack_window(documents, self._order.documents(epoch, number, len(documents)))
        rows = sum(map(len, documents)) // row_tokens
        return pack_rows(documents, self._order.documents(epoch, number, rows), row_tokens)
