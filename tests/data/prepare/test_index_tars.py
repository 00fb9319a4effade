"""Third-party tars get a manifest, and what cannot be indexed is refused."""

import dataclasses
import io
import json
import re
import tarfile

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from dcscale.data import DataError, StreamConfig, open_stream, read_manifest
from dcscale.data.prepare.index import index_tars
from dcscale.data.prepare.inspect import inspect_shards, sample_documents
from dcscale.data.shards.manifest import write_manifest
from dcscale.testing.runs import change_entry, documents_of


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def npy(values, dtype):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array(values, dtype))
    return buffer.getvalue()


def make_word_tokenizer(path):
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "[UNK]": 1, "one": 2, "two": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_third_party_tars_of_text_are_counted_and_read(tmp_path, format):
    long = "k" * (90 if format == tarfile.USTAR_FORMAT else 200)
    write_tar(
        tmp_path / "tars/b.tar",
        [("./0.txt", b"one two"), ("./0.jpg", b"\xff\xd8"), ("./1.txt", b""), ("./2.jpg", b"alone"), ("README", b"x")],
        format,
    )
    write_tar(tmp_path / "tars/a/a.tar", [(f"{long}.txt", "two ä one".encode()), (f"{long}.json", b"[]")], format)
    tokenizer = make_word_tokenizer(tmp_path / "words.json")
    found = index_tars(tmp_path / "tars", sorted((tmp_path / "tars").rglob("*.tar")), tokenizer=str(tokenizer))
    assert found.defects == []
    manifest = read_manifest(tmp_path / "tars")
    assert manifest == found.manifest
    assert (manifest.text.member, manifest.text.field, manifest.max_token_id) == ("txt", "", 3)
    entries = [(i.name, i.samples, i.documents, i.tokens, i.text_bytes) for i in manifest.shards]
    assert entries == [("a/a.tar", 1, 1, 4, 10), ("b.tar", 1, 1, 3, 7)]
    assert documents_of(tmp_path / "tars") == [[3, 1, 2, 0], [2, 3, 0]]
    assert (tmp_path / "tars/tokenizer.json").read_bytes() == tokenizer.read_bytes()
    again = inspect_shards(tmp_path / "tars", workers=2)
    assert again.defects == []
    assert "  content     text, KEY.txt, tokenized whenever it is read" in again.summary()
    assert [(d.tokens, d.text) for d in sample_documents(tmp_path / "tars")] == [(4, "two [UNK] one"), (3, "one two")]
    change_entry(tmp_path / "tars", 1, text_bytes=8)
    (defect,) = inspect_shards(tmp_path / "tars").defects
    assert defect.endswith("b.tar: its text_bytes is 7, but the manifest says 8")


def test_a_stream_of_text_equals_the_stream_of_its_tokens(tmp_path):
    texts = [[f"one two {'one ' * (i * 7 % 12)}two" for i in range(n, n + 9)] for n in (0, 20, 40)]
    tokenizer = make_word_tokenizer(tmp_path / "words.json")
    encoded = []
    for number, group in enumerate(texts):
        members = [(f"{i:03d}.txt", text.encode()) for i, text in enumerate(group)]
        write_tar(tmp_path / f"text/{number}.tar", members)
        encoded.append([[{"one": 2, "two": 3}[word] for word in text.split()] + [0] for text in group])
        arrays = [(f"{i:03d}.npy", npy(tokens, "uint16")) for i, tokens in enumerate(encoded[-1])]
        write_tar(tmp_path / f"tokens/{number}.tar", arrays)
    sequences = []
    for kind in ("text", "tokens"):
        tars = sorted((tmp_path / kind).glob("*.tar"))
        assert index_tars(tmp_path / kind, tars, tokenizer=str(tokenizer), workers=2).defects == []
        stream = open_stream(
            tmp_path / kind,
            StreamConfig(
                vocab_size=4, sequence_length=16, seed=0, shuffle_shards=2, slots=2, document_mask=True, verify=True
            ),
        )
        assert stream.manifest.totals["tokens"] == sum(len(tokens) for group in encoded for tokens in group)
        sequences.append([stream.sequence(g).tokens_NL1.tolist() for g in range(2 * stream.sequences_per_epoch)])
    assert sequences[0] == sequences[1]
    assert len(sequences[0]) > 20


