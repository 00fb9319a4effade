"""GPUs by nvidia-smi: count, memory, defects, clocks, power, temperature, and the links between them.

All output is parsed here, and nothing of it is trusted to be complete: fields that a driver or a board does not know
read ``[N/A]``, ``[Not Supported]`` or the like, and count as unknown.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dcscale.doctor.findings import Finding
from dcscale.doctor.local.subject import CommandError, Subject, run_command, visible_gpus

FIELDS = (
    *("index", "pci.bus_id", "name", "driver_version", "memory.total", "memory.used", "temperature.gpu"),
    *("ecc.errors.uncorrected.volatile.total", "clocks_event_reasons.active", "clocks.current.sm", "clocks.max.sm"),
    *("power.draw", "power.limit", "power.default_limit"),
    *("pcie.link.width.current", "pcie.link.width.max"),
)
"""Of ``nvidia-smi --query-gpu``."""

_OLD_NAMES = {"clocks_event_reasons.active": "clocks_throttle_reasons.active"}
"""What drivers before 535 call these fields."""

_ROWS = ("pci.bus_id", "remapped_rows.pending", "remapped_rows.failure")
"""Of ``nvidia-smi --query-remapped-rows``, where the first is called gpu_bus_id."""

_SECONDS = 8.0
"""For each call of nvidia-smi; without persistence mode, it initialises every GPU first."""

_SLOWDOWNS = {
    0x8: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Bits of ``clocks_event_reasons.active`` that are defects (nvml.h). The others: idle, chosen clocks, power cap."""

_HOTTEST = 85
"""Degrees Celsius; data centre GPUs slow down a few degrees above."""

_MOST_USED = 0.05
"""Of a GPU's memory, before a run starts."""

_LEAST_POWER = 0.9
"""Of the board's default power limit."""

Gpu = Mapping[str, str]
"""Values of a GPU by the names in ``FIELDS`` and ``_ROWS``; those that nvidia-smi does not know are left out."""


@dataclass(frozen=True)
class NvLinks:
    """NVLink connections of a GPU."""

    speeds: tuple[float, ...]
    """Of active links, in GB/s."""

    inactive: int


def check_gpus(subject: Subject, run: Callable[..., str] = run_command) -> Iterator[Finding]:
    """Everything about the GPUs of this machine.

    Args:
        subject: this machine.
        run: runs a command, see :func:`run_command`.
    """
    rule = "as many GPUs as ranks on this machine, all alike"

    def ask(*command: str) -> str:
        return run(*command, seconds=_SECONDS, variables=subject.variables)

    try:
        gpus = _with_rows(query_gpus(ask), ask)
    except CommandError as error:
        there = visible_gpus(subject.variables)
        if not there and error.missing:
            yield subject.unknown("GPUs", f"none: {error}, and there is no /dev/nvidia0", rule)
        elif error.missing:
            yield subject.unknown("GPUs", f"{there} in /dev, but {error}", rule)
        else:
            way_out = "look into the kernel's log (dmesg | grep -i -e nvrm -e xid); reboot, or exclude this node"
            yield subject.bad("GPUs", str(error), rule, way_out)
        return
    yield from judge_gpus(subject, gpus)
    if subject.quick or len(gpus) < 2:
        return
    for check, command, judge in (
        ("GPU peer links", ("nvidia-smi", "topo", "-m"), _judge_topology),
        ("NVLink", ("nvidia-smi", "nvlink", "-s"), _judge_nvlink),
    ):
        try:
            text = ask(*command)
        except CommandError as error:
            yield subject.unknown(check, str(error), "all GPUs have the same links")
        else:
            yield judge(subject, text)


def query_gpus(run: Callable[..., str]) -> list[Gpu]:
    """All GPUs, asked again without the fields that this version of nvidia-smi does not know.

    Raises:
        CommandError: nvidia-smi gives no answer, or one that is not understood.
    """
    asked = {name: name for name in FIELDS}
    while True:
        try:
            text = run("nvidia-smi", f"--query-gpu={','.join(asked.values())}", "--format=csv,noheader,nounits")
        except CommandError as error:
            unknown = re.search(r'Field "([\w.]+)" is not a valid field', str(error))
            name = next((name for name, used in asked.items() if unknown and used == unknown[1]), None)
            if name is None or len(asked) == 1:
                raise
            if asked[name] == name and name in _OLD_NAMES:
                asked[name] = _OLD_NAMES[name]
            else:
                del asked[name]
        else:
            return parse_gpus(text, list(asked))


def _with_rows(gpus: list[Gpu], run: Callable[..., str]) -> list[Gpu]:
    """The same with the state of row remapping, which GPUs before Ampere do not have."""
    query = ("nvidia-smi", "--query-remapped-rows=gpu_bus_id,remapped_rows.pending,remapped_rows.failure")
    try:
        rows = parse_gpus(run(*query, "--format=csv,noheader,nounits"), list(_ROWS))
    except CommandError:  # an unknown option, or GPUs without it: then it is reported as unknown
        return gpus
    found = {row["pci.bus_id"]: row for row in rows if "pci.bus_id" in row}
    return [{**gpu, **found.get(gpu.get("pci.bus_id", ""), {})} for gpu in gpus]


