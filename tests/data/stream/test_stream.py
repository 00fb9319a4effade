"""Streams of sequences against a slow second implementation: lists of (token, document), read with webdataset."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import webdataset

from dcscale.data import DataError, StreamConfig, open_stream
from dcscale.data.shards.manifest import read_manifest
from dcscale.data.stream.order import Order, SinglePlanner
from dcscale.testing.runs import numbered_shards, write_token_shards

SIZES = {
    "odd shards": {"sizes": [60, 31, 47, 80, 5, 22, 41], "sequence_length": 8, "slots": 4, "shuffle_shards": 2},
    "shards smaller than a sequence": {
        "sizes": [7, 5, 6, 3, 9, 4],
        "sequence_length": 12,
        "slots": 2,
        "shuffle_shards": 2,
    },
    "one shard": {"sizes": [150], "sequence_length": 16, "slots": 3, "shuffle_shards": 8},
    "fewer sequences than slots": {"sizes": [30, 31], "sequence_length": 20, "slots": 48, "shuffle_shards": 1},
    "long documents": {"sizes": [90, 120, 70], "sequence_length": 8, "slots": 2, "shuffle_shards": 2, "longest": 60},
}


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def case(request, tmp_path):
    settings = dict(request.param)
    shards = numbered_shards(settings.pop("sizes"), longest=settings.pop("longest", 12))
    write_token_shards(tmp_path / "train", shards, vocab_size=5000)
    return tmp_path / "train", settings


def stream_of(folder, **changes):
    settings = {
        "vocab_size": 5000,
        "sequence_length": 8,
        "seed": 3,
        "shuffle_shards": 2,
        "slots": 4,
        "document_mask": True,
        "verify": True,
    }
    return open_stream(folder, StreamConfig(**{**settings, **changes}))


def slow_epoch(folder, stream, settings, epoch):
    """Every sequence of an epoch by number, as lists of (token, document), from webdataset's own decoding."""
    manifest = read_manifest(folder)
    order = Order(
        [shard.tokens for shard in manifest.shards],
        seed=3,
        sequence_length=settings["sequence_length"],
        shuffle_shards=settings["shuffle_shards"],
    )
    pairs, document, block = [], 0, 0
    while shards := order.shards((epoch, block)):
        documents = []
        for shard in shards:
            for sample in webdataset.WebDataset(str(folder / manifest.shards[shard].name), shardshuffle=False).decode():
                tokens = sample["tokens.npy"].tolist()
                for length in sample["lens.npy"].tolist():
                    documents.append(tokens[:length])
                    tokens = tokens[length:]
        for i in order.document_order((epoch, block), len(documents)).tolist():
            pairs += [(token, document) for token in documents[i]]
            document += 1
        block += 1
    numbers = epoch * order.sequences_per_epoch + np.arange(order.sequences_per_epoch)
    indices = SinglePlanner(order, settings["slots"]).locate(numbers).index_N.tolist()
    length = settings["sequence_length"]
    return [pairs[index * length : (index + 1) * length + 1] for index in indices]


@pytest.mark.parametrize("document_mask", [True, False])
def test_tokens_targets_and_document_ids_are_those_of_the_slow_implementation(case, document_mask):
    folder, settings = case
    stream = stream_of(folder, document_mask=document_mask, **settings)
    length = settings["sequence_length"]
    for epoch in range(2):
        for j, pairs in enumerate(slow_epoch(folder, stream, settings, epoch)):
            found = stream.sequence(epoch * stream.sequences_per_epoch + j)
            padding = length + 1 - len(pairs)
            assert found.tokens_NL1[0].tolist() == [token for token, _ in pairs] + [256] * padding
            targets = [
                token if here == there or not document_mask else -100
                for (_, here), (token, there) in itertools.pairwise(pairs)
            ]
            assert found.targets_NL[0].tolist() == targets + [-100] * padding
            if document_mask:
                ids, names = [], []
                for _, document in [*pairs, *[(256, -1)] * padding][:length]:
                    if document not in names:
                        names.append(document)
                    ids.append(names.index(document))
                assert found.document_ids_NL[0].tolist() == ids
            else:
                assert found.document_ids_NL is None
            assert found.tokens_NL1.dtype == found.targets_NL.dtype == np.int32


