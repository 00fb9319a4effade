"""The cache: never wrong data and never above its limit, even with killed and concurrent processes."""

import errno
import hashlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest

from dcscale.data import DataError
from dcscale.data.storage import RetryPolicy, StorageOptions, cache, open_storage
from dcscale.data.storage.base import Storage
from dcscale.data.storage.cache import CachedStorage
from dcscale.testing import shard_server as faults
from dcscale.testing.shard_server import ShardServer

REPOSITORY = Path(__file__).parents[3]
QUICK = RetryPolicy(timeout=5, backoff=0.001, total=5)
SIZE = 1000


def content(number, size=SIZE):
    return hashlib.shake_128(bytes([number])).digest(size)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Numbers(Storage):
    """Object ``7`` is ``content(7)``; records what is read."""

    def __init__(self):
        self.requested = []

    def location(self, name):
        return f"numbers/{name}"

    def read(self, name, size=None, sha256=None):
        self.requested.append(int(name))
        return content(int(name))

    def check(self, sizes):
        pass

    def close(self):
        self.requested.append("closed")


def fetch(storage, number):
    data = storage.read(str(number), SIZE, sha256(content(number)))
    assert data == content(number)


def entries(folder):
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def total(folder):
    found = 0
    for path in folder.iterdir():
        try:
            found += path.stat().st_size
        except FileNotFoundError:
            continue
    return found


@pytest.fixture
def cached(tmp_path):
    return CachedStorage(Numbers(), tmp_path / "cache", 10 * SIZE)


def test_cached_objects_are_not_fetched_again(cached, tmp_path):
    for _ in range(3):
        for number in range(10):
            fetch(cached, number)
    assert cached._storage.requested == list(range(10))
    assert entries(tmp_path / "cache") == {sha256(content(number)) for number in range(10)}


def test_closing_closes_the_wrapped_storage(cached):
    cached.close()
    assert cached._storage.requested == ["closed"]


def test_objects_of_unknown_checksum_are_not_kept(cached, tmp_path):
    for _ in range(2):
        assert cached.read("3") == content(3)
        assert cached.read("3", SIZE) == content(3)
    assert cached._storage.requested == [3] * 4
    assert entries(tmp_path / "cache") == set()


