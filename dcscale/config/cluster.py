"""What a cluster is made of: its nodes, links, disks, price and failures, read from ``configs/cluster/*.yaml``.

No part of a run's config: only tools that estimate read it. Rates and memory of the GPUs themselves are in
:mod:`dcscale.hardware`.
"""

from __future__ import annotations

import datetime
import typing
from collections.abc import Collection, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from dcscale.config import yaml_syntax
from dcscale.config.check import violated
from dcscale.config.errors import NO_VALUE, ConfigError, Problem, did_you_mean, show
from dcscale.config.reference import docstrings, has_type, type_name
from dcscale.config.schema.limits import COUNT, NOT_NEGATIVE, POSITIVE, number

LINK_KINDS = ("nvlink", "pcie", "infiniband", "ethernet")


@dataclass(kw_only=True)
class Link:
    """What one GPU can send over a link, at the peak of the data sheet."""

    kind: str = field(metadata={"choices": LINK_KINDS})
    """Technology."""

    gb_per_second: float = number(MISSING, POSITIVE)
    """Bandwidth of one GPU in one direction, in 10^9 bytes/s. Data sheets often give the sum of both directions."""

    latency_us: float = number(MISSING, NOT_NEGATIVE)
    """Time of an empty message, in microseconds."""

    source: str
    """Where both are from; begins with ``assumption`` if nobody has measured or published them."""


@dataclass(kw_only=True)
class Links:
    """Links between GPUs, and to the memory of the host."""

    inside_node: Link | None = None
    """Between two GPUs of a node; null only if a node has one GPU."""

    between_nodes: Link | None = None
    """Between GPUs of two nodes, if all GPUs of a node send at once; null only if there is one node."""

    host: Link
    """Between a GPU and pinned memory of its host."""


@dataclass(kw_only=True)
class Disk:
    """A file system, as the processes of one node see it."""

    read_gb_per_second: float = number(MISSING, POSITIVE)
    """Sequential reads of one node, in 10^9 bytes/s."""

    write_gb_per_second: float = number(MISSING, POSITIVE)
    """Sequential writes of one node, in 10^9 bytes/s, including fsync."""

    total_read_gb_per_second: float | None = number(None, POSITIVE)
    """Reads of all nodes together, in 10^9 bytes/s; null: as many times one node's."""

    total_write_gb_per_second: float | None = number(None, POSITIVE)
    """Writes of all nodes together, in 10^9 bytes/s; null: as many times one node's."""

    source: str
    """As that of a link."""


@dataclass(kw_only=True)
class Storage:
    """Where shards and checkpoints may be."""

    local: Disk | None = None
    """Disks of a node, which only that node sees; null: none."""

    shared: Disk | None = None
    """A file system of all nodes; null only if there is one node."""


@dataclass(kw_only=True)
class Price:
    """What a GPU costs, always an assumption: it depends on contract, term and day."""

    dollars_per_gpu_hour: float = number(MISSING, NOT_NEGATIVE)
    """US dollars for a GPU and an hour, with its share of the node."""

    assumption: str
    """What kind of offer it stands for."""

    date: str
    """When it was assumed, YYYY-MM-DD."""


@dataclass(kw_only=True)
class Failures:
    """How often a node ends a run that uses it."""

    node_mtbf_hours: float = number(MISSING, POSITIVE)
    """Mean hours between two failures of a node; of N nodes: divided by N."""

    source: str
    """As that of a link."""


@dataclass(kw_only=True)
class Cluster:
    """Equal nodes, joined by links and shared storage."""

    gpu: str
    """Name of the GPU in the table of ``dcscale/hardware.py``: that of the driver, without ``NVIDIA``."""

    nodes: int = number(MISSING, COUNT)
    """Nodes that a run may use."""

    gpus_per_node: int = number(MISSING, COUNT)
    """GPUs of a node."""

    host_memory_gib: float = number(MISSING, POSITIVE)
    """Memory of a node that a run may use, in GiB."""

    links: Links
    storage: Storage
    price: Price
    failures: Failures


