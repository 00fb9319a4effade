"""Makes every fault of ``rows.py`` several times and measures what the run does; see ``campaign.sh``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from nodes import ROOT, Cluster, missing, wait_until
from rows import ROWS, Case, make_case, steps_of

from dcscale.observe import read_metrics
from dcscale.testing.runs import make_shards

RESULTS = ROOT / "runs" / "campaign" / "results.jsonl"
PAGE = ROOT / "launch" / "README.md"
BEGIN, END = "<!-- campaign -->", "<!-- end of campaign -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"rows to run; all without: {' '.join(ROWS)}")
    parser.add_argument("-n", "--times", type=int, default=3, help="tries of each row and ZeRO stage")
    parser.add_argument("--zero", type=int, nargs="+", default=[2, 3], help="ZeRO stages")
    parser.add_argument("-j", "--clusters", type=int, default=2, help="clusters that work at the same time")
    parser.add_argument("--again", action="store_true", help="also what was done for this commit already")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    if unknown := set(options.rows) - ROWS.keys():
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {' '.join(ROWS)}")
    if reason := missing():
        parser.error(f"no SLURM: {reason}")
    # Also under nohup, which would have the ranks ignore SIGHUP too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    if not options.table:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        names = options.rows or list(ROWS)
        wanted = [(name, zero, n) for n in range(options.times) for zero in options.zero for name in names]
        done = set() if options.again else {key(result) for result in results(commit())}
        run_all([case for case in wanted if case not in done], options.clusters)
    if not (found := results(commit())):
        parser.error(f"there are no results of {commit()} yet")
    write_table(found)
    return 0 if all(result["ok"] for result in found) else 1


def commit() -> str:
    """The commit that is tested; with a + if files differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    changed = subprocess.run(
        [*git, "status", "--porcelain", "dcscale", "launch/train.py"], capture_output=True, text=True
    )
    return head.strip() + ("+" if changed.stdout else "")


