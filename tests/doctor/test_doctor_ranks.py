"""What the doctor finds on several ranks together: on processes joined by gloo, of which each plays a node."""

import dataclasses
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dcscale.doctor import collectives, ranks
from dcscale.doctor.collectives import judge_rates, judge_sums, sum_of_values, values
from dcscale.doctor.findings import Finding, Verdict, condensed
from dcscale.doctor.ranks import check_ranks, judge_differences, judge_shards
from dcscale.doctor.shared import check_address, judge_run_folder, shards_seen
from dcscale.parallel import discover, free_port
from dcscale.testing.distributed import run_distributed, start_ranks
from dcscale.testing.runs import tiny_config

HOSTS = ["n1", "n2", "n3"]


def bad(findings):
    return [(finding.check, finding.node) for finding in findings if finding.verdict is Verdict.BAD]


def environment_of_a_node():
    """Of a rank that has a node of its own, though its processes share a machine."""
    return dataclasses.replace(discover(), local_rank=0, local_world_size=1)


# -- all of it, on several processes -------------------------------------------------------------------------------


def examine(config, faults=None, seconds=30.0):
    """The findings of a rank, and whether it prints them.

    ``faults`` by rank: ``seed``, ``variable and folder``, ``tamper`` or ``exit``.
    """
    environment = environment_of_a_node()
    fault = (faults or {}).get(environment.rank)
    if fault == "variable and folder":
        os.environ["NCCL_ALGO"] = "Tree"
        config.run.folder = str(Path(config.run.folder).with_name("another"))
        Path(config.run.folder).mkdir()
    if fault == "seed":
        config.train.seed = 7
    if fault == "tamper":
        untouched = collectives.values
        collectives.values = lambda size, rank, *rest: untouched(size, rank, *rest) + (rank == environment.rank)

    def local():
        if fault == "exit":
            os._exit(5)
        return [Finding("local", Verdict.GOOD, f"node {environment.rank}", "fine", "fine")]

    try:
        return check_ranks(environment, config, local, seconds=seconds, patience=0.5)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.distributed
def test_two_nodes_without_faults(shards, tmp_path):
    config = tiny_config(tmp_path / "run", shards)
    (findings, speaks), (others, _) = run_distributed(examine, 2, config)
    assert speaks
    assert others == []
    assert bad(findings) == []
    checks = [finding.check for finding in findings]
    assert checks == [
        *("equality", "local", "local", "same shards", "shared run folder", "links", "clock skew"),
        *("all-reduce (gloo)", "all-reduce speed (gloo)"),
    ]
    assert "5 shards of" in findings[3].value
    assert "right on all 2 ranks" in findings[-2].value
    assert "16 MiB" in findings[-1].value
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".doctor*"))


@pytest.mark.distributed
def test_what_differs_and_who_adds_wrongly_is_named_on_all_ranks(shards, tmp_path):
    (tmp_path / "run").mkdir()
    config = tiny_config(tmp_path / "run", shards)
    answers = run_distributed(examine, 3, config, {0: "seed", 1: "variable and folder", 2: "tamper"})
    findings = answers[0][0]
    host = socket.gethostname()
    found = {
        check: finding.value
        for check in ("config", "environment", "shared run folder", "all-reduce (gloo)")
        for finding in findings
        if (finding.check, finding.verdict) == (check, Verdict.BAD)
    }
    assert found["environment"] == "NCCL_ALGO is Tree, not absent"
    # Rank 0 is named too, though all are compared with it.
    texts = [finding.value for finding in findings if finding.check == "config"]
    assert any("train.seed is 7, not" in text for text in texts)
    assert any("run.folder is" in text for text in texts)
    assert found["all-reduce (gloo)"].startswith("rank 2: ")
    assert not list(tmp_path.rglob(".doctor*"))
    assert all(finding.node.startswith(host) for finding in findings if finding.verdict is Verdict.BAD)
    for others, speaks in answers[1:]:
        assert not speaks
        assert bad(others) == bad(findings)


@pytest.mark.distributed
def test_a_rank_that_dies_is_named(shards, tmp_path):
    processes, answers = start_ranks(examine, 3, tiny_config(tmp_path / "run", shards), {1: "exit"}, 1.5)
    results = {}
    for _ in range(2):
        rank, result, error = answers.get(timeout=60)
        assert error is None, error
        results[rank] = result
    for process in processes:
        process.join(30)
    assert sorted(results) == [0, 2]
    assert (results[0][1], results[2][1]) == (True, False)
    for findings, _ in results.values():
        (finding,) = [finding for finding in findings if finding.check == "ranks"]
        assert finding.value.startswith("rank 1 was lost: no answer within 3 s (the checks of each machine)")


