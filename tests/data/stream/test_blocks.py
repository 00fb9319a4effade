"""Blocks prefetched by threads: ready when needed, in bounded memory, and only errors at the time of need count."""

import threading
import time
import tracemalloc

import numpy as np
import pytest

from dcscale.data import BatchLoader, DataError, StreamConfig, open_stream
from dcscale.data.shards.manifest import Manifest, TokenizerInfo, write_manifest
from dcscale.data.shards.shard import write_shard
from dcscale.data.storage import RetryPolicy, StorageOptions
from dcscale.data.stream.block_reader import BlockPrefetcher
from dcscale.data.stream.lookahead import Group, assemble_ahead
from dcscale.data.stream.sequences import ShuffleBlock
from dcscale.testing import shard_server as faults
from dcscale.testing.runs import numbered_shards, write_token_shards
from dcscale.testing.shard_server import ShardServer

SETTINGS = {"vocab_size": 1 << 20, "sequence_length": 8, "seed": 3, "shuffle_shards": 2, "slots": 6}


def stream_of(root, **changes):
    return open_stream(root, StreamConfig(document_mask=True, verify=True, **{**SETTINGS, **changes}))


def of_rank(stream, rank, ranks, rows=1, epochs=2):
    """The numbers that a rank takes in each step of some epochs."""
    step = 0
    while step * rows * ranks < epochs * stream.sequences_per_epoch:
        yield list(range(step * rows * ranks + rank, (step + 1) * rows * ranks, ranks))
        step += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_token_shards(folder, numbered_shards([90, 131, 60, 100] * 6), vocab_size=5000)
    return folder


def prefetcher_of(stream):
    """The prefetcher of a single source."""
    return stream.sources[0].blocks._prefetcher


class Shards:
    """A prefetcher whose shards are numbers, read when the test releases them."""

    def __init__(self, threads=4, per_block=2):
        self.open = threading.Semaphore(0)
        self.errors = {}
        self.read, self.held, self.most_held, self.at_once, self.most_at_once = [], 0, 0, 0, 0
        self._lock = threading.Lock()
        self.prefetcher = BlockPrefetcher(
            lambda key: [key[1] * per_block + i for i in range(per_block)], self._read, self._build, threads
        )

    def _read(self, shard, needed):
        with self._lock:
            self.held, self.at_once = self.held + 1, self.at_once + 1
            self.most_held, self.most_at_once = max(self.most_held, self.held), max(self.most_at_once, self.at_once)
        assert self.open.acquire(timeout=20)
        with self._lock:
            self.read.append((shard, needed))
            self.at_once -= 1
        if shard in self.errors:
            with self._lock:
                self.held -= 1
            raise self.errors[shard]
        return shard

    def _build(self, key, contents):
        with self._lock:
            self.held -= len(contents)
        return ShuffleBlock(np.array(contents), np.array([1]))

    def release(self, count=1000):
        for _ in range(count):
            self.open.release()

    def wait(self, until):
        stop = time.monotonic() + 20
        while not until():
            assert time.monotonic() < stop
            time.sleep(0.001)


def reading(prefetcher):
    """Threads of a prefetcher."""
    targets = [getattr(t, "_target", None) for t in threading.enumerate() if t.name == "dcscale-read"]
    return [target for target in targets if target is None or target.__self__ is prefetcher]


def keys(*numbers):
    return [(0, number) for number in numbers]


