"""From a folder to a folder: what the source is, what becomes of each tensor, and the writing of it.

Only one tensor and one shard of the result are in memory at any time.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dcscale.checkpoint import CheckpointError, save_weights
from dcscale.checkpoint.contents import read_config, read_state
from dcscale.checkpoint.layout import CONFIG, STATE, STATE_FORMAT, WEIGHTS, seal
from dcscale.checkpoint.weights import SHARD_BYTES
from dcscale.config import Config, to_yaml
from dcscale.config.schema import ModelConfig
from dcscale.convert import huggingface, upstream, upstream_config
from dcscale.convert.errors import ConversionError
from dcscale.convert.folder import check_target, new_folder
from dcscale.convert.formats import Found, detect
from dcscale.convert.recipe import Plan, Recipe, check_left_out, check_names, non_finite, table
from dcscale.convert.tensors import TensorFiles, open_tensors
from dcscale.files import write_atomically, write_json

FORMATS = ("dcscale", "upstream", "huggingface")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Conversion:
    """A conversion whose names, shapes and settings fit; no tensor has been read but to find out which are trained."""

    found: Found
    files: TensorFiles
    target: str
    config: Config
    plan: Plan
    dtype: torch.dtype | None
    state: dict[str, Any]
    """Content of a model folder's state.json."""
    settings: dict[str, Any] | None
    """Content of config.json, where the target has one."""
    notes: list[str]
    beside: dict[str, str] = field(default_factory=dict)
    """Texts of other files of the result, by name."""

    def lines(self) -> list[str]:
        """What a person should know, and the mapping."""
        shared = [f"shared in the file, written one by one: {', '.join(names)}" for names in self.files.shared]
        return [*(f"note: {note}" for note in [*self.notes, *shared]), *table(self.plan, self.files)]

    def write(self, target: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Writes the result. Raises ConversionError for values that are not finite or may not be left out."""
        check_left_out(self.plan, self.files)
        problems: list[str] = []
        with new_folder(target) as folder:
            at = folder / WEIGHTS if self.target == "dcscale" else folder
            try:
                save_weights(self._tensors(problems), at, shard_bytes)
            except SafetensorError as error:  # what a full disk ends in
                raise ConversionError(f"{target} cannot be written: {error}") from error
            if problems:
                raise ConversionError("\n".join([f"{self.files.source} has values that are not finite:", *problems]))
            byte_tokens = (self.state.get("tokenizer") or {}).get("spec") == "byte"
            if (self.found.folder / _TOKENIZER).is_file() and not byte_tokens:
                shutil.copyfile(self.found.folder / _TOKENIZER, folder / _TOKENIZER)
            for name, content in self.beside.items():
                write_atomically(folder / name, content)
            if self.settings is not None:
                write_json(folder / "config.json", self.settings)
            else:
                write_json(folder / STATE, self.state)
                write_atomically(folder / CONFIG, to_yaml(self.config))
                seal(folder)

    def _tensors(self, problems: list[str]) -> Iterator[tuple[str, Tensor]]:
        for recipe in self.plan.recipes:
            tensor = recipe.cook(self.files.read)
            if self.dtype is not None:
                tensor = tensor.to(self.dtype)
            if (problem := non_finite(tensor)) is not None:
                problems.append(f"  - {recipe.name}  <-  {', '.join(recipe.sources)}: {problem}")
            yield recipe.name, tensor


def prepare(
    source: Path,
    target: str,
    *,
    dtype: str | None = None,
    truth: str | None = None,
    gelu: str | None = None,
    local_keys: int | None = None,
) -> Conversion:
    """Finds out what ``source`` is and how it becomes ``target``, one of ``FORMATS``.

    Args:
        dtype: of the result, ``fp32`` or ``bf16``; None keeps the source's.
        truth: ``original`` or ``merged`` instead of what upstream's tensors say, see :func:`upstream.find_truth`.
        gelu, local_keys: instead of what is known of an upstream folder, see :func:`read_upstream`.

    Raises:
        ConversionError: it cannot be; everything in the way is listed.
    """
    found = detect(source)
    if found.kind == target != "dcscale":
        raise ConversionError(f"{found.words} is what it shall become: convert it to dcscale")
    if found.kind != "dcscale" and target != "dcscale":
        raise ConversionError(f"{found.words} becomes {target} by way of dcscale only: convert it to dcscale first")
    if found.kind == "upstream":
        return _from_upstream(found, dtype, truth, gelu, local_keys)
    given = {"truth": truth, "gelu": gelu, "local_keys": local_keys}
    if any(value is not None for value in given.values()):
        names = ", ".join(name for name, value in given.items() if value is not None)
        raise ConversionError(f"{names} is only for upstream folders, but the source is a {found.words}")
    return (_from_huggingface if found.kind == "huggingface" else _from_dcscale)(found, target, dtype)


def convert(source: Path, target_folder: Path, target: str, *, overwrite: bool = False, **options: Any) -> Conversion:
    """:func:`prepare` and write."""
    check_target(source, target_folder, overwrite)
    conversion = prepare(source, target, **options)
    conversion.write(target_folder)
    return conversion


def _from_dcscale(found: Found, target: str, dtype: str | None) -> Conversion:
    try:
        config, content = read_config(found.folder), read_state(found.folder)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    files = open_tensors(found.folder / WEIGHTS)
    tokenizer = content.get("tokenizer")
    if tokenizer is not None and not (isinstance(tokenizer, dict) and {"spec", "eos_id"} <= tokenizer.keys()):
        raise ConversionError(f"{found.folder / STATE} has a tokenizer without spec and eos_id: {tokenizer!r}")
    settings, notes, beside = None, [], {}
    if target == "huggingface":
        common = DTYPES[dtype] if dtype else functools.reduce(torch.promote_types, files.dtypes.values())
        plan = _same_names(config.model)
        settings = huggingface.write_settings(config, str(common).removeprefix("torch."), tokenizer)
        beside, about = huggingface.files_beside(config, tokenizer, found.folder / _TOKENIZER)
        notes += about
    elif target == "upstream":
        written = upstream_config.write_upstream(config)
        common = DTYPES[dtype] if dtype else functools.reduce(torch.promote_types, files.dtypes.values())
        plan = upstream.plan_export(config.model, common)
        name = str(common).removeprefix("torch.")
        settings = upstream_config.upstream_settings(written, name, tokenizer)
        notes += written.notes
    else:
        common = DTYPES[dtype] if dtype else None
        plan = _same_names(config.model)
        if dtype:
            config = replace(config, train=replace(config.train, precision=dtype))
    check_names(plan, files)
    kept = {key: content[key] for key in ("step", "tokens", "versions", "tokenizer") if key in content}
    state = {"format": STATE_FORMAT, **kept}
    return Conversion(found, files, target, config, plan, common, state, settings, notes, beside)


def _same_names(model: ModelConfig) -> Plan:
    shapes = upstream.parameter_shapes(model)
    return Plan([Recipe(name, (name,)) for name in shapes], shapes, {})


def _from_huggingface(found: Found, target: str, dtype: str | None) -> Conversion:
    files = open_tensors(found.folder)
    config = huggingface.read_settings(found.settings)
    if config.model.layers > len(files.shapes):
        raise ConversionError(f"layers is {config.model.layers}, but {files.source} has {len(files.shapes)} tensors")
    plan = _same_names(config.model)
    check_names(plan, files)
    common = DTYPES[dtype] if dtype else None
    types = {common} if common else set(files.dtypes.values())
    config.train.precision = "bf16" if types == {torch.bfloat16} else "fp32"
    state, notes = _state(found, found.settings)
    return Conversion(found, files, target, config, plan, common, state, None, notes)


def _from_upstream(
    found: Found, dtype: str | None, truth: str | None, gelu: str | None, local_keys: int | None
) -> Conversion:
    files = open_tensors(found.folder)
    decided, why = upstream.find_truth(files)
    truth = truth or decided
    notes = [f"trained tensors of compose: {truth}, " + (why if truth == decided else f"as asked, though {why}")]
    settings = found.settings
    layers = settings.get("n_layer")
    if type(layers) is int and layers > len(files.shapes):
        raise ConversionError(f"n_layer is {layers}, but {files.source} has only {len(files.shapes)} tensors")
    if truth == "merged" and gelu is None:
        gelu = "erf"
        notes.append("GELU of the compose projection: erf, as in upstream's PyTorch code (--gelu says otherwise)")
    window = settings.get("window_size", 256)
    if truth == "merged" and local_keys is None and settings["model_type"] == "dcformer" and type(window) is int:
        local_keys = window + 1
        notes.append(
            f"windows: {local_keys} keys, as upstream's PyTorch training shows one more than window_size "
            "(--local-keys says otherwise)"
        )
    tied = _tied(settings, files)
    if settings.get("tie_word_embeddings") is True and not tied:
        notes.append("tie_word_embeddings is set, but output.weight differs from the embedding: they are not tied here")
    read = upstream_config.read_upstream(settings, tied=tied, gelu=gelu, local_keys=local_keys)
    query_wise = settings.get("query_wise") is True
    plan = upstream.plan_import(read.config.model, files.shapes, truth or "original", query_wise)
    check_names(plan, files)
    if truth is None:
        raise ConversionError(
            f"{files.source} does not say whether dw1, dd, qkw or dw_m, qkw_m were trained: {why}; say so with "
            "--from-copies merged or original"
        )
    common = DTYPES[dtype] if dtype else None
    types = {common} if common else set(files.dtypes.values())
    config = read.config
    config.train.precision = "bf16" if types == {torch.bfloat16} else "fp32"
    state, tokenizer_notes = _state(found, settings)
    notes += [*read.notes, *tokenizer_notes]
    return Conversion(found, files, "dcscale", config, plan, common, state, None, notes)


def _tied(settings: Mapping[str, Any], files: TensorFiles) -> bool:
    if settings.get("tie_word_embeddings") is not True:
        return False
    if "output.weight" not in files.shapes or "tok_embeddings.weight" not in files.shapes:
        return True
    return torch.equal(files.read("output.weight"), files.read("tok_embeddings.weight"))


def _state(found: Found, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The state of a model from elsewhere: nothing but its tokenizer is known."""
    state: dict[str, Any] = {"format": STATE_FORMAT, "step": 0, "tokens": 0}
    eos, beyond = settings.get("eos_token_id"), settings.get("dcscale", {})
    if type(eos) is int and beyond.get("tokenizer") == "byte":
        state["tokenizer"] = {"spec": "byte", "eos_id": eos}
    elif type(eos) is int and (found.folder / _TOKENIZER).is_file():
        state["tokenizer"] = {"spec": _TOKENIZER, "eos_id": eos}
    else:
        return state, [f"no {_TOKENIZER} with an eos_token_id: tools/generate.py cannot use the result"]
    return state, []
