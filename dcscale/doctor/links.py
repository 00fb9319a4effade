"""Is every link between two nodes there, fast, and as quick as the others; and do their clocks agree?

Nodes measure each other over TCP, which gloo uses and NCCL meets by, in rounds of disjoint pairs: with N nodes N/2
pairs at a time, so that a measurement of N nodes takes at most ``MOST_ROUNDS`` times as long as one of two. What is bad
is measured again, and the best counts: a busy processor looks like a slow link.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from dcscale.doctor.findings import Finding, Verdict

MOST_ROUNDS = 15
"""Links of each node that are measured: all with up to 16 nodes."""

SLOW_SHARE = 0.5
"""Of the usual bandwidth."""
SLOWEST = 62.5e6
"""Bytes per second: half of 1 Gbit/s Ethernet."""
LATE_TIMES, LATE_SECONDS = 5.0, 0.001
"""A round trip may take so many times what is usual, and in any case so many seconds."""
MOST_SKEW = 1.0
"""Seconds that two clocks may differ: logs and events of several nodes are read side by side."""

_HELLO = struct.Struct("!16sIII")  # token of this start, round, sender, receiver
_TIME = struct.Struct("!d")
_PINGS = 20
_SLACK = 0.5
"""Seconds by which a pair may begin at different times."""


@dataclass(frozen=True)
class Link:
    """One direction between two nodes, by their numbers."""

    sender: int
    receiver: int
    rate: float = 0.0
    """Bytes per second that arrive."""

    round_trip: float | None = None
    """Seconds: the shortest of 20."""

    offset: float | None = None
    """Seconds that the receiver's clock is ahead of the sender's, with an error of half a round trip at most."""

    error: str | None = None
    """Why nothing could be sent."""

    def better(self, other: Link) -> Link:
        """The best of two measurements."""
        if self.error is not None or other.error is not None:
            return other if self.error is not None else self
        quick = min((self, other), key=lambda link: link.round_trip)
        return replace(quick, rate=max(self.rate, other.rate))


def pair_rounds(count: int, most: int | None = None) -> list[list[tuple[int, int]]]:
    """Rounds in which numbers below ``count`` meet in disjoint pairs, each pair once (the circle method).

    Args:
        most: rounds; of more, so many are taken evenly.
    """
    even = count + count % 2  # whoever meets the last, which is none, has a rest
    rounds = []
    for shift in range(even - 1):
        circle = [0, *((other + shift) % (even - 1) + 1 for other in range(even - 1))]
        pairs = [sorted((circle[place], circle[-1 - place])) for place in range(even // 2)]
        rounds.append([(low, high) for low, high in pairs if high < count])
    if most is None or len(rounds) <= most:
        return rounds
    return [rounds[number * len(rounds) // most] for number in range(most)]


def disjoint_rounds(pairs: Iterable[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """These pairs, in few rounds in which no number is twice."""
    rounds: list[list[tuple[int, int]]] = []
    for pair in sorted(set(pairs)):
        free = next((found for found in rounds if not {*pair} & {number for other in found for number in other}), None)
        rounds.append([pair]) if free is None else free.append(pair)
    return rounds


class Meter:
    """Measures the links of this node.

    Args:
        number: of this node.
        token: 16 random bytes, the same on all nodes; a stranger's connection is closed.
        seconds: of sending in one direction.
        patience: seconds until a connection, or a part of it, counts as dead.
        clock: for the offset.
    """

    def __init__(
        self,
        number: int,
        token: bytes,
        *,
        seconds: float = 0.2,
        patience: float = 2.5,
        clock: Callable[[], float] = time.time,
    ):
        self.number, self._token = number, token
        self._seconds, self._patience, self._clock = seconds, patience, clock
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=64, dualstack_ipv6=both)
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.close()

    def measure(self, partner: int, address: tuple[str, int], round_number: int) -> list[Link]:
        """Measures both directions of a link, while the partner does the same.

        Returns:
            What this node knows: of what it sent round trip, offset and error; of what it received the rate.
        """
        low, high = sorted((self.number, partner))
        links = []
        for sender, receiver in ((low, high), (high, low)):
            deadline = time.monotonic() + self._patience + _SLACK
            if sender == self.number:
                link = self._send(partner, address, round_number)
                if link.error is not None:  # the partner still waits, and is not ready for the other direction
                    time.sleep(max(0.0, deadline - time.monotonic()))
                links.append(link)
            else:
                links.append(Link(sender, receiver, rate=self._receive(sender, round_number, deadline)))
        return links

    def _send(self, partner: int, address: tuple[str, int], round_number: int) -> Link:
        try:
            connection = socket.create_connection(address, timeout=self._patience)
        except OSError as error:
            return Link(self.number, partner, error=f"no connection: {error.strerror or error}")
        with connection:
            try:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.sendall(_HELLO.pack(self._token, round_number, self.number, partner))
                trips = [self._ping(connection) for _ in range(_PINGS)]
            except OSError as error:
                return Link(self.number, partner, error=f"no answer: {error.strerror or error}")
            block = memoryview(bytes(1 << 20))
            with contextlib.suppress(OSError):  # the receiver closes the connection when it has seen enough
                while True:
                    connection.sendall(block)
        round_trip, offset = min(trips)
        return Link(self.number, partner, round_trip=round_trip, offset=offset)

    def _ping(self, connection: socket.socket) -> tuple[float, float]:
        """A round trip in seconds, and how far the other clock is ahead."""
        sent, begun = self._clock(), time.perf_counter()
        connection.sendall(b"?")
        (stamp,) = _TIME.unpack(_receive_exactly(connection, _TIME.size))
        trip = time.perf_counter() - begun
        return trip, stamp - (sent + trip / 2)

    def _receive(self, sender: int, round_number: int, deadline: float) -> float:
        """Bytes per second that arrive from the sender; 0 if none do."""
        expected = _HELLO.pack(self._token, round_number, sender, self.number)
        while (left := deadline - time.monotonic()) > 0:
            self._listener.settimeout(left)
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return 0.0
            with connection:
                connection.settimeout(self._patience)
                try:
                    greeting = _receive_exactly(connection, len(expected))
                except OSError:
                    continue
                if greeting != expected:
                    continue  # of a round that is over, or no doctor
                try:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    for _ in range(_PINGS):
                        _receive_exactly(connection, 1)
                        connection.sendall(_TIME.pack(self._clock()))
                    return self._rate(connection)
                except OSError:
                    return 0.0
        return 0.0

    def _rate(self, connection: socket.socket) -> float:
        """Bytes per second, without the first third of the time, in which TCP and buffers get going."""
        buffer, counted = bytearray(1 << 20), 0
        received = connection.recv_into(buffer)
        begun = time.perf_counter()
        start, end = begun + self._seconds / 3, begun + self._seconds
        while received and (now := time.perf_counter()) < end:
            connection.settimeout(end - now)
            try:
                received = connection.recv_into(buffer)
            except TimeoutError:
                break
            counted += received * (now >= start)
        return counted / (end - start)


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    """Raises OSError if the connection ends before."""
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise ConnectionResetError("the connection was closed")
        found += part
    return found


def merge(measured: Iterable[Link]) -> list[Link]:
    """One link for each direction, from what sender and receiver know."""
    found: dict[tuple[int, int], Link] = {}
    for link in measured:
        key = link.sender, link.receiver
        other = found.get(key, Link(*key))
        found[key] = Link(
            *key,
            rate=max(link.rate, other.rate),
            round_trip=link.round_trip if other.round_trip is None else other.round_trip,
            offset=link.offset if other.offset is None else other.offset,
            error=link.error or other.error,
        )
    return [
        replace(link, error="nothing arrives") if link.error is None and not (link.rate and link.round_trip) else link
        for _, link in sorted(found.items())
    ]


@dataclass(frozen=True)
class _Fault:
    """A kind of bad links, with what to say of them."""

    check: str
    rule: str
    links: list[Link]
    show: Callable[[Link], str]


def _faults(links: Sequence[Link]) -> list[_Fault]:
    alive = [link for link in links if link.error is None]
    faults = [
        _Fault(
            "link",
            "all nodes reach each other",
            [link for link in links if link.error is not None],
            lambda link: str(link.error),
        )
    ]
    if alive:
        usual = _usual(alive, lambda link: link.rate)
        least = max(SLOWEST, SLOW_SHARE * usual)
        longest = max(LATE_SECONDS, LATE_TIMES / _usual(alive, lambda link: 1 / link.round_trip))
        faults.append(
            _Fault(
                "link bandwidth",
                f"at least {gigabits(least)} (half of what is usual, {gigabits(usual)}, and of 1 Gbit/s)",
                [link for link in alive if link.rate < least],
                lambda link: gigabits(link.rate),
            )
        )
        faults.append(
            _Fault(
                "link latency",
                f"round trips of at most {1e3 * longest:.3g} ms (5 times what is usual, and 1 ms)",
                [link for link in alive if link.round_trip > longest],
                lambda link: f"{1e3 * link.round_trip:.3g} ms",
            )
        )
    return faults


def _usual(links: Sequence[Link], value: Callable[[Link], float]) -> float:
    """The median over the nodes of the median of a node's links.

    One node of three that is slow has two thirds of all links: their median would be slow.
    """
    own: dict[int, list[float]] = {}
    for link in links:
        for node in (link.sender, link.receiver):
            own.setdefault(node, []).append(value(link))
    return statistics.median_high(statistics.median_high(values) for values in own.values())


def suspects(links: Sequence[Link], dead: bool = True) -> list[tuple[int, int]]:
    """The pairs of which a direction is bad; without ``dead`` only where something arrives."""
    bad = [link for fault in _faults(links) for link in fault.links if dead or link.error is None]
    return sorted({(min(link.sender, link.receiver), max(link.sender, link.receiver)) for link in bad})


def blame(bad: Iterable[tuple[int, int]], measured: Iterable[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Who is the cause of bad pairs: a node of which more than half of all pairs are bad, and two at least.

    Args:
        bad: pairs, in any direction.
        measured: all pairs that were measured.

    Returns:
        The causes, the worst first; and the ends of the bad pairs that have no cause, where either may be at fault.
    """
    left = {frozenset(pair) for pair in bad}
    all_pairs = {frozenset(pair) for pair in measured}
    causes: list[int] = []
    while True:
        counts = {node: sum(node in pair for pair in left) for node in set().union(*left)}
        sure = {
            node: count
            for node, count in counts.items()
            if count >= 2 and 2 * count > sum(node in pair for pair in all_pairs)
        }
        if not sure:
            return causes, sorted(counts)
        worst = sorted(node for node, count in sure.items() if count == max(sure.values()))
        causes += worst
        left = {pair for pair in left if not pair & set(worst)}


