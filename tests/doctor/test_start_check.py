"""The check before training: what it refuses, whether another start may succeed, and that it can be switched off."""

import resource
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch

from dcscale.cluster.failures import exit_code
from dcscale.cluster.restarts import read_bad_nodes
from dcscale.doctor import start as module
from dcscale.doctor.findings import Finding, Verdict
from dcscale.doctor.local.subject import Subject
from dcscale.doctor.start import NodeCheckError, check_nodes
from dcscale.lease import Lease, this_process
from dcscale.parallel import Environment, discover, start_distributed, stop_distributed
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import tiny_config, train_here
from dcscale.train import REFUSALS

ALONE = Environment(0, 0, 1, 1, torch.device("cpu"))
HOST = socket.gethostname()
MODEL = 1_000_000


@pytest.fixture
def config(shards, tmp_path):
    (tmp_path / "run").mkdir()
    return tiny_config(tmp_path / "run", shards)


def finding(check, node=HOST):
    return Finding(check, Verdict.BAD, node, "value", "rule", "way out")


def code(error):
    return int(exit_code(error, REFUSALS))


def test_a_machine_in_order_is_accepted(config):
    check_nodes(config, ALONE, None, [HOST], MODEL)


def test_a_low_limit_is_refused_and_another_start_would_fail_too(config, monkeypatch):
    limits = {resource.RLIMIT_NOFILE: (64, 64)}
    untouched = resource.getrlimit
    look = module.check_host
    monkeypatch.setattr(
        module, "check_host", lambda subject: look(subject, limit=lambda n: limits.get(n) or untouched(n))
    )
    with pytest.raises(NodeCheckError) as caught:
        check_nodes(config, ALONE, None, [HOST], MODEL)
    text = str(caught.value)
    assert f"  - {HOST}: open files: 64; must be: ulimit -n of at least" in text
    assert "parallel.check_nodes=false" in text
    assert code(caught.value) == 2


def test_a_disk_without_room_for_a_checkpoint(config, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=15_999_999))
    with pytest.raises(
        NodeCheckError, match=r"disk space: .*run has 15\.3 MiB free; must be: at least 15\.3 MiB"
    ) as caught:
        check_nodes(config, ALONE, None, [HOST], MODEL)
    assert code(caught.value) == 76  # as when a checkpoint finds no room
    check_nodes(config, ALONE, None, [HOST], None)  # a run that is complete writes none
    config.checkpoint.on_error = "warn"  # a run that trains on without checkpoints
    check_nodes(config, ALONE, None, [HOST], MODEL)
    config.checkpoint.on_error = "fail"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=16_000_000))
    check_nodes(config, ALONE, None, [HOST], MODEL)


@pytest.mark.parametrize(
    ("check", "nodes", "of_all", "expected"),
    [
        ("open files", ["n1"], 2, 76),
        ("open files", ["n1", "n2"], 2, 2),
        ("GPU ECC", ["n1", "n2"], 2, 76),
        ("run folder", ["n2"], 3, 76),
        ("run folder", ["n2", "n3"], 3, 2),
    ],
)
def test_another_start_may_succeed_where_a_node_is_the_cause(check, nodes, of_all, expected):
    error = module._error([(number, finding(check, node)) for number, node in enumerate(nodes)], of_all)
    assert code(error) == expected
    assert all(f"  - {node}: {check}: value; must be: rule; way out" in str(error) for node in nodes)
    mixed = module._error([(0, finding(check, "n1")), (1, finding("/dev/shm", "n1"))], 1)
    assert code(mixed) == 2


def test_the_job_script_leaves_out_a_node_that_is_the_cause(config, monkeypatch, capsys):
    run = module.Path(config.run.folder)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(NodeCheckError):
        check_nodes(config, ALONE, None, [HOST], MODEL, lambda subject: [finding("GPU ECC")])
    assert not (run / "bad_nodes").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(NodeCheckError):
        check_nodes(config, ALONE, None, [HOST], MODEL, lambda subject: [finding("open files")])
    assert not (run / "bad_nodes").exists()  # no other node would be better
    with pytest.raises(NodeCheckError):
        check_nodes(config, ALONE, None, [HOST], MODEL, lambda subject: [finding("GPU ECC")])
    assert read_bad_nodes(run, {"SLURM_JOB_ID": "17"}, print) == {HOST: "its check failed: GPU ECC: value"}
    shutil.rmtree(run / "bad_nodes")
    (run / "bad_nodes").touch()
    with pytest.raises(NodeCheckError):
        check_nodes(config, ALONE, None, [HOST], MODEL, lambda subject: [finding("GPU ECC")])
    assert "cannot be written to" in capsys.readouterr().err


