"""One holder of a folder at a time: who is refused, who takes over when, and who finds out that it has lost it."""

import dataclasses
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dcscale.lease import (
    LEASE,
    Lease,
    LeaseHeldError,
    LeaseLostError,
    LeaseTimes,
    describe_holder,
    process_state,
    this_process,
)

QUICK = LeaseTimes(renew=0.02, requeue=0.2, expire=0.4, poll=0.01)


class Clock:
    """Time that passes only in ``sleep``, in which ``events`` happen: seconds -> call."""

    def __init__(self, events=None):
        self.seconds, self.events = 1e6, dict(events or {})

    def __call__(self):
        return self.seconds

    def sleep(self, seconds):
        self.seconds += seconds
        for due in [due for due in self.events if 1e6 + due <= self.seconds]:
            self.events.pop(due)()


def holder(**changes):
    return dataclasses.replace(this_process("torchrun", {}), **changes)


def write_lease(folder, renewals=0, token="other", **changes):
    """The lease of a holder on another machine, or with ``changes``."""
    folder.mkdir(parents=True, exist_ok=True)
    other = holder(**{"host": "n7", "pid": 4711, "boot_id": "b", "since": "2026-11-26 12:00:00 UTC", **changes})
    content = {**dataclasses.asdict(other), "token": token, "renewals": renewals}
    (folder / LEASE).write_text(json.dumps(content))


def take(folder, clock=None, lines=None, **changes):
    """A lease of this process, and the seconds it has waited by its own clock."""
    clock = clock or Clock()
    lines = [] if lines is None else lines
    lease = Lease(folder, "stop it", holder(**changes), lines.append, clock=clock, sleep=clock.sleep)
    lease.acquire()
    return lease, clock.seconds - 1e6


def content_of(folder):
    return json.loads((folder / LEASE).read_text())


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_free_folder_is_taken_at_once_and_left_as_it_was(tmp_path):
    lines = []
    lease, waited = take(tmp_path / "runs" / "a", lines=lines)
    assert (waited, lines) == (0, [])
    assert content_of(tmp_path / "runs" / "a")["pid"] == os.getpid()
    assert os.listdir(tmp_path / "runs" / "a") == [LEASE]
    lease.check()
    lease.release()
    assert list(tmp_path.iterdir()) == []
    lease.release()  # again does no harm


@pytest.mark.parametrize("before", [True, False])
def test_folders_with_something_in_them_stay(tmp_path, before):
    run = tmp_path / "runs" / "a"
    if before:
        run.mkdir(parents=True)
    with Lease(run, "stop it"):
        if not before:
            (run / "config.yaml").touch()
    assert run.exists()


def test_an_empty_folder_is_removed_on_request(tmp_path):
    (tmp_path / "state").mkdir()
    Lease(tmp_path / "state", "stop it", remove_folder=True).__enter__().release()
    assert not (tmp_path / "state").exists()


def test_a_folder_that_cannot_be_created_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        take(tmp_path / "file" / "run")
    assert os.listdir(tmp_path) == ["file"]


def test_a_renewal_refuses_the_second_start_with_the_holder_and_the_way_out(tmp_path):
    write_lease(tmp_path, job="17")
    before = (tmp_path / LEASE).stat()
    clock, lines = Clock({15: lambda: write_lease(tmp_path, renewals=1, job="17")}), []
    with pytest.raises(LeaseHeldError) as refused:
        take(tmp_path, clock, lines)
    who = "process 4711 on n7 (job 17, torchrun), since 2026-11-26 12:00:00 UTC"
    assert str(refused.value) == f"{tmp_path} is in use by {who}; stop it"
    assert lines == [f"waiting    for {who}, which may still use {tmp_path}: 90 s at most"]
    assert clock.seconds - 1e6 <= 16
    assert os.listdir(tmp_path) == [LEASE]
    assert (tmp_path / LEASE).stat().st_ino == before.st_ino


ON_THIS_MACHINE = {"host": this_process().host, "boot_id": this_process().boot_id}
GONE = {"pid": 2**22 + 1}  # above the most that Linux gives


