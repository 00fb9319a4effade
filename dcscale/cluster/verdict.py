"""Which rank is at fault when a run hangs, judged from what all ranks say. Pure functions: no clock, no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dcscale.cluster.flight_recorder import Collective


@dataclass(frozen=True)
class Status:
    """What a rank does; every heartbeat carries it."""

    rank: int
    host: str
    pid: int
    """0 until the first heartbeat."""

    namespace: str
    """Its PID namespace: ``pid`` means the same process only within it."""

    step: int
    """Optimizer steps done."""

    phase: str
    seconds: float
    """Seconds in this phase."""

    started: dict[str, int]
    """Collectives started so far, by process group."""

    ending: bool = False
    """It is about to end and will not answer any more."""

    stacks: str = ""
    """Of rank 0: the folder that all ranks are asked to write their stacks into; empty: none."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})" if self.pid else f"rank {self.rank} ({self.host})"

    @property
    def place(self) -> str:
        """Step and phase, for messages."""
        return f"step {self.step + 1}, phase {self.phase}"


@dataclass(frozen=True)
class Answer:
    """What a rank says when it is asked because a hang is suspected."""

    status: Status
    where: str
    """The innermost line of its main thread."""

    waiting: Collective | None
    """Its oldest collective in flight."""

    members: list[int] | None
    """The ranks of the group of that collective; None: all."""

    latest: Collective | None
    """The last collective that it has started."""

    deviation: str | None
    """How the collectives of its last step differ from those of the steps before."""

    processes: dict[int, str]
    """What it sees of the processes of lost ranks on its own host, by rank."""

    unlikeness: int = 0
    """In how many collectives that step differs from the most similar one before."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Answer:
        collectives = {name: value[name] and Collective(**value[name]) for name in ("waiting", "latest")}
        processes = {int(rank): text for rank, text in value["processes"].items()}
        return cls(**{**value, **collectives, "status": Status(**value["status"]), "processes": processes})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """Who is at fault, and why."""

    ranks: list[int]
    host: str
    """Of the first of them."""

    reason: str
    """One sentence that names the ranks with host and process id."""


def judge(
    statuses: Mapping[int, Status], answers: Mapping[int, Answer], silent: Mapping[int, float], over: Collection[int]
) -> Verdict:
    """The rank, or ranks, for which the others wait.

    In this order: a rank that does not answer; one that is not in a collective in which others wait for it; one whose
    collectives differ from those of its own earlier steps; one that waits in another collective than most; the slowest.

    Args:
        statuses: the last status of every rank that takes part.
        answers: the answers to the question what they do, by rank.
        silent: seconds since the last heartbeat of ranks of which one was missing.
        over: ranks that were in their phase for longer than its limit.
    """
    lost = sorted(statuses.keys() - answers.keys())
    if lost:
        return _lost(lost, statuses, answers, silent)
    current = {rank: answer.status for rank, answer in answers.items()}
    waiting = {rank: answer.waiting for rank, answer in answers.items() if answer.waiting is not None}
    absent = _absent(answers)
    stuck = sorted(absent.keys() - waiting.keys()) or sorted(set(over) - waiting.keys())
    if stuck:
        return _stuck(stuck, answers, waiting, absent)
    deviating = sorted(rank for rank, answer in answers.items() if answer.deviation)
    if len(deviating) == len(answers):  # a step of a new kind: then the one that deviates most
        most = max(answer.unlikeness for answer in answers.values())
        deviating = [rank for rank in deviating if answers[rank].unlikeness == most]
    if 0 < len(deviating) < len(answers):
        reason = f"{_names(deviating, current)} {answers[deviating[0]].deviation}; so the ranks wait for each other"
        return _verdict(deviating, current, reason)
    if not waiting:  # all answer, and no rank is over its limit: a missing heartbeat has come back meanwhile
        rank = max(silent, key=silent.__getitem__)
        return _verdict([rank], current, f"{current[rank]} had no heartbeat for {silent[rank]:.0f} s")
    return _all_wait(current, waiting)


def _verdict(ranks: list[int], statuses: Mapping[int, Status], reason: str) -> Verdict:
    return Verdict(ranks, statuses[ranks[0]].host, reason)


def _lost(
    lost: list[int], statuses: Mapping[int, Status], answers: Mapping[int, Answer], silent: Mapping[int, float]
) -> Verdict:
    seen = next((a.processes[lost[0]] for a in answers.values() if lost[0] in a.processes), None)
    seconds = f": no heartbeat for {silent[lost[0]]:.0f} s" if lost[0] in silent else ""
    reason = (
        f"{_names(lost, statuses)} {'does' if len(lost) == 1 else 'do'} not answer{seconds}, the last one in "
        f"{statuses[lost[0]].place}" + (f"; {seen}" if seen else "")
    )
    return _verdict(lost, statuses, reason)


def _absent(answers: Mapping[int, Answer]) -> dict[int, Collective]:
    """Ranks that have not started a collective in which another rank waits; and that collective."""
    absent: dict[int, Collective] = {}
    for answer in answers.values():
        wanted = answer.waiting
        if wanted is not None:
            for rank in answers if answer.members is None else answers.keys() & set(answer.members):
                if answers[rank].status.started.get(wanted.group, 0) < wanted.sequence:
                    absent.setdefault(rank, wanted)
    return absent


def _stuck(
    stuck: list[int],
    answers: Mapping[int, Answer],
    waiting: Mapping[int, Collective],
    absent: Mapping[int, Collective],
) -> Verdict:
    """For ranks that are in no collective."""
    current = {rank: answer.status for rank, answer in answers.items()}
    first = answers[stuck[0]]
    reason = (
        f"{_names(stuck, current)} {'hangs' if len(stuck) == 1 else 'hang'} outside of collectives: "
        f"{first.status.place}, for {first.status.seconds:.0f} s, at {first.where}"
    )
    if stuck[0] in absent:
        wanted = absent[stuck[0]]
        waits = [rank for rank, c in waiting.items() if (c.group, c.sequence) == (wanted.group, wanted.sequence)]
        reason += f"; {ranks_text(waits)} {'waits' if len(waits) == 1 else 'wait'} for it in {wanted}"
    return _verdict(stuck, current, reason)


def _all_wait(statuses: Mapping[int, Status], waiting: Mapping[int, Collective]) -> Verdict:
    """For ranks that wait in collectives, while none of their own history says which one is wrong."""
    kinds = {rank: (c.group, c.sequence, c.op, str(c.sizes)) for rank, c in waiting.items()}
    (usual, count), *others = Counter(kinds.values()).most_common()
    if others and count > len(kinds) / 2:
        odd = sorted(rank for rank, kind in kinds.items() if kind != usual)
        collective = next(waiting[rank] for rank in kinds if kinds[rank] == usual)
        reason = f"{_names(odd, statuses)} {'is' if len(odd) == 1 else 'are'} in {waiting[odd[0]]}"
        return _verdict(odd, statuses, f"{reason}, most ranks in {collective}")
    if others:
        # It cannot be known which half is wrong. The rank that has done less more likely holds the others up.
        slowest = min(waiting, key=lambda rank: (statuses[rank].step, sum(statuses[rank].started.values())))
        reason = f"the ranks wait for each other in different collectives; {statuses[slowest]} has done the least"
        return _verdict([slowest], statuses, f"{reason} and is in {waiting[slowest]}")
    last = max(waiting, key=lambda rank: waiting[rank].created)
    reason = f"all ranks are in {waiting[last]}, which does not complete, as when the network between them fails"
    return _verdict([last], statuses, f"{reason}; {statuses[last]} entered it last")


def rank_lines(statuses: Mapping[int, Status], answers: Mapping[int, Answer], most: int = 8) -> list[str]:
    """What each rank does, and its last collective: a line for ranks that do the same, at most ``most`` lines."""
    ranks: dict[str, list[int]] = {}
    for rank, status in sorted(statuses.items()):
        answer = answers.get(rank)
        if answer is None:
            started = ", ".join(f"{number} in group {group}" for group, number in status.started.items())
            text = "no answer; last collectives that it had started by its last heartbeat: " + (started or "unknown")
        elif answer.waiting is not None:
            text = f"{answer.status.place}, waits in {answer.waiting}"
        else:
            latest = "" if answer.latest is None else f"; its last collective, {answer.latest}, is done"
            text = f"{answer.status.place}, in no collective, at {answer.where}{latest}"
        ranks.setdefault(text, []).append(rank)
    lines = [f"{ranks_text(same)}: {text}" for text, same in ranks.items()]
    return [*lines[:most], f"{len(lines) - most} more, each in something else"] if len(lines) > most else lines


def ranks_text(ranks: Iterable[int]) -> str:
    """``rank 3``, or ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"ranks {text}" if len(runs) > 1 or runs[0][0] != runs[0][1] else f"rank {text}"


def _names(ranks: list[int], statuses: Mapping[int, Status], most: int = 4) -> str:
    """The ranks with their hosts and process ids, at most ``most`` of them."""
    names = [str(statuses[rank]) for rank in ranks[:most]]
    if len(ranks) > most:
        names.append(f"{len(ranks) - most} more")
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
