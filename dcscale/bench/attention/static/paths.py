"""Counts the instructions that a warp issues, by control flow: which way it takes, and how often loops run.

A program of a mixing kernel works on one tile, and its tile decides which way it takes:

edge      an edge of the mask crosses the tile: the path with the most instructions;
interior  all of the tile is visible: of the paths that run the most iterations of loops that read global memory, the
          one with the fewest instructions (masks are branches on such a path);
unseen    nothing of the tile is visible: of the paths that run the fewest such iterations, the one with the most
          instructions (it may have to write zeros).

A loop runs as often as its counter says: an integer that starts as a constant, grows by a constant, and is compared
with a constant where the loop ends. Where no such counter is found, the trips are assumed and the path says so.
"""

from __future__ import annotations

import graphlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from dcscale.bench.attention.static.sass import CLASSES, END, Block, Instruction, SassError, parse_blocks, value_of

_MOST_TRIPS = 1 << 16


@dataclass
class Loop:
    """A natural loop: its blocks, all entered through the header, and how often the header runs."""

    header: int
    blocks: frozenset[int]
    trips: int | None = None
    """None: no counter was found. A loop whose counter ends it is assumed to run at least twice."""


class Path(NamedTuple):
    """What a warp issues on one way through the code."""

    counts: Counter[str]
    """Instructions by class."""
    reading: int = 0
    """Iterations of loops that read global memory."""
    assumed: int = 0
    """Loops on it whose trips are assumed."""

    @property
    def instructions(self) -> int:
        """Instructions of all classes."""
        return self.counts.total()

    def then(self, other: Path, times: int = 1) -> Path:
        """This path, and ``times`` times another."""
        counts = Counter({name: self.counts[name] + times * other.counts[name] for name in CLASSES})
        return Path(+counts, self.reading + times * other.reading, self.assumed + other.assumed)


class Paths(NamedTuple):
    """The paths of the three kinds of tiles."""

    interior: Path
    edge: Path
    unseen: Path


Rank = Callable[[Path], Any]
"""What to make as large as possible on a path."""
_RANKS = Paths(
    # Short loops are unrolled, so a path may read without a loop.
    lambda path: (path.reading, path.counts["load"] > 0, -path.instructions),
    lambda path: path.instructions,
    lambda path: (-path.reading, path.counts["load"] == 0, path.instructions),
)
"""Those of each kind of tile."""


