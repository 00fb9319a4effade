"""Reads a :class:`Config` from YAML files and ``key=value`` arguments, strictly, and writes it as YAML.

Files are merged over the schema's defaults in order, then the overrides; later ones win. OmegaConf converts and checks
types and resolves ``${section.key}``. Its resolvers, such as ``${oc.env:HOME}``, are refused. In paths a leading ``~``
and ``$NAME`` are expanded, but not in addresses: a config may come from somebody else, and must not send environment
variables to a server.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import typing
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from dcscale.config import yaml_syntax
from dcscale.config.errors import NO_VALUE, ConfigError, Problem, did_you_mean, show
from dcscale.config.reference import FIELDS, SECTIONS, Field, has_type, type_name
from dcscale.config.schema import Config
from dcscale.config.suggestions import file_suggestion, key_suggestion, names_in, type_suggestion

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Loaded:
    """A config and the origin of each of its values."""

    config: Config

    origins: dict[str, str]
    """Path of a setting -> ``default``, ``FILE:LINE`` or ``command line``."""


def load_arguments(arguments: Sequence[str]) -> Loaded:
    """Loads the config of a command line: YAML files in order, then ``key=value``.

    An argument with ``=`` is a file if it exists or ends in ``.yaml`` or ``.yml``, unless a setting has the name before
    the ``=``.

    Raises:
        ConfigError: as :func:`load_config`; also lists keys that are given twice and what is neither of the two.
    """
    merge, files, overrides = _Merge(), [], {}
    remaining = deque(arguments)
    while remaining:
        argument = remaining.popleft()
        key, equals, value = argument.partition("=")
        if key.startswith("-"):
            rule, fix = "is not an option", "--help lists the options"
            if _names_setting(key.lstrip("-")):
                rule, fix = "a setting has no dashes", f"write {key.lstrip('-')}={value or 'VALUE'}"
            merge.report(argument, rule, fix, origin=COMMAND_LINE)
        elif _names_setting(key) and not equals:
            value = remaining.popleft() if remaining and _is_bare_value(remaining[0]) else "VALUE"
            merge.report(argument, "is not of the form key=value", f"write {key}={value}", origin=COMMAND_LINE)
        elif not equals or (not _names_setting(key) and _is_file(argument)):
            files.append(argument)
        elif key in overrides:
            rule = f"is given twice on the command line, first as {show(overrides[key])}"
            fix = "keep one; if a shell expanded {a,b} into several arguments, put quotes around it"
            merge.report(key, rule, fix, value, COMMAND_LINE)
        else:
            overrides[key] = value
    for file in files:
        merge.file(Path(file))
    for key, value in overrides.items():
        merge.override(f"{key}={value}")
    return merge.finish()


def load_config(files: Iterable[str | Path], overrides: Iterable[str] = (), expand: bool = True) -> Loaded:
    """Merges YAML files in order over the defaults, then ``key=value`` overrides.

    Ranges and rules between settings are checked by :func:`~dcscale.config.check.check_config`.

    Args:
        files: YAML files.
        overrides: ``key=value``, applied last; the last one of a key wins.
        expand: expand ``~`` and ``$NAME`` in paths; False for a config that a run has written.

    Raises:
        ConfigError: lists all unreadable files, invalid YAML, unknown keys and wrong types.
    """
    merge = _Merge(expand)
    for file in files:
        merge.file(Path(file))
    for override in overrides:
        merge.override(override)
    return merge.finish()


def from_dict(values: Mapping[str, Any], source: str = "dictionary", overrides: Iterable[str] = ()) -> Config:
    """The inverse of :func:`config_to_dict`; missing keys keep their defaults.

    Args:
        values: sections as nested mappings.
        source: name of the origin in error messages.
        overrides: ``key=value``, applied last.

    Raises:
        ConfigError: lists unknown keys and wrong types.
        ValueError: ``values`` is not a mapping.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{source} must be a mapping of sections, but is {values!r}")
    merge = _Merge()
    merge.section("", yaml_syntax.nodes(_escape(values, Config)), source)
    for override in overrides:
        merge.override(override)
    return merge.finish().config


