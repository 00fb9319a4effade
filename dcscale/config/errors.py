"""Problems of a config, with everything a user needs to fix them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

NO_VALUE = object()
"""Stands for the value of a problem without one, such as a missing file."""


@dataclass(frozen=True)
class Problem:
    """One problem and the way out, printed as ``PATH = VALUE (ORIGIN): RULE; FIX``."""

    path: str
    """Dotted path of the setting, or of an item in it, such as ``model.windows[1]``; or a file."""

    value: Any
    rule: str
    fix: str
    origin: str = ""
    """Where the value comes from: ``FILE:LINE``, ``command line`` or ``default``; empty if unknown."""

    @property
    def setting(self) -> str:
        """The path without the index of an item."""
        return self.path.partition("[")[0]

    def __str__(self) -> str:
        value = "" if self.value is NO_VALUE else f" = {show(self.value)}"
        origin = f" ({self.origin})" if self.origin else ""
        return f"{self.path}{value}{origin}: {self.rule}; {self.fix}"


class ConfigError(ValueError):
    """An invalid config; ``problems`` lists everything that is wrong with it."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        title = "the config has a problem:" if count == 1 else f"the config has {count} problems:"
        return "\n".join([title, *(f"  - {problem}" for problem in self.problems)])


def raise_problems(problems: Iterable[Problem], origins: Mapping[str, str] | None = None) -> None:
    """Raises one ConfigError that lists all problems, if there are any.

    Args:
        problems: the problems.
        origins: where each setting's value comes from, as :func:`~dcscale.config.load.load_config` returns it.
    """
    origins = origins or {}
    located = [replace(problem, origin=problem.origin or origins.get(problem.setting, "")) for problem in problems]
    if located:
        raise ConfigError(located)


def show(value: Any) -> str:
    """Formats a value as in YAML, on one line: ``null``, ``true``, ``[256, null]``, ``"text"``."""
    return json.dumps(value, ensure_ascii=False, default=lambda item: asdict(item) if is_dataclass(item) else str(item))


def did_you_mean(word: str, options: Iterable[str]) -> str | None:
    """``did you mean OPTION?`` if one of the options resembles ``word``, else None."""
    near = difflib.get_close_matches(word, list(options), n=1)
    return f"did you mean {near[0]}?" if near else None
