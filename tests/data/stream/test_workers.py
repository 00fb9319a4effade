"""Worker processes: the same batches, errors and deaths reported to the loop, and no process left over."""

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
from dcscale.data.storage import UnreadableError
from dcscale.data.stream.workers import GROUP_SEQUENCES, _WorkerDataset
from dcscale.signals import STOP_SIGNALS
from dcscale.testing.runs import numbered_shards, write_token_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

SETTINGS = {"vocab_size": 5000, "sequence_length": 8, "seed": 3, "shuffle_shards": 1, "slots": 4}
SETTINGS |= {"document_mask": True, "verify": True}


@pytest.fixture
def folder(tmp_path):
    write_token_shards(tmp_path / "shards", numbered_shards([130, 61, 97, 180]), vocab_size=5000)
    return tmp_path / "shards"


def loader_of(folder, count, *, batch=6, prefetch=2, limit=None, group=12, **changes):
    """A loader with small groups, so that the few sequences of a test are many groups."""
    stream = open_stream(folder, StreamConfig(**{**SETTINGS, **changes}))
    sizes = {"global_batch_size": batch, "micro_batch_size": 3, "rank": 0, "world_size": 1}
    ahead = {"prefetch_steps": prefetch, "workers": count, "group_sequences": group}
    return BatchLoader(stream, **sizes, **ahead, limit=limit)


def contents(steps):
    return [
        [(b.input_ids.tolist(), b.targets.tolist(), None if b.document_ids is None else b.document_ids.tolist(),
          b.padding_count) for b in step]
        for step in steps
    ]  # fmt: skip


def processes():
    return [process for process in multiprocessing.active_children() if process.is_alive()]


@pytest.mark.parametrize("document_mask", [True, False])
def test_a_slow_consumer_gets_the_same_batches_although_the_memory_is_reused(folder, document_mask):
    with loader_of(folder, 0, document_mask=document_mask) as loader:
        expected = contents(itertools.islice(loader.steps(18), 40))
    with loader_of(folder, 2, document_mask=document_mask) as loader:
        steps, found = loader.steps(18), []
        for number in range(40):
            found.append(next(steps))
            if number % 10 == 0:
                time.sleep(0.1)  # time for the workers to prepare as much as they may
        assert contents(found) == expected


def test_a_limited_stream_ends_and_can_be_read_again(folder):
    with loader_of(folder, 0, limit=28) as loader:
        expected = contents(loader.steps())
    assert [sum(batch[-1] for batch in step) for step in expected] == [0, 0, 0, 0, 2 * 8]
    with loader_of(folder, 2, limit=28) as loader:
        assert contents(loader.steps()) == contents(loader.steps()) == expected
        assert list(loader.steps(60)) == []
    assert not processes()


def test_more_workers_than_remaining_sequences(folder):
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


def test_an_error_of_a_worker_is_raised_when_its_group_is_needed_and_again_afterwards(folder):
    shard = folder / "shard-002.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    with loader_of(folder, 0) as loader, pytest.raises(DataError) as expected:
        list(loader.steps())
    with loader_of(folder, 2) as loader:
        steps = loader.steps()
        for _ in range(2):
            with pytest.raises(DataError, match=r"shard-002\.tar.*SHA-256") as found:
                list(steps)
            assert str(found.value) == str(expected.value), "the message must not contain a traceback of the worker"
    assert not processes()


@pytest.mark.parametrize("retry", [False, True])
def test_a_worker_passes_on_whether_its_error_may_be_gone_later(retry):
    class Unreachable:
        fingerprint = ""

        def reopen(self):
            raise DataError("manifest.json") from UnreadableError("http://server", "503", retry=retry)

    (error,) = _WorkerDataset(Unreachable(), [], 1, torch.zeros(1))
    assert (str(error), error.retry) == ("manifest.json", retry)


def test_a_killed_worker_is_reported_and_nothing_hangs(folder):
    with loader_of(folder, 2) as loader:
        steps = loader.steps()
        next(steps)
        victim = processes()[1]
        os.kill(victim.pid, signal.SIGKILL)
        begin = time.perf_counter()
        with pytest.raises(DataError, match=rf"data worker {victim.pid} \(exit code -9\) died") as error:
            list(steps)
        assert error.value.retry, "another start may have more memory"
        assert time.perf_counter() - begin < 30
    assert not processes()


def test_the_signals_that_stop_a_run_do_not_stop_its_workers(folder):
    """A launcher may send them to every process; the loop still needs batches to complete its step."""
    multiprocessing.forkserver._forkserver._stop()  # a server that another test started may not ignore them
    with loader_of(folder, 2) as loader:
        steps = loader.steps()
        next(steps)
        server = int(Path(f"/proc/{processes()[0].pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        assert server != os.getpid()
        for sent in STOP_SIGNALS:
            for pid in (server, *(process.pid for process in processes())):
                os.kill(pid, sent)
        time.sleep(0.2)
        for _ in range(30):
            next(steps)
        assert len(processes()) == 2
    assert not processes()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set(), "this process does not ignore them"


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
    # The workers inherit stdout, so run() returns only when they have ended.
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("2\n", -signal.SIGKILL)


def test_data_that_changed_between_opening_and_starting_is_rejected(folder):
    loader = loader_of(folder, 1)
    write_token_shards(folder, numbered_shards([130, 61, 97, 180], seed=1), vocab_size=5000)
    with loader, pytest.raises(DataError, match="the data changed while the run was starting"):
        next(loader.steps())


def test_the_random_state_of_the_training_process_is_unchanged(folder):
    state = torch.get_rng_state()
    with loader_of(folder, 1) as loader:
        next(loader.steps())
    assert torch.equal(torch.get_rng_state(), state)


def test_too_little_shared_memory_is_reported(folder, monkeypatch):
    def full(_):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(DataError, match=r"data\.workers is 2, but the .* MiB .*No space.*/dev/shm larger"):
        loader_of(folder, 2).steps()


def test_a_bug_in_a_worker_is_not_reported_as_bad_data(folder, monkeypatch):
    loader = loader_of(folder, 1)
    monkeypatch.setattr(type(loader._stream), "reopen", int)  # int() is not a stream
    with loader, pytest.raises(AttributeError, match="'int' object has no attribute 'fingerprint'"):
        next(loader.steps())


def test_workers_relieve_the_training_process(tmp_path):
    """Measured: 23 ns of the training process's CPU time per token without workers, 5 with them."""
    write_token_shards(tmp_path, [[list(range(400))] * 500 for _ in range(4)], vocab_size=5000, bundle=500)
    spent = {}
    for count in (0, 1):
        settings = {"sequence_length": 1024, "slots": 2}
        with loader_of(tmp_path, count, batch=48, prefetch=4, group=GROUP_SEQUENCES, **settings) as loader:
            steps = loader.steps()
            for _ in range(20):
                next(steps)
            rounds = []
            for _ in range(4):  # the best of them, because other tests share the caches of the CPU
                begin = time.process_time()
                for _ in range(25):
                    next(steps)
                rounds.append(time.process_time() - begin)
            spent[count] = min(rounds)
    assert spent[1] < 0.6 * spent[0]
