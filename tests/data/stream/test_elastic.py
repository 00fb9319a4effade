"""A run that stops anywhere resumes with exactly the same global batches, on any number of ranks and workers.

All that is passed from one start to the next is a :class:`TrainState`, written to JSON and read back. What the loaders
had prefetched when they were stopped is discarded.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from dcscale.config import DataSource
from dcscale.data import BatchLoader, StreamConfig, open_mixture, open_stream
from dcscale.data.stream import workers
from dcscale.testing.runs import numbered_shards, packed_shards, write_token_shards
from dcscale.train.state import TrainState

WORLDS = (1, 2, 3, 4, 6, 8, 12)
BATCH, LENGTH, STEPS = 24, 8, 14
SETTINGS = {"vocab_size": 5000, "sequence_length": LENGTH, "seed": 3, "shuffle_shards": 2, "slots": 24}
SETTINGS |= {"document_mask": True, "verify": True, "read_ahead": 0}


@pytest.fixture(scope="module")
def open_by_name(tmp_path_factory) -> dict[str, Callable]:
    """Three kinds of streams; in ``STEPS`` steps every source reaches at least its second epoch."""
    root = tmp_path_factory.mktemp("elastic")
    one_bundle = {"vocab_size": 5000, "bundle": 10_000}  # faster to read
    write_token_shards(root / "plain", numbered_shards([130, 61, 97, 180, 45, 122, 40]), **one_bundle)
    rows = packed_shards(numbered_shards([140, 90, 33, 170, 60], seed=1), LENGTH + 1, eos_id=4999)
    write_token_shards(root / "rows", rows, row_tokens=LENGTH + 1, **one_bundle)
    write_token_shards(root / "small", numbered_shards([50, 31], seed=2), **one_bundle)
    sources = [DataSource(name, str(root / name), w) for name, w in (("plain", 0.5), ("rows", 0.4), ("small", 0.1))]
    return {
        "plain": lambda: open_stream(root / "plain", StreamConfig(**SETTINGS)),
        "packed": lambda: open_stream(root / "rows", StreamConfig(**SETTINGS)),
        "mixed": lambda: open_mixture(sources, StreamConfig(**SETTINGS)),
    }


@pytest.fixture(scope="module")
def uninterrupted(open_by_name) -> dict[str, list[list[bytes]]]:
    """The steps of a run on one rank, from the streams alone."""
    found = {}
    for name, opened in open_by_name.items():
        stream = opened()
        assert min(stream.epochs(STEPS * BATCH).values()) > 1.5
        rows = stream.sequences(range(STEPS * BATCH))
        parts = (rows.tokens_NL1[:, :-1].astype("int64"), rows.targets_NL.astype("int64"), rows.document_ids_NL)
        flat = [b"".join(part[i].tobytes() for part in parts) for i in range(STEPS * BATCH)]
        found[name] = [flat[i : i + BATCH] for i in range(0, len(flat), BATCH)]
    return found


@pytest.fixture
def simulated_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers as iterators of this process, taken in turn as DataLoader does, some groups ahead."""

    class InTurn:
        def __init__(self, dataset, *, num_workers, prefetch_factor, **_):
            self._dataset, self._workers, self._ahead = dataset, num_workers, prefetch_factor

        def __iter__(self) -> Iterator:
            each = [iter(self._dataset) for _ in range(self._workers)]
            waiting = []
            for number in itertools.count():
                worker = number % self._workers
                info = SimpleNamespace(id=worker, num_workers=self._workers)
                monkeypatch.setattr(workers, "get_worker_info", lambda info=info: info)
                waiting.append(next(each[worker]))
                if len(waiting) == self._ahead * self._workers:
                    yield waiting.pop(0)

    monkeypatch.setattr(workers, "DataLoader", InTurn)


