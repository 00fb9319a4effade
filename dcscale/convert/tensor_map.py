"""What a format declares (``Format``), and how each tensor of a result is made from tensors of the source (``Plan``).

Everything here works on names, shapes and settings, before any tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcscale.config import Config, ConfigError, check_config, from_dict
from dcscale.config.schema import ModelConfig
from dcscale.convert.errors import ConversionError
from dcscale.convert.tensor_files import WEIGHT_DTYPES, TensorFiles
from dcscale.files import read_json
from dcscale.models import DCFormer

TOKENIZER = "tokenizer.json"
"""Name of the tokenizer's file, in every format."""


@dataclass(frozen=True)
class TensorRule:
    """Makes the tensor ``name`` of the result from the tensors ``sources``, given to ``make`` in this order."""

    name: str
    sources: tuple[str, ...]
    how: str = ""
    """What ``make`` does, for the listing."""
    rows: tuple[int, int] | None = None
    """First row and end of the rows that are read from the only source; None reads all."""
    make: Callable[..., Tensor] | None = None
    """None keeps the only source unchanged."""

    def apply(self, read: Callable[[str, tuple[int, int] | None], Tensor]) -> Tensor:
        tensors = [read(source, self.rows) for source in self.sources]
        # Contiguous, because safetensors writes nothing else.
        return tensors[0] if self.make is None else self.make(*tensors).contiguous()


@dataclass(frozen=True)
class DroppedTensor:
    """A tensor that the source may have and the result does not need.

    ``requirement``: what its values must satisfy to be dropped, as (what is wrong if they do not, test).
    """

    reason: str
    requirement: tuple[str, Callable[[Tensor], bool]] | None = None


@dataclass(frozen=True)
class Plan:
    """Everything about a conversion's tensors except their values."""

    rules: Sequence[TensorRule]
    expected: Mapping[str, tuple[int, ...]]
    """Shapes of all tensors that the source may have."""
    dropped: Mapping[str, DroppedTensor]


@dataclass(frozen=True)
class Source:
    """What :func:`dcscale.convert.detect.detect` found.

    Attributes:
        format: ``dcscale``, or the name of a ``Format``.
        folder: the folder with the model's files; for a GGUF file, it or its folder.
        description: what it is, for messages.
        settings: content of config.json, where the format has one.
    """

    format: str
    folder: Path
    description: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Imported:
    """A source as a model of dcscale: ``config`` describes it, ``plan`` makes its tensors from ``files``."""

    files: TensorFiles
    config: Config
    plan: Plan
    notes: list[str]
    """What the user should know."""
    byte_tokens: bool = False
    """Whether its tokens are the bytes of UTF-8, so that no tokenizer file is needed."""
    eos_id: int | None = None
    """Token that ends a document; None is ``eos_token_id`` of config.json."""
    tokenizer_files: Mapping[str, str] = field(default_factory=dict)
    """tokenizer.json and others by name, if the source has its tokenizer in another form."""


@dataclass(frozen=True)
class Exported:
    """A model of dcscale in another format."""

    plan: Plan
    settings: dict[str, Any]
    """Content of config.json."""
    notes: list[str]
    """What the user should know."""
    files: dict[str, str] = field(default_factory=dict)
    """Content of further text files, by name."""


@dataclass(frozen=True)
class Format:
    """A format that models are converted from and, if it has ``export``, to. ``formats/__init__.py`` lists them all.

    Attributes:
        name: as in ``--to`` and ``Source.format``.
        looks_for: what ``detect`` looks for in a folder, for the message if no format matches.
        detect: the source in this folder; None if it is not of this format.
        load: called as ``load(source, **options)``. Raises ConversionError if a setting has no counterpart in dcscale.
        options: names of the keyword arguments of ``load``; ``local_keys`` is ``--local-keys`` on the command line.
            Those that belong to every tool that reads models are defined in ``dcscale.cli.SOURCE_OPTIONS``.
        export: called as ``export(config, dtype, tokenizer, tokenizer_file)``: the model's config, the type of the
            result's tensors, the tokenizer of state.json or None, and where tokenizer.json is, if there is one.
            Raises ConversionError if the format cannot represent the model.
        files: names of the files that ``export`` writes besides config.json and the tensors.
    """

    name: str
    looks_for: str
    detect: Callable[[Path], Source | None]
    load: Callable[..., Imported]
    options: tuple[str, ...] = ()
    export: Callable[[Config, torch.dtype, Mapping[str, Any] | None, Path], Exported] | None = None
    files: tuple[str, ...] = ()


def read_config_json(folder: Path) -> dict[str, Any]:
    """Content of ``config.json``; empty if there is none.

    Raises:
        ConversionError: it cannot be read, or is not a JSON object.
    """
    config = folder / "config.json"
    if not config.is_file():
        return {}
    return read_json(config, ConversionError)


def model_type_of(settings: Mapping[str, Any], known: Collection[str]) -> str | None:
    """``model_type`` of a config.json, if it is one of ``known``."""
    model_type = settings.get("model_type")
    return model_type if isinstance(model_type, str) and model_type in known else None


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of dcscale's model."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in DCFormer(config).named_parameters()}


