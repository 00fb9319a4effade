"""Where runs are: step, loss, speed, time left, checkpoints, restarts and why, and whether somebody works on them.

    python tools/status.py runs/mine                    # one run as a page
    python tools/status.py runs                         # all runs in a folder, such as a sweep, as a table
    python tools/status.py runs/mine --watch            # again every 5 seconds, until Ctrl-C
    python tools/status.py runs/a runs/b --json         # everything that is known, for a program

From the files of the run alone: it may be on another machine, running, ended, broken, or of an older version. Nothing
is written, and the run does not notice.

  running      a start holds the run folder, and records what it does
  stalled      a start holds it, but has recorded nothing for long: more than three times the longest time between two
               records, and at least a minute; parallel.start_timeout_minutes before the first records of a start,
               parallel.pause_timeout_minutes where validation, samples or the end of the run are due; or the process
               of rank 0 is on this machine, and stopped
  resumable    does not run: the same command resumes it
  done         all of train.steps
  failed       the last start ended with exit code 1 or 2 (launch/README.md): read why
  diverged     it ended with exit code 3
  not started  has no step, no checkpoint and no start

"loss" is the mean of the last 50 records. "left" is what the remaining steps take at the speed of the last 100 records,
with validation and saving; "tokens/s" is of steps alone. A holder on this machine is alive if its process is; one on
another machine if it has renewed its lease within 90 s, by this machine's clock.

--json prints {"format": 1, "time": seconds since 1970, "runs": [...]}, of each run the fields of RunStatus
(dcscale/cluster/status/run_status.py); with --watch on one line each time. Exit code: 2 if a RUN does not exist or is
no folder, else 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

from dcscale.cli import positive_number


def seconds(text: str) -> float:
    """Type of --watch."""
    try:
        return positive_number(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or left out; name runs before --watch") from error


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or a folder of such")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=seconds,
        const=5.0,
        metavar="SECONDS",
        help="look again every so many seconds (default 5), until Ctrl-C",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def look(paths: list[Path], as_json: bool, watching: bool) -> str:
    """What to print now."""
    from dcscale.cluster.status import find_runs, page, read_status, table

    now = time.time()
    # Runs may appear in a folder while it is watched; an empty one is a run that has not started.
    runs = list(dict.fromkeys(run for path in paths for run in find_runs(path) or [path]))
    statuses = [read_status(run, now) for run in runs]
    if as_json:
        content = {"format": 1, "time": now, "runs": [status.as_json() for status in statuses]}
        return json.dumps(content, indent=None if watching else 2)
    return page(statuses[0]) if len(statuses) == 1 else table(statuses)


def watch(paths: list[Path], as_json: bool, interval: float) -> None:
    """Prints until it is interrupted: on a terminal in place, elsewhere one after the other."""
    in_place = sys.stdout.isatty() and os.environ.get("TERM") not in (None, "dumb") and not as_json
    while True:
        text = look(paths, as_json, watching=True)
        if as_json:
            print(text, flush=True)
        else:
            clock = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC"
            print(f"\033[H\033[2J{clock}\n{text}" if in_place else f"{clock}\n{text}\n", flush=True)
        time.sleep(interval)


def main(arguments: list[str] | None = None) -> int:
    options = argument_parser().parse_args(arguments)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            if options.watch is None:
                print(look(options.runs, options.json, watching=False), flush=True)
            else:
                watch(options.runs, options.json, options.watch)
    except BrokenPipeError:  # as of "| head": the interpreter would report it again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    missing = [path for path in options.runs if not os.path.isdir(path)]
    for path in missing:
        print(f"error: {path} is no folder: give the folder of a run, run.folder in its config", file=sys.stderr)
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