def load_cluster(path: Path, gpus: Collection[str]) -> Cluster:
    """Reads a cluster, strictly: all keys without a default must be there, and no others.

    Args:
        path: a YAML file.
        gpus: names of known GPUs: ``dcscale.hardware.PEAK_TFLOPS_BF16``, which imports torch.

    Raises:
        ConfigError: lists all problems: file, YAML, unknown and missing keys, wrong types and values.
    """
    reader = _Reader(path)
    try:
        cluster = reader.section(Cluster, yaml_syntax.parse(path.read_text(encoding="utf-8")), "")
    except yaml_syntax.DialectError as error:
        place = f"{path}:{error.line}" if error.line else str(path)
        raise ConfigError([Problem(place, NO_VALUE, f"invalid YAML: {error}", "correct the file")]) from None
    except FileNotFoundError:
        known = ", ".join(sorted(file.name for file in Path("configs/cluster").glob("*.yaml"))) or "none here"
        fix = f"those in configs/cluster are: {known}"
        raise ConfigError([Problem(str(path), NO_VALUE, "there is no such file", fix)]) from None
    except (OSError, UnicodeDecodeError) as error:
        fix = "give a YAML file in UTF-8"
        raise ConfigError([Problem(str(path), NO_VALUE, f"cannot be read ({error})", fix)]) from None
    if not reader.problems:
        reader.problems += [
            Problem(key, value, rule, fix, reader.lines.get(key, str(path)))
            for key, value, rule, fix in _conflicts(cluster, gpus)
        ]
    if reader.problems:
        raise ConfigError(reader.problems)
    return cluster


def cluster_table() -> str:
    """All keys as Markdown, for the README of ``configs/cluster``."""
    lines = ["| key | type | default | allowed | meaning |", "|-" * 5 + "|"]
    for key, kind, item, meaning in _rows(Cluster, ""):
        default = "required" if _is_required(item) else show(item.default)
        allowed = ", ".join(item.metadata.get("choices", ())) or str(item.metadata.get("range", ""))
        name = kind if isinstance(kind, str) else type_name(kind)
        lines.append(f"| {key} | {name} | {default} | {allowed} | {meaning} |")
    return "\n".join(lines)


class _Reader:
    """Reads sections from YAML nodes, and collects the problems of all of them."""

    def __init__(self, path: Path):
        self.path, self.problems = path, []
        self.lines: dict[str, str] = {}
        """``FILE:LINE`` of each key that is there."""

    def section(self, kind: type, node: yaml.Node, prefix: str) -> Any:
        """The section as an instance of the dataclass ``kind``; None if there is a problem."""
        known, before = {item.name: item for item in fields(kind)}, len(self.problems)
        if not isinstance(node, yaml.MappingNode):
            self._report(prefix[:-1] or str(self.path), node, "must be a section", f"its keys are {', '.join(known)}")
            return None
        hints, values = typing.get_type_hints(kind), {}
        for key, value in node.value:
            name = key.value
            self.lines[prefix + name] = f"{self.path}:{key.start_mark.line + 1}"
            if name in known:
                values[name] = self._value(prefix + name, hints[name], known[name], value)
            else:
                fix = did_you_mean(name, known) or f"the keys are {', '.join(known)}"
                self._report(prefix + name, value, "unknown key", fix)
        for name, item in known.items():
            if name not in values and _is_required(item):
                meaning = docstrings(kind).get(name) or f"its keys are {', '.join(f.name for f in fields(hints[name]))}"
                self.problems.append(
                    Problem(prefix + name, NO_VALUE, "is missing", f"give it: {meaning}", self._at(node))
                )
        return kind(**values) if len(self.problems) == before else None

    def _value(self, key: str, hint: Any, item: Field, node: yaml.Node) -> Any:
        kinds = [kind for kind in (hint, *typing.get_args(hint)) if is_dataclass(kind)]
        if kinds and not (node.tag == yaml_syntax.NULL and has_type(None, hint)):
            return self.section(kinds[0], node, f"{key}.")
        # Text stays as it is written: 2026 in a source is no number.
        is_text = hint is str and isinstance(node, yaml.ScalarNode) and node.tag != yaml_syntax.NULL
        value = node.value if is_text else yaml_syntax.plain(node)
        choices, allowed = item.metadata.get("choices"), item.metadata.get("range")
        if not has_type(value, hint):
            self._report(key, node, f"must be {type_name(hint)}", _meaning(key))
        elif hint is str and not value.strip():
            self._report(key, node, "must not be empty", _meaning(key))
        elif choices and value not in choices:
            fix = did_you_mean(value, choices) or "use one of these"
            self._report(key, node, f"must be one of {', '.join(choices)}", fix)
        elif allowed and value is not None and (rule := violated(allowed, value)):
            self._report(key, node, rule, _meaning(key))
        return value

    def _report(self, key: str, node: yaml.Node, rule: str, fix: str) -> None:
        self.problems.append(Problem(key, yaml_syntax.plain(node), rule, fix, self._at(node)))

    def _at(self, node: yaml.Node) -> str:
        return str(self.path) if node.start_mark is None else f"{self.path}:{node.start_mark.line + 1}"


