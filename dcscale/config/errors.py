"""What can be wrong with a config, said so that a person can mend it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

NO_VALUE = object()
"""The value of a problem that is not about a value, such as a missing file."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and the way out."""

    path: str
    """Dotted path of the setting, perhaps of an item in it, such as ``model.windows[1]``; or the file."""

    value: Any
    rule: str
    fix: str
    origin: str = ""
    """Where the value was written: ``FILE:LINE``, ``command line`` or ``default``; empty if not known."""

    @property
    def setting(self) -> str:
        """The path without what names an item."""
        return self.path.partition("[")[0]

    def __str__(self) -> str:
        value = "" if self.value is NO_VALUE else f" = {show(self.value)}"
        origin = f" ({self.origin})" if self.origin else ""
        return f"{self.path}{value}{origin}: {self.rule}; {self.fix}"


class ConfigError(ValueError):
    """A config that cannot be used; ``problems`` holds everything that is wrong with it."""

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
        origins: where each setting's value was written, as :func:`~dcscale.config.load.load_config` returns it.
    """
    origins = origins or {}
    located = [replace(problem, origin=problem.origin or origins.get(problem.setting, "")) for problem in problems]
    if located:
        raise ConfigError(located)


def show(value: Any) -> str:
    """A value as one would write it in YAML, on one line: ``null``, ``true``, ``[256, null]``, ``"text"``."""
    return json.dumps(value, ensure_ascii=False, default=lambda item: asdict(item) if is_dataclass(item) else str(item))


def did_you_mean(word: str, options: Iterable[str]) -> str | None:
    """The question, where one of the options resembles ``word``."""
    near = difflib.get_close_matches(word, list(options), n=1)
    return f"did you mean {near[0]}?" if near else None