def results(of_commit: str) -> list[dict]:
    """The newest result of each try, for a commit."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    found = {key(result): result for result in map(json.loads, lines) if result["commit"] == of_commit}
    return sorted(found.values(), key=lambda result: (list(ROWS).index(result["row"]), key(result)))


def key(result: dict) -> tuple[str, int, int]:
    return result["row"], result["zero_stage"], result["repetition"]


# -- tries -------------------------------------------------------------------------------------------------------------


def run_all(cases: Sequence[tuple[str, int, int]], clusters: int) -> None:
    """Makes the tries on several clusters at the same time, and appends their results to the file as they come."""
    waiting: queue.Queue = queue.Queue()
    for case in cases:
        waiting.put(case)
    of_commit, total, lock = commit(), len(cases), threading.Lock()
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        work = Path(folder)
        shards = make_shards(work / "shards")
        curves: dict[tuple, list] = {}
        training, interrupted = threading.Lock(), threading.Event()

        def uninterrupted(cluster: Cluster, zero_stage: int, settings: tuple[str, ...]) -> list:
            with training:
                if (zero_stage, settings) not in curves:
                    curves[zero_stage, settings] = reference(cluster, shards, work, zero_stage, settings)
                return curves[zero_stage, settings]

        def serve(number: int) -> None:
            while not waiting.empty() and not interrupted.is_set():
                name = f"c{os.getpid()}{'abcdefgh'[number]}"
                with Cluster(work / f"{name}-{time.monotonic_ns()}", name) as cluster:
                    try:
                        while not interrupted.is_set():
                            result = one(cluster, shards, work, *waiting.get_nowait(), uninterrupted)
                            result["commit"] = of_commit
                            with lock:
                                with RESULTS.open("a") as file:
                                    file.write(json.dumps(result) + "\n")
                                left = waiting.qsize()
                                print(f"{total - left}/{total} {summary(result)}", flush=True)
                            if result["problem"]:  # a new cluster, so that nothing of it reaches the next try
                                break
                    except queue.Empty:
                        return

        threads = [threading.Thread(target=serve, args=(number,)) for number in range(clusters)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            print("the tries in progress are finished", flush=True)
            interrupted.set()
            for thread in threads:
                thread.join()
    if left := waiting.qsize():
        raise SystemExit(f"{left} of {total} tries were not made; the same command makes them")


def reference(cluster: Cluster, shards: Path, work: Path, zero_stage: int, settings: tuple[str, ...]) -> list:
    """The curve of a run to which nothing happens."""
    case = make_case(cluster, shards, work, "reference", zero_stage, 0)
    case.run_settings = settings
    start = case.begin(pace=0)
    if start.wait() != 0:
        raise RuntimeError(f"a run to which nothing happens ended with an error:\n{start.text}")
    return curve(case.run)


def curve(run: Path) -> list:
    """Step, loss and gradient norm of each record."""
    path = run / "metrics.jsonl"
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(path)] if path.exists() else []


def one(
    cluster: Cluster, shards: Path, work: Path, name: str, zero_stage: int, repetition: int, uninterrupted: Callable
) -> dict:
    """Makes a try; returns its result, a JSON object."""
    case = make_case(cluster, shards, work, name, zero_stage, repetition)
    begun = time.time()
    result = {
        "row": name,
        "zero_stage": zero_stage,
        "repetition": repetition,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "problem": None,
        "rank": None,
    }
    try:
        ROWS[name].make(case)
        result["code"] = case.start.wait(case.limit)
        result.update(look(case))
        case.heal()
        expected = uninterrupted(cluster, zero_stage, case.run_settings)
        result.update(start_again(case, expected, result["steps"]))
        result["wrong"] = wrong(case, result)
    except Exception as error:
        result.update(problem=f"{type(error).__name__}: {error}", wrong=["the try failed"])
    result["output"] = case.start.text[-6000:] if case.start else ""
    result["seconds"] = round(time.time() - begun, 1)
    result["ok"] = not result["wrong"]
    return result


def look(case: Case) -> dict:
    """What the first start did and left."""
    start, run = case.start, case.run
    at = case.at or start.fault_time()
    path = run / "ending.json"
    ending = json.loads(path.read_text()) if path.exists() else None
    noticed = [start.ended]
    if ending is not None and path.stat().st_mtime > at:
        noticed.append(path.stat().st_mtime)
    sign = re.compile(rf"^(error|warning)|{case.words or '^error'}")
    noticed += [when for when, line in start.lines if when >= at and sign.search(line)][:1]
    named = None
    if case.rank is not None:
        node = case.cluster.nodes[case.rank]
        on_terminal = re.search(rf"rank {case.rank}( \({node}|: sequences)|{node}[^\n]*rank {case.rank}\b", start.text)
        in_file = ending is None or case.codes[0] == 0 or (ending["rank"], ending["host"]) == (case.rank, node)
        named = bool(on_terminal) and in_file
    return {
        "rank": case.rank,
        "ending": ending,
        "noticed": round(min(noticed) - at, 2) if case.noticed else None,
        "ended": round(start.ended - at, 2),
        "named": named,
        "said": bool(re.search(case.words, f"{start.text}\n{ending}")),
        "left": left_behind(case),
        "steps": steps_of(run),
    }


def left_behind(case: Case, patience: float = 5) -> list[str]:
    """Processes that are still there some seconds after the end, and files that only a broken-off start leaves."""
    cluster, left = case.cluster, []

    def processes() -> list[str]:
        return [
            f"process in state {state} on {node}"
            for node in cluster.nodes
            for state in cluster.ranks_on(node).values()
            if state != "Z"  # has ended, only its parent does not know yet
        ]

    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not processes(), patience, "the end of all processes")
    left += processes()
    for path in sorted(case.run.rglob("*")) if case.run.exists() else []:
        incomplete = path.parent.name == "checkpoints" and path.is_dir() and not (path / "COMPLETE").exists()
        if incomplete or path.name.startswith((".", "lease.json")):
            left.append(str(path.relative_to(case.run)))
    return left


def start_again(case: Case, expected: list, done: int) -> dict:
    """The next start, without the fault, if the first has not finished the run."""
    if case.codes[0] == 0:
        return {"next": "not needed", "lost": 0, "right": as_uninterrupted(case, expected)}
    start = case.cluster.start(case.all_settings())
    code = start.wait(case.next_limit)
    left = left_behind(case)
    resumed = re.search(r"^resuming   from \S*step-(\d+)", start.text, re.MULTILINE)
    step = int(resumed[1]) if resumed else 0
    return {
        "next": f"exit code {code}, from step {step}",
        "next_seconds": round(start.ended - start.begun, 1),
        "next_output": "" if code == 0 else start.text[-6000:],
        "lost": max(0, done - step),
        "right": code == 0 and not left and as_uninterrupted(case, expected),
        "next_left": left,
    }


def as_uninterrupted(case: Case, expected: list) -> bool:
    """Whether all steps were done, with the losses and norms of an uninterrupted run if the policy says so."""
    found = curve(case.run)
    return found == expected if case.equal else [step for step, _, _ in found] == [step for step, _, _ in expected]


def wrong(case: Case, result: dict) -> list[str]:
    """What is not as it should be."""
    found = []
    if result["code"] not in case.codes:
        found.append(f"exit code {result['code']}, not {' or '.join(map(str, case.codes))}")
    expected = case.codes[0] if case.ending is None else case.ending
    written = None if result["ending"] is None else result["ending"]["code"]
    if expected >= 0 and written != expected:
        found.append(f"ending.json has code {written}, not {expected}")
    if result["named"] is False:
        found.append(f"rank {case.rank} is not named")
    if not result["said"]:
        found.append(f"neither the terminal nor ending.json say {case.words!r}")
    # A rank that is killed leaves its lease, and perhaps a part of a checkpoint, to the next start.
    if processes := [name for name in result["left"] if name.startswith("process")]:
        found.append(f"left behind: {', '.join(processes)}")
    if not result["right"]:
        found.append(f"the run did not end as an uninterrupted one: {result['next']}, {result.get('next_left')}")
    return found


def summary(result: dict) -> str:
    """A line for the terminal."""
    text = f"{result['row']} zero-{result['zero_stage']} #{result['repetition']}: {result['seconds']} s"
    if result["problem"]:
        return f"{text}, FAILED: {result['problem'].splitlines()[0][:200]}"
    if result["noticed"] is not None:
        text += f", noticed after {result['noticed']} s"
    text += f", code {result['code']} after {result['ended']} s"
    return f"{text}, {'ok' if result['ok'] else 'WRONG: ' + '; '.join(result['wrong'])}"


# -- table -------------------------------------------------------------------------------------------------------------


def write_table(tries: list[dict], page: Path = PAGE) -> None:
    """Writes the results of a commit into a page, between the marks.

    Raises:
        ValueError: the page has no marks.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no {BEGIN} ... {END}, where the table is to be")
    hangs = [t for t in tries if ROWS[t["row"]].hang]
    in_time = sum(not t["problem"] and bool(t["named"]) and t["noticed"] <= 60 for t in hangs)
    dates = sorted(t["date"] for t in tries)
    lines = [
        BEGIN,
        f"Commit {tries[0]['commit']}, {dates[0]} to {dates[-1]} UTC: {sum(t['ok'] for t in tries)} of {len(tries)} "
        f"tries as the policy says; {in_time} of {len(hangs)} hangs named the right rank within 60 s. Seconds since "
        "the fault: median (most).",
        "",
        "| fault | right | noticed, s | ended, s | right rank named | left behind | steps lost | next start |",
        "|---|---|---|---|---|---|---|---|",
        *(table_row(name, [t for t in tries if t["row"] == name]) for name in ROWS),
        END,
    ]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(before + "\n".join(line for line in lines if line is not None) + after)