@pytest.mark.distributed
def test_if_rank_0_dies_the_others_speak(shards, tmp_path):
    processes, answers = start_ranks(examine, 2, tiny_config(tmp_path / "run", shards), {0: "exit"}, 10.0)
    rank, (findings, speaks), error = answers.get(timeout=60)
    assert (rank, speaks, error) == (1, True, None)
    assert "rank 0 was lost: rank 0, which serves the store, was lost" in findings[-1].value
    for process in processes:
        process.join(30)


def arrive(port, rank):
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_PORT=str(port))
    return check_ranks(discover(), None, list, seconds=1.0)


@pytest.mark.distributed
def test_a_rank_that_does_not_arrive_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "0")
    findings, speaks = arrive(free_port(), 0)
    assert speaks
    assert bad(findings) == [("ranks", "unknown")]
    assert findings[0].value == "ranks 1-2 did not arrive within 1 s (--wait)"
    findings, speaks = arrive(free_port(), 2)
    assert speaks
    assert bad(findings) == [("ranks", socket.gethostname())]
    assert "does not answer" in findings[0].value


# -- judgements ----------------------------------------------------------------------------------------------------


def test_whoever_differs_from_most_ranks_is_named():
    seed = ("train.seed", "1", "2")
    (finding,) = judge_differences([[], [seed], [seed]], HOSTS, 10)
    assert (finding.check, finding.node, finding.value) == ("config", "n1", "train.seed is 2, not 1")
    (finding,) = judge_differences([[], [seed]], HOSTS[:2], 10)
    assert (finding.node, finding.value) == ("n2", "train.seed is 1, not 2")
    assert judge_differences([[], []], HOSTS[:2], 10)[0].verdict is Verdict.GOOD


def test_differences_are_named_by_kind_and_not_all():
    own = [
        *((f"source dcscale/{letter}.py", "SHA-256 1", "SHA-256 2") for letter in "abcde"),
        *(("version of torch", "2", "3"), ("variable NCCL_P2P_DISABLE", "1", "absent"), ("device", "cpu", "H100")),
    ]
    findings = judge_differences([[], [], own], HOSTS, 10)
    assert bad(findings) == [(check, "n3") for check in ("code", "versions", "environment", "devices")]
    assert findings[0].value.endswith("; and 2 more")
    assert findings[1].value == "torch is 2, not 3"


def test_variables_that_matter_are_compared(monkeypatch):
    for name in ("NCCL_ALGO", "OMP_NUM_THREADS", "CUDA_LAUNCH_BLOCKING", "TORCH_COMPILE_DEBUG", "HOME"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "e" * 100)
    facts = ranks._more_facts(torch.device("cpu"))
    assert facts["variable NCCL_ALGO"] == "1"
    assert {"variable OMP_NUM_THREADS", "variable CUDA_LAUNCH_BLOCKING", "variable TORCH_COMPILE_DEBUG"} < facts.keys()
    assert not {"variable CUDA_VISIBLE_DEVICES", "variable HOME"} & facts.keys()
    assert len(facts["variable GLOO_SOCKET_IFNAME"]) == 63


def test_nodes_with_other_shards_or_none_are_named():
    usual, other, none = ("a", "2 shards of X"), ("b", "3 shards of X"), ("", "X: no such folder")
    findings = judge_shards([{"data.train": seen} for seen in (usual, other, usual, none)], [*HOSTS, "n4"])
    assert bad(findings) == [("same shards", "n2"), ("same shards", "n4")]
    assert findings[0].value == "data.train: other shards than on most nodes: 3 shards of X"
    assert findings[1].value == "data.train: X: no such folder"
    (finding,) = judge_shards([{"data.train": none}] * 2, HOSTS[:2])
    assert finding.verdict is Verdict.UNKNOWN  # the checks of each machine say that it is bad
    assert judge_shards([{"data.train": usual}] * 2, HOSTS[:2])[0].verdict is Verdict.GOOD


def test_shards_are_seen_with_their_identity(shards, tmp_path):
    seen = shards_seen(tiny_config(tmp_path / "run", shards))
    assert [text.split(" of ")[0] for _, text in seen.values()] == ["5 shards", "2 shards"]
    assert list(seen) == ["data.train", "data.validation"]
    missing = shards_seen(tiny_config(tmp_path / "run", shards, f"data.train={tmp_path}", "validation.interval=0"))
    assert missing["data.train"][0] == ""
    assert str(tmp_path) in missing["data.train"][1]
    assert list(missing) == ["data.train"]


