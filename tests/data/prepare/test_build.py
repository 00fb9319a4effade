"""From text to shards: no text is lost, any number of workers gives the same bytes, and output is never incomplete."""

import gzip
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
import webdataset
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers

from dcscale.data import DataError, StreamConfig, build_shards, open_stream, read_manifest
from dcscale.data.prepare.json_files import zstd
from dcscale.data.prepare.shuffle import document_key, split_of
from dcscale.data.prepare.sources import find_files
from dcscale.data.shards.shard import read_shard
from dcscale.data.storage import open_storage

REPOSITORY = Path(__file__).parents[3]
CASES = Path(__file__).parent / "cases"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """60 text files, 40 JSONL lines in three kinds of files, 20 rows; each text is different, two are empty."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(60):
        path = folder / f"sub{i % 3}" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"file {i} " + "ä" * (i * 7 % 50) if i != 5 else "")
    lines = [json.dumps({"text": f"line {i} " + "€" * (i * 11 % 40) if i != 7 else ""}) for i in range(60)]
    (folder / "x.jsonl").write_text("\n".join(lines[:20]))
    (folder / "y.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[20:30]).encode()))
    (folder / "z.jsonl.zst").write_bytes(zstd.compress("\n".join(lines[30:40]).encode()))
    table = pyarrow.table({"text": [json.loads(line)["text"] for line in lines[40:]], "id": range(20)})
    parquet.write_table(table, folder / "a.parquet", row_group_size=6)
    return folder


def texts_of_corpus(corpus):
    texts = [path.read_text() for path in corpus.rglob("*.txt")]
    texts += parquet.read_table(corpus / "a.parquet").column("text").to_pylist()
    lines = [(corpus / "x.jsonl").read_bytes(), gzip.decompress((corpus / "y.jsonl.gz").read_bytes())]
    lines.append(zstd.decompress((corpus / "z.jsonl.zst").read_bytes()))
    texts += [json.loads(line)["text"] for content in lines for line in content.splitlines()]
    return sorted(filter(None, texts))


def texts_of_shards(folder):
    manifest = read_manifest(folder)
    documents = [
        document.tolist()
        for info in manifest.shards
        for document in read_shard(open_storage(folder), info, dtype=manifest.dtype, vocab_size=257, verify=True)
    ]
    assert all(document[-1] == 256 and document.count(256) == 1 for document in documents)
    return [bytes(document[:-1]).decode() for document in documents]


def tree(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def small(corpus, output, **changes):
    return build_shards([corpus], output, **{"shard_tokens": 500, "bundle_tokens": 100, "hold_out": 0.2, **changes})


def test_every_text_is_in_exactly_one_shard(corpus, tmp_path):
    report = small(corpus, tmp_path / "out")
    train, validation = texts_of_shards(tmp_path / "out/train"), texts_of_shards(tmp_path / "out/validation")
    assert sorted(train + validation) == texts_of_corpus(corpus)
    assert report.empty == 2
    assert (report.skipped.rows, report.skipped.by_reason) == (120, {})
    assert list(report.splits) == [tmp_path / "out/train", tmp_path / "out/validation"]
    for folder, split in report.splits.items():
        manifest = split.manifest
        assert manifest == read_manifest(folder)
        texts = texts_of_shards(folder)
        assert (split.documents, split.cut_documents, split.padding_tokens) == (len(texts), 0, 0)
        assert manifest.totals["documents"] == len(texts)
        assert manifest.totals["text_bytes"] == sum(len(text.encode()) for text in texts)
        assert manifest.totals["tokens"] == manifest.totals["text_bytes"] + len(texts)
        assert manifest.max_token_id == 256
    assert len(train) > 3 * len(validation) > 20


def test_shards_and_bundles_have_the_sizes_asked_for(corpus, tmp_path):
    small(corpus, tmp_path / "out", hold_out=0)
    manifest = read_manifest(tmp_path / "out/train")
    longest = 200
    assert len(manifest.shards) > 5
    assert all(500 <= shard.tokens < 500 + longest for shard in manifest.shards[:-1])
    for shard in manifest.shards:
        samples = webdataset.WebDataset(str(tmp_path / "out/train" / shard.name), shardshuffle=False).decode()
        *full, rest = [len(sample["tokens.npy"]) for sample in samples]
        assert all(100 <= tokens < 100 + longest for tokens in full)
        assert 0 < rest < 100 + longest
        assert len(full) + 1 == shard.samples
    assert not (tmp_path / "out/validation").exists()


def test_documents_are_shuffled_over_shards(corpus, tmp_path):
    small(corpus, tmp_path / "out", hold_out=0)
    kinds = [text.split()[0] for text in texts_of_shards(tmp_path / "out/train")]
    changes = sum(here != there for here, there in itertools.pairwise(kinds))
    assert 40 < changes < 80, "files and lines, about 60 of each, must alternate at random"


def test_the_result_is_the_same_for_any_workers_buckets_batches_and_time(corpus, tmp_path):
    small(corpus, tmp_path / "one")
    small(corpus, tmp_path / "two", workers=2)
    small(corpus, tmp_path / "buckets", bucket_bytes=50)
    expected = tree(tmp_path / "one")
    assert len(expected) > 8
    assert tree(tmp_path / "two") == expected
    assert tree(tmp_path / "buckets") == expected
    assert small(corpus, tmp_path / "batches", batch_chars=50).empty == 2
    assert tree(tmp_path / "batches") == expected


def test_seed_changes_the_order_but_not_what_is_held_out(corpus, tmp_path):
    small(corpus, tmp_path / "a")
    small(corpus, tmp_path / "b", seed=1)
    for split in ("train", "validation"):
        a, b = texts_of_shards(tmp_path / "a" / split), texts_of_shards(tmp_path / "b" / split)
        assert sorted(a) == sorted(b)
        assert a != b


def test_the_split_of_a_document_depends_on_its_name_alone(corpus, tmp_path):
    small(corpus, tmp_path / "all")
    small(corpus / "sub1" / "..", tmp_path / "again", exclude=["sub0", "*.jsonl*"])
    held_out = set(texts_of_shards(tmp_path / "all/validation"))
    assert set(texts_of_shards(tmp_path / "again/validation")) < held_out
    assert not set(texts_of_shards(tmp_path / "again/train")) & held_out


def test_a_larger_hold_out_contains_a_smaller_one():
    names = [f"file-{i}.txt" for i in range(5000)]
    held_out = [{name for name in names if split_of(name, fraction) == "validation"} for fraction in (0, 0.02, 0.5)]
    assert held_out[0] == set()
    assert held_out[1] < held_out[2]
    assert 60 < len(held_out[1]) < 140
    assert 2350 < len(held_out[2]) < 2650


def test_names_that_are_not_utf8_have_different_keys():
    assert document_key(os.fsdecode(b"\xff.txt"), "order") != document_key(os.fsdecode(b"\xfe.txt"), "order")


def test_files_with_the_same_name_are_held_out_and_shuffled_apart(tmp_path):
    books = [tmp_path / f"book{number}/text.txt" for number in range(40)]
    for book in books:
        book.parent.mkdir()
        book.write_text(f"text of {book.parent.name}")
    report = build_shards(books, tmp_path / "books", hold_out=0.25)
    assert [split.documents for split in report.splits.values()] == [31, 9]
    for language in ("en", "fr"):
        (tmp_path / language).mkdir()
        lines = (json.dumps({"text": f"{language} {i}"}) + "\n" for i in range(100))
        (tmp_path / language / "part-0.jsonl").write_text("".join(lines))
    build_shards([tmp_path / "en", tmp_path / "fr"], tmp_path / "out")
    texts = texts_of_shards(tmp_path / "out/train")
    assert len(texts) == 200
    neighbours = [here.split()[1] == there.split()[1] for here, there in itertools.pairwise(texts)]
    assert sum(neighbours) < 10


def test_the_result_does_not_depend_on_where_the_inputs_lie(tmp_path):
    for folder in ("here", "deep/there"):
        for name in ("a", "b"):
            (tmp_path / folder / name).mkdir(parents=True)
            (tmp_path / folder / name / "x.jsonl").write_text("".join(f'{{"text": "{name} {i}"}}\n' for i in range(30)))
    for inputs in (lambda folder: [folder], lambda folder: [folder / "b/x.jsonl", folder / "a"]):
        for folder in ("here", "deep/there"):
            build_shards(inputs(tmp_path / folder), tmp_path / "out", overwrite=True, hold_out=0.2)
            (tmp_path / "out").rename(tmp_path / f"out-{folder[:4]}")
        assert tree(tmp_path / "out-here") == tree(tmp_path / "out-deep")
        for name in ("out-here", "out-deep"):
            shutil.rmtree(tmp_path / name)


def test_bad_rows_stop_the_build_or_are_counted_by_reason(corpus, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "bad.jsonl").write_text('{"text": null}\n' * 9 + '{"text": "good"}\n{"text": null}\nx\n')
    inputs = [corpus, tmp_path / "bad.txt", tmp_path / "bad.jsonl"]
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"bad\.txt: byte 0 is 0xff"):
            build_shards(inputs, tmp_path / "out", workers=workers)
    assert not (tmp_path / "out").exists()
    options = {"on_bad_row": "skip", "hold_out": 0.5}
    report = build_shards(inputs, tmp_path / "out", **options)
    assert report.skipped.rows == 120 + 13
    assert report.skipped.by_reason == {"null text": 10, "not JSON": 1, "not UTF-8": 1}
    assert report.skipped.first == {"null text": "bad.jsonl:1", "not JSON": "bad.jsonl:12", "not UTF-8": "bad.txt"}
    manifests = [split.manifest for split in report.splits.values()]
    assert all(manifest.skipped_rows and list(manifest.skipped_rows) for manifest in manifests), "each split its own"
    assert sum((Counter(manifest.skipped_rows) for manifest in manifests), Counter()) == report.skipped.by_reason
    texts = texts_of_shards(tmp_path / "out/train") + texts_of_shards(tmp_path / "out/validation")
    assert sorted(texts) == sorted([*texts_of_corpus(corpus), "good"])
    build_shards(inputs, tmp_path / "again", workers=2, **options)
    assert tree(tmp_path / "again") == tree(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "bad.jsonl", "bad.txt", "out"]


def test_the_limit_on_bad_rows_is_one_on_all_rows(tmp_path):
    """Wherever they are, and however many workers there are."""
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 150)
    (tmp_path / "b.jsonl").write_text('{"text": "y"}\n' * 850)
    report = build_shards([tmp_path], tmp_path / "out", on_bad_row="skip", max_bad_rows=0.15)
    assert report.skipped.by_reason == {"no text field": 150}


def test_a_build_stops_early_where_no_row_can_be_used(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 10_000)
    (tmp_path / "b.jsonl").write_text('{"text": "y"}\n' * 10)
    with pytest.raises(DataError, match=r"^10,000 of 10,000 rows cannot be used: .*; .*--text-field"):
        build_shards([tmp_path], tmp_path / "out", on_bad_row="skip", workers=1)
    report = build_shards([tmp_path], tmp_path / "out", on_bad_row="skip", max_bad_rows=1)
    assert report.skipped.rows == 10_010


def test_too_many_bad_rows_stop_the_build(tmp_path):
    """As where the text is in another field."""
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 150 + '{"text": "y"}\n' * 850)
    message = (
        r"^150 of 1,000 rows cannot be used: no text field 150, such as a\.jsonl:1\. These are more than 100 and more "
        r"than the fraction 0\.1; .*--text-field, or .*--max-bad-rows"
    )
    for _ in range(2):  # also when it is resumed
        with pytest.raises(DataError, match=message):
            build_shards([tmp_path], tmp_path / "out", on_bad_row="skip", max_bad_rows=0.1)
    report = build_shards([tmp_path], tmp_path / "out", on_bad_row="skip", max_bad_rows=0.15)
    assert report.skipped.by_reason.total() == 150
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n' * 50)
    message = "all their documents are empty or left out; 50 of 50 rows cannot be used: no text field 50, such as"
    with pytest.raises(DataError, match=message):
        build_shards([tmp_path / "b.jsonl"], tmp_path / "out2", on_bad_row="skip")


@pytest.mark.parametrize(
    ("name", "options", "texts"),
    [
        ("dolma-0000.json", {}, ["one document", "two documents"]),
        ("corpus.ndjson", {}, ["one document", "two documents"]),
        ("mixedcase", {}, ["aaa", "bbb", "ccc", "ddd", "fff"]),
        ("bom.jsonl", {}, ["first", "second"]),
        ("bom.txt", {}, ["hello\r\nworld\r\n"]),
        ("bigint.jsonl", {}, ["ok"]),
        ("nulltext.jsonl", {"on_bad_row": "skip"}, ["a", "b"]),
        ("null.parquet", {"on_bad_row": "skip"}, ["a", "b"]),
    ],
)
def test_cases_that_once_failed(tmp_path, name, options, texts):
    report = build_shards([CASES / name], tmp_path / "out", **options)
    assert sorted(texts_of_shards(tmp_path / "out/train")) == texts
    assert report.skipped.by_reason == ({"null text": 1} if options else {})
    assert report.not_read.kinds == ({".jsonl.bz2": 1} if name == "mixedcase" else {})


def test_an_output_inside_an_input_is_not_read_again(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    for _ in range(2):
        report = build_shards([tmp_path], tmp_path / "out", overwrite=True)
        assert sorted(texts_of_shards(tmp_path / "out/train")) == ["one", "two"]
        assert not report.not_read.kinds


def make_word_tokenizer(path, vocabulary):
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


def test_a_tokenizer_file_that_changes_during_the_build_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    (tmp_path / "a.txt").write_text("one two")
    for number in (1, 2):
        make_word_tokenizer(path, {"<|endoftext|>": 0, "[UNK]": 1, "one": 1 + number, "two": 4})
        build_shards([tmp_path / "a.txt"], tmp_path / f"out{number}", tokenizer=str(path))
        folder = tmp_path / f"out{number}/train"
        (document,) = read_shard(
            open_storage(folder), read_manifest(folder).shards[0], dtype="uint16", vocab_size=5, verify=True
        )
        assert document.tolist() == [1 + number, 4, 0]

    def change_then_find(*arguments, **options):
        make_word_tokenizer(path, {"<|endoftext|>": 0, "[UNK]": 1})
        return find_files(*arguments, **options)

    monkeypatch.setattr("dcscale.data.prepare.build.find_files", change_then_find)
    make_word_tokenizer(path, {"<|endoftext|>": 0, "[UNK]": 1, "two": 2})
    with pytest.raises(DataError, match=r"t\.json: was changed while shards were built with it"):
        build_shards([tmp_path / "a.txt"], tmp_path / "out3", tokenizer=str(path))


def test_uint32_for_large_vocabularies(tmp_path):
    make_word_tokenizer(tmp_path / "t.json", {"<|endoftext|>": 0, "[UNK]": 1, "low": 2, "high": 70_000})
    (tmp_path / "a.txt").write_text("low high other")
    (tmp_path / "blank.txt").write_text("  \n")
    report = build_shards(
        [tmp_path / "a.txt", tmp_path / "blank.txt"], tmp_path / "out", tokenizer=str(tmp_path / "t.json")
    )
    folder = tmp_path / "out/train"
    manifest = read_manifest(folder)
    assert (manifest.dtype, manifest.tokenizer.vocab_size, manifest.max_token_id) == ("uint32", 70_001, 70_000)
    documents = read_shard(open_storage(folder), manifest.shards[0], dtype="uint32", vocab_size=70_001, verify=True)
    assert [document.tolist() for document in documents] == [[2, 70_000, 1, 0]]
    assert report.empty == 1, "text without a token is left out"


def test_an_output_in_the_way(corpus, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    small(corpus, out)
    before = tree(out)
    with pytest.raises(DataError, match=r"out: already exists; .*--overwrite"):
        small(corpus, out)
    assert tree(out) == before
    small(corpus, out, overwrite=True, seed=1)
    assert tree(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_shards_are_ever_overwritten(corpus, tmp_path):
    out = tmp_path / "out"
    small(corpus, out)
    (out / "thesis.txt").write_text("do not delete")
    with pytest.raises(DataError, match=r"out: holds more than shards, so it is not overwritten"):
        small(corpus, out, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"file: holds more than shards"):
        small(corpus, tmp_path / "file", overwrite=True)
    (tmp_path / "other" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"other: holds more than shards"):
        small(corpus, tmp_path / "other", overwrite=True)
    assert (out / "thesis.txt").read_text() == "do not delete"


def test_a_failed_overwrite_keeps_the_old_shards(corpus, tmp_path):
    out = tmp_path / "out"
    small(corpus, out)
    before = tree(out)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="bad"):
        build_shards([tmp_path / "bad.txt"], out, overwrite=True)
    assert tree(out) == before


def test_an_overwrite_that_fails_at_the_last_rename_restores_the_old_shards(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    small(corpus, out)
    before, rename = tree(out), Path.rename

    def fail(path, target):
        if path.name == "result":
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        small(corpus, out, overwrite=True, seed=1)
    assert tree(out) == before
    monkeypatch.undo()
    small(corpus, out, overwrite=True, seed=1)
    assert tree(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard_tokens": 0}, "shard_tokens is 0, but must be at least 1"),
        ({"bundle_tokens": 0}, "bundle_tokens is 0, but must be at least 1"),
        ({"workers": 0}, "workers is 0, but must be at least 1"),
        ({"hold_out": 1.0}, r"hold_out is 1\.0, but must be at least 0 and below 1"),
        ({"hold_out": -0.1}, r"hold_out is -0\.1, but must be"),
        ({"hold_out": 1e-9}, r"have no document for validation: .*; give more text, or another --hold-out"),
        ({"tokenizer": "missing.json"}, r"missing\.json: cannot be read"),
        ({"pack": "tight", "sequence_length": 8}, r"pack is 'tight', but must be best-fit or one-per-sequence"),
        ({"pack": "best-fit"}, r"--pack best-fit needs --sequence-length, .* at least 1, not None"),
        ({"pack": "best-fit", "sequence_length": 0}, r"--pack best-fit needs --sequence-length, .* not 0"),
        ({"sequence_length": 8}, r"--sequence-length 8 is the length of rows, so it needs --pack best-fit"),
        ({"format": "csv"}, r"format is 'csv', but must be json or parquet or text"),
        ({"on_bad_row": "ignore"}, r"on_bad_row is 'ignore', but must be fail or skip"),
        ({"max_bad_rows": 1.5}, r"max_bad_rows is 1\.5, but must be a fraction from 0 to 1 of the rows"),
    ],
)
def test_invalid_arguments_are_refused(corpus, tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        small(corpus, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_inputs_without_any_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="the inputs hold no text: all their documents are empty"):
        build_shards([tmp_path / "a.txt"], tmp_path / "out")


def run_tool(*arguments):
    command = [sys.executable, str(REPOSITORY / "tools/make_shards.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_the_tool_builds_shards_that_a_stream_reads_and_prints_the_settings(corpus, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    out = tmp_path / "my shards"
    options = ["--hold-out", 0.2, "--workers", 2, "--on-bad-row", "skip", "--shard-tokens", 500]
    options += ["--suffix", ".txt", "--exclude", "sub1", "--exclude", "*.png"]
    done = run_tool(corpus, tmp_path / "bad.txt", "--output", out, *options)
    assert done.returncode == 0, done.stderr
    # To be copied into a shell.
    assert f"'data.train={out / 'train'}' 'data.validation={out / 'validation'}' model.vocab_size=257" in done.stdout
    assert "Skipped empty documents: 1\n" in done.stdout
    assert "Skipped: 1 of 41 rows cannot be used: not UTF-8 1, such as bad.txt\n" in done.stdout
    not_read = f"Not read: 4 files, such as {corpus / 'a.parquet'}, "
    assert not_read in done.stdout
    assert done.stderr.startswith(not_read), "before it begins"
    assert "tokenize" in done.stderr, "a progress bar"
    totals = read_manifest(out / "train").totals
    assert f"{out / 'train'}: {totals['tokens']:,} tokens of {totals['documents']:,} documents" in done.stdout
    stream = open_stream(
        out / "train",
        StreamConfig(
            vocab_size=257, sequence_length=64, seed=0, shuffle_shards=2, slots=4, document_mask=True, verify=True
        ),
    )
    assert stream.sequence(0).targets_NL.max() >= 0


@pytest.mark.parametrize(
    ("given", "output", "message"),
    [("missing", "out", "missing: is neither a file nor a folder"), ("", "a" * 300, "File name too long")],
)
def test_the_tool_reports_bad_input_without_a_traceback(tmp_path, given, output, message):
    (tmp_path / "a.txt").write_text("text")
    done = run_tool(tmp_path / given, "--output", tmp_path.parent / output)
    assert done.returncode == 1
    assert done.stderr.startswith("make_shards: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "a.txt").write_text("text")
    done = run_tool(tmp_path / "a.txt", "--output", "/")
    assert done.stderr.startswith("make_shards: /: is not a folder that can be created")
