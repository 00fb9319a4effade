"""Converts a model folder: finds out what the source is, plans every tensor, and writes the result.

Only one tensor and one shard of the result are in memory at any time.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dcscale.checkpoint import CheckpointError, save_weights
from dcscale.checkpoint.layout import CONFIG, STATE, STATE_FORMAT, WEIGHTS, read_config, read_state, seal
from dcscale.checkpoint.probe import check_model
from dcscale.checkpoint.weights import SHARD_BYTES
from dcscale.config import Config, to_yaml
from dcscale.convert.detect import detect
from dcscale.convert.errors import ConversionError
from dcscale.convert.formats import FORMATS
from dcscale.convert.formats.huggingface import kept_files
from dcscale.convert.output import check_target
from dcscale.convert.tensor_files import TensorFiles, open_tensors
from dcscale.convert.tensor_map import (
    TOKENIZER,
    Imported,
    Plan,
    Source,
    check_dropped,
    check_names,
    mapping_lines,
    non_finite,
    same_names_plan,
)
from dcscale.files import replace_folder, write_atomically, write_json
from dcscale.models import DCFormer

_FORMAT_BY_NAME = {format.name: format for format in FORMATS}
TARGETS = ("dcscale", *(format.name for format in FORMATS if format.export is not None))
"""Formats that a model is converted to."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Conversion:
    """A conversion that was checked: names, shapes and settings match. Few tensors, if any, have been read.

    Attributes:
        source: what is converted.
        files: the source's tensors.
        target: one of ``TARGETS``.
        config: the model as dcscale describes it.
        plan: how the result's tensors are made.
        dtype: of the result's tensors; None keeps the type of each.
        state: content of a model folder's state.json.
        settings: content of config.json; None for a model folder, which has none.
        notes: what the user should know.
        extra_files: content of further text files of the result, by name.
    """

    source: Source
    files: TensorFiles
    target: str
    config: Config
    plan: Plan
    dtype: torch.dtype | None
    state: dict[str, Any]
    settings: dict[str, Any] | None
    notes: list[str]
    extra_files: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The notes, and what each tensor is made from."""
        shared = [f"shared in the file, written separately: {', '.join(names)}" for names in self.files.shared]
        return [*(f"note: {note}" for note in [*self.notes, *shared]), *mapping_lines(self.plan, self.files)]

    def write(self, target: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Writes the result; ``target`` stays as it was if this fails.

        Raises:
            ConversionError: values are not finite, or must not be dropped; a file of the tokenizer cannot be read; or
                the disk is full.
        """
        check_dropped(self.plan, self.files)
        tokenizer = (self.state.get("tokenizer") or {}).get("spec")
        keep = self.target == "dcscale" and tokenizer == TOKENIZER
        kept = kept_files(self.source.folder, self.source.settings) if keep else {}
        problems: list[str] = []
        with replace_folder(target) as folder:
            weights = folder / WEIGHTS if self.target == "dcscale" else folder
            try:
                save_weights(self._tensors(problems), weights, shard_bytes)
            except (OSError, SafetensorError) as error:  # the disk is full
                raise ConversionError(f"{target} cannot be written: {error}") from error
            self._raise_non_finite(problems)
            if (self.source.folder / TOKENIZER).is_file() and tokenizer != "byte":
                shutil.copyfile(self.source.folder / TOKENIZER, folder / TOKENIZER)
            for name, content in {**kept, **self.extra_files}.items():
                write_atomically(folder / name, content)
            if self.settings is not None:
                write_json(folder / "config.json", self.settings)
            else:
                write_json(folder / STATE, self.state)
                # If other code trained the model, only these settings are known: later config files set the others.
                known = ("model", "data.sequence_length", "train.precision")
                known = None if self.source.format == "dcscale" else known
                write_atomically(folder / CONFIG, to_yaml(self.config, known))
                seal(folder)

    def load(self, device: torch.device, dtype: torch.dtype | None = None) -> DCFormer:
        """The result as a model in eval mode on ``device``, without writing a folder; the target must be ``dcscale``.

        Needs memory for the model and one tensor.

        Args:
            dtype: of the parameters; None is the type it was trained in.

        Raises:
            ConversionError: values are not finite, or must not be dropped; or the logits differ from those that the
                checkpoint recorded in its probe.
        """
        check_dropped(self.plan, self.files)
        with torch.device("meta"):
            model = DCFormer(self.config.model)
        model = model.to(dtype or DTYPES[self.config.train.precision]).to_empty(device=device)
        if self.config.model.tied_embeddings:
            model.output.weight = model.embedding.weight  # to_empty has allocated them separately
        model = model.eval().requires_grad_(False)
        parameters = dict(model.named_parameters())
        problems: list[str] = []
        for name, tensor in self._tensors(problems):
            parameters[name].copy_(tensor)
        self._raise_non_finite(problems)
        if self.source.format == "dcscale":
            try:
                check_model(model, self.source.folder, next(model.parameters()).dtype, device)
            except CheckpointError as error:
                raise ConversionError(str(error)) from error
        return model

    def _tensors(self, problems: list[str]) -> Iterator[tuple[str, Tensor]]:
        """The result's tensors, one at a time; appends those that are not finite to ``problems``."""
        for rule in self.plan.rules:
            tensor = rule.apply(self.files.read)
            if self.dtype is not None:
                tensor = tensor.to(self.dtype)
            # After the cast, which may overflow.
            if (problem := non_finite(tensor)) is not None:
                problems.append(f"  - {rule.name}  <-  {', '.join(rule.sources)}: {problem}")
            yield rule.name, tensor

    def _raise_non_finite(self, problems: list[str]) -> None:
        if problems:
            raise ConversionError("\n".join([f"{self.files.source} has values that are not finite:", *problems]))


