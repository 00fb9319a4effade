"""Inspecting shards: every defect is reported, documents are shown, and third-party tars get a manifest."""

import dataclasses
import hashlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from dcscale.data import DataError, StreamConfig, build_shards, open_stream, read_manifest
from dcscale.data.prepare.index import index_tars
from dcscale.data.prepare.inspect import inspect_shards, sample_documents
from dcscale.data.prepare.pool import worker_pool
from dcscale.data.shards.manifest import write_manifest
from dcscale.data.shards.shard import read_shard
from dcscale.data.shards.text import open_text_reader
from dcscale.data.storage import open_storage
from dcscale.testing.runs import write_token_shards

REPOSITORY = Path(__file__).parents[3]
SHARDS = [[[1, 2, 256], [3, 256]], [[4, 5, 6, 256], [256], [7, 8, 256]], [[9] * 40 + [256]]]


@pytest.fixture
def run_tool(capsys):
    """Runs the tool in this process, since starting another one takes seconds."""
    main = runpy.run_path(str(REPOSITORY / "tools/inspect_shards.py"))["main"]

    def run(*arguments):
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err)

    return run


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


def documents_of(folder):
    manifest, source = read_manifest(folder), open_storage(folder)
    vocab_size, text = manifest.tokenizer.vocab_size, open_text_reader(source, manifest)
    return [
        document.tolist()
        for info in manifest.shards
        for document in read_shard(source, info, dtype=manifest.dtype, vocab_size=vocab_size, verify=True, text=text)
    ]


def change_entry(folder, number, **changes):
    manifest = read_manifest(folder)
    shards = list(manifest.shards)
    shards[number] = dataclasses.replace(shards[number], **changes)
    write_manifest(folder, dataclasses.replace(manifest, shards=tuple(shards)))


def entry_of_file(folder, number, **changes):
    """Set the size and checksum in the manifest to those of the current file."""
    data = (folder / read_manifest(folder).shards[number].name).read_bytes()
    change_entry(folder, number, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), **changes)


# -- verifying ---------------------------------------------------------------------------------------------------------


def test_good_shards_have_no_defects_and_a_summary(tmp_path):
    write_token_shards(tmp_path, SHARDS)
    found = inspect_shards(tmp_path)
    assert found.defects == []
    assert "\n".join(found.summary()) == "\n".join(
        [
            str(tmp_path),
            f"  shards      3 of 3 read; 3 samples in {read_manifest(tmp_path).totals['bytes']:,} bytes",
            "  content     tokens",
            "  tokens      54 of uint16, of 54 bytes of text, 1.00 per token",
            "  largest id  256",
            f"  tokenizer   byte, 257 tokens, SHA-256 {read_manifest(tmp_path).tokenizer.fingerprint[:16]}...",
            "  packing     none; documents are packed when they are read",
            "  documents   6; 0 do not end with token 256",
            "  lengths     1% up to 1, 10% up to 1, 50% up to 3, 90% up to 41, 99% up to 41 tokens",
        ]
    )


def test_built_shards_have_no_defects_with_and_without_packing(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "x" * n}) for n in range(1, 60)))
    build_shards([tmp_path / "a.jsonl"], tmp_path / "plain", shard_tokens=300)
    build_shards([tmp_path / "a.jsonl"], tmp_path / "rows", shard_tokens=300, pack="best-fit", sequence_length=31)
    plain, rows = inspect_shards(tmp_path / "plain/train"), inspect_shards(tmp_path / "rows/train", workers=2)
    assert plain.defects == rows.defects == []
    text, tokens = sum(range(1, 60)), sum(range(2, 61))
    assert f"  tokens      {tokens:,} of uint16" in "\n".join(plain.summary())
    totals = rows.manifest.totals
    padding = sum(document == [256] for document in documents_of(tmp_path / "rows/train"))
    filled = f"{1 - padding / totals['tokens']:.2%} filled"
    assert f"{totals['tokens'] // 32} rows of 32 tokens, {filled}" in rows.summary()[6]
    assert f"of {totals['tokens']:,} of uint16, of {text:,} bytes"[3:] in "\n".join(rows.summary())
    assert rows.summary()[7].startswith(f"  documents   {totals['documents'] - padding:,}; ")
    assert "1% up to 2," in rows.summary()[8]


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_every_defect_of_every_shard_is_reported(tmp_path):
    shards = [[[n, n + 1, 256]] for n in range(12)]
    write_token_shards(tmp_path, shards)
    names = [tmp_path / info.name for info in read_manifest(tmp_path).shards]
    names[0].unlink()
    os.truncate(names[1], 1024)
    flip(names[2], names[2].read_bytes().index(b"\2\0\3\0"))
    flip(names[3], 3)
    entry_of_file(tmp_path, 3)
    change_entry(tmp_path, 4, tokens=30, documents=2)
    tokens = names[5].read_bytes().replace(b"\5\0\6\0\0\1", b"\5\0\xff\1\0\1")
    names[5].write_bytes(tokens)
    entry_of_file(tmp_path, 5)
    found = inspect_shards(tmp_path, workers=2)
    defects = [defect.removeprefix(f"{tmp_path}/") for defect in found.defects]
    expected = [
        r"shard-000\.tar: cannot be read: No such file",
        r"shard-001\.tar: its bytes is 1024, but the manifest says 10240",
        r"shard-001\.tar: .*not a (readable|complete) tar",
        r"shard-001\.tar: its sha256 is .*, but the manifest says ",
        r"shard-002\.tar: its sha256 is .*, but the manifest says ",
        r"shard-003\.tar: it is not a readable tar",
        r"shard-004\.tar: its documents is 1, but the manifest says 2",
        r"shard-004\.tar: its tokens is 3, but the manifest says 30",
        r"shard-005\.tar: 1 samples have token ids that are not below tokenizer\.vocab_size, 257: such as 511 in s",
    ]
    unmatched = [pattern for pattern in expected if sum(bool(re.match(pattern, text)) for text in defects) != 1]
    assert unmatched == [], defects
    assert len(defects) == len(expected)


