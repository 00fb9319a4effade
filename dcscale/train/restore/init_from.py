"""Weights that a new run begins with, where ``checkpoint.init_from`` names some."""

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
from dcscale.train.restore.resume import MODEL_FIELDS_WITHOUT_WEIGHT

_WITHOUT_MEANING = (*MODEL_FIELDS_WITHOUT_WEIGHT, "model.compose.gate_init")
"""Settings of the model that say nothing about what weights mean that are there already."""


@dataclass(frozen=True)
class InitialWeights(SavedState):
    """The state of a run that has not made a step, for :meth:`dcscale.parallel.Engine.load`.

    Its float32 weights are those of the source, also where the model computes in bfloat16.
    """

    source: Path
    """The checkpoint or model folder."""
    weights: Weights
    warnings: list[str]
    """In what the source and the run differ that may be meant."""
    steps: int = 0

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """They were checked when ``weights`` was made."""

    def fill(self, targets: Mapping[tuple[str, str], tuple[int, Tensor]]) -> None:
        """Copies weights; moments are zero."""
        for (name, kind), (start, target) in targets.items():
            if kind != MASTER:
                target.zero_()
            elif target.numel():
                target.copy_(self.weights.read(name).flatten()[start : start + target.numel()])


def initial_weights(config: Config, tokenizer: TokenizerInfo, rank: int = 0, ranks: int = 1) -> InitialWeights:
    """What ``checkpoint.init_from`` names, for the model of ``config`` and data of ``tokenizer``.

    Nothing is loaded yet, but a rank compares the checksums of its share of the files.

    Raises:
        CheckpointError: it is not there or damaged, its weights do not fit the model, or its tokens mean other texts.
    """
    try:
        source = find_checkpoint(Path(config.checkpoint.init_from))
        there, state = read_config(source), read_state(source)
    except CheckpointError as error:
        raise CheckpointError(
            f"checkpoint.init_from: {error}. A model of others is converted first, by tools/convert_checkpoint.py"
        ) from error
    if problem := corrupt_reason(source, left_out=OPTIMIZER, rank=rank, ranks=ranks):
        raise CheckpointError(f"checkpoint.init_from: {problem}; copy it again, or name another")
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in DCFormer(config.model).named_parameters()}
    try:
        weights = Weights(source / WEIGHTS, shapes)
    except CheckpointError as error:
        raise CheckpointError(
            f"checkpoint.init_from: {error}. Begin with the settings under model in {source / CONFIG}"
        ) from error
    warnings = [
        f"{path} is {show(value)} in {source} and {show(here)} here: the weights fit, but were trained with the former"
        for path, value, here in differences(there, config)
        if path.startswith("model.") and path not in _WITHOUT_MEANING
    ]
    known = state.get("tokenizer") or {}
    fingerprint = _fingerprint(source, known)
    if fingerprint is None:
        warnings.append(f"{source} does not say which tokenizer it was trained with: it should be that of the data")
    elif fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"checkpoint.init_from: {source} was trained with another tokenizer (SHA-256 {fingerprint[:16]}...) than "
            f"that of the data ({tokenizer.fingerprint[:16]}...): the same token would mean another text. Make the "
            f"shards with tools/make_shards.py --tokenizer {_spec(source, known)}"
        )
    elif known["eos_id"] != tokenizer.eos_id:
        warnings.append(
            f"a document ends with token {known['eos_id']} for {source}, with {tokenizer.eos_id} in the data"
        )
    return InitialWeights(source, weights, warnings)


def init_from_changes(began_with: str | None, init_from: str | None) -> list[str]:
    """In words, that a run which goes on began with other weights than ``checkpoint.init_from`` names now."""
    if init_from is None:
        return []
    if began_with is not None and Path(init_from).resolve() in (Path(began_with), *Path(began_with).parents):
        return []
    there = "random weights" if began_with is None else f"the weights of {began_with}"
    return [f"this run began with {there}; checkpoint.init_from is only read when a run begins"]


def _spec(source: Path, known: dict[str, Any]) -> str:
    return "byte" if known.get("spec") == "byte" else str(source / TOKENIZER_NAME)


def _fingerprint(source: Path, known: dict[str, Any]) -> str | None:
    """Of the tokenizer that the model's state names, as in manifests of shards; None where there is none."""
    if not known:
        return None
    if known["spec"] == "byte":
        return ByteTokenizer.fingerprint
    try:
        return hashlib.sha256((source / TOKENIZER_NAME).read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"checkpoint.init_from: {source / TOKENIZER_NAME} cannot be read: {error}") from error
