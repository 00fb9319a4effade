"""The doctor on the three nodes of a SLURM: a slow and a dead link, other config and code, a rank that is missing.

And what the check before training finds on two of them.
"""

import json
import re

import pytest

from dcscale.testing.runs import tiny_settings

pytestmark = pytest.mark.distributed

THREE = ["--partition=all", "--nodes=3", "--ntasks=3"]


def examine(cluster, run, shards, *more, rank_settings=None):
    """Exit code, and (check, node) -> value of all bad findings, and the number of findings by verdict."""
    start = cluster.start(
        [*tiny_settings(run, shards), "--nodes", "--quick", "--json", *more],
        program="tools/doctor.py",
        srun=THREE,
        rank_settings=rank_settings,
        kill_on_bad_exit=False,
    )
    code = start.wait(90)
    found = re.search(r"^\{$.*^\}$", start.text, flags=re.DOTALL | re.MULTILINE)  # srun prints before and after it
    assert found is not None, start.text
    report = json.loads(found[0])
    bad = {(f["check"], f["node"]): f["value"] for f in report["findings"] if f["verdict"] == "bad"}
    return code, bad, {(f["check"], f["node"]) for f in report["findings"] if f["verdict"] == "good"}


def test_a_slow_link_other_config_and_other_code_are_found_on_their_nodes(cluster, shards, tmp_path):
    first, second = cluster.nodes
    with cluster.slow_link(cluster.third, "20mbit"), cluster.other_code(second, "dcscale/ops/loss.py"):
        code, bad, good = examine(cluster, tmp_path / "run", shards, rank_settings={0: ["train.seed=4"]})
    assert code == 1
    assert list(bad) == [("config", first), ("code", second), ("link bandwidth", cluster.third)]
    assert bad["config", first] == "train.seed is 4, not 0"
    assert bad["code", second].startswith("dcscale/ops/loss.py is SHA-256")
    slow = bad["link bandwidth", cluster.third]
    assert f"to {first}: 0.0" in slow
    assert f"to {second}: 0.0" in slow
    assert {("same shards", "all"), ("shared run folder", "all"), ("clock skew", "all")} <= good
    assert ("all-reduce (gloo)", "all") in good
    assert not (tmp_path / "run").exists()


def test_a_dead_link_is_found_between_its_ends(cluster, shards, tmp_path):
    ends = [cluster.nodes[1], cluster.third]
    with cluster.dead_link(*ends[::-1]):
        code, bad, _ = examine(cluster, tmp_path / "run", shards)
    assert code == 1
    assert list(bad) == [("link", end) for end in ends]
    assert bad["link", ends[0]] == f"to {ends[1]}: no connection: timed out, from {ends[1]}: no connection: timed out"


def test_a_rank_that_does_not_arrive_is_found_with_its_node(cluster, shards, tmp_path):
    start = cluster.start(
        [*tiny_settings(tmp_path / "run", shards), "--nodes", "--quick", "--wait=15"],
        program="tools/doctor.py",
        srun=THREE,
        rank_settings={2: None},
        kill_on_bad_exit=False,
    )
    # Rank 1 prints what it knows too, maybe first.
    found = re.compile(rf"bad +ranks +{cluster.third} +rank 2 did not arrive")
    try:
        start.wait_for(lambda: found.search(start.text), 60)
    finally:
        start.cancel()  # the task that never arrives would wait for ever
