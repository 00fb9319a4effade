"""Place of a process, and where the ranks meet, from the variables that each launcher really sets.

The variables of srun, torchrun, MPICH 5.0, Intel MPI 2021.19 and Open MPI 5.0 are those of real starts; those of Flux
and PALS are as documented.
"""

import pytest

from dcscale.parallel.launchers import LaunchError, expand_hosts, recognise

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "34227",
    "TORCHELASTIC_RUN_ID": "7",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
DEEPSPEED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
BATCH = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
SRUN = {
    **BATCH,
    "SLURM_PROCID": "4",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "3,1(x2)",
    "SLURM_DISTRIBUTION": "block",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "PMI_FD": "9"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3",
}
PALS = {
    "PALS_RANKID": "13",
    "PALS_LOCAL_RANKID": "1",
    "PALS_LOCAL_SIZE": "12",
    "PMI_RANK": "13",
    "PMI_SIZE": "24",
    "PMI_LOCAL_RANK": "1",
    "PMI_LOCAL_SIZE": "12",
}
FLUX = {
    "FLUX_TASK_RANK": "5",
    "FLUX_JOB_SIZE": "8",
    "FLUX_TASK_LOCAL_ID": "1",
    "FLUX_JOB_NNODES": "2",
    "FLUX_JOB_ID": "f23",
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
}
MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29501"}


def without(variables, *names):
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "ranks", "launcher", "job"),
    [
        ({}, (0, 0, 1, 1), "python", ""),
        (TORCHRUN, (3, 1, 4, 2), "torchrun", ""),
        (DEEPSPEED, (1, 1, 2, 2), "deepspeed", ""),
        (without(DEEPSPEED, "CROSS_SIZE"), (1, 1, 2, 2), "RANK and WORLD_SIZE", ""),
        (SRUN, (4, 0, 5, 1), "srun", "job 17, step 0"),
        (
            {**SRUN, "SLURM_PROCID": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"},
            (1, 1, 5, 3),
            "srun",
            "job 17, step 0",
        ),
        ({**MASTER, **MPICH}, (2, 0, 4, 2), "mpiexec (PMI)", ""),
        ({**MASTER, **OPEN_MPI}, (3, 1, 4, 2), "mpirun (Open MPI)", ""),
        ({**MASTER, **PALS, "PBS_JOBID": "9.pbs"}, (13, 1, 24, 12), "mpiexec (PALS)", "job 9.pbs"),
        ({**MASTER, **FLUX}, (5, 1, 8, 4), "flux run", "job f23"),
    ],
)
def test_every_launcher_is_recognised(variables, ranks, launcher, job):
    found, launch = recognise(variables)
    assert (found, launch.launcher, launch.job) == (ranks, launcher, job)


