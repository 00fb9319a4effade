"""Reading documents from files: their order and names, and errors for every kind of unreadable text."""

import gzip
import json
import os
import random
import sys

import pyarrow
import pytest
from pyarrow import parquet

from dcscale.data import DataError
from dcscale.data.prepare import documents
from dcscale.data.prepare.documents import find_files, read_documents, split_into_chunks

zstd = documents.zstd


def documents_of(inputs, chunk_bytes=1 << 22, text_field="text", skip_undecodable=False, **options):
    return [
        document
        for chunk in split_into_chunks(find_files(inputs, **options), text_field=text_field, chunk_bytes=chunk_bytes)
        for document in read_documents(chunk, text_field=text_field, skip_undecodable=skip_undecodable)
    ]


def named(documents):
    return {document.name: document.text for document in documents}


def make_tree(folder):
    for name in (
        "b.txt",
        "a/z.txt",
        "a/b/c.txt",
        "a.txt",
        "a-.txt",
        "skip.bin",
        "tests/t.txt",
        "a/tests/u.txt",
        "x.tmp.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}\r\n", newline="")
    return folder


def test_folders_are_read_at_any_depth_sorted_by_path(tmp_path):
    found = documents_of([make_tree(tmp_path)])
    assert [document.name for document in found] == [
        "a/b/c.txt", "a/tests/u.txt", "a/z.txt", "a-.txt", "a.txt", "b.txt", "tests/t.txt", "x.tmp.txt",
    ]  # fmt: skip
    assert [document.number for document in found] == list(range(8))
    assert found[0].text == "text of a/b/c.txt\r\n", "line ends stay as they are"
    assert named(documents_of([tmp_path], suffixes=[".bin"])) == {"skip.bin": "text of skip.bin\r\n"}


def test_excluded_files_and_folders(tmp_path):
    found = documents_of([make_tree(tmp_path)], exclude=["tests", "*.tmp.txt", "b"])
    assert list(named(found)) == ["a/z.txt", "a-.txt", "a.txt", "b.txt"]


def test_inputs_keep_their_order_and_files_are_taken_whatever_their_suffix(tmp_path):
    make_tree(tmp_path)
    assert list(named(documents_of([tmp_path / "skip.bin", tmp_path / "tests"]))) == ["skip.bin", "t.txt"]


def write_parquet(path, texts, kind=None, rows=2, **columns):
    table = pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts, kind), **columns})
    parquet.write_table(table, path, row_group_size=rows, write_page_checksum=True)


def test_lines_of_jsonl_and_packed_jsonl_are_documents(tmp_path):
    lines = [{"text": "one"}, {"text": "zwei ä €", "id": 2}, {"text": ""}]
    content = "\n".join(json.dumps(line) for line in lines[:2]) + "\n\n  \n" + json.dumps(lines[2])
    (tmp_path / "a.jsonl").write_text(content)
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(content.encode())
    half = len(content) // 2
    frames = zstd.compress(content[:half].encode()) + zstd.compress(content[half:].encode())
    (tmp_path / "c.jsonl.zst").write_bytes(frames)
    found = documents_of([tmp_path])
    assert [(document.name, document.text, document.number) for document in found] == [
        ("a.jsonl:1", "one", 0), ("a.jsonl:2", "zwei ä €", 1), ("a.jsonl:5", "", 4),
        ("b.jsonl.gz:1", "one", 5), ("b.jsonl.gz:2", "zwei ä €", 6), ("b.jsonl.gz:5", "", 9),
        ("c.jsonl.zst:1", "one", 10), ("c.jsonl.zst:2", "zwei ä €", 11), ("c.jsonl.zst:5", "", 14),
    ]  # fmt: skip


def test_suffixes_in_capitals_are_recognised(tmp_path):
    (tmp_path / "A.JSONL").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "B.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "three"}'))
    write_parquet(tmp_path / "C.PARQUET", ["four"])
    found = documents_of([tmp_path / name for name in ("A.JSONL", "B.JSONL.GZ", "C.PARQUET")])
    assert [document.text for document in found] == ["one", "two", "three", "four"]


