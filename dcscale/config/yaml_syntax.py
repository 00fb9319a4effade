"""The YAML dialect of configs: the core schema of YAML 1.2, without tags, aliases and duplicate keys.

PyYAML implements YAML 1.1, where ``3e-4`` is text, ``no`` is false and ``12:30`` is 750. Here ``3e-4`` is a number and
the other two are text. Tags and aliases are refused: a config may come from somebody else, and needs neither.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

NULL = "tag:yaml.org,2002:null"
# Types of scalars: tag -> (pattern of the text, characters that it may start with).
_SCALARS = {
    NULL: (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
_MAX_DEPTH = 100
_TAGS = {*_SCALARS, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # replaces those of YAML 1.1; filled below
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        self.depth += 1
        if self.depth > _MAX_DEPTH:  # far below where PyYAML's recursive functions fail
            problem = f"nested too deeply, in more than {_MAX_DEPTH} levels"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(
                None, None, "* starts an alias, which is not supported: quote the text", mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node.tag not in _TAGS:
            raise yaml.composer.ComposerError(None, None, f"the tag {node.tag} is not supported", node.start_mark)
        if isinstance(node, yaml.ScalarNode) and (half := re.search("[\ud800-\udfff]", node.value)):
            # JSON escapes characters above U+FFFF as two such halves; Python text cannot hold one of them alone.
            problem = f"\\u{ord(half[0]):04x} is half of a surrogate pair: write the character itself"
            raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.Node:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(None, None, "a key must be a scalar", key.start_mark)
            if key.value in lines:
                problem = f"duplicate key {key.value}, first in line {lines[key.value]}"
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
        # PyYAML treats U+0085 as a line break and folds it, unless it is escaped in double quotes.
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_representer(str, _Dumper.represent_text)


class DialectError(ValueError):
    """The text is not YAML, or not of this dialect."""

    def __init__(self, reason: str, line: int | None):
        super().__init__(reason)
        self.line = line
        """Line of the error, from 1; None if the text cannot be parsed at all."""


def parse(text: str) -> yaml.Node:
    """Parses one document into nodes, which hold their line numbers. Empty text is null.

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


def nodes(value: Any) -> yaml.Node:
    """Converts plain values into nodes, as if they had been written and parsed."""
    return yaml.representer.SafeRepresenter(sort_keys=False).represent_data(value)


def plain(node: yaml.Node) -> Any:
    """Converts a node into plain values; a number that Python refuses to parse stays text."""
    try:
        return _Loader("").construct_object(node, deep=True)
    except ValueError:
        return node.value


def dump(value: Any) -> str:
    """Writes plain values as YAML text, with lists of scalars on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