def test_many_nodes_are_not_all_named():
    error = module._error([(rank, finding("open files", f"n{rank}")) for rank in range(100)], 100)
    assert "  - and 92 more" in str(error)


def test_only_what_keeps_a_run_from_ending_well_counts(config, monkeypatch):
    names = ["host memory", "swap", "/dev/shm", "open files", "processes", "other limits"]
    monkeypatch.setattr(module, "check_host", lambda subject: [finding(name) for name in names])
    gpus = ["GPUs", "GPU clocks", "GPU ECC", "GPU memory", "GPU memory rows"]
    monkeypatch.setattr(module, "check_gpus", lambda subject: [finding(name) for name in gpus])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [f.check for f in module._look(Subject(config))] == ["open files", "processes", "other limits"]
    config.data.workers = 1
    assert "/dev/shm" in [f.check for f in module._look(Subject(config))]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    subject = Subject(config, ranks=8, local_ranks=8)
    assert [f.check for f in module._look(subject)][-3:] == ["GPUs", "GPU ECC", "GPU memory rows"]
    assert subject.local_ranks == 1  # srun --gpus-per-task=1


def _train_with_a_finding(refused, unchecked):
    module._look = lambda subject: [finding("open files")]
    with pytest.raises(NodeCheckError, match="open files"):
        train_here(refused)
    assert not list(module.Path(refused.run.folder).glob("*"))  # a start that is refused leaves nothing
    return train_here(unchecked)[0].state.step


def test_training_checks_unless_told_not_to(shards, tmp_path):
    few = ["train.steps=2", "validation.interval=0", "log.compose_interval=0"]
    configs = [tiny_config(tmp_path / "run", shards, *few, *more) for more in ([], ["parallel.check_nodes=false"])]
    assert run_distributed(_train_with_a_finding, 1, *configs) == [2]


def check_as_nodes(config, fault):
    """Checks as one of two nodes; returns its error, its rank and its exit code."""
    environment = discover()
    start_distributed(environment, 1)
    as_node = Environment(environment.rank, 0, 2, 1, environment.device)
    lease = None
    if environment.is_main:
        lease = Lease(module.Path(config.run.folder), "wait", this_process())
        lease.acquire()
    elif fault == "folder":
        config.run.folder += "-of-this-node"
    elif fault == "sum":
        untouched = module.values
        module.values = lambda *arguments: untouched(*arguments) + 1
    try:
        check_nodes(config, as_node, lease, ["n1", "n2"], MODEL)
    except NodeCheckError as error:
        return str(error), error.rank, code(error)
    finally:
        if lease is not None:
            lease.release()
        stop_distributed()
    return None


@pytest.mark.distributed
@pytest.mark.parametrize("fault", [None, "folder", "sum"])
def test_two_nodes(config, fault, monkeypatch):
    answers = run_distributed(check_as_nodes, 2, config, fault)
    if fault is None:
        assert answers == [None, None]
        return
    assert answers[0] == answers[1]
    text, rank, exit = answers[0]
    if fault == "folder":
        assert (rank, exit) == (1, 2)
        assert "run-of-this-node/lease.json, which rank 0 on n1 has written, is not seen here" in text
    else:
        assert (rank, exit) == (0, 76)
        assert "all-reduce: 1,009 of 1,009 sums over 2 ranks are wrong on rank 0" in text


def test_a_run_folder_that_cannot_be_written_to_from_here(tmp_path):
    lease = Lease(tmp_path, "wait", this_process())
    lease.acquire()
    token = lease.token
    try:
        assert module._unshared(tmp_path, "n1", token) == ""
        assert "is not seen here" in module._unshared(tmp_path, "n1", "another")
    finally:
        lease.release()
    assert "is not seen here" in module._unshared(tmp_path, "n1", token)


def test_the_error_of_the_disk_is_named(tmp_path, monkeypatch):
    lease = Lease(tmp_path, "wait", this_process())
    lease.acquire()

    def refuse(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(module, "tempfile", SimpleNamespace(TemporaryFile=refuse))
    try:
        assert module._unshared(tmp_path, "n1", lease.token) == f"{tmp_path} cannot be used: Read-only file system"
    finally:
        lease.release()
