"""How one tensor of the result comes from tensors of the source; and the checks that are made before any is read.

A model's settings, read from a config of others, as a checked config of dcscale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcscale.config import Config, ConfigError, check_config, from_dict
from dcscale.convert.errors import ConversionError
from dcscale.convert.tensor_files import WEIGHT_DTYPES, TensorFiles


@dataclass(frozen=True)
class TensorRule:
    """``make`` gets the sources, in order, and gives the tensor ``name``; ``how`` says it in words."""

    name: str
    sources: tuple[str, ...]
    how: str = ""
    rows: tuple[int, int] | None = None
    """Rows of the only source that are read; None reads all."""
    make: Callable[..., Tensor] | None = None
    """None takes the only source as it is."""

    def apply(self, read: Callable[[str, tuple[int, int] | None], Tensor]) -> Tensor:
        tensors = [read(source, self.rows) for source in self.sources]
        return tensors[0] if self.make is None else self.make(*tensors).contiguous()


@dataclass(frozen=True)
class DroppedTensor:
    """A tensor that upstream's files may hold and no result needs. ``must`` hold for its values: (words, test)."""

    why: str
    must: tuple[str, Callable[[Tensor], bool]] | None = None


@dataclass(frozen=True)
class Plan:
    """Everything about a conversion's tensors but their values."""

    recipes: Sequence[TensorRule]
    expected: Mapping[str, tuple[int, ...]]
    """Shapes of all tensors that the source may have."""
    left_out: Mapping[str, DroppedTensor]


def check_names(plan: Plan, files: TensorFiles) -> None:
    """Raises ConversionError with every missing, unknown and misshapen tensor, and those that are no weights."""
    needed = dict.fromkeys(source for recipe in plan.recipes for source in recipe.sources)
    problems = [f"{name} is missing" for name in needed if name not in files.shapes]
    for name, shape in files.shapes.items():
        if shape != plan.expected.get(name, shape):
            problems.append(f"{name} has shape {list(shape)}, the config wants {list(plan.expected[name])}")
        if name not in needed and name not in plan.left_out:
            problems.append(f"{name} {list(shape)} has no place in the model")
        if name in needed and files.dtypes[name] not in WEIGHT_DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
            problems.append(f"{name} is {files.dtypes[name]}: weights must be floating point, {allowed}")
    _raise(problems, f"the tensors of {files.source} do not fit its config")


def check_dropped(plan: Plan, files: TensorFiles) -> None:
    """Raises ConversionError for tensors whose values forbid to leave them out."""
    problems = []
    for name in files.shapes:
        must = plan.left_out[name].must if name in plan.left_out else None
        if must is not None and not must[1](files.read(name)):
            problems.append(f"{name} {must[0]}")
    _raise(problems, f"{files.source} holds what dcscale cannot represent")


def non_finite(tensor: Tensor) -> str | None:
    """How many NaN and infinities there are, in words; None for none."""
    if torch.isfinite(tensor).all():
        return None
    return f"{int(tensor.isnan().sum())} NaN and {int(tensor.isinf().sum())} infinite of {tensor.numel()}"


def table(plan: Plan, files: TensorFiles) -> list[str]:
    """The mapping in lines, the layers of a kind in one."""
    lines: dict[str, int] = {}
    for recipe in plan.recipes:
        note = f"  ({recipe.how})" if recipe.how else ""
        text = re.sub(r"\.\d+\.", ".*.", f"{recipe.name}  <-  {', '.join(recipe.sources) or 'made here'}{note}")
        lines[text] = lines.get(text, 0) + 1
    for name in files.shapes:
        if name in plan.left_out:
            text = re.sub(r"\.\d+\.", ".*.", f"left out: {name}  ({plan.left_out[name].why})")
            lines[text] = lines.get(text, 0) + 1
    return [text if count == 1 else f"{text}  x {count}" for text, count in lines.items()]


def _raise(problems: Iterable[str], title: str) -> None:
    problems = list(problems)
    if problems:
        raise ConversionError("\n".join([f"{title}:", *(f"  - {problem}" for problem in problems)]))


def checked_config(
    model: Mapping[str, Any], sequence_length: int, source: str, overrides: Iterable[str] = ()
) -> Config:
    """The section ``model``, changed by ``overrides``, with the tokens that the source takes at most.

    Raises:
        ConversionError: the settings, said to be in ``source``, have wrong types or fit no model.
    """
    values = {"model": model, "data": {"sequence_length": max(2, sequence_length)}}
    try:
        config = from_dict(values, source, overrides)
    except ConfigError as error:
        raise ConversionError(f"its config cannot be used: {error}") from error
    problems = [problem for problem in check_config(config) if problem.path.startswith("model.")]
    if problems:
        raise ConversionError(f"its config cannot be used: {ConfigError(problems)}")
    return config
