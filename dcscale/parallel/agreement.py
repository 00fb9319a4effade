"""Do all ranks of a run have the same config, code and libraries? Compared at the start, before they train together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dcscale.config import Config
from dcscale.files import sha256_of
from dcscale.parallel.environment import Environment
from dcscale.parallel.rendezvous import (
    ArrivalError,
    Clock,
    Rendezvous,
    StartError,
    answer,
    appears,
    name_ranks,
    receive_answer,
)
from dcscale.provenance import ROOT, versions

_FACTS, _DIFFERENCES, _VERDICT = "facts", "differences", "verdict"
_MOST_NAMED = 10
_ABSENT = "absent"
_OF_THE_MACHINE = "data.cache"
"""The one setting that may differ: a folder on a local disk, such as ``$TMPDIR/cache``."""


class DisagreementError(StartError):
    """Ranks have another config, other code or other libraries than rank 0; to start again does not help."""


def start_facts(config: Config | None = None, root: Path = ROOT) -> dict[str, str]:
    """What must be the same on all ranks, by name, as text without credentials.

    Args:
        config: its settings are included, under their keys; None for those who train without one.
        root: folder that the package is in; its sources are included, and those of ``launch/train.py``.
    """
    facts = {} if config is None else dict(_settings(dataclasses.asdict(config)))
    facts.pop(_OF_THE_MACHINE, None)
    facts |= {f"version of {name}": version for name, version in versions().items()}
    files = [*sorted((root / "dcscale").rglob("*.py")), *(root / "launch").glob("train.py")]
    facts |= {f"source {path.relative_to(root).as_posix()}": f"SHA-256 {sha256_of(path)[:12]}" for path in files}
    return facts


def _settings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested dicts and lists of dicts, such as ``data.sources[0].weight``."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _settings(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _settings(inner, f"{key}[{number}]")
    else:
        text = json.dumps(value)
        if "@" in text or "?" in text:  # credentials in an address
            text = f"(not shown, SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"
        yield key, text


def check_agreement(
    rendezvous: Rendezvous, environment: Environment, facts: Mapping[str, str], *, seconds: float = 60.0
) -> None:
    """Compares ``facts`` of all ranks with those of rank 0; all ranks call it together.

    Each rank does its own comparison, so rank 0 reads no more than the differences.

    Raises:
        DisagreementError: on all ranks, if they differ on any; names ranks, hosts and keys.
        ArrivalError: a rank has not answered after ``seconds``.
    """
    facts = {"number of ranks": str(environment.world_size), **facts}
    store, rank, clock = rendezvous.store, environment.rank, Clock(seconds)
    if rank != 0:
        if appears(store, _FACTS, clock):
            store.set(f"{_DIFFERENCES}/{rank}", json.dumps(differences(facts, json.loads(store.get(_FACTS)))))
        if not appears(store, _VERDICT, Clock(2 * seconds)):  # rank 0 may be waiting for others
            raise ArrivalError(f"rank 0 ({rendezvous.hosts[0]}) arrived, but did not compare configs and code")
        receive_answer(store, _VERDICT, DisagreementError)
        return
    store.set(_FACTS, json.dumps(facts))
    others = range(1, environment.world_size)
    silent = [other for other in others if not appears(store, f"{_DIFFERENCES}/{other}", clock)]
    if silent:
        who = name_ranks(silent, rendezvous.hosts)
        raise ArrivalError(f"{who} arrived, but did not compare configs and code within {seconds:g} s")
    found = store.multi_get([f"{_DIFFERENCES}/{other}" for other in others])
    error = _message({other: json.loads(text) for other, text in zip(others, found)}, rendezvous.hosts)
    answer(store, _VERDICT, error=error, readers=len(others))
    if error is not None:
        raise DisagreementError(error)


Differences = list[tuple[str, str, str]]
"""Key, value of a rank, value of rank 0."""


def differences(facts: Mapping[str, str], expected: Mapping[str, str]) -> Differences:
    """Where the :func:`start_facts` of a rank are not as expected."""
    keys = list(dict.fromkeys([*facts, *expected]))
    pairs = ((key, facts.get(key, _ABSENT), expected.get(key, _ABSENT)) for key in keys)
    return [(key, own, other) for key, own, other in pairs if own != other]


def _message(found: Mapping[int, Differences], hosts: Sequence[str]) -> str | None:
    """The differences of all ranks as an error message; None if there are none."""
    ranks: dict[tuple[str, str, str], list[int]] = {}
    for rank, differences in found.items():
        for difference in differences:
            ranks.setdefault(tuple(difference), []).append(rank)
    if not ranks:
        return None
    lines = [
        f"  {key} is {own} on {name_ranks(members, hosts)}, but {other} on rank 0 ({hosts[0]})"
        for (key, own, other), members in ranks.items()
    ]
    more = [f"  and {len(lines) - _MOST_NAMED} more differences"] if len(lines) > _MOST_NAMED else []
    return "\n".join(
        [
            "the ranks of this run have different configs or code:",
            *lines[:_MOST_NAMED],
            *more,
            "start all of them with the same arguments, from the same checkout and environment",
        ]
    )