@pytest.mark.parametrize(
    ("other", "me", "seconds"),
    [
        ({}, {}, 90),
        # Its process id means nothing here.
        ({**GONE, "host": "n7"}, {}, 90),
        ({**GONE, **ON_THIS_MACHINE, "boot_id": "before the reboot"}, {}, 90),
        ({**GONE, **ON_THIS_MACHINE, "pid_namespace": "pid:[1]"}, {}, 90),
        # This very process, and one of another user.
        ({**ON_THIS_MACHINE, "pid": os.getpid()}, {}, 90),
        ({**ON_THIS_MACHINE, "pid": 1, "process_start": 0}, {}, 90),
        ({**ON_THIS_MACHINE, **GONE}, {}, 0),
        # The process id was given to another process since.
        ({**ON_THIS_MACHINE, "pid": os.getpid(), "process_start": this_process().process_start - 1}, {}, 0),
        ({"job": "17"}, {"job": "17", "restart_count": 1}, 40),
        ({"job": "17", "restart_count": 1}, {"job": "17", "restart_count": 1}, 90),
        ({"job": "17", "restart_count": 2}, {"job": "17", "restart_count": 1}, 90),
        ({"job": "17"}, {"job": "18", "restart_count": 1}, 90),
        ({"job": ""}, {"job": "", "restart_count": 1}, 90),
    ],
)
def test_seconds_until_an_unchanged_lease_is_taken_over(tmp_path, other, me, seconds):
    write_lease(tmp_path, **other)
    lines = []
    lease, waited = take(tmp_path, lines=lines, **me)
    assert waited == seconds
    assert content_of(tmp_path)["since"].startswith("20")
    assert len(lines) == (seconds > 0)
    assert content_of(tmp_path)["pid"] == os.getpid()
    lease.check()
    lease.release()


def test_a_zombie_is_gone(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write_lease(tmp_path, **ON_THIS_MACHINE, pid=process.pid, process_start=0)
    kill = lambda: (process.kill(), os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT))  # noqa: E731
    lease, waited = take(tmp_path, Clock({5: kill}))
    assert waited == 5
    lease.release()
    process.wait()


def test_a_process_of_which_only_the_first_thread_has_ended_is_not_gone(tmp_path):
    code = "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(60,)).start(); print(flush=True)"
    code += "; ctypes.CDLL(None).pthread_exit(None)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    wait_until(lambda: process_state(process.pid)[0] == "Z")
    write_lease(tmp_path, **ON_THIS_MACHINE, pid=process.pid, process_start=0)
    lease, waited = take(tmp_path, Clock({5: lambda: (process.kill(), process.wait())}))
    assert waited == 5
    lease.release()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"token": "a"}',
        b'{"token": 1, "pid": "2"}',
        json.dumps({**dataclasses.asdict(holder(host="\x1b[2J")), "token": "a"}).encode(),
        json.dumps({**dataclasses.asdict(holder(pid=True)), "token": "a"}).encode(),
        b" " * 10_000,
    ],
)
def test_a_damaged_lease_is_that_of_an_unknown_holder(tmp_path, content):
    (tmp_path / LEASE).write_bytes(content)
    lines = []
    lease, waited = take(tmp_path, lines=lines)
    assert waited == 90
    assert lines[0].startswith("waiting    for an unknown process (its lease is damaged), which may still use ")
    lease.release()


def test_a_holder_that_ends_makes_room(tmp_path):
    write_lease(tmp_path)
    lease, waited = take(tmp_path, Clock({3: (tmp_path / LEASE).unlink}))
    assert waited == 3
    lease.release()


def test_another_start_that_was_faster_is_named(tmp_path):
    write_lease(tmp_path)
    with pytest.raises(LeaseHeldError, match="in use by process 7 on n8 "):
        take(tmp_path, Clock({89: lambda: write_lease(tmp_path, token="third", host="n8", pid=7)}))


@pytest.mark.parametrize(("who", "seconds"), [(ON_THIS_MACHINE | GONE, 0), ({}, 90)])
def test_a_process_killed_while_it_takes_the_lease_blocks_nobody_for_ever(tmp_path, who, seconds):
    write_lease(tmp_path, **who)
    (tmp_path / LEASE).rename(tmp_path / f"{LEASE}.next")
    lease, waited = take(tmp_path)
    assert waited == seconds
    assert os.listdir(tmp_path) == [LEASE]
    lease.release()


