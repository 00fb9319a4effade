"""Documents out of files: order, names, and every way in which text can be unreadable."""

import gzip
import json
import os

import pytest

from dcscale.data import DataError
from dcscale.data.corpus import find_files, read_documents, split


def documents_of(inputs, chunk_bytes=1 << 22, text_field="text", skip_undecodable=False, **options):
    return [
        document
        for chunk in split(find_files(inputs, **options), chunk_bytes)
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


def test_folders_are_read_at_any_depth_sorted_by_suffix(tmp_path):
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


def test_lines_of_jsonl_and_gz_are_documents(tmp_path):
    lines = [{"text": "one"}, {"text": "zwei ä €", "id": 2}, {"text": ""}]
    content = "\n".join(json.dumps(line) for line in lines[:2]) + "\n\n  \n" + json.dumps(lines[2])
    (tmp_path / "a.jsonl").write_text(content)
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(content.encode())
    found = documents_of([tmp_path])
    assert [(document.name, document.text, document.number) for document in found] == [
        ("a.jsonl:1", "one", 0), ("a.jsonl:2", "zwei ä €", 1), ("a.jsonl:5", "", 4),
        ("b.jsonl.gz:1", "one", 5), ("b.jsonl.gz:2", "zwei ä €", 6), ("b.jsonl.gz:5", "", 9),
    ]  # fmt: skip


def test_another_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x", "text": 1}\n')
    assert named(documents_of([tmp_path], text_field="content")) == {"a.jsonl:1": "x"}


def test_numbers_and_names_do_not_depend_on_the_chunks(tmp_path):
    make_tree(tmp_path)
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"text": "x" * i}) + "\n" for i in range(50)))
    (tmp_path / "n.txt").write_text("last")
    whole = documents_of([tmp_path])
    assert len(whole) == 59
    for chunk_bytes in (1, 20, 100, 700):
        assert documents_of([tmp_path], chunk_bytes) == whole
    chunks = list(split(find_files([tmp_path]), 100))
    assert len(chunks) > 10
    assert sum(chunk.bytes for chunk in chunks) == sum(file.bytes for file in find_files([tmp_path]))


def test_text_that_is_not_utf8_is_named_or_skipped(tmp_path):
    (tmp_path / "good.txt").write_text("gut")
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: byte 3 is 0xf6, which is not UTF-8; .*--skip-undecodable"):
        documents_of([tmp_path])
    assert named(documents_of([tmp_path], skip_undecodable=True)) == {"good.txt": "gut", "latin.txt": None}


def test_jsonl_lines_that_are_no_text_are_named_or_skipped(tmp_path):
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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", r"is not JSON"),
        ("[" * 100_000, r"is not JSON"),
        ('"text"', r"must be an object whose field 'text' is a string, but has str"),
        ('{"body": "x", "id": 1}', r".* but has \['body', 'id'\]; name the right field with --text-field"),
        ('{"text": null}', r"must be an object whose field 'text' is a string"),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_malformed_lines_are_never_skipped(tmp_path, line, message, skip):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3: {message}"):
        documents_of([tmp_path], skip_undecodable=skip)


@pytest.mark.parametrize("keep", [15, 40, -4])
def test_damaged_gz_is_named(tmp_path, keep):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "some text"}\n' * 50)[:keep])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read after line \d+: .*replace the file"):
        documents_of([tmp_path])


def test_inputs_that_give_nothing(tmp_path):
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(DataError, match=r"no file in it ends in \.txt, \.jsonl, \.jsonl\.gz; .*--suffix"):
        find_files([tmp_path])
    with pytest.raises(DataError, match=r"nowhere: is neither a file nor a folder"):
        find_files([tmp_path / "nowhere"])


def test_a_file_given_twice(tmp_path):
    make_tree(tmp_path)
    with pytest.raises(DataError, match=r"a\.txt: is given twice"):
        find_files([tmp_path, tmp_path / "a" / ".." / "a.txt"])


@pytest.mark.parametrize("name", ["a.txt.gz", "a.parquet", "a.jsonl.zst", "a.zip"])
def test_packed_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{name}: files of this kind are not read; unpack it"):
        find_files([tmp_path / name])


def test_files_that_vanish_or_cannot_be_listed(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    (chunk,) = split(find_files([tmp_path]))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: No such file"):
        list(read_documents(chunk))

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot be listed: Permission denied"):
        find_files([tmp_path])
