"""Loss over token shards, computed as in validation during training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dcscale.data import BatchLoader, DataError, SequenceStream, StreamConfig, open_stream
from dcscale.data.storage import redact
from dcscale.evaluation.loading import ProgressCallback
from dcscale.evaluation.results import LossResult, loss_result
from dcscale.models import DCFormer


def open_shards(
    root: str, *, vocab_size: int, context: int, document_mask: bool, model_tokenizer: Mapping[str, Any] | None = None
) -> SequenceStream:
    """Opens shards as a stream of sequences in manifest order, as validation during training does.

    Args:
        root: folder or URL of shards, as ``data.validation``.
        vocab_size: of the model.
        context: tokens per sequence.
        document_mask: whether attention and targets stop at document boundaries.
        model_tokenizer: the entry ``tokenizer`` of the model's state, if it has one.

    Raises:
        DataError: the shards cannot be opened, do not fit the model, or were made with another tokenizer.
    """
    stream = open_stream(
        root,
        StreamConfig(
            vocab_size=vocab_size,
            sequence_length=context,
            seed=0,
            shuffle_shards=1,
            slots=1,
            shuffle=False,
            document_mask=document_mask,
            verify=True,
        ),
    )
    found = stream.tokenizer.fingerprint
    expected = (model_tokenizer or {}).get("fingerprint", found)
    if found != expected:
        raise DataError(
            f"{redact(root)}: the shards were made with the tokenizer with fingerprint {found}, but the model was "
            f"trained with {expected}: token ids would decode to different text; make shards with the model's tokenizer"
        )
    return stream


@torch.no_grad()
def evaluate_shards(
    model: DCFormer,
    stream: SequenceStream,
    *,
    batch_size: int,
    sequences: int | None = None,
    on_progress: ProgressCallback = lambda done, total: None,
) -> LossResult:
    """Mean loss over the sequences of an epoch.

    Args:
        model: the model.
        stream: from :func:`open_shards`.
        batch_size: sequences per forward pass.
        sequences: number of sequences to use, evenly spread, as ``validation.sequences``; None: all.
        on_progress: called with the number of finished sequences and of all sequences.

    Raises:
        DataError: a shard cannot be read, or the sequences have no targets.
        FloatingPointError: see :func:`loss_result`.
    """
    device = next(model.parameters()).device
    number = min(sequences or stream.sequences_per_epoch, stream.sequences_per_epoch)
    total = torch.zeros((), dtype=torch.float64, device=device)
    targets = done = 0
    loader = BatchLoader(
        stream,
        global_batch_size=batch_size,
        micro_batch_size=batch_size,
        rank=0,
        world_size=1,
        prefetch_steps=2,
        limit=number,
    )
    on_progress(0, number)
    with loader:
        for (batch,) in loader.steps():
            targets += batch.target_count
            batch = batch.to(device)
            total += model(batch.input_ids, batch.targets, batch.document_ids)
            done = min(done + batch_size, number)
            on_progress(done, number)
    name = str(stream.storage)
    if not targets:
        raise DataError(f"{name}: {number} of its sequences have no targets to predict; use more sequences")
    result = loss_result(name, float(total), targets, stream.text_bytes_per_target)
    return replace(result, sequences=number, of_sequences=stream.sequences_per_epoch)
