"""Several sources in one stream: whose sequence global number g is, and which of its own, in closed form.

1. A pattern of P numbers, repeated, says which source each number belongs to. Storage s has k_s of every P, and of any
   first n numbers never more than one too many or too few: |count - n k_s / P| < 1.
2. The count of earlier numbers of its source is a number's place in the source's own sequence of epochs: a source uses
   each of its N sequences once before any is used again, whatever the others do.
3. Lane v is the numbers with g mod V = v, for V slots. A source's epoch is cut into one contiguous run a lane, as long
   as the lane has numbers of that source while the epoch lasts. So a lane reads forward in each source, as it does in
   a stream of one source, and a rank reads no more for it (see :class:`dcscale.data.SequenceStream`). Where V
   and P have common factors, some lanes never meet some source; the others then have longer runs.

Axes: S sources, P numbers of the pattern, V lanes; a lane's walk through the pattern, in steps of V, is one of C cycles
of T numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

import numpy as np

from dcscale.config import DataSource
from dcscale.data.errors import DataError
from dcscale.data.shards.manifest import TokenizerInfo
from dcscale.data.stream.lookahead import Group, Numbers, made_ahead, placed
from dcscale.data.stream.sequences import Sequences
from dcscale.data.stream.stream import Place, SequenceStream, StreamConfig, fingerprint_of, open_stream

MIXTURE_VERSION = 1
LONGEST_PATTERN = 10_000


def whole_parts(weights: Sequence[float]) -> list[int]:
    """The weights as whole numbers k_s in the same proportions.

    They are exact if such numbers with a sum of at most ``LONGEST_PATTERN`` exist, as for weights of up to four
    decimals that add up to 1; else rounded to multiples of 1 / ``LONGEST_PATTERN`` of the whole, at least one.
    """
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    parts = [int(fraction * scale) for fraction in fractions]
    common = math.gcd(*parts)
    parts = [part // common for part in parts]
    whole = sum(parts)
    if whole <= LONGEST_PATTERN:
        return parts
    return [max(1, round(Fraction(part * LONGEST_PATTERN, whole))) for part in parts]


def share_out(parts: Sequence[int]) -> np.ndarray:
    """The source of each of P = sum(parts) numbers, int64 [P]; of any first n, source s has n k_s / P, to within one.

    Of the sources that may come without getting ahead, the one comes that must come first so as not to fall behind
    (Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980): the difference is at most
    1 - 1 / (2 S - 2).
    """
    period, slack = sum(parts), max(2 * len(parts) - 2, 1)
    common = math.lcm(*parts)
    step = [common // part for part in parts]
    given = [0] * len(parts)
    pattern = []
    for n in range(1, period + 1):
        able = [s for s, part in enumerate(parts) if slack * (part * n - period * given[s]) >= period]
        chosen = min(able, key=lambda s: (slack * (given[s] + 1) - 1) * step[s])
        given[chosen] += 1
        pattern.append(chosen)
    return np.array(pattern)


class MixedOrder:
    """Where every sequence of a mixture lies.

    Args:
        parts: k_s of each source, see :func:`whole_parts`.
        sequences_per_epoch: N of each source.
        slots: V.
    """

    def __init__(self, parts: Sequence[int], sequences_per_epoch: Sequence[int], slots: int) -> None:
        self.parts, self.slots = list(parts), slots
        self.sequences_per_epoch = list(sequences_per_epoch)
        self.pattern_P = share_out(parts)
        period = len(self.pattern_P)
        is_source_SP = self.pattern_P == np.arange(len(parts))[:, None]
        self._before_SP = _counts_before(is_source_SP)
        self._places = [np.flatnonzero(is_source_P) for is_source_P in is_source_SP]
        cycles = math.gcd(period, slots)
        walk_CT = (np.arange(cycles)[:, None] + slots * np.arange(period // cycles)) % period
        self._phase_P = np.empty(period, dtype=np.int64)
        self._phase_P[walk_CT] = np.arange(period // cycles)
        self._before_SCT = _counts_before(is_source_SP[:, walk_CT])
        self._epoch = lru_cache(maxsize=2 * len(parts))(self._plan_epoch)

    def locate(self, g: int) -> tuple[int, int, int]:
        """(source, epoch of that source, index of the sequence in it) of global sequence number ``g``."""
        source = int(self.sources(g))
        epoch, index = self.locate_in(source, np.array([g]))
        return source, int(epoch[0]), int(index[0])

    def sources(self, g: np.ndarray | int) -> np.ndarray:
        """The source of global sequence numbers, in their shape."""
        return self.pattern_P[g % len(self.pattern_P)]

    def locate_in(self, source: int, numbers_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch [N], index in it [N]) of global sequence numbers that belong to a source."""
        epoch_N = self.count(source, numbers_N) // self.sequences_per_epoch[source]
        row_N, lane_N = np.divmod(numbers_N, self.slots)
        index_N = self._rows(source, lane_N, row_N)
        for epoch in np.unique(epoch_N).tolist():
            of_n = epoch_N == epoch
            index_N[of_n] += self._epoch(source, epoch)[lane_N[of_n]]
        return epoch_N, index_N

    def count(self, source: int, stop: np.ndarray | int) -> np.ndarray:
        """How many of the numbers below ``stop`` belong to a source, in its shape."""
        whole, part = np.divmod(stop, len(self.pattern_P))
        return whole * self.parts[source] + self._before_SP[source, part]

    def _plan_epoch(self, source: int, epoch: int) -> np.ndarray:
        """For each lane the index in the epoch of its first sequence there, less its earlier rows, int64 [V]."""
        lanes = np.arange(self.slots)
        bounds = [self._number(source, e * self.sequences_per_epoch[source]) for e in (epoch, epoch + 1)]
        begin, end = (self._rows(source, lanes, (bound - lanes - 1) // self.slots + 1) for bound in bounds)
        return np.cumsum(end - begin) - end

    def _number(self, source: int, count: int) -> int:
        """The global number of which ``count`` earlier ones belong to the same source."""
        whole, part = divmod(count, self.parts[source])
        return whole * len(self.pattern_P) + int(self._places[source][part])

    def _rows(self, source: int, lane: np.ndarray | int, row: np.ndarray | int) -> np.ndarray:
        """How many of a lane's first ``row`` numbers belong to a source."""
        before_CT = self._before_SCT[source]
        cycle, start = lane % len(before_CT), self._phase_P[lane % len(self.pattern_P)]
        whole, part = np.divmod(start + row, before_CT.shape[1] - 1)
        return whole * before_CT[cycle, -1] + before_CT[cycle, part] - before_CT[cycle, start]


def _counts_before(is_source: np.ndarray) -> np.ndarray:
    """How often true comes before each place of the last axis, and in all of it."""
    return np.concatenate([np.zeros_like(is_source[..., :1], dtype=np.int64), np.cumsum(is_source, axis=-1)], axis=-1)


def open_mixture(
    sources: Sequence[DataSource], stream_config: StreamConfig, *, skipped: Collection[str] = ()
) -> MixedStream:
    """Open several roots of shards as one stream, each as :func:`dcscale.data.open_stream` does.

    Raises:
        DataError: one of them cannot be opened, has another tokenizer than the first, or no positive weight.
    """
    for source in sources:
        if not 0 < source.weight < math.inf:
            raise DataError(f"the weight of source {source.name} is {source.weight}, but must be a number above 0")
    streams = [
        open_stream(source.path, replace(stream_config, source_number=number), skipped=skipped)
        for number, source in enumerate(sources)
    ]
    for stream in streams:
        if stream.tokenizer != streams[0].tokenizer:
            raise DataError(
                f"{stream.source}: its tokenizer is {stream.tokenizer}, but that of {streams[0].source} is "
                f"{streams[0].tokenizer}; the sources of a mixture need the same: make the shards of one again"
            )
    parts = whole_parts([source.weight for source in sources])
    order = MixedOrder(parts, [stream.sequences_per_epoch for stream in streams], stream_config.slots)
    reopen = partial(open_mixture, list(sources), stream_config)
    return MixedStream([source.name for source in sources], streams, order, reopen)


class MixedStream:
    """Sequences of several streams by global number; made by :func:`open_mixture`. Any thread may read.

    Memory and reading are the sum of what its streams state for themselves.
    """

    def __init__(
        self,
        names: Sequence[str],
        streams: Sequence[SequenceStream],
        order: MixedOrder,
        reopen: Callable[[], MixedStream],
    ) -> None:
        self.names, self.streams, self.order = list(names), list(streams), order
        self._reopen = reopen
        identities = [stream.identity for stream in streams]
        self.identity = {
            **{key: _one_or_all([identity[key] for identity in identities]) for key in identities[0]},
            "mixture_version": MIXTURE_VERSION,
            "weights": order.parts,
        }
        """What decides the content of every sequence, for messages about what has changed."""
        self.fingerprint = fingerprint_of(self.identity)
        """Hash of :attr:`identity`: equal fingerprints mean the same sequence under every number."""

    @property
    def reopen(self) -> Callable[[], MixedStream]:
        """Opens the same stream in another process, to which it can be sent."""
        return partial(self._reopen, skipped=frozenset().union(*(stream.skipped for stream in self.streams)))

    @property
    def tokenizer(self) -> TokenizerInfo:
        """The tokenizer that made the tokens of all sources."""
        return self.streams[0].tokenizer

    @property
    def shards_read(self) -> int:
        """Shards read so far, repetitions included."""
        return sum(stream.shards_read for stream in self.streams)

    @property
    def shares(self) -> list[float]:
        """The share of each source, as its weight was taken."""
        return [part / sum(self.order.parts) for part in self.order.parts]

    def epochs(self, count: int) -> dict[str, float]:
        """How many epochs of each source the first ``count`` sequences are, by its name."""
        return {
            name: self.order.count(source, count) / self.order.sequences_per_epoch[source]
            for source, name in enumerate(self.names)
        }

    def check_shard_files(self, rank: int = 0, world_size: int = 1) -> None:
        """Check, without reading them, that this rank's share of the shards is there with the right sizes.

        Raises:
            DataError: a shard is missing or has another size.
        """
        for stream in self.streams:
            stream.check_shard_files(rank, world_size)

    def sequences(self, numbers: Numbers) -> Sequences:
        """The sequences with these global numbers, a row each; None gives a row of padding.

        Raises:
            DataError: a shard that they lie in cannot be used, or a number is negative.
        """
        return next(self.each([numbers]))

    def each(self, steps: Iterable[Numbers]) -> Iterator[Sequences]:
        """:meth:`sequences` of each step, reading ahead what the next ones need; ends what an earlier call reads."""
        for stream in self.streams:
            stream.begin()
        groups = placed(steps, self._needed, self._places, self.identity["sequence_length"])
        yield from made_ahead(groups, self._expect, self._hungry, self._make)

    def skip(self, sha256: Collection[str]) -> None:
        """Give up the shards with these checksums too; no call of :meth:`each` may be running.

        Raises:
            DataError: more of a source would be lost than may be.
        """
        for stream in self.streams:
            stream.skip(sha256)

    def close(self) -> None:
        """Free who waits for a sequence, with a DataError, and keep nothing; the next call reads anew."""
        for stream in self.streams:
            stream.close()

    def _make(self, group: Group[tuple[int, Place]]) -> Iterator[Sequences]:
        buffer = self.streams[0].buffer(len(group))
        for source, place in group:
            self.streams[source].append(buffer, place)
        return buffer.finish(self.identity["document_mask"]).split(group.sizes)

    def _needed(self, numbers_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Windows as :func:`placed` wants them: no two sources share a number."""
        needed_2N = np.empty((2, len(numbers_N)), dtype=np.int64)
        for source, of_n, located in self._by_source(numbers_N):
            needed_2N[:, of_n] = np.array(self.streams[source].windows(*located)) * len(self.streams) + source
        return needed_2N[0], needed_2N[1]

    def _places(
        self, numbers_N: np.ndarray, group_N: np.ndarray, row_N: np.ndarray
    ) -> Iterator[tuple[int, tuple[int, Place]]]:
        for source, of_n, located in self._by_source(numbers_N):
            lane_n = numbers_N[of_n] % self.order.slots
            places = self.streams[source].places(lane_n, *located, group_N[of_n], row_N[of_n])
            yield from ((group, (source, place)) for group, place in places)

    def _by_source(self, numbers_N: np.ndarray) -> Iterator[tuple[int, np.ndarray, tuple[np.ndarray, np.ndarray]]]:
        """Each source that numbers belong to: which do, and their epochs and indices in it."""
        source_N = self.order.sources(numbers_N)
        for source in np.unique(source_N).tolist():
            of_n = source_N == source
            yield source, of_n, self.order.locate_in(source, numbers_N[of_n])

    def _hungry(self) -> bool:
        return any(stream.hungry() for stream in self.streams)

    def _expect(self, place: tuple[int, Place]) -> None:
        self.streams[place[0]].expect(place[1])


Stream = SequenceStream | MixedStream
"""What a loader reads."""


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else values