class Run:
    """A run that may stop after any step and resume as another, from its state alone."""

    def __init__(self, opened: Callable, expected: list[list[bytes]]) -> None:
        self.opened, self.expected = opened, expected
        self.state = TrainState(data_identity=opened().identity)

    def resume(self, steps: int, world: int, workers: int = 0, prefetch: int = 2, micro: int = 1, **options) -> None:
        content = json.dumps(self.state.to_json(global_batch_size=BATCH))
        self.state = TrainState.from_json(json.loads(content))
        loaders = []
        for rank in range(world):
            stream = self.opened()
            assert stream.identity == self.state.data_identity
            ahead = {"prefetch_steps": prefetch, "workers": workers, **options}
            loaders.append(
                BatchLoader(
                    stream, global_batch_size=BATCH, micro_batch_size=micro, rank=rank, world_size=world, **ahead
                )
            )
        iterators = [loader.steps(self.state.sequences) for loader in loaders]
        try:
            for _ in range(steps):
                of_ranks = [rows_of(next(iterator)) for iterator in iterators]
                found = [row for rows in zip(*of_ranks) for row in rows]
                assert found == self.expected[self.state.step], (self.state.step, world, workers)
                self.state.step += 1
                self.state.sequences += BATCH
        finally:
            for loader in loaders:
                loader.close()


def rows_of(batches):
    """Bytes of every row: inputs, targets, document ids."""
    return [
        b"".join(part[i].numpy().tobytes() for part in (batch.input_ids, batch.targets, batch.document_ids))
        for batch in batches
        for i in range(len(batch.input_ids))
    ]


@pytest.mark.parametrize("world", WORLDS)
def test_from_these_ranks_to_every_other_number_of_ranks(open_by_name, uninterrupted, world):
    """Stopped after a random step, resumed on other ranks; the mixture has a plain and a packed source."""
    kind = "mixed"
    generator = random.Random(f"{kind} {world}")
    for other in WORLDS:
        run = Run(open_by_name[kind], uninterrupted[kind])
        stop = generator.randrange(1, STEPS - 1)
        begin = max(0, stop - 2)  # earlier steps are covered by other cases
        run.state.step, run.state.sequences = begin, begin * BATCH
        run.resume(stop - begin, world, prefetch=generator.choice([0, 1, 4]))
        run.resume(min(STEPS - stop, 3), other, micro=BATCH // other)


@pytest.mark.parametrize("kind", ["packed", "mixed"])
@pytest.mark.usefixtures("simulated_workers")
def test_on_all_ranks_with_one_and_three_workers(open_by_name, uninterrupted, kind):
    """Two runs that together cover all of these, two steps each, with the smallest groups."""
    cells = list(itertools.product(WORLDS, (1, 3)))
    random.Random(kind).shuffle(cells)
    for half in (cells[::2], cells[1::2]):
        run = Run(open_by_name[kind], uninterrupted[kind])
        for world, count in half:
            run.resume(2, world, count, group_sequences=1)
        assert run.state.step == STEPS


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("kind", ["packed", "mixed"])
def test_with_real_processes(open_by_name, uninterrupted, kind):
    run = Run(open_by_name[kind], uninterrupted[kind])
    for steps, world, count in ((3, 2, 3), (4, 3, 1), (2, 4, 0), (3, 1, 3), (2, 2, 1)):
        run.resume(steps, world, count, group_sequences=7)
    assert run.state.step == STEPS


def test_another_batch_size_continues_with_the_next_sequence(open_by_name, uninterrupted):
    flat = [row for step in uninterrupted["mixed"] for row in step]
    consumed = 0
    for size, world in ((24, 2), (12, 3), (30, 5), (8, 4)):
        loaders = [
            BatchLoader(
                open_by_name["mixed"](), global_batch_size=size, micro_batch_size=1, rank=rank, world_size=world
            )
            for rank in range(world)
        ]
        iterators = [loader.steps(consumed) for loader in loaders]
        for _ in range(3):
            of_ranks = [rows_of(next(iterator)) for iterator in iterators]
            assert [row for rows in zip(*of_ranks) for row in rows] == flat[consumed : consumed + size]
            consumed += size
