"""Manifests: round trips, and the error for every kind of malformed manifest."""

import dataclasses
import hashlib
import json
import tarfile

import numpy as np
import pytest

from dcscale.data import DataError, read_manifest
from dcscale.data.prepare.inspect import inspect_shards, sample_documents
from dcscale.data.shards.manifest import Manifest, ShardInfo, TextInfo, TokenizerInfo, write_manifest

TOKENIZER = TokenizerInfo("byte", "0" * 64, 257, 256)
SHARDS = (
    ShardInfo("shard-0.tar", 10240, "1" * 64, samples=2, documents=3, tokens=40, text_bytes=37),
    ShardInfo("part/shard-1.tar", 20480, "2" * 64, samples=1, documents=1, tokens=9, text_bytes=8),
)
MANIFEST = Manifest("uint16", TOKENIZER, 256, SHARDS)


def test_round_trip(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    assert MANIFEST.totals == {"bytes": 30720, "samples": 3, "documents": 4, "tokens": 49, "text_bytes": 45}
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_folder_written_by_hand_as_the_format_describes_is_read(tmp_path):
    documents = [[100, 101, 256], [102, 256], [103, 104, 105, 256]]
    members = {
        "k0.tokens.npy": np.array(documents[0] + documents[1], "<u2"),
        "k0.lens.npy": np.array([3, 2], "<u4"),
        "k1.npy": np.array(documents[2], "<u2"),
    }
    with tarfile.open(tmp_path / "one.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, array in members.items():
            np.save(tmp_path / "array.npy", array, allow_pickle=False)
            tar.add(tmp_path / "array.npy", name)
    data = (tmp_path / "one.tar").read_bytes()
    counts = {"bytes": len(data), "samples": 2, "documents": 3, "tokens": 9, "text_bytes": 6}
    fingerprint = hashlib.sha256(b"dcscale byte tokenizer, version 1").hexdigest()
    content = {
        "format": "dcscale-token-shards",
        "version": 1,
        "dtype": "uint16",
        "tokenizer": {"spec": "byte", "fingerprint": fingerprint, "vocab_size": 257, "eos_id": 256},
        "max_token_id": 256,
        "totals": counts,
        "shards": [{"name": "one.tar", "sha256": hashlib.sha256(data).hexdigest(), **counts}],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert inspect_shards(tmp_path).defects == []
    assert [document.text for document in sample_documents(tmp_path)] == ["de", "f", "ghi"]


def test_row_tokens_is_written_only_if_set(tmp_path):
    """Manifests without rows, and their fingerprints in checkpoints, do not depend on this later field."""
    write_manifest(tmp_path, MANIFEST)
    assert "row_tokens" not in json.loads((tmp_path / "manifest.json").read_text())
    assert MANIFEST.fingerprint == "e53854e206332dd7af2799efc5f1430e16cc80c59cac22a463984ff211eba16c"
    shards = tuple(dataclasses.replace(shard, tokens=8 * (i + 1)) for i, shard in enumerate(SHARDS))
    plain, rows = (Manifest("uint16", TOKENIZER, 256, shards, row_tokens) for row_tokens in (None, 8))
    assert plain.fingerprint != rows.fingerprint
    write_manifest(tmp_path, rows)
    assert read_manifest(tmp_path) == rows


def test_text_is_part_of_the_fingerprint(tmp_path):
    text = [dataclasses.replace(MANIFEST, text=TextInfo(*info)) for info in (("txt", ""), ("json", "a"), ("json", "b"))]
    assert len({manifest.fingerprint for manifest in [MANIFEST, *text]}) == 4
    for manifest in text:
        write_manifest(tmp_path, manifest)
        assert read_manifest(tmp_path) == manifest
    shards = tuple(dataclasses.replace(shard, tokens=8) for shard in SHARDS)
    write_manifest(tmp_path, dataclasses.replace(text[0], shards=shards, row_tokens=8))
    with pytest.raises(DataError, match=r"text is .* must be .* without row_tokens"):
        read_manifest(tmp_path)


def test_skipped_rows_are_kept_but_do_not_change_what_is_read(tmp_path):
    manifest = dataclasses.replace(MANIFEST, skipped_rows={"not JSON": 2, "null text": 1})
    assert manifest.fingerprint == MANIFEST.fingerprint
    for folder, shards in (("a", SHARDS[:1]), ("b", SHARDS[1:])):
        (tmp_path / folder).mkdir()
        part = dataclasses.replace(manifest, shards=shards)
        write_manifest(tmp_path / folder, part)
        assert read_manifest(tmp_path / folder) == part
    assert read_manifest(f"{tmp_path}/{{a,b}}").skipped_rows == {"not JSON": 4, "null text": 2}


def test_writing_is_reproducible_and_replaces(tmp_path):
    write_manifest(tmp_path, Manifest("uint16", TOKENIZER, 3, SHARDS[:1]))
    write_manifest(tmp_path, MANIFEST)
    first = (tmp_path / "manifest.json").read_bytes()
    write_manifest(tmp_path, MANIFEST)
    assert (tmp_path / "manifest.json").read_bytes() == first


def test_an_interrupted_write_leaves_the_old_manifest(tmp_path, monkeypatch):
    write_manifest(tmp_path, MANIFEST)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_manifest(tmp_path, Manifest("uint16", TOKENIZER, 3, SHARDS[:1]))
    assert read_manifest(tmp_path) == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def set_at(path, value):
    def change(content):
        *parents, last = path
        for key in parents:
            content = content[key]
        content[last] = value

    return change


def drop(*path):
    def change(content):
        *parents, last = path
        for key in parents:
            content = content[key]
        del content[last]

    return change


FAULTS = {
    "another format": (set_at(["format"], "x"), r"format is 'x', but must be 'dcscale-token-shards'"),
    "a later version": (set_at(["version"], 2), r"version is 2, but must be 1.*make the shards again"),
    "no version": (drop("version"), r"version is None, but must be 1"),
    "a missing field": (drop("dtype"), r"fields of the manifest .*'missing': \['dtype'\]"),
    "an unknown field": (set_at(["extra"], 1), r"fields of the manifest .*'unknown': \['extra'\]"),
    "skipped_rows is no object": (set_at(["skipped_rows"], 3), r"skipped_rows is 3, but must be an object of whole"),
    "skipped_rows is empty": (set_at(["skipped_rows"], {}), r"skipped_rows is \{\}, but must be an object of whole"),
    "skipped_rows of no row": (set_at(["skipped_rows"], {"x": 0}), r"skipped_rows is \{'x': 0\}, but must be"),
    "another dtype": (set_at(["dtype"], "int64"), r"dtype is 'int64', but must be uint16 or uint32"),
    "tokenizer is no object": (set_at(["tokenizer"], "byte"), r"tokenizer is 'byte', but must be an object"),
    "tokenizer elsewhere": (set_at(["tokenizer", "spec"], "../t.json"), r"tokenizer\.spec is '\.\./t\.json'"),
    "fingerprint": (set_at(["tokenizer", "fingerprint"], "12"), r"tokenizer\.fingerprint is '12', .*64 lower-case"),
    "eos beyond": (set_at(["tokenizer", "eos_id"], 257), r"tokenizer\.eos_id is 257, but must be below .*257"),
    "no vocabulary": (set_at(["tokenizer", "vocab_size"], 0), r"tokenizer\.vocab_size is 0, .* at least 1"),
    "token beyond": (set_at(["max_token_id"], 257), r"max_token_id is 257, but must be a whole number from 0 to 256"),
    "token is text": (set_at(["max_token_id"], "1"), r"max_token_id is '1'"),
    "no shards": (set_at(["shards"], []), r"shards is \[\], but must be a list of at least one shard"),
    "shards is no list": (set_at(["shards"], {}), r"shards is \{\}, but must be a list"),
    "a shard is no object": (set_at(["shards", 1], 7), r"shards\[1\] is 7, but must be an object"),
    "zero tokens": (set_at(["shards", 0, "tokens"], 0), r"shards\[0\]\.tokens is 0, .* at least 1"),
    "negative bytes": (set_at(["shards", 0, "bytes"], -1), r"shards\[0\]\.bytes is -1, .* at least 1"),
    "a fraction": (set_at(["shards", 0, "samples"], 2.0), r"shards\[0\]\.samples is 2\.0, but must be a whole number"),
    "a truth value": (set_at(["shards", 0, "documents"], True), r"shards\[0\]\.documents is True"),
    "checksum": (set_at(["shards", 0, "sha256"], "g" * 64), r"shards\[0\]\.sha256 is 'ggg"),
    "checksum is no text": (set_at(["shards", 0, "sha256"], None), r"shards\[0\]\.sha256 is None"),
    "counts that contradict": (set_at(["shards", 0, "samples"], 4), r"shards\[0\] is .*samples <= documents <= tokens"),
    "a shard twice": (set_at(["shards", 1, "name"], "shard-0.tar"), r"shards\[1\]\.name .* unique, but shards\[0\]"),
    "a shard lost": (drop("shards", 1), r"totals\.bytes is 30720, but must be the sum over the shards, 10240"),
    "a total": (set_at(["totals", "tokens"], 50), r"totals\.tokens is 50, but must be the sum over the shards, 49"),
    "rows of one token": (set_at(["row_tokens"], 1), r"row_tokens is 1, but must be a whole number, at least 2"),
    "rows without length": (set_at(["row_tokens"], None), r"row_tokens is None, but must be a whole number"),
    "part of a row": (set_at(["row_tokens"], 4), r"shards\[1\]\.tokens is 9, .* a multiple of row_tokens, 4"),
    "text of a third kind": (
        set_at(["text"], {"member": "md", "field": ""}),
        r"text\.member is 'md', but must be 'txt'",
    ),
    "text without a field": (
        set_at(["text"], {"member": "json", "field": ""}),
        r"text is .*json with the name",
    ),
    "txt with a field": (
        set_at(["text"], {"member": "txt", "field": "x"}),
        r"text is .*txt with an empty",
    ),
    "text is no object": (set_at(["text"], "txt"), r"text is 'txt', but must be an object with field, member"),
    "totals incomplete": (drop("totals", "tokens"), r"fields of totals .*'missing': \['tokens'\]"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_malformed_manifests_are_refused(tmp_path, change, message):
    write_manifest(tmp_path, MANIFEST)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as error:
        read_manifest(tmp_path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "name",
    ["/etc/x.tar", "../x.tar", "a/../../x.tar", "./x.tar", "a//x.tar", "x.tgz", ".tar", "", "pipe:cat x.tar",
     "a\\x.tar", "http://host/x.tar", "x.tar\n", "-x.tar", "$(x).tar", ".hidden/x.tar"],
)  # fmt: skip
def test_names_outside_the_folder_or_with_special_meaning_are_refused(tmp_path, name):
    write_manifest(tmp_path, MANIFEST)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content["shards"][0]["name"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"shards\[0\]\.name is .*a relative path inside the folder"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"x"', "\xff"])
def test_a_file_that_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        DataError, match=r"manifest\.json(: format is .* must be| cannot be read: it is not (JSON|UTF-8): ).*; give a"
    ):
        read_manifest(tmp_path)


def test_uint32_tokens_may_be_large(tmp_path):
    tokenizer = TokenizerInfo("tokenizer.json", "0" * 64, 200_000, 0)
    write_manifest(tmp_path, Manifest("uint32", tokenizer, 199_999, SHARDS))
    assert read_manifest(tmp_path).max_token_id == 199_999
    write_manifest(tmp_path, Manifest("uint16", tokenizer, 65_536, SHARDS))
    with pytest.raises(DataError, match="from 0 to 65535"):
        read_manifest(tmp_path)


def test_missing_folder_and_missing_manifest(tmp_path):
    with pytest.raises(DataError, match=r"absent: no such folder; .*make_shards\.py"):
        read_manifest(tmp_path / "absent")
    with pytest.raises(DataError, match="aaa: cannot be accessed: File name too long; give an accessible folder"):
        read_manifest(tmp_path / ("a" * 300))
    with pytest.raises(DataError, match=r"manifest\.json: no such file, .*make the shards"):
        read_manifest(tmp_path)


def test_the_parent_of_a_folder_of_shards_gets_a_hint(tmp_path):
    (tmp_path / "train").mkdir()
    write_manifest(tmp_path / "train", MANIFEST)
    with pytest.raises(DataError, match=r"no such file.*did you mean .*train\?"):
        read_manifest(tmp_path)


def test_manifest_that_cannot_be_read(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read: Is a directory"):
        read_manifest(tmp_path)
