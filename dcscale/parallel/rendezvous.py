"""How the ranks of a run find each other: through torch's TCPStore, which rank 0 serves, or torchrun's agent.

torch.distributed would do the same by ``env://``, but is silent until its timeout when a rank does not arrive.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, DistNetworkError, PrefixStore, Store, TCPStore

from dcscale.parallel.environment import Environment
from dcscale.parallel.launchers import LaunchError

_ARRIVED = "arrived"
_ALL_ARRIVED = "all-arrived"


class StartError(RuntimeError):
    """The ranks cannot start together.

    Args:
        from_rank0: whether this rank has the error from rank 0, which then speaks for both.
    """

    def __init__(self, message: str, *, from_rank0: bool = False):
        super().__init__(message)
        self.from_rank0 = from_rank0


class ArrivalError(StartError):
    """The ranks of a run did not find each other; another start may succeed.

    Args:
        missing: ranks that did not arrive, with their hosts; empty names where these are unknown.
    """

    def __init__(self, message: str, *, from_rank0: bool = False, missing: Mapping[int, str] | None = None):
        super().__init__(message, from_rank0=from_rank0)
        self.missing = dict(missing or {})


@dataclass(frozen=True)
class Rendezvous:
    """The store through which all ranks of a run have met."""

    store: Store
    """The main thread's connection; it must not be used by another thread."""

    hosts: tuple[str, ...]
    """Host name of each rank."""

    address: tuple[str, int]
    """Host and port of the server."""

    prefix: str
    """Of all keys; distinguishes this start from others that use the same server, as torchrun's attempts do."""

    def new_store_client(self, seconds: float) -> Store:
        """A further connection to the same keys, for another thread: a connection serves one call at a time.

        Args:
            seconds: timeout of the connection and of each later call.

        Raises:
            torch.distributed.DistError: the server does not answer.
        """
        host, port = self.address
        try:  # TCPStore would try for twice the timeout if the connection is refused, as when rank 0 was killed
            socket.create_connection(self.address, timeout=seconds).close()
        except OSError as error:
            raise DistNetworkError(f"the store at {host}:{port} does not answer: {error.strerror or error}") from None
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds), wait_for_workers=False)
        return PrefixStore(self.prefix, store)


_current: Rendezvous | None = None


def current_rendezvous() -> Rendezvous:
    """The rendezvous of this process.

    Raises:
        RuntimeError: ``start_distributed`` has not been called.
    """
    if _current is None:
        raise RuntimeError("the ranks have not met: call start_distributed first")
    return _current


def set_current_rendezvous(rendezvous: Rendezvous | None) -> None:
    """Makes ``rendezvous`` that of this process; None lets the store close once nothing else uses it."""
    global _current
    _current = rendezvous


def new_store_client(seconds: float) -> Store:
    """:meth:`Rendezvous.new_store_client` of this process's rendezvous."""
    return current_rendezvous().new_store_client(seconds)


def join(
    environment: Environment,
    timeout_minutes: float,
    print_line: Callable[[str], None],
    *,
    notice_seconds: float = 60.0,
    answer_seconds: float = 120.0,
    setting: str = "parallel.start_timeout_minutes",
) -> Rendezvous:
    """Meets all ranks of the run; returns on each of them once the last one has arrived.

    Args:
        timeout_minutes: for all of it.
        print_line: called every ``notice_seconds`` with a line that names whom this rank waits for; only on rank 0,
            and on rank 1 as long as it waits for rank 0.
        answer_seconds: for the answer of a store that accepts connections. torch also looks up the names of addresses,
            which takes some 30 s where a name server does not answer.

    Raises:
        ArrivalError: a rank has not arrived in time, the port is taken, or two processes have the same rank.
        LaunchError: rank 0 knows of fewer ranks.
    """
    launch, rank = environment.launch, environment.rank
    clock = Clock(60 * timeout_minutes, notice_seconds, setting)
    if launch.address is None:
        server = _serve_alone()
    elif rank == 0 and launch.serves_store:
        server = _serve(launch.address, clock.timeout)
    else:
        _await_server(environment, clock, print_line)
        server = _connect(environment, clock, answer_seconds)
    store = PrefixStore(launch.prefix, server)
    try:
        hosts = _meet(store, environment, clock, print_line)
    except DistError as error:
        raise ArrivalError(
            f"lost the connection to {_server_name(environment)} while waiting for all ranks: {_first_line(error)}"
        ) from None
    return Rendezvous(store, tuple(hosts), (server.host, server.port), launch.prefix)


