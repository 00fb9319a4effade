"""Initial weights of a new run from another model (``checkpoint.init_from``)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcscale.checkpoint import CheckpointError, Weights, find_checkpoint
from dcscale.checkpoint.layout import CONFIG, OPTIMIZER, WEIGHTS, corrupt_reason, read_config, read_state
from dcscale.config import Config, differences
from dcscale.config.errors import show
from dcscale.data.shards.manifest import TokenizerInfo
from dcscale.data.tokenizers import TOKENIZER_NAME, ByteTokenizer
from dcscale.models import DCFormer
from dcscale.parallel.zero_state import MASTER, SavedState
from dcscale.train.restore.resume import COMPUTE_ONLY_MODEL_FIELDS

_FIELDS_THAT_MAY_DIFFER = (*COMPUTE_ONLY_MODEL_FIELDS, "model.compose.gate_init")
"""Fields of the model section that do not change what existing weights compute, so differences are not reported."""


@dataclass(frozen=True)
class InitialWeights(SavedState):
    """The training state of a run before its first step, for :meth:`dcscale.parallel.Engine.load`.

    The float32 weights are the source's values, also if the model computes in bfloat16.
    """

    source: Path
    """The checkpoint or model folder that the weights are from."""
    weights: Weights
    warnings: list[str]
    """Differences between source and run that may be intended."""
    steps: int = 0

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Nothing to do: creating ``weights`` checked the shapes."""

    def fill(self, targets: Mapping[tuple[str, str], tuple[int, Tensor]]) -> None:
        """Copies the weights; the Adam moments are zero."""
        for (name, kind), (start, target) in targets.items():
            if kind != MASTER:
                target.zero_()
            elif target.numel():
                target.copy_(self.weights.read(name).flatten()[start : start + target.numel()])


def initial_weights(
    config: Config, tokenizer: TokenizerInfo | None, rank: int = 0, ranks: int = 1, verify: bool = True
) -> InitialWeights:
    """Opens the model that ``checkpoint.init_from`` names and checks that it fits the run. Loads no weights yet.

    Args:
        config: the settings of the run.
        tokenizer: of the training data; None is not compared.
        rank: with ``ranks``, selects the share of the files whose checksums this rank verifies.
        ranks: number of shares.
        verify: False compares the sizes of the files only, not their checksums.

    Raises:
        CheckpointError: the model is missing or corrupt, its weights do not fit the config, or its tokenizer differs.
    """
    try:
        source = find_checkpoint(Path(config.checkpoint.init_from))
        source_config, state = read_config(source), read_state(source)
    except CheckpointError as error:
        raise CheckpointError(
            f"checkpoint.init_from: {error}. Convert models of other formats first, with tools/convert_checkpoint.py"
        ) from error
    if verify and (problem := corrupt_reason(source, skip=OPTIMIZER, rank=rank, ranks=ranks)):
        raise CheckpointError(f"checkpoint.init_from: {problem}; copy it again, or name another model")
    # The meta device gives the shapes without allocating the model.
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in DCFormer(config.model).named_parameters()}
    try:
        weights = Weights(source / WEIGHTS, shapes)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint.init_from: {error}. Use the model settings of {source / CONFIG}") from error
    warnings = [
        f"{path} is {show(saved)} in {source} and {show(current)} in this run: the weights fit, but were trained with "
        "the former"
        for path, saved, current in differences(source_config, config)
        if path.startswith("model.") and path not in _FIELDS_THAT_MAY_DIFFER
    ]
    lengths = source_config.data.sequence_length, config.data.sequence_length
    if (source / OPTIMIZER).is_dir() and lengths[0] < lengths[1]:  # a model folder does not record its length
        warnings.append(
            f"{source} was trained on sequences of {lengths[0]} tokens and data.sequence_length is {lengths[1]}: "
            "positions beyond the former are new to it; model.rope_base or model.rope_scaling may help"
        )
    if tokenizer is None:
        return InitialWeights(source, weights, warnings)
    known = state.get("tokenizer") or {}
    fingerprint = _fingerprint(source, known)
    if fingerprint is None:
        warnings.append(f"{source} does not record its tokenizer: make sure that the data have the same one")
    elif fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"checkpoint.init_from: {source} was trained with another tokenizer (SHA-256 {fingerprint[:16]}...) than "
            f"that of the data ({tokenizer.fingerprint[:16]}...): token ids would decode to different text. Make the "
            f"shards with tools/make_shards.py --tokenizer {_spec(source, known)}"
        )
    elif known["eos_id"] != tokenizer.eos_id:
        warnings.append(
            f"the end-of-document token is {known['eos_id']} in {source} and {tokenizer.eos_id} in the data"
        )
    return InitialWeights(source, weights, warnings)


def _spec(source: Path, known: dict[str, Any]) -> str:
    return "byte" if known.get("spec") == "byte" else str(source / TOKENIZER_NAME)


def _fingerprint(source: Path, known: dict[str, Any]) -> str | None:
    """SHA-256 of the tokenizer that the model's state names, as in shard manifests; None if it names none."""
    if not known:
        return None
    if known["spec"] == "byte":
        return ByteTokenizer.fingerprint
    try:
        return hashlib.sha256((source / TOKENIZER_NAME).read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"checkpoint.init_from: {source / TOKENIZER_NAME} cannot be read: {error}") from error
