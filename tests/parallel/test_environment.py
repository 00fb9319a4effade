"""Device of a process and what DeepSpeed is told, from the variables of its launcher; threads of torch."""

import pytest
import torch

from dcscale.parallel import LaunchError, discover, share_cores
from dcscale.parallel.environment import Environment

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def see_gpus(monkeypatch, count):
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)


def test_the_place_of_this_process(monkeypatch):
    see_gpus(monkeypatch, 0)
    environment = discover(dict(TORCHRUN))
    assert (environment.rank, environment.local_rank, environment.world_size) == (3, 1, 4)
    assert (environment.local_world_size, environment.device) == (2, torch.device("cpu"))
    assert (environment.launch.launcher, environment.launch.address) == ("torchrun", ("node1", 29500))
    assert not environment.is_main
    assert discover({}).is_main


@pytest.mark.parametrize("variables", [{}, TORCHRUN, SRUN, OPEN_MPI])
def test_deepspeed_is_told_the_place_on_this_node(monkeypatch, variables):
    see_gpus(monkeypatch, 0)
    variables = dict(variables)
    environment = discover(variables)
    assert variables["LOCAL_RANK"] == str(environment.local_rank)
    assert variables["LOCAL_SIZE"] == str(environment.local_world_size)
    assert discover(variables) == environment  # so nothing that was set is taken for a launcher's


@pytest.mark.parametrize("variables", [SRUN, OPEN_MPI])
def test_one_visible_gpu_a_task_is_index_0_for_deepspeed_too(monkeypatch, variables):
    see_gpus(monkeypatch, 1)
    variables = dict(variables)
    environment = discover(variables)
    assert (environment.local_rank, environment.device) == (1, torch.device("cuda", 0))
    assert variables["LOCAL_RANK"] == "0"
    assert variables.get("OMPI_COMM_WORLD_LOCAL_RANK", "0") == "0"  # DeepSpeed asserts that they are equal


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN])
def test_a_gpu_for_every_local_rank(monkeypatch, variables):
    see_gpus(monkeypatch, 4)
    variables = dict(variables)
    assert discover(variables).device == torch.device("cuda", 1)
    assert variables["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    ("variables", "gpus", "message"),
    [
        (TORCHRUN, 1, "torchrun started 2 processes on this node.* 1 are visible; start at most 1 per node"),
        ({**TORCHRUN, "LOCAL_RANK": "0"}, 1, "torchrun started 2 processes"),
        ({name: TORCHRUN[name] for name in TORCHRUN if name != "TORCHELASTIC_RUN_ID"}, 1, "started 2 processes"),
        (SRUN, 2, "srun started 4 processes on this node.* 2 are visible"),
    ],
)
def test_more_processes_than_gpus_are_refused_on_every_rank(monkeypatch, variables, gpus, message):
    see_gpus(monkeypatch, gpus)
    with pytest.raises(LaunchError, match=message):
        discover(dict(variables))


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 2),
        ({"OMP_NUM_THREADS": "5"}, 1),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "5", "TORCHELASTIC_RUN_ID": "none"}, 1),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 2),  # set by torchrun, not by the user
    ],
)
def test_cores_are_shared_unless_the_user_sets_the_threads(monkeypatch, variables, threads):
    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    try:
        torch.set_num_threads(1)
        assert share_cores(Environment(0, 0, 4, 4, torch.device("cpu")), variables) == threads
    finally:
        torch.set_num_threads(before)