def parse_gpus(text: str, names: list[str]) -> list[Gpu]:
    """The lines of ``--query-gpu=NAMES --format=csv,noheader,nounits``.

    Raises:
        CommandError: a line has another number of values.
    """
    gpus = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) != len(names):
            raise CommandError(
                f"nvidia-smi printed {len(row)} values for {len(names)} fields: {', '.join(row)[:100]!r}"
            )
        values = zip(names, map(str.strip, row))
        gpus.append({name: value for name, value in values if value and not value.startswith("[") and value != "N/A"})
    return gpus


def judge_gpus(subject: Subject, gpus: list[Gpu]) -> Iterator[Finding]:
    """What the values of all GPUs mean; those that are not known are left out."""
    names = Counter(gpu.get("name", "unknown") for gpu in gpus)
    value = ", ".join(f"{count} x {name}" for name, count in names.items()) or "none"
    value += "".join(sorted({f", driver {gpu['driver_version']}" for gpu in gpus if "driver_version" in gpu}))
    rule = f"{subject.local_ranks} or more, one a rank on this machine, all alike"
    way_out = "exclude this node, or ask for nodes with GPUs of one kind; a GPU that is missing has failed: see dmesg"
    yield subject.judged(len(names) == 1 and len(gpus) >= subject.local_ranks, "GPUs", value, rule, way_out)
    for check, rule, way_out, judge in _RULES:
        judged = [(gpu.get("index", "?"), found) for gpu in gpus if (found := judge(gpu)) is not None]
        wrong = [f"GPU {index} {text}" for index, (fits, text) in judged if not fits]
        if wrong:
            yield subject.bad(check, "; ".join(wrong), rule, way_out)
        elif judged:
            texts = list(dict.fromkeys(text for _, (_, text) in judged))
            yield subject.good(check, texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}", rule)
        elif gpus:
            yield subject.unknown(check, "nvidia-smi does not know it of these GPUs", rule)


def _number(gpu: Gpu, name: str) -> float | None:
    """A value as a number; None: it is not known, or is none."""
    try:
        return float(gpu[name])
    except (KeyError, ValueError):
        return None


Judged = tuple[bool, str] | None
"""Whether a GPU is in order, and its value; None: not known."""


def _memory(gpu: Gpu) -> Judged:
    used, total = _number(gpu, "memory.used"), _number(gpu, "memory.total")
    if used is None or not total:
        return None
    return used <= _MOST_USED * total, f"{used:,.0f} of {total:,.0f} MiB in use"


def _ecc(gpu: Gpu) -> Judged:
    errors = _number(gpu, "ecc.errors.uncorrected.volatile.total")
    if errors is None:
        return None
    return errors == 0, f"{errors:.0f} uncorrected errors since the driver was loaded"


def _rows(gpu: Gpu) -> Judged:
    values = [gpu.get(name, "").lower() for name in _ROWS[1:]]
    if not set(values) <= {"0", "1", "no", "yes"}:
        return None
    states = [name for name, value in zip(("pending", "failed"), values) if value in ("1", "yes")]
    return not states, f"row remapping {' and '.join(states)}" if states else "no row to be remapped"


def _clocks(gpu: Gpu) -> Judged:
    try:
        active = int(gpu["clocks_event_reasons.active"], 16)
    except (KeyError, ValueError):
        return None
    reasons = [name for bit, name in _SLOWDOWNS.items() if active & bit]
    clock = f"{gpu.get('clocks.current.sm', '?')} of {gpu.get('clocks.max.sm', '?')} MHz"
    return not reasons, f"{clock}, {', '.join(reasons) or 'not slowed down'}"


def _power(gpu: Gpu) -> Judged:
    limit, usual = _number(gpu, "power.limit"), _number(gpu, "power.default_limit")
    if limit is None or not usual:
        return None
    draw = f"{gpu['power.draw']} W drawn, " if "power.draw" in gpu else ""
    return limit >= _LEAST_POWER * usual, f"{draw}limit {limit:.0f} of {usual:.0f} W"


def _temperature(gpu: Gpu) -> Judged:
    degrees = _number(gpu, "temperature.gpu")
    return None if degrees is None else (degrees <= _HOTTEST, f"{degrees:.0f} °C")


def _pcie(gpu: Gpu) -> Judged:
    # Only the width: an idle GPU lowers the generation, not the width.
    width, most = _number(gpu, "pcie.link.width.current"), _number(gpu, "pcie.link.width.max")
    return None if width is None or most is None else (width >= most, f"x{width:.0f} of x{most:.0f}")