def test_every_target_occurs_exactly_once_per_epoch(case):
    folder, settings = case
    documents = slow_documents(folder)
    for document_mask in (True, False):
        stream = stream_of(folder, document_mask=document_mask, **settings)
        n = stream.sequences_per_epoch
        orders = []
        for epoch in range(3):
            rows = stream.sequences(range(epoch * n, (epoch + 1) * n))
            targets = rows.targets_NL[rows.targets_NL != -100].tolist()
            assert len(targets) == len(set(targets)) == stream.targets_per_epoch
            if document_mask:
                assert sorted(targets) == sorted(token for document in documents for token in document[1:])
                inputs = rows.tokens_NL1[:, :-1][rows.targets_NL != -100]
                assert (inputs + 1 == rows.targets_NL[rows.targets_NL != -100]).all(), (
                    "tokens of a document are consecutive"
                )
            else:
                everything = {token for document in documents for token in document}
                assert len(everything - set(targets)) == 1, "only the first token of the epoch is no target"
            orders.append(rows.tokens_NL1.tobytes())
        assert len(set(orders)) == 3, "epochs must differ in order"


def slow_documents(folder):
    documents = []
    for shard in read_manifest(folder).shards:
        for sample in webdataset.WebDataset(str(folder / shard.name), shardshuffle=False).decode():
            tokens = sample["tokens.npy"].tolist()
            for length in sample["lens.npy"].tolist():
                documents.append(tokens[:length])
                tokens = tokens[length:]
    return documents


def test_without_shuffle_documents_keep_the_manifests_order(case):
    folder, settings = case
    stream = stream_of(folder, shuffle=False, **settings)
    flat = [token for document in slow_documents(folder) for token in document]
    length = settings["sequence_length"]
    for g in range(2 * stream.sequences_per_epoch):
        index = g % stream.sequences_per_epoch
        expected = flat[index * length : (index + 1) * length + 1]
        assert stream.sequence(g).tokens_NL1[0, : len(expected)].tolist() == expected


def test_sequences_do_not_depend_on_what_was_read_before(case):
    folder, settings = case
    forward = stream_of(folder, **settings)
    count = 2 * forward.sequences_per_epoch
    rows = [forward.sequence(g).tokens_NL1.tobytes() for g in range(count)]
    backward = stream_of(folder, **settings)
    assert [backward.sequence(g).tokens_NL1.tobytes() for g in reversed(range(count))] == rows[::-1]


def test_none_is_padding_without_reading(tmp_path):
    write_token_shards(tmp_path, numbered_shards([50]), vocab_size=5000)
    stream = stream_of(tmp_path)
    rows = stream.sequences([None, None])
    assert (rows.targets_NL == -100).all()
    assert (rows.tokens_NL1 == 256).all()
    assert rows.padding_N.tolist() == [8, 8]
    assert stream.shards_read == 0


def test_memory_and_reading_stay_within_the_stated_bounds(tmp_path):
    """At most slots / gcd(slots, ranks) blocks held; each read once, and once more for each run that begins in it."""
    write_token_shards(tmp_path, numbered_shards([100] * 24), vocab_size=5000)
    slots, blocks = 6, 12
    for ranks in (1, 2, 3, 4, 6):
        read = 0
        for rank in range(ranks):
            stream = stream_of(tmp_path, slots=slots)
            held = 0
            for g in range(rank, stream.sequences_per_epoch, ranks):
                stream.sequence(g)
                held = max(held, len(stream.sources[0].blocks._prefetcher))
            assert held <= slots // math.gcd(slots, ranks)
            read += stream.shards_read / 2
        if slots % ranks == 0:
            assert read <= blocks + slots


