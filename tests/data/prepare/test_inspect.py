"""Inspecting shards: every defect is reported, and documents are shown."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from dcscale.data import DataError, build_shards, read_manifest
from dcscale.data.prepare.inspect import inspect_shards
from dcscale.data.prepare.pool import worker_pool
from dcscale.data.shards.manifest import write_manifest
from dcscale.testing.runs import change_entry, documents_of, write_token_shards

REPOSITORY = Path(__file__).parents[3]
SHARDS = [[[1, 2, 256], [3, 256]], [[4, 5, 6, 256], [256], [7, 8, 256]], [[9] * 40 + [256]]]


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
    (tmp_path / "more").mkdir()
    tarfile.open(tmp_path / "more/stray.tar", "w").close()
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


def test_the_tool_verifies_folders_and_tars(tmp_path, inspect_tool):
    write_token_shards(tmp_path / "a", SHARDS)
    write_token_shards(tmp_path / "b", SHARDS)
    flip(tmp_path / "b/shard-001.tar", 600)
    flip(tmp_path / "b/shard-002.tar", 600)
    done = inspect_tool(tmp_path / "a", tmp_path / "b/shard-000.tar", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no defects") == 2
    assert "read: 100%" in done.stderr, "a progress bar"
    assert "3 of 3 read" in done.stdout
    assert "1 of 3 read" in done.stdout
    done = inspect_tool(tmp_path / "a", tmp_path / "b", "--workers", 1)
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
        (["x", "--eos-token", "</s>"], 2, "--eos-token, --text-member and --on-bad-row are for --write-manifest only"),
        (["x", "--samples", "0"], 2, "argument --samples: '0' must be a whole number of 1 or more"),
        ([".", "a.tar", "--write-manifest", "--tokenizer", "byte"], 1, "a.tar: is given together with a folder"),
        (["http://h/x", "--write-manifest", "--tokenizer", "byte"], 1, "http://h/x: is not a local file"),
    ],
)
def test_invalid_arguments_are_refused(inspect_tool, arguments, code, message):
    done = inspect_tool(*arguments)
    assert done.returncode == code
    assert message in done.stderr


# -- samples -----------------------------------------------------------------------------------------------------------


def test_the_tool_shows_documents_without_their_control_characters(tmp_path, inspect_tool):
    texts = ["plain text", "red \x1b[31m\x07 and ä €", "y" * 3000]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    build_shards([tmp_path / "a.jsonl"], tmp_path / "out", pack="one-per-sequence", sequence_length=4000)
    done = inspect_tool(tmp_path / "out/train", "--samples", 10)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("----") == 3, "padding is not shown"
    assert "document 0: " in done.stdout
    assert ": 11 tokens\nplain text\n" in done.stdout
    assert "red \\x1b[31m\\x07 and ä €\n" in done.stdout
    assert ": 3,001 tokens\n" + "y" * 2000 + "... (1,000 more characters)\n" in done.stdout
    assert inspect_tool(tmp_path / "out/train/shard-000000.tar", "--samples", 1).stdout.count("----") == 1


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
