"""Versions, memory, shared memory, limits, ports and names: what is planted is found."""

from __future__ import annotations

import importlib.metadata
import math
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from dcscale.config import Config, load_config
from dcscale.doctor.findings import Finding, Verdict
from dcscale.doctor.local.host import cgroup_memory, check_host, check_names, check_ports
from dcscale.doctor.local.subject import CommandError, Subject, run_command, spread, visible_gpus
from dcscale.doctor.local.versions import check_torch, check_versions, torch_cuda

GIB = 1 << 30


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def config(*overrides: str) -> Config:
    return load_config([], ["data.train=shards", *overrides]).config


# -- versions -------------------------------------------------------------------------------------------------------

INSTALLED = {"torch": "2.13.0+cpu", "deepspeed": "0.19.8", "omegaconf": "2.4.0"}
REQUIRED = ["torch>=2.11", "deepspeed>=0.19", "omegaconf>=2.4", 'flash-attn>=2.7; extra == "flash"']


def versions(tmp_path: Path, installed: dict[str, str], required: list[str] = REQUIRED) -> dict[str, Finding]:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(
        "# comment\ntorch==2.13.0\ndeepspeed==0.19.8\ngguf==0.19.0\n"
        'omegaconf==2.4.0; python_version >= "3.0"\nomegaconf==1.0.0; python_version < "3.0"\n'
    )
    return by_name(check_versions(Subject(node="n1"), installed.get, constraints, required))


def test_installed_versions_that_fit_are_good(tmp_path: Path) -> None:
    findings = versions(tmp_path, INSTALLED)
    assert findings["packages"].value == "torch 2.13.0+cpu, deepspeed 0.19.8, omegaconf 2.4.0"
    assert findings["tested versions"].value == "3 of 4 packages are installed, as tested"
    assert {findings[name].verdict for name in ("python", "packages", "tested versions")} == {Verdict.GOOD}


def test_packages_that_are_too_old_or_missing_are_bad(tmp_path: Path) -> None:
    installed = {"torch": "2.9.1", "omegaconf": "2.4.0", "flash-attn": "2.6.3"}
    finding = versions(tmp_path, installed)["packages"]
    assert (finding.verdict, finding.node) == (Verdict.BAD, "n1")
    assert finding.value == (
        "torch is 2.9.1, at least 2.11 is needed; deepspeed is missing, at least 0.19 is needed; "
        "flash-attn is 2.6.3, at least 2.7 is needed"
    )
    assert "launch/install.sh" in finding.way_out


def test_a_version_that_was_never_tested_is_unknown_and_named(tmp_path: Path) -> None:
    findings = versions(tmp_path, {**INSTALLED, "torch": "2.14.0"})
    assert findings["packages"].verdict is Verdict.GOOD
    finding = findings["tested versions"]
    assert (finding.verdict, finding.value) == (Verdict.UNKNOWN, "never tested: torch 2.14.0, not 2.13.0")


def test_without_the_file_of_constraints_it_is_unknown_what_was_tested(tmp_path: Path) -> None:
    findings = by_name(check_versions(Subject(), INSTALLED.get, tmp_path / "none.txt", REQUIRED))
    assert findings["tested versions"].verdict is Verdict.UNKNOWN


def test_this_environment_is_the_tested_one() -> None:
    findings = by_name(check_versions(Subject()))
    assert {findings[name].verdict for name in ("python", "packages", "tested versions")} == {Verdict.GOOD}


def test_torchs_cuda_is_found_without_importing_torch() -> None:
    import torch

    expected = None if torch.version.cuda is None else ".".join(torch.version.cuda.split(".")[:2])
    assert torch_cuda() == expected