class Clock:
    """Time left until all must have answered, and until the next notice about who has not."""

    def __init__(self, seconds: float, notice_seconds: float = float("inf"), setting: str = ""):
        self._start = time.monotonic()
        self._seconds, self._notice_seconds, self._setting = seconds, notice_seconds, setting
        self._next_notice = notice_seconds

    @property
    def limit(self) -> str:
        """For messages."""
        return f"{self._seconds / 60:g} minutes ({self._setting})"

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self._seconds)

    @property
    def waited(self) -> float:
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        return self._seconds - self.waited

    def pause(self, longest: float = float("inf")) -> float:
        """Seconds to wait until something is to be said or ``longest`` is over; above 0, which means no timeout."""
        return max(0.001, min(self.left, self._next_notice - self.waited, longest))

    def notice_is_due(self) -> bool:
        due = self.waited >= self._next_notice
        if due:
            self._next_notice += self._notice_seconds
        return due


def _serve_alone() -> TCPStore:
    """The store of a single process, which other machines cannot reach."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        descriptor = os.dup(listener.fileno())  # the store closes it
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)


def _serve(address: tuple[str, int], timeout: timedelta) -> TCPStore:
    host, port = address
    try:
        return TCPStore(host, port, is_master=True, timeout=timeout, wait_for_workers=False)
    except DistError as error:
        reason = _first_line(error).rpartition("message: ")[2]
        raise ArrivalError(
            f"port {port} of {host}, where the ranks are to meet, cannot be opened: {reason}; set MASTER_PORT "
            "(deepspeed: --master_port) to a free port, or end what uses this one"
        ) from None


def _await_server(environment: Environment, clock: Clock, print_line: Callable[[str], None]) -> None:
    """Waits until something accepts connections where the ranks meet: rank 0 may start later than this rank."""
    # TCPStore would wait too, but hides why it cannot connect, and warns with a backtrace.
    while True:
        try:
            socket.create_connection(environment.launch.address, timeout=clock.pause(5)).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        server = _server_name(environment)
        if clock.left <= 0:
            raise ArrivalError(
                f"{server} does not answer after {clock.limit}: {reason}; if rank 0 reports no error of its own, check "
                "that this is its host, that the name resolves here, and that the network lets connections through"
            )
        if clock.notice_is_due() and environment.rank == 1:
            print_line(
                f"waiting    for {server}: {reason}; {clock.waited:.0f} s so far, the start fails after {clock.limit}"
            )
        time.sleep(clock.pause(0.2))


def _connect(environment: Environment, clock: Clock, answer_seconds: float) -> TCPStore:
    """A client of the store that rank 0 or the launcher serves."""
    host, port = environment.launch.address
    found: list[TCPStore | DistError] = []

    def connect() -> None:
        try:
            found.append(TCPStore(host, port, is_master=False, timeout=clock.timeout, wait_for_workers=False))
        except DistError as error:
            found.append(error)

    # In a thread, because TCPStore waits for ever for a program that accepts connections but does not answer.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(answer_seconds)
    if found and isinstance(found[0], TCPStore):
        return found[0]
    reason = _first_line(found[0]) if found else f"no answer in {answer_seconds:g} s"
    raise ArrivalError(
        f"{_server_name(environment)} is no torch store: {reason}; another program may use the port: set MASTER_PORT "
        "(deepspeed: --master_port) to a free one"
    )


def _meet(store: Store, environment: Environment, clock: Clock, print_line: Callable[[str], None]) -> list[str]:
    """Says that this rank has arrived and waits for the others; returns the hosts of all ranks."""
    rank, world_size = environment.rank, environment.world_size
    own = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
    first = store.compare_set(f"{_ARRIVED}/{rank}", "", own).decode()
    if first != own:
        raise ArrivalError(
            f"two processes are rank {rank}: {_process(first)} arrived at {_server_name(environment)} before "
            f"{_process(own)}; check RANK, or, if the first is of another run, end it or set another MASTER_PORT"
        )
    if rank != 0:
        if not appears(store, _ALL_ARRIVED, clock):
            raise ArrivalError(_not_arrived(store, environment, clock))
        hosts = receive_answer(store, _ALL_ARRIVED, ArrivalError)
        if rank >= len(hosts):
            raise LaunchError(
                f"this is rank {rank} of {world_size}, but rank 0 waited for {len(hosts)} ranks only; start all with "
                "the same WORLD_SIZE"
            )
        return hosts

    def print_missing() -> None:
        if missing := _missing(store, environment):
            who = _name_missing(missing)
            print_line(f"waiting    for {who}: {clock.waited:.0f} s so far; the start fails after {clock.limit}")

    for other in range(world_size):
        if not appears(store, f"{_ARRIVED}/{other}", clock, print_missing):
            error, missing = _not_arrived(store, environment, clock), _missing(store, environment)
            arrived = sum(store.check([f"{_ARRIVED}/{reader}"]) for reader in range(1, world_size))
            answer(store, _ALL_ARRIVED, error=error, readers=arrived)
            raise ArrivalError(error, missing=missing)
    processes = store.multi_get([f"{_ARRIVED}/{other}" for other in range(world_size)])
    hosts = [json.loads(process)["host"] for process in processes]
    answer(store, _ALL_ARRIVED, hosts)
    return hosts


def appears(store: Store, key: str, clock: Clock, notice: Callable[[], None] = lambda: None) -> bool:
    """Waits for a key; False if the time is over. Calls ``notice`` whenever it is due."""
    pause = 0.01
    while not store.check([key]):  # not store.wait, which prints two warnings when its time is over
        if clock.left <= 0:
            return False
        if clock.notice_is_due():
            notice()
        time.sleep(clock.pause(pause))
        pause = min(2 * pause, 0.5)
    return True


def answer(
    store: Store, key: str, value: Any = None, *, error: str | None = None, readers: int = 0, seconds: float = 5.0
) -> None:
    """Gives the other ranks a value, as JSON, or an error that they raise, when they call :func:`receive_answer`.

    After an error, waits at most ``seconds`` until ``readers`` ranks have it: the store ends with this process.
    """
    store.set(key, json.dumps({"value": value, "error": error}))
    deadline = time.monotonic() + seconds
    while error is not None and store.add(f"{key}/readers", 0) < readers and time.monotonic() < deadline:
        time.sleep(0.02)


def receive_answer(store: Store, key: str, error_type: type[StartError]) -> Any:
    """The value of :func:`answer`.

    Raises:
        An ``error_type`` if it is an error.
    """
    found = json.loads(store.get(key))
    store.add(f"{key}/readers", 1)
    if found["error"] is not None:
        raise error_type(found["error"], from_rank0=True)
    return found["value"]


def _missing(store: Store, environment: Environment) -> dict[int, str]:
    """The ranks that have not arrived, with the hosts they should be on; empty names if these are unknown."""
    arrived, missing = [], []
    for rank in range(environment.world_size):
        (arrived if store.check([f"{_ARRIVED}/{rank}"]) else missing).append(rank)
    processes = store.multi_get([f"{_ARRIVED}/{rank}" for rank in arrived])
    hosts = environment.launch.expected_hosts
    as_expected = len(hosts) == environment.world_size and all(
        _short(hosts[rank]) == _short(json.loads(process)["host"]) for rank, process in zip(arrived, processes)
    )
    return {rank: hosts[rank] if as_expected else "" for rank in missing}


def _name_missing(missing: Mapping[int, str]) -> str:
    return name_ranks(list(missing), missing if all(missing.values()) else ())


def _not_arrived(store: Store, environment: Environment, clock: Clock) -> str:
    who = _name_missing(_missing(store, environment))
    return (
        f"{who} did not arrive at {_server_name(environment)} within {clock.limit}; look for an error of these "
        "processes, and whether their hosts run"
    )


def name_ranks(ranks: Sequence[int], hosts: Sequence[str] | Mapping[int, str] = (), most: int = 8) -> str:
    """Ranks for messages, ``rank 1 (n2)`` or ``ranks 8-15 (n2), 16-23 (n3) and 40 others``.

    Args:
        ranks: at least one, ascending.
        hosts: host of every rank of the run, or at least of these; empty if unknown.
        most: ranges that are named.
    """
    ranges: list[tuple[int, int, str]] = []
    for rank in ranks:
        host = f" ({hosts[rank]})" if hosts else ""
        if ranges and ranges[-1][1:] == (rank - 1, host):
            ranges[-1] = (ranges[-1][0], rank, host)
        else:
            ranges.append((rank, rank, host))
    texts = [(f"{first}" if first == last else f"{first}-{last}") + host for first, last, host in ranges[:most]]
    text = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(texts)
    others = sum(last - first + 1 for first, last, _ in ranges[most:])
    return f"{text} and {others} other{'s' if others > 1 else ''}" if others else text


def launch_line(environment: Environment, hosts: Sequence[str], most: int = 8) -> str:
    """A line for the log: launcher, job, ranks and hosts.

    Args:
        hosts: host of every rank.
        most: hosts that are named.
    """
    launch, names = environment.launch, list(dict.fromkeys(hosts))
    job = f", {launch.job}" if launch.job else ""
    ranks = "1 rank" if len(hosts) == 1 else f"{len(hosts)} ranks"
    shown = names if len(names) <= most else [*names[: most - 2], "...", names[-1]]
    count = f"{len(names)} hosts: " if len(names) > most else ""
    return f"launch     {launch.launcher}{job}: {ranks} on {count}{', '.join(shown)}"


def _short(host: str) -> str:
    return host.partition(".")[0]


def _process(arrival: str) -> str:
    process = json.loads(arrival)
    return f"process {process['pid']} on {process['host']}"


def _server_name(environment: Environment) -> str:
    host, port = environment.launch.address or ("this host", 0)
    return f"{'rank 0' if environment.launch.serves_store else 'the store of torchrun'} at {host}:{port}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
