"""This host: memory and limits of processes, against what its ranks need; ports, names of hosts, and the clock."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import resource
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dcscale.doctor.findings import Finding
from dcscale.doctor.local.run import listeners, named_processes
from dcscale.doctor.local.subject import GIB, CommandError, Subject, counted, run_command, size

# -- memory and limits -------------------------------------------------------------------------------------------------

_MOST_SWAPPED = 0.05
"""Of the memory."""

_NCCL_SHM = 64 << 20
"""Shared memory of a rank with other ranks on the same machine: NCCL's buffers and its proxy's."""

_RANK_MEMORY = 4 * GIB
"""Host memory of a rank without a copy of the state: Python, torch, CUDA's context, shards being read."""
_WRITER_MEMORY = 5 * GIB
"""Of rank 0 while it writes the weights, see ``checkpoint.background``."""

_LIMITS: tuple[tuple[int, str, str], ...] = (
    (resource.RLIMIT_AS, "ulimit -v", "address space"),
    (resource.RLIMIT_CPU, "ulimit -t", "processor time"),
    (resource.RLIMIT_FSIZE, "ulimit -f", "size of a file"),
)
"""Limits that end a run in its middle, if there are any."""

_COUNTS = (
    ("kernel.pid_max", "proc/sys/kernel/pid_max"),
    ("pids.max", "sys/fs/cgroup/pids.max"),
    ("pids.max", "sys/fs/cgroup/pids/pids.max"),
)
"""Limits of processes of the machine and of the container, and their files."""

Limit = Callable[[int], tuple[int, int]]
"""Soft and hard limit of a resource, as ``resource.getrlimit``."""


def check_host(
    subject: Subject,
    root: Path = Path("/"),
    limit: Limit = resource.getrlimit,
    shm_free: Callable[[], tuple[int, int]] | None = None,
) -> Iterator[Finding]:
    """Memory, swap, ``/dev/shm``, open files, processes and other limits.

    Args:
        subject: this machine and the run.
        root: where ``proc`` and ``sys`` are, for tests.
        limit: the limits of this process, for tests.
        shm_free: bytes free and in all of ``/dev/shm``, for tests.
    """
    yield from _memory(subject, root)
    yield _shared_memory(subject, shm_free or (lambda: _free(root / "dev/shm")))
    yield _open_files(subject, limit)
    yield _processes(subject, root, limit)
    yield _other_limits(subject, root, limit)


def _memory(subject: Subject, root: Path) -> Iterator[Finding]:
    rule, way_out = "enough for the ranks on this machine", "end other processes, or use more or larger nodes"
    try:
        info = meminfo((root / "proc/meminfo").read_text())
        total, available = info["MemTotal"], info["MemAvailable"]
        swapped = info["SwapTotal"] - info["SwapFree"]
    except (OSError, ValueError, KeyError) as error:
        yield subject.unknown("host memory", f"/proc/meminfo cannot be read: {error!r}", rule)
        return
    container = cgroup_memory(root)
    inside = ""
    if container is not None and container[0] < total:
        total, available = container[0], min(available, container[0] - container[1])
        inside = " of this container or job"
    parameters = subject.parameters()
    needed, parts = (
        subject.local_ranks * _RANK_MEMORY,
        f"{size(_RANK_MEMORY)} for each of {counted(subject.local_ranks, 'rank')}",
    )
    if parameters is None or subject.config is None:
        needed, parts = 2 * GIB, "without a config only the least for a rank is known"
    elif parameters < 100_000_000:  # such as the quickstart, on small machines
        needed, parts = subject.local_ranks * GIB, f"1 GiB for each of {counted(subject.local_ranks, 'rank')}"
    else:
        # The state is divided among the ranks: a copy for the checkpoint, and with offload the state itself.
        copies = 2 if subject.config.parallel.offload_optimizer else 1
        state = copies * 12 * parameters * subject.local_ranks // subject.ranks
        needed += state + _WRITER_MEMORY
        parts += f", {size(state)} for optimizer states, {size(_WRITER_MEMORY)} to write weights"
    value = f"{size(available)} available of {size(total)}{inside}"
    yield subject.judged(available >= needed, "host memory", value, f"at least {size(needed)}: {parts}", way_out)
    rule = f"at most {_MOST_SWAPPED:.0%} of the memory swapped out: a run that swaps crawls"
    way_out = "find what fills the memory (ps aux --sort -rss), then swapoff -a; swapon -a as root"
    yield subject.judged(swapped <= _MOST_SWAPPED * total, "swap", f"{size(swapped)} swapped out", rule, way_out)


