"""Several sources in one stream: which source each sequence number belongs to, and its position there, in closed form.

1. A pattern of P numbers, repeated, assigns each number to a source. Source s has k_s of every P numbers, and of any
   first n numbers its share to within one: |count - n k_s / P| < 1.
2. The position of a number in its source is the count of earlier numbers of that source. So a source uses each of its
   N sequences once before it uses any of them again, whatever the other sources do.
3. Slot v reads the numbers with g mod V = v. An epoch of a source is cut into one contiguous run per slot, as long as
   the number of sequences of that source that the slot reads during the epoch. So a slot reads each source forward, as
   in a stream of one source, and ranks read no more blocks for it. Where V and P have common factors, some slots never
   read some sources; the others have longer runs.

Axes: S sources, P numbers of the pattern, V slots. A slot walks through the pattern in steps of V, along one of
C = gcd(P, V) cycles of T = P / C numbers each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

import numpy as np

from dcscale.config import DataSource
from dcscale.data.errors import DataError
from dcscale.data.shards.repeated import find_repeated
from dcscale.data.stream.order import Location, Order, Planner
from dcscale.data.stream.stream import Source, Stream, StreamConfig, open_source

MIXTURE_VERSION = 1
MAX_PATTERN = 10_000
"""Largest P."""


def integer_weights(weights: Sequence[float]) -> list[int]:
    """The weights as integers k_s in the same proportions.

    Exact if such integers with a sum of at most ``MAX_PATTERN`` exist, as for weights of up to four decimals that sum
    to 1; otherwise rounded to multiples of 1 / ``MAX_PATTERN`` of the sum, but at least one.
    """
    # repr, so that 0.1 is 1/10 and not the binary fraction next to it
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    integers = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*integers)
    integers = [integer // divisor for integer in integers]
    total = sum(integers)
    if total <= MAX_PATTERN:
        return integers
    return [max(1, round(Fraction(integer * MAX_PATTERN, total))) for integer in integers]


def mixture_pattern(weights: Sequence[int]) -> np.ndarray:
    """The source of each of P = sum(k_s) numbers, int64 [P]; of any first n, source s has n k_s / P to within one.

    Of the sources that would not get ahead of their share, takes the one with the earliest deadline for not falling
    behind it (Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980). The difference is at most
    1 - 1 / (2 S - 2).
    """
    period, slack = sum(weights), max(2 * len(weights) - 2, 1)
    # With D = slack and c_s earlier numbers, all in integers:
    #   s is eligible at number n if  n k_s / P - c_s >= 1 / D,
    #   its deadline is               (c_s + 1 - 1 / D) P / k_s, compared after multiplying by D lcm(k) / P.
    multiple = math.lcm(*weights)
    scale = [multiple // weight for weight in weights]
    counts = [0] * len(weights)
    pattern = []
    for n in range(1, period + 1):
        eligible = [s for s, weight in enumerate(weights) if slack * (weight * n - period * counts[s]) >= period]
        chosen = min(eligible, key=lambda s: (slack * (counts[s] + 1) - 1) * scale[s])
        counts[chosen] += 1
        pattern.append(chosen)
    return np.array(pattern)


class MixedPlanner(Planner):
    """Planner of a mixture.

    Args:
        orders: order of each source.
        weights: k_s of each source, see :func:`integer_weights`.
        slots: V.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[int], slots: int) -> None:
        super().__init__(orders, slots)
        self.weights = list(weights)
        self.pattern_P = mixture_pattern(weights)
        period = len(self.pattern_P)
        is_source_SP = self.pattern_P == np.arange(len(weights))[:, None]
        self._before_SP = _counts_before(is_source_SP)
        self._positions = [np.flatnonzero(is_source_P) for is_source_P in is_source_SP]
        cycles = math.gcd(period, slots)
        # Row c: the positions in the pattern of the numbers c, c + V, c + 2 V, ...
        walk_CT = (np.arange(cycles)[:, None] + slots * np.arange(period // cycles)) % period
        self._phase_P = np.empty(period, dtype=np.int64)  # where in its cycle a position of the pattern is
        self._phase_P[walk_CT] = np.arange(period // cycles)
        self._before_SCT = _counts_before(is_source_SP[:, walk_CT])
        self._run_offsets = lru_cache(maxsize=2 * len(weights))(self._find_run_offsets)

    def locate(self, numbers_N: np.ndarray) -> Location:
        """See :meth:`Planner.locate`."""
        source_N = self.pattern_P[numbers_N % len(self.pattern_P)]
        slot_row_N, slot_N = np.divmod(numbers_N, self.slots)
        epoch_N, index_N = np.empty_like(numbers_N), np.empty_like(numbers_N)
        for source in np.unique(source_N).tolist():
            of_n = np.flatnonzero(source_N == source)
            slot_n = slot_N[of_n]
            epoch_n = self.count(source, numbers_N[of_n]) // self.orders[source].sequences_per_epoch
            index_n = self._count_in_slot(source, slot_n, slot_row_N[of_n])
            for epoch in np.unique(epoch_n).tolist():
                of_epoch = epoch_n == epoch
                index_n[of_epoch] += self._run_offsets(source, epoch)[slot_n[of_epoch]]
            epoch_N[of_n], index_N[of_n] = epoch_n, index_n
        return Location(source_N, epoch_N, index_N, slot_N)

    def count(self, source: int, stop: np.ndarray | int) -> np.ndarray:
        """See :meth:`Planner.count`."""
        periods, rest = np.divmod(stop, len(self.pattern_P))
        return periods * self.weights[source] + self._before_SP[source, rest]

    def _find_run_offsets(self, source: int, epoch: int) -> np.ndarray:
        """Start of each slot's run in an epoch, less the slot's sequences of the source before that epoch, int64 [V].

        With it, index in the epoch = offset + earlier sequences of the source in the slot.
        """
        slots = np.arange(self.slots)
        sequences = self.orders[source].sequences_per_epoch
        bounds = [self._number_of(source, e * sequences) for e in (epoch, epoch + 1)]
        # A slot has ceil((bound - slot) / V) numbers below a bound.
        begin, end = (self._count_in_slot(source, slots, (bound - slots - 1) // self.slots + 1) for bound in bounds)
        return np.cumsum(end - begin) - end

    def _number_of(self, source: int, count: int) -> int:
        """The sequence number of a source that has ``count`` earlier ones of the same source."""
        periods, rest = divmod(count, self.weights[source])
        return periods * len(self.pattern_P) + int(self._positions[source][rest])

    def _count_in_slot(self, source: int, slot: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """How many of the first ``stop`` numbers of a slot belong to a source."""
        before_CT = self._before_SCT[source]
        cycle, start = slot % len(before_CT), self._phase_P[slot % len(self.pattern_P)]
        periods, rest = np.divmod(start + stop, before_CT.shape[1] - 1)
        return periods * before_CT[cycle, -1] + before_CT[cycle, rest] - before_CT[cycle, start]


def _counts_before(is_source: np.ndarray) -> np.ndarray:
    """Counts of true before each position of the last axis; a last column has the total."""
    return np.concatenate([np.zeros_like(is_source[..., :1], dtype=np.int64), np.cumsum(is_source, axis=-1)], axis=-1)


def open_mixture(
    sources: Sequence[DataSource], stream_config: StreamConfig, *, skipped: Collection[str] = ()
) -> MixedStream:
    """Open several folders of shards as one stream.

    Args:
        sources: name, root and weight of each; see :func:`dcscale.data.open_stream` for the roots.
        stream_config: which sequences, and how they are read. The number of each source replaces ``source_number``.
        skipped: checksums of shards that were skipped before.

    Raises:
        DataError: a source cannot be opened, has another tokenizer than the first, or no positive weight; or two
            sources have shards in common, unless both have a weight other than the default: then it is meant.
    """
    for source in sources:
        if not 0 < source.weight < math.inf:
            raise DataError(f"the weight of source {source.name} is {source.weight}, but must be a number above 0")
    opened = [
        open_source(source.path, replace(stream_config, source_number=number), skipped)
        for number, source in enumerate(sources)
    ]
    first = opened[0]
    for source in opened:
        if source.manifest.tokenizer != first.manifest.tokenizer:
            raise DataError(
                f"{source.storage}: its tokenizer is {source.manifest.tokenizer}, but that of {first.storage} is "
                f"{first.manifest.tokenizer}; the sources of a mixture need the same: make the shards of one again"
            )
    warnings = _check_repeated(sources, opened)
    weights = integer_weights([source.weight for source in sources])
    planner = MixedPlanner([source.order for source in opened], weights, stream_config.slots)
    reopen = partial(open_mixture, list(sources), stream_config)
    return MixedStream([source.name for source in sources], opened, planner, reopen, warnings)


def _check_repeated(sources: Sequence[DataSource], opened: Sequence[Source]) -> list[str]:
    """Refuse sources with shards in common, or warn of them if their weights show that it is meant."""
    warnings = []
    for repeated in find_repeated([(source.storage, source.manifest) for source in opened]):
        pair = [sources[repeated.first], sources[repeated.second]]
        text = f"sources {pair[0].name} and {pair[1].name} of the mixture have data in common: {repeated}"
        if any(source.weight == DataSource.weight for source in pair):
            raise DataError(
                f"{text}; it would be used twice: remove it from one of them, or, if that is meant, give both a weight "
                f"other than {DataSource.weight:g}"
            )
        warnings.append(f"{text}; it is used with the weight of both")
    return warnings


class MixedStream(Stream):
    """Stream of several sources; made by :func:`open_mixture`."""

    planner: MixedPlanner

    def __init__(
        self,
        names: Sequence[str],
        sources: Sequence[Source],
        planner: MixedPlanner,
        reopen: Callable[..., MixedStream],
        warnings: Sequence[str] = (),
    ) -> None:
        identities = [source.identity for source in sources]
        identity = {
            **{key: _one_or_all([identity[key] for identity in identities]) for key in identities[0]},
            "mixture_version": MIXTURE_VERSION,
            "weights": planner.weights,
        }
        super().__init__(names, sources, planner, identity, reopen)
        self.warnings = warnings

    @property
    def shares(self) -> list[float]:
        """Fraction of the sequences that each source has, from its integer weight."""
        return [weight / sum(self.planner.weights) for weight in self.planner.weights]


def _one_or_all(values: list[Any]) -> Any:
    """The value of all sources, or a list where they differ."""
    return values[0] if all(value == values[0] for value in values) else values
