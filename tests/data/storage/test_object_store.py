"""Shards in an object store: an S3 server in this process, read through s3fs, and its failures."""

import hashlib
import logging
import pickle
import time

import pytest

from dcscale.data import DataError, StreamConfig, open_stream, read_manifest
from dcscale.data.storage import ContentError, RetryPolicy, StorageOptions, UnreadableError, open_storage
from dcscale.data.storage.object_store import ObjectStorage
from dcscale.testing.runs import numbered_shards, write_token_shards

CONTENT = bytes(range(256)) * 400
SIZE = len(CONTENT)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
QUICK = StorageOptions(RetryPolicy(timeout=5, backoff=0.001, total=20))
SETTINGS = {
    "vocab_size": 5000,
    "sequence_length": 8,
    "seed": 3,
    "shuffle_shards": 2,
    "slots": 4,
    "document_mask": True,
    "verify": True,
}


@pytest.fixture(scope="module")
def endpoint():
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def bucket(endpoint):
    """A bucket with one object; its endpoint and credentials are set in the environment."""
    import s3fs

    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            environment.setenv(name, value)
        store = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        store.mkdir("bucket")
        store.pipe_file("bucket/deep/train/s.tar", CONTENT)
        yield store


@pytest.fixture(scope="module")
def connected(bucket):
    storage = open_storage("s3://bucket/deep/train/", QUICK)
    storage._connected_client()
    return storage


@pytest.fixture
def new_storage(connected):
    """Makes storages on shared connections, because making connections takes half a second."""

    def new(retry_policy=QUICK.retry, **options):
        storage = ObjectStorage("s3://bucket/deep/train/", retry_policy, **options)
        storage._client, storage._client_pid = connected._client, connected._client_pid
        return storage

    return new


@pytest.fixture
def storage(new_storage):
    return new_storage()


def fail_first(storage, monkeypatch, *errors):
    """Make the next reads fail with these errors (None succeeds); returns the list of requested (start, end)."""
    store, waiting, requested = storage._connected_client(), list(errors), []
    cat_file = store.cat_file

    def failing(path, start=None, end=None, **options):
        requested.append((start, end))
        if waiting and (error := waiting.pop(0)) is not None:
            raise error
        return cat_file(path, start=start, end=end, **options)

    monkeypatch.setattr(store, "cat_file", failing)
    return requested


def test_sequences_from_a_bucket_equal_those_from_a_folder(bucket, tmp_path):
    write_token_shards(tmp_path, numbered_shards([60, 31, 47, 80]), vocab_size=5000)
    bucket.put(str(tmp_path), "bucket/train", recursive=True)
    local, remote = (
        open_stream(tmp_path, StreamConfig(**SETTINGS)),
        open_stream("s3://bucket/train", StreamConfig(**SETTINGS)),
    )
    assert local.fingerprint == remote.fingerprint
    remote.check_shard_files()
    for g in range(local.sequences_per_epoch):
        assert local.sequence(g).tokens_NL1.tobytes() == remote.sequence(g).tokens_NL1.tobytes()