def test_zst_of_the_largest_window_is_read(tmp_path):
    options = {zstd.CompressionParameter.window_log: 30, zstd.CompressionParameter.checksum_flag: 1}
    with zstd.open(
        tmp_path / "a.jsonl.zst", "wb", options=options
    ) as file:  # of unknown size, so with the whole window
        for i in range(1000):
            file.write(b'{"text": "%d"}\n' % i)
    assert [document.text for document in documents_of([tmp_path])] == [str(i) for i in range(1000)]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_rows_of_parquet_are_documents(tmp_path, kind):
    kinds = {"dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), "string_view": pyarrow.string_view()}
    write_parquet(tmp_path / "a.parquet", ["one", "zwei ä €", "", "vier"], kinds.get(kind, kind), rows=3)
    (tmp_path / "b.txt").write_text("five")
    found = documents_of([tmp_path])
    assert [(document.name, document.text, document.number) for document in found] == [
        ("a.parquet:1", "one", 0), ("a.parquet:2", "zwei ä €", 1), ("a.parquet:3", "", 2), ("a.parquet:4", "vier", 3),
        ("b.txt", "five", 4),
    ]  # fmt: skip


def test_only_the_column_of_the_text_is_read(tmp_path):
    noise = [random.Random(i).randbytes(4000) for i in range(4)]
    write_parquet(tmp_path / "a.parquet", ["a", "b", "c", "d"], rows=4, noise=noise)
    data = (tmp_path / "a.parquet").read_bytes()
    assert data.count(noise[1]) == 1
    (tmp_path / "a.parquet").write_bytes(data.replace(noise[1], bytes(4000)))
    assert [document.text for document in documents_of([tmp_path])] == ["a", "b", "c", "d"]
    with pytest.raises(OSError, match="CRC"):
        parquet.ParquetFile(tmp_path / "a.parquet", page_checksum_verification=True).read()


def test_a_parquet_file_that_lost_rows_after_it_was_listed_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x"] * 5)
    (chunk,) = split_into_chunks(find_files([tmp_path]))
    write_parquet(tmp_path / "a.parquet", ["x"] * 5, rows=1)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read .*row groups 0 to 2 hold 3 rows instead of 5"):
        list(read_documents(chunk))


def test_a_parquet_file_with_inconsistent_row_counts_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, ["x"] * 5)
    data, contradictions = path.read_bytes(), 0
    for at in range(data.rindex(b"PAR1") - int.from_bytes(data[-8:-4], "little"), len(data) - 8):
        path.write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
        try:
            footer = parquet.read_metadata(path)
            counts = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
        except Exception:  # corrupt in another way
            continue
        if min(counts) >= 0 and sum(counts) != footer.num_rows:
            contradictions += 1
            with pytest.raises(
                DataError, match=rf"its row groups hold {sum(counts)} rows instead of {footer.num_rows}"
            ):
                list(split_into_chunks(find_files([path])))
        if contradictions == 3:
            break
    assert contradictions == 3


def test_parquet_files_without_rows_are_empty(tmp_path):
    write_parquet(tmp_path / "a.parquet", [], "string")
    write_parquet(tmp_path / "b.parquet", ["x"])
    assert [(document.name, document.number) for document in documents_of([tmp_path])] == [("b.parquet:1", 0)]


def test_another_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x", "text": 1}\n')
    write_parquet(tmp_path / "b.parquet", ["y"], content=["z"])
    assert named(documents_of([tmp_path], text_field="content")) == {"a.jsonl:1": "x", "b.parquet:1": "z"}


