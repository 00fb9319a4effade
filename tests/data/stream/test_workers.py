"""Worker processes: the same batches, errors and deaths that reach the loop, and nothing left behind."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dcscale.data import BatchLoader, DataError, StreamConfig, open_stream
from dcscale.data.stream import workers
from dcscale.testing.runs import numbered_shards, write_token_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

SETTINGS = {"vocab_size": 5000, "sequence_length": 8, "seed": 3, "shuffle_shards": 1, "slots": 4}
SETTINGS |= {"document_mask": True, "verify": True}


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(workers, "_GROUP_SEQUENCES", 12)


@pytest.fixture
def folder(tmp_path):
    write_token_shards(tmp_path / "shards", numbered_shards([130, 61, 97, 180]), vocab_size=5000)
    return tmp_path / "shards"


def loader_of(folder, count, *, batch=6, prefetch=2, limit=None, **changes):
    stream = open_stream(folder, StreamConfig(**{**SETTINGS, **changes}))
    sizes = {"global_batch_size": batch, "micro_batch_size": 3, "rank": 0, "world_size": 1}
    return BatchLoader(stream, **sizes, prefetch_steps=prefetch, workers=count, limit=limit)


def contents(steps):
    return [
        [(b.input_ids.tolist(), b.targets.tolist(), None if b.document_ids is None else b.document_ids.tolist())
         for b in step]
        for step in steps
    ]  # fmt: skip


def processes():
    return [process for process in multiprocessing.active_children() if process.is_alive()]


@pytest.mark.parametrize("document_mask", [True, False])
def test_a_slow_consumer_gets_what_was_made_although_the_memory_is_used_again(folder, document_mask):
    with loader_of(folder, 0, document_mask=document_mask) as loader:
        expected = contents(itertools.islice(loader.steps(18), 40))
    with loader_of(folder, 2, document_mask=document_mask) as loader:
        steps, found = loader.steps(18), []
        for number in range(40):
            found.append(next(steps))
            if number % 10 == 0:
                time.sleep(0.1)  # in which the workers make all that they may
        assert contents(found) == expected


def test_a_limited_part_ends_and_can_be_read_again(folder):
    with loader_of(folder, 0, limit=30) as loader:
        expected = contents(loader.steps())
    with loader_of(folder, 2, limit=30) as loader:
        assert contents(loader.steps()) == contents(loader.steps()) == expected
        assert list(loader.steps(60)) == []
    assert not processes()


def test_more_workers_than_sequences_are_left(folder):
    with loader_of(folder, 0, batch=3, limit=3) as loader:
        expected = contents(loader.steps())
    with loader_of(folder, 4, batch=3, limit=3) as loader:
        assert contents(loader.steps()) == expected


def test_close_leaves_no_process_and_the_loader_usable(folder):
    loader = loader_of(folder, 2)
    steps = loader.steps()
    first = contents([next(steps)])
    assert len(processes()) == 2
    loader.close()
    loader.close()
    assert not processes()
    with pytest.raises(RuntimeError, match="this iterator was closed"):
        next(steps)
    assert contents([next(loader.steps())]) == first
    loader.steps()
    assert len(processes()) == 2, "a new iterator replaces the old one"
    loader.close()
    assert not processes()


def test_an_error_of_a_worker_is_raised_where_its_group_is_needed_and_again(folder):
    shard = folder / "shard-002.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    with loader_of(folder, 0) as loader, pytest.raises(DataError) as expected:
        list(loader.steps())
    with loader_of(folder, 2) as loader:
        steps = loader.steps()
        for _ in range(2):
            with pytest.raises(DataError, match=r"shard-002\.tar.*SHA-256") as found:
                list(steps)
            assert str(found.value) == str(expected.value), "no traceback of another process in a message for people"
    assert not processes()


def test_a_killed_worker_is_named_and_nothing_hangs(folder):
    with loader_of(folder, 2) as loader:
        steps = loader.steps()
        next(steps)
        victim = processes()[1]
        os.kill(victim.pid, signal.SIGKILL)
        begin = time.perf_counter()
        with pytest.raises(DataError, match=rf"data worker {victim.pid} \(exit code -9\) ended by itself"):
            list(steps)
        assert time.perf_counter() - begin < 30
    assert not processes()


def test_the_signals_that_stop_a_run_do_not_stop_its_workers(folder):
    """A launcher may send them to every process; the loop still needs its batches to come to the end of a step."""
    multiprocessing.forkserver._forkserver._stop()  # that of an earlier test may hear them: here workers come first
    with loader_of(folder, 2) as loader:
        steps = loader.steps()
        next(steps)
        server = int(Path(f"/proc/{processes()[0].pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        assert server != os.getpid()
        for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            for pid in (server, *(process.pid for process in processes())):
                os.kill(pid, sent)
        time.sleep(0.2)
        for _ in range(30):
            next(steps)
        assert len(processes()) == 2
    assert not processes()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set(), "this process still hears them"


def test_workers_end_with_a_training_process_that_is_killed(folder):
    code = f"""
import multiprocessing, os, signal
from dcscale.data import BatchLoader, StreamConfig, open_stream
if __name__ == "__main__":
    stream = open_stream({str(folder)!r}, StreamConfig(**{SETTINGS!r}))
    sizes = {{"global_batch_size": 6, "micro_batch_size": 3, "rank": 0, "world_size": 1}}
    next(BatchLoader(stream, **sizes, prefetch_steps=2, workers=2).steps())
    print(len(multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    # The workers hold the output open: it ends when they do.
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("2\n", -signal.SIGKILL)


def test_data_that_change_between_opening_and_starting_are_refused(folder):
    loader = loader_of(folder, 1)
    write_token_shards(folder, numbered_shards([130, 61, 97, 180], seed=1), vocab_size=5000)
    with loader, pytest.raises(DataError, match="the data were changed while the run was starting"):
        next(loader.steps())


def test_the_training_process_keeps_its_random_numbers(folder):
    state = torch.get_rng_state()
    with loader_of(folder, 1) as loader:
        next(loader.steps())
    assert torch.equal(torch.get_rng_state(), state)


def test_too_little_shared_memory_is_said(folder, monkeypatch):
    def full(_):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(DataError, match=r"data\.workers is 2, but there are no .* MiB .*No space.*/dev/shm larger"):
        loader_of(folder, 2).steps()


def test_a_bug_in_a_worker_is_not_taken_for_bad_data(folder, monkeypatch):
    loader = loader_of(folder, 1)
    monkeypatch.setattr(type(loader._stream), "reopen", int)  # which is no stream
    with loader, pytest.raises(AttributeError, match="'int' object has no attribute 'fingerprint'"):
        next(loader.steps())


def test_workers_take_the_work_off_the_training_process(tmp_path, monkeypatch):
    """Measured: 23 ns of the training process's time a token without workers, 5 with them."""
    monkeypatch.undo()
    write_token_shards(tmp_path, [[list(range(400))] * 500 for _ in range(4)], vocab_size=5000, bundle=500)
    spent = {}
    for count in (0, 1):
        settings = {"sequence_length": 1024, "slots": 2}
        with loader_of(tmp_path, count, batch=48, prefetch=4, **settings) as loader:
            steps = loader.steps()
            for _ in range(20):
                next(steps)
            begin = time.process_time()
            for _ in range(100):
                next(steps)
            spent[count] = time.process_time() - begin
    assert spent[1] < 0.6 * spent[0]
