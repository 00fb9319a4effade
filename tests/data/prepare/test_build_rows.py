"""Shards of packed rows: their content, and that a stream reads it back."""

import hashlib
import itertools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import webdataset

from dcscale.data import StreamConfig, build_shards, open_stream, read_manifest
from dcscale.data.prepare.packing import pack_best_fit, pack_one_per_row
from dcscale.data.shards.shard import read_shard
from dcscale.data.storage import open_storage
from dcscale.data.stream.sequences import IGNORED

REPOSITORY = Path(__file__).parents[3]
SIZES = {"shard_tokens": 2000, "bundle_tokens": 300, "hold_out": 0.2}
LENGTH = 64
PACKINGS = {"best-fit": pack_best_fit, "one-per-sequence": pack_one_per_row}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Texts of 1 to 400 bytes; some need many rows."""
    folder = tmp_path_factory.mktemp("text")
    lengths = np.random.default_rng(0).lognormal(3.4, 1, 400).clip(1, 400).astype(int).tolist()
    lines = [json.dumps({"text": "".join(chr(97 + (i * 7 + j) % 26) for j in range(n))}) for i, n in enumerate(lengths)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return folder


def shards_of(folder):
    """The documents of each shard, as lists."""
    manifest = read_manifest(folder)
    return [
        [
            document.tolist()
            for document in read_shard(open_storage(folder), info, dtype="uint16", vocab_size=257, verify=True)
        ]
        for info in manifest.shards
    ]


def tree(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.*"))}


def rows_of(documents):
    """Documents, row by row; the rows' ends must be ends of documents."""
    rows, row = [], []
    for document in documents:
        row.append(document)
        if sum(map(len, row)) >= LENGTH + 1:
            assert sum(map(len, row)) == LENGTH + 1
            rows.append(row)
            row = []
    assert row == []
    return rows


@pytest.mark.parametrize("pack", PACKINGS)
def test_each_shard_is_the_packed_rows_of_its_documents(corpus, tmp_path, pack):
    build_shards([corpus], tmp_path / "plain", **SIZES)
    report = build_shards([corpus], tmp_path / "rows", **SIZES, pack=pack, sequence_length=LENGTH)
    shuffled = 0
    for split in ("train", "validation"):
        plain, packed = read_manifest(tmp_path / "plain" / split), read_manifest(tmp_path / "rows" / split)
        assert packed.row_tokens == LENGTH + 1
        assert [shard.text_bytes for shard in packed.shards] == [shard.text_bytes for shard in plain.shards]
        documents = padding = cut = 0
        for before, after in zip(
            shards_of(tmp_path / "plain" / split), shards_of(tmp_path / "rows" / split), strict=True
        ):
            expected = []
            for row in PACKINGS[pack](list(map(len, before)), LENGTH + 1):
                fragments = [before[document][start:stop] for document, start, stop in row]
                free = LENGTH + 1 - sum(map(len, fragments))
                expected.append(fragments + [[256]] * free)
                padding += free
            found = rows_of(after)
            assert sorted(found) == sorted(expected)
            shuffled += found != expected
            documents += len(before)
            cut += sum(len(document) > LENGTH + 1 for document in before)
        found = report.splits[tmp_path / "rows" / split]
        assert (found.documents, found.cut_documents, found.padding_tokens) == (documents, cut, padding)
        assert cut > 3
    assert shuffled > 3, "rows must not be in the order of packing, with the full ones first"


def test_best_fit_fills_rows(corpus, tmp_path):
    report = build_shards([corpus], tmp_path / "rows", **SIZES, pack="best-fit", sequence_length=LENGTH)
    train = report.splits[tmp_path / "rows/train"]
    assert train.padding_tokens < 0.05 * train.manifest.totals["tokens"]


def test_bundles_end_where_rows_end(corpus, tmp_path):
    build_shards([corpus], tmp_path / "rows", **SIZES, pack="best-fit", sequence_length=LENGTH)
    for shard in sorted((tmp_path / "rows/train").glob("*.tar")):
        samples = webdataset.WebDataset(str(shard), shardshuffle=False).decode()
        *full, rest = [len(sample["tokens.npy"]) for sample in samples]
        assert set(full) == {325}
        assert rest in range(65, 326, 65)


def test_rows_are_the_same_for_any_workers_and_depend_on_the_seed(corpus, tmp_path):
    options = {**SIZES, "pack": "best-fit", "sequence_length": LENGTH}
    build_shards([corpus], tmp_path / "one", **options)
    build_shards([corpus], tmp_path / "two", **options, workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    build_shards([corpus], tmp_path / "seed", **options, seed=1)
    assert tree(tmp_path / "one") != tree(tmp_path / "seed")


def test_a_stream_gives_every_target_of_every_document_once(corpus, tmp_path):
    build_shards([corpus], tmp_path / "plain", **SIZES)
    build_shards([corpus], tmp_path / "rows", **SIZES, pack="best-fit", sequence_length=LENGTH)
    pairs = [
        pair
        for documents in shards_of(tmp_path / "plain/train")
        for document in documents
        for pair in itertools.pairwise(document)
    ]
    stream = open_stream(
        tmp_path / "rows/train",
        StreamConfig(
            vocab_size=257, sequence_length=LENGTH, seed=0, shuffle_shards=2, slots=4, document_mask=True, verify=True
        ),
    )
    found = []
    for number in range(stream.sequences_per_epoch):
        sequence = stream.sequence(number)
        inputs, targets = sequence.tokens_NL1[0, :-1], sequence.targets_NL[0]
        found += [(int(i), int(t)) for i, t in zip(inputs, targets) if t != IGNORED]
    assert sorted(found) == sorted(pairs)


def test_the_tool_prints_how_full_the_rows_are(corpus, tmp_path, capsys):
    tool = runpy.run_path(str(REPOSITORY / "tools/make_shards.py"))
    arguments = [corpus, "--output", tmp_path / "out", "--pack", "one-per-sequence", "--sequence-length", LENGTH]
    assert tool["main"](list(map(str, [*arguments, "--workers", 1]))) == 0
    output = capsys.readouterr().out
    manifest = read_manifest(tmp_path / "out/train")
    rows, tokens = manifest.totals["tokens"] // 65, manifest.totals["tokens"]
    assert f"{tokens:,} tokens of 400 documents" in output
    documents = [document for documents in shards_of(tmp_path / "out/train") for document in documents]
    filled = sum(len(document) for document in documents if document != [256])
    assert f"in {rows:,} rows of 65 tokens, {filled / tokens:.2%} filled; " in output
    assert "documents were cut because they are longer than a row" in output
    assert "data.sequence_length=64 model.vocab_size=257\n" in output