def test_text_whose_tokens_differ_from_the_manifest_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.txt", b"one two")])
    index_tars(tmp_path, [tmp_path / "a.tar"], tokenizer=str(make_word_tokenizer(tmp_path / "tokenizer.json")))
    change_entry(tmp_path, 0, tokens=4)
    with pytest.raises(DataError, match=r"a\.tar: it holds 3 tokens, but the manifest says 4"):
        documents_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text().replace("two", "three"))
    with pytest.raises(DataError, match=r"tokenizer\.fingerprint is .* but the tokenizer there now has"):
        documents_of(tmp_path)
    with pytest.raises(DataError, match=r"tokenizer\.fingerprint is "):
        inspect_shards(tmp_path)


def test_a_field_of_json_members_and_the_choice_between_kinds(tmp_path):
    write_tar(
        tmp_path / "t/a.tar", [("0.txt", b"short"), ("0.json", json.dumps({"body": "long ä", "text": "x"}).encode())]
    )
    for options, expected in (
        ({}, "short"),
        ({"text_member": "json", "text_field": "body"}, "long ä"),
        ({"text_member": "json"}, "x"),
    ):
        index_tars(tmp_path / "t", [tmp_path / "t/a.tar"], tokenizer="byte", **options)
        assert documents_of(tmp_path / "t") == [[*expected.encode(), 256]]
        (tmp_path / "t/manifest.json").unlink()
    write_tar(tmp_path / "t/a.tar", [("0.txt", b"text"), ("0.npy", npy([1, 256], "uint16"))])
    for options, expected in (({}, [1, 256]), ({"text_member": "txt"}, [*b"text", 256])):
        index_tars(tmp_path / "t", [tmp_path / "t/a.tar"], tokenizer="byte", **options)
        assert documents_of(tmp_path / "t") == [expected]
        (tmp_path / "t/manifest.json").unlink()
    write_tar(tmp_path / "t/a.tar", [("0.json", json.dumps({"text": "only"}).encode())])
    index_tars(tmp_path / "t", [tmp_path / "t/a.tar"], tokenizer="byte")
    assert documents_of(tmp_path / "t") == [[*b"only", 256]]


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ([("0.txt", b"\xff")], {}, r"member 0\.txt: byte 0 is 0xff, which is not UTF-8; .*--on-bad-row skip"),
        ([("0.json", b"{")], {}, r"member 0\.json: is not JSON"),
        (
            [("0.json", b'{"text": "\\ud800"}')],
            {},
            r"member 0\.json: character 0 of 'text' is half of a surrogate pair",
        ),
        ([("0.json", b"[" * 100_000)], {}, r"member 0\.json: is not JSON"),
        ([("0.json", b'{"text": 1}')], {}, r"member 0\.json: 'text' is a number, but must be a string"),
        ([("0.json", b'{"x": 1}')], {"text_field": "a"}, r"has no field 'a' \(its fields: 'x'\); .*--text-field"),
        ([("0.txt", b"a"), ("1.txt", b"b"), ("0.jpg", b"")], {}, r"sample 0 appears twice, or its members are not adj"),
        ([("0.txt", b"")], {}, r"it holds no document; leave it out"),
        ([("0.npy", npy([1, 500], "uint16"))], {}, r"1 samples have token ids that are not below .*, 257: such as 500"),
        (
            [("0.npy", npy([1], "uint16")), ("1.npy", npy([1], "uint32"))],
            {},
            r"member 1\.npy is uint32 .* must be uint16",
        ),
    ],
)
def test_defects_of_tars_prevent_a_manifest(tmp_path, members, options, message):
    write_tar(tmp_path / "bad.tar", members)
    write_tar(tmp_path / "bad2.tar", members)
    tars, before = [tmp_path / "bad.tar", tmp_path / "bad2.tar"], sorted(tmp_path.iterdir())
    tokenizer = "byte"
    try:
        found = index_tars(tmp_path, tars, tokenizer=tokenizer, **options).defects
    except DataError as error:  # raised for the first tar
        found = [str(error)] * 2
    assert len(found) == 2, "one per tar"
    assert all(re.search(message, defect) for defect in found), found
    assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"