def config_to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dictionaries and lists of plain values."""
    return dataclasses.asdict(config)


def to_yaml(config: Config, paths: Iterable[str] | None = None) -> str:
    """The config as YAML text, which :func:`load_config` reads back to an equal config.

    Args:
        config: the config.
        paths: sections and fields to write, such as ``model`` and ``train.precision``; None writes all.
    """
    everything = config_to_dict(config)
    chosen: dict[str, Any] = {}
    for path in everything if paths is None else paths:
        section, _, name = path.partition(".")
        if name:
            chosen.setdefault(section, {})[name] = everything[section][name]
        else:
            chosen[section] = everything[section]
    return yaml_syntax.dump(_escape(chosen, Config))


def differences(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """(path, value in a, value in b) of every setting that differs between two configs or sections of the same class.

    Raises:
        ValueError: the classes differ.
    """
    if type(a) is not type(b):
        raise ValueError(
            f"only configs of the same class can be compared, not {type(a).__name__} with {type(b).__name__}"
        )
    found = []
    for item in dataclasses.fields(a):
        x, y = getattr(a, item.name), getattr(b, item.name)
        if dataclasses.is_dataclass(x):
            found += [(f"{item.name}.{path}", *values) for path, *values in differences(x, y)]
        elif x != y:
            found.append((item.name, x, y))
    return found


class _InvalidValue(Exception):
    """Part of a value is invalid; its arguments are those of :meth:`_Merge.report`."""


class _Merge:
    """Merges source after source into ``tree``, and collects the problems of all of them."""

    def __init__(self, expand: bool = True) -> None:
        # OmegaConf converts values to the types of the schema when they are set.
        self.tree = OmegaConf.structured(Config)
        self.origins = dict.fromkeys(FIELDS, "default")
        self.problems: list[Problem] = []
        self.expand = expand
        self.variables: dict[str, list[str]] = {}  # environment variables that are part of a setting's value

    def report(self, path: str, rule: str, fix: str, value: Any = NO_VALUE, origin: str = "") -> None:
        self.problems.append(Problem(path, value, rule, fix, origin))

    def file(self, path: Path) -> None:
        """Merges a YAML file."""
        try:
            node = yaml_syntax.parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.report(str(path), "there is no such file", file_suggestion(path))
        except yaml_syntax.DialectError as error:
            location = f"{path}:{error.line}" if error.line else str(path)
            self.report(location, f"invalid YAML: {error}", "correct the file")
        except (OSError, UnicodeDecodeError) as error:
            self.report(str(path), f"cannot be read ({error})", "give a YAML file in UTF-8")
        else:
            if isinstance(node, yaml.MappingNode):
                self.section("", node, str(path))
            else:
                self.report(str(path), "must contain sections with keys", 'such as "train: {steps: 10}"')

    def override(self, text: str) -> None:
        """Merges a ``key=value`` argument."""
        path, equals, value = text.partition("=")
        if not equals:
            self.report(text, "is not of the form key=value", "write, for example, train.steps=10", origin=COMMAND_LINE)
            return
        try:
            self.setting(path, yaml_syntax.parse(value), COMMAND_LINE)
        except yaml_syntax.DialectError as error:
            fix = f"put text in quotes, and all of it in those of the shell: '{path}=\"...\"'"
            self.report(path, f"invalid YAML: {error}", fix, value, COMMAND_LINE)

    def setting(self, path: str, node: yaml.Node, source: str) -> None:
        """Sets a field, a section or an item of a list."""
        item = _ITEM.fullmatch(path)
        if path in FIELDS:
            self.field(FIELDS[path], node, source)
        elif path in SECTIONS:
            self.section(f"{path}.", node, source)
        elif item and item[1] in FIELDS and source == COMMAND_LINE:
            self.item(FIELDS[item[1]], int(item[2]), item[3], node)
        else:
            self.report(path, "unknown key", key_suggestion(path), yaml_syntax.plain(node), _origin(source, node))

    def section(self, prefix: str, node: yaml.Node, source: str) -> None:
        """Sets the keys of a section. An empty section (null in YAML) changes nothing."""
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if "." in key.value:
                    fix = "dotted keys are only for the command line: write a section with its keys indented below it"
                    self.report(prefix + key.value, "unknown key", fix, yaml_syntax.plain(value), _origin(source, key))
                else:
                    self.setting(prefix + key.value, value, source)
        elif node.tag != yaml_syntax.NULL:
            fix = f"its keys are {', '.join(names_in(prefix))}"
            self.report(prefix[:-1], "must be a section", fix, yaml_syntax.plain(node), _origin(source, node))

    def field(self, field: Field, node: yaml.Node, source: str) -> None:
        """Sets the value of a field, after checking its type."""
        origin = _origin(source, node)
        try:
            variables: list[str] = []
            value = _value(field.path, node, field.type, field.is_path, variables if self.expand else None)
            is_converted = not isinstance(value, (str, list, dict)) or (field.type is bool and "${" not in value)
            if is_converted and not has_type(value, field.type):
                raise ValidationError("OmegaConf would convert the value, for example 5 or yes to true")
            OmegaConf.update(self.tree, field.path, value)
            self.origins[field.path] = origin
            self.variables[field.path] = variables
        except (OmegaConfBaseException, OverflowError):  # an integer that no float can hold
            plain = yaml_syntax.plain(node)
            fix = type_suggestion(field, plain)
            self.report(field.path, f"must be {type_name(field.type)}", fix, plain, origin)
        except _InvalidValue as invalid:
            self.report(*invalid.args, origin=origin)

    def item(self, field: Field, number: int, key: str | None, node: yaml.Node) -> None:
        """Sets an item of a list, or one key of the item, and keeps the rest of the list."""
        items, before = OmegaConf.select(self.tree, field.path), self.origins[field.path]
        count = len(items) if OmegaConf.is_list(items) else 0
        path = f"{field.path}[{number}]"
        if number >= count:
            rule, fix = f"there is no such item: {field.path} has {count} so far", f"set the list {field.path} itself"
            self.report(path, rule, fix, yaml_syntax.plain(node), COMMAND_LINE)
            return
        # Change the item in the list's YAML nodes, then set the list like any other value.
        changed = yaml_syntax.nodes(_escape(OmegaConf.to_container(items), field.type, references=False))
        if key is None:
            changed.value[number] = node
        elif isinstance(changed.value[number], yaml.MappingNode):
            keys = {name.value: (name, value) for name, value in changed.value[number].value}
            keys[key] = (yaml_syntax.nodes(key), node)
            changed.value[number].value = list(keys.values())
        else:
            self.report(
                f"{path}.{key}", "unknown key", f"{path} is a single value", yaml_syntax.plain(node), COMMAND_LINE
            )
            return
        self.field(field, changed, COMMAND_LINE)
        self.origins[field.path] = before if before.endswith(COMMAND_LINE) else f"{before}, {COMMAND_LINE}"

    def finish(self) -> Loaded:
        """Resolves ``${section.key}`` and returns the config; raises ConfigError if there is any problem."""
        from_environment = self._from_environment()
        for field in FIELDS.values():
            try:
                value = OmegaConf.select(self.tree, field.path)
                if OmegaConf.is_config(value):
                    value = OmegaConf.to_container(value, resolve=True)
                if field.path in from_environment and "://" in str(value):
                    rule = "is an address with an environment variable in it: a config must not send one to a server"
                    fix = r"write the value itself, or \$ for a literal $"
                    self.report(field.path, rule, fix, origin=self.origins[field.path])
            except OmegaConfBaseException as error:
                rule = f"cannot be resolved ({str(error).splitlines()[0]})"
                self.report(field.path, rule, "write the value itself", origin=self.origins[field.path])
        if self.problems:
            raise ConfigError(self.problems)
        return Loaded(OmegaConf.to_object(self.tree), self.origins)

    def _from_environment(self) -> set[str]:
        """Settings whose value has an environment variable in it, also through references."""
        found = {path for path, variables in self.variables.items() if variables}
        if not found:
            return found
        unresolved = OmegaConf.to_container(self.tree)
        refers_to = {
            path: set(re.findall(r"\$\{([\w.]+)\}", str(functools.reduce(dict.get, path.split("."), unresolved))))
            for path in FIELDS
        }
        while more := {path for path, names in refers_to.items() if names & found} - found:
            found |= more
        return found


def _value(path: str, node: yaml.Node, wanted: Any, is_path: bool, variables: list[str] | None) -> Any:
    """The node as plain value for a field of type ``wanted``. Text fields keep the text as written, such as ``1e3``.

    ``variables`` collects the environment variables that are expanded in paths; None expands nothing.
    """
    if isinstance(node, yaml.SequenceNode):
        inner = _item_type(wanted)
        return [_value(f"{path}[{i}]", item, inner, is_path, variables) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        kinds = _kinds(wanted)
        for key, value in node.value:
            if kinds and key.value not in kinds:
                fix = did_you_mean(key.value, kinds) or f"the keys are {', '.join(kinds)}"
                raise _InvalidValue(f"{path}.{key.value}", "unknown key", fix, yaml_syntax.plain(value))
        return {
            key.value: _value(f"{path}.{key.value}", item, *kinds.get(key.value, (None, False)), variables)
            for key, item in node.value
        }
    if node.value == "???":
        raise _InvalidValue(path, "a value is missing", "replace the ??? by a value", "???")
    _check_references(path, node.value)
    if node.tag == yaml_syntax.NULL:
        return "" if wanted is str and node.value == "" else None
    optional_text = str in typing.get_args(wanted)
    if optional_text and node.value == "None" and node.style is None:
        raise _InvalidValue(path, "would be the text None", "write null for none, or quote the text", "None")
    if is_path:
        return _PATH_SPECIAL.sub(_unescape, node.value) if variables is None else _expand(path, node.value, variables)
    return node.value if wanted is str or optional_text or "${" in node.value else yaml_syntax.plain(node)


@functools.cache
def _kinds(section: Any) -> dict[str, tuple[Any, bool]]:
    """Type of each field of a dataclass, and whether it is a path; empty for any other type."""
    if not dataclasses.is_dataclass(section):
        return {}
    hints = typing.get_type_hints(section)
    return {item.name: (hints[item.name], "is_path" in item.metadata) for item in dataclasses.fields(section)}


def _item_type(wanted: Any) -> Any:
    return typing.get_args(wanted)[0] if typing.get_origin(wanted) is list else None


_PATH_SPECIAL = re.compile(r"(\A)?(\\*)(\$[A-Za-z_][A-Za-z0-9_]*|(?(1)~[^/]*|(?!)))")
"""Group 2: backslashes. Group 3: the ``$NAME`` after them, or ``~`` or ``~USER`` at the beginning of the text."""


def _unescape(match: re.Match[str]) -> str:
    """Halves the backslashes; an odd number of them escapes what follows."""
    return "\\" * (len(match[2]) // 2) + match[3]


def _expand(path: str, text: str, variables: list[str]) -> str:
    """Expands ``~`` and ``~USER`` at the beginning, and ``$NAME``, which is added to ``variables``."""

    def replacement(match: re.Match[str]) -> str:
        backslashes, name = match[2], match[3]
        if len(backslashes) % 2:
            return _unescape(match)
        if name.startswith("~"):
            value, rule = os.path.expanduser(name), f"this machine has no user {name[1:]}"
            value = None if value == name else value
        else:
            value, rule = os.environ.get(name[1:]), f"the environment variable {name[1:]} is not set"
            variables.append(name)
        if not value:
            raise _InvalidValue(path, rule, rf"write the path itself, or \{name[0]} for a literal {name[0]}", text)
        return "\\" * (len(backslashes) // 2) + _escape(value, str)

    return _PATH_SPECIAL.sub(replacement, text)


def _check_references(path: str, text: str) -> None:
    r"""Allows references ``${section.key}`` only; ``\${`` is a literal ``${``, as in OmegaConf's grammar."""
    for match in re.finditer(r"(\\*)\$\{([\w.]*\})?", text):
        if len(match[1]) % 2:  # an odd number of backslashes: the last one escapes ``${``
            continue
        if match[2] is None:
            rule = "only ${section.key} is resolved; environment variables and functions are not"
            raise _InvalidValue(path, rule, r"write the value itself, or \${ for a literal ${", text)
        name = match[2][:-1]
        if name not in FIELDS:
            fix = key_suggestion(name)
            if re.fullmatch("[A-Z_][A-Z0-9_]*", name):
                fix = f"an environment variable is written ${name}, and only in a path"
            raise _InvalidValue(path, f"refers to {name}, which is not a setting", fix, text)


def _escape(value: Any, wanted: Any, is_path: bool = False, references: bool = True) -> Any:
    r"""Writes ``\${`` for every literal ``${``, with the backslashes before it doubled; and what paths expand likewise.

    Args:
        value: plain value of a setting, a section or a config.
        wanted: its type.
        is_path: whether texts in it are paths.
        references: False leaves ``${`` as it is.
    """
    if isinstance(value, Mapping):
        kinds = _kinds(wanted)
        return {
            key: _escape(item, *kinds.get(key, (None, False)), references=references) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_escape(item, _item_type(wanted), is_path, references) for item in value]
    if not isinstance(value, str):
        return value
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if references else value
    return _PATH_SPECIAL.sub(r"\2\2\\\3", text) if is_path else text


def _origin(source: str, node: yaml.Node) -> str:
    """Where a value comes from: ``FILE:LINE`` or ``command line``."""
    mark = node.start_mark
    return source if source == COMMAND_LINE or mark is None else f"{source}:{mark.line + 1}"


_ITEM = re.compile(r"([\w.]+)\[(\d+)\](?:\.(\w+))?")


def _names_setting(key: str) -> bool:
    """Whether a key of the command line names a setting, a section or an item of a list."""
    item = _ITEM.fullmatch(key)
    return key in FIELDS or key in SECTIONS or (item is not None and item[1] in FIELDS)


def _is_file(argument: str) -> bool:
    return argument.endswith((".yaml", ".yml")) or os.path.isfile(argument)


def _is_bare_value(argument: str) -> bool:
    """Whether an argument can only be the value of the key before it."""
    return not (argument.startswith("-") or "=" in argument or _names_setting(argument) or _is_file(argument))
