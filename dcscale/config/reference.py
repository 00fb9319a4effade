"""The config reference in Markdown, made from the schema: types, defaults, allowed values and docstrings."""

from __future__ import annotations

import inspect
import typing
from dataclasses import is_dataclass

from dcscale.config.check import RANGES
from dcscale.config.fields import Field, sections, type_name, walk
from dcscale.config.problem import show
from dcscale.config.schema import CHOICES, Config


def reference() -> str:
    """All settings: a table for each section, and for the items of a list of settings."""
    parts = ["# Settings", ""]
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
        cells = [row.path, type_name(row.type), show(row.default), _allowed(row.path), row.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def _allowed(path: str) -> str:
    if path in CHOICES:
        return ", ".join(map(str, CHOICES[path]))
    return str(RANGES.get(path, ""))