def meminfo(text: str) -> dict[str, int]:
    """``/proc/meminfo`` in bytes."""
    lines = (line.partition(":") for line in text.splitlines())
    return {name: int(value.split()[0]) * 1024 for name, _, value in lines if value.split()}


def cgroup_memory(root: Path) -> tuple[int, int] | None:
    """Limit and use without cached files, in bytes, of the control group of this process; None: no limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for controllers, path in (line.split(":", 2)[1:] for line in lines if line.count(":") >= 2):
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # A limit of any group above counts too. In a container, the path may not be there, but the root is.
        place = path.strip("/").split("/")
        for depth in range(len(place), -1, -1):
            folder = base.joinpath(*place[:depth])
            try:
                limit, used = ((folder / name).read_text().strip() for name in names)
                found.append((int(limit), int(used) - _cached(folder)))
            except (OSError, ValueError):  # no such group, or "max"
                continue
    return min(found, key=lambda pair: pair[0] - pair[1], default=None)


def _cached(group: Path) -> int:
    """Bytes of files that the kernel keeps in memory for a control group, and gives up if memory is needed."""
    lines = [line.split() for line in _text(group / "memory.stat").splitlines()]
    values = {line[0].removeprefix("total_"): int(line[1]) for line in lines if len(line) == 2}
    return values.get("inactive_file", 0) + values.get("active_file", 0)


def _shared_memory(subject: Subject, shm_free: Callable[[], tuple[int, int]]) -> Finding:
    ranks = subject.local_ranks
    needed = ranks * _NCCL_SHM if ranks > 1 else 1 << 20
    parts = f"{size(needed)} for {'collectives of ' * (ranks > 1)}{counted(ranks, 'rank')}"
    config = subject.config
    if config is not None and config.data.workers:
        from dcscale.data.stream.workers import shared_bytes

        each = shared_bytes(
            step_sequences=-(-config.train.global_batch_size // subject.ranks),
            sequence_length=config.data.sequence_length,
            workers=config.data.workers,
            prefetch_steps=config.data.prefetch_steps,
            document_mask=config.data.document_mask,
        )
        needed += ranks * each
        parts += f", {size(each)} for the data workers of each rank (data.workers = {config.data.workers})"
    rule = f"at least {size(needed)} free: {parts}"
    try:
        free, total = shm_free()
    except OSError as error:
        return subject.bad("/dev/shm", f"cannot be used: {error.strerror}", rule, "mount a tmpfs on /dev/shm, as root")
    way_out = "mount -o remount,size=SIZE /dev/shm as root, docker run --shm-size SIZE or --ipc=host; or data.workers=0"
    return subject.judged(free >= needed, "/dev/shm", f"{size(free)} free of {size(total)}", rule, way_out)


def _free(folder: Path) -> tuple[int, int]:
    usage = shutil.disk_usage(folder)
    return usage.free, usage.total


def _open_files(subject: Subject, limit: Limit) -> Finding:
    soft, hard = limit(resource.RLIMIT_NOFILE)
    workers = 0 if subject.config is None else subject.config.data.workers
    threads = 8 if subject.config is None else subject.config.data.read_threads
    # Process groups connect each pair of ranks; rank 0 serves two connections of each for the store.
    needed = 256 + 8 * subject.ranks + 16 * workers + 2 * threads
    parts = f"256, 8 for each of {counted(subject.ranks, 'rank')}, 16 a data worker, 2 a reading thread"
    shown = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    fits = soft == resource.RLIM_INFINITY or soft >= needed
    may = hard == resource.RLIM_INFINITY or hard >= needed
    raised = f"ulimit -n {max(needed, 65536) if hard == resource.RLIM_INFINITY else min(hard, 65536)} before the start"
    system = "raise the hard limit: nofile in /etc/security/limits.conf, LimitNOFILE of slurmd, docker --ulimit"
    rule = f"ulimit -n of at least {needed:,}: {parts}"
    return subject.judged(fits, "open files", shown, rule, raised if may else system)


def _processes(subject: Subject, root: Path, limit: Limit) -> Finding:
    workers = 0 if subject.config is None else subject.config.data.workers
    needed = subject.local_ranks * (64 + 16 * (workers + 1))
    rule = f"at least {needed:,} processes and threads: 64 a rank, and 16 more for it and each of its data workers"
    soft, _ = limit(resource.RLIMIT_NPROC)
    limits = {} if soft == resource.RLIM_INFINITY else {"ulimit -u": soft}
    for name, path in _COUNTS:
        text = _text(root / path)
        if text.isdecimal():
            limits[name] = int(text)
    value = ", ".join(f"{name} {count:,}" for name, count in limits.items()) or "unlimited"
    way_out = "raise the limit that is named: ulimit -u, sysctl -w kernel.pid_max, docker run --pids-limit"
    return subject.judged(all(count >= needed for count in limits.values()), "processes", value, rule, way_out)


def _other_limits(subject: Subject, root: Path, limit: Limit) -> Finding:
    found = []
    for number, option, name in _LIMITS:
        soft, _ = limit(number)
        if soft != resource.RLIM_INFINITY:
            found.append(f"{name} is limited to {soft:,} ({option})")
    rule, devices = "address space, processor time and file size are unlimited", root / "dev/infiniband"
    if devices.is_dir():
        rule += ", and locked memory, which InfiniBand needs"
        soft, _ = limit(resource.RLIMIT_MEMLOCK)
        if soft != resource.RLIM_INFINITY:
            found.append(f"locked memory is limited to {size(soft)} (ulimit -l)")
    way_out = "ulimit with the option and unlimited before the start; if refused, in limits.conf or the batch system"
    return subject.judged(not found, "other limits", "; ".join(found) or "none", rule, way_out)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


# -- ports, names and clock --------------------------------------------------------------------------------------------

_NAME_SECONDS = 5.0
"""For all names together."""

_MOST_OFFSET = 1.0
"""Seconds between the clock and its time servers."""

Resolve = Callable[[str], list[str]]
"""The addresses of a host name. Raises OSError if there are none."""


def check_ports(subject: Subject) -> Iterator[Finding]:
    """Whether the ranks can meet: at MASTER_PORT, or at the ports that follow from a SLURM job."""
    from dcscale.parallel.launchers import DEFAULT_PORT, DERIVED_PORTS, LaunchError, recognise

    rule = "no other process listens at the port where the ranks meet"
    try:
        _, launch = recognise(subject.variables)
    except LaunchError as error:
        yield subject.bad("port", str(error), "the launcher's variables are consistent", "see launch/README.md")
        return
    host, port = subject.variables.get("MASTER_ADDR", ""), subject.variables.get("MASTER_PORT", "")
    if "SLURM_JOB_ID" in subject.variables and not port:
        yield _outgoing_ports(subject, DERIVED_PORTS)
        if launch.address is None:
            return
    if not launch.serves_store:
        yield subject.good("port", f"served by {launch.launcher}, which started this", rule)
        return
    if launch.address is not None:
        host, number = launch.address
    elif port.isdecimal() and 0 < int(port) < 65536:
        number = int(port)
    elif port:
        way_out = f"export MASTER_PORT={DEFAULT_PORT}"
        yield subject.bad("port", f"MASTER_PORT is {port!r}", "a port is a number from 1 to 65535", way_out)
        return
    else:
        number = DEFAULT_PORT
    if host and not _is_here(host, subject.node):
        if launch.address is None:  # otherwise it is checked there at the same time
            yield subject.unknown("port", f"{host}:{number} is on another host: run the doctor there", rule)
        return
    problem, holders = _bind_problem(number), listeners(number)
    if problem is None or os.getpid() in holders:
        yield subject.good("port", f"{number} is free" if problem is None else f"{number} is of this job", rule)
        return
    who = ", ".join(map(str, named_processes(holders)))
    who = f", held by {who}" if who else "; the process that holds it is of another user, if there is one"
    way_out = "end that process if it is of an earlier run, or choose another port: export MASTER_PORT=29501, or " + (
        "torchrun and deepspeed --master-port 29501"
    )
    yield subject.bad("port", f"{number} cannot be used: {problem.lower()}{who}", rule, way_out)


def _outgoing_ports(subject: Subject, ports: range) -> Finding:
    """A port from which connections start may be in use by any program, at any time."""
    rule = f"Linux starts no connections from ports {ports[0]} to {ports[-1]}, where the ranks of SLURM steps meet"
    try:
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError) as error:
        return subject.unknown("SLURM ports", f"ip_local_port_range cannot be read: {error}", rule)
    way_out = 'sysctl -w net.ipv4.ip_local_port_range="32768 60999" as root, or set MASTER_PORT'
    fits = last < ports[0] or first > ports[-1]
    return subject.judged(fits, "SLURM ports", f"connections start from {first} to {last}", rule, way_out)


def _is_here(host: str, node: str) -> bool:
    return host in ("localhost", node, socket.gethostname()) or host.startswith("127.") or host == "::1"


def _bind_problem(port: int) -> str | None:
    """Why the port cannot be listened at; None: it can."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        with contextlib.ExitStack() as stack:
            try:
                tried = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
                if family == socket.AF_INET6:
                    tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                tried.bind((address, port))
                tried.listen(1)
            except OSError as error:
                if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):  # no IPv6 here
                    continue
                return os.strerror(error.errno or 0)
    return None


