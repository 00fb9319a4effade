"""Shards on disk: any WebDataset reader can read them, and corrupt shards are refused."""

import dataclasses
import functools
import hashlib
import io
import operator
import pickle
import random
import subprocess
import tarfile

import numpy as np
import pytest
import webdataset

from dcscale.data import DataError
from dcscale.data.shards import tar as tars
from dcscale.data.shards.shard import check_shards, read_shard, write_shard
from dcscale.data.storage import open_storage

DOCUMENTS = [[1, 2, 256], [3, 256], [4, 5, 6, 256], [256], [7, 8, 256]]
BUNDLES = [("a-0", DOCUMENTS[:2]), ("a-1", DOCUMENTS[2:])]


def arrays(documents, dtype="uint16"):
    return [np.array(document, dtype=dtype) for document in documents]


def write(folder, dtype="uint16", name="s.tar"):
    folder.mkdir(exist_ok=True)
    bundles = [(key, arrays(documents)) for key, documents in BUNDLES]
    return write_shard(folder, name, bundles, dtype=dtype, text_bytes=8)


def read(folder, info, **changes):
    return read_shard(open_storage(folder), info, **{"dtype": "uint16", "vocab_size": 257, "verify": True, **changes})


def check(folder, info):
    check_shards(open_storage(folder), [info])


def info_of(folder, info):
    """The entry with the current size and checksum of the file, so that only its content can be refused."""
    data = (folder / info.name).read_bytes()
    return dataclasses.replace(info, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def npy(array, **options):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), **options)
    return buffer.getvalue()


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in filter(None, members):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    if None in members:
        with open(path, "ab") as file:
            file.write(b"x")


def sample(key, documents, dtype="uint16"):
    tokens = np.array(functools.reduce(operator.iadd, documents, []), dtype)
    lengths = np.array([len(document) for document in documents], "uint32")
    return [(f"{key}.lens.npy", npy(lengths)), (f"{key}.tokens.npy", npy(tokens))]


def test_headers_written_by_numpy_are_read_without_its_parser(tmp_path, monkeypatch):
    """NumPy's parser occasionally fails in threads (CPython issue 106905)."""
    info = write(tmp_path)
    monkeypatch.setattr("numpy.lib.format.read_array_header_1_0", None)
    assert [document.tolist() for document in read(tmp_path, info)] == DOCUMENTS


def test_headers_of_other_writers_are_read(tmp_path):
    text = "{'shape':(13,), 'descr': '<u2', 'fortran_order': False}".ljust(117) + "\n"
    tokens = TOKENS[1][10 + int.from_bytes(TOKENS[1][8:10], "little") :]
    npy_of_other_writer = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + tokens
    info = write(tmp_path)
    write_tar(tmp_path / info.name, [LENS, ("k.tokens.npy", npy_of_other_writer)])
    info = dataclasses.replace(info_of(tmp_path, info), samples=1)
    assert [document.tolist() for document in read(tmp_path, info)] == DOCUMENTS


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("verify", [True, False])
def test_documents_round_trip(tmp_path, dtype, verify):
    info = write(tmp_path, dtype)
    found = read(tmp_path, info, dtype=dtype, verify=verify)
    assert [document.tolist() for document in found] == DOCUMENTS
    assert {document.dtype for document in found} == {np.dtype(dtype)}
    assert (info.samples, info.documents, info.tokens, info.text_bytes) == (2, 5, 13, 8)
    check(tmp_path, info)