def test_a_folder_that_another_process_removes_meanwhile_is_created_again(tmp_path):
    """As when a start ends that had created the folder and wrote nothing else into it."""
    run = tmp_path / "runs" / "a"
    lease = Lease(run, "stop it", sleep=lambda seconds: None)
    create = lease._create_folders
    left = [lambda: (create(), run.rmdir()), create]
    lease._create_folders = lambda: left.pop(0)()
    lease.acquire()
    lease.check()
    lease.release()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_lease_keeps_the_old_one(tmp_path):
    write_lease(tmp_path, **ON_THIS_MACHINE, **GONE)
    before = (tmp_path / LEASE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            take(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / LEASE).read_bytes() == before
    assert os.listdir(tmp_path) == [LEASE]


def test_a_full_disk_does_not_end_renewals(small_disk):
    with Lease(small_disk.folder, "", times=QUICK):
        small_disk.fill()
        seen = content_of(small_disk.folder)["renewals"]
        wait_until(lambda: content_of(small_disk.folder)["renewals"] > seen + 2)


def test_the_lease_is_renewed_with_the_same_size_until_it_is_released(tmp_path):
    with Lease(tmp_path, "stop it", times=QUICK):
        inode, size = (tmp_path / LEASE).stat().st_ino, (tmp_path / LEASE).stat().st_size
        wait_until(lambda: content_of(tmp_path)["renewals"] > 10)
        assert ((tmp_path / LEASE).stat().st_ino, (tmp_path / LEASE).stat().st_size) == (inode, size)
    wait_until(lambda: all(thread.name != "dcscale-lease" for thread in threading.enumerate()))


def test_a_holder_in_another_process_is_refused_in_one_renewal_and_taken_over_when_killed(tmp_path):
    code = "import sys, time; from pathlib import Path; from dcscale.lease import *\n"
    code += f"Lease(Path(sys.argv[1]), '', times={QUICK!r}).acquire(); print(); sys.stdout.flush(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(LeaseHeldError, match=f"in use by process {process.pid} on "):
        Lease(tmp_path, "", times=QUICK).acquire()
    process.kill()
    process.wait()
    start = time.monotonic()
    with Lease(tmp_path, ""):
        assert time.monotonic() - start < 5
    assert os.listdir(tmp_path) == []


def test_who_was_suspended_finds_out_and_does_not_touch_the_lease_of_its_successor(tmp_path):
    lines = []
    suspended = Lease(tmp_path, "", holder(), lines.append, times=dataclasses.replace(QUICK, renew=1e6))
    suspended.acquire()
    suspended.check()
    successor = Lease(tmp_path, "", holder(), lines.append, times=QUICK)
    successor.acquire()
    with pytest.raises(LeaseLostError, match=f"{tmp_path} was taken over by process {os.getpid()} on "):
        suspended.check()
    with pytest.raises(LeaseLostError):
        suspended._renew()
    wait_until(lambda: content_of(tmp_path)["renewals"] > 2)
    suspended.release()
    successor.check()
    successor.release()
    with pytest.raises(LeaseLostError, match=r"not held by this process any more: .*lease.json was removed"):
        suspended.check()


def test_renewals_in_the_middle_of_a_takeover_do_not_reach_the_new_lease(tmp_path):
    """The holder has checked that the lease is its own, and is suspended before it writes."""
    old = Lease(tmp_path, "", times=LeaseTimes(renew=1e6))
    old.acquire()
    old.check = lambda: write_lease(tmp_path / "new") or os.replace(tmp_path / "new" / LEASE, tmp_path / LEASE)
    old._renew()
    assert content_of(tmp_path)["token"] == "other"


def test_a_renewal_that_fails_is_reported_once_and_again_when_it_works(tmp_path):
    lines = []
    with Lease(tmp_path / "run", "", holder(), lines.append, times=QUICK):
        os.rename(tmp_path / "run" / LEASE, tmp_path / "kept")
        os.symlink(LEASE, tmp_path / "run" / LEASE)  # a link to itself cannot be opened
        wait_until(lambda: lines)
        time.sleep(5 * QUICK.renew)
        os.replace(tmp_path / "kept", tmp_path / "run" / LEASE)
        wait_until(lambda: len(lines) == 2)
    path = tmp_path / "run" / LEASE
    assert lines == [
        f"warning    {path} cannot be renewed: Too many levels of symbolic links",
        f"warning    {path} can be renewed again",
    ]


def test_a_lease_that_cannot_be_removed_is_reported(tmp_path):
    lines = []
    lease = Lease(tmp_path, "", holder(), lines.append)
    lease.acquire()
    (tmp_path / LEASE).unlink()
    os.symlink(LEASE, tmp_path / LEASE)
    lease.release()
    assert lines == [f"warning    {tmp_path / LEASE} could not be removed: Too many levels of symbolic links"]


def test_a_released_lease_is_not_taken_any_more(tmp_path):
    """As when a signal ends the process while another thread is about to take the lease."""
    lease = Lease(tmp_path / "run", "")
    lease.release()
    with pytest.raises(LeaseLostError, match="was released"):
        lease.acquire()
    assert list(tmp_path.iterdir()) == []


def contend(folder, barrier):
    """Whether this contender gets the lease; it keeps it until all know."""
    lease = Lease(folder, "", print_line=lambda line: None, times=dataclasses.replace(QUICK, expire=60))
    barrier.wait()
    try:
        lease.acquire()
        won = True
    except LeaseHeldError:
        won = False
    barrier.wait()
    if won:
        lease.check()
    barrier.wait()
    lease.release()
    return won


@pytest.mark.parametrize("found", ["free", "dead", "killed while it took the lease"])
def test_of_many_contending_threads_one_wins(tmp_path, found):
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        if found != "free":
            write_lease(folder, **ON_THIS_MACHINE, **GONE)
        if found.startswith("killed"):
            (folder / LEASE).rename(folder / f"{LEASE}.next")
        barrier = threading.Barrier(8, timeout=60)
        with ThreadPoolExecutor(8) as threads:
            assert sum(threads.map(contend, [folder] * 8, [barrier] * 8)) == 1
        assert not folder.exists() or os.listdir(folder) == []


def answer(folder, barrier, answers):
    answers.put(contend(folder, barrier))


def test_of_many_contending_processes_one_wins(tmp_path):
    context = multiprocessing.get_context("fork")
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        write_lease(folder, **ON_THIS_MACHINE, **GONE)
        barrier, answers = context.Barrier(6, timeout=60), context.SimpleQueue()
        processes = [context.Process(target=answer, args=(folder, barrier, answers)) for _ in range(6)]
        for process in processes:
            process.start()
        assert sum(answers.get() for _ in processes) == 1
        for process in processes:
            process.join()
        assert os.listdir(folder) == []


def test_slurm_variables_are_facts_of_the_holder():
    me = this_process("srun", {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "2"})
    assert (me.job, me.restart_count, me.launcher) == ("17", 2, "srun")
    assert str(me) == f"process {os.getpid()} on {me.host} (job 17, srun), since "
    alone = this_process("", {})
    assert (alone.job, alone.restart_count) == ("", 0)
    assert str(alone) == f"process {os.getpid()} on {me.host}, since "


def test_the_holder_can_be_asked_for(tmp_path):
    assert describe_holder(tmp_path) is None
    assert describe_holder(tmp_path / "missing" / "run") is None
    write_lease(tmp_path)
    who = "process 4711 on n7 (torchrun), since 2026-11-26 12:00:00 UTC"
    assert describe_holder(tmp_path) == f"{tmp_path} is held by {who}: a start is refused as long as that process runs"
    write_lease(tmp_path, **ON_THIS_MACHINE, **GONE)
    assert describe_holder(tmp_path).endswith(", which does not run any more: a start takes it over")
    (tmp_path / LEASE).unlink()
    (tmp_path / LEASE).mkdir()
    assert describe_holder(tmp_path) == f"{tmp_path / LEASE} cannot be read: Is a directory"