class Code:
    """The control flow of one kernel."""

    def __init__(self, text: str):
        self.blocks = parse_blocks(text)
        self.loops = self._find_loops()

    def paths(self, assumed_trips: int) -> Paths:
        """The paths of the three kinds of tiles, where a loop without a counter runs ``assumed_trips`` times."""
        return Paths(*(self._best(rank, assumed_trips) for rank in _RANKS))

    def inner_loops(self) -> list[tuple[Loop, Paths]]:
        """(loop, one iteration on each path) of all loops that contain no other, in the order of the code."""
        found = []
        for header, loop in sorted(self.loops.items()):
            if not any(other.blocks < loop.blocks for other in self.loops.values()):
                found.append((loop, Paths(*(self._walk(header, loop.blocks, rank, 1)[header] for rank in _RANKS))))
        return found

    def _best(self, rank: Rank, assumed_trips: int) -> Path:
        return self._walk(0, frozenset(range(len(self.blocks))), rank, assumed_trips)[END]

    def _walk(self, start: int, inside: frozenset[int], rank: Rank, assumed_trips: int) -> dict[int, Path]:
        """Where paths from ``start`` leave ``inside`` or come back to ``start``, each with the best path there.

        An inner loop counts as one step that goes to any of its exits.
        """
        leaving: dict[int, Path] = {}
        best = {start: Path(Counter())}
        for block in self._order(start, inside):
            if block not in best:
                continue
            loop = self.loops.get(block)
            if loop is not None and block != start:
                steps = self._run(loop, rank, assumed_trips)
            else:
                steps = dict.fromkeys(self.blocks[block].followers, Path(self.blocks[block].counts))
            for target, step in steps.items():
                found = best if target in inside and target != start else leaving
                path = best[block].then(step)
                if target not in found or rank(path) > rank(found[target]):
                    found[target] = path
        return leaving

    def _run(self, loop: Loop, rank: Rank, assumed_trips: int) -> dict[int, Path]:
        """The exits of a loop, each with the best path of all iterations up to it."""
        exits = self._walk(loop.header, loop.blocks, rank, assumed_trips)
        again = exits.pop(loop.header)
        trips = assumed_trips if loop.trips is None else loop.trips
        reads = any(self.blocks[block].counts["load"] for block in loop.blocks)
        around = Path(Counter(), trips * reads, int(loop.trips is None)).then(again, trips - 1)
        return {target: around.then(path) for target, path in exits.items()}

    def _order(self, start: int, inside: frozenset[int]) -> list[int]:
        """The blocks reached from ``start`` within ``inside``, each after all before it; inner loops as one block."""
        seen, order = {start}, []

        def followers(block: int) -> Iterable[int]:
            loop = self.loops.get(block) if block != start else None
            of = (block,) if loop is None else loop.blocks
            return {x for each in of for x in self.blocks[each].followers} - set(of)

        # Depth first without recursion; the reverse of the order in which blocks are finished.
        stack = [(start, iter(sorted(followers(start))))]
        while stack:
            block, rest = stack[-1]
            for target in rest:
                if target in inside and target not in seen:
                    seen.add(target)
                    stack.append((target, iter(sorted(followers(target)))))
                    break
            else:
                order.append(block)
                stack.pop()
        return order[::-1]

    def _find_loops(self) -> dict[int, Loop]:
        before: dict[int, set[int]] = {block: set() for block in range(len(self.blocks))}
        for block, content in enumerate(self.blocks):
            for target in content.followers:
                if target != END:
                    before[target].add(block)
        dominators = self._dominators(before)
        loops: dict[int, set[int]] = {}
        for block, content in enumerate(self.blocks):
            for header in content.followers:
                if header == END or block not in dominators or header not in dominators[block]:
                    continue
                body, pending = loops.setdefault(header, {header}), [block]
                while pending:
                    each = pending.pop()
                    if each not in body:
                        body.add(each)
                        pending += before[each] & dominators.keys()
        self._check_reducible(dominators)
        found = {header: Loop(header, frozenset(body)) for header, body in loops.items()}
        for loop in found.values():
            loop.trips = _Counted(self.blocks, before, loop).trips()
        return found

    def _dominators(self, before: dict[int, set[int]]) -> dict[int, set[int]]:
        """The blocks that every way to a block passes, for each block that is reached."""
        order = self._reached()
        found = {block: set(order) for block in order}
        found[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                new = set.intersection(*(found[each] for each in before[block] if each in found)) | {block}
                changed |= new != found[block]
                found[block] = new
        return found

    def _reached(self) -> list[int]:
        seen, pending = [0], [0]
        while pending:
            for target in self.blocks[pending.pop()].followers:
                if target != END and target not in seen:
                    seen.append(target)
                    pending.append(target)
        return seen

    def _check_reducible(self, dominators: dict[int, set[int]]) -> None:
        """Without the edges back to a dominator there must be no circle: it would be a loop with several entries."""
        edges = {block: set(self.blocks[block].followers) - dominators[block] for block in dominators}
        try:
            graphlib.TopologicalSorter(edges).prepare()
        except graphlib.CycleError as error:
            raise SassError("a loop with two entries: its iterations cannot be counted") from error


_COMPARISONS = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}