@pytest.mark.parametrize(
    ("inner", "outer", "launcher"),
    [
        (TORCHRUN, {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, "torchrun"),
        (TORCHRUN, {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "torchrun"),
        # Daemons of mpirun are tasks of srun; there may be fewer than nodes.
        ({**MASTER, **MPICH}, {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "mpiexec (PMI)"),
        ({**MASTER, **OPEN_MPI}, {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "mpirun (Open MPI)"),
        ({"PMI_RANK": "4", "PMI_SIZE": "5", "PMI_FD": "11"}, SRUN, "srun"),  # srun --mpi=pmi2
        ({"PALS_RANKID": "4", "PALS_NODEID": "1"}, SRUN, "srun"),  # srun --mpi=cray_shasta
        (
            {
                **MASTER,
                **MPICH,
                "PMI_RANK": "4",
                "PMI_SIZE": "5",
                "MPI_LOCALNRANKS": "1",
            },  # mpiexec -ppn 1 in a batch job
            SRUN,
            "mpiexec (PMI)",
        ),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, SRUN, "srun"),  # mpirun -n 1 in each task
        ({"WORLD_SIZE": "1", "RANK": ""}, SRUN, "srun"),  # left by a login profile
    ],
)
def test_the_innermost_launcher_of_several_processes_counts(inner, outer, launcher):
    assert recognise({**outer, **inner})[1].launcher == launcher


@pytest.mark.parametrize(
    "variables",
    [
        {**BATCH, "SLURM_NTASKS": "8"},  # python in a batch script, beside srun
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"PMIX_RANK": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --mpi=pmix -n 1
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
    ],
)
def test_one_process_needs_no_other(variables):
    ranks, launch = recognise(variables)
    assert (ranks.world_size, launch.address, launch.launcher) == (1, None, "python")


def test_one_process_of_torchrun_needs_no_other_either():
    ranks, launch = recognise({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    assert (ranks.world_size, launch.address, launch.launcher) == (1, None, "torchrun")


@pytest.mark.parametrize("name", ["PMIX_RANK", "PALS_RANKID", "MV2_COMM_WORLD_RANK", "SLURM_PROCID"])
def test_one_of_several_processes_that_nobody_counts_does_not_run_alone(name):
    with pytest.raises(LaunchError, match=f"{name} is '1', so this seems to be one of several.*set RANK, WORLD_SIZE"):
        recognise({name: "1"})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        # torchrun --standalone in each task of srun
        ({**SRUN, **TORCHRUN, "GROUP_WORLD_SIZE": "1"}, r"srun started 5 tasks.*GROUP_WORLD_SIZE is 1.*--nnodes"),
        ({**SRUN, **DEEPSPEED}, "srun started 5 tasks.*CROSS_SIZE is 1: there would be several runs"),
        ({**OPEN_MPI, **without(DEEPSPEED, "CROSS_SIZE")}, "Open MPI.* started 4 tasks.*WORLD_SIZE is 2"),
        # export RANK=0 once in a job script
        (
            {**SRUN, **MASTER, "RANK": "0", "WORLD_SIZE": "5", "LOCAL_RANK": "0"},
            "RANK is 0, but SLURM_PROCID is 4, of 5 both; unset RANK",
        ),
    ],
)
def test_runs_side_by_side_are_refused(variables, message):
    with pytest.raises(LaunchError, match=message):
        recognise(variables)


def test_ranks_by_hand_that_follow_srun_are_accepted():
    assert recognise({**SRUN, **MASTER, "RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "0"})[0].rank == 4


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_missing_variable_is_named(missing):
    with pytest.raises(LaunchError, match=f"{missing} is None.*torchrun"):
        recognise(without(TORCHRUN, missing))


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({**TORCHRUN, "RANK": "x"}, "RANK"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS"),
        ({**SRUN, "SLURM_LOCALID": "x"}, "SLURM_LOCALID"),
        ({**MPICH, "MPI_LOCALRANKID": "x"}, "MPI_LOCALRANKID"),
        ({**TORCHRUN, "MASTER_PORT": "x"}, "MASTER_PORT"),
    ],
)
def test_what_is_no_number_is_named(variables, name):
    with pytest.raises(LaunchError, match=f"{name} is 'x', but .* must set it to an integer"):
        recognise(variables)


def test_mpi_without_local_ranks_says_what_to_set():
    with pytest.raises(LaunchError, match=r"MPI_LOCALRANKID is None, but mpiexec \(PMI\).*set RANK.*LOCAL_WORLD_SIZE"):
        recognise({**MASTER, "PMI_RANK": "0", "PMI_SIZE": "2"})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**TORCHRUN, "RANK": "4"}, "torchrun gave rank 4 of 4 and local rank 1 of 2"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "local rank 2 of 2"),
        ({**FLUX, "FLUX_JOB_NNODES": "0", "FLUX_TASK_LOCAL_ID": "8"}, "local rank 8 of 8"),
        ({**SRUN, "SLURM_NODEID": "3"}, "srun gave rank 4 of 5 and local rank 0 of 0"),
    ],
)
def test_a_rank_is_below_its_count(variables, message):
    with pytest.raises(LaunchError, match=message):
        recognise(variables)


# -- where the ranks meet ---------------------------------------------------------------------------------------------


