"""Shards in an object store: a server that speaks S3's protocol, read through s3fs, and its failures."""

import copy
import hashlib
import logging
import pickle
import time

import pytest

from dcscale.data import DataError, StreamConfig, open_stream, read_manifest
from dcscale.data.storage import ContentError, RetryPolicy, StorageOptions, UnreadableError, open_storage
from dcscale.data.storage.retry import Retries
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
    """An empty bucket, found by what the environment says."""
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
    source = open_storage("s3://bucket/deep/train/", QUICK)
    source._connections()
    return source


@pytest.fixture
def source(connected):
    """Each its own source, on connections that were made once: making them takes half a second."""
    source = copy.copy(connected)
    source._client, source._owner = connected._client, connected._owner
    return source


def fail_first(source, monkeypatch, *errors):
    """The store's next reads fail with these errors; returns the (start, end) of all."""
    store, waiting, asked = source._connections(), list(errors), []
    cat_file = store.cat_file

    def failing(path, start=None, end=None, **options):
        asked.append((start, end))
        if waiting and (error := waiting.pop(0)) is not None:
            raise error
        return cat_file(path, start=start, end=end, **options)

    monkeypatch.setattr(store, "cat_file", failing)
    return asked


def test_sequences_from_a_bucket_are_those_from_a_folder(bucket, tmp_path):
    write_token_shards(tmp_path, numbered_shards([60, 31, 47, 80]), vocab_size=5000)
    bucket.put(str(tmp_path), "bucket/train", recursive=True)
    near, far = (
        open_stream(tmp_path, StreamConfig(**SETTINGS)),
        open_stream("s3://bucket/train", StreamConfig(**SETTINGS)),
    )
    assert near.fingerprint == far.fingerprint
    far.check_shard_files()
    for g in range(near.sequences_per_epoch):
        assert near.sequence(g).tokens_NL1.tobytes() == far.sequence(g).tokens_NL1.tobytes()