class _Counted(NamedTuple):
    """A loop, to find its counter."""

    blocks: list[Block]
    before: dict[int, set[int]]
    loop: Loop

    def trips(self) -> int | None:
        """How often the header runs; None if that is not a constant that can be read from the code."""
        for number in sorted(self.loop.blocks):
            block = self.blocks[number]
            leaves = not self.loop.blocks.issuperset(block.followers)
            if leaves and len(block.followers) > 1:
                found = self._trips_of_exit(number, block.instructions[-1])
                if found is not None:
                    return found
        return None

    def _trips_of_exit(self, number: int, branch: Instruction) -> int | None:
        pending = [(name, number, len(self.blocks[number].instructions) - 1) for name in branch.predicates]
        while pending:
            place = self._definition(*pending.pop())
            if place is None:
                continue
            number, at = place
            instruction = self.blocks[number].instructions[at]
            found = self._trips_of(instruction, number, at)
            if found is not None:
                return found
            # A comparison of 64 bits is two, of which the second (EX) reads the first's result, and predicates are
            # copied by PLOP3. High words stay 0.
            if "PLOP3" in instruction.opcode or instruction.opcode.endswith(".EX"):
                pending += [(name, number, at) for name in instruction.predicates[1:]]
        return None

    def _definition(self, name: str, number: int, position: int) -> tuple[int, int] | None:
        """(block, position) of the last instruction before a place that sets a predicate; None if several may."""
        while True:
            for at in range(position - 1, -1, -1):
                instruction = self.blocks[number].instructions[at]
                # Two results, or behind a register that is the result the carries.
                results = slice(0, 2) if re.search("SETP|PLOP3", instruction.opcode) else slice(1, 3)
                if name in instruction.operands[results]:
                    return number, at
            earlier = self.before[number]
            if number == self.loop.header or len(earlier) != 1:
                return None
            (number,) = earlier
            position = len(self.blocks[number].instructions)

    def _trips_of(self, compare: Instruction, number: int, at: int) -> int | None:
        """Iterations until a comparison of a counter with a constant changes its result."""
        name, *flags = compare.opcode.split(".")
        if name not in ("ISETP", "UISETP") or "EX" in flags:
            return None
        operator = _COMPARISONS[flags[0]]
        for turned in (False, True):
            name, limit = compare.values[::-1] if turned else compare.values
            bound, counter = value_of(limit), self._counter(name, number, at)
            if bound is None or counter is None:
                continue
            value, step = counter

            def result(trip: int, value=value, step=step, bound=bound, turned=turned) -> bool:
                pair = [_as_32_bits(x, "U32" not in flags) for x in (value + trip * step, bound)]
                return operator(*(pair[::-1] if turned else pair))

            return next((trip + 1 for trip in range(1, _MOST_TRIPS) if result(trip) != result(0)), None)
        return None

    def _counter(self, name: str, number: int, at: int) -> tuple[int, int] | None:
        """(value at the first comparison, step) of a register that only one addition in the loop changes."""
        changes = [
            (instruction, each, place)
            for each in self.loop.blocks
            for place, instruction in enumerate(self.blocks[each].instructions)
            if name in instruction.written
        ]
        if len(changes) != 1:
            return None
        change, where, place = changes[0]
        step = change.step(name)
        outside = self.before[self.loop.header] - self.loop.blocks
        initial = {self._initial(name, each) for each in outside}
        if step is None or len(initial) != 1 or None in initial:
            return None
        (value,) = initial
        # Added before it is compared, in the same iteration?
        early = place < at if where == number else where < number
        return (value + step if early else value), step

    def _initial(self, name: str, number: int) -> int | None:
        """The constant that a register holds at the end of a block; None if it is not a constant on every way."""
        seen, values, pending = set(), set(), [number]
        while pending:
            number = pending.pop()
            if number in seen:
                continue
            seen.add(number)
            for instruction in reversed(self.blocks[number].instructions):
                if name in instruction.written:
                    values.add(None if instruction.guard else instruction.constant)
                    break
            else:
                if not self.before[number]:
                    return None
                pending += self.before[number]
        return values.pop() if len(values) == 1 else None


def _as_32_bits(number: int, signed: bool) -> int:
    number %= 1 << 32
    return number - (1 << 32) if signed and number >= 1 << 31 else number