def prepare(path: Path, target: str, *, dtype: str | None = None, **options: Any) -> Conversion:
    """Finds out what is in ``path`` and checks how it becomes ``target``, one of ``TARGETS``. Writes nothing.

    Args:
        dtype: of the result, ``fp32`` or ``bf16``; None keeps the source's.
        options: the options of the source's format (``Format.options``); None for an option is the same as leaving it
            out.

    Raises:
        ConversionError: it cannot be converted; lists all problems with names, shapes and settings.
    """
    source = detect(path)
    if source.format == target != "dcscale":
        raise ConversionError(f"{source.description} already has the format {target}: convert it to dcscale")
    options = {name: value for name, value in options.items() if value is not None}
    _check_options(source, options)
    if source.format == "dcscale":
        return _from_dcscale(source, target, dtype)
    if target != "dcscale":
        raise ConversionError(
            f"{source.description} cannot be converted to {target} directly: convert it to dcscale first"
        )
    model = _FORMAT_BY_NAME[source.format].load(source, **options)
    check_names(model.plan, model.files)
    return _to_dcscale(source, model, dtype)


def convert(path: Path, target_folder: Path, target: str, *, overwrite: bool = False, **options: Any) -> Conversion:
    """:func:`prepare` and write."""
    check_target(path, target_folder, overwrite)
    conversion = prepare(path, target, **options)
    conversion.write(target_folder)
    return conversion


def _check_options(source: Source, options: dict[str, Any]) -> None:
    """Raises ConversionError for options of other formats than the source's."""
    unknown = options.keys() - {name for format in FORMATS for name in format.options}
    if unknown:
        raise TypeError(f"no format has the options {', '.join(sorted(unknown))}")
    own = _FORMAT_BY_NAME[source.format].options if source.format in _FORMAT_BY_NAME else ()
    if foreign := options.keys() - set(own):
        given = ", ".join("--" + name.replace("_", "-") for name in options if name in foreign)
        formats = " and ".join(format.name for format in FORMATS if foreign & set(format.options))
        raise ConversionError(
            f"{given}: only for {formats} models, but the source is a {source.description}; leave it out"
        )


def _from_dcscale(source: Source, target: str, dtype: str | None) -> Conversion:
    try:
        config, content = read_config(source.folder), read_state(source.folder)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    files = open_tensors(source.folder / WEIGHTS)
    tokenizer = content.get("tokenizer")
    if tokenizer is not None and not (isinstance(tokenizer, dict) and {"spec", "eos_id"} <= tokenizer.keys()):
        raise ConversionError(f"{source.folder / STATE} has a tokenizer without spec and eos_id: {tokenizer!r}")
    kept = {key: content[key] for key in ("step", "tokens", "versions", "tokenizer") if key in content}
    state = {"format": STATE_FORMAT, **kept}
    common = DTYPES[dtype] if dtype else None
    if target == "dcscale":
        plan = same_names_plan(config.model)
        check_names(plan, files)
        if dtype:
            config = replace(config, train=replace(config.train, precision=dtype))
        return Conversion(source, files, target, config, plan, common, state, None, [])
    # Other formats have one type for all tensors: one that holds the values of all.
    common = common or functools.reduce(torch.promote_types, files.dtypes.values())
    exported = _FORMAT_BY_NAME[target].export(config, common, tokenizer, source.folder / TOKENIZER)
    check_names(exported.plan, files)
    return Conversion(
        source, files, target, config, exported.plan, common, state, exported.settings, exported.notes, exported.files
    )


def _to_dcscale(source: Source, model: Imported, dtype: str | None) -> Conversion:
    config, files, plan = model.config, model.files, model.plan
    common = DTYPES[dtype] if dtype else None
    types = {common} if common else {files.dtypes[name] for rule in plan.rules for name in rule.sources}
    config.train.precision = "bf16" if types == {torch.bfloat16} else "fp32"
    extra_files = {} if (source.folder / TOKENIZER).is_file() else dict(model.tokenizer_files)
    state, notes = _new_state(source, model)
    return Conversion(source, files, "dcscale", config, plan, common, state, None, [*model.notes, *notes], extra_files)


def _new_state(source: Source, model: Imported) -> tuple[dict[str, Any], list[str]]:
    """state.json of a model that other code trained: only its tokenizer is known. Also returns notes."""
    state: dict[str, Any] = {"format": STATE_FORMAT, "step": 0, "tokens": 0}
    eos = source.settings.get("eos_token_id") if model.eos_id is None else model.eos_id
    if isinstance(eos, list) and eos:
        eos = eos[0]  # the first ends a document, the others end a turn of a conversation
    # Some write -1 for none.
    known = type(eos) is int and eos >= 0
    if known and model.byte_tokens:
        state["tokenizer"] = {"spec": "byte", "eos_id": eos}
    elif known and (model.tokenizer_files or (source.folder / TOKENIZER).is_file()):
        state["tokenizer"] = {"spec": TOKENIZER, "eos_id": eos}
    else:
        return state, [f"no {TOKENIZER} with an eos_token_id: name a tokenizer for texts with --tokenizer"]
    return state, []