def check_names(subject: Subject, resolve: Resolve | None = None, seconds: float = _NAME_SECONDS) -> Iterator[Finding]:
    """Whether the names of this host and of the hosts of the job have addresses that others can reach.

    Args:
        subject: this machine and the run.
        resolve: looks a name up, for tests.
        seconds: for all names together.
    """
    rule = (
        "the name of this host has an address that is not of the loopback"
        if subject.nodes > 1
        else ("the name of this host has an address")
    )
    names = list(dict.fromkeys([subject.node, *_hosts_of_job(subject)]))
    found = _look_up(names, resolve or _addresses, seconds)
    here = found[subject.node]
    way_out = "add the host to /etc/hosts with the address of its network, or correct the DNS"
    if isinstance(here, str):
        yield subject.bad("own name", f"{subject.node}: {here}", rule, way_out)
    else:
        # Debian's /etc/hosts gives 127.0.1.1: gloo and NCCL would then listen where no other node can connect.
        fits = subject.nodes == 1 or not all(address.startswith("127.") or address == "::1" for address in here)
        ways = f"{way_out}; or name the interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        yield subject.judged(fits, "own name", f"{subject.node} is {', '.join(here)}", rule, ways)
    if len(names) > 1:
        wrong = [f"{name}: {answer}" for name, answer in found.items() if isinstance(answer, str)]
        value = "; ".join(wrong[:8]) + (f"; {len(wrong) - 8} more" if len(wrong) > 8 else "")
        rule = f"all hosts of the job have an address, found within {seconds:g} s"
        yield subject.judged(not wrong, "names of hosts", value or f"{len(names)} hosts", rule, way_out)