def same_names_plan(config: ModelConfig) -> Plan:
    """The plan for a source whose tensors are those of dcscale's model."""
    shapes = parameter_shapes(config)
    return Plan([TensorRule(name, (name,)) for name in shapes], shapes, {})


def checked_config(
    model: Mapping[str, Any], sequence_length: int, source: str, overrides: Iterable[str] = ()
) -> Config:
    """A config with the section ``model``, changed by ``overrides``, and sequences of ``sequence_length`` tokens.

    Args:
        source: where the settings are from, for error messages.
        overrides: ``key=value``, with the full path of the key.

    Raises:
        ConversionError: a setting has the wrong type, or the settings do not describe a valid model.
    """
    # Sequences of fewer than two tokens have nothing to predict: the config does not allow them.
    values = {"model": model, "data": {"sequence_length": max(2, sequence_length)}}
    try:
        config = from_dict(values, source, overrides)
    except ConfigError as error:
        raise ConversionError(f"its config cannot be used: {error}") from error
    # Other sections have their defaults, which need not suit this model.
    problems = [problem for problem in check_config(config) if problem.path.startswith("model.")]
    if problems:
        raise ConversionError(f"its config cannot be used: {ConfigError(problems)}")
    return config


def check_layer_count(key: str, settings: Mapping[str, Any], files: TensorFiles) -> None:
    """Raises ConversionError if ``settings[key]`` is more layers than there are tensors.

    A wrong number could otherwise build a plan for a billion layers.
    """
    layers = settings.get(key)
    if type(layers) is int and layers > len(files.shapes):
        raise ConversionError(f"{key} is {layers}, but {files.source} has only {len(files.shapes)} tensors")


def embeddings_are_tied(
    settings: Mapping[str, Any], files: TensorFiles, embedding: str, output: str, notes: list[str]
) -> bool:
    """Whether the output matrix is the embedding: tie_word_embeddings is set, and the file does not contradict it.

    Args:
        embedding, output: names of the two tensors.
        notes: gets a note if tie_word_embeddings is set, but the tensors differ.
    """
    if settings.get("tie_word_embeddings") is not True:
        return False
    if output not in files.shapes or embedding not in files.shapes:
        return True
    if torch.equal(files.read(output), files.read(embedding)):
        return True
    notes.append(f"tie_word_embeddings is set, but {output} differs from the embedding: they are not tied here")
    return False


def check_names(plan: Plan, files: TensorFiles) -> None:
    """Compares names, shapes and types of the source's tensors with the plan.

    Raises:
        ConversionError: lists every tensor that is missing, unknown, of another shape, or not floating point.
    """
    # A dict instead of a set keeps the order of the model for the message.
    needed = dict.fromkeys(source for rule in plan.rules for source in rule.sources)
    problems = [f"{name} is missing" for name in needed if name not in files.shapes]
    for name, shape in files.shapes.items():
        if shape != plan.expected.get(name, shape):
            problems.append(f"{name} has shape {list(shape)}, the config requires {list(plan.expected[name])}")
        if name not in needed and name not in plan.dropped:
            problems.append(f"{name} {list(shape)} is not part of the model")
        if name in needed and files.dtypes[name] not in WEIGHT_DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
            problems.append(f"{name} is {files.dtypes[name]}: weights must be floating point, {allowed}")
    _raise(problems, f"the tensors of {files.source} do not match its config")


def check_dropped(plan: Plan, files: TensorFiles) -> None:
    """Reads the tensors that may be dropped only with certain values.

    Raises:
        ConversionError: lists those that have other values.
    """
    problems = []
    for name in files.shapes:
        requirement = plan.dropped[name].requirement if name in plan.dropped else None
        if requirement is not None and not requirement[1](files.read(name)):
            problems.append(f"{name} {requirement[0]}")
    _raise(problems, f"{files.source} has tensors that dcscale cannot represent")


def non_finite(tensor: Tensor) -> str | None:
    """How many values are NaN and infinite, as text; None if all are finite."""
    if torch.isfinite(tensor).all():
        return None
    return f"{int(tensor.isnan().sum())} NaN and {int(tensor.isinf().sum())} infinite of {tensor.numel()}"


def mapping_lines(plan: Plan, files: TensorFiles) -> list[str]:
    """A listing of the plan, with one line for the same tensor of all layers."""
    lines: dict[str, int] = {}
    for rule in plan.rules:
        note = f"  ({rule.how})" if rule.how else ""
        text = re.sub(r"\.\d+\.", ".*.", f"{rule.name}  <-  {', '.join(rule.sources) or 'created here'}{note}")
        lines[text] = lines.get(text, 0) + 1
    for name in files.shapes:
        if name in plan.dropped:
            text = re.sub(r"\.\d+\.", ".*.", f"dropped: {name}  ({plan.dropped[name].reason})")
            lines[text] = lines.get(text, 0) + 1
    return [text if count == 1 else f"{text}  x {count}" for text, count in lines.items()]


def _raise(problems: Iterable[str], title: str) -> None:
    problems = list(problems)
    if problems:
        raise ConversionError("\n".join([f"{title}:", *(f"  - {problem}" for problem in problems)]))
