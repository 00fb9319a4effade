"""Loss over token shards: the number that validation in training gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dcscale.data import BatchLoader, DataError, SequenceStream, StreamConfig, open_stream
from dcscale.data.storage import shown
from dcscale.evaluation.loading import Told
from dcscale.evaluation.results import Losses, losses
from dcscale.models import DCFormer


def open_shards(
    root: str, *, vocab_size: int, context: int, document_mask: bool, trained_with: Mapping[str, Any] | None = None
) -> SequenceStream:
    """Sequences of shards in the manifest's order, as validation in training has them.

    Args:
        root: folder of shards or its address, as ``data.validation``.
        vocab_size: the model's.
        context: tokens a sequence.
        document_mask: whether attention and targets stop at document bounds.
        trained_with: entry ``tokenizer`` of the model's state, where it has one.

    Raises:
        DataError: the shards cannot be opened, do not fit the model, or are another tokenizer's.
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
    wanted = (trained_with or {}).get("fingerprint", found)
    if found != wanted:
        raise DataError(
            f"{shown(root)}: its tokens are of the tokenizer with fingerprint {found}, but the model was trained with "
            f"{wanted}: the same token would mean another text; make shards with the model's tokenizer"
        )
    return stream


@torch.no_grad()
def evaluate_shards(
    model: DCFormer,
    stream: SequenceStream,
    *,
    batch_size: int,
    sequences: int | None = None,
    told: Told = lambda done, total: None,
) -> Losses:
    """Mean loss over the sequences of an epoch.

    Args:
        batch_size: sequences at once.
        sequences: use only so many, spread evenly, as ``validation.sequences`` does; None uses all.
        told: gets the sequences that are done, and all of them.

    Raises:
        DataError: a shard cannot be read, or there is nothing to predict in the sequences.
        FloatingPointError: see :func:`losses`.
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
    told(0, number)
    with loader:
        for (batch,) in loader.steps():
            targets += batch.target_count
            batch = batch.to(device)
            total += model(batch.input_ids, batch.targets, batch.document_ids)
            done = min(done + batch_size, number)
            told(done, number)
    name = str(stream.source)
    if not targets:
        raise DataError(f"{name}: there is nothing to predict in {number} of its sequences; use more of them")
    return losses(name, float(total), targets, stream.text_bytes_per_target)