def _conflicts(cluster: Cluster, gpus: Collection[str]) -> Iterator[tuple[str, Any, str, str]]:
    """(key, value, rule, way out) of each violation of a rule between keys, or that needs more than the schema."""
    if cluster.gpu not in gpus:
        # H100 is a part of the right name, but resembles H200 more.
        named = " or ".join(name for name in gpus if cluster.gpu in name)
        fix = f"did you mean {named}?" if named else did_you_mean(cluster.gpu, gpus)
        fix = fix or f"it has {', '.join(gpus)}; add the GPU's rates there"
        yield "gpu", cluster.gpu, "is not in the table of dcscale/hardware.py", fix
    if cluster.gpus_per_node > 1 and cluster.links.inside_node is None:
        rule = f"is needed, as gpus_per_node is {cluster.gpus_per_node}"
        yield "links.inside_node", None, rule, "give the link between two GPUs of a node"
    if cluster.nodes > 1 and cluster.links.between_nodes is None:
        rule = f"is needed, as nodes is {cluster.nodes}"
        yield "links.between_nodes", None, rule, "give the link between two nodes, or nodes: 1"
    if cluster.nodes > 1 and cluster.storage.shared is None:
        rule = f"is needed, as nodes is {cluster.nodes}: all nodes write one checkpoint"
        yield "storage.shared", None, rule, "give the file system that all nodes see, or nodes: 1"
    if cluster.storage.local is None and cluster.storage.shared is None:
        yield "storage", None, "has neither local nor shared", "give one: checkpoints need a place"
    try:
        datetime.date.fromisoformat(cluster.price.date)
    except ValueError:
        yield "price.date", cluster.price.date, "is no date", "write YYYY-MM-DD, such as 2026-11-27"


def _rows(section: type, prefix: str) -> Iterator[tuple[str, Any, Field, str]]:
    """(key, type, field, meaning) of every key; sections give their own row if they may be null, then their keys."""
    hints, meanings = typing.get_type_hints(section), docstrings(section)
    for item in fields(section):
        hint, key = hints[item.name], prefix + item.name
        inner = next((kind for kind in (hint, *typing.get_args(hint)) if is_dataclass(kind)), None)
        if inner is None:
            yield key, hint, item, meanings[item.name]
            continue
        if inner is not hint:
            yield key, "section or null", item, meanings[item.name]
        yield from _rows(inner, f"{key}.")


def _meaning(key: str) -> str:
    """What a key is, as the way out of a wrong value."""
    return f"it is: {next(meaning for name, _, _, meaning in _rows(Cluster, '') if name == key)}"


def _is_required(item: Field) -> bool:
    return item.default is MISSING and item.default_factory is MISSING
