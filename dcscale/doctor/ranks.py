"""What only several ranks can tell: who is missing, what differs between them, their links, clocks, shards and folders.

All ranks of a job call :func:`check_ranks` together; those with local rank 0 speak for their nodes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dcscale.config import Config
from dcscale.doctor.collectives import (
    SIZES,
    all_reduce_problems,
    all_reduce_rates,
    judge_rates,
    judge_sums,
    pair_problems,
    wrong_ranks,
)
from dcscale.doctor.findings import Finding, Verdict
from dcscale.doctor.links import (
    MOST_ROUNDS,
    Link,
    Meter,
    disjoint_rounds,
    judge_clocks,
    judge_links,
    merge,
    pair_rounds,
    suspects,
)
from dcscale.doctor.meeting import LostRanksError, Meeting
from dcscale.doctor.shared import check_address, run_folder_seen, shards_seen
from dcscale.parallel.agreement import Differences, differences, start_facts
from dcscale.parallel.environment import Environment
from dcscale.parallel.rendezvous import ArrivalError, Rendezvous, join, name_ranks

PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "CUDA_", "CUBLAS_", "OMP_", "MKL_", "DS_", "TRITON_", "UCX_")
"""Environment variables that change results or speed, and must be the same on all ranks."""
_OF_A_RANK = ("CUDA_VISIBLE_DEVICES",)
_AGAIN = 2
"""Times that a bad link is measured again."""
_SHOWN = 3
"""Differences of a node that are shown."""

_KINDS = {
    "source ": ("code", "run the same checkout on all nodes: from a shared disk, or install it again on this one"),
    "version of ": ("versions", "use one environment or container image on all nodes (bash launch/install.sh)"),
    "variable ": ("environment", "export it in the job script before srun; torchrun and deepspeed: .deepspeed_env"),
    "device": ("devices", "ask for nodes of one kind (srun --constraint, --gres), or exclude this one"),
    "": ("config", "start all ranks with the same arguments, and see that they read the same config files"),
}
"""Prefix of a fact -> name of the check, and the way out."""


def check_ranks(
    environment: Environment,
    config: Config | None,
    local: Callable[[], Iterable[Finding]],
    *,
    seconds: float = 60.0,
    patience: float = 2.5,
    print_line: Callable[[str], None] = lambda line: None,
) -> tuple[list[Finding], bool]:
    """Everything about a job of several ranks; all ranks call it together.

    Args:
        environment: this process.
        config: settings of the run, which have passed ``check_config``; None: only the machines are checked.
        local: the checks of one machine; called on local rank 0 of each node.
        seconds: to wait for a rank, which is then named. The checks of a machine may take twice as long.
        patience: seconds to wait for a link, and twice as long until a file is seen on all nodes.
        print_line: called with a line that says for whom rank 0 waits.

    Returns:
        All findings on rank 0, on the other ranks those that are bad; and whether this rank should print them: rank 0,
        or, where that does not answer, one of each node.
    """
    try:
        rendezvous = join(environment, seconds / 60, print_line, notice_seconds=seconds / 3, setting="--wait")
    except ArrivalError as error:
        speaks = environment.rank == 0 or (environment.local_rank == 0 and not error.from_rank0)
        return [*(local() if speaks else ()), *_not_arrived(error, environment, seconds)], speaks
    checks = _RankChecks(rendezvous, environment, config, seconds, patience)
    try:
        checks.run(local)
        bad = checks.meeting.exchange(
            "the end", None, lambda _: [f.as_json() for f in checks.findings if f.verdict is Verdict.BAD], seconds
        )
        checks.meeting.end()
    except LostRanksError as error:
        speaks = environment.rank == 0 or (environment.local_rank == 0 and 0 in error.ranks)
        return [*checks.findings, *_lost(error, rendezvous.hosts)], speaks
    if environment.rank == 0:
        return checks.findings, True
    return [Finding(**{**found, "verdict": Verdict(found["verdict"])}) for found in bad], False


def _not_arrived(error: ArrivalError, environment: Environment, seconds: float) -> list[Finding]:
    """Findings that name who did not arrive, as far as it is known."""
    rule = "all ranks arrive where rank 0 waits"
    way_out = "look whether its host runs, for an error of its process, and for a firewall before MASTER_PORT"
    hosts = _by_host(error.missing)
    if environment.rank != 0 or not hosts:
        return [Finding("ranks", Verdict.BAD, socket.gethostname(), str(error), rule, way_out)]
    late = f"did not arrive within {seconds:g} s (--wait)"
    return [
        Finding("ranks", Verdict.BAD, host or "unknown", f"{name_ranks(ranks)} {late}", rule, way_out)
        for host, ranks in hosts.items()
    ]


def _lost(error: LostRanksError, hosts: Sequence[str]) -> list[Finding]:
    rule = "all ranks answer until the end"
    way_out = "look at its output and dmesg for why it ended or hangs; exclude the node if its machine does not answer"
    return [
        Finding("ranks", Verdict.BAD, host, f"{name_ranks(ranks)} was lost: {error}", rule, way_out)
        for host, ranks in _by_host({rank: hosts[rank] for rank in error.ranks}).items()
    ]


def _by_host(hosts: Mapping[int, str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, host in hosts.items():
        found.setdefault(host, []).append(rank)
    return found


class _RankChecks:
    """The checks one after the other; rank 0 collects the findings."""

    def __init__(
        self, rendezvous: Rendezvous, environment: Environment, config: Config | None, seconds: float, patience: float
    ):
        self.meeting = Meeting(rendezvous, environment)
        self.findings: list[Finding] = []
        self._rendezvous, self._environment, self._config = rendezvous, environment, config
        self._seconds, self._patience = seconds, patience
        self._leaders: list[int] = []
        """The rank that speaks for each node."""
        self._token = ""
        self._fast = 0.0
        """Median bandwidth of the links, bytes per second."""

    def run(self, local: Callable[[], Iterable[Finding]]) -> None:
        """Raises LostRanksError if a rank does not answer."""
        environment = self._environment
        places = self._gather("the start", environment.local_rank)
        leaders = [rank for rank, place in enumerate(places) if place == 0]
        self._leaders, self._token = self._agree([leaders, secrets.token_hex(16)])
        self._compare()
        own = [finding.as_json() for finding in local()] if self._leads else []
        for found in self._gather("the checks of each machine", own, 2 * self._seconds):
            self.findings += [Finding(**{**one, "verdict": Verdict(one["verdict"])}) for one in found]
        if len(self._leaders) > 1 and self._config is not None:
            self._compare_disks(self._config)
        problem, slow = self._check_links() if len(self._leaders) > 1 else (None, False)
        self._check_collectives(problem, slow)

    @property
    def _leads(self) -> bool:
        return self._environment.rank in self._leaders

    @property
    def _names(self) -> list[str]:
        """Of the nodes."""
        hosts = [self.meeting.hosts[rank] for rank in self._leaders]
        return [host if hosts.count(host) == 1 else f"{host} (rank {rank})" for host, rank in zip(hosts, self._leaders)]

    def _gather(self, what: str, value: Any, seconds: float | None = None) -> list[Any]:
        """The values of all ranks on rank 0; nothing on the others."""
        kept: list[Any] = []
        self.meeting.exchange(what, value, kept.extend, seconds or self._seconds)
        return kept

    def _agree(self, value: Any, what: str = "the start") -> Any:
        """What rank 0 says."""
        return self.meeting.exchange(what, None, lambda _: value, self._seconds)

    # -- what must be the same ---------------------------------------------------------------------------------

    def _compare(self) -> None:
        facts = start_facts(self._config) | _more_facts(self._environment.device)
        expected = self._agree(facts, "config and code")
        found = self._gather("config and code", differences(facts, expected))
        if found:
            self.findings += judge_differences(found, self.meeting.hosts, len(facts))

    def _compare_disks(self, config: Config) -> None:
        """Shards and run folder, as the nodes see them."""
        seen = self._gather("shards", shards_seen(config) if self._leads else None)
        if seen:
            shards = [seen[rank] for rank in self._leaders]
            self.findings += judge_shards(shards, self._names)
        number = self._leaders.index(self._environment.rank) if self._leads else None
        self.findings += run_folder_seen(
            config, self.meeting, number, self._token, self._names, self._seconds, 2 * self._patience
        )

    # -- links -------------------------------------------------------------------------------------------------

    def _check_links(self) -> tuple[str | None, bool]:
        """Measures links and clocks.

        Returns:
            On all ranks, why collectives cannot be tried, None if they can; and whether a link is slow.
        """
        meter, mine, address = None, None, None
        if self._leads:
            number = self._leaders.index(self._environment.rank)
            meter = Meter(number, bytes.fromhex(self._token), patience=self._patience)
            address, problem = check_address(self._rendezvous.address, self.meeting.hosts)
            mine = [address, meter.port, problem]
        with meter or contextlib.nullcontext():
            said = self._gather("addresses", mine)
            addresses = self._agree([said[rank] for rank in self._leaders] if said else None, "addresses")
            for name, (_, _, problem) in zip(self._names, addresses):
                if problem is not None and self._environment.rank == 0:
                    rule = "other nodes reach it by the address that gloo and NCCL announce"
                    way_out = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between the nodes"
                    way_out += ", or correct the name in /etc/hosts"
                    self.findings.append(Finding("node address", Verdict.BAD, name, problem, rule, way_out))
            links = self._measure(meter, addresses)
        judged = judge_links(links, self._names)
        if self._environment.rank == 0:
            self.findings += [*judged, *judge_clocks(links, self._names)]
            alive = [link.rate for link in links if link.error is None]
            self._fast = statistics.median(alive) if alive else 0.0
        dead = any(link.error is not None for link in links)
        problem = "there are dead links" if dead else "of a node's address" if any(a[2] for a in addresses) else None
        return self._agree([problem, any(finding.verdict is Verdict.BAD for finding in judged)], "links")

    def _measure(self, meter: Meter | None, addresses: list[list[Any]]) -> list[Link]:
        """All links on rank 0, those of this node elsewhere."""
        rounds, found, number = pair_rounds(len(addresses), MOST_ROUNDS), {}, 0
        for attempt in range(1 + _AGAIN):
            measured: list[Link] = []
            for pairs in rounds:
                number += 1
                own = []
                for pair in pairs if meter is not None else ():
                    if meter.number in pair:
                        partner = sum(pair) - meter.number
                        host, port, _ = addresses[partner]
                        own = meter.measure(partner, (host, port), number)
                # After each round, so that no pair disturbs another's measurement.
                for links in self._gather(f"links, round {number}", [astuple(link) for link in own]):
                    measured += [Link(*values) for values in links]
            for link in merge(measured):
                key = link.sender, link.receiver
                found[key] = link.better(found[key]) if key in found else link
            # A busy processor looks like a slow link, and seldom like a dead one, which takes long to measure.
            again = suspects(list(found.values()), dead=attempt == 0) if attempt < _AGAIN else []
            rounds = self._agree(disjoint_rounds(again), "links")
            if not rounds:
                break
        return list(found.values())

    # -- collectives -------------------------------------------------------------------------------------------

    def _check_collectives(self, problem: str | None, slow: bool) -> None:
        environment, rank0 = self._environment, self._environment.rank == 0
        on_gpus = self._gather("devices", environment.device.type == "cuda")
        backends = self._agree(["gloo", "nccl"] if on_gpus and all(on_gpus) else ["gloo"], "devices")
        if environment.world_size == 1 or problem is not None:
            why = "there is one rank only" if problem is None else f"not tried, because {problem}"
            rule = "exact sums of integers, the same bits on all ranks"
            if rank0:
                self.findings += [Finding(f"all-reduce ({b})", Verdict.UNKNOWN, "all", why, rule) for b in backends]
            return
        # Otherwise a collective without an answer ends the process, in the middle of the table.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        for backend in backends:
            if not self._check_backend(backend, slow):
                return  # what is left of the process group may hang
        dist.destroy_process_group()

    def _check_backend(self, backend: str, slow: bool) -> bool:
        """Whether it works, right or wrong. Over slow links only small sums are tried."""
        device = self._environment.device if backend == "nccl" else torch.device("cpu")
        group: dist.ProcessGroup | None = None

        def sums() -> dict[str, Any]:
            nonlocal group
            group = self._open_group(backend)
            return all_reduce_problems(group, device, sizes=SIZES[:2] if slow else SIZES)

        found = self._attempt(backend, sums)
        if found is None:
            return False
        # If only some are wrong, these are the ones.
        wanted = self._agree(bool(found) and len(wrong_ranks(found)) == len(found), backend)
        pairs = self._attempt(backend, lambda: pair_problems(group, device)) if wanted else []
        rates = self._attempt(backend, lambda: list(all_reduce_rates(group, device, 0.01 if slow else 0.5).items()))
        if pairs is None or rates is None:
            return False
        if self._environment.rank == 0:
            self.findings += judge_sums(backend, found, pairs, self.meeting.hosts)
            self.findings.append(judge_rates(backend, dict(map(tuple, rates[0])), self._fast or None))
        return True

    def _open_group(self, backend: str) -> dist.ProcessGroup:
        timeout = timedelta(seconds=self._seconds)
        if backend == "nccl":
            return dist.new_group(backend="nccl", timeout=timeout, device_id=self._environment.device)
        environment = self._environment
        store = dist.PrefixStore("doctor-group", self._rendezvous.store)
        dist.init_process_group(
            "gloo", store=store, rank=environment.rank, world_size=environment.world_size, timeout=timeout
        )
        return dist.group.WORLD

    def _attempt(self, backend: str, call: Callable[[], Any]) -> list[Any] | None:
        """The results of a collective call on all ranks, on rank 0; nothing on the others. None if it failed."""
        result, error = None, None
        try:
            result = call()
        except RuntimeError as failure:  # of gloo or NCCL; also dist.DistError
            error = str(failure).partition("\n")[0]
        kept: list[Any] = []

        def judge(values: list[Any]) -> bool:
            kept.extend(value for value, _ in values)
            errors = [(rank, text) for rank, (_, text) in enumerate(values) if text]
            for rank, text in errors[:8]:
                rule, way_out = "collectives work", "NCCL_DEBUG=INFO or TORCH_CPP_LOG_LEVEL=INFO say more"
                host, value = self.meeting.hosts[rank], f"rank {rank}: {text}"
                self.findings.append(Finding(f"all-reduce ({backend})", Verdict.BAD, host, value, rule, way_out))
            return not errors

        good = self.meeting.exchange(f"all-reduce ({backend})", [result, error], judge, 2 * self._seconds)
        return kept if good else None


def _more_facts(device: torch.device, variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What must be the same on all ranks besides :func:`start_facts`."""
    facts = {
        f"variable {name}": value if len(value) <= 60 else f"{value[:60]}..."
        for name, value in variables.items()
        if name.startswith(PREFIXES) and name not in _OF_A_RANK
    }
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["version of NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    else:
        facts["device"] = device.type
    facts["version of CUDA in torch"] = str(torch.version.cuda)
    return facts


def judge_differences(found: Sequence[Differences], hosts: Sequence[str], facts: int) -> list[Finding]:
    """Who has other settings, code, versions or variables than most ranks.

    Args:
        found: where each rank differs from rank 0, see :func:`dcscale.parallel.agreement.differences`.
        hosts: of each rank.
        facts: number of facts that rank 0 has.
    """
    values: dict[str, dict[int, str]] = {}
    rank0: dict[str, str] = {}
    for rank, own in enumerate(found):
        for key, value, expected in own:
            values.setdefault(key, {})[rank] = value
            rank0[key] = expected
    texts: dict[tuple[str, str], list[str]] = {}
    for key, others in values.items():
        counts = Counter(others.get(rank, rank0[key]) for rank in range(len(hosts)))
        # As many have the one as the other: rank 0 is right.
        usual = max(counts, key=lambda value: (counts[value], value == rank0[key]))
        for rank, host in enumerate(hosts):
            value = others.get(rank, rank0[key])
            if value != usual:
                kind = next(prefix for prefix in _KINDS if key.startswith(prefix))
                name = key.removeprefix(kind) if kind != "device" else "device"
                texts.setdefault((host, kind), []).append(f"{name} is {value}, not {usual}")
    if not texts:
        rule = "the same settings, code, versions and variables on all ranks"
        return [Finding("equality", Verdict.GOOD, "all", f"{facts:,} facts equal on {len(hosts):,} ranks", rule)]
    findings = []
    for (host, kind), lines in texts.items():
        check, way_out = _KINDS[kind]
        lines = list(dict.fromkeys(lines))
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        value = "; ".join([*lines[:_SHOWN], *more])
        findings.append(Finding(check, Verdict.BAD, host, value, "as on most ranks", way_out))
    return findings


def judge_shards(seen: Sequence[Mapping[str, Sequence[str]]], names: Sequence[str]) -> list[Finding]:
    """Which nodes do not see the shards, or see others.

    Args:
        seen: of each node, see :func:`dcscale.doctor.shared.shards_seen`.
        names: of the nodes.
    """
    findings, rule = [], "all nodes see the same shards"
    if not any(identity for found in seen for identity, _ in found.values()):
        texts = [f"{setting}: {text}" for setting, (_, text) in seen[0].items()]
        return [Finding("same shards", Verdict.UNKNOWN, "all", f"no node can read any: {'; '.join(texts)}", rule)]
    for setting in seen[0]:
        counts = Counter(found[setting][0] for found in seen if found[setting][0])
        usual = max(counts, key=counts.__getitem__, default="")
        for name, found in zip(names, seen):
            identity, text = found[setting]
            if identity != usual or not identity:
                other = "" if not identity else "other shards than on most nodes: "
                way_out = f"mount the same disk on all nodes, or copy the shards to this one again ({setting})"
                findings.append(Finding("same shards", Verdict.BAD, name, f"{setting}: {other}{text}", rule, way_out))
    if findings:
        return findings
    value = ", ".join(f"{setting}: {text}" for setting, (_, text) in seen[0].items())
    return [Finding("same shards", Verdict.GOOD, "all", value, rule)]
