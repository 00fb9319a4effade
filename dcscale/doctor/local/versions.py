"""Versions of Python and packages against what dcscale needs and was tested with, and torch's CUDA against the driver.

Nothing is imported to learn its version: a broken installation must not keep the doctor from saying so.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import dcscale
from dcscale.doctor.findings import Finding
from dcscale.doctor.local.subject import CommandError, Subject, run_command, visible_gpus

CONSTRAINTS = Path(dcscale.__file__).parents[1] / "launch" / "constraints.txt"

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(==|>=)\s*([0-9][\w.+]*)\s*(?:;\s*(.*))?")
_PYTHON_MARKER = re.compile(r"python_version\s*(<|>=)\s*['\"](\d+(?:\.\d+)*)['\"]")
_SHOWN = ("torch", "deepspeed", "triton", "webdataset", "omegaconf", "numpy")
_INSTALL = "bash launch/install.sh installs the versions of launch/constraints.txt"
_MOST_NAMED = 6


def check_versions(
    subject: Subject,
    version_of: Callable[[str], str | None] | None = None,
    constraints: Path = CONSTRAINTS,
    requirements: list[str] | None = None,
) -> Iterator[Finding]:
    """Python, packages, and torch's CUDA.

    Args:
        subject: this machine.
        version_of: the installed version of a package, or None; for tests.
        constraints: the versions that everything was tested with.
        requirements: what pyproject.toml asks for, for tests; None: as it was installed.
    """
    version_of = version_of or _installed
    yield _python(subject)
    yield _required(subject, version_of, requirements)
    yield _tested(subject, version_of, constraints)
    yield _cuda(subject)


def _python(subject: Subject) -> Finding:
    found, rule = platform.python_version(), "the least version that pyproject.toml asks for, or a later one"
    try:
        wanted = importlib.metadata.metadata("dcscale").get("Requires-Python", "").removeprefix(">=")
    except importlib.metadata.PackageNotFoundError:
        return subject.unknown("python", f"{found}; dcscale is not installed, only found by its path", rule)
    way_out = f"make an environment with a newer Python: {_INSTALL}"
    return subject.judged(_number(found) >= _number(wanted), "python", found, f"at least {wanted}", way_out)


def _required(subject: Subject, version_of: Callable[[str], str | None], requirements: list[str] | None) -> Finding:
    rule = "every package that pyproject.toml asks for, in its least version or a later one"
    if requirements is None:
        try:
            requirements = importlib.metadata.requires("dcscale") or []
        except importlib.metadata.PackageNotFoundError:
            return subject.unknown("packages", "dcscale is not installed, only found by its path", rule)
    problems, names = [], []
    for name, _, least, marker in _parsed(requirements):
        found, extra = version_of(name), "extra" in marker
        if found is None and not extra:
            problems.append(f"{name} is missing, at least {least} is needed")
        elif found is not None and _number(found) < _number(least):
            problems.append(f"{name} is {found}, at least {least} is needed")
        names += [f"{name} {found}"] if name in _SHOWN else []
    value = "; ".join(dict.fromkeys(problems)) or ", ".join(dict.fromkeys(names))
    return subject.judged(not problems, "packages", value, rule, _INSTALL)


def _tested(subject: Subject, version_of: Callable[[str], str | None], constraints: Path) -> Finding:
    """Another version may work as well: it is not bad, but nobody knows."""
    rule = f"the versions that everything was tested with ({constraints.parent.name}/{constraints.name})"
    try:
        lines = constraints.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return subject.unknown("tested versions", f"{constraints} cannot be read: {error}", rule)
    wanted = {name: version for name, relation, version, _ in _parsed(lines) if relation == "=="}
    found = {name: version for name in wanted if (version := version_of(name)) is not None}
    # A local version, such as 2.13.0+cpu, is a build of the same sources.
    others = [f"{n} {v}, not {wanted[n]}" for n, v in found.items() if v.partition("+")[0] != wanted[n]]
    if not others:
        return subject.good("tested versions", f"{len(found)} of {len(wanted)} packages are installed, as tested", rule)
    more = f"; {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
    return subject.unknown("tested versions", f"never tested: {'; '.join(others[:_MOST_NAMED])}{more}", rule)


def _cuda(subject: Subject) -> Finding:
    rule = "the driver's CUDA has the major version of torch's CUDA, or a later one"
    built = torch_cuda()
    if built is None:
        return subject.unknown("CUDA", "torch is not installed, or was built without CUDA: only CPUs can be used", rule)
    try:
        driver = driver_cuda(run_command("nvidia-smi", seconds=8, variables=subject.variables))
    except CommandError as error:
        return subject.unknown("CUDA", f"torch has {built}, the driver is not known: {error}", rule)
    if driver is None:
        return subject.unknown("CUDA", f"torch has {built}, and nvidia-smi does not say what the driver supports", rule)
    way_out = "update the driver, or install torch for the driver's CUDA: https://pytorch.org/get-started"
    fits = _number(driver)[:1] >= _number(built)[:1]
    return subject.judged(fits, "CUDA", f"torch has {built}, the driver supports {driver}", rule, way_out)


def check_torch(subject: Subject) -> Iterator[Finding]:
    """Whether torch can be imported, which also loads CUDA's libraries, and sees the GPUs."""
    rule = "torch can be imported and sees all GPUs that CUDA_VISIBLE_DEVICES allows"
    try:
        import torch
    except Exception as error:  # a broken installation may raise anything
        yield subject.bad("torch", f"cannot be imported: {type(error).__name__}: {error}", rule, _INSTALL)
        return
    seen, there = torch.cuda.device_count(), visible_gpus(subject.variables)
    way_out = "install torch for NVIDIA GPUs and this driver, and see CUDA; in a container, start it with --gpus all"
    value = f"{torch.__version__} sees {seen} GPUs" + (f" of {there}" if there else "")
    yield subject.judged(seen >= there, "torch", value, rule, way_out)


def torch_cuda(package: str = "torch") -> str | None:
    """The CUDA version that the installed torch was built for, without importing it; None: none, or no torch."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+\.\d+)", text, flags=re.MULTILINE)
    return found[1] if found else None


def driver_cuda(text: str) -> str | None:
    """The newest CUDA version that the driver supports, from the head of nvidia-smi's output."""
    found = re.search(r"CUDA(?: UMD)? Version\s*:\s*(\d+\.\d+)", text)
    return found[1] if found else None


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _parsed(lines: list[str]) -> Iterator[tuple[str, str, str, str]]:
    """(name, ``==`` or ``>=``, version, marker) of each requirement that is meant for this Python."""
    for line in lines:
        found = _REQUIREMENT.fullmatch(line.strip())
        if found is None:
            continue
        name, relation, version, marker = found[1], found[2], found[3], found[4] or ""
        here = _number(platform.python_version())[:2]
        limits = [(sign, _number(limit)) for sign, limit in _PYTHON_MARKER.findall(marker)]
        if all(here < limit if sign == "<" else here >= limit for sign, limit in limits):
            yield name, relation, version, marker


def _number(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` and ``2.13.0rc1`` as (2, 13, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
