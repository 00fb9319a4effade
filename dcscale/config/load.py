"""Reads a :class:`Config` from YAML files and ``key=value`` arguments, strictly, and writes it as YAML.

Files are merged over the schema's defaults in order, then the overrides; later ones win. OmegaConf converts and checks
types and resolves ``${section.key}``. Its resolvers, such as ``${oc.env:HOME}``, are refused: a config may come from
somebody else, and must not read environment variables.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Mapping
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

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Loaded:
    """A config and the origin of each of its values."""

    config: Config

    origins: dict[str, str]
    """Path of a setting -> ``default``, ``FILE:LINE`` or ``command line``."""


def load_config(files: Iterable[str | Path], overrides: Iterable[str] = ()) -> Loaded:
    """Merges YAML files in order over the defaults, then ``key=value`` overrides.

    Ranges and rules between settings are checked by :func:`~dcscale.config.check.check_config`.

    Raises:
        ConfigError: lists all unreadable files, invalid YAML, unknown keys and wrong types.
    """
    merge = _Merge()
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
    merge.section("", yaml_syntax.nodes(_escape(values)), source)
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
    return yaml_syntax.dump(_escape(chosen))


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

    def __init__(self) -> None:
        # OmegaConf converts values to the types of the schema when they are set.
        self.tree = OmegaConf.structured(Config)
        self.origins = dict.fromkeys(FIELDS, "default")
        self.problems: list[Problem] = []

    def report(self, path: str, rule: str, fix: str, value: Any = NO_VALUE, origin: str = "") -> None:
        self.problems.append(Problem(path, value, rule, fix, origin))

    def file(self, path: Path) -> None:
        """Merges a YAML file."""
        try:
            node = yaml_syntax.parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.report(str(path), "there is no such file", _similar_file(path))
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
            self.report(path, f"invalid YAML: {error}", "put text in quotes", value, COMMAND_LINE)

    def setting(self, path: str, node: yaml.Node, source: str) -> None:
        """Sets a field, a section or an item of a list."""
        item = re.fullmatch(r"([\w.]+)\[(\d+)\](?:\.(\w+))?", path)
        if path in FIELDS:
            self.field(FIELDS[path], node, source)
        elif path in SECTIONS:
            self.section(f"{path}.", node, source)
        elif item and item[1] in FIELDS and source == COMMAND_LINE:
            self.item(FIELDS[item[1]], int(item[2]), item[3], node)
        else:
            self.report(path, "unknown key", _suggestion(path), yaml_syntax.plain(node), _origin(source, node))

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
            fix = f"its keys are {', '.join(_names_in(prefix))}"
            self.report(prefix[:-1], "must be a section", fix, yaml_syntax.plain(node), _origin(source, node))

    def field(self, field: Field, node: yaml.Node, source: str) -> None:
        """Sets the value of a field, after checking its type."""
        origin = _origin(source, node)
        try:
            value = _value(field.path, node, field.type)
            if not isinstance(value, (str, list, dict)) and not has_type(value, field.type):
                raise ValidationError("OmegaConf would convert the value, for example 5 to true")
            OmegaConf.update(self.tree, field.path, value)
            self.origins[field.path] = origin
        except OmegaConfBaseException:
            fix = f"the default is {show(field.default)}"
            self.report(field.path, f"must be {type_name(field.type)}", fix, yaml_syntax.plain(node), origin)
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
        changed = yaml_syntax.nodes(OmegaConf.to_container(items))
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
        for field in FIELDS.values():
            try:
                value = OmegaConf.select(self.tree, field.path)
                if OmegaConf.is_config(value):
                    OmegaConf.to_container(value, resolve=True)
            except OmegaConfBaseException as error:
                rule = f"cannot be resolved ({str(error).splitlines()[0]})"
                self.report(field.path, rule, "write the value itself", origin=self.origins[field.path])
        if self.problems:
            raise ConfigError(self.problems)
        return Loaded(OmegaConf.to_object(self.tree), self.origins)


def _value(path: str, node: yaml.Node, wanted: Any) -> Any:
    """The node as plain value for a field of type ``wanted``. Text fields keep the text as written, such as ``1e3``."""
    if isinstance(node, yaml.SequenceNode):
        inner = typing.get_args(wanted)[0] if typing.get_origin(wanted) is list else None
        return [_value(f"{path}[{i}]", item, inner) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        hints = typing.get_type_hints(wanted) if dataclasses.is_dataclass(wanted) else {}
        for key, value in node.value:
            if hints and key.value not in hints:
                fix = did_you_mean(key.value, hints) or f"the keys are {', '.join(hints)}"
                raise _InvalidValue(f"{path}.{key.value}", "unknown key", fix, yaml_syntax.plain(value))
        return {key.value: _value(f"{path}.{key.value}", item, hints.get(key.value)) for key, item in node.value}
    if node.value == "???":
        raise _InvalidValue(path, "a value is missing", "replace the ??? by a value", "???")
    _check_references(path, node.value)
    is_text = wanted is str or str in typing.get_args(wanted) or "${" in node.value
    return node.value if is_text and node.tag != yaml_syntax.NULL else yaml_syntax.plain(node)


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
            raise _InvalidValue(path, f"refers to {name}, which is not a setting", _suggestion(name), text)


def _escape(value: Any) -> Any:
    r"""Writes ``\${`` for every literal ``${``, with the backslashes before it doubled."""
    if isinstance(value, Mapping):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escape(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _origin(source: str, node: yaml.Node) -> str:
    """Where a value comes from: ``FILE:LINE`` or ``command line``."""
    mark = node.start_mark
    return source if source == COMMAND_LINE or mark is None else f"{source}:{mark.line + 1}"


def _names_in(prefix: str) -> list[str]:
    """Names of the keys and sections directly in a section."""
    return [path[len(prefix) :] for path in _PATHS if path.startswith(prefix) and "." not in path[len(prefix) :]]


_PATHS = [*SECTIONS, *FIELDS]


def _suggestion(path: str) -> str:
    """What an unknown path may have meant: the same name in another section or a similar one; else the known names."""
    above = [".".join(path.split(".")[:n]) for n in range(path.count("."), 0, -1)]
    if field := next((FIELDS[p] for p in above if p in FIELDS), None):
        return f"{field.path} has no keys: set it itself, such as {field.path}={show(field.default)}"
    prefix = next((f"{p}." for p in above if p in SECTIONS), "")
    siblings = _names_in(prefix)
    by_name: dict[str, list[str]] = {}
    for known in _PATHS:
        by_name.setdefault(known.rpartition(".")[2], []).append(known)
    name = path.rpartition(".")[2]
    if name in by_name:
        found = by_name[name]
    elif close := difflib.get_close_matches(name, siblings, n=1):
        found = [prefix + close[0]]
    elif close := difflib.get_close_matches(name, by_name, n=1, cutoff=0.7):
        found = by_name[close[0]]
    elif not prefix and (close := difflib.get_close_matches(path, _PATHS, n=1, cutoff=0.7)):
        found = close
    else:
        return f"the keys {f'of {prefix[:-1]}' if prefix else 'at the top'} are {', '.join(siblings)}"
    return f"did you mean {' or '.join(found)}?"


def _similar_file(path: Path) -> str:
    """Suggests a file with a similar name, from the same folder or from the folder ``configs``."""
    files = {file.name: file for file in (*Path("configs").rglob("*.y*ml"), *path.parent.glob("*.y*ml"))}
    near = difflib.get_close_matches(path.name, files, n=1)
    return f"did you mean {files[near[0]]}?" if near else "the presets are in the folder configs"
