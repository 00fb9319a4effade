"""All settings as a table (path, type, default, allowed values, meaning), read from the schema; and as Markdown."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from dcscale.config.errors import show
from dcscale.config.schema import Config
from dcscale.config.schema.limits import Range


@dataclass(frozen=True)
class Field:
    """One setting of the schema."""

    path: str
    """Dotted path, such as ``model.compose.rank``."""

    type: Any
    """Type: a scalar, ``scalar | None``, or a list of scalars or dataclasses."""

    default: Any
    """Default value."""

    meaning: str
    """The docstring below the field."""

    choices: tuple[Any, ...] | None = None
    """The allowed values, or None if they are not enumerated."""

    range: Range | None = None
    """The allowed numbers, also for the items of a list."""

    is_path: bool = False
    """Whether the text is a path, in which a leading ``~`` and ``$NAME`` are expanded."""

    @property
    def allowed(self) -> str:
        """Choices, range or "path" as text; empty if there is none of these."""
        if self.choices is not None:
            return ", ".join(map(str, self.choices))
        if self.is_path:
            return "path"
        return "" if self.range is None else str(self.range)


def walk(section: type, prefix: str = "") -> Iterator[Field]:
    """Yields every field that holds a value, in the order of the schema; recurses into sections."""
    hints, meanings = typing.get_type_hints(section), docstrings(section)
    for item in fields(section):
        path, hint = f"{prefix}{item.name}", hints[item.name]
        if is_dataclass(hint):
            yield from walk(hint, f"{path}.")
        else:
            default = item.default if item.default_factory is MISSING else item.default_factory()
            yield Field(path, hint, default, meanings.get(item.name, ""), **item.metadata)


def sections(section: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yields path and class of every section within ``section``, outer sections first."""
    for name, hint in typing.get_type_hints(section).items():
        if is_dataclass(hint):
            yield f"{prefix}{name}", hint
            yield from sections(hint, f"{prefix}{name}.")


@functools.cache
def docstrings(section: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, on one line, by field name."""
    # Python does not keep these docstrings, so they are read from the source.
    body = ast.parse(inspect.getsource(section)).body[0].body
    found = {}
    for node, following in itertools.pairwise(body):
        is_constant = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if isinstance(node, ast.AnnAssign) and is_constant and isinstance(following.value.value, str):
            found[node.target.id] = " ".join(following.value.value.split())
    return found


FIELDS: dict[str, Field] = {field.path: field for field in walk(Config)}
"""Every setting of :class:`~dcscale.config.schema.Config`, by path."""

SECTIONS: dict[str, type] = dict(sections(Config))
"""Class of every section, by path."""


def get(config: Any, path: str) -> Any:
    """The value of ``config`` at a path, also of an item, such as ``optimizer.rules[0].match``."""
    for part in re.findall(r"\w+", path):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    return config


def has_type(value: Any, wanted: Any) -> bool:
    """Whether ``value`` has the type ``wanted``; an int also counts as float, a bool as neither."""
    arguments = typing.get_args(wanted)
    if typing.get_origin(wanted) is list:
        return isinstance(value, list) and all(has_type(item, arguments[0]) for item in value)
    if arguments:
        return any(has_type(value, argument) for argument in arguments)
    if is_dataclass(wanted):
        hints = typing.get_type_hints(wanted)
        return isinstance(value, wanted) and all(has_type(getattr(value, name), hint) for name, hint in hints.items())
    if wanted in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if wanted is float else wanted)


def type_name(wanted: Any) -> str:
    """A type as text, such as ``list of (int or null)``."""
    arguments = typing.get_args(wanted)
    if typing.get_origin(wanted) is list:
        inner = type_name(arguments[0])
        return f"list of ({inner})" if typing.get_args(arguments[0]) else f"list of {inner}"
    if arguments:
        return " or ".join(type_name(argument) for argument in arguments)
    if is_dataclass(wanted):
        hints = typing.get_type_hints(wanted)
        return "{" + ", ".join(f"{name}: {type_name(hint)}" for name, hint in hints.items()) + "}"
    return "null" if wanted is types.NoneType else wanted.__name__


def reference() -> str:
    """All settings as Markdown: one table per section, and one per list of dataclasses for its items."""
    parts = [
        "# Settings",
        "",
        "Generated from `dcscale/config/schema` by `python tests/test_pages.py`. YAML files are merged in order, later",
        "wins; `key=value` on the command line comes last. `python tools/check_config.py CONFIG...` shows where each",
        "value comes from, and whether the run would start.",
        "",
        "`${section.key}` is the value of another setting. In a *path*, `~` at the beginning and environment",
        "variables such as `$HOME` are expanded; one that is not set is an error, and so is one in an address",
        "(`https://`, `s3://`): a config from somebody else must not send it to a server. `\\$` and `\\~` are literal.",
        "",
    ]
    for prefix, section in sections(Config):
        own = [field for field in walk(section, f"{prefix}.") if "." not in field.path[len(prefix) + 1 :]]
        parts += _table(prefix, section, own)
        for field in own:
            for item in filter(is_dataclass, typing.get_args(field.type)):
                parts += _table(f"{field.path}[]", item, list(walk(item)))
    return "\n".join(parts)


def _table(title: str, section: type, rows: list[Field]) -> list[str]:
    lines = [
        f"## {title}",
        "",
        inspect.getdoc(section),
        "",
        "| key | type | default | allowed | meaning |",
        "|-" * 5 + "|",
    ]
    for row in rows:
        cells = [row.path, type_name(row.type), show(row.default), row.allowed, row.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]