def test_nodes_that_do_not_share_the_run_folder_are_named():
    folder = Path("/runs/a")
    said = [[0, None, [2]], [1, None, [0]], [2, None, []]]
    findings = judge_run_folder(folder, said, HOSTS)
    assert bad(findings) == [("shared run folder", "n2"), ("shared run folder", "n3")]
    assert findings[0].value == "what n1 writes into /runs/a is not seen here"
    assert findings[1].value == "what it writes into /runs/a is not seen on n1"
    said = [[0, "/runs/a cannot be written to: No space left on device", []], [1, None, [0]], [2, None, [0]]]
    assert bad(judge_run_folder(folder, said, HOSTS)) == [("shared run folder", "n1")]
    assert judge_run_folder(folder, [[0, None, []], [1, None, []]], HOSTS)[0].verdict is Verdict.GOOD


def test_an_address_that_other_nodes_cannot_reach(monkeypatch):
    store = ("127.0.0.1", 1)
    assert check_address(store, HOSTS, {"GLOO_SOCKET_IFNAME": "lo"}) == ("127.0.0.1", None)
    address, problem = check_address(store, HOSTS, {"GLOO_SOCKET_IFNAME": "nic7"})
    assert address == "127.0.0.1"
    assert problem == "GLOO_SOCKET_IFNAME is nic7, which has no address: No such device"
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert check_address(store, ["n1", "n1"], {})[1] is None
    assert "resolves to" in check_address(store, HOSTS, {})[1]
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert "does not resolve" in check_address(store, HOSTS, {})[1]


def test_sums_are_known_in_advance():
    for size, count, modulus in ((1, 3, 7), (50, 4, 61), (5000, 9, 1009), (10, 200, 2)):
        parts = [values(size, rank, modulus, torch.device("cpu")) for rank in range(count)]
        assert torch.equal(sum(parts), sum_of_values(size, count, modulus, torch.device("cpu")))
    assert collectives._modulus(torch.bfloat16, 4) == 61
    assert collectives._modulus(torch.bfloat16, 256) == 2
    assert collectives._modulus(torch.bfloat16, 257) == 0


def result(*wrong, digest="a"):
    return {"wrong": list(wrong), "digest": digest}


def test_wrong_sums_name_the_rank():
    assert judge_sums("gloo", [result()] * 3, [], HOSTS)[0].verdict is Verdict.GOOD
    assert bad(judge_sums("gloo", [result(), result("1 of 5 sums"), result()], [], HOSTS)) == [
        ("all-reduce (gloo)", "n2")
    ]
    (finding,) = judge_sums("nccl", [result(), result(), result(digest="b")], [], HOSTS)
    assert (finding.node, finding.value) == ("n3", "rank 2: other bits of the same sum than most ranks")
    everywhere = [result("1 of 5 sums")] * 3
    assert [f.node for f in judge_sums("gloo", everywhere, [[2], [2], [0, 1]], HOSTS)] == ["n3"]
    either = judge_sums("gloo", everywhere, [[1], [0], []], HOSTS)
    assert [finding.node for finding in either] == ["n1", "n2"]
    assert "or a rank it was paired with" in either[0].value
    unclear = judge_sums("gloo", everywhere, [[], [], []], HOSTS)
    assert len(unclear) == 3
    assert "or any other" in unclear[0].value


def test_nccl_must_be_faster_than_a_tcp_connection():
    rates = {1 << 16: 1e6, 1 << 24: 1e9}
    assert judge_rates("gloo", rates, 1e10).verdict is Verdict.GOOD
    assert judge_rates("nccl", rates, None).verdict is Verdict.GOOD
    assert judge_rates("nccl", rates, 1.9e9).verdict is Verdict.GOOD
    finding = judge_rates("nccl", rates, 1e10)
    assert finding.verdict is Verdict.BAD
    assert finding.value == "64 KiB 0.008 Gbit/s, 16 MiB 8 Gbit/s"


def test_a_table_says_once_what_nodes_have_in_common():
    good = [Finding("disk", Verdict.GOOD, node, f"{node} GiB", "rule") for node in HOSTS]
    same = [Finding("limit", Verdict.BAD, node, "1", "2", "raise it") for node in HOSTS[:2]]
    other = [Finding("limit", Verdict.BAD, "n3", "0", "2", "raise it")]
    of_all = [Finding("links", Verdict.GOOD, "all", "fine", "rule")]
    found = condensed([*good, *same, *other, *of_all])
    assert [(finding.check, finding.node, finding.value) for finding in found] == [
        ("disk", "all", "n1 GiB (and 2 others)"),
        ("limit", "n1, n2", "1"),
        ("limit", "n3", "0"),
        ("links", "all", "fine"),
    ]
    assert condensed(good[:1] * 2) == good[:1] * 2