def test_bad_samples_are_left_out_and_counted_if_asked_for(tmp_path, inspect_tool):
    good = b'{"text": "good", "id": %s}' % (b"9" * 5000)
    members = [("0.json", b"\xef\xbb\xbf" + good), ("1.json", b'{"text": null}'), ("2.json", b"\xff"), ("3.json", good)]
    write_tar(tmp_path / "t/a.tar", members)
    write_tar(tmp_path / "t/b.tar", [("4.json", b'{"text": null}'), ("5.json", good)])
    options = ("--write-manifest", "--tokenizer", "byte", "--workers", 1)
    assert inspect_tool(tmp_path / "t", *options).returncode == 1
    done = inspect_tool(tmp_path / "t", *options, "--on-bad-row", "skip")
    assert done.returncode == 0, done.stderr
    assert "  left out    3 rows of the input: not UTF-8 1, null text 2\n" in done.stdout
    assert read_manifest(tmp_path / "t").skipped_rows == {"not UTF-8": 1, "null text": 2}
    assert documents_of(tmp_path / "t") == [[*b"good", 256]] * 3
    assert inspect_shards(tmp_path / "t").defects == []
    manifest = read_manifest(tmp_path / "t")
    write_manifest(tmp_path / "t", dataclasses.replace(manifest, skipped_rows={"null text": 3}))
    (defect,) = inspect_shards(tmp_path / "t").defects
    assert defect.endswith("skipped_rows is {'null text': 3}, but the shards have {'null text': 2, 'not UTF-8': 1}")
    write_manifest(tmp_path / "t", dataclasses.replace(manifest, skipped_rows=None))
    with pytest.raises(
        DataError, match=r"a\.tar: member 1\.json: 'text' is null; correct it, or write a manifest .*skip"
    ):
        documents_of(tmp_path / "t")


def test_too_many_bad_samples_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}.txt", b"\xff" if i < 101 else b"x") for i in range(200)])
    with pytest.raises(
        DataError, match=r"^101 of 200 rows cannot be used: not UTF-8 101, such as .*/a\.tar\. These are"
    ):
        index_tars(tmp_path, [tmp_path / "a.tar"], tokenizer="byte", on_bad_row="skip")
    with pytest.raises(DataError, match=r"max_bad_rows is 60, but must be a fraction from 0 to 1 of the rows"):
        index_tars(tmp_path, [tmp_path / "a.tar"], tokenizer="byte", on_bad_row="skip", max_bad_rows=60)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    found = index_tars(tmp_path, [tmp_path / "a.tar"], tokenizer="byte", on_bad_row="skip", max_bad_rows=0.6)
    assert found.manifest.skipped_rows == {"not UTF-8": 101}


def test_a_byte_order_mark_at_the_beginning_of_a_text_member_is_removed(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.txt", "a\ufeff".encode("utf-8-sig"))])
    index_tars(tmp_path, [tmp_path / "a.tar"], tokenizer="byte")
    assert documents_of(tmp_path) == [[*"a\ufeff".encode(), 256]]


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ([("0.jpg", b"x")], {}, r"its samples have jpg, but must have tokens\.npy, npy, txt or json"),
        ([], {}, r"its samples have no members, but must have"),
        ([("0.npy", npy([1], "int64"))], {}, r"its tokens are int64, but must be uint16 or uint32; write them again"),
        ([("0.npy", b"x")], {}, r"member 0\.npy is not an npy array"),
        ([("0.txt", b"x")], {"tokenizer": "missing.json"}, r"missing\.json: cannot be read"),
    ],
)
def test_a_first_tar_without_tokens_or_text_is_refused(tmp_path, members, options, message):
    write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(DataError, match=message):
        index_tars(tmp_path, [tmp_path / "bad.tar"], **{"tokenizer": "byte", **options})
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tar"]


def test_no_tokenizer_is_left_behind_where_no_manifest_is_written(tmp_path):
    tokenizer = make_word_tokenizer(tmp_path / "words.json")
    write_tar(tmp_path / "t/a.tar", [("0.txt", b"one"), ("1.txt", b"\xff")])
    found = index_tars(tmp_path / "t", [tmp_path / "t/a.tar"], tokenizer=str(tokenizer))
    assert len(found.defects) == 1
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["a.tar"]