def _hosts_of_job(subject: Subject) -> list[str]:
    from dcscale.parallel.launchers import expand_hosts

    variables = subject.variables
    text = variables.get("SLURM_JOB_NODELIST") or variables.get("SLURM_STEP_NODELIST") or ""
    try:
        hosts = expand_hosts(text) if text else []
    except ValueError:
        hosts = [text]  # to be reported as a name that is not found
    return [*hosts, *filter(None, [variables.get("MASTER_ADDR")])]


def _addresses(name: str) -> list[str]:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _look_up(names: list[str], resolve: Resolve, seconds: float) -> dict[str, list[str] | str]:
    """Addresses of each name, or why there are none. A resolver cannot be interrupted: its thread is left behind."""
    found: dict[str, list[str] | str] = {}

    def look_up(name: str) -> None:
        try:
            answer: list[str] | str = resolve(name) or "has no address"
        except (OSError, UnicodeError) as error:
            answer = getattr(error, "strerror", None) or str(error)
        found[name] = answer

    threads = [threading.Thread(target=look_up, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return {name: found.get(name, f"no answer in {seconds:g} s") for name in names}


def check_clock(subject: Subject, run: Callable[..., str] = run_command) -> Iterator[Finding]:
    """Whether the clock is kept by time servers, as chronyc, timedatectl or the kernel says.

    Args:
        subject: this machine.
        run: runs a command, see :func:`run_command`.
    """
    rule = f"kept by time servers, within {_MOST_OFFSET:g} s"
    way_out = "start a time service, such as chronyd or systemd-timesyncd (timedatectl set-ntp true, as root)"
    answers = []
    for command, read in (
        (("chronyc", "tracking"), chrony_state),
        (("timedatectl", "show", "-p", "NTPSynchronized", "-p", "NTP"), timedatectl_state),
    ):
        try:
            state = read(run(*command, seconds=3, variables=subject.variables))
        except CommandError as error:
            answers.append(str(error))
            continue
        if state is not None:
            answers.append(f"{command[0]}: {state[1]}")
            if state[0]:
                yield subject.good("clock", answers[-1], rule)
                return
            if subject.nodes > 1:
                yield subject.bad("clock", answers[-1], rule, way_out)
                return
    if kernel_keeps_time():
        yield subject.good("clock", "the kernel's clock is synchronised", rule)
    else:
        # The host of a virtual machine or container may keep it, and on one machine it hardly matters.
        yield subject.unknown("clock", f"nobody here says that it is synchronised ({'; '.join(answers)})", rule)


def chrony_state(text: str) -> tuple[bool, str] | None:
    """Whether the clock is right, and why, from ``chronyc tracking``; None: not understood."""
    offset = re.search(r"^System time\s*:\s*([\d.]+) seconds (fast|slow)", text, flags=re.MULTILINE)
    leap = re.search(r"^Leap status\s*:\s*(.+?)\s*$", text, flags=re.MULTILINE)
    if offset is None or leap is None:
        return None
    fits = float(offset[1]) <= _MOST_OFFSET and leap[1] != "Not synchronised"
    return fits, f"{float(offset[1]):.6f} s {offset[2]}, {leap[1].lower()}"


def timedatectl_state(text: str) -> tuple[bool, str] | None:
    """The same from ``timedatectl show``."""
    values = dict(line.partition("=")[::2] for line in text.splitlines())
    if "NTPSynchronized" not in values:
        return None
    service = {"yes": "a time service runs", "no": "no time service runs"}.get(values.get("NTP", ""), "")
    fits = values["NTPSynchronized"] == "yes"
    return fits, ", ".join(filter(None, ["synchronised" if fits else "not synchronised", service]))


def kernel_keeps_time() -> bool:
    """Whether the kernel says that its clock is synchronised (adjtimex, which needs no rights to read)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "adjtimex"):
        return False
    # struct timex, whose modes = 0 asks for nothing to be changed, has 208 bytes; TIME_ERROR is 5.
    return 0 <= libc.adjtimex(ctypes.create_string_buffer(256)) < 5