def test_numbers_and_names_do_not_depend_on_the_chunks(tmp_path):
    make_tree(tmp_path)
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"text": "x" * i}) + "\n" for i in range(50)))
    (tmp_path / "n.txt").write_text("last")
    write_parquet(tmp_path / "o.parquet", [f"row {i}" for i in range(21)], rows=4)
    (tmp_path / "p.txt").write_text("after")
    whole = documents_of([tmp_path])
    assert len(whole) == 81
    assert [document.number for document in whole] == list(range(81))
    for chunk_bytes in (1, 20, 100, 700):
        assert documents_of([tmp_path], chunk_bytes) == whole
    chunks = list(split_into_chunks(find_files([tmp_path]), chunk_bytes=100))
    assert len(chunks) > 10
    assert sum(chunk.bytes for chunk in chunks) == sum(file.bytes for file in find_files([tmp_path]))


def test_row_groups_are_never_divided_and_small_ones_share_a_chunk(tmp_path):
    write_parquet(tmp_path / "a.parquet", [f"row {i}" for i in range(10, 34)], rows=4)
    group = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).total_byte_size
    for chunk_bytes, expected in ((1, [1] * 6), (2 * group, [2] * 3), (1 << 20, [6])):
        chunks = list(split_into_chunks(find_files([tmp_path]), chunk_bytes=chunk_bytes))
        assert [len(chunk.row_groups) for chunk in chunks] == expected
        assert [number for chunk in chunks for number in chunk.row_groups] == list(range(6))


def test_text_that_is_not_utf8_is_named_or_skipped(tmp_path):
    (tmp_path / "good.txt").write_text("gut")
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: byte 3 is 0xf6, which is not UTF-8; .*--skip-undecodable"):
        documents_of([tmp_path])
    assert named(documents_of([tmp_path], skip_undecodable=True)) == {"good.txt": "gut", "latin.txt": None}


def test_jsonl_lines_that_are_not_utf8_are_named_or_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n{"text": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: byte 10 is 0xff, which is not UTF-8"):
        documents_of([tmp_path])
    assert named(documents_of([tmp_path], skip_undecodable=True)) == {
        "a.jsonl:1": "ok",
        "a.jsonl:2": None,
        "a.jsonl:3": None,
    }
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud800"}\n')
    with pytest.raises(DataError, match=r"line 1: character 1 of 'text' is half of a surrogate pair"):
        documents_of([tmp_path])


def test_parquet_text_that_is_not_utf8_is_named_or_skipped(tmp_path):
    buffers = pyarrow.array([b"ok", b"no\xff", b"fine"]).buffers()
    write_parquet(tmp_path / "a.parquet", pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers))
    with pytest.raises(DataError, match=r"a\.parquet, row 2: byte 2 is 0xff, which is not UTF-8; .*--skip-undecodable"):
        documents_of([tmp_path])
    found = named(documents_of([tmp_path], skip_undecodable=True))
    assert found == {"a.parquet:1": "ok", "a.parquet:2": None, "a.parquet:3": "fine"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", r"is not JSON"),
        ("[" * 100_000, r"is not JSON"),
        ('"text"', r"must be an object whose field 'text' is a string, but has str"),
        ('{"body": "x", "id": 1}', r".* but has \['body', 'id'\]; name the right field with --text-field"),
        ('{"text": null}', r"must be an object whose field 'text' is a string, but the field is null; name"),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_malformed_lines_are_never_skipped(tmp_path, line, message, skip):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3: {message}"):
        documents_of([tmp_path], skip_undecodable=skip)


@pytest.mark.parametrize("keep", [15, 40, -4])
def test_corrupt_gz_is_named(tmp_path, keep):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "some text"}\n' * 50)[:keep])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read after line \d+: .*replace the file"):
        documents_of([tmp_path])


@pytest.mark.parametrize("change", [lambda d: d[:15], lambda d: d[:-4], lambda d: d + b"more", lambda d: d[1:]])
def test_corrupt_zst_is_named(tmp_path, change):
    """Also where the file is truncated, which some readers take for its end."""
    lines = b'{"text": "some text"}\n' * 50
    (tmp_path / "a.jsonl.zst").write_bytes(change(zstd.compress(lines)))
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: cannot be read after line \d+: .*replace the file"):
        documents_of([tmp_path])


