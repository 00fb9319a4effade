"""Who a process is, from the variables of each launcher."""

import pytest
import torch

from dcscale.parallel import LaunchError, discover, share_cores
from dcscale.parallel.environment import Environment


def test_torchrun():
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1"}
    environment = discover(variables)
    assert (environment.rank, environment.local_rank, environment.world_size) == (3, 1, 4)
    assert environment.local_world_size == 2
    assert not environment.is_main
    assert variables["MASTER_ADDR"] == "node1"


def test_deepspeed_on_cpu_gives_local_size():
    environment = discover({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"})
    assert environment.local_world_size == 2
    assert environment.is_main


def test_srun_sets_the_names_that_torch_reads():
    variables = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NUM_NODES": "2",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "29500",
    }
    environment = discover(variables)
    assert (environment.rank, environment.local_rank, environment.world_size) == (5, 1, 8)
    assert environment.launcher == "srun"
    assert (variables["RANK"], variables["WORLD_SIZE"], variables["LOCAL_RANK"]) == ("5", "8", "1")


def test_the_batch_shell_of_slurm_is_not_a_step():
    """SLURM_PROCID is 0 in a batch script too: `python train.py` there must not wait for other tasks."""
    environment = discover({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})
    assert (environment.world_size, environment.launcher) == (1, "python")


def test_alone_makes_its_own_rendezvous():
    variables: dict[str, str] = {}
    environment = discover(variables)
    assert environment == Environment(0, 0, 1, 1, "python", environment.device)
    assert variables["MASTER_ADDR"] == "127.0.0.1"
    assert int(variables["MASTER_PORT"]) > 0


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_half_a_launcher_is_refused(missing):
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    del variables[missing]
    with pytest.raises(LaunchError, match=f"{missing} is None.*torchrun"):
        discover(variables)


def test_not_a_number():
    with pytest.raises(LaunchError, match="RANK is 'zero'"):
        discover({"RANK": "zero", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


def test_rank_beyond_world_size():
    with pytest.raises(LaunchError, match="rank 2 of 2"):
        discover({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="about CPU machines")
def test_cores_are_shared_unless_told_otherwise(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    environment = Environment(0, 0, 4, 4, "python", torch.device("cpu"))
    try:
        assert share_cores(environment, {}) == 2
        torch.set_num_threads(1)
        assert share_cores(environment, {"OMP_NUM_THREADS": "5"}) == 1
    finally:
        torch.set_num_threads(before)
