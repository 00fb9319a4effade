"""Rank, world size and device of a process, from the variables of each launcher."""

import pytest
import torch

from dcscale.parallel import LaunchError, discover, share_cores
from dcscale.parallel.environment import Environment

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


def see_gpus(monkeypatch, count):
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)


def test_torchrun(monkeypatch):
    see_gpus(monkeypatch, 0)
    variables = dict(TORCHRUN)
    environment = discover(variables)
    assert (environment.rank, environment.local_rank, environment.world_size) == (3, 1, 4)
    assert environment.local_world_size == 2
    assert not environment.is_main
    assert variables["MASTER_ADDR"] == "node1"


def test_deepspeed_on_cpu_gives_local_size(monkeypatch):
    see_gpus(monkeypatch, 0)
    environment = discover({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"})
    assert environment.local_world_size == 2
    assert environment.is_main


def test_srun_sets_the_names_that_torch_reads(monkeypatch):
    see_gpus(monkeypatch, 0)
    variables = dict(SRUN)
    environment = discover(variables)
    assert environment == Environment(5, 1, 8, 4, torch.device("cpu"))
    assert (variables["RANK"], variables["WORLD_SIZE"], variables["LOCAL_RANK"]) == ("5", "8", "1")


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("MASTER_ADDR", r'export MASTER_ADDR=\$\(scontrol show hostnames "\$SLURM_JOB_NODELIST" \| head -n1\)$'),
        ("MASTER_PORT", "export MASTER_PORT=29500$"),
    ],
)
@pytest.mark.parametrize("empty", [False, True])
def test_tasks_of_srun_that_cannot_find_each_other_do_not_run_alone(name, way_out, empty):
    variables = {**SRUN, name: ""}
    if not empty:
        del variables[name]
    with pytest.raises(LaunchError, match=f"srun started 8 tasks, but {name} must be set.*{way_out}"):
        discover(variables)


def test_srun_with_no_rendezvous_at_all_names_both():
    variables = {name: value for name, value in SRUN.items() if not name.startswith("MASTER_")}
    with pytest.raises(LaunchError, match="MASTER_ADDR and MASTER_PORT must be set"):
        discover(variables)


def test_one_task_of_srun_runs_alone():
    variables = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert discover(variables).world_size == 1
    assert variables["MASTER_ADDR"] == "127.0.0.1"


def test_one_visible_gpu_a_task_is_index_0_for_deepspeed_too(monkeypatch):
    see_gpus(monkeypatch, 1)
    variables = dict(SRUN)
    environment = discover(variables)
    assert (environment.local_rank, environment.device) == (1, torch.device("cuda", 0))
    assert variables["LOCAL_RANK"] == "0"


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
        (SRUN, 2, "srun started 4 processes on this node.* 2 are visible"),
    ],
)
def test_more_processes_than_gpus_are_refused_on_every_rank(monkeypatch, variables, gpus, message):
    see_gpus(monkeypatch, gpus)
    with pytest.raises(LaunchError, match=message):
        discover(dict(variables))


def test_the_batch_shell_of_slurm_is_not_a_step():
    """SLURM_PROCID is 0 in a batch script too: `python train.py` there must not wait for other tasks."""
    assert discover({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).world_size == 1


def test_a_single_process_makes_its_own_rendezvous():
    variables: dict[str, str] = {}
    environment = discover(variables)
    assert environment == Environment(0, 0, 1, 1, environment.device)
    assert variables["MASTER_ADDR"] == "127.0.0.1"
    assert int(variables["MASTER_PORT"]) > 0


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_missing_variables_are_refused(missing):
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    del variables[missing]
    with pytest.raises(LaunchError, match=f"{missing} is None.*torchrun"):
        discover(variables)


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "zero", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, {**SRUN, "SLURM_STEP_NUM_TASKS": "zero"}],
)
def test_not_a_number(variables):
    with pytest.raises(LaunchError, match="is 'zero', but .* must set it to an integer"):
        discover(variables)


def test_rank_beyond_world_size():
    with pytest.raises(LaunchError, match="rank 2 of 2"):
        discover({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


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
