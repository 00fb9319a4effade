"""Finding files: which are read and as what, names that are unique wherever they lie, and data that is given twice."""

import gzip
import json
import os
import shutil

import pyarrow
import pytest
from pyarrow import parquet

from dcscale.data import DataError
from dcscale.data.prepare.sources import find_files


def write(folder, *names, content="text of {}"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content.format(name) + "\n")
    return folder


def names_of(*inputs, **options):
    return [file.name for file in find_files(inputs, **options)[0]]


def jsonl(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


# -- which files -------------------------------------------------------------------------------------------------------


def test_folders_are_read_at_any_depth_sorted_by_path(tmp_path):
    write(tmp_path, "b.txt", "a/z.txt", "a/b/c.txt", "a.txt", "a-.txt", "tests/t.txt", "x.tmp.txt")
    expected = ["a/b/c.txt", "a/z.txt", "a-.txt", "a.txt", "b.txt", "tests/t.txt", "x.tmp.txt"]
    assert names_of(tmp_path) == expected
    assert names_of(tmp_path, exclude=["tests", "*.tmp.txt", "b"]) == ["a/z.txt", "a-.txt", "a.txt", "b.txt"]


def test_inputs_keep_their_order(tmp_path):
    write(tmp_path, "b.py", "a/t.txt")
    assert names_of(tmp_path / "b.py", tmp_path / "a") == ["b.py", "a/t.txt"]


def test_formats_follow_from_suffixes_in_any_case(tmp_path):
    lines, text = ("a.jsonl", "B.JSONL", "c.ndjson", "d.JSON"), ("E.TXT",)
    write(tmp_path, *lines, content='{{"text": "{}"}}')
    write(tmp_path, *text, "f.md", "g.py", "h.Rs")
    parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "P.PARQUET")
    (tmp_path / "z.json.GZ").write_bytes(gzip.compress(b'\n [{"text": "x"}]'))
    (tmp_path / "y.json").write_text("\ufeff\n[]")
    files, not_read = find_files([tmp_path])
    found = {file.name: (file.format, file.is_array) for file in files}
    assert found == {
        **dict.fromkeys(lines, ("json", False)),
        **dict.fromkeys(text, ("text", False)),
        **dict.fromkeys(("z.json.GZ", "y.json"), ("json", True)),
        "P.PARQUET": ("parquet", False),
    }
    assert not_read.kinds == {".md": 1, ".py": 1, ".rs": 1}
    files, not_read = find_files([tmp_path], suffixes=[".md", ".PY", ".rs"])
    assert {file.name: file.format for file in files} == dict.fromkeys(("f.md", "g.py", "h.Rs"), "text")
    assert not_read.kinds == {".jsonl": 2, ".json": 2, ".ndjson": 1, ".txt": 1, ".parquet": 1, ".json.gz": 1}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.html", "a.xml", "a.log", "a.pdf", "README"])
def test_what_may_not_be_text_is_refused_unless_the_format_is_given(tmp_path, name):
    write(tmp_path, name)
    message = rf"{name}: its suffix is not that of JSON lines, .*--exclude, .*--format text"
    with pytest.raises(DataError, match=message):
        find_files([tmp_path / name])
    assert [file.format for file in find_files([tmp_path / name], format="text")[0]] == ["text"]
    suffix = os.path.splitext(name)[1]
    if suffix:
        with pytest.raises(DataError, match=message):
            find_files([tmp_path], suffixes=[suffix])
        assert names_of(tmp_path, suffixes=[suffix], format="text") == [name]


def test_the_format_that_is_given_holds_for_all_files(tmp_path):
    write(tmp_path, "a.jsonl", "b.txt", "part-0", content='{{"text": "{}"}}')
    (tmp_path / "part-1.gz").write_bytes(gzip.compress(b'{"text": "x"}'))
    assert names_of(tmp_path, format="text") == ["b.txt"]
    assert names_of(tmp_path, format="json") == ["a.jsonl"]
    files, _ = find_files([tmp_path / "part-0", tmp_path / "part-1.gz", tmp_path / "b.txt"], format="json")
    assert [file.format for file in files] == ["json"] * 3


@pytest.mark.parametrize("name", ["a.txt.gz", "a.arrow", "a.html.zst", "a.zip", "A.ZIP", "a.jsonl.bz2", "a.json.xz"])
def test_archives_and_packed_text_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    for format in (None, "text"):
        with pytest.raises(DataError, match=rf"{name}: is compressed or an archive, .*; unpack it"):
            find_files([tmp_path / name], format=format)


