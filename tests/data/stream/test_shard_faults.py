"""Every way in which a shard can be corrupt, in a folder and on a web server: found, named, counted, never silent."""

import dataclasses
import hashlib
import io
import json
import random
import re
import tarfile

import numpy as np
import pytest

from dcscale.config import DataSource
from dcscale.data import BatchLoader, DataError, StreamConfig, open_mixture, open_stream, read_manifest
from dcscale.data.shards.manifest import write_manifest
from dcscale.data.storage import RetryPolicy, StorageOptions
from dcscale.testing import shard_server as faults
from dcscale.testing.runs import numbered_shards, write_token_shards
from dcscale.testing.shard_server import ShardServer

QUICK = StorageOptions(RetryPolicy(timeout=0.5, backoff=0.001, total=0.05))
SETTINGS = {
    "vocab_size": 5000,
    "sequence_length": 8,
    "seed": 3,
    "shuffle_shards": 2,
    "slots": 4,
    "document_mask": True,
    "verify": True,
    "storage_options": QUICK,
}
SIZES = [60, 31, 47, 80, 52, 22, 41, 30]
BAD = "shard-003.tar"


def flip(data, at, bit=1):
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


def member(data, number):
    """Offset of a member; samples have two each, of 1024 bytes with their headers."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()[number].offset


def moved(data, target, source, count=1):
    """Members from ``source`` on, written over those from ``target`` on."""
    content = data[member(data, source) : member(data, source + count)]
    return data[: member(data, target)] + content + data[member(data, target) + len(content) :]


SIZE = r"it has \d+ bytes, but the manifest says \d+: it was cut off or replaced"
SHA256 = r"its SHA-256 is [0-9a-f]{64}, but the manifest says"
NOT_FOUND = r"the manifest names this shard, but it cannot be read: (No such file|the server answers 404 Not Found)"
NOT_COMPLETE = r"it is not a complete tar: at byte \d+ there is neither a member nor the end"

FOUND = {
    "cut at the bound of a sample": (lambda data: data[: member(data, 2)], SIZE),
    "cut inside a payload": (lambda data: data[: member(data, 3) + 600], SIZE),
    "cut between the members of a sample": (lambda data: data[: member(data, 3)], SIZE),
    "one bit of a tar header": (lambda data: flip(data, member(data, 2) + 100), SHA256),
    "a header of zeros": (lambda data: data[: member(data, 2)] + bytes(512) + data[member(data, 2) + 512 :], SHA256),
    "one bit of a token": (lambda data: flip(data, member(data, 3) + 512 + 130), SHA256),
    "one bit of an npy header": (lambda data: flip(data, member(data, 3) + 512 + 20), SHA256),
    "missing": (lambda data: None, NOT_FOUND),
    "empty": (lambda data: b"", SIZE),
    "a web page": (lambda data: faults.PAGE, SIZE),
    "a web page of the right size": (lambda data: faults.PAGE.ljust(len(data)), SHA256),
    "a tar without members": (lambda data: bytes(len(data)), SHA256),
    "too long": (lambda data: data + b"x", SIZE),
    "another content": (lambda data: data[::-1], SHA256),
}
"""What is done to the shard: (its new content, None for no file; the error message)."""

FOUND_BY_CONTENT = {
    "cut at the bound of a sample": (lambda data: data[: member(data, 2)], NOT_COMPLETE),
    "cut inside a payload": (lambda data: data[: member(data, 3) + 600], "it is not a readable tar: unexpected end"),
    "cut between the members of a sample": (lambda data: data[: member(data, 3)], NOT_COMPLETE),
    "one bit of a tar header": (lambda data: flip(data, member(data, 2) + 100), NOT_COMPLETE),
    "a header of zeros": (
        lambda data: data[: member(data, 2)] + bytes(512) + data[member(data, 2) + 512 :],
        NOT_COMPLETE,
    ),
    "one bit of a token": (
        lambda data: flip(data, member(data, 3) + 512 + 131, 0x80),
        r"sample 003-003: token id \d+ is not below model\.vocab_size, 5000",
    ),
    "one bit of an npy header": (
        lambda data: flip(data, member(data, 3) + 512 + 20),
        r"member 003-003\.tokens\.npy is not an npy array of version 1\.0",
    ),
    "empty": (lambda data: b" ", "it is not a readable tar"),
    "a web page": (lambda data: faults.PAGE, "it is not a readable tar"),
    "a tar without members": (lambda data: bytes(len(data)), "it holds 0 samples, but the manifest says 5"),
    "members interleaved": (
        lambda data: moved(moved(data, 1, 2), 2, 3),
        r"sample 003-000 has no tokens\.npy, or its members are not adjacent",
    ),
    "a key twice": (
        lambda data: moved(data, 4, 0, count=2),
        "sample 003-000 appears twice, or its members are not adjacent",
    ),
}
"""The same where the manifest describes the corrupt file, so that only its content can reveal it."""

TABLE = {
    **{name: (*row, False) for name, row in FOUND.items()},
    **{f"{name}, described": (*row, True) for name, row in FOUND_BY_CONTENT.items()},
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    write_token_shards(folder, numbered_shards(SIZES), vocab_size=5000)
    return folder


@pytest.fixture
def corrupted(clean, tmp_path):
    """Corrupts ``BAD`` in a copy of the clean folder, which it returns."""

    def corrupt(change, described=False):
        for path in clean.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        content = change((tmp_path / BAD).read_bytes())
        if content is None:
            (tmp_path / BAD).unlink()
        else:
            (tmp_path / BAD).write_bytes(content)
        if described:
            manifest, sha256 = read_manifest(tmp_path), hashlib.sha256(content).hexdigest()
            shards = [
                dataclasses.replace(info, bytes=len(content), sha256=sha256) if info.name == BAD else info
                for info in manifest.shards
            ]
            write_manifest(tmp_path, dataclasses.replace(manifest, shards=tuple(shards)))
        return tmp_path

    return corrupt


@pytest.fixture(params=["file", "http"])
def root_of(request):
    """Returns the root of a folder, by path or by address."""
    servers = []

    def root(folder):
        if request.param == "file":
            return str(folder)
        servers.append(ShardServer(folder))
        return servers[-1].address

    yield root
    for server in servers:
        server.close()


def epoch(stream, first=0):
    count = stream.sequences_per_epoch
    return stream.sequences(range(first * count, (first + 1) * count))


def skips(sequences):
    return {shard for shards in sequences.skipped.values() for shard in shards}


def tokens_of(number):
    """The tokens of a shard, which no other has; without the first of each document, which are no targets."""
    documents = numbered_shards(SIZES)[number]
    return [token for document in documents for token in document[1:]]


def rows(sequences):
    parts = (sequences.tokens_NL1, sequences.targets_NL, sequences.document_ids_NL)
    return [b"".join(part[i].tobytes() for part in parts) for i in range(len(sequences.targets_NL))]


@pytest.mark.parametrize(("change", "message", "described"), TABLE.values(), ids=TABLE)
def test_by_default_every_fault_is_an_error_with_shard_and_reason(corrupted, root_of, change, message, described):
    root = root_of(corrupted(change, described))
    stream = open_stream(root, StreamConfig(**SETTINGS))
    with pytest.raises(DataError, match=message) as error:
        epoch(stream)
    assert str(error.value).startswith(f"{root}/{BAD}: ")


@pytest.mark.parametrize(("change", "message", "described"), TABLE.values(), ids=TABLE)
def test_with_skip_every_fault_is_counted_and_nothing_else_is_lost(corrupted, root_of, change, message, described):
    root = root_of(corrupted(change, described))
    stream = open_stream(root, StreamConfig(on_error="skip", max_skipped=0.5, **SETTINGS))
    bad = stream.manifest.shards[3]
    stream.check_shard_files()
    expected = sorted(token for number in range(len(SIZES)) if number != 3 for token in tokens_of(number))
    for e in range(2):
        found = epoch(stream, e)
        (skipped,) = skips(found)
        assert (skipped.sha256, skipped.tokens, skipped.name) == (bad.sha256, SIZES[3], f"{root}/{BAD}")
        assert skipped.reason.startswith(f"{root}/{BAD}: ")
        assert re.search(message, skipped.reason)
        assert sorted(found.targets_NL[found.targets_NL != -100].tolist()) == expected
        end = found.targets_NL.size - (sum(SIZES) - 1)  # of the last sequence; the last token is no input
        assert found.padding_N.sum() - end in (SIZES[3], SIZES[3] - 1)


@pytest.mark.parametrize("document_mask", [True, False])
def test_every_sequence_outside_the_block_of_a_skipped_shard_is_unchanged(clean, corrupted, document_mask):
    settings = {**SETTINGS, "document_mask": document_mask}
    whole = open_stream(clean, StreamConfig(**settings))
    stream = open_stream(corrupted(lambda data: None), StreamConfig(on_error="skip", max_skipped=0.5, **settings))
    order, touched = whole.sources[0].order, 0
    for g in range(2 * whole.sequences_per_epoch):
        hit = any(3 in order.shards(placement.block) for placement in whole.planner.placements_of(g))
        before, after = whole.sequence(g), stream.sequence(g)
        assert bool(after.skipped) == hit
        if not hit:
            assert before.tokens_NL1.tobytes() == after.tokens_NL1.tobytes()
            assert before.targets_NL.tobytes() == after.targets_NL.tobytes()
            assert (before.document_ids_NL is None) or (before.document_ids_NL == after.document_ids_NL).all()
        else:
            lost = after.tokens_NL1[:, 1:] == 256
            assert (after.targets_NL[lost] == -100).all()
        touched += hit
    assert 20 < touched < 60


def test_the_other_documents_of_the_block_keep_their_order(clean, corrupted):
    whole = open_stream(clean, StreamConfig(**SETTINGS))
    stream = open_stream(corrupted(lambda data: None), StreamConfig(on_error="skip", max_skipped=0.5, **SETTINGS))
    lost = set(range(sum(SIZES[:3]), sum(SIZES[:4])))

    def in_order(stream):
        """An epoch's targets in order of their sequence's index, without those of the skipped shard."""
        numbers = np.arange(stream.sequences_per_epoch)
        targets_NL = epoch(stream).targets_NL[np.argsort(stream.planner.locate(numbers).index_N)]
        targets = targets_NL.reshape(-1).tolist()
        return [token for token in targets if token != -100 and token not in lost]

    assert in_order(whole) == in_order(stream)


def test_with_packed_rows_every_other_row_stays_where_it_is(tmp_path):
    content = [[list(range(100 * i, 100 * i + 4)), list(range(100 * i + 4, 100 * i + 9))] for i in range(24)]
    shards = [[document for row in content[i : i + 3] for document in row] for i in range(0, 24, 3)]
    write_token_shards(tmp_path, shards, vocab_size=5000)
    write_manifest(tmp_path, dataclasses.replace(read_manifest(tmp_path), row_tokens=9))
    whole = open_stream(tmp_path, StreamConfig(**SETTINGS))
    before = epoch(whole)
    (tmp_path / BAD).unlink()
    stream = open_stream(tmp_path, StreamConfig(on_error="skip", max_skipped=0.5, **SETTINGS))
    after = epoch(stream)
    lost = [i for i, (old, new) in enumerate(zip(rows(before), rows(after))) if old != new]
    assert len(lost) == 3
    assert {int(before.tokens_NL1[i, 0]) // 300 for i in lost} == {3}
    assert (after.targets_NL[lost] == -100).all()
    assert (after.document_ids_NL[lost] == 0).all()
    assert before.padding_N.sum() == 0
    assert after.padding_N.tolist() == [8 if i in lost else 0 for i in range(len(after.padding_N))]


def test_a_shard_whose_dtype_cannot_hold_the_end_of_document_token_is_skipped_too(tmp_path):
    manifest = write_token_shards(tmp_path, numbered_shards([40, 50]), vocab_size=100_000)
    tokenizer = dataclasses.replace(manifest.tokenizer, eos_id=99_999)
    write_manifest(tmp_path, dataclasses.replace(manifest, tokenizer=tokenizer))
    (tmp_path / "shard-000.tar").unlink()
    settings = {"vocab_size": 100_000, "sequence_length": 8, "seed": 0, "shuffle_shards": 2, "slots": 1}
    stream = open_stream(
        tmp_path, StreamConfig(**settings, document_mask=True, verify=True, on_error="skip", max_skipped=1.0)
    )
    rows = stream.sequences(range(stream.sequences_per_epoch))
    lost = {shard.name for shards in rows.skipped.values() for shard in shards}
    assert lost == {str(tmp_path / "shard-000.tar")}
    assert rows.targets_NL.max() == 89


def test_a_skipped_shard_stays_skipped_even_if_it_is_readable_again(clean, corrupted):
    """So a resumed run, or another rank, reads the same sequences."""
    stream = open_stream(corrupted(lambda data: None), StreamConfig(on_error="skip", max_skipped=0.5, **SETTINGS))
    found = epoch(stream)
    known = [shard.sha256 for shard in skips(found)]
    streams = [open_stream(clean, StreamConfig(max_skipped=0.5, **SETTINGS), skipped=known)]
    streams.append(open_stream(clean, StreamConfig(max_skipped=0.5, **SETTINGS)))
    epoch(streams[1])
    streams[1].skip(known)
    streams += [stream.reopen() for stream in streams]
    for again in streams:
        assert again.skipped == frozenset(known)
        repeated = epoch(again)
        assert repeated.skipped == {}, "known skipped shards are not reported again"
        assert rows(repeated) == rows(found)
        assert again.shards_read <= 4 * (len(SIZES) - 1)


def test_only_max_skipped_may_be_lost(corrupted):
    folder = corrupted(lambda data: None)
    part = SIZES[3] / sum(SIZES)
    allowed = open_stream(folder, StreamConfig(on_error="skip", max_skipped=part, **SETTINGS))
    assert skips(epoch(allowed))
    refused = open_stream(folder, StreamConfig(on_error="skip", max_skipped=part * 0.999, **SETTINGS))
    message = (
        rf"^{folder}: 1 of 8 shards cannot be used \({BAD}\), 80 tokens or 22\.039% of all, but data\.max_skipped is"
    )
    with pytest.raises(DataError, match=message):
        epoch(refused)
    sha256 = refused.manifest.shards[3].sha256
    with pytest.raises(DataError, match=message):
        open_stream(folder, StreamConfig(max_skipped=0.1, **SETTINGS), skipped=[sha256])
    stream = open_stream(folder, StreamConfig(max_skipped=0.25, **SETTINGS))
    stream.skip([sha256])
    with pytest.raises(DataError, match=r"2 of 8 shards cannot be used \(shard-000\.tar, shard-003\.tar\), 140 tokens"):
        stream.skip([refused.manifest.shards[0].sha256])
    assert stream.skipped == {sha256}


def test_losses_add_up_while_reading(corrupted):
    folder = corrupted(lambda data: None)
    for number in (0, 1, 2):
        (folder / f"shard-00{number}.tar").write_bytes(b"")
    stream = open_stream(folder, StreamConfig(on_error="skip", max_skipped=0.5, **SETTINGS))
    with pytest.raises(DataError, match="of 8 shards cannot be used"):
        epoch(stream)


def test_a_mixture_limits_the_skipped_shards_of_each_source(clean, corrupted, tmp_path):
    write_token_shards(tmp_path / "other", numbered_shards([70, 90, 50]), vocab_size=5000)
    folder = corrupted(lambda data: b"x")
    sources = [DataSource("a", str(folder), 0.7), DataSource("b", str(tmp_path / "other"), 0.3)]
    mixture = open_mixture(sources, StreamConfig(on_error="skip", max_skipped=0.3, **SETTINGS))
    found = mixture.sequences(range(80))
    (skipped,) = skips(found)
    assert skipped.name == f"{folder}/{BAD}"
    mixture.skip([skipped.sha256])
    assert [source.skipped for source in mixture.sources] == [{skipped.sha256}] * 2
    again = mixture.reopen()
    assert rows(again.sequences(range(80))) == rows(found)
    with pytest.raises(DataError, match=r"other: 1 of 3 shards cannot be used"):
        mixture.skip([mixture.sources[1].manifest.shards[1].sha256])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_report_what_was_skipped_for_them(clean, corrupted, workers):
    folder = corrupted(lambda data: None)
    stream = open_stream(folder, StreamConfig(on_error="skip", max_skipped=0.5, **SETTINGS))
    reference = open_stream(folder, StreamConfig(on_error="skip", max_skipped=0.5, **SETTINGS))
    options = {"global_batch_size": 6, "micro_batch_size": 3, "rank": 0, "world_size": 1}
    with BatchLoader(stream, prefetch_steps=2, workers=workers, **options) as loader:
        seen = set()
        for step, batches in zip(range(20), loader.steps()):
            for number, batch in enumerate(batches):
                expected = reference.sequences(range(6 * step + 3 * number, 6 * step + 3 * number + 3))
                assert set(batch.skipped) == skips(expected)
                assert (batch.targets.numpy() == expected.targets_NL).all()
                assert batch.to("cpu").skipped == batch.skipped
                seen.update(batch.skipped)
        assert len(seen) == 1
        loader.skip([shard.sha256 for shard in seen])
        steps = loader.steps()
        for step, batches in zip(range(20), steps):
            expected = reference.sequences(range(6 * step, 6 * step + 6))
            assert not any(batch.skipped for batch in batches)
            assert np.concatenate([batch.targets.numpy() for batch in batches]).tolist() == expected.targets_NL.tolist()
        loader.interrupt()
        with pytest.raises(DataError, match="reading was ended|data worker .* died"):
            list(steps)


TRANSIENT = [
    faults.status(503),
    faults.status(429, Retry_After="0"),
    faults.status(500),
    faults.stall(),
    faults.stall(700),
    faults.cut(1500),
    faults.cut(1500, length=False),
    faults.cut(0),
    faults.reset(),
    faults.reset(900),
    faults.corrupt,
    faults.page,
]


@pytest.mark.parametrize("cached", [False, True])
def test_temporary_faults_do_not_change_the_sequences(clean, tmp_path, cached):
    """Every fault that a server can have, several per shard, while the stream reads with many threads."""
    generator = random.Random(0)
    storage_options = StorageOptions(
        RetryPolicy(timeout=0.25, backoff=0.001, total=60), tmp_path / "cache" if cached else None, 60_000
    )
    with ShardServer(clean) as server:
        server.faults["manifest.json"] = [faults.status(503), faults.cut(100), faults.reset()]
        for number in range(len(SIZES)):
            chosen = generator.sample(TRANSIENT, 5) + ([TRANSIENT[number]] if number < len(TRANSIENT) else [])
            # Content that is wrong three times in a row is taken for what the server has.
            server.faults[f"shard-{number:03d}.tar"] = [
                fault for i, fault in enumerate(chosen) if fault not in (faults.corrupt, faults.page) or i < 1
            ]
        settings = {**SETTINGS, "storage_options": storage_options, "on_error": "skip", "max_skipped": 0.0}
        stream, whole = (
            open_stream(server.address, StreamConfig(**settings)),
            open_stream(clean, StreamConfig(**SETTINGS)),
        )
        for e in range(2):
            found, expected = epoch(stream, e), epoch(whole, e)
            assert found.skipped == {}
            assert rows(found) == rows(expected)
        assert not any(server.faults.values())


@pytest.mark.parametrize(
    "name",
    ["../x.tar", "/etc/x.tar", "http://127.0.0.1/x.tar", "pipe:touch x.tar", "-x.tar", "a\\x.tar", "%2e%2e/x.tar"],
)
def test_shard_names_from_a_server_cannot_leave_their_root_or_be_a_command(clean, corrupted, name):
    folder = corrupted(lambda data: data)
    content = json.loads((folder / "manifest.json").read_text())
    content["shards"][0]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(content))
    with ShardServer(folder) as server:
        with pytest.raises(DataError, match=r"shards\[0\]\.name is .*a relative path inside the folder"):
            open_stream(server.address, StreamConfig(**SETTINGS))
        assert server.paths() == ["manifest.json"]


@pytest.mark.parametrize("ranks", [3, 8])
def test_fewer_shards_than_readers(tmp_path, ranks):
    """One shard for all: each sequence is read once, by the rank that has its number."""
    write_token_shards(tmp_path, numbered_shards([150]), vocab_size=5000)
    loaders = [
        BatchLoader(
            open_stream(tmp_path, StreamConfig(**SETTINGS)),
            global_batch_size=ranks,
            micro_batch_size=1,
            rank=rank,
            world_size=ranks,
        )
        for rank in range(ranks)
    ]
    whole = epoch(open_stream(tmp_path, StreamConfig(**SETTINGS)))
    steps = [loader.steps() for loader in loaders]
    found = [next(step)[0].targets[0].tolist() for _ in range(len(whole.targets_NL) // ranks) for step in steps]
    assert found == whole.targets_NL[: len(found)].tolist()
