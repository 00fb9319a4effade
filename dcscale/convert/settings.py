"""A model's settings, read from a config of others, as a checked config of dcscale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dcscale.config import Config, ConfigError, check_config, from_dict
from dcscale.convert.errors import ConversionError


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