def judge_links(links: Sequence[Link], names: Sequence[str]) -> list[Finding]:
    """What is wrong with the links, by node; or one finding that they are good.

    Args:
        links: of all nodes, see :func:`merge`.
        names: of the nodes.
    """
    findings = []
    pairs = [(link.sender, link.receiver) for link in links]
    for fault in _faults(links):
        causes, ends = blame([(link.sender, link.receiver) for link in fault.links], pairs)
        for node in (*causes, *ends):
            own = [
                link
                for link in fault.links
                if node in (link.sender, link.receiver)
                and (node in causes or not {link.sender, link.receiver} & set(causes))
            ]
            either = "this node's cable, switch port or network interface; keep jobs off it (--exclude) until then"
            if node in ends:
                either = "the cable, switch port or interface of either end: a third node would tell which"
            if fault.check == "link":
                either += "; or a firewall between them: ranks use ports of any number"
            value = _listed(_directions(own, node, names, fault.show))
            findings.append(Finding(fault.check, Verdict.BAD, names[node], value, fault.rule, f"look at {either}"))
    if findings or not links:
        return findings
    rates, trips = [link.rate for link in links], [link.round_trip for link in links]
    value = (
        f"{len(links)} directions: {gigabits(min(rates))} to {gigabits(max(rates))}, round trips "
        f"{1e3 * min(trips):.3g} to {1e3 * max(trips):.3g} ms"
    )
    rule = _faults(links)[1].rule + ", " + _faults(links)[2].rule
    return [Finding("links", Verdict.GOOD, "all", value, rule)]


