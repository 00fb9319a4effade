"""Finds what is wrong with this machine, or with a run on it. The first thing to run when something is wrong.

    python tools/doctor.py                                          # this machine
    python tools/doctor.py configs/quickstart.yaml train.steps=200  # and what this run would find on it
    srun python tools/doctor.py CONFIG.yaml --nodes                 # all machines of a job; also by torchrun and others

Looks at versions, GPUs, memory, limits, disk, ports, names, clocks, shards and leftovers of earlier runs, and changes
nothing but for hidden files in the run folder that it removes again. --quick leaves out what takes more than 2 s.
With --nodes, also at links and collectives, and whether all ranks have the same config, code, shards and run folder.

Prints bad findings first, each with its rule and the way out, then what could not be checked, and why; and ends with
exit code 1 if anything is bad, 2 if the arguments are not understood. dcscale/doctor/README.md lists the checks.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dcscale.cli import positive_number

# What imports torch, or needs a package that may be missing, is imported in the functions.

if TYPE_CHECKING:
    from dcscale.config import Config, ModelConfig
    from dcscale.doctor.findings import Finding
    from dcscale.doctor.local import Subject


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml|key=value", help="settings of the run, in order")
    parser.add_argument("--quick", action="store_true", help="leave out what takes more than 2 s")
    parser.add_argument("--nodes", action="store_true", help="this is one of several ranks: check them together")
    parser.add_argument(
        "--wait", type=positive_number, default=60.0, metavar="SECONDS", help="for a rank, with --nodes (default 60)"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("--json", action="store_true", help="print all findings as JSON")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = argument_parser().parse_intermixed_args(arguments)
    start, hangs, speaks = time.monotonic(), [], True
    try:
        from dcscale.doctor.findings import condensed, exit_code, report, summary, table
        from dcscale.doctor.local import run_checks
    except ImportError as error:
        print(f"{error}: dcscale cannot be imported; bash launch/install.sh installs what it needs", file=sys.stderr)
        return 1
    subject, settings = subject_of(options)

    def local() -> list[Finding]:
        found, hanging = run_checks(subject)
        hangs.append(hanging)
        return [*settings, *found]

    if options.nodes:
        findings, speaks = on_all_ranks(subject, local, options.wait)
    else:
        findings = local()
    seconds = time.monotonic() - start
    if speaks and options.json:
        print(json.dumps(report(findings, seconds), indent=2))
    elif speaks:
        print(*table(condensed(findings)), "", summary(findings, seconds), sep="\n")
    code = exit_code(findings)
    if any(hangs) or options.nodes:  # a thread that waits for a disk, driver or rank could keep the process from ending
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def on_all_ranks(subject: Subject, local: Callable[[], list[Finding]], seconds: float) -> tuple[list[Finding], bool]:
    """The findings of all ranks, and whether this one prints them."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's warnings of lost connections have 20 lines each
    from dcscale.doctor.ranks import check_ranks
    from dcscale.parallel import LaunchError, discover

    try:
        environment = discover()
    except LaunchError as error:
        way_out = "start it with srun, torchrun, deepspeed or mpirun, or without --nodes"
        return [subject.bad("ranks", str(error), "the launcher's variables are consistent", way_out)], True
    say = functools.partial(print, file=sys.stderr, flush=True)
    subject.together = True
    patience = 1.2 if subject.quick else 2.5  # Linux sends what opens a connection again after 1 s and 3 s
    return check_ranks(environment, subject.config, local, seconds=seconds, patience=patience, print_line=say)


def subject_of(options: argparse.Namespace) -> tuple[Subject, list[Finding]]:
    """What is to be checked, and what is wrong with the settings: then only the machine is checked."""
    from dcscale.doctor.local import Subject, spread, visible_gpus

    subject = Subject(quick=options.quick, place=lambda: spread(gpus=visible_gpus()), count=count, preflight=preflight)
    if not options.settings:
        return subject, []
    rule = "the settings are valid, see dcscale/config/README.md"
    try:
        from dcscale.config import ConfigError, check_config, load_arguments, raise_problems
    except ImportError as error:
        return subject, [subject.unknown("settings", f"cannot be read: {error}", rule)]
    try:
        loaded = load_arguments(options.settings)
        raise_problems(check_config(loaded.config), loaded.origins)
    except ConfigError as error:
        values = [str(problem).removesuffix(f": {problem.rule}; {problem.fix}") for problem in error.problems]
        return subject, [subject.bad("settings", v, p.rule, p.fix) for v, p in zip(values, error.problems)]
    subject.config = loaded.config
    return subject, [subject.good("settings", "valid", rule)]


def count(model: ModelConfig) -> int:
    """Parameters of a model."""
    from dcscale.models import count_parameters

    return count_parameters(model).total


def preflight(config: Config, ranks: int) -> tuple[list[str], int]:
    """Why a start on so many ranks would be refused, and how many warnings it would begin with."""
    import torch

    from dcscale.config import check_config
    from dcscale.parallel import Environment
    from dcscale.train.advice import advice
    from dcscale.train.preflight import preflight as check

    if problems := check_config(config, ranks):
        return [str(problem) for problem in problems], 0
    found = check(config, Environment(0, 0, ranks, ranks, torch.device("cpu")), quick=True)
    stream = None if found.data is None else found.data.stream
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return found.reasons, len(advice(config, ranks, stream, memory))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        os._exit(130)
