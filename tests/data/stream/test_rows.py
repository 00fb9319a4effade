"""Shards of packed rows: a row is a sequence, its documents are complete where they fit, and only rows are shuffled."""

import itertools

import pytest
import torch

from dcscale.data import BatchLoader, DataError, StreamConfig, open_stream
from dcscale.data.prepare.packing import pack_best_fit, pack_one_per_row
from dcscale.data.shards.shard import read_shard
from dcscale.testing.runs import numbered_shards, packed_shards, write_token_shards

ROW = 9
FILLER = 5000


def stream_of(folder, **changes):
    settings = {"sequence_length": ROW - 1, "seed": 3, "shuffle_shards": 2, "slots": 4, "document_mask": True}
    return open_stream(folder, StreamConfig(**{"vocab_size": 6000, "verify": True, **settings, **changes}))


@pytest.fixture(params=[pack_best_fit, pack_one_per_row], ids=["best fit", "one a row"])
def case(request, tmp_path):
    """(folder of packed shards, documents before packing); no document's token is the filler."""
    shards = numbered_shards([60, 31, 47, 80, 5, 22, 41], longest=20)
    packed = packed_shards(shards, ROW, request.param, eos_id=FILLER)
    write_token_shards(tmp_path / "rows", packed, vocab_size=6000, row_tokens=ROW)
    return tmp_path / "rows", list(itertools.chain(*shards))


def test_every_sequence_is_a_row_of_the_shards_and_each_row_occurs_once_per_epoch(case):
    folder, _ = case
    stream = stream_of(folder)
    flat = []
    for info in stream.manifest.shards:
        flat += itertools.chain(
            *(d.tolist() for d in read_shard(stream.storage, info, dtype="uint16", vocab_size=6000, verify=True))
        )
    rows = sorted(flat[i : i + ROW] for i in range(0, len(flat), ROW))
    n = stream.sequences_per_epoch
    assert len(rows) == n
    epochs = [stream.sequences(range(e * n, (e + 1) * n)).tokens_NL1.tolist() for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [rows] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    unshuffled = stream_of(folder, shuffle=False)
    assert unshuffled.sequences(range(n, 2 * n)).tokens_NL1.reshape(-1).tolist() == flat


def test_every_target_of_every_document_occurs_exactly_once_and_fillers_never(case):
    folder, documents = case
    stream = stream_of(folder)
    found = stream.sequences(range(stream.sequences_per_epoch))
    counts = found.targets_NL != -100
    assert sorted(found.targets_NL[counts].tolist()) == sorted(t for document in documents for t in document[1:])
    assert counts.sum() == stream.targets_per_epoch
    inputs, ids = found.tokens_NL1[:, :-1], found.document_ids_NL
    assert (found.targets_NL[counts] == inputs[counts] + 1).all(), "a target follows its input in its document"
    same_document = ids[:, 1:] == ids[:, :-1]
    assert (counts[:, :-1] == same_document).all(), "ids change where a document begins, also between fillers"


@pytest.mark.parametrize("pack", [pack_best_fit, pack_one_per_row])
def test_what_fills_rows_is_counted_as_padding(tmp_path, pack):
    shards = [[[7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 256], [1, 256]], [[256], list(range(11))]]
    write_token_shards(tmp_path, packed_shards(shards, ROW, pack), row_tokens=ROW)
    stream = stream_of(tmp_path, vocab_size=257)
    found = stream.sequences([*range(stream.sequences_per_epoch), None])
    # Inputs of text in a row, by its first two tokens. A document of one token has no target, like a filler.
    inputs_of_text = {(7, 8): 5 if pack is pack_best_fit else 3, (1, 2): 8, (1, 256): 2, (0, 1): 8, (8, 9): 3}
    inputs_of_text |= {(256, 8): 3, (256, 256): 0}
    rows = found.tokens_NL1.tolist()
    assert found.padding_N.tolist() == [8 - inputs_of_text[tuple(row[:2])] for row in rows]
    assert found.padding_N.sum() == (16 if pack is pack_best_fit else 32)
    sizes = {"global_batch_size": len(rows), "micro_batch_size": 1, "rank": 0, "world_size": 1, "limit": 99}
    (batches,) = BatchLoader(stream, **sizes).steps()
    assert sum(batch.padding_count for batch in batches) == found.padding_N.sum()
    assert batches[-1].to(torch.device("meta")).padding_count == 8


def test_best_fit_keeps_documents_that_fit_in_one_row(tmp_path):
    shards = numbered_shards([200, 200], longest=ROW)
    write_token_shards(tmp_path, packed_shards(shards, ROW, eos_id=FILLER), vocab_size=6000, row_tokens=ROW)
    rows = stream_of(tmp_path).sequences(range(stream_of(tmp_path).sequences_per_epoch)).tokens_NL1.tolist()
    assert all(any(set(document) <= set(row) for row in rows) for document in itertools.chain(*shards))


def test_rows_of_another_length_are_refused(case):
    with pytest.raises(
        DataError, match=r"row_tokens is 9, but .* \+ 1, 8; set data\.sequence_length to 8, or .*-length 7"
    ):
        stream_of(case[0], sequence_length=7)


def test_rows_without_the_document_mask_are_refused(case):
    with pytest.raises(DataError, match=r"row_tokens is 9: .*set data\.document_mask=true"):
        stream_of(case[0], document_mask=False)


def test_a_document_across_rows_is_refused(tmp_path):
    write_token_shards(tmp_path, [[[1] * 6, [2] * 6, [3] * 6]], row_tokens=ROW)
    with pytest.raises(DataError, match=r"shard-000\.tar: a document extends past the end of a row"):
        stream_of(tmp_path).sequence(0)