def table_row(name: str, tries: list[dict]) -> str | None:
    if not tries:
        return None
    done = [t for t in tries if not t["problem"]]
    named = [t["named"] for t in done if t["named"] is not None]
    # Without hosts, and what is random in the names of unfinished checkpoints.
    left = sorted({re.sub(r" on \S+|(?<=\d{8})-[0-9a-f]{8}$", "", name) for t in done for name in t["left"]})
    right = sum(bool(t["right"]) for t in done)
    again = [t["next_seconds"] for t in done if "next_seconds" in t]  # absent where no next start was needed
    cells = [
        ROWS[name].title,
        f"{sum(t['ok'] for t in tries)} of {len(tries)}",
        spread([t["noticed"] for t in done if t["noticed"] is not None]),
        spread([t["ended"] for t in done if "next_seconds" in t]),
        f"{sum(named)} of {len(named)}" if named else "-",
        ", ".join(left) or "nothing",
        str(max((t["lost"] for t in done), default="-")) if again else "-",
        f"{right} of {len(tries)} finish, {spread(again)} s"
        if again
        else f"none needed; {right} of {len(tries)} finish",
    ]
    return f"| {' | '.join(cells)} |"


def spread(values: list[float]) -> str:
    """Median and largest."""
    return f"{statistics.median(values):.1f} ({max(values):.1f})" if values else "-"


if __name__ == "__main__":
    sys.exit(main())
