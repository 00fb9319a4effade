"""Reading documents from files: their order, every kind of bad row, and errors for every kind of unreadable file."""

import gzip
import json
import random
import sys

import pyarrow
import pytest
from pyarrow import parquet

from dcscale.data import DataError
from dcscale.data.prepare import json_files
from dcscale.data.prepare.documents import read_documents, split_into_chunks
from dcscale.data.prepare.json_files import zstd
from dcscale.data.prepare.sources import find_files


def documents_of(inputs, chunk_bytes=1 << 22, text_field="text", skip_bad_rows=False, **options):
    files, _ = find_files(inputs, **options)
    return [
        document
        for chunk in split_into_chunks(files, text_field=text_field, chunk_bytes=chunk_bytes)
        for document in read_documents(chunk, text_field=text_field, skip_bad_rows=skip_bad_rows)
    ]


def files_of(*inputs):
    return find_files(inputs)[0]


def named(documents):
    return {document.name: document.text for document in documents}


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
    (chunk,) = split_into_chunks(files_of(tmp_path))
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
                list(split_into_chunks(files_of(path)))
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
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"text": "x" * i}) + "\n" for i in range(50)))
    (tmp_path / "n.txt").write_text("last")
    (tmp_path / "n0.json").write_text(json.dumps([{"text": "y" * i} for i in range(30)]))
    write_parquet(tmp_path / "o.parquet", [f"row {i}" for i in range(21)], rows=4)
    (tmp_path / "p.txt").write_text("after")
    whole = documents_of([tmp_path])
    assert len(whole) == 111
    assert [document.number for document in whole] == list(range(111))
    for chunk_bytes in (1, 20, 100, 700):
        assert documents_of([tmp_path], chunk_bytes) == whole
    chunks = list(split_into_chunks(files_of(tmp_path), chunk_bytes=100))
    assert len(chunks) > 10
    assert sum(chunk.bytes for chunk in chunks) == sum(file.bytes for file in files_of(tmp_path))


def test_row_groups_are_never_divided_and_small_ones_share_a_chunk(tmp_path):
    write_parquet(tmp_path / "a.parquet", [f"row {i}" for i in range(10, 34)], rows=4)
    group = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).total_byte_size
    for chunk_bytes, expected in ((1, [1] * 6), (2 * group, [2] * 3), (1 << 20, [6])):
        chunks = list(split_into_chunks(files_of(tmp_path), chunk_bytes=chunk_bytes))
        assert [len(chunk.row_groups) for chunk in chunks] == expected
        assert [number for chunk in chunks for number in chunk.row_groups] == list(range(6))


@pytest.mark.parametrize("keep", [15, 40, -4])
def test_corrupt_gz_is_named(tmp_path, keep):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "some text"}\n' * 50)[:keep])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read.*: .*replace the file"):
        documents_of([tmp_path])


@pytest.mark.parametrize("change", [lambda d: d[:15], lambda d: d[:-4], lambda d: d + b"more", lambda d: d[1:]])
def test_corrupt_zst_is_named(tmp_path, change):
    """Also where the file is truncated, which some readers take for its end."""
    lines = b'{"text": "some text"}\n' * 50
    (tmp_path / "a.jsonl.zst").write_bytes(change(zstd.compress(lines)))
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: cannot be read.*: .*replace the file"):
        documents_of([tmp_path])