def test_tars_that_cannot_be_indexed_are_refused(tmp_path):
    write_tar(tmp_path / "t/a b.tar", [("0.txt", b"one")])
    tars = [tmp_path / "t/a b.tar"]
    with pytest.raises(
        DataError, match=r"1 tars such as 'a b\.tar' have a name that is not a relative path .*; rename them"
    ):
        index_tars(tmp_path / "t", tars, tokenizer="byte")
    with pytest.raises(DataError, match=r"contains no file that ends in \.tar"):
        index_tars(tmp_path / "t", [], tokenizer="byte")
    write_tar(tmp_path / "t/a.tar", [("0.txt", b"one")])
    with pytest.raises(DataError, match=r"t/a\.tar: is given twice, so its text would be trained on twice"):
        index_tars(tmp_path / "t", [tmp_path / "t/a.tar"] * 2, tokenizer="byte")
    (tmp_path / "t/link.tar").symlink_to("a.tar")
    found = index_tars(tmp_path / "t", [tmp_path / "t/a.tar", tmp_path / "t/link.tar"], tokenizer="byte")
    assert re.fullmatch(r"1 shard of 4 tokens, such as .*a\.tar and .*link\.tar: are the same, .*", found.defects[0])
    assert not (tmp_path / "t/manifest.json").exists()
    make_word_tokenizer(tmp_path / "t/tokenizer.json")
    with pytest.raises(
        DataError, match=r"tokenizer\.json: is not the tokenizer byte; give this one, or remove the file"
    ):
        index_tars(tmp_path / "t", [tmp_path / "t/a.tar"], tokenizer="byte")
    index_tars(tmp_path / "t", [tmp_path / "t/a.tar"], tokenizer=str(tmp_path / "t/tokenizer.json"))
    with pytest.raises(DataError, match=r"manifest\.json: already exists; to write another one, remove it first"):
        index_tars(tmp_path / "t", [tmp_path / "t/a.tar"], tokenizer="byte")


@pytest.mark.parametrize("kinds", [("tokens.npy", "lens.npy"), ("tokens.npy",), ("npy",)])
def test_third_party_tars_of_tokens_are_counted_and_read(tmp_path, kinds):
    members = [
        (f"0.{kinds[0]}", npy([1, 2, 256, 3, 256], "uint16")),
        ("0.cls", b"7"),
        (f"1.{kinds[0]}", npy([4], "uint16")),
    ]
    if len(kinds) == 2:
        members[1:1] = [("0.lens.npy", npy([3, 2], "uint32"))]
    write_tar(tmp_path / "a.tar", members)
    found = index_tars(tmp_path, [tmp_path / "a.tar"], tokenizer="byte")
    assert found.defects == []
    expected = [[1, 2, 256], [3, 256], [4]] if len(kinds) == 2 else [[1, 2, 256, 3, 256], [4]]
    assert documents_of(tmp_path) == expected
    assert f"  documents   {len(expected)}; 1 do not end with token 256" in found.summary()
    info = read_manifest(tmp_path).shards[0]
    assert (info.samples, info.documents, info.tokens, info.text_bytes) == (2, len(expected), 6, 0)
    assert inspect_shards(tmp_path).defects == []


def test_the_tool_writes_a_manifest_that_it_verifies(tmp_path, inspect_tool):
    for name in ("a", "b"):
        write_tar(tmp_path / f"t/{name}.tar", [(f"{i}.txt", f"text {name} {i}".encode()) for i in range(5)])
    done = inspect_tool(tmp_path / "t", "--write-manifest", "--tokenizer", "byte", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert f"Wrote the manifest. To train on it: data.train={tmp_path / 't'} model.vocab_size=257" in done.stdout
    assert "for a large run, unpack it and use tools/make_shards.py." in done.stdout
    done = inspect_tool(tmp_path / "t")
    assert (done.returncode, "no defects" in done.stdout) == (0, True)
    (tmp_path / "t/manifest.json").unlink()
    write_tar(tmp_path / "t/c.tar", [("0.txt", b"\xff")])
    done = inspect_tool(tmp_path / "t", "--write-manifest", "--tokenizer", "byte", "--workers", 1)
    assert done.returncode == 1
    assert "inspect_shards: " in done.stderr
    assert "no manifest was written; repair or remove the tars named above" in done.stdout
    done = inspect_tool(tmp_path / "t/a.tar", tmp_path / "t/b.tar", "--write-manifest", "--tokenizer", "byte")
    assert done.returncode == 0, done.stderr
    assert [info.name for info in read_manifest(tmp_path / "t").shards] == ["a.tar", "b.tar"]