def test_an_object_is_read_whole_and_checked(source):
    assert source.read("s.tar", SIZE, SHA256) == CONTENT
    assert source.read("s.tar") == CONTENT
    assert source.where("s.tar") == "s3://bucket/deep/train/s.tar"
    with pytest.raises(ContentError, match=r"^s3://bucket/deep/train/s\.tar: its SHA-256 is .*manifest says 000"):
        source.read("s.tar", SIZE, "0" * 64)


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 5, 10**9])
@pytest.mark.parametrize("part", [1 << 24, SIZE, SIZE // 4])
def test_every_other_size_is_noticed(source, monkeypatch, size, part):
    monkeypatch.setattr("dcscale.data.storage.object_store._PART", part)
    with pytest.raises(ContentError, match=rf"s\.tar: it has \d+ bytes, but the manifest says {size}: it was cut off"):
        source.read("s.tar", size)


def test_an_empty_object(bucket, source):
    bucket.pipe_file("bucket/deep/train/empty.tar", b"")
    with pytest.raises(ContentError, match="it has 0 bytes, but the manifest says 9"):
        source.read("empty.tar", 9)


@pytest.mark.parametrize("part", [SIZE, SIZE - 1, SIZE // 4, 30_000])
def test_parts_make_up_the_object_and_only_one_is_read_again(source, monkeypatch, part):
    monkeypatch.setattr("dcscale.data.storage.object_store._PART", part)
    asked = fail_first(source, monkeypatch, None, OSError(16, "Please reduce your request rate."), TimeoutError())
    assert source.read("s.tar", SIZE, SHA256) == CONTENT
    parts = -(-SIZE // part)
    assert len(set(asked)) == parts
    assert len(asked) == (parts + 2 if parts > 1 else 1)


def test_a_flipped_bit_is_read_again_from_the_beginning(source, monkeypatch):
    store = source._connections()
    cat_file, answers = store.cat_file, [CONTENT[::-1], CONTENT[::-1]]
    monkeypatch.setattr(store, "cat_file", lambda *a, **o: answers.pop() if answers else cat_file(*a, **o))
    assert source.read("s.tar", SIZE, SHA256) == CONTENT


def test_missing_object_and_bucket(source):
    with pytest.raises(UnreadableError, match=r"^s3://bucket/deep/train/t\.tar: .*there is no such object$") as error:
        source.read("t.tar", 5)
    assert error.value.missing
    with pytest.raises(UnreadableError, match="there is no such object"):
        open_storage("s3://nowhere/train", QUICK).read("t.tar", 5)
    with pytest.raises(DataError, match=r"s3://bucket/none/manifest\.json: no such file, so s3://bucket/none is not a"):
        open_stream("s3://bucket/none", StreamConfig(**SETTINGS))


def test_refused_credentials_fail_at_once(source, monkeypatch):
    asked = fail_first(source, monkeypatch, PermissionError("StorageOptions Denied"))
    with pytest.raises(UnreadableError, match="the store refuses it: StorageOptions Denied; check the credentials"):
        source.read("s.tar", SIZE)
    assert len(asked) == 1


def test_no_credentials_fail_at_once_and_name_the_way_out(connected, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(UnreadableError, match="Unable to locate credentials; give some in the environment; FSSPEC_S3_"):
        open_storage("s3://bucket/train", QUICK).read("s.tar", SIZE)


def test_a_request_that_the_store_does_not_understand_fails_at_once(source, monkeypatch):
    asked = fail_first(source, monkeypatch, OSError(22, "Invalid token"))
    with pytest.raises(UnreadableError, match=r"the store does not understand the request: .*Invalid token"):
        source.read("s.tar")
    assert len(asked) == 1


def test_tries_are_limited_in_time(source, monkeypatch):
    source._retries = Retries(RetryPolicy(timeout=1, backoff=0.01, total=0.2))
    fail_first(source, monkeypatch, *[OSError(5, "We encountered an internal error")] * 1000)
    start = time.monotonic()
    with pytest.raises(UnreadableError, match=r"OSError: .*internal error; given up after \d+ tries in 0 s"):
        source.read("s.tar", SIZE)
    assert time.monotonic() - start < 5


def test_a_server_that_is_not_there(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    silent = open_storage("s3://bucket/train", StorageOptions(RetryPolicy(timeout=0.2, backoff=0.01, total=0.1)))
    with pytest.raises(UnreadableError, match=r"s3://bucket/train/s\.tar: cannot be read: .*given up after \d+ tries"):
        silent.read("s.tar", SIZE)


def test_looking_without_reading(source, monkeypatch):
    asked = fail_first(source, monkeypatch)
    source.check({"s.tar": SIZE})
    with pytest.raises(ContentError, match="it has 102400 bytes, but the manifest says 7"):
        source.check({"s.tar": 7})
    with pytest.raises(UnreadableError, match=r"t\.tar: cannot be read: there is no such object"):
        source.check({"s.tar": SIZE, "t.tar": 7})
    assert asked == []


def test_another_process_makes_its_own_connections(source):
    assert source.read("s.tar", SIZE) == CONTENT
    assert pickle.loads(pickle.dumps(source)).read("s.tar", SIZE) == CONTENT


@pytest.mark.parametrize("root", ["s3://", "s3:///x", "s3:bucket/x", "s3://key:secret@bucket/x"])
def test_addresses_that_name_no_bucket_or_hold_secrets(root):
    with pytest.raises(DataError, match=r"must be written as s3://BUCKET/PREFIX, without credentials") as error:
        open_storage(root)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_what_is_not_installed_is_named_with_the_command(monkeypatch, scheme):
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
        near, far = read_manifest(f"{tmp_path}/{pattern}"), read_manifest(f"s3://bucket/parts/{pattern}")
        assert near == far
    assert str(open_storage("s3://bucket/parts/*/train").parts[2]) == "s3://bucket/parts/part-2/train"
    with pytest.raises(DataError, match=r"s3://bucket/none-\*: no folder has such a name"):
        open_storage("s3://bucket/none-*")
