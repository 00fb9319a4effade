"""Batches: the same sequences for any ranks, micro-batches, prefetching and first step."""

import itertools
import threading

import pytest
import torch

from dcscale.data import BatchLoader, DataError, StreamConfig, open_stream
from dcscale.testing.runs import numbered_shards, write_token_shards

GLOBAL_BATCH = 12
LENGTH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_token_shards(folder, numbered_shards([130, 61, 97, 180, 45, 122]), vocab_size=5000)
    return folder


def stream_of(folder, **changes):
    settings = {
        "sequence_length": LENGTH,
        "seed": 3,
        "shuffle_shards": 2,
        "slots": 6,
        "document_mask": True,
        "verify": True,
    }
    return open_stream(folder, StreamConfig(vocab_size=5000, **{**settings, **changes}))


def loader_of(folder, *, rank=0, world=1, micro=1, prefetch=0, limit=None, **changes):
    return BatchLoader(
        stream_of(folder, **changes),
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=micro,
        rank=rank,
        world_size=world,
        prefetch_steps=prefetch,
        limit=limit,
    )


def rows_of(batches):
    """Bytes of every row: inputs, targets, document ids."""
    return [
        b"".join(part[i].numpy().tobytes() for part in (batch.input_ids, batch.targets, batch.document_ids))
        for batch in batches
        for i in range(len(batch.input_ids))
    ]


def expected_rows(stream, numbers):
    rows = stream.sequences(numbers)
    parts = (rows.tokens_NL1[:, :-1].astype("int64"), rows.targets_NL.astype("int64"), rows.document_ids_NL)
    return [b"".join(part[i].tobytes() for part in parts) for i in range(len(numbers))]


def expected_step(stream, step):
    return expected_rows(stream, range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "dcscale-prefetch"]


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 12), (2, 3), (3, 2), (3, 4), (4, 1), (6, 2), (12, 1)])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_step_is_the_same_for_any_ranks_micro_batches_and_prefetching(folder, world, micro, prefetch):
    stream = stream_of(folder)
    steps = 2 * stream.sequences_per_epoch // GLOBAL_BATCH + 2
    loaders = [loader_of(folder, rank=r, world=world, micro=micro, prefetch=prefetch) for r in range(world)]
    iterators = [loader.steps() for loader in loaders]
    for step in range(steps):
        of_ranks = []
        for iterator in iterators:
            batches = next(iterator)
            assert len(batches) == GLOBAL_BATCH // world // micro
            assert {tuple(batch.input_ids.shape) for batch in batches} == {(micro, LENGTH)}
            of_ranks.append(rows_of(batches))
        assert [row for rows in zip(*of_ranks) for row in rows] == expected_step(stream, step)
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_resuming_at_any_step_gives_the_same_batches_as_an_uninterrupted_run(folder, prefetch):
    with loader_of(folder, micro=4, prefetch=prefetch) as loader:
        uninterrupted = [rows_of(batches) for batches in itertools.islice(loader.steps(), 20)]
    for start in range(20):
        with loader_of(folder, micro=4, prefetch=prefetch) as loader:
            assert [
                rows_of(batches) for batches in itertools.islice(loader.steps(start * GLOBAL_BATCH), 20 - start)
            ] == uninterrupted[start:]


def test_resuming_with_other_ranks_continues_the_same_sequences(folder):
    stream = stream_of(folder)
    step = 0
    for world in (2, 3, 1, 4, 6, 2):
        loaders = [loader_of(folder, rank=r, world=world, prefetch=2) for r in range(world)]
        iterators = [loader.steps(step * GLOBAL_BATCH) for loader in loaders]
        for _ in range(3):
            of_ranks = [rows_of(next(iterator)) for iterator in iterators]
            assert [row for rows in zip(*of_ranks) for row in rows] == expected_step(stream, step)
            step += 1
        for loader in loaders:
            loader.close()
    assert not prefetch_threads()