def test_plain_webdataset_reads_the_shard(tmp_path):
    write(tmp_path)
    samples = list(webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == ["a-0", "a-1"]
    for sample, (_, documents) in zip(samples, BUNDLES):
        assert sample["tokens.npy"].tolist() == functools.reduce(operator.iadd, documents, [])
        assert sample["lens.npy"].tolist() == [len(document) for document in documents]
        assert (sample["tokens.npy"].dtype, sample["lens.npy"].dtype) == (np.uint16, np.uint32)


def test_tar_lists_and_unpacks_the_shard(tmp_path):
    write(tmp_path)
    listed = subprocess.run(["tar", "tf", tmp_path / "s.tar"], capture_output=True, text=True, check=True).stdout
    assert sorted(listed.split()) == ["a-0.lens.npy", "a-0.tokens.npy", "a-1.lens.npy", "a-1.tokens.npy"]
    subprocess.run(["tar", "xf", tmp_path / "s.tar", "-C", tmp_path], check=True)
    tokens = np.load(tmp_path / "a-0.tokens.npy", allow_pickle=False)
    assert tokens.tolist() == functools.reduce(operator.iadd, DOCUMENTS[:2], [])


def test_writing_is_reproducible_and_leaves_nothing_else(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert first == second
    assert (tmp_path / "a/s.tar").read_bytes() == (tmp_path / "b/s.tar").read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["s.tar"]


def test_shards_of_other_writers_are_read(tmp_path):
    """Additional members, keys in folders, upper-case extensions, and names too long for a plain header."""
    info = write(tmp_path)
    long = "x" * 200
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        first, second = sample("./v1.0/k0", DOCUMENTS[:2])
        members = [
            ("./v1.0/k0.json", b"{}"),
            first,
            ("./v1.0/k0.seg.JPG", b"\xff\xd8"),
            (second[0].upper().replace("V1.0/K0", "v1.0/k0"), second[1]),
            ("README", b"of no sample"),
            ("./v1.0/.DS_Store", b""),
            *sample(long, DOCUMENTS[2:]),
            (f"{long}.json", b"{}"),
        ]
        write_tar(tmp_path / "s.tar", members, format)
        found = read(tmp_path, info_of(tmp_path, info))
        assert [document.tolist() for document in found] == DOCUMENTS
        keys = [s["__key__"] for s in webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False)]
        assert keys == ["./v1.0/k0", long], "the keys are WebDataset's"


@pytest.mark.parametrize("extension", ["tokens.npy", "npy"])
def test_a_sample_without_lens_is_a_document(tmp_path, extension):
    info = write(tmp_path)
    members = [(f"k{i}.{extension}", npy(np.array(document, "uint16"))) for i, document in enumerate(DOCUMENTS)]
    write_tar(tmp_path / "s.tar", members)
    found = read(tmp_path, dataclasses.replace(info_of(tmp_path, info), samples=5))
    assert [document.tolist() for document in found] == DOCUMENTS


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


CORRUPTIONS = {
    "empty file": lambda data: b"",
    "cut at a member": lambda data: data[: data.index(b"a-1.")],
    "cut inside a member": lambda data: data[:700],
    "a flipped token": lambda data: flip(data, data.index(b"\x01\x00\x02\x00")),
    "a flipped tar header": lambda data: flip(data, data.index(b"a-1.") + 30),
    "a zeroed tar header": lambda data: data[: data.index(b"a-1.")] + bytes(512) + data[data.index(b"a-1.") + 512 :],
    "a web page": lambda data: b"<html>not found</html>".ljust(len(data)),
    "another shard": lambda data: data.replace(b"\x01\x00\x02\x00", b"\x02\x00\x02\x00"),
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_every_corruption_is_found_by_size_or_checksum(tmp_path, corrupt):
    info = write(tmp_path)
    path = tmp_path / "s.tar"
    path.write_bytes(corrupt(path.read_bytes()))
    with pytest.raises(DataError, match=r"s\.tar: (it has \d+ bytes, but the manifest says|its SHA-256 is)"):
        read(tmp_path, info)


STRUCTURAL = [
    "empty file",
    "cut at a member",
    "cut inside a member",
    "a flipped tar header",
    "a zeroed tar header",
    "a web page",
]


@pytest.mark.parametrize("name", STRUCTURAL)
def test_a_corrupt_structure_is_found_without_checksum_and_size(tmp_path, name):
    info = write(tmp_path)
    path = tmp_path / "s.tar"
    path.write_bytes(CORRUPTIONS[name](path.read_bytes()))
    with pytest.raises(DataError, match=r"s\.tar: "):
        read(tmp_path, info_of(tmp_path, info), verify=False)


def test_missing_shard(tmp_path):
    info = write(tmp_path)
    (tmp_path / "s.tar").unlink()
    for attempt in (read, check):
        with pytest.raises(
            DataError, match=r"s\.tar: the manifest names this shard, but it cannot be read: No such file"
        ):
            attempt(tmp_path, info)


def test_wrong_size_is_found_without_reading(tmp_path):
    info = write(tmp_path)
    with pytest.raises(DataError, match=r"it has 10240 bytes, but the manifest says 10241: it was cut off or replaced"):
        check(tmp_path, dataclasses.replace(info, bytes=10241))


@pytest.mark.parametrize("name", ["samples", "documents", "tokens"])
def test_counts_that_differ_from_the_manifest(tmp_path, name):
    info = write(tmp_path)
    wrong = dataclasses.replace(info, **{name: getattr(info, name) + 1})
    with pytest.raises(DataError, match=rf"it holds \d+ {name}, but the manifest says {getattr(info, name) + 1}"):
        read(tmp_path, wrong)


def test_token_beyond_the_vocabulary_is_named_with_its_sample(tmp_path):
    info = write(tmp_path)
    with pytest.raises(DataError, match=r"s\.tar: sample a-0: token id 256 is not below model\.vocab_size, 256"):
        read(tmp_path, info, vocab_size=256)


GOOD = sample("k", DOCUMENTS)
LENS, TOKENS = GOOD
MALFORMED = {
    "pickled tokens": (
        [LENS, ("k.tokens.npy", npy(np.array([{}], dtype=object), allow_pickle=True))],
        r"member k\.tokens\.npy holds pickled objects, which are never loaded",
    ),
    "a bare pickle": ([LENS, ("k.tokens.npy", pickle.dumps([1]))], r"member k\.tokens\.npy is not an npy array"),
    "cut npy header": ([LENS, ("k.tokens.npy", TOKENS[1][:20])], r"member k\.tokens\.npy is not an npy array"),
    "npy version 2": (
        [LENS, ("k.tokens.npy", npy(np.arange(3, dtype="uint16"), version=(2, 0)))],
        r"not an npy array of version 1\.0: its version is \(2, 0\)",
    ),
    "another type": (sample("k", DOCUMENTS, "int32"), r"tokens\.npy is int32 with shape \(13,\), but must be uint16"),
    "big-endian": (sample("k", DOCUMENTS, ">u2"), r"tokens\.npy is >u2 .* but must be uint16"),
    "lens of another type": (
        [("k.lens.npy", npy(np.array([13], "int64"))), TOKENS],
        r"lens\.npy is int64 with shape \(1,\), but must be uint32",
    ),
    "two axes": ([LENS, ("k.tokens.npy", npy(np.ones((2, 3), "uint16")))], r"with shape \(2, 3\), .* with one axis"),
    "data too short": ([LENS, ("k.tokens.npy", TOKENS[1][:-2])], r"has 24 bytes of data, but shape \(13,\)"),
    "data too long": ([LENS, ("k.tokens.npy", TOKENS[1] + b"12")], r"has 28 bytes of data, but shape \(13,\)"),
    "lens that do not sum": (
        [("k.lens.npy", npy(np.array([3, 2], "uint32"))), TOKENS],
        r"sample k: lens\.npy must be positive and sum to its 13 tokens",
    ),
    "an empty document": (
        [("k.lens.npy", npy(np.array([13, 0], "uint32"))), TOKENS],
        r"sample k: lens\.npy must be positive",
    ),
    "a sample without documents": (
        [("k.lens.npy", npy(np.array([], "uint32"))), ("k.tokens.npy", npy(np.array([], "uint16")))],
        r"sample k: lens\.npy must be positive",
    ),
    "no tokens": ([LENS], r"sample k has no tokens\.npy"),
    "lens lost": ([TOKENS, *sample("m", DOCUMENTS)], r"it holds 6 documents, but the manifest says 5"),
    "two kinds of tokens": ([*GOOD, ("k.npy", TOKENS[1])], r"sample k has tokens\.npy and npy"),
    "no tokens without lens": (
        [("k.npy", npy(np.array([], "uint16")))],
        r"sample k: lens\.npy must be positive and sum",
    ),
    "interleaved": (
        [LENS, *sample("m", DOCUMENTS), TOKENS],
        r"sample k has no tokens\.npy, or its members are not",
    ),
    "a key twice": ([*GOOD, *sample("m", DOCUMENTS), *GOOD], r"sample k appears twice"),
    "a member twice": ([LENS, LENS, TOKENS], r"member k\.lens\.npy appears twice"),
    "other members only": ([("k.txt", b"x")], r"sample k has no tokens\.npy"),
    "something after the end": ([*GOOD, ("m.json", b""), None], r"not a complete tar: at byte \d+ there is neither"),
    "no samples": ([], r"it holds 0 samples, but the manifest says 2"),
}


@pytest.mark.parametrize(("members", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_samples_are_refused(tmp_path, members, message):
    info = write(tmp_path)
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, info_of(tmp_path, info))
    assert str(error.value).startswith(f"{tmp_path / 's.tar'}: ")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_random_corruption_gives_documents_or_a_data_error(tmp_path, format):
    """Without the checksum, tokens may differ, but a changed byte never raises any other exception."""
    info = write(tmp_path)
    name = "k" if format == tarfile.USTAR_FORMAT else "k" * 150
    write_tar(tmp_path / "s.tar", [*sample(name, DOCUMENTS[:2]), *sample("m", DOCUMENTS[2:])], format)
    data, generator = (tmp_path / "s.tar").read_bytes(), random.Random(0)
    used = [i for i, byte in enumerate(data) if byte]
    refused = 0
    for _ in range(300):
        at = generator.choice(used)
        (tmp_path / "s.tar").write_bytes(data[:at] + bytes([generator.randrange(256)]) + data[at + 1 :])
        try:
            assert sum(map(len, read(tmp_path, info_of(tmp_path, info), verify=False))) == 13
        except DataError:
            refused += 1
    assert refused > 150


@pytest.mark.parametrize(
    "header",
    [
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},  # tarfile then expects the map in the content
        {"GNU.sparse.map": "1,x"},
        {"GNU.sparse.size": "x"},
    ],
)
def test_headers_that_tarfile_cannot_parse_are_refused(tmp_path, header):
    info = write(tmp_path)
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("k.tokens.npy")
        member.size, member.pax_headers = len(TOKENS[1]), header
        tar.addfile(member, io.BytesIO(TOKENS[1]))
    with pytest.raises(DataError, match=r"s\.tar: it is not a readable tar: "):
        read(tmp_path, info_of(tmp_path, info), verify=False)


def test_a_tar_without_end_marker_is_refused(tmp_path):
    """It may be cut off between two members, which only the size in the manifest would reveal otherwise."""
    info = write(tmp_path)
    data = (tmp_path / "s.tar").read_bytes().rstrip(b"\0")
    (tmp_path / "s.tar").write_bytes(data + bytes(-len(data) % 512))
    with pytest.raises(DataError, match=r"not a complete tar: at byte \d+ there is neither a member nor the end"):
        read(tmp_path, info_of(tmp_path, info))


def test_links_in_a_shard_are_refused(tmp_path):
    info = write(tmp_path)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        entry = tarfile.TarInfo("k.tokens.npy")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry)
    with pytest.raises(DataError, match=r"member k\.tokens\.npy is not a regular file"):
        read(tmp_path, info_of(tmp_path, info))


def test_plain_tars_are_parsed_as_by_tarfile_and_others_are_left_to_it(tmp_path):
    """A long name, a folder, a flipped bit or a missing end marker makes a tar not plain."""
    info = write(tmp_path)
    data = (tmp_path / info.name).read_bytes()
    members, end = tars._plain_members(data)
    with tarfile.open(tmp_path / info.name) as tar:
        found = [tars.Member(member.name, member.offset_data, member.size) for member in tar]
        assert (members, end) == (found, tar.offset)
    flipped = bytearray(data)
    flipped[members[1].begin - 512] ^= 1
    for other in (flipped, data[:end], data[: end - 100], b"", bytes([*data[:156], ord("5"), *data[157:]])):
        assert tars._plain_members(bytes(other)) is None
    with tarfile.open(tmp_path / "long.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("a" * 120 + ".npy"))
    assert tars._plain_members((tmp_path / "long.tar").read_bytes()) is None