def test_an_object_is_read_and_checked(storage):
    assert storage.read("s.tar", SIZE, SHA256) == CONTENT
    assert storage.read("s.tar") == CONTENT
    assert storage.location("s.tar") == "s3://bucket/deep/train/s.tar"
    with pytest.raises(ContentError, match=r"^s3://bucket/deep/train/s\.tar: its SHA-256 is .*manifest says 000"):
        storage.read("s.tar", SIZE, "0" * 64)


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 5, 10**9])
@pytest.mark.parametrize("part", [1 << 24, SIZE, SIZE // 4])
def test_every_wrong_size_is_noticed(new_storage, size, part):
    with pytest.raises(ContentError, match=rf"s\.tar: it has \d+ bytes, but the manifest says {size}: it was cut off"):
        new_storage(part_bytes=part).read("s.tar", size)


def test_an_empty_object(bucket, storage):
    bucket.pipe_file("bucket/deep/train/empty.tar", b"")
    with pytest.raises(ContentError, match="it has 0 bytes, but the manifest says 9"):
        storage.read("empty.tar", 9)


@pytest.mark.parametrize("part", [SIZE, SIZE - 1, SIZE // 4, 30_000])
def test_an_object_is_read_in_parts_and_only_failed_parts_are_read_again(new_storage, monkeypatch, part):
    storage = new_storage(part_bytes=part)
    requested = fail_first(storage, monkeypatch, None, OSError(16, "Please reduce your request rate."), TimeoutError())
    assert storage.read("s.tar", SIZE, SHA256) == CONTENT
    parts = -(-SIZE // part)
    assert len(set(requested)) == parts
    assert len(requested) == (parts + 2 if parts > 1 else 1)


def test_a_flipped_bit_is_read_again_from_the_beginning(storage, monkeypatch):
    store = storage._connected_client()
    cat_file, answers = store.cat_file, [CONTENT[::-1], CONTENT[::-1]]
    monkeypatch.setattr(store, "cat_file", lambda *a, **o: answers.pop() if answers else cat_file(*a, **o))
    assert storage.read("s.tar", SIZE, SHA256) == CONTENT


def test_missing_object_and_bucket(storage):
    with pytest.raises(UnreadableError, match=r"^s3://bucket/deep/train/t\.tar: .*no such object$") as error:
        storage.read("t.tar", 5)
    assert error.value.missing
    with pytest.raises(UnreadableError, match="no such object"):
        open_storage("s3://absent/train", QUICK).read("t.tar", 5)
    with pytest.raises(DataError, match=r"s3://bucket/none/manifest\.json: no such file, so s3://bucket/none is not a"):
        open_stream("s3://bucket/none", StreamConfig(**SETTINGS))


def test_refused_credentials_fail_at_once(storage, monkeypatch):
    requested = fail_first(storage, monkeypatch, PermissionError("Access Denied"))
    with pytest.raises(UnreadableError, match="the store denies access: Access Denied; check the credentials"):
        storage.read("s.tar", SIZE)
    assert len(requested) == 1


def test_missing_credentials_fail_at_once_with_a_hint(connected, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/absent")
    with pytest.raises(UnreadableError, match="Unable to locate credentials; set them in the environment; FSSPEC_S3_"):
        open_storage("s3://bucket/train", QUICK).read("s.tar", SIZE)


def test_an_invalid_request_fails_at_once(storage, monkeypatch):
    requested = fail_first(storage, monkeypatch, OSError(22, "Invalid token"))
    with pytest.raises(UnreadableError, match=r"the store rejects the request as invalid: .*Invalid token"):
        storage.read("s.tar")
    assert len(requested) == 1


def test_attempts_are_limited_in_time(new_storage, monkeypatch):
    storage = new_storage(RetryPolicy(timeout=1, backoff=0.01, total=0.2))
    fail_first(storage, monkeypatch, *[OSError(5, "We encountered an internal error")] * 1000)
    start = time.monotonic()
    with pytest.raises(UnreadableError, match=r"OSError: .*internal error; stopped after \d+ attempts in 0 s"):
        storage.read("s.tar", SIZE)
    assert time.monotonic() - start < 5


def test_a_server_that_does_not_exist(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    silent = open_storage("s3://bucket/train", StorageOptions(RetryPolicy(timeout=0.2, backoff=0.01, total=0.1)))
    with pytest.raises(UnreadableError, match=r"s3://bucket/train/s\.tar: cannot be read: .*stopped after \d+ att"):
        silent.read("s.tar", SIZE)


def test_check_does_not_read(storage, monkeypatch):
    requested = fail_first(storage, monkeypatch)
    storage.check({"s.tar": SIZE})
    with pytest.raises(ContentError, match="it has 102400 bytes, but the manifest says 7"):
        storage.check({"s.tar": 7})
    with pytest.raises(UnreadableError, match=r"t\.tar: cannot be read: no such object"):
        storage.check({"s.tar": SIZE, "t.tar": 7})
    assert requested == []


def test_another_process_makes_its_own_connections(storage):
    assert storage.read("s.tar", SIZE) == CONTENT
    assert pickle.loads(pickle.dumps(storage)).read("s.tar", SIZE) == CONTENT


@pytest.mark.parametrize("root", ["s3://", "s3:///x", "s3:bucket/x", "s3://key:secret@bucket/x"])
def test_addresses_without_a_bucket_or_with_secrets_are_refused(root):
    with pytest.raises(DataError, match=r"must be written as s3://BUCKET/PREFIX, without credentials") as error:
        open_storage(root)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_missing_package_is_named_with_the_install_command(monkeypatch, scheme):
    def get_filesystem_class(name):
        raise ImportError(f"Install {name}fs to access it")

    monkeypatch.setattr("fsspec.get_filesystem_class", get_filesystem_class)
    with pytest.raises(DataError, match=rf"{scheme}://: .*not installed \(Install.*'pip install dcscale\[{scheme}\]'"):
        open_storage(f"{scheme}://bucket/x")


def test_patterns_of_a_bucket(bucket, connected, tmp_path):
    shards = numbered_shards([60, 31, 47])
    for number in range(3):
        write_token_shards(tmp_path / f"part-{number}/train", shards[number : number + 1], vocab_size=5000)
    bucket.put(str(tmp_path), "bucket/parts", recursive=True)
    bucket.pipe_file("bucket/parts/notes.txt", b"x")
    for pattern in ("part-*/train", "part-{0..2}/train", "part-[0-2]/train"):
        local, remote = read_manifest(f"{tmp_path}/{pattern}"), read_manifest(f"s3://bucket/parts/{pattern}")
        assert local == remote
    assert str(open_storage("s3://bucket/parts/*/train").parts[2]) == "s3://bucket/parts/part-2/train"
    with pytest.raises(DataError, match=r"s3://bucket/none-\*: no folder matches"):
        open_storage("s3://bucket/none-*")
