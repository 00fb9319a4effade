"""The YAML that configs are written in: the core schema of YAML 1.2, without tags, aliases or double keys.

PyYAML reads YAML 1.1, where ``3e-4`` is text, ``no`` is false and ``12:30`` is 750. Here ``3e-4`` is a number and the
other two are text. Tags and aliases are refused: a config may come from outside, and needs neither.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

NULL = "tag:yaml.org,2002:null"
_SCALARS = {
    NULL: (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
_TAGS = {*_SCALARS, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(
                None, None, "* begins an alias, which is not supported: quote the text", mark
            )
        node = super().compose_node(parent, index)
        if node.tag not in _TAGS:
            raise yaml.composer.ComposerError(None, None, f"the tag {node.tag} is not supported", node.start_mark)
        if isinstance(node, yaml.ScalarNode) and (half := re.search("[\ud800-\udfff]", node.value)):
            problem = f"\\u{ord(half[0]):04x} is half a character: write the whole one"  # as JSON escapes those beyond
            raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.Node:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(None, None, "a key must be a word", key.start_mark)
            if key.value in lines:
                problem = f"the key {key.value} is there twice, first in line {lines[key.value]}"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node


for _tag, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)


class _Dumper(yaml.SafeDumper):
    def represent_list(self, items: list[Any]) -> yaml.Node:
        short = not any(isinstance(item, (dict, list)) for item in items)
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=short)

    def represent_text(self, text: str) -> yaml.Node:
        # PyYAML takes U+0085 for a line break and folds it, unless it is escaped.
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_representer(str, _Dumper.represent_text)


class DialectError(ValueError):
    """Text that is not YAML, or not of this dialect."""

    def __init__(self, reason: str, line: int | None):
        super().__init__(reason)
        self.line = line
        """Line of the error, from 1; None where the text cannot be read at all."""


def parse(text: str) -> yaml.Node:
    """Parses one document into nodes, which know their lines. Empty text is a null.

    Raises:
        DialectError: with the reason and the line.
    """
    try:
        return yaml.compose(text, Loader=_Loader) or yaml.ScalarNode(NULL, "")
    except yaml.MarkedYAMLError as error:
        reason = " ".join(part for part in (error.context, error.problem) if part)
        raise DialectError(reason, error.problem_mark.line + 1) from None
    except yaml.YAMLError as error:
        raise DialectError(str(error).splitlines()[0], None) from None
    except RecursionError:
        raise DialectError("nested too deeply", None) from None


def nodes(value: Any) -> yaml.Node:
    """Plain values as nodes, as if they had been written and parsed."""
    return yaml.representer.SafeRepresenter(sort_keys=False).represent_data(value)


def plain(node: yaml.Node) -> Any:
    """The node as plain values; a number that Python cannot hold stays text."""
    try:
        return _Loader("").construct_object(node, deep=True)
    except ValueError:
        return node.value


def dump(value: Any) -> str:
    """Plain values as YAML text, a list of scalars on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