def test_the_largest_token_of_all_samples_counts(tmp_path):
    write_token_shards(tmp_path, [[[256], [3]], [[5]]], bundle=1)
    assert inspect_shards(tmp_path).defects == []


def test_defects_of_the_manifest_are_reported(tmp_path):
    manifest = write_token_shards(tmp_path, SHARDS)
    write_manifest(tmp_path, dataclasses.replace(manifest, max_token_id=255))
    assert [d.partition(": ")[2] for d in inspect_shards(tmp_path).defects] == [
        "max_token_id is 255, but the largest in the shards is 256"
    ]
    assert inspect_shards(tmp_path, ["shard-000.tar"]).defects == [], "some shards do not decide the largest of all"
    tokenizer = dataclasses.replace(manifest.tokenizer, fingerprint="0" * 64)
    write_manifest(tmp_path, dataclasses.replace(manifest, tokenizer=tokenizer))
    (defect,) = inspect_shards(tmp_path).defects
    assert "tokenizer.fingerprint is '000" in defect
    write_tar(tmp_path / "more/stray.tar", [])
    assert "  1 tars in the folder are not in the manifest: more/stray.tar" in inspect_shards(tmp_path).summary()
    with pytest.raises(DataError, match=r"manifest\.json: has no shard x\.tar; check the name"):
        inspect_shards(tmp_path, ["x.tar"])


def test_a_document_that_crosses_the_end_of_a_row_is_a_defect(tmp_path):
    manifest = write_token_shards(tmp_path, [[[1, 2, 3, 256], [1, 2, 3], [4, 256, 7, 7, 256]]])
    write_manifest(tmp_path, dataclasses.replace(manifest, row_tokens=4))
    (defect,) = inspect_shards(tmp_path).defects
    assert defect.endswith("shard-000.tar: a document crosses the end of a row of 4 tokens")


def test_documents_without_an_end_token_are_counted(tmp_path):
    write_token_shards(tmp_path, [[[1, 2], [3, 256], [4]]])
    found = inspect_shards(tmp_path)
    assert found.defects == []
    assert "  documents   3; 2 do not end with token 256" in found.summary()


def test_the_tool_verifies_folders_and_tars(tmp_path, run_tool):
    write_token_shards(tmp_path / "a", SHARDS)
    write_token_shards(tmp_path / "b", SHARDS)
    flip(tmp_path / "b/shard-001.tar", 600)
    flip(tmp_path / "b/shard-002.tar", 600)
    done = run_tool(tmp_path / "a", tmp_path / "b/shard-000.tar", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no defects") == 2
    assert "read: 100%" in done.stderr, "a progress bar"
    assert "3 of 3 read" in done.stdout
    assert "1 of 3 read" in done.stdout
    done = run_tool(tmp_path / "a", tmp_path / "b", "--workers", 1)
    assert done.returncode == 1
    assert "no defects" in done.stdout
    assert "verdict     " in done.stdout.partition(str(tmp_path / "b"))[2]
    for name in ("shard-001.tar", "shard-002.tar"):
        assert f"inspect_shards: {tmp_path / 'b' / name}: its sha256 is " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing"], 1, "inspect_shards: missing: no such folder"),
        (["lost.tar"], 1, "inspect_shards: lost.tar: has no manifest.json next to it or in a parent folder; write one"),
        (["x", "--write-manifest"], 2, "--tokenizer is needed for --write-manifest, and for nothing else"),
        (["x", "--tokenizer", "byte"], 2, "--tokenizer is needed for --write-manifest, and for nothing else"),
        (["x", "--eos-token", "</s>"], 2, "--eos-token and --text-member are for --write-manifest only"),
        (["x", "--samples", "0"], 2, "argument --samples: '0' must be a whole number of 1 or more"),
        ([".", "a.tar", "--write-manifest", "--tokenizer", "byte"], 1, "a.tar: is given together with a folder"),
        (["http://h/x", "--write-manifest", "--tokenizer", "byte"], 1, "http://h/x: is not a local file"),
    ],
)
def test_invalid_arguments_are_refused(run_tool, arguments, code, message):
    done = run_tool(*arguments)
    assert done.returncode == code
    assert message in done.stderr