def test_zst_and_parquet_without_their_packages(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    monkeypatch.setattr(documents, "zstd", None)
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: reading \.zst needs .*'pip install backports\.zstd'"):
        documents_of([tmp_path / "a.jsonl.zst"])
    write_parquet(tmp_path / "a.parquet", ["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a\.parquet: reading Parquet needs .*'pip install pyarrow'"):
        documents_of([tmp_path / "a.parquet"])


@pytest.mark.parametrize(
    ("texts", "kind", "message"),
    [
        ([b"x"], "binary", r"column 'text' is binary, but must be a string; .*--text-field"),
        ([["x"]], pyarrow.list_(pyarrow.string()), r"column 'text' is list<.*>, but must be a string"),
        ([{"a": "x"}], None, r"column 'text' is struct<a: string>, but must be a string"),
        ([1], "int64", r"column 'text' is int64, but must be a string"),
        ([b"x"], pyarrow.dictionary(pyarrow.int8(), pyarrow.binary()), r"column 'text' is dictionary<.*binary.*>, but"),
    ],
)
def test_parquet_columns_that_are_not_text_are_refused(tmp_path, texts, kind, message):
    write_parquet(tmp_path / "a.parquet", texts, kind)
    with pytest.raises(DataError, match=rf"a\.parquet: {message}"):
        documents_of([tmp_path])


def test_parquet_files_without_the_column_or_with_null_are_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x", "y", None])
    with pytest.raises(
        DataError, match=r"must have one column 'body', but its columns are \['id', 'text'\]; .*--text-f"
    ):
        documents_of([tmp_path], text_field="body")
    for skip in (False, True):
        with pytest.raises(DataError, match=r"a\.parquet, row 3: 'text' is null, but must be text"):
            documents_of([tmp_path], skip_undecodable=skip)


def test_parquet_with_a_random_bit_flipped_gives_the_texts_or_a_data_error(tmp_path):
    texts = [f"text number {i}" for i in range(30)]
    write_parquet(tmp_path / "a.parquet", texts, rows=10)
    data, generator = (tmp_path / "a.parquet").read_bytes(), random.Random(0)
    refused = 0
    for _ in range(400):
        at = generator.randrange(len(data))
        (tmp_path / "a.parquet").write_bytes(
            data[:at] + bytes([data[at] ^ 1 << generator.randrange(8)]) + data[at + 1 :]
        )
        try:
            assert [document.text for document in documents_of([tmp_path])] == texts
        except DataError:
            refused += 1
    assert refused > 100
    for cut in (0, 3, 100, len(data) - 5):
        (tmp_path / "a.parquet").write_bytes(data[:cut])
        with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet: .*replace the file"):
            documents_of([tmp_path])


def test_inputs_without_documents_are_refused(tmp_path):
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(DataError, match=r"no file in it ends in \.txt, \.jsonl, .*\.parquet; .*--suffix"):
        find_files([tmp_path])
    with pytest.raises(DataError, match=r"missing: is neither a file nor a folder"):
        find_files([tmp_path / "missing"])


def test_a_file_given_twice(tmp_path):
    make_tree(tmp_path)
    with pytest.raises(DataError, match=r"a\.txt: is given twice"):
        find_files([tmp_path, tmp_path / "a" / ".." / "a.txt"])


@pytest.mark.parametrize("name", ["a.txt.gz", "a.arrow", "a.txt.zst", "a.zip", "A.ZIP"])
def test_unsupported_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{name}: this kind of file is not supported; unpack it"):
        find_files([tmp_path / name])


def test_files_that_vanish_or_cannot_be_listed(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    (chunk,) = split_into_chunks(find_files([tmp_path]))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: No such file"):
        list(read_documents(chunk))

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot be listed: Permission denied"):
        find_files([tmp_path])