def test_batches_have_the_stated_types(folder):
    batch = next(loader_of(folder, micro=2).steps())[0]
    assert (batch.input_ids.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
    assert batch.document_ids.dtype == torch.int32
    assert batch.target_count == int((batch.targets != -100).sum())
    assert all(part.is_contiguous() for part in (batch.input_ids, batch.targets, batch.document_ids))
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.is_meta
    assert moved.document_ids.is_meta
    assert moved.target_count == batch.target_count


def test_without_document_mask_there_are_no_ids_and_all_targets_count(folder):
    batch = next(loader_of(folder, micro=2, document_mask=False).steps())[0]
    assert batch.document_ids is None
    assert batch.to(torch.device("cpu")).document_ids is None
    assert (batch.targets == batch.input_ids.roll(-1, 1))[:, :-1].all()
    assert batch.target_count == 2 * LENGTH


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_limit_takes_sequences_evenly_masks_the_rows_beyond_it_and_ends(folder, world):
    """30 sequences in steps of 12: two full steps, and one with 6 rows."""
    stream = stream_of(folder, shuffle=False)
    iterators = [loader_of(folder, rank=r, world=world, limit=30, shuffle=False).steps() for r in range(world)]
    steps = [list(iterator) for iterator in iterators]
    assert [len(found) for found in steps] == [3] * world
    found = [row for step in range(3) for rows in zip(*(rows_of(rank[step]) for rank in steps)) for row in rows]
    assert stream.sequences_per_epoch > 60
    assert found[:30] == expected_rows(stream, [i * stream.sequences_per_epoch // 30 for i in range(30)])
    last = [batch for rank in steps for batch in rank[2]]
    assert sum(int((batch.targets == -100).all()) for batch in last) == 6


def test_limit_is_at_most_an_epoch_and_can_be_iterated_again(folder):
    loader = loader_of(folder, micro=12, limit=10_000, shuffle=False)
    first, second = ([rows_of(batches) for batches in loader.steps()] for _ in range(2))
    assert first == second
    assert (
        sum(batch.target_count for batches in loader.steps() for batch in batches)
        == stream_of(folder).targets_per_epoch
    )


def test_iterator_ends_for_good(folder):
    for prefetch in (0, 2):
        loader = loader_of(folder, micro=12, limit=12, prefetch=prefetch)
        iterator = loader.steps()
        next(iterator)
        for _ in range(3):
            with pytest.raises(StopIteration):
                next(iterator)
        assert list(loader.steps(60)) == [], "a start beyond the limit has no steps"
        loader.close()


def test_close_leaves_no_thread_and_the_loader_usable(folder):
    loader = loader_of(folder, prefetch=2)
    iterator = loader.steps()
    first = rows_of(next(iterator))
    assert len(prefetch_threads()) == 1
    loader.close()
    loader.close()
    assert not prefetch_threads()
    with pytest.raises(RuntimeError, match="closed"):
        next(iterator)
    assert rows_of(next(loader.steps())) == first
    loader.steps()
    assert len(prefetch_threads()) == 1, "a new iterator replaces the old one"
    loader.close()


def test_prefetch_prepares_no_more_steps_than_requested(folder):
    loader = loader_of(folder, prefetch=2)
    each = loader._stream.each
    produced = threading.Semaphore(0)

    def counting(steps):
        for sequences in each(steps):
            produced.release()
            yield sequences

    loader._stream.each = counting
    iterator = loader.steps()
    for _ in range(2):
        assert produced.acquire(timeout=10)
    assert not produced.acquire(timeout=0.2), "a third step was prepared before the first was taken"
    next(iterator)
    assert produced.acquire(timeout=10)
    assert not produced.acquire(timeout=0.2)
    loader.close()


@pytest.mark.parametrize("prefetch", [0, 3])
def test_an_error_while_reading_is_raised_in_the_consumer(tmp_path, prefetch):
    write_token_shards(tmp_path, numbered_shards([200, 200]), vocab_size=5000)
    loader = loader_of(tmp_path, prefetch=prefetch, shuffle_shards=1, slots=1)
    [second] = stream_of(tmp_path, shuffle_shards=1, slots=1).sources[0].order.shards((0, 1))
    shard = tmp_path / f"shard-{second:03d}.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    iterator, steps = loader.steps(), []
    with pytest.raises(DataError, match=rf"{shard.name}.*SHA-256"):
        list(map(steps.append, iterator))
    # Sequences of 8 + 1 tokens, from the first 200, in steps of 12: small steps are assembled together, but fail alone.
    assert len(steps) == 199 // 8 // 12
    if prefetch:
        with pytest.raises(DataError):
            next(iterator)
    loader.close()
    assert not prefetch_threads()


def test_every_shard_is_checked_by_some_rank_before_training(folder, tmp_path):
    shards = numbered_shards([60] * 5)
    write_token_shards(tmp_path, shards, vocab_size=5000)
    (tmp_path / "shard-003.tar").unlink()
    (tmp_path / "shard-004.tar").write_bytes(b"short")
    refused = []
    for rank in range(3):
        try:
            loader_of(tmp_path, rank=rank, world=3)
        except DataError as error:
            refused.append((rank, str(error)))
    assert [rank for rank, _ in refused] == [0, 1]
    assert "shard-003.tar: the manifest names this shard, but it cannot be read" in refused[0][1]
    assert "shard-004.tar: it has 5 bytes, but the manifest says" in refused[1][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 5}, r"global_batch_size is 12, but must be a multiple of .* 5 \* 1"),
        ({"world_size": 5}, r"global_batch_size is 12, but must be a multiple of .* 1 \* 5"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"world_size": 0}, "world_size is 0"),
        ({"rank": 1}, "rank is 1, but must be from 0 to world_size - 1, 0"),
        ({"rank": -1}, "rank is -1"),
        ({"prefetch_steps": -1}, "prefetch_steps is -1, but must be at least 0"),
        ({"workers": -1}, "workers is -1, but must be at least 0"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(folder, changes, message):
    settings = {"global_batch_size": 12, "micro_batch_size": 1, "rank": 0, "world_size": 1}
    with pytest.raises(DataError, match=message):
        BatchLoader(stream_of(folder), **{**settings, **changes})


def test_negative_start_is_refused(folder):
    with pytest.raises(DataError, match="consumed is -1"):
        loader_of(folder).steps(-1)