def test_torchrun_serves_the_store_itself():
    launch = recognise(TORCHRUN)[1]
    assert (launch.address, launch.serves_store) == (("node1", 34227), False)
    again = recognise({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"})[1]
    assert launch.prefix != again.prefix  # keys of the attempt before may be there still


def test_srun_needs_no_address():
    _, launch = recognise(SRUN)
    host, port = launch.address
    assert host == "n1"
    assert launch.serves_store
    assert launch.expected_hosts == ("n1", "n1", "n1", "n2", "n3")
    starts = [{"SLURM_JOB_ID": "18"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}]
    others = [recognise({**SRUN, **start})[1] for start in starts]
    assert len({port, *(other.address[1] for other in others)}) == 4
    assert len({launch.prefix, *(other.prefix for other in others)}) == 4
    assert all(20_000 <= other.address[1] < 30_000 for other in others)


def test_all_tasks_of_a_step_derive_the_same_address():
    first = {**SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    assert recognise(first)[1] == recognise(SRUN)[1]


def test_the_address_of_a_job_script_wins():
    assert recognise({**SRUN, **MASTER})[1].address == ("node1", 29501)
    assert recognise({**SRUN, "MASTER_PORT": "29501", "MASTER_ADDR": ""})[1].address == ("n1", 29501)


@pytest.mark.parametrize(
    ("distribution", "hosts"),
    [
        ("block:cyclic", ("n1", "n1", "n1", "n2", "n3")),
        ("cyclic", ("n1", "n2", "n3", "n1", "n1")),  # srun's default with a task a node
        ("plane=2", ()),
        ("arbitrary", ()),
    ],
)
def test_hosts_of_ranks_are_expected_as_srun_deals_them_out(distribution, hosts):
    assert recognise({**SRUN, "SLURM_DISTRIBUTION": distribution})[1].expected_hosts == hosts


def test_srun_without_a_distribution_deals_out_in_blocks():
    variables = {name: value for name, value in SRUN.items() if name != "SLURM_DISTRIBUTION"}
    assert recognise(variables)[1].expected_hosts == ("n1", "n1", "n1", "n2", "n3")


def test_the_ways_out_of_lists_that_cannot_be_read_help():
    ranks, launch = recognise({**without(SRUN, "SLURM_STEP_NODELIST"), **MASTER})
    assert (launch.address, launch.expected_hosts) == (("node1", 29501), ())
    ranks, launch = recognise(without(SRUN, "SLURM_STEP_TASKS_PER_NODE"))
    assert (ranks.local_world_size, launch.expected_hosts) == (2, ())  # as if all nodes had as many


def test_ranks_on_one_machine_meet_at_the_usual_port():
    variables = {**MPICH, "PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1"}
    assert recognise(variables)[1].address == ("127.0.0.1", 29500)
    assert recognise({**variables, **MASTER})[1].address == ("node1", 29501)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (MPICH, r"mpiexec \(PMI\) started 4 processes on several nodes, but MASTER_ADDR and MASTER_PORT must be set.*"),
        ({**MPICH, "MASTER_ADDR": "n1"}, "but MASTER_PORT must be set.*: export MASTER_PORT=29500$"),
        ({**MPICH, **BATCH}, r"export MASTER_ADDR=\$\(scontrol show hostnames \"\$SLURM_JOB_NODELIST\" \| head -n1\) "),
        ({**OPEN_MPI, "MASTER_PORT": "29500"}, "but MASTER_ADDR must be set.*: export MASTER_ADDR=HOST_OF_RANK_0$"),
        (without(SRUN, "SLURM_STEP_NODELIST"), "srun started 5 processes on several nodes, but MASTER_ADDR and"),
        # Without a local world size, all may be on one node or none.
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "but MASTER_ADDR and MASTER_PORT must be set"),
        ({**TORCHRUN, "MASTER_PORT": "65536"}, "MASTER_PORT is 65536; a port is from 1 to 65535"),
        ({**SRUN, "SLURM_STEP_NODELIST": "n[1-"}, r"SLURM_STEP_NODELIST is 'n\[1-': .*; unset it and set MASTER_ADDR"),
        (
            {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,x"},
            r"SLURM_STEP_TASKS_PER_NODE is '3,x'; it must be like 2\(x3\),1; unset it",
        ),
    ],
)
def test_an_unknown_meeting_place_is_refused(variables, message):
    with pytest.raises(LaunchError, match=message):
        recognise(variables)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3,07],gpu-a", ["n1", "n2", "n3", "n07", "gpu-a"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("r[1-2]n[1,3]-ib,x.example.org", ["r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib", "x.example.org"]),
    ],
)
def test_lists_of_hosts(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "n[1-3", "n1]", "a,,b", "n[3-1]", "n[]", "n[a-b]", "n[1-999999999]", "n[[1]]"])
def test_what_is_no_list_of_hosts_is_refused(text):
    with pytest.raises(ValueError, match="must be host names|is no number or range"):
        expand_hosts(text)