def test_zst_and_parquet_without_their_packages(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    monkeypatch.setattr(json_files, "zstd", None)
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


def test_a_text_file_that_vanishes_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (chunk,) = split_into_chunks(files_of(tmp_path))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: No such file"):
        list(read_documents(chunk))


def test_parquet_files_without_the_column_are_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x"])
    message = r"must have one column 'body', but its columns are \['id', 'text'\]; .*--text-field"
    with pytest.raises(DataError, match=message):
        documents_of([tmp_path], text_field="body")


# -- bad rows ----------------------------------------------------------------------------------------------------------

BAD_LINES = [
    (b'{"text": "\xff"}', "not UTF-8", r"byte 10 is 0xff, which is not UTF-8; convert it to UTF-8"),
    (b"{'text': 1}", "not JSON", r"is not JSON: .*; correct it"),
    (b'{"text": "cut', "not JSON", r"is not JSON: Invalid control character"),
    (b"[" * 100_000, "not JSON", r"is not JSON: .*recursion"),
    (b'{"text": "x"} {"text": "y"}', "not JSON", r"is not JSON: Extra data"),
    (b'\xef\xbb\xbf{"text": "x"}', "not JSON", r"is not JSON"),  # only a file's beginning may have a byte order mark
    (b'"text"', "not an object", r"is a string, but must be an object with the text in 'text'"),
    (b"[]", "not an object", r"is an array, but"),
    (b"12", "not an object", r"is a number, but"),
    (b"null", "not an object", r"is null, but"),
    (b'{"body": "x", "id": 1}', "no text field", r"has no field 'text' \(its fields: 'body', 'id'\); .*--text-field"),
    (b"{}", "no text field", r"has no field 'text' \(its fields: none\)"),
    (b'{"%s": 1}' % (b"x" * 300), "no text field", r"has no field 'text' \(its fields: 'x{199}\.\.\.\)"),
    (b'{"text": null}', "null text", r"'text' is null; correct it, or leave out such rows with"),
    (b'{"text": ["x"]}', "text is not a string", r"'text' is an array, but must be a string"),
    (b'{"text": {}}', "text is not a string", r"'text' is an object"),
    (b'{"text": true}', "text is not a string", r"'text' is a boolean"),
    (b'{"text": "x\\ud800"}', "lone surrogate", r"character 1 of 'text' is half of a surrogate pair"),
]


@pytest.mark.parametrize(("line", "reason", "message"), BAD_LINES)
def test_a_bad_line_is_named_or_left_out(tmp_path, line, reason, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n\n' + line + b'\n{"text": "y"}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3: {message}.*--on-bad-row skip"):
        documents_of([tmp_path])
    found = documents_of([tmp_path], skip_bad_rows=True)
    assert [(document.name, document.text, document.bad_row) for document in found] == [
        ("a.jsonl:1", "x", ""),
        ("a.jsonl:3", None, reason),
        ("a.jsonl:4", "y", ""),
    ]


@pytest.mark.parametrize(
    ("element", "reason"),
    [(b'{"text": "\xff"}', "not UTF-8"), (b'{"text": null}', "null text"), (b'["x"]', "not an object")],
)
def test_a_bad_element_is_named_or_left_out(tmp_path, element, reason):
    (tmp_path / "a.json").write_bytes(b'[{"text": "x"},' + element + b',{"text": "y"}]')
    with pytest.raises(DataError, match=r"a\.json, element 2: .*--on-bad-row skip"):
        documents_of([tmp_path])
    found = documents_of([tmp_path], skip_bad_rows=True)
    assert [(document.text, document.bad_row) for document in found] == [("x", ""), (None, reason), ("y", "")]


def test_a_bad_text_file_is_named_or_left_out(tmp_path):
    (tmp_path / "good.txt").write_text("gut")
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: byte 3 is 0xf6, which is not UTF-8; .*--on-bad-row skip"):
        documents_of([tmp_path])
    assert named(documents_of([tmp_path], skip_bad_rows=True)) == {"good.txt": "gut", "latin.txt": None}


def test_a_bad_row_of_parquet_is_named_or_left_out(tmp_path):
    buffers = pyarrow.array([b"ok", b"no\xff", None, b"fine"]).buffers()
    write_parquet(tmp_path / "a.parquet", pyarrow.Array.from_buffers(pyarrow.string(), 4, buffers))
    with pytest.raises(DataError, match=r"a\.parquet, row 2: byte 2 is 0xff, which is not UTF-8; .*--on-bad-row skip"):
        documents_of([tmp_path])
    found = documents_of([tmp_path], skip_bad_rows=True)
    assert [document.text for document in found] == ["ok", None, None, "fine"]
    assert [document.bad_row for document in found] == ["", "not UTF-8", "null text", ""]
    write_parquet(tmp_path / "a.parquet", ["x", "y", None])
    with pytest.raises(DataError, match=r"a\.parquet, row 3: 'text' is null; correct it, or .*--on-bad-row skip"):
        documents_of([tmp_path])
    write_parquet(tmp_path / "a.parquet", [None, None])  # a column without a string is of type null
    assert [document.bad_row for document in documents_of([tmp_path], skip_bad_rows=True)] == ["null text"] * 2


def test_other_fields_may_hold_anything(tmp_path):
    digits = "9" * 5000
    line = '{"id": %s, "f": -%s, "score": NaN, "max": Infinity, "odd": "\\ud800", "text": "ok", "x": [{"y": null}]}'
    (tmp_path / "a.jsonl").write_text(line % (digits, digits))
    (tmp_path / "b.json").write_text(f"[{line % (digits, digits)}]")
    assert [document.text for document in documents_of([tmp_path])] == ["ok", "ok"]


def test_a_byte_order_mark_at_the_beginning_of_a_file_is_removed(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\ufeffkept"}\n{"text": "two"}\n', encoding="utf-8-sig")
    (tmp_path / "b.json").write_text('[{"text": "three"}]', encoding="utf-8-sig")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress('{"text": "four"}'.encode("utf-8-sig")))
    (tmp_path / "d.txt").write_text("f\ufeffive", encoding="utf-8-sig")
    texts = [document.text for document in documents_of([tmp_path])]
    assert texts == ["\ufeffkept", "two", "three", "four", "f\ufeffive"]
    assert [d.text for d in documents_of([tmp_path / "a.jsonl"], chunk_bytes=1)] == ["\ufeffkept", "two"]
