"""Record what a change of structure must not change: losses, the order of the data, the tests and their coverage.

    python tests/behaviour.py --output before.json            # about a minute
    python tests/behaviour.py --output before.json --tests    # also runs all tests under coverage: about 15 minutes
    python tests/behaviour.py --compare before.json after.json

Compare records of one machine: another processor may round differently. The recorded figures are

* losses: loss and gradient norm of each of 12 steps, and the validation losses, of tiny runs on 2 ranks, for ZeRO 0
  to 3 in fp32 and bf16;
* sequences: SHA-256 over tokens, targets and document ids of the first 1,000 sequences of one set of shards, of a
  mixture and of packed shards;
* tests: cases by folder, and with ``--tests`` how many passed and which part of dcscale's lines they ran.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SEQUENCES = 1000

COVERAGE = """
[run]
source = {source}
data_file = {folder}/coverage
parallel = true
concurrency = multiprocessing,thread
patch = subprocess
sigterm = true
"""


def losses(folder: Path, shards: Path) -> dict[str, list[dict[str, float]]]:
    """Records of the metrics file, without times, by ZeRO stage and precision."""
    from dcscale.observe import read_metrics
    from dcscale.testing.distributed import run_distributed
    from dcscale.testing.runs import tiny_config, train_all

    kinds = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
    configs = {
        f"zero{stage}-{precision}": tiny_config(
            folder / f"zero{stage}-{precision}",
            shards,
            "train.steps=12",
            f"parallel.zero_stage={stage}",
            f"train.precision={precision}",
        )
        for stage, precision in kinds
    }
    run_distributed(train_all, 2, list(configs.values()))
    kept = ("step", "loss", "grad_norm", "validation_loss")
    return {
        name: [{key: record[key] for key in kept if key in record} for record in read_metrics(path)]
        for name in configs
        for path in [folder / name / "metrics.jsonl"]
    }


def sequences(folder: Path, shards: Path) -> dict[str, str]:
    """Hashes of the first sequences, by kind of stream."""
    from dcscale.testing.runs import make_text, tiny_config
    from dcscale.train.data import open_training_stream

    packed = folder / "packed"
    make_shards = ("--tokenizer", "byte", "--shard-tokens", "6000", "--pack", "best-fit", "--sequence-length", "32")
    command = [sys.executable, "tools/make_shards.py", str(make_text(folder / "text", seed=1)), *make_shards]
    subprocess.run([*command, "--output", str(packed)], cwd=ROOT, check=True, capture_output=True)
    [packed_train] = [path.parent for path in packed.rglob("manifest.json")]
    mixture = f"[{{name: a, path: {shards}/train, weight: 0.7}}, {{name: b, path: {shards}/validation, weight: 0.3}}]"
    kinds = {
        "single": [],
        "mixed": ["data.train=''", f"data.sources={mixture}"],
        "packed": [f"data.train={packed_train}", "data.document_mask=true"],
    }
    return {
        kind: _hash(open_training_stream(tiny_config(folder / kind, shards, *settings)))
        for kind, settings in kinds.items()
    }


def _hash(stream: Any) -> str:
    digest = hashlib.sha256()
    for start in range(0, SEQUENCES, 50):
        found = stream.sequences(range(start, start + 50))
        for array in (found.tokens_NL1, found.targets_NL, found.document_ids_NL):
            if array is not None:
                digest.update(array.astype("<i8").tobytes())
    stream.close()
    return digest.hexdigest()


def collected() -> dict[str, int]:
    """Test cases by folder below tests/."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    counts = Counter(match[1] for match in re.finditer(r"^tests/(\w+)(?:/|\.py)\S*::", listing, re.MULTILINE))
    return {"all": counts.total(), **dict(sorted(counts.items()))}


def tested(folder: Path) -> dict[str, Any]:
    """Outcomes of all tests, and the lines of dcscale that they ran."""
    config = folder / "coveragerc"
    config.write_text(COVERAGE.format(source=ROOT / "dcscale", folder=folder))
    coverage = [sys.executable, "-m", "coverage"]
    pytest = ["pytest", "-q", "-p", "no:cacheprovider", "-n2", "--dist=loadfile"]
    command = [*coverage, "run", f"--rcfile={config}", "-m", *pytest]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        print("\n".join(line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))))
    outcomes = dict(re.findall(r"(\d+) (passed|failed|skipped|error)", ended.stdout.splitlines()[-1]))
    subprocess.run([*coverage, "combine", "-q", f"--rcfile={config}"], cwd=ROOT, check=True)
    report = folder / "coverage.json"
    subprocess.run([*coverage, "json", "-q", f"--rcfile={config}", "-o", str(report)], cwd=ROOT, check=True)
    totals = json.loads(report.read_text())["totals"]
    return {
        "outcomes": {word: int(count) for count, word in outcomes.items()},
        "lines": totals["num_statements"],
        "covered_lines": totals["covered_lines"],
        "coverage_percent": round(totals["percent_covered"], 2),
    }


def record(run_tests: bool) -> dict[str, Any]:
    from dcscale.testing.runs import make_shards

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = make_shards(folder / "shards")
        result = {
            "losses": losses(folder, shards),
            "sequences": sequences(folder, shards),
            "tests": collected(),
        }
        if run_tests:
            result["tested"] = tested(folder)
    return result


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What must be equal and is not; the tests may become more, and their coverage higher."""
    found = []
    for group in ("losses", "sequences"):
        for name in sorted({*before[group], *after[group]}):
            if before[group].get(name) != after[group].get(name):
                found.append(f"{group} of {name} differ")
    if "tested" in before and "tested" in after:
        old, new = before["tested"], after["tested"]
        if new["coverage_percent"] < old["coverage_percent"]:
            found.append(f"coverage fell from {old['coverage_percent']} to {new['coverage_percent']} percent")
        if new["outcomes"].get("failed") or new["outcomes"].get("error"):
            found.append(f"tests failed: {new['outcomes']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to write the record")
    parser.add_argument("--tests", action="store_true", help="run all tests under coverage too")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="FILE.json", help="exit with 1 if they differ")
    options = parser.parse_args()
    if (options.output is None) == (options.compare is None):
        parser.error("give one of --output and --compare")
    if options.compare:
        before, after = (json.loads(path.read_text()) for path in options.compare)
        print(f"cases: {before['tests']['all']} and {after['tests']['all']}")
        print(f"tests: {before.get('tested')} and {after.get('tested')}")
        if found := differences(before, after):
            sys.exit("\n".join(found))
        print(f"equal: {len(before['losses'])} runs, {len(before['sequences'])} orders of {SEQUENCES} sequences")
        return
    sys.path.insert(0, str(ROOT))  # this checkout, wherever dcscale is installed from
    os.environ["PYTHONPATH"] = str(ROOT)
    result = record(options.tests)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {options.output}: {result['tests']['all']} cases, {result.get('tested', 'tests not run')}")


if __name__ == "__main__":
    main()
