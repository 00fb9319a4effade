"""Data that is named twice, under whatever names: by path, by link, as a copy, in part, over HTTP."""

import dataclasses
import re
import shutil

import pytest

from dcscale.config import DataSource
from dcscale.data import DataError, StreamConfig, open_mixture, open_stream, read_manifest
from dcscale.data.shards.manifest import write_manifest
from dcscale.data.shards.repeated import find_repeated
from dcscale.data.storage import open_storage
from dcscale.testing.runs import numbered_shards, write_token_shards
from dcscale.testing.shard_server import ShardServer

STREAM = StreamConfig(
    vocab_size=5000, sequence_length=8, seed=3, shuffle_shards=2, slots=4, document_mask=True, verify=True
)


@pytest.fixture
def data(tmp_path):
    """Folders ``c`` and ``d`` of three shards each; ``link`` and ``c2`` are links to ``c``."""
    shards = numbered_shards([60, 31, 47, 80, 45, 22])
    write_token_shards(tmp_path / "c/train", shards[:3], vocab_size=5000)
    write_token_shards(tmp_path / "d/train", shards[3:], vocab_size=5000)
    for name in ("link", "c2"):
        (tmp_path / name).symlink_to("c")
    return tmp_path


def add_copies(folder, source, count):
    """Adds the first ``count`` shards of ``source`` to ``folder``, under other names."""
    manifest = read_manifest(folder) if folder.exists() else dataclasses.replace(read_manifest(source), shards=())
    folder.mkdir(parents=True, exist_ok=True)
    originals = read_manifest(source).shards[:count]
    copies = [dataclasses.replace(info, name=f"copy-{info.sha256[:8]}.tar") for info in originals]
    for info, copied in zip(originals, copies):
        shutil.copyfile(source / info.name, folder / copied.name)
    write_manifest(folder, dataclasses.replace(manifest, shards=(*manifest.shards, *copies)))


@pytest.mark.parametrize(
    ("pattern", "first", "second"),
    [
        ("{c,link}/train", "c/train", "link/train"),
        ("c*/train", "c/train", "c2/train"),
        ("{link,d,c2}/train", "link/train", "c2/train"),
        ("{c,./c}/train", "c/train", "./c/train"),
        ("{c/train,c/../c/train}", "c/train", "c/../c/train"),
        ("{c/train,c//train/}", "c/train", "c//train/"),
        ("{c,d,c}/train", "c/train", "c/train"),
    ],
)
def test_one_folder_under_two_names(data, pattern, first, second):
    with pytest.raises(DataError) as error:
        open_stream(f"{data}/{pattern}", STREAM)
    assert str(error.value) == (
        f"{data}/{pattern}: {data}/{first} and {data}/{second} are the same folder, so its data would be used twice; "
        f"name it once"
    )


def test_a_relative_and_an_absolute_name(data, monkeypatch):
    monkeypatch.chdir(data)
    with pytest.raises(DataError, match=rf"c/train and {data}/c/train are the same folder"):
        open_stream(f"{{c,{data}/c}}/train", STREAM)


@pytest.mark.parametrize(
    ("pattern", "first"),
    [
        ("http://{host,HOST:80}/c/train", "http://host/c/train"),
        ("https://host{,:443}/c/train?key=1", r"https://host/c/train\?..."),
        ("http://{,user:secret@}host/c/train", "http://host/c/train"),
        ("http://host/{c,d/../c,.//c/}", "http://host/c"),
        ("s3://bucket/{c,c/}", "s3://bucket/c"),
    ],
)
def test_one_address_written_in_two_ways(pattern, first):
    with pytest.raises(DataError, match=f": {first} and .* are the same folder") as error:
        open_storage(pattern)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("pattern", ["http://host/c/train?key={1,2}", "http://{a,b}/c", "http://host{,:81}/c"])
def test_addresses_that_may_differ(pattern):
    assert len(open_storage(pattern).parts) == 2


