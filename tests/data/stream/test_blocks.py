"""Windows read ahead by threads: what is needed next is there, in bounded memory, and only present errors count."""

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
from dcscale.data.stream.lookahead import made_ahead
from dcscale.data.stream.sequences import Window
from dcscale.testing import shard_server as faults
from dcscale.testing.runs import numbered_shards, write_token_shards
from dcscale.testing.shard_server import ShardServer

SETTINGS = {"vocab_size": 1 << 20, "sequence_length": 8, "seed": 3, "shuffle_shards": 2, "slots": 6}


def stream_of(root, **changes):
    return open_stream(root, StreamConfig(document_mask=True, verify=True, **{**SETTINGS, **changes}))


def of_rank(stream, rank, ranks, rows=1, epochs=2):
    """The numbers that a rank takes in each step, without end."""
    step = 0
    while step * rows * ranks < epochs * stream.sequences_per_epoch:
        yield list(range(step * rows * ranks + rank, (step + 1) * rows * ranks, ranks))
        step += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_token_shards(folder, numbered_shards([90, 131, 60, 100] * 6), vocab_size=5000)
    return folder


class Shards:
    """A reader whose shards are numbers, read when the test lets them."""

    def __init__(self, threads=4, of_window=2):
        self.open = threading.Semaphore(0)
        self.errors = {}
        self.read, self.held, self.most_held, self.at_once, self.most_at_once = [], 0, 0, 0, 0
        self._lock = threading.Lock()
        self.reader = BlockPrefetcher(
            lambda key: [key[1] * of_window + i for i in range(of_window)], self._read, self._pack, threads
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

    def _pack(self, key, parts):
        with self._lock:
            self.held -= len(parts)
        return Window(np.array(parts), np.array([1]))

    def let(self, count=1000):
        for _ in range(count):
            self.open.release()

    def settle(self, until):
        stop = time.monotonic() + 20
        while not until():
            assert time.monotonic() < stop
            time.sleep(0.001)


def reading(reader):
    """Threads of a reader."""
    targets = [getattr(t, "_target", None) for t in threading.enumerate() if t.name == "dcscale-read"]
    return [target for target in targets if target is None or target.__self__ is reader]


def keys(*numbers):
    return [(0, number) for number in numbers]


def test_windows_are_made_of_their_shards_in_the_order_wanted():
    shards = Shards(threads=2)
    shards.reader.want(keys(5, 3, 9))
    shards.let()
    for number in (9, 5, 3):
        assert shards.reader.get((0, number)).tokens.tolist() == [2 * number, 2 * number + 1]
    assert [shard // 2 for shard, _ in shards.read] == [5, 5, 3, 3, 9, 9]
    shards.reader.want(keys(3, 9))
    assert len(shards.reader) == 2
    assert shards.reader.get((0, 9)) is shards.reader.get((0, 9))
    assert len(shards.read) == 6, "what is there is not read again"


@pytest.mark.parametrize(("threads", "of_window"), [(1, 1), (4, 1), (4, 2), (5, 2), (8, 3), (2, 5), (1, 3)])
def test_threads_and_raw_shards_are_bounded(threads, of_window):
    shards = Shards(threads, of_window)
    shards.reader.want(keys(*range(12)))
    shards.settle(lambda: shards.at_once == min(threads, of_window * max(1, threads // of_window)))
    shards.let()
    for key in keys(*range(12)):
        shards.reader.get(key)
    assert shards.most_at_once <= threads
    assert shards.most_held <= max(threads, of_window)
    shards.settle(lambda: not reading(shards.reader))


def test_what_is_wanted_no_more_is_not_read_on():
    shards = Shards(threads=1, of_window=5)
    shards.reader.want(keys(0, 1))
    shards.let(2)
    shards.settle(lambda: len(shards.read) == 2)
    shards.reader.want(keys(7))
    shards.let()
    shards.reader.get((0, 7))
    assert {shard // 5 for shard, _ in shards.read} == {0, 7}
    assert len(shards.read) <= 5 + 3


def test_what_is_stuck_and_wanted_no_more_keeps_nothing_waiting():
    shards = Shards(threads=2, of_window=2)
    shards.reader.want(keys(0))
    shards.settle(lambda: shards.at_once == 2)
    stuck, shards.open = shards.open, threading.Semaphore(1000)
    shards.reader.want(keys(5))
    assert shards.reader.get((0, 5)).tokens.tolist() == [10, 11]
    stuck.release(2)


def test_an_error_met_ahead_counts_only_if_it_is_there_when_needed():
    shards = Shards()
    shards.errors[2] = DataError("gone")
    shards.reader.want(keys(0, 1))
    shards.let()
    shards.reader.get((0, 0))
    shards.settle(lambda: shards.reader._wanted[0, 1].window.done())
    shards.errors.clear()
    assert shards.reader.get((0, 1)).tokens.tolist() == [2, 3]
    assert {needed for shard, needed in shards.read if shard < 2} == {False}
    assert (2, True) in shards.read


def test_an_error_is_raised_to_who_needs_the_window_and_a_later_try_may_succeed():
    shards = Shards()
    shards.errors[0] = DataError("gone")
    shards.let()
    for _ in range(2):
        shards.reader.want(keys(0))
        with pytest.raises(DataError, match="gone"):
            shards.reader.get((0, 0))
    shards.errors.clear()
    shards.reader.want(keys(0))
    assert shards.reader.get((0, 0)).tokens.tolist() == [0, 1]


def test_a_mistake_in_reading_is_not_taken_for_bad_data():
    shards = Shards()
    shards.errors[0] = ZeroDivisionError()
    shards.let()
    shards.reader.want(keys(0))
    with pytest.raises(ZeroDivisionError):
        shards.reader.get((0, 0))


def test_closing_frees_who_waits():
    shards = Shards()
    shards.reader.want(keys(0))
    failed = []

    def wait():
        try:
            shards.reader.get((0, 0))
        except DataError as error:
            failed.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    shards.settle(lambda: shards.at_once == 2)
    shards.reader.close()
    thread.join(10)
    for call in (lambda: shards.reader.get((0, 0)), lambda: shards.reader.want(keys(0))):
        with pytest.raises(DataError, match="reading was ended"):
            call()
    shards.reader.open()
    shards.let()
    shards.reader.want(keys(0))
    assert shards.reader.get((0, 0)).tokens.tolist() == [0, 1]
    assert failed == ["reading was ended"]


@pytest.mark.parametrize("most", [1, 5, 100])
def test_steps_are_told_ahead_in_order_as_long_as_there_is_use_for_more(most):
    told, seen, enough = [], [], 12

    def make(group):
        seen.extend(group)
        assert told == list(range(max(len(seen), len(told))))
        return group

    groups = ([i, i + 1] for i in range(0, 20, 2))
    for n, step in enumerate(made_ahead(groups, told.append, lambda: len(told) < enough, make, most)):
        assert step == seen[n]
        ahead = max(2, min(enough - len(seen), most // 2 * 2 + most % 2 * 2))
        assert len(told) == min(20, len(seen) + ahead)
    assert seen == told == list(range(20))


@pytest.mark.parametrize("ahead", [None, 0, 1, 100])
@pytest.mark.parametrize(("rows", "ranks"), [(1, 1), (4, 1), (24, 1), (2, 3)])
def test_reading_ahead_changes_nothing(folder, ahead, rows, ranks):
    plain = stream_of(folder, read_ahead=0)
    for rank in range(ranks):
        stream = stream_of(folder, read_ahead=ahead, read_threads=3)
        steps = list(of_rank(stream, rank, ranks, rows))
        for step, made in zip(steps, stream.each(steps), strict=True):
            assert made.tokens_NL1.tobytes() == plain.sequences(step).tokens_NL1.tobytes()


def test_what_is_needed_next_is_read_before_it_is_needed(tmp_path):
    """Between steps the reading comes to rest; during a step nothing can be read, and no step waits for anything. Each
    lane has two windows an epoch, which begin and end for all lanes at once: the worst case."""
    write_token_shards(tmp_path, numbered_shards([100] * 24), vocab_size=5000)
    stream, gate, late = stream_of(tmp_path), threading.Event(), []
    read = stream._windows._read

    def gated(shard, needed):
        if not gate.wait(1):
            late.append(shard)
        return read(shard, needed)

    stream._windows._read = gated
    gate.set()
    for _ in stream.each(of_rank(stream, 0, 1, rows=3)):
        gate.set()
        stop = time.monotonic() + 20
        while not all(making.window.done() for making in stream._windows._wanted.values()):
            assert time.monotonic() < stop
            time.sleep(0.0005)
        gate.clear()
    assert late == []
    assert 2 * 24 <= stream.shards_read < 2 * 24 + 2 * 2 * 6


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """24 shards of 200,000 tokens."""
    folder = tmp_path_factory.mktemp("large")
    bundles = [("k", [np.arange(4000)] * 50)]
    shards = [write_shard(folder, f"{i}.tar", bundles, dtype="uint16", text_bytes=0) for i in range(24)]
    write_manifest(folder, Manifest("uint16", TokenizerInfo("byte", "0" * 64, 5000, 256), 3999, tuple(shards)))
    return folder


@pytest.mark.parametrize(("ranks", "ahead", "threads"), [(1, 0, 1), (1, None, 4), (3, 4, 2)])
def test_memory_stays_within_the_stated_bound(large, ranks, ahead, threads):
    stream = stream_of(large, read_ahead=ahead, read_threads=threads, sequence_length=4096)
    shard = stream.manifest.shards[0].bytes
    window, lanes = 2 * shard, 6 // ranks
    tracemalloc.start()
    try:
        for _ in stream.each(of_rank(stream, 0, ranks, epochs=1)):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (lanes + (lanes if ahead is None else ahead)) * window + max(threads, 2) * shard + window + 500_000
    assert peak > lanes * window, "the bound must not be far beyond what is used"


def test_closing_a_loader_frees_its_threads_from_a_server_in_trouble(folder):
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
        while reading(loader._stream._windows):
            assert time.monotonic() < stop
            time.sleep(0.001)
        with pytest.raises(RuntimeError, match="closed"):
            next(steps)
        server.always = {}
        assert len(next(loader.steps())) == 1, "it reads again when it is asked to"
        loader.close()