# -- samples -----------------------------------------------------------------------------------------------------------


def test_the_tool_shows_documents_without_their_control_characters(tmp_path, run_tool):
    texts = ["plain text", "red \x1b[31m\x07 and ä €", "y" * 3000]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    build_shards([tmp_path / "a.jsonl"], tmp_path / "out", pack="one-per-sequence", sequence_length=4000)
    done = run_tool(tmp_path / "out/train", "--samples", 10)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("----") == 3, "padding is not shown"
    assert "document 0: " in done.stdout
    assert ": 11 tokens\nplain text\n" in done.stdout
    assert "red \\x1b[31m\\x07 and ä €\n" in done.stdout
    assert ": 3,001 tokens\n" + "y" * 2000 + "... (1,000 more characters)\n" in done.stdout
    assert run_tool(tmp_path / "out/train/shard-000000.tar", "--samples", 1).stdout.count("----") == 1


# -- manifests for third-party tars ------------------------------------------------------------------------------------


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
        ([("0.txt", b"\xff")], {}, r"member 0\.txt is not valid UTF-8 or JSON: .*repair the tar"),
        ([("0.json", b"{")], {}, r"member 0\.json is not valid UTF-8 or JSON"),
        ([("0.json", b'{"text": "\\ud800"}')], {}, r"member 0\.json is not valid UTF-8 or JSON: .*surrogates"),
        ([("0.json", b"[" * 100_000)], {}, r"member 0\.json is not valid UTF-8 or JSON"),
        ([("0.json", b'{"text": 1}')], {}, r"member 0\.json must be an object whose field 'text' is a string"),
        ([("0.json", b'["x"]')], {"text_field": "a"}, r"must be an object whose field 'a' is a string; .*--text-field"),
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


def test_the_tool_writes_a_manifest_that_it_verifies(tmp_path, run_tool):
    for name in ("a", "b"):
        write_tar(tmp_path / f"t/{name}.tar", [(f"{i}.txt", f"text {name} {i}".encode()) for i in range(5)])
    done = run_tool(tmp_path / "t", "--write-manifest", "--tokenizer", "byte", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert f"Wrote the manifest. To train on it: data.train={tmp_path / 't'} model.vocab_size=257" in done.stdout
    assert "for a large run, unpack it and use tools/make_shards.py." in done.stdout
    done = run_tool(tmp_path / "t")
    assert (done.returncode, "no defects" in done.stdout) == (0, True)
    (tmp_path / "t/manifest.json").unlink()
    write_tar(tmp_path / "t/c.tar", [("0.txt", b"\xff")])
    done = run_tool(tmp_path / "t", "--write-manifest", "--tokenizer", "byte", "--workers", 1)
    assert done.returncode == 1
    assert "inspect_shards: " in done.stderr
    assert "no manifest was written; repair or remove the tars named above" in done.stdout
    done = run_tool(tmp_path / "t/a.tar", tmp_path / "t/b.tar", "--write-manifest", "--tokenizer", "byte")
    assert done.returncode == 0, done.stderr
    assert [info.name for info in read_manifest(tmp_path / "t").shards] == ["a.tar", "b.tar"]


def test_the_tool_as_a_command(tmp_path):
    write_token_shards(tmp_path, SHARDS)
    flip(tmp_path / "shard-001.tar", 600)
    command = [sys.executable, str(REPOSITORY / "tools/inspect_shards.py"), str(tmp_path), "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1
    assert "  verdict     2 defects\n" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_killed_worker_is_a_data_error():
    with (
        pytest.raises(DataError, match="a worker process was killed, possibly because memory ran out"),
        worker_pool(2) as pool_map,
    ):
        list(pool_map(os._exit, [9, 9]))