def test_a_copied_folder_and_a_part_of_one(data):
    shutil.copytree(data / "c", data / "copy")
    with pytest.raises(DataError) as error:
        open_stream(f"{data}/{{c,d,copy}}/train", STREAM)
    assert str(error.value) == (
        f"{data}/c/train and 2 more: has the same content twice: 3 shards of 138 tokens, such as "
        f"{data}/c/train/shard-000.tar and {data}/copy/train/shard-000.tar; name each folder once, or remove the "
        f"copies (and write the manifest again with tools/inspect_shards.py --write-manifest if they are in one folder)"
    )
    add_copies(data / "d/train", data / "c/train", 1)
    with pytest.raises(DataError, match=r": 1 shard of 60 tokens, such as .*c/train/shard-000\.tar and .*/copy-"):
        open_stream(f"{data}/{{c,d}}/train", STREAM)
    open_stream(f"{data}/d/train", STREAM)


def test_copies_in_one_folder(data):
    add_copies(data / "c/train", data / "c/train", 2)
    with pytest.raises(DataError, match=r"c/train: has the same content twice: 2 shards of 91 tokens.*write-manifest"):
        open_stream(data / "c/train", STREAM)


def test_a_copy_on_a_server(data):
    with ShardServer(data) as server:
        pattern = f"{{{data}/c,{server.address}/link}}/train"
        message = rf": 3 shards of 138 tokens, such as {data}/c/train/shard-000\.tar and {server.address}/link/train/s"
        with pytest.raises(DataError, match=message):
            open_stream(pattern, STREAM)


def sources_of(data, *sources):
    return [DataSource(name, f"{data}/{path}/train", *weight) for name, path, *weight in sources]


@pytest.mark.parametrize(
    "sources",
    [
        [("a", "c"), ("b", "c")],
        [("a", "c", 0.5), ("b", "link")],
        [("x", "d", 3.0), ("a", "c"), ("b", "link", 2.0)],
        [("a", "c", 1.0), ("b", "{c2,d}", 2.0)],
    ],
)
def test_sources_of_a_mixture_that_share_data_need_weights(data, sources):
    message = (
        r"^sources a and b of the mixture have data in common: 3 shards of 138 tokens, such as .*/c/train/sha"
        r".* and .*; it would be used twice: remove it from one of them, or, if that is meant, give both a weight "
        r"other than 1$"
    )
    with pytest.raises(DataError, match=message):
        open_mixture(sources_of(data, *sources), STREAM)


def test_weights_make_shared_data_meant_and_a_warning_says_so(data):
    mixture = open_mixture(sources_of(data, ("a", "c", 0.7), ("b", "c2", 0.2), ("x", "d")), STREAM)
    assert mixture.warnings == [
        f"sources a and b of the mixture have data in common: 3 shards of 138 tokens, such as "
        f"{data}/c/train/shard-000.tar and {data}/c2/train/shard-000.tar; it is used with the weight of both"
    ]
    assert mixture.reopen().warnings == mixture.warnings
    assert open_mixture(sources_of(data, ("a", "c"), ("b", "d")), STREAM).warnings == []
    assert open_stream(data / "c/train", STREAM).warnings == ()


def test_pairs_are_counted_with_the_first_occurrence(data):
    add_copies(data / "e/train", data / "c/train", 2)
    add_copies(data / "e/train", data / "d/train", 1)
    roots = [(open_storage(data / name / "train"), read_manifest(data / name / "train")) for name in ("c", "d", "e")]
    assert find_repeated(roots[:2]) == []
    found = find_repeated(roots)
    assert [repeated[:4] for repeated in found] == [(0, 2, 2, 91), (1, 2, 1, 80)]
    assert re.fullmatch(r"1 shard of 80 tokens, such as \S+/d/train/shard-000.tar and \S+/copy-\S+", str(found[1]))