_RULES: tuple[tuple[str, str, str, Callable[[Gpu], Judged]], ...] = (
    (
        "GPU memory",
        f"at most {_MOST_USED:.0%} in use before a run starts",
        "nvidia-smi shows the processes: end those of an earlier run, or choose other GPUs by CUDA_VISIBLE_DEVICES",
        _memory,
    ),
    (
        "GPU ECC",
        "no uncorrected memory errors",
        "results of this node cannot be trusted: exclude it, reset the GPU (nvidia-smi -r), replace it if they return",
        _ecc,
    ),
    (
        "GPU memory rows",
        "no row remapping pending or failed",
        "pending: reset the GPU (nvidia-smi -r) or reboot; failed: the GPU must be replaced, exclude the node",
        _rows,
    ),
    (
        "GPU clocks",
        "no slowdown by heat, power brake or hardware",
        "one slow GPU slows all ranks: check cooling and power supply, or exclude the node",
        _clocks,
    ),
    (
        "GPU power",
        f"a limit of at least {_LEAST_POWER:.0%} of the board's default",
        "nvidia-smi -pl WATTS sets the limit, as root",
        _power,
    ),
    ("GPU temperature", f"at most {_HOTTEST} °C", "check the cooling, or exclude the node", _temperature),
    (
        "GPU PCIe link",
        "as wide as the GPU and its slot allow",
        "reseat or replace the board or its riser, or exclude the node",
        _pcie,
    ),
)
"""Name, rule, way out, and what judges one GPU."""


def parse_topology(text: str) -> dict[str, dict[str, str]]:
    """The matrix of ``nvidia-smi topo -m``: GPU -> other GPU -> kind of path, such as ``NV18`` or ``SYS``."""
    rows = [
        [cell.strip() for cell in re.split(r"\t|\s{2,}", re.sub(r"\x1b\[[0-9;]*m", "", line))]
        for line in text.splitlines()
    ]
    header = next((row for row in rows if "GPU0" in row[1:] and not row[0]), [])
    columns = [(i, name) for i, name in enumerate(header) if re.fullmatch(r"GPU\d+", name)]
    return {
        row[0]: {name: row[i] for i, name in columns if i < len(row) and name != row[0]}
        for row in rows
        if re.fullmatch(r"GPU\d+", row[0])
    }


def _judge_topology(subject: Subject, text: str) -> Finding:
    rule = "all GPUs have as many NVLink connections to others, of the same kinds"
    paths = parse_topology(text)
    if not paths:
        return subject.unknown("GPU peer links", "the output of nvidia-smi topo -m is not understood", rule)
    links = {
        gpu: tuple(sorted(kind for kind in others.values() if kind.startswith("NV"))) for gpu, others in paths.items()
    }
    kinds = Counter(kind for others in paths.values() for kind in others.values())
    value = ", ".join(f"{kind} {count // 2}" for kind, count in kinds.most_common())
    usual, _ = Counter(links.values()).most_common(1)[0]
    wrong = [
        f"{gpu}: {', '.join(f'{other} {kind}' for other, kind in paths[gpu].items())}"
        for gpu, found in links.items()
        if found != usual
    ]
    if wrong:
        way_out = "a link or switch has failed: see dmesg, reset the GPUs and nvidia-fabricmanager, or exclude the node"
        return subject.bad("GPU peer links", "; ".join(wrong), rule, way_out)
    return subject.good("GPU peer links", f"pairs by path: {value}", rule)


def parse_nvlink(text: str) -> dict[str, NvLinks]:
    """The links of each GPU, by its index, from ``nvidia-smi nvlink -s``."""
    links: dict[str, tuple[list[float], list[str]]] = {}
    here: tuple[list[float], list[str]] | None = None
    for line in text.splitlines():
        if gpu := re.match(r"GPU (\d+):", line):
            here = links.setdefault(gpu[1], ([], []))
        elif here is not None and (link := re.match(r"\s*Link (\d+):\s*(?:([\d.]+) GB/s|<?inactive>?)", line)):
            if link[2] is None:
                here[1].append(link[1])
            else:
                here[0].append(float(link[2]))
    return {gpu: NvLinks(tuple(speeds), len(inactive)) for gpu, (speeds, inactive) in links.items()}


def _judge_nvlink(subject: Subject, text: str) -> Finding:
    rule = "all GPUs have as many active links, of the same speed"
    links = parse_nvlink(text)
    if not any(found.speeds or found.inactive for found in links.values()):
        return subject.unknown("NVLink", "none: the GPUs have no NVLink, or nvidia-smi does not know it", rule)
    shapes = {gpu: (len(found.speeds), min(found.speeds, default=0.0)) for gpu, found in links.items()}
    best = max(shapes.values())
    wrong = [
        f"GPU {gpu} has {count} x {speed:g} GB/s" for gpu, (count, speed) in shapes.items() if (count, speed) < best
    ]
    value = f"{best[0]} active links of {best[1]:g} GB/s on each of {len(shapes)} GPUs"
    if wrong:
        way_out = "a link has failed: see dmesg and nvidia-smi nvlink -e, reset the GPUs, or exclude the node"
        return subject.bad("NVLink", f"{'; '.join(wrong)}; others {best[0]} x {best[1]:g} GB/s", rule, way_out)
    return subject.good("NVLink", value, rule)