def test_fingerprint_follows_order_and_data_and_nothing_else(tmp_path):
    write_token_shards(tmp_path / "a", numbered_shards([60, 60]), vocab_size=5000)
    write_token_shards(tmp_path / "b", numbered_shards([60, 60]), vocab_size=5000)
    write_token_shards(tmp_path / "c", numbered_shards([60, 60], seed=1), vocab_size=5000)
    base = stream_of(tmp_path / "a")
    assert stream_of(tmp_path / "b", verify=False, vocab_size=6000).fingerprint == base.fingerprint
    changes = [{"sequence_length": 9}, {"seed": 4}, {"shuffle_shards": 3}, {"slots": 5}]
    changes += [{"document_mask": False}, {"shuffle": False}]
    others = [stream_of(tmp_path / "a", **change) for change in changes] + [stream_of(tmp_path / "c")]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)
    for change, other in zip(changes, others):
        differing = {name for name in base.identity if base.identity[name] != other.identity[name]}
        assert set(change) <= differing, "the identity shows what differs"
    assert {name for name in base.identity if base.identity[name] != others[-1].identity[name]} == {"data"}
    assert json.loads(json.dumps(base.identity)) == base.identity


def test_bytes_per_target(tmp_path):
    manifest = write_token_shards(tmp_path, [[[1, 2, 256], [3, 256]], [[4, 5, 6, 256]]])
    masked = stream_of(tmp_path, vocab_size=257, sequence_length=2)
    assert manifest.totals["text_bytes"] == 9
    assert masked.targets_per_epoch == 6
    assert masked.text_bytes_per_target == 9 / 6
    assert stream_of(tmp_path, vocab_size=257, sequence_length=2, document_mask=False).targets_per_epoch == 8


def test_bytes_per_target_is_none_where_the_text_is_not_known(tmp_path):
    from dcscale.data.shards.manifest import write_manifest

    manifest = write_token_shards(tmp_path, [[[1, 2, 256]]])
    shards = tuple(dataclasses.replace(shard, text_bytes=0) for shard in manifest.shards)
    write_manifest(tmp_path, dataclasses.replace(manifest, shards=shards))
    assert stream_of(tmp_path, vocab_size=257, sequence_length=2).text_bytes_per_target is None


def test_data_shorter_than_a_sequence_is_refused(tmp_path):
    write_token_shards(tmp_path, [[[1, 2, 256]]])
    assert stream_of(tmp_path, sequence_length=2).sequences_per_epoch == 1
    with pytest.raises(DataError, match=r"totals\.tokens is 3, but a sequence takes .* 4; set .* at most 2"):
        stream_of(tmp_path, sequence_length=3)


def test_data_without_a_target_are_refused(tmp_path):
    write_token_shards(tmp_path, [[[256], [256], [256]]])
    assert stream_of(tmp_path, sequence_length=2, document_mask=False).targets_per_epoch == 2
    with pytest.raises(DataError, match=r"totals\.tokens is totals\.documents, 3: .*document_mask=false"):
        stream_of(tmp_path, sequence_length=2)


def test_vocabulary_larger_than_the_models_is_refused(tmp_path):
    write_token_shards(tmp_path, [[[1, 2, 256]]])
    stream_of(tmp_path, vocab_size=257, sequence_length=2)
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size is 257, but model\.vocab_size is 256.*at least 257"):
        stream_of(tmp_path, vocab_size=256, sequence_length=2)


@pytest.mark.parametrize("name", ["vocab_size", "sequence_length", "slots", "shuffle_shards"])
def test_sizes_below_one_are_refused(tmp_path, name):
    write_token_shards(tmp_path, [[[1, 2, 256]]])
    with pytest.raises(DataError, match=f"{name} is 0, but must be at least 1"):
        stream_of(tmp_path, **{name: 0})


def test_negative_numbers_are_refused(tmp_path):
    write_token_shards(tmp_path, numbered_shards([50]), vocab_size=5000)
    with pytest.raises(DataError, match="-1 must not be negative"):
        stream_of(tmp_path).sequence(-1)


def test_a_shard_that_comes_back_can_be_read_after_the_error(tmp_path):
    write_token_shards(tmp_path, numbered_shards([50]), vocab_size=5000)
    stream, shard = stream_of(tmp_path), tmp_path / "shard-000.tar"
    shard.rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(DataError, match=r"shard-000\.tar"):
            stream.sequence(0)
    (tmp_path / "away").rename(shard)
    assert stream.sequence(0).tokens_NL1.shape == (1, 9)