def test_torchs_cuda_is_that_of_its_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in (("build_a", "cuda: Optional[str] = '13.0'"), ("build_b", 'cuda: str | None = "12.8"')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not to be imported')")
        (tmp_path / name / "version.py").write_text(f"__version__ = '2.13.0'\n{text}\nhip = None\n")
    assert (torch_cuda("build_a"), torch_cuda("build_b"), torch_cuda("build_c")) == ("13.0", "12.8", None)
    (tmp_path / "build_a" / "version.py").unlink()
    assert torch_cuda("build_a") is None


def test_a_package_that_is_only_found_by_its_path_leaves_versions_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    for name in ("metadata", "requires", "version"):
        monkeypatch.setattr(importlib.metadata, name, missing)
    findings = by_name(check_versions(Subject()))
    assert findings["python"].verdict is findings["packages"].verdict is Verdict.UNKNOWN


def test_a_python_that_is_too_old_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.9.18")
    finding = next(iter(check_versions(Subject())))
    assert (finding.verdict, finding.value, finding.rule) == (Verdict.BAD, "3.9.18", "at least 3.10")


def test_torch_that_sees_fewer_gpus_than_there_are_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 6)
    monkeypatch.setattr("dcscale.doctor.local.versions.visible_gpus", lambda variables: 8)
    (finding,) = check_torch(Subject())
    assert finding.verdict is Verdict.BAD
    assert "sees 6 GPUs of 8" in finding.value


def test_torch_that_cannot_be_imported_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (finding,) = check_torch(Subject())
    assert finding.verdict is Verdict.BAD
    assert finding.value.startswith("cannot be imported: ModuleNotFoundError")


