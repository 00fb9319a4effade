"""Several roots read as one: which ones, in which order, and only if their tokens are of the same kind."""

import dataclasses
import re

import pytest

from dcscale.data import DataError, StreamConfig, open_stream, read_manifest
from dcscale.data.shards.manifest import write_manifest
from dcscale.data.storage import LocalStorage, RetryPolicy, StorageOptions, UnionStorage, open_storage
from dcscale.testing.runs import numbered_shards, write_token_shards
from dcscale.testing.shard_server import ShardServer

PARTS = ("b", "a", "part-00", "part-01", "part-02")
SETTINGS = {"vocab_size": 5000, "sequence_length": 8, "seed": 3, "shuffle_shards": 2, "slots": 4}
QUICK = StorageOptions(RetryPolicy(timeout=5, backoff=0.001, total=1))


@pytest.fixture
def data(tmp_path):
    """Five folders of two shards each, and the same shards in one folder, in the order of ``PARTS``."""
    shards = numbered_shards([60, 31, 47, 80, 5, 22, 41, 30, 20, 33])
    for number, part in enumerate(PARTS):
        write_token_shards(tmp_path / "data" / part / "train", shards[2 * number : 2 * number + 2], vocab_size=5000)
    (tmp_path / "data/notes.txt").write_text("not a folder")
    write_token_shards(tmp_path / "all", shards, vocab_size=5000)
    return tmp_path / "data"


def stream(root):
    return open_stream(root, StreamConfig(document_mask=True, verify=True, **SETTINGS))


def parts_of(root, storage_options=None):
    return [re.search(r"data/(.*)/train", str(part))[1] for part in open_storage(root, storage_options).parts]


def test_several_folders_give_the_sequences_of_a_single_folder(data):
    joined, single = stream(f"{data}/{{b,a,part-{{00..02}}}}/train"), stream(data.parent / "all")
    assert joined.manifest.totals == single.manifest.totals
    joined.check_shard_files()
    for g in range(single.sequences_per_epoch):
        assert joined.sequence(g).tokens_NL1.tobytes() == single.sequence(g).tokens_NL1.tobytes()


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("{b,a}/train", ["b", "a"]),
        ("part-{00..02}/train", ["part-00", "part-01", "part-02"]),
        ("part-{02..00..2}/train", ["part-02", "part-00"]),
        ("*/train", ["a", "b", "part-00", "part-01", "part-02"]),
        ("{part-*,?}/train", ["part-00", "part-01", "part-02", "a", "b"]),
        ("part-0[12]/train/", ["part-01", "part-02"]),
    ],
)
def test_braces_keep_their_order_and_globs_are_sorted(data, pattern, parts):
    assert parts_of(f"{data}/{pattern}") == parts


def test_a_pattern_that_names_one_folder_is_that_folder(data):
    assert isinstance(open_storage(f"{data}/{{a}}/train".replace("{a}", "[a]")), LocalStorage)
    assert read_manifest(f"{data}/part-{{00..00}}/train").shards[0].name == "shard-000.tar"


def test_a_folder_whose_name_looks_like_a_pattern_is_itself(data):
    (data / "a").rename(data / "x[1]{2,3}")
    assert isinstance(open_storage(f"{data}/x[1]{{2,3}}/train"), LocalStorage)
    assert isinstance(open_storage(data / "x[1]{2,3}/train"), LocalStorage)


def test_messages_name_the_folder_of_a_part(data):
    storage = open_storage(f"{data}/{{b,a}}/train")
    assert isinstance(storage, UnionStorage)
    assert str(storage) == f"{data}/b/train and 1 more"
    assert storage.location("1/shard-000.tar") == f"{data}/a/train/shard-000.tar"
    (data / "a/train/shard-001.tar").unlink()
    joined = stream(f"{data}/{{b,a}}/train")
    with pytest.raises(
        DataError, match=rf"^{data}/a/train/shard-001\.tar: the manifest names this shard, but it cannot"
    ):
        joined.check_shard_files()
    with pytest.raises(
        DataError, match=rf"^{data}/a/train/shard-001\.tar: the manifest names this shard, but it cannot"
    ):
        joined.sequences(range(joined.sequences_per_epoch))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "uint32"}, r"dtype is uint32, but in .*b/train/manifest\.json it is uint16"),
        ({"row_tokens": 1}, r"row_tokens"),
        ({"tokenizer": "1" * 64}, r"tokenizer is TokenizerInfo\(.*fingerprint='111.*, but in .* it is Tok"),
    ],
)
def test_parts_must_hold_the_same_kind_of_tokens(data, change, message):
    manifest = read_manifest(data / "a/train")
    if "tokenizer" in change:
        change = {"tokenizer": dataclasses.replace(manifest.tokenizer, fingerprint=change["tokenizer"])}
    write_manifest(data / "a/train", dataclasses.replace(manifest, **change))
    with pytest.raises(DataError, match=rf"a/train/manifest\.json: {message}"):
        read_manifest(f"{data}/{{b,a}}/train")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none-*/train", r"none-\*/train: no folder matches; check the pattern"),
        ("{a,none}/train", r"none/train: no such folder"),
        ("{a,b/train", r"the braces do not match; write them as in part-\{00\.\.15\}"),
        ("{a,b,a}/train", r"/a/train and .*/a/train are the same folder, so its data would be used twice; name it on"),
        ("{a,[ab]}/train", r"/a/train and .*/a/train are the same folder"),
        ("{a,a/}", r"/a and .*/a/ are the same folder"),
    ],
)
def test_patterns_that_match_nothing_or_a_folder_twice_are_refused(data, pattern, message):
    with pytest.raises(DataError, match=message):
        open_storage(f"{data}/{pattern}")


def test_web_servers_support_braces_but_not_globs(data):
    with ShardServer(data.parent) as server:
        joined = stream(f"{server.address}/data/{{b,a}}/train?key=1")
        local = stream(f"{data}/{{b,a}}/train")
        assert joined.fingerprint == local.fingerprint
        assert joined.sequence(0).tokens_NL1.tobytes() == local.sequence(0).tokens_NL1.tobytes()
        for pattern in ("data/*/train", "data/[ab]/train"):
            with pytest.raises(DataError, match="a web server does not list its folders; name them, as in part-"):
                open_storage(f"{server.address}/{pattern}", QUICK)