def test_equal_names_in_two_folders_of_a_web_server(tmp_path):
    for number, folder in enumerate(("a", "b", "mirror")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.tar").write_bytes(content(number % 2))
    storage_options = StorageOptions(QUICK, tmp_path / "cache", 10 * SIZE)
    with ShardServer(tmp_path) as server:
        for _ in range(2):
            for number, folder in enumerate(("a", "b", "mirror")):
                storage = open_storage(f"{server.address}/{folder}?token={number}", storage_options)
                expected = content(number % 2)
                assert storage.read("x.tar", SIZE, sha256(expected)) == expected
        assert server.paths() == ["a/x.tar", "b/x.tar"], "the mirror has the shard that came from a"
        assert str(storage) == f"{server.address}/mirror?..."
        storage.check({"x.tar": SIZE})
    assert isinstance(open_storage(tmp_path / "a", storage_options), type(open_storage(tmp_path / "b"))), (
        "folders need no cache"
    )


def test_corrupt_downloads_are_not_kept(tmp_path):
    (tmp_path / "x.tar").write_bytes(content(1))
    with ShardServer(tmp_path) as server:
        server.faults["x.tar"] = [faults.corrupt, faults.cut(300, length=False)]
        storage = open_storage(server.address, StorageOptions(QUICK, tmp_path / "cache"))
        assert storage.read("x.tar", SIZE, sha256(content(1))) == content(1)
        server.always["x.tar"] = faults.corrupt
        with pytest.raises(DataError):
            storage.read("x.tar", SIZE, sha256(content(2)))
    assert entries(tmp_path / "cache") == {sha256(content(1))}


@pytest.mark.parametrize("corrupt", [b"", content(1)[:-1], content(1) + b"x", content(2)])
def test_a_corrupt_entry_is_removed_and_fetched_again(cached, tmp_path, corrupt, caplog):
    fetch(cached, 1)
    path = tmp_path / "cache" / sha256(content(1))
    path.write_bytes(corrupt)
    with caplog.at_level(logging.WARNING, "dcscale.data"):
        fetch(cached, 1)
    assert cached._storage.requested == [1, 1]
    assert path.read_bytes() == content(1)
    assert f"{path}: it" in caplog.text
    assert "this entry of data.cache is fetched again" in caplog.text


def test_an_entry_that_cannot_be_read_is_fetched(cached, tmp_path, caplog):
    (tmp_path / "cache" / sha256(content(1))).mkdir()
    fetch(cached, 1)
    assert "Is a directory" in caplog.text


def test_the_least_recently_used_are_evicted_and_other_files_left_alone(cached, tmp_path):
    (tmp_path / "cache/notes.txt").write_bytes(bytes(50 * SIZE))
    for number in range(10):
        fetch(cached, number)
        os.utime(tmp_path / "cache" / sha256(content(number)), (number, number))
    fetch(cached, 0)
    fetch(cached, 3)
    for number in (20, 21, 22):
        fetch(cached, number)
    kept = {sha256(content(number)) for number in (0, 3, 5, 6, 7, 8, 9, 20, 21, 22)}
    assert entries(tmp_path / "cache") == {*kept, "notes.txt"}
    for number in (0, 3, 5, 22):
        fetch(cached, number)
    assert cached._storage.requested == [*range(10), 20, 21, 22]


def test_a_shard_larger_than_the_limit_is_used_but_not_kept(tmp_path, caplog):
    cached = CachedStorage(Numbers(), tmp_path / "cache", SIZE - 1)
    fetch(cached, 1)
    fetch(cached, 2)
    assert entries(tmp_path / "cache") == set()
    assert caplog.text.count("a shard of 1000 bytes is more than data.cache_bytes, 999") == 1


class FullDisk:
    def __init__(self, file):
        self.name, self._file = file.name, file

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()

    def write(self, data):
        self._file.write(data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_a_full_disk_is_reported_once_and_reading_continues(cached, tmp_path, monkeypatch, caplog):
    fetch(cached, 1)
    make = NamedTemporaryFile
    monkeypatch.setattr(cache, "NamedTemporaryFile", lambda **options: FullDisk(make(**options)))
    for number in (1, 2, 3):
        fetch(cached, number)
    assert cached._storage.requested == [1, 2, 3]
    assert caplog.text.count(f"data.cache in {tmp_path / 'cache'}: [Errno 28] No space left on device") == 1
    assert entries(tmp_path / "cache") == {sha256(content(1))}, "no unfinished entry is left"


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"data\.cache is .*file/cache, but this folder cannot be created: Not a"):
        CachedStorage(Numbers(), tmp_path / "file/cache", SIZE)


def test_a_folder_that_disappears(cached, tmp_path, caplog):
    (tmp_path / "cache").rmdir()
    fetch(cached, 1)
    assert "this process writes no more entries to data.cache" in caplog.text


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1] + "/tests/data/storage")
from test_storage_cache import CachedStorage, Numbers, SIZE, fetch
cached = CachedStorage(Numbers(), Path(sys.argv[2]), 3 * SIZE)
fetch(cached, 1)
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
fetch(cached, 2)
"""


def test_the_unfinished_entry_of_a_killed_process_is_removed(tmp_path):
    command = [sys.executable, "-c", KILLED, str(REPOSITORY), str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, timeout=60)
    assert done.returncode == -signal.SIGKILL
    left = entries(tmp_path / "cache") - {sha256(content(1))}
    assert len(left) == 1
    assert left.pop().startswith(".unfinished-")
    cached = CachedStorage(Numbers(), tmp_path / "cache", 3 * SIZE)
    for number in (1, 2, 3):
        fetch(cached, number)
    assert cached._storage.requested == [2, 3]
    assert entries(tmp_path / "cache") == {sha256(content(number)) for number in (1, 2, 3)}


def test_the_unfinished_entry_of_a_running_process_is_left_alone(cached, tmp_path):
    with cached._reserve(4 * SIZE) as file:
        for number in range(8):
            fetch(cached, number)
        assert os.path.basename(file.name) in entries(tmp_path / "cache")
        assert total(tmp_path / "cache") <= 10 * SIZE
    with cached._reserve(10 * SIZE):
        fetch(cached, 30)
    assert not cached._writable, "no room is left for it"


def read_at_random(folder, seed, failures):
    try:
        cached = CachedStorage(Numbers(), folder, 5 * SIZE)
        for i in range(150):
            fetch(cached, hashlib.sha256(bytes([seed, i])).digest()[0] % 12)
        assert cached._writable
        assert len(cached._storage.requested) < 150
    except BaseException as error:
        failures.put(repr(error))
        raise


def test_concurrent_processes_stay_within_the_limit(tmp_path):
    context = multiprocessing.get_context("fork")
    failures, folder = context.Queue(), tmp_path / "cache"
    folder.mkdir()
    processes = [context.Process(target=read_at_random, args=(folder, seed, failures)) for seed in range(3)]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        most = max(most, total(folder))
        time.sleep(0.001)
    assert failures.empty()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert 4 * SIZE <= most <= 5 * SIZE
    assert len(entries(folder)) == 5
    assert not [name for name in entries(folder) if name.startswith(".unfinished")]