def test_blocks_are_built_of_their_shards_in_the_order_wanted():
    shards = Shards(threads=2)
    shards.prefetcher.want(keys(5, 3, 9))
    shards.release()
    for number in (9, 5, 3):
        assert shards.prefetcher.get((0, number)).tokens.tolist() == [2 * number, 2 * number + 1]
    assert [shard // 2 for shard, _ in shards.read] == [5, 5, 3, 3, 9, 9]
    shards.prefetcher.want(keys(3, 9))
    assert len(shards.prefetcher) == 2
    assert shards.prefetcher.get((0, 9)) is shards.prefetcher.get((0, 9))
    assert len(shards.read) == 6, "held blocks are not read again"


@pytest.mark.parametrize(("threads", "per_block"), [(1, 1), (4, 1), (4, 2), (5, 2), (8, 3), (2, 5), (1, 3)])
def test_threads_and_raw_shards_are_bounded(threads, per_block):
    shards = Shards(threads, per_block)
    shards.prefetcher.want(keys(*range(12)))
    shards.wait(lambda: shards.at_once == min(threads, per_block * max(1, threads // per_block)))
    shards.release()
    for key in keys(*range(12)):
        shards.prefetcher.get(key)
    assert shards.most_at_once <= threads
    assert shards.most_held <= max(threads, per_block)
    shards.wait(lambda: not reading(shards.prefetcher))


def test_a_block_that_is_no_longer_wanted_is_not_read_to_its_end():
    shards = Shards(threads=1, per_block=5)
    shards.prefetcher.want(keys(0, 1))
    shards.release(2)
    shards.wait(lambda: len(shards.read) == 2)
    shards.prefetcher.want(keys(7))
    shards.release()
    shards.prefetcher.get((0, 7))
    assert {shard // 5 for shard, _ in shards.read} == {0, 7}
    assert len(shards.read) <= 5 + 3


def test_a_stuck_read_of_an_unwanted_block_delays_no_other():
    shards = Shards(threads=2, per_block=2)
    shards.prefetcher.want(keys(0))
    shards.wait(lambda: shards.at_once == 2)
    stuck, shards.open = shards.open, threading.Semaphore(1000)
    shards.prefetcher.want(keys(5))
    assert shards.prefetcher.get((0, 5)).tokens.tolist() == [10, 11]
    stuck.release(2)


def test_an_error_while_prefetching_is_retried_when_the_block_is_needed():
    shards = Shards()
    shards.errors[2] = DataError("gone")
    shards.prefetcher.want(keys(0, 1))
    shards.release()
    shards.prefetcher.get((0, 0))
    shards.wait(lambda: shards.prefetcher._wanted[0, 1].block.done())
    shards.errors.clear()
    assert shards.prefetcher.get((0, 1)).tokens.tolist() == [2, 3]
    assert {needed for shard, needed in shards.read if shard < 2} == {False}
    assert (2, True) in shards.read


def test_an_error_is_raised_where_the_block_is_needed_and_a_later_try_may_succeed():
    shards = Shards()
    shards.errors[0] = DataError("gone")
    shards.release()
    for _ in range(2):
        shards.prefetcher.want(keys(0))
        with pytest.raises(DataError, match="gone"):
            shards.prefetcher.get((0, 0))
    shards.errors.clear()
    shards.prefetcher.want(keys(0))
    assert shards.prefetcher.get((0, 0)).tokens.tolist() == [0, 1]


def test_a_bug_in_reading_is_not_reported_as_bad_data():
    shards = Shards()
    shards.errors[0] = ZeroDivisionError()
    shards.release()
    shards.prefetcher.want(keys(0))
    with pytest.raises(ZeroDivisionError):
        shards.prefetcher.get((0, 0))


def test_closing_fails_a_waiting_thread():
    shards = Shards()
    shards.prefetcher.want(keys(0))
    failed = []

    def wait():
        try:
            shards.prefetcher.get((0, 0))
        except DataError as error:
            failed.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    shards.wait(lambda: shards.at_once == 2)
    shards.prefetcher.close()
    thread.join(10)
    for call in (lambda: shards.prefetcher.get((0, 0)), lambda: shards.prefetcher.want(keys(0))):
        with pytest.raises(DataError, match="reading was ended"):
            call()
    shards.prefetcher.reopen()
    shards.release()
    shards.prefetcher.want(keys(0))
    assert shards.prefetcher.get((0, 0)).tokens.tolist() == [0, 1]
    assert failed == ["reading was ended"]


@pytest.mark.parametrize("limit", [1, 5, 100])
def test_placements_are_announced_in_order_as_long_as_more_are_wanted(limit):
    announced, seen, enough = [], [], 12

    def assemble(group):
        seen.extend(group.placements)
        assert announced == list(range(max(len(seen), len(announced))))
        return group.placements

    groups = (Group([1, 1], [i, i + 1]) for i in range(0, 20, 2))
    for n, result in enumerate(
        assemble_ahead(groups, announced.append, lambda: len(announced) < enough, assemble, limit)
    ):
        assert result == seen[n]
        ahead = max(2, min(enough - len(seen), limit // 2 * 2 + limit % 2 * 2))
        assert len(announced) == min(20, len(seen) + ahead)
    assert seen == announced == list(range(20))


@pytest.mark.parametrize("ahead", [None, 0, 1, 100])
@pytest.mark.parametrize(("rows", "ranks"), [(1, 1), (4, 1), (24, 1), (2, 3)])
def test_prefetching_changes_nothing(folder, ahead, rows, ranks):
    plain = stream_of(folder, read_ahead=0)
    for rank in range(ranks):
        stream = stream_of(folder, read_ahead=ahead, read_threads=3)
        steps = list(of_rank(stream, rank, ranks, rows))
        for step, found in zip(steps, stream.each(steps), strict=True):
            assert found.tokens_NL1.tobytes() == plain.sequences(step).tokens_NL1.tobytes()


def test_blocks_are_read_before_they_are_needed(tmp_path):
    """Between steps all reads finish; during a step nothing can be read, and no step waits for a block. Each slot has
    two blocks per epoch, which begin and end for all slots at once: the worst case."""
    write_token_shards(tmp_path, numbered_shards([100] * 24), vocab_size=5000)
    stream, gate, late = stream_of(tmp_path), threading.Event(), []
    prefetcher = prefetcher_of(stream)
    read = prefetcher._read

    def gated(shard, needed):
        if not gate.wait(1):
            late.append(shard)
        return read(shard, needed)

    prefetcher._read = gated
    gate.set()
    for _ in stream.each(of_rank(stream, 0, 1, rows=3)):
        gate.set()
        stop = time.monotonic() + 20
        while not all(pending.block.done() for pending in prefetcher._wanted.values()):
            assert time.monotonic() < stop
            time.sleep(0.0005)
        gate.clear()
    assert late == []
    assert 2 * 24 <= stream.shards_read < 2 * 24 + 2 * 2 * 6


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """24 shards of 200,000 tokens."""
    folder = tmp_path_factory.mktemp("large")
    documents = [np.arange(4000)] * 50
    shards = [write_shard(folder, f"{i}.tar", [(f"k{i}", documents)], dtype="uint16", text_bytes=0) for i in range(24)]
    write_manifest(folder, Manifest("uint16", TokenizerInfo("byte", "0" * 64, 5000, 256), 3999, tuple(shards)))
    return folder


@pytest.mark.parametrize(("ranks", "ahead", "threads"), [(1, 0, 1), (1, None, 4), (3, 4, 2)])
def test_memory_stays_within_the_stated_bound(large, ranks, ahead, threads):
    stream = stream_of(large, read_ahead=ahead, read_threads=threads, sequence_length=4096)
    shard = stream.manifest.shards[0].bytes
    block, slots = 2 * shard, 6 // ranks
    tracemalloc.start()
    try:
        for _ in stream.each(of_rank(stream, 0, ranks, epochs=1)):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (slots + (slots if ahead is None else ahead)) * block + max(threads, 2) * shard + block + 500_000
    assert peak > slots * block, "the bound must be close to what is used"


def test_closing_a_loader_ends_its_threads_though_the_server_does_not_answer(folder):
    with ShardServer(folder) as server:
        loader = BatchLoader(
            stream_of(server.address, storage_options=StorageOptions(RetryPolicy(timeout=60, total=600))),
            global_batch_size=4,
            micro_batch_size=4,
            rank=0,
            world_size=1,
            prefetch_steps=2,
        )
        server.always = {f"shard-{i:03d}.tar": faults.status(503, Retry_After="60") for i in range(24)}
        steps = loader.steps()
        stop = time.monotonic() + 20
        while not server.paths()[1:]:
            assert time.monotonic() < stop
            time.sleep(0.001)
        loader.close()
        while reading(prefetcher_of(loader._stream)):
            assert time.monotonic() < stop
            time.sleep(0.001)
        with pytest.raises(RuntimeError, match="closed"):
            next(steps)
        server.always = {}
        assert len(next(loader.steps())) == 1, "it reads again on the next call"
        loader.close()