def test_gpus_are_counted_without_the_driver(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == 3
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,2"}, tmp_path) == 2
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0


def test_ranks_are_those_of_the_launcher_or_one_for_each_gpu() -> None:
    assert spread({}) == (1, 1, 1)
    assert spread({}, gpus=8) == (8, 8, 1)
    task = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2"}
    variables = {**task, "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7"}
    assert spread(variables) == (2, 1, 2)
    assert spread(variables, gpus=8) == (16, 8, 2)  # the doctor runs as one task a node


# -- memory and limits ----------------------------------------------------------------------------------------------


def host(tmp_path: Path, subject: Subject, *, available: int = 900, swapped: int = 0, **options) -> dict[str, Finding]:
    """Findings about a machine of 1000 GiB with so many GiB available and swapped out."""
    (tmp_path / "proc/sys/kernel").mkdir(parents=True, exist_ok=True)
    lines = {"MemTotal": 1000, "MemAvailable": available, "SwapTotal": 200, "SwapFree": 200 - swapped}
    (tmp_path / "proc/meminfo").write_text(
        "".join(f"{name}: {value * GIB // 1024} kB\n" for name, value in lines.items())
    )
    options = {"limit": limits({}), "shm_free": lambda: (500 * GIB, 500 * GIB), **options}
    return by_name(check_host(subject, tmp_path, **options))


def limits(soft: dict[int, int]):
    """Limits of processes: those that are not named are unlimited."""
    return lambda number: (soft.get(number, resource.RLIM_INFINITY), resource.RLIM_INFINITY)


def large(**changes) -> Subject:
    """The subject of a run of a model of 7 billion parameters on 16 ranks of two nodes."""
    settings = changes.pop("config", config())
    return Subject(config=settings, ranks=16, local_ranks=8, nodes=2, count=lambda model: 7_000_000_000, **changes)


def test_a_large_machine_is_good(tmp_path: Path) -> None:
    findings = host(tmp_path, large())
    assert {finding.verdict for finding in findings.values()} == {Verdict.GOOD}
    assert findings["host memory"].rule == (
        "at least 76.1 GiB: 4 GiB for each of 8 ranks, 39.1 GiB for optimizer states, 5 GiB to write weights"
    )


def test_too_little_memory_is_bad_and_offloading_needs_more(tmp_path: Path) -> None:
    assert host(tmp_path, large(), available=70)["host memory"].verdict is Verdict.BAD
    assert host(tmp_path, large(), available=90)["host memory"].verdict is Verdict.GOOD
    offloading = large(config=config("parallel.offload_optimizer=true"))
    assert host(tmp_path, offloading, available=90)["host memory"].verdict is Verdict.BAD


@pytest.mark.parametrize(
    ("group", "folder", "names"),
    [
        ("0::/job_7/step_0", "sys/fs/cgroup/job_7", ("memory.max", "memory.current")),
        ("9:cpu,memory:/job", "sys/fs/cgroup/memory/job", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ],
)
def test_the_limit_of_a_container_or_job_counts(
    tmp_path: Path, group: str, folder: str, names: tuple[str, str]
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{group}\n3:pids:/\n")
    (tmp_path / folder).mkdir(parents=True)
    for name, value in zip(names, (64 * GIB, 4 * GIB)):
        (tmp_path / folder / name).write_text(f"{value}\n")
    # Files that the kernel only keeps are no use of memory.
    assert cgroup_memory(tmp_path) == (64 * GIB, 4 * GIB)
    (tmp_path / folder / names[1]).write_text(f"{24 * GIB}\n")
    (tmp_path / folder / "memory.stat").write_text(f"anon 5\ninactive_file {15 * GIB}\nactive_file {5 * GIB}\n")
    assert cgroup_memory(tmp_path) == (64 * GIB, 4 * GIB)
    finding = host(tmp_path, large())["host memory"]
    assert (finding.verdict, finding.value) == (Verdict.BAD, "60 GiB available of 64 GiB of this container or job")
    (tmp_path / folder / names[0]).write_text("max\n")
    assert cgroup_memory(tmp_path) is None


def test_memory_that_is_swapped_out_is_bad(tmp_path: Path) -> None:
    assert host(tmp_path, large(), swapped=60)["swap"].verdict is Verdict.BAD


def test_memory_that_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: none\n")
    findings = by_name(check_host(large(), tmp_path, limits({}), lambda: (GIB, GIB)))
    assert findings["host memory"].verdict is Verdict.UNKNOWN


def test_shared_memory_is_compared_with_what_workers_allocate(tmp_path: Path) -> None:
    docker = {"shm_free": lambda: (64 << 20, 64 << 20)}  # its default
    assert host(tmp_path, Subject(config=config()), **docker)["/dev/shm"].verdict is Verdict.GOOD
    finding = host(tmp_path, Subject(config=config("data.workers=8")), **docker)["/dev/shm"]
    assert (finding.verdict, finding.value) == (Verdict.BAD, "64 MiB free of 64 MiB")
    assert "data workers of each rank (data.workers = 8)" in finding.rule
    assert "--shm-size" in finding.way_out
    assert host(tmp_path, large(), **docker)["/dev/shm"].verdict is Verdict.BAD  # NCCL, with 8 ranks


def test_shared_memory_of_workers_is_what_they_take(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from dcscale.data import DataError, StreamConfig, open_stream
    from dcscale.data.stream.workers import WorkerSequences, shared_bytes

    def full(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        taken.append(math.prod(shape) * dtype.itemsize)
        raise RuntimeError("no space")

    settings = config("data.sequence_length=32", "model.vocab_size=257", "data.shuffle_shards=2", "data.slots=4")
    stream = open_stream(shards / "train", StreamConfig.from_config(settings))
    taken: list[int] = []
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(DataError, match="shared memory"):
        WorkerSequences(stream, [range(4)] * 9, workers=2, prefetch_steps=3)
    assert taken == [shared_bytes(4, 32, 2, 3, document_mask=True)]


def test_without_shared_memory_it_is_bad(tmp_path: Path) -> None:
    def missing() -> tuple[int, int]:
        raise FileNotFoundError(2, "No such file or directory")

    finding = host(tmp_path, large(), shm_free=missing)["/dev/shm"]
    assert (finding.verdict, finding.value) == (Verdict.BAD, "cannot be used: No such file or directory")


def test_few_open_files_are_bad_for_many_ranks_only(tmp_path: Path) -> None:
    limit = limits({resource.RLIMIT_NOFILE: 1024})
    assert host(tmp_path, large(), limit=limit)["open files"].verdict is Verdict.GOOD
    many = Subject(config=config("data.workers=4"), ranks=1024, local_ranks=8, nodes=128)
    finding = host(tmp_path, many, limit=limit)["open files"]
    assert (finding.verdict, finding.value) == (Verdict.BAD, "1,024")
    assert finding.rule.startswith("ulimit -n of at least 8,528")
    assert finding.way_out == "ulimit -n 65536 before the start"


def test_a_hard_limit_of_open_files_must_be_raised_by_the_system(tmp_path: Path) -> None:
    finding = host(tmp_path, large(), limit=lambda number: (256, 256))["open files"]
    assert finding.verdict is Verdict.BAD
    assert "LimitNOFILE" in finding.way_out


def test_the_limits_of_this_process_are_read() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
        "from dcscale.doctor.local.host import check_host; from dcscale.doctor.local.subject import Subject\n"
        "print(next(f for f in check_host(Subject()) if f.check == 'open files').verdict)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "bad\n"


def test_few_processes_and_limits_that_end_a_run_are_bad(tmp_path: Path) -> None:
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/pids.max").write_text("100\n")
    (tmp_path / "dev/infiniband").mkdir(parents=True)
    planted = {resource.RLIMIT_CPU: 3600, resource.RLIMIT_MEMLOCK: 65536}
    findings = host(tmp_path, large(), limit=limits(planted))
    assert (findings["processes"].verdict, findings["processes"].value) == (Verdict.BAD, "pids.max 100")
    assert findings["other limits"].value == (
        "processor time is limited to 3,600 (ulimit -t); locked memory is limited to 64 KiB (ulimit -l)"
    )


# -- ports ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def taken_port() -> Iterator[tuple[int, int]]:
    """A port at which another process listens, and its id."""
    code = "import socket, sys; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield int(process.stdout.readline()), process.pid
        process.communicate("\n")


def test_a_port_that_is_taken_is_bad_and_its_holder_named(taken_port: tuple[int, int]) -> None:
    port, pid = taken_port
    (finding,) = check_ports(Subject(node="n1", variables={"MASTER_PORT": str(port)}))
    assert (finding.verdict, finding.node) == (Verdict.BAD, "n1")
    assert finding.value.startswith(f"{port} cannot be used: address already in use, held by process {pid} (python")
    assert "--master-port" in finding.way_out


def test_a_free_port_and_one_of_this_process_are_good() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        (mine,) = check_ports(Subject(variables={"MASTER_PORT": port}))
        assert (mine.verdict, mine.value) == (Verdict.GOOD, f"{port} is of this job")
    (free,) = check_ports(Subject(variables={"MASTER_PORT": port}))
    assert (free.verdict, free.value) == (Verdict.GOOD, f"{port} is free")


def test_a_port_that_the_launcher_serves_is_good() -> None:
    launcher = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "0", "WORLD_SIZE": "2"}
    variables = {**launcher, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "29400"}
    (finding,) = check_ports(Subject(node="n1", variables=variables))
    assert (finding.verdict, finding.value) == (Verdict.GOOD, "served by torchrun, which started this")


def test_without_a_launcher_the_usual_port_is_checked() -> None:
    (finding,) = check_ports(Subject(variables={}))
    assert finding.value.startswith("29500 ")


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_a_port_that_is_none_is_bad(port: str) -> None:
    (finding,) = check_ports(Subject(variables={"MASTER_PORT": port}))
    assert (finding.verdict, finding.value) == (Verdict.BAD, f"MASTER_PORT is '{port}'")


def test_variables_that_are_inconsistent_are_bad() -> None:
    (finding,) = check_ports(Subject(variables={"RANK": "3"}))
    assert finding.verdict is Verdict.BAD
    assert "WORLD_SIZE" in finding.value


def test_a_port_of_another_host_is_unknown() -> None:
    (finding,) = check_ports(Subject(variables={"MASTER_ADDR": "n7", "MASTER_PORT": "29500"}))
    assert finding.verdict is Verdict.UNKNOWN
    assert finding.value.startswith("n7:29500")


def test_the_port_of_a_slurm_step_is_checked_on_its_first_host(taken_port: tuple[int, int]) -> None:
    task = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2"}
    step = {**task, "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]"}
    findings = by_name(check_ports(Subject(node="n1", variables=step)))
    assert set(findings) == {"SLURM ports", "port"}
    assert set(by_name(check_ports(Subject(node="n2", variables=step)))) == {"SLURM ports"}
    findings = by_name(check_ports(Subject(node="n1", variables={**step, "MASTER_PORT": str(taken_port[0])})))
    assert findings["port"].verdict is Verdict.BAD


def test_outgoing_connections_from_the_ports_of_slurm_steps_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, verdict in (("32768\t60999\n", Verdict.GOOD), ("15000\t60999\n", Verdict.BAD), ("x", Verdict.UNKNOWN)):
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        (finding,) = check_ports(Subject(variables={"SLURM_JOB_ID": "7"}))
        assert (finding.check, finding.verdict) == ("SLURM ports", verdict)


# -- names ----------------------------------------------------------------------------------------------------------


def names(addresses: dict[str, list[str]], nodes: int, **variables: str) -> dict[str, Finding]:
    def resolve(name: str) -> list[str]:
        if name not in addresses:
            raise socket.gaierror(-2, "Name or service not known")
        return addresses[name]

    return by_name(check_names(Subject(node="n1", nodes=nodes, variables=variables), resolve))


def test_names_of_all_hosts_of_the_job_are_looked_up() -> None:
    known = {"n1": ["10.77.0.1"], "n2": ["10.77.0.2"]}
    findings = names(known, 3, SLURM_JOB_NODELIST="n[1-3]", MASTER_ADDR="n1")
    assert findings["own name"].verdict is Verdict.GOOD
    assert findings["names of hosts"].verdict is Verdict.BAD
    assert findings["names of hosts"].value == "n3: Name or service not known"


def test_a_name_that_leads_back_to_this_host_is_bad_with_several_nodes_only() -> None:
    assert names({"n1": ["127.0.1.1"]}, 1)["own name"].verdict is Verdict.GOOD
    finding = names({"n1": ["127.0.1.1"]}, 2)["own name"]
    assert (finding.verdict, finding.value) == (Verdict.BAD, "n1 is 127.0.1.1")
    assert "GLOO_SOCKET_IFNAME" in finding.way_out


def test_a_host_without_a_name_and_a_list_that_is_none_are_bad() -> None:
    findings = names({}, 1, SLURM_JOB_NODELIST="n[1-")
    assert findings["own name"].verdict is Verdict.BAD
    assert findings["names of hosts"].verdict is Verdict.BAD
    assert "n[1-" in findings["names of hosts"].value


def test_a_resolver_that_hangs_is_not_waited_for() -> None:
    released = threading.Event()
    subject = Subject(node="n1", variables={"MASTER_ADDR": "n2"})
    answers = {"n1": lambda: ["10.0.0.1"], "n2": lambda: released.wait() and []}
    try:
        findings = by_name(check_names(subject, lambda name: answers[name](), seconds=0.1))
    finally:
        released.set()
    assert findings["own name"].verdict is Verdict.GOOD
    assert findings["names of hosts"].value == "n2: no answer in 0.1 s"


# -- commands -------------------------------------------------------------------------------------------------------


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    stub = tmp_path / "nvidia-smi"
    stub.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path}/child\nwait\n")
    stub.chmod(0o755)
    with pytest.raises(CommandError, match="nvidia-smi gave no answer in 0.3 s"):
        run_command("nvidia-smi", seconds=0.3, variables={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    child = int((tmp_path / "child").read_text())
    status = Path(f"/proc/{child}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_commands_that_are_missing_or_fail_say_so() -> None:
    with pytest.raises(CommandError, match="no-such-tool is not installed") as error:
        run_command("no-such-tool", seconds=5)
    assert error.value.missing
    with pytest.raises(CommandError, match="sh failed with exit code 9: driver lost"):
        run_command("sh", "-c", "echo; echo driver lost >&2; exit 9", seconds=5)
    with pytest.raises(CommandError, match="cannot be started: Permission denied"):
        run_command("/", seconds=5)
