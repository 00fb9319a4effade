"""What the nodes of a job must share: shards, the run folder, and addresses by which they reach each other."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dcscale.config import Config
from dcscale.data import DataError, StreamConfig, read_manifest
from dcscale.data.shards.shard import check_shards
from dcscale.data.storage import open_storage, redact
from dcscale.doctor.findings import Finding, Verdict

if TYPE_CHECKING:
    from dcscale.doctor.meeting import Meeting  # imports torch

_MOST_SHARDS = 200
"""Of a folder whose sizes are compared with the manifest."""
_SERVER_SECONDS = 20.0
_SIOCGIFADDR = 0x8915


def shards_seen(config: Config) -> dict[str, tuple[str, str]]:
    """For each setting that names shards: what identifies them, empty if they cannot be used, and a text."""
    data = replace(
        config.data,
        cache=None,
        timeout_seconds=min(config.data.timeout_seconds, _SERVER_SECONDS / 2),
        retry_total_seconds=min(config.data.retry_total_seconds, _SERVER_SECONDS),
    )
    options = StreamConfig.from_config(replace(config, data=data)).storage_options
    roots = {f"data.sources[{number}]": source.path for number, source in enumerate(data.sources)}
    roots = roots or {"data.train": data.train}
    if data.validation is not None and config.validation.interval > 0:
        roots["data.validation"] = data.validation
    found = {}
    for setting, root in roots.items():
        try:
            with contextlib.closing(open_storage(root, options)) as storage:
                manifest = read_manifest(storage)
                shards = manifest.shards
                step = -(-len(shards) // _MOST_SHARDS)
                check_shards(storage, shards[::step])
            found[setting] = manifest.fingerprint, f"{len(shards):,} shards of {redact(str(root))}"
        except DataError as error:
            found[setting] = "", str(error)
    return found


def run_folder_seen(
    config: Config,
    meeting: Meeting,
    number: int | None,
    token: str,
    names: Sequence[str],
    seconds: float,
    visible_seconds: float = 5.0,
) -> list[Finding]:
    """Whether a file that one node writes into the run folder is seen by all others; all ranks call it together.

    A folder that is missing is not made: then the nearest one above it is used.

    Args:
        config: the settings of the run.
        meeting: of all ranks.
        number: of this node, if this rank speaks for it; None on other ranks.
        token: random, and the same on all ranks.
        names: of the nodes.
        seconds: to wait for a rank.
        visible_seconds: until a new file must be seen.

    Returns:
        On rank 0 the findings, on the others nothing.
    """
    run = Path(config.run.folder).absolute()
    places = (run, *run.parents)
    own = next(level for level, path in enumerate(places) if path.is_dir())
    # What rank 0 has; a relative run.folder may be another one elsewhere.
    level = meeting.exchange("the run folder", None, lambda _: own, seconds)
    folder, error = places[min(level, len(places) - 1)], None
    files = [folder / f".doctor-{token}-{other}" for other in range(len(names))]
    if number is not None:
        try:
            files[number].write_text(token)
        except OSError as failure:
            error = f"{folder} cannot be written to: {failure.strerror}"
    meeting.exchange("the run folder", None, seconds=seconds)
    unseen: list[int] = []
    if number is not None and error is None:
        wanted = range(len(names)) if number == 0 else [0]
        deadline = time.monotonic() + visible_seconds
        unseen = [other for other in wanted if not _holds(files[other], token, deadline)]
    said: list[list | None] = []
    own_words = None if number is None else [number, error, unseen]
    meeting.exchange("the run folder", own_words, said.extend, seconds)
    if number is not None:
        with contextlib.suppress(OSError):  # that it cannot be changed is said above
            files[number].unlink(missing_ok=True)
    return judge_run_folder(folder, [words for words in said if words is not None], names) if said else []


def _holds(path: Path, token: str, deadline: float) -> bool:
    """Whether a file has this content, by ``deadline`` of the monotonic clock."""
    while True:
        with contextlib.suppress(OSError):  # not there yet, on this node
            if path.read_text(errors="replace") == token:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def judge_run_folder(folder: Path, said: Sequence[Sequence], names: Sequence[str]) -> list[Finding]:
    """Which nodes do not share the run folder.

    Args:
        folder: the run folder, or the nearest one above it that is there.
        said: of each node its number, why it could not write, and the nodes whose files it did not see.
        names: of the nodes.
    """
    rule = "a file that one node writes is soon seen by all others"
    way_out = "set run.folder to an absolute path on a disk that all nodes mount, writable, at the same place"
    problems = {number: error for number, error, _ in said if error is not None}
    for number, _, unseen in said:
        for other in unseen:
            if number == 0:
                problems.setdefault(other, f"what it writes into {folder} is not seen on {names[0]}")
            elif 0 not in problems:
                problems.setdefault(number, f"what {names[0]} writes into {folder} is not seen here")
    if not problems:
        return [Finding("shared run folder", Verdict.GOOD, "all", f"{folder} is the same on all nodes", rule)]
    return [
        Finding("shared run folder", Verdict.BAD, names[number], text, rule, way_out)
        for number, text in sorted(problems.items())
    ]


def check_address(
    store: tuple[str, int], hosts: Sequence[str], variables: Mapping[str, str] = os.environ
) -> tuple[str, str | None]:
    """The address that gloo announces to other ranks, and why these cannot reach it; None if they can.

    gloo takes the interface that ``GLOO_SOCKET_IFNAME`` names, or what the host name resolves to; where that is this
    machine only, the address by which the store is reached is returned.

    Args:
        store: host and port of the store.
        hosts: of each rank; loopback will do where there is one only.
        variables: environment variables.
    """
    name, host = variables.get("GLOO_SOCKET_IFNAME", "").partition(",")[0], socket.gethostname()
    if name:
        try:
            return _address_of(name), None
        except OSError as error:
            return _route_to(store), f"GLOO_SOCKET_IFNAME is {name}, which has no address: {error.strerror}"
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        return _route_to(store), f"the host name {host} does not resolve: {error.strerror}"
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback and len(set(hosts)) > 1:
        return _route_to(store), f"the host name {host} resolves to {address} here, which is each machine itself"
    return address, None


def _address_of(interface: str) -> str:
    """The IPv4 address of a network interface. Raises OSError if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        answer = fcntl.ioctl(s.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    return socket.inet_ntoa(answer[20:24])


def _route_to(address: tuple[str, int]) -> str:
    """This machine's own address, as another that it reaches sees it; loopback if nothing is reached."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, place in socket.getaddrinfo(*address, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as s:
                s.connect(place)  # sends nothing
                return s.getsockname()[0]
    return "127.0.0.1"