def test_what_is_not_read_is_named_and_counted(tmp_path):
    write(tmp_path, "a.txt", *(f"papers/{i}.PDF" for i in range(9)), "D.txt.gz", "e.jsonl.bz2", "LICENSE", "out/x.pdf")
    write(tmp_path, *(f"{i}.{'x' * i}" for i in range(1, 10)), "skipped.png")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to("nothing")
    (tmp_path / "more").symlink_to(write(tmp_path.parent / "elsewhere", "b.txt"))
    files, not_read = find_files([tmp_path], exclude=["skipped.png"], ignore=[tmp_path / "out"])
    assert [file.name for file in files] == ["a.txt"]
    expected = {"link to a folder": 1, "not a file": 2, ".pdf": 9, ".jsonl.bz2": 1, ".txt.gz": 1, "no suffix": 1}
    assert {kind: not_read.kinds[kind] for kind in expected} == expected
    assert str(not_read).startswith(f"24 files, such as {tmp_path / 'more'}, {tmp_path / '1.x'}, {tmp_path / '2.xx'} (")
    assert "(.pdf 9, not a file 2, " in str(not_read)
    assert str(not_read).endswith(", others 5)")


def test_a_json_file_that_is_one_object_over_several_lines_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "x", "n": 1}, indent=2))
    with pytest.raises(DataError, match=r"a\.json: must hold an object on each line .*--exclude, .*--format text"):
        find_files([tmp_path])
    assert names_of(tmp_path, format="text", suffixes=[".json"]) == ["a.json"]
    (tmp_path / "a.json").write_text(json.dumps({"text": "x" * 100_000}))
    assert names_of(tmp_path) == ["a.json"], "a line that is longer than what is looked at"
    (tmp_path / "a.json").rename(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("{\n")
    assert names_of(tmp_path) == ["a.jsonl"], "a bad row, which may be skipped"


@pytest.mark.parametrize(
    ("name", "content", "is_array"),
    [
        ("a.jsonl", '[1, 2]\n{"text": "x"}\n', False),  # a bad row, which may be skipped
        ("a.ndjson", "[oops\n", False),
        ("a.jsonl", ' [\n {"text": "x"}\n]\n', True),
        ("a.json", '[null, {"text": "x"}]', True),
    ],
)
def test_json_lines_by_suffix_are_an_array_only_of_objects(tmp_path, name, content, is_array):
    (tmp_path / name).write_text(content)
    (file,) = find_files([tmp_path])[0]
    assert file.is_array == is_array


def test_bad_inputs_are_refused(tmp_path, monkeypatch):
    write(tmp_path, "a.md")
    with pytest.raises(
        DataError, match=r"no file in it ends in \.jsonl, .*\.txt; .*--suffix\. Not read: 1 file, such as"
    ):
        find_files([tmp_path])
    with pytest.raises(DataError, match=r"missing: is neither a file nor a folder"):
        find_files([tmp_path / "missing"])
    for suffix in ("md", "*.md"):
        with pytest.raises(DataError, match=r"--suffix .*md: must begin with a dot, such as \.md"):
            find_files([tmp_path], suffixes=[suffix])

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot be listed: Permission denied"):
        find_files([tmp_path])


# -- names -------------------------------------------------------------------------------------------------------------


def test_names_are_unique_over_all_inputs_and_as_short_as_that_allows(tmp_path):
    write(tmp_path, "book1/text.txt", "book2/text.txt", "2024/en/a.txt", "2025/en/a.txt", "other.txt")
    one, two = tmp_path / "book1", tmp_path / "book2"
    assert names_of(one) == ["text.txt"]
    assert names_of(one / "text.txt") == ["text.txt"]
    assert names_of(one, two) == ["book1/text.txt", "book2/text.txt"]
    assert names_of(one / "text.txt", two / "text.txt") == ["book1/text.txt", "book2/text.txt"]
    assert names_of(one / "text.txt", tmp_path / "other.txt") == ["text.txt", "other.txt"]
    years = [tmp_path / "2024/en", tmp_path / "2025/en"]
    assert names_of(*years, two) == ["2024/en/a.txt", "2025/en/a.txt", f"{tmp_path.name}/book2/text.txt"]
    assert names_of(two / ".." / "book1", two) == ["book1/text.txt", "book2/text.txt"]


def test_names_do_not_depend_on_where_the_inputs_lie(tmp_path, monkeypatch):
    write(tmp_path / "here", "a/x.txt", "b/x.txt", "b/y.txt")
    shutil.copytree(tmp_path / "here", tmp_path / "deep/er/there")
    both = [[folder / "a", folder / "b"] for folder in (tmp_path / "here", tmp_path / "deep/er/there")]
    assert names_of(*both[0]) == names_of(*both[1]) == ["a/x.txt", "b/x.txt", "b/y.txt"]
    assert names_of(tmp_path / "here") == names_of(tmp_path / "deep/er/there")
    assert set(names_of(*both[0])) == set(names_of(*reversed(both[0])))
    monkeypatch.chdir(tmp_path / "here/b")
    assert names_of("../a", ".") == names_of(*both[0])


# -- the same data twice -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [
        ("c", "./c"),
        ("c", "c/../c"),
        ("c", "c"),
        ("c", "link"),
        ("c", "c/a.jsonl"),
        ("c", "hard"),
        ("c/a.jsonl", "l.jsonl"),
    ],
)
def test_the_same_file_given_twice_is_refused(tmp_path, monkeypatch, inputs):
    write(tmp_path, "c/a.jsonl", content='{{"text": "{}"}}')
    (tmp_path / "link").symlink_to("c")
    (tmp_path / "l.jsonl").symlink_to("c/a.jsonl")
    (tmp_path / "hard").mkdir()
    os.link(tmp_path / "c/a.jsonl", tmp_path / "hard/b.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"is given twice,.* trained on twice; "):
        find_files(inputs)


def test_a_file_with_several_names_in_a_folder_is_read_once(tmp_path):
    write(tmp_path, "b.txt", "z.txt")
    (tmp_path / "a.txt").symlink_to("b.txt")
    os.link(tmp_path / "z.txt", tmp_path / "zz.txt")
    (tmp_path / "loop").symlink_to(".")
    files, not_read = find_files([tmp_path])
    assert [file.name for file in files] == ["b.txt", "z.txt"]
    assert not_read.kinds == {"another name of a file": 2, "link to a folder": 1}


def test_file_systems_without_numbers_of_files_compare_paths(tmp_path, monkeypatch):
    write(tmp_path, "a.txt", "b.txt")
    (tmp_path / "c.txt").symlink_to("a.txt")
    stat = os.stat

    def without_number(path, **options):
        status = stat(path, **options)
        return os.stat_result([*status[:1], 0, *status[2:]], {"st_mtime_ns": status.st_mtime_ns})

    monkeypatch.setattr(os, "stat", without_number)
    assert names_of(tmp_path) == ["a.txt", "b.txt"]


def test_a_copy_of_a_folder_is_refused(tmp_path):
    write(tmp_path, "c/a.txt", "c/sub/b.txt", "d/a.txt")
    shutil.copytree(tmp_path / "c", tmp_path / "copy")
    with pytest.raises(DataError, match=r"copy: is a copy of .*/c, so its text would be trained on twice"):
        find_files([tmp_path / "c", tmp_path / "d", tmp_path / "copy"])
    (tmp_path / "copy/a.txt").write_text("text of c/A.txt\n")
    assert len(names_of(tmp_path / "c", tmp_path / "copy")) == 4


def test_copies_of_files_with_many_documents_are_refused(tmp_path):
    big = jsonl(*(f"line {i}" for i in range(9000)))
    for name, other in (("a.jsonl", jsonl("x", "y")), ("b.jsonl", big)):
        (tmp_path / name).write_text(other)
        (tmp_path / f"copy-{name}").write_text(other)
        with pytest.raises(
            DataError, match=rf"copy-{name}: is a copy of .*/{name}, so .*trained on twice; .*--exclude"
        ):
            find_files([tmp_path / name, tmp_path / f"copy-{name}"])
    # Only the middle differs, which is looked at last.
    (tmp_path / "copy-b.jsonl").write_text(big.replace("line 4500", "LINE 4500"))
    assert len(names_of(tmp_path / "b.jsonl", tmp_path / "copy-b.jsonl")) == 2
    table = pyarrow.table({"text": ["x", "y"]})
    for name in ("a.parquet", "b.parquet"):
        parquet.write_table(table, tmp_path / name)
    with pytest.raises(DataError, match=r"b\.parquet: is a copy of .*a\.parquet"):
        find_files([tmp_path / "a.parquet", tmp_path / "b.parquet"])


def test_equal_texts_are_normal(tmp_path):
    write(tmp_path, "a/LICENSE.txt", "b/LICENSE.txt", content="the same")
    write(tmp_path, "a/1.json", "b/1.json", content='{{"text": "the same"}}')
    write(tmp_path, "a/__init__.txt", "b/__init__.txt", content="")
    (tmp_path / "a/empty.jsonl").write_text("")
    (tmp_path / "b/empty.jsonl").write_text("")
    assert len(names_of(tmp_path)) == 8


def test_a_file_next_to_its_packed_copy_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(jsonl("x", "y"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl("x", "y").encode()))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: is by its name .*a\.jsonl in another packing, .*--exclude"):
        find_files([tmp_path])
    assert names_of(tmp_path, exclude=["*.gz"]) == ["a.jsonl"]
    # Names that differ in case are two files.
    (tmp_path / "A.jsonl").write_text(jsonl("x", "z"))
    assert names_of(tmp_path, exclude=["*.gz"]) == ["A.jsonl", "a.jsonl"]