def _directions(links: Sequence[Link], node: int, names: Sequence[str], show: Callable[[Link], str]) -> list[str]:
    """The links of a node as ``to n2: 0.02 Gbit/s``."""
    return [
        f"to {names[link.receiver]}: {show(link)}"
        if link.sender == node
        else f"from {names[link.sender]}: {show(link)}"
        for link in links
    ]


def _listed(texts: Sequence[str], most: int = 4) -> str:
    return ", ".join([*texts[:most], *([f"and {len(texts) - most} more"] if len(texts) > most else [])])


def judge_clocks(links: Sequence[Link], names: Sequence[str]) -> list[Finding]:
    """Which clocks are wrong by more than ``MOST_SKEW``, or one finding that they agree; none without a link."""
    offsets = _offsets(links)
    if len(offsets) < 2:
        return []
    middle = sorted(offsets, key=lambda node: offsets[node])[(len(offsets) - 1) // 2]
    skews = {node: offset - offsets[middle] for node, offset in offsets.items()}
    rule = f"at most {MOST_SKEW:g} s apart"
    way_out = "start a time service on it (chronyd, ntpd or systemd-timesyncd) and look at `chronyc tracking`"
    findings = [
        Finding(
            "clock skew",
            Verdict.BAD,
            names[node],
            f"{abs(skew):.3f} s {'ahead of' if skew > 0 else 'behind'} {names[middle]}",
            rule,
            way_out,
        )
        for node, skew in sorted(skews.items())
        if abs(skew) > MOST_SKEW
    ]
    if findings:
        return findings
    span = max(skews.values()) - min(skews.values())
    return [Finding("clock skew", Verdict.GOOD, "all", f"{1e3 * span:.3g} ms apart", rule)]


def _offsets(links: Sequence[Link]) -> dict[int, float]:
    """How far the clock of each node that node 0 reaches, over others if need be, is ahead of node 0's."""
    offsets, reached = {0: 0.0}, [0]
    for node in reached:
        for link in links:
            if link.offset is None or node not in (link.sender, link.receiver):
                continue
            other, sign = (link.receiver, 1) if link.sender == node else (link.sender, -1)
            if other not in offsets:
                offsets[other] = offsets[node] + sign * link.offset
                reached.append(other)
    return offsets


def gigabits(rate: float) -> str:
    """Bytes per second as Gbit/s."""
    return f"{8e-9 * rate:.3g} Gbit/s"
