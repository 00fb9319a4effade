"""Disk, shards, and leftovers of a run: what is planted is found."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from dcscale.config import Config
from dcscale.data.prepare.index import index_tars
from dcscale.doctor.findings import Finding, Verdict
from dcscale.doctor.local import Check, Subject, run_checks
from dcscale.doctor.local.disk import check_disk, checkpoints_to_come, mount_of
from dcscale.doctor.local.run import (
    check_leftovers,
    check_shards,
    check_start,
    held_gpus,
    listeners,
    listening_ports,
    training_processes,
)
from dcscale.lease import LEASE, Lease, this_process
from dcscale.testing.runs import tiny_config
from dcscale.testing.shard_server import ShardServer


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


@pytest.fixture
def settings(tmp_path: Path, shards: Path) -> Config:
    return tiny_config(tmp_path / "run", shards, "checkpoint.interval=2")


def subject(config: Config, parameters: int = 10_000, **changes) -> Subject:
    return Subject(config=config, count=lambda model: parameters, node="n1", **changes)


# -- disk -----------------------------------------------------------------------------------------------------------


def test_a_disk_with_room_is_good_and_left_as_it_was(settings: Config, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    findings = by_name(check_disk(subject(settings)))
    assert {finding.verdict for finding in findings.values()} == {Verdict.GOOD}
    assert set(findings) >= {"file system", "disk space", "renames", "disk sync", "clock of the disk", "write speed"}
    assert set(tmp_path.rglob("*")) == before


def test_the_quick_part_measures_no_speed(settings: Config) -> None:
    assert "write speed" not in by_name(check_disk(subject(settings, quick=True)))


def test_a_full_disk_is_bad(small_disk, shards: Path) -> None:
    config = tiny_config(small_disk.folder / "run", shards)
    small_disk.fill()
    findings = by_name(check_disk(subject(config)))
    space = findings["disk space"]
    assert (space.verdict, space.node, space.value) == (Verdict.BAD, "n1", "0 bytes free of 256 KiB")
    assert "run.folder" in space.way_out
    assert findings["disk write"].value.endswith(": No space left on device")
    assert "renames" not in findings  # nothing is known of them
    small_disk.make_room()
    assert by_name(check_disk(subject(config, quick=True)))["disk space"].verdict is Verdict.GOOD


def test_room_is_needed_for_all_checkpoints_that_are_kept(small_disk, shards: Path) -> None:
    config = tiny_config(small_disk.folder / "run", shards, "checkpoint.interval=2", "checkpoint.keep_last=2")
    finding = by_name(check_disk(subject(config, 5_000, quick=True)))["disk space"]
    assert finding.rule == "at least 234 KiB: room for 3 more checkpoints of 78.1 KiB"
    assert finding.verdict is Verdict.GOOD
    assert by_name(check_disk(subject(config, 6_000, quick=True)))["disk space"].verdict is Verdict.BAD


@pytest.mark.parametrize(
    ("overrides", "there", "more"),
    [
        (["checkpoint.interval=10", "checkpoint.keep_last=3"], 0, 4),
        (["checkpoint.interval=10", "checkpoint.keep_last=3"], 3, 1),
        (["checkpoint.interval=10", "checkpoint.keep_last=3"], 9, 1),
        (["checkpoint.interval=10", "checkpoint.keep_last=null"], 2, 8),
        (["checkpoint.interval=10", "checkpoint.keep_last=1", "checkpoint.keep_every=50"], 0, 4),
        (["checkpoint.interval=0"], 0, 1),
    ],
)
def test_checkpoints_that_a_run_will_add(tmp_path: Path, overrides: list[str], there: int, more: int) -> None:
    assert checkpoints_to_come(tiny_config(tmp_path, tmp_path, "train.steps=100", *overrides), there) == more


def test_a_model_that_cannot_be_counted_leaves_the_space_unknown(settings: Config) -> None:
    def missing(model) -> int:
        raise ModuleNotFoundError("torch")

    findings = by_name(check_disk(Subject(config=settings, count=missing)))
    assert findings["disk space"].verdict is findings["write speed"].verdict is Verdict.UNKNOWN


def test_a_disk_too_slow_for_checkpoints_is_bad(settings: Config) -> None:
    finding = by_name(check_disk(subject(settings, 10**15)))["write speed"]
    assert finding.verdict is Verdict.BAD
    assert "parallel.pause_timeout_minutes" in finding.rule


def test_a_clock_that_differs_from_the_disk_is_bad(settings: Config) -> None:
    findings = by_name(check_disk(subject(settings, quick=True), now=lambda: time.time() + 90))
    assert findings["clock of the disk"].verdict is Verdict.BAD
    assert findings["clock of the disk"].value.startswith("the disk's clock is -")


def test_a_folder_that_cannot_be_written_to_is_bad(shards: Path) -> None:
    findings = by_name(check_disk(subject(tiny_config(Path("/proc/run"), shards))))
    assert findings["disk write"].verdict is Verdict.BAD


def test_a_folder_that_cannot_be_looked_at_is_bad(tmp_path: Path, shards: Path) -> None:
    looked_at = subject(tiny_config(tmp_path / ("long" * 100), shards))
    (finding,) = check_disk(looked_at)
    assert (finding.check, finding.verdict) == ("disk write", Verdict.BAD)
    assert finding.value.endswith("long: File name too long")
    assert [finding.check for finding in check_leftovers(looked_at, list)] == ["other training"]


MOUNTS = r"""21 28 0:19 / /proc rw,relatime - proc proc rw
28 1 259:1 / / rw,relatime - ext4 /dev/root rw
60 28 0:52 / /shared rw,relatime shared:30 - nfs4 server:/export rw,vers=4.2
61 28 0:53 / /my\040disk rw - lustre 10.0.0.1@o2ib:/scratch rw
62 28 0:54 / /bucket rw - fuse.s3fs s3fs rw
63 28 0:55 / /merged rw - fuse.mergerfs a:b rw
64 60 0:56 / /shared/tmp rw - tmpfs tmpfs rw
malformed line
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/shared/run", "nfs4"), ("/my disk/run", "lustre"), ("/shared/tmp/x", "tmpfs"), ("/sharedx", "ext4")],
)
def test_the_file_system_of_a_folder_is_found(folder: str, kind: str) -> None:
    assert mount_of(Path(folder), MOUNTS).kind == kind


@pytest.mark.parametrize(
    ("kind", "nodes", "verdict"),
    [
        ("ext4 /dev/root", 1, Verdict.GOOD),
        ("ext4 /dev/root", 2, Verdict.BAD),
        ("nfs4 server:/export", 2, Verdict.GOOD),
        ("fuse.s3fs s3fs", 1, Verdict.BAD),
        ("fuse gcsfuse", 1, Verdict.BAD),
        ("fuse.mergerfs a:b", 2, Verdict.UNKNOWN),
        ("tmpfs tmpfs", 1, Verdict.GOOD),
    ],
)
def test_what_kinds_of_file_systems_mean(
    settings: Config, tmp_path: Path, kind: str, nodes: int, verdict: Verdict
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"28 1 259:1 / / rw,relatime - {kind} rw\n")
    finding = by_name(check_disk(subject(settings, quick=True, nodes=nodes), mountinfo=mounts))["file system"]
    assert finding.verdict is verdict


def test_nodes_that_are_checked_together_find_out_themselves_what_they_share(settings: Config, tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text("28 1 259:1 / / rw,relatime - ext4 /dev/root rw\n")
    asked = subject(settings, quick=True, nodes=2, together=True)
    assert by_name(check_disk(asked, mountinfo=mounts))["file system"].verdict is Verdict.GOOD


def test_a_file_system_that_is_not_found_is_unknown(settings: Config, tmp_path: Path) -> None:
    for mounts in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").write_text("")
        finding = by_name(check_disk(subject(settings, quick=True), mountinfo=mounts))["file system"]
        assert finding.verdict is Verdict.UNKNOWN


@pytest.mark.parametrize("fault", ["replaces nothing", "fails"])
def test_a_disk_without_atomic_renames_is_bad(settings: Config, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def replace(source: Path, target: Path) -> None:
        if fault == "fails":
            raise OSError(95, "Operation not supported", str(source))
        shutil.copy(source, target)

    monkeypatch.setattr(os, "replace", replace)
    finding = next(finding for finding in check_disk(subject(settings, quick=True)) if finding.check == "renames")
    assert finding.verdict is Verdict.BAD
    assert finding.value == ("Operation not supported (new)" if fault == "fails" else "a rename did not replace a file")


def test_a_disk_that_creates_a_file_twice_is_bad(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r", **options: opened(path, mode.replace("x", "w"), **options))
    finding = next(finding for finding in check_disk(subject(settings, quick=True)) if finding.check == "renames")
    assert (finding.verdict, finding.value) == (Verdict.BAD, "a file that exists was created again")


# -- shards ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_shards(tmp_path: Path, shards: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "own"))


def test_intact_shards_are_good(settings: Config) -> None:
    findings = list(check_shards(subject(settings)))
    assert [finding.verdict for finding in findings] == [Verdict.GOOD] * 4
    assert findings[1].value.endswith(" intact")
    assert findings[2].value.startswith("data.validation: ")


@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_corrupt_shard_is_bad(tmp_path: Path, own_shards: Path, number: int) -> None:
    shard = sorted((own_shards / "train").glob("*.tar"))[number]
    content = bytearray(shard.read_bytes())
    content[700] ^= 1  # of the same size: only the checksum tells
    shard.write_bytes(content)
    findings = list(check_shards(subject(tiny_config(tmp_path / "run", own_shards))))
    (bad,) = [finding for finding in findings if finding.verdict is Verdict.BAD]
    assert (bad.check, bad.node) == ("verified shards", "n1")
    assert bad.value.startswith(f"data.train: {shard}: its SHA-256 is ")
    assert bad.way_out


def test_at_least_one_shard_is_verified_whatever_the_time(settings: Config) -> None:
    findings = list(check_shards(subject(settings), seconds=0))
    assert ": 1 of " in findings[1].value


def test_missing_shards_and_folders_are_bad(tmp_path: Path, own_shards: Path) -> None:
    sorted((own_shards / "train").glob("*.tar"))[-1].unlink()
    config = tiny_config(tmp_path / "run", own_shards, f"data.validation={tmp_path / 'none'}")
    train, validation = check_shards(subject(config))
    assert train.verdict is validation.verdict is Verdict.BAD
    assert "it cannot be read: No such file or directory" in train.value
    assert validation.value == f"data.validation: {tmp_path / 'none'}: no such folder"


def test_all_sources_of_a_mixture_are_verified(tmp_path: Path, own_shards: Path) -> None:
    sources = [{"name": name, "path": str(own_shards / name)} for name in ("train", "validation")]
    config = tiny_config(
        tmp_path / "run",
        own_shards,
        "data.train=''",
        f"data.sources={json.dumps(sources)}",
        "data.validation=null",
        "validation.interval=0",
    )
    findings = list(check_shards(subject(config)))
    assert [finding.verdict for finding in findings] == [Verdict.GOOD] * 4
    assert all(finding.value.startswith("data.sources: ") for finding in findings)


def test_shards_of_text_are_verified_by_their_checksum(tmp_path: Path, own_shards: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(3):
            member = tarfile.TarInfo(f"{number}.txt")
            member.size = 40
            tar.addfile(member, io.BytesIO(b"a text of forty bytes, all of it ASCII. "))
    assert not index_tars(folder, [folder / "a.tar"], tokenizer="byte").defects
    config = tiny_config(tmp_path / "run", own_shards, f"data.train={folder}", "validation.interval=0")
    assert [finding.verdict for finding in check_shards(subject(config))] == [Verdict.GOOD] * 2
    content = (folder / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(content.replace(b"forty", b"fifty"))
    assert [finding.verdict for finding in check_shards(subject(config))] == [Verdict.GOOD, Verdict.BAD]


def test_a_server_is_asked_without_filling_the_cache(tmp_path: Path, own_shards: Path) -> None:
    with ShardServer(own_shards) as server:
        address = server.address
        options = [f"data.train={address}/train", f"data.cache={tmp_path / 'cache'}", "data.retry_backoff_seconds=0.01"]
        config = tiny_config(tmp_path / "run", own_shards, *options)
        findings = list(check_shards(subject(config)))
    assert {finding.verdict for finding in findings} == {Verdict.GOOD}
    assert not (tmp_path / "cache").exists()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, retry_total_seconds=0.1))
    unreachable, *_ = check_shards(subject(config))
    assert (unreachable.verdict, unreachable.check) == (Verdict.BAD, "shards")
    assert address in unreachable.value


def test_what_a_start_would_refuse_is_said_once(settings: Config) -> None:
    shards = Subject(node="n1").bad("shards", "data.train: x: no such folder", "rule", "give a folder")
    reasons = ["data.train: x: no such folder; give a folder", "metrics.jsonl is damaged; use another folder"]
    asked = subject(settings, preflight=lambda config, ranks: (reasons, 0))
    checks = [
        Check("data", ("shards",), "", "", lambda subject: [shards], 5),
        Check("start", ("start",), "", "", check_start, 5),
    ]
    found, _ = run_checks(asked, checks)
    assert [(finding.check, finding.value) for finding in found] == [
        ("shards", "data.train: x: no such folder"),
        ("start", "metrics.jsonl is damaged"),
    ]


def test_a_start_that_would_be_accepted_is_good(settings: Config) -> None:
    asked = subject(settings, ranks=4, preflight=lambda config, ranks: ([], 2))
    (finding,) = check_start(asked)
    assert finding.value == "a start on 4 ranks would be accepted; tools/check_config.py shows 2 warnings"
    assert list(check_start(Subject())) == []


# -- leftovers ------------------------------------------------------------------------------------------------------


def leftovers(config: Config) -> dict[str, Finding]:
    return by_name(check_leftovers(subject(config), list))


def test_nothing_is_left_in_a_new_folder(settings: Config) -> None:
    assert set(leftovers(settings)) == {"other training"}
    Path(settings.run.folder).mkdir()
    assert {finding.verdict for finding in leftovers(settings).values()} == {Verdict.GOOD}


def test_a_lease_that_is_renewed_is_bad_and_its_holder_named(settings: Config) -> None:
    run = Path(settings.run.folder)
    with Lease(run, "wait"):
        finding = leftovers(settings)["lease"]
    assert (finding.verdict, finding.node) == (Verdict.BAD, "n1")
    assert f"is held by process {os.getpid()} on " in finding.value


def test_the_lease_of_a_process_that_is_gone_is_good(settings: Config) -> None:
    run = Path(settings.run.folder)
    code = (
        "import os; from pathlib import Path; from dcscale.lease import Lease\n"
        f"Lease(Path({str(run)!r}), '').acquire(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    finding = leftovers(settings)["lease"]
    assert finding.verdict is Verdict.GOOD
    assert finding.value.endswith("which does not run any more: a start takes it over")


def test_a_lease_of_another_machine_that_is_not_renewed_expires(settings: Config) -> None:
    run = Path(settings.run.folder)
    run.mkdir()
    holder = dataclasses.asdict(dataclasses.replace(this_process(), host="n7", since="2026-11-26"))
    (run / LEASE).write_text(json.dumps({**holder, "token": "t", "renewals": 3}))
    assert leftovers(settings)["lease"].verdict is Verdict.BAD
    os.utime(run / LEASE, (time.time() - 600,) * 2)
    finding = leftovers(settings)["lease"]
    assert finding.verdict is Verdict.GOOD
    assert "was not renewed for 6" in finding.value
    (run / LEASE).write_text("{}")
    assert "an unknown process (its lease is damaged)" in leftovers(settings)["lease"].value


def test_unfinished_checkpoints_are_listed_with_their_size(settings: Config) -> None:
    folder = Path(settings.run.folder) / "checkpoints" / ".unfinished-step-00000004-ab"
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(bytes(2048))
    (folder / "gone").symlink_to("nowhere")  # as a file that is removed at this moment
    finding = leftovers(settings)["unfinished checkpoints"]
    assert (finding.verdict, finding.value) == (Verdict.GOOD, f"1, 2 KiB: {folder.name}")


@pytest.mark.parametrize(
    ("ending", "verdict", "value"),
    [
        ({"format": 1, "code": 0, "reason": "done", "step": 8}, Verdict.GOOD, "exit code 0: done, step 8"),
        (
            {"format": 1, "code": 76, "reason": "lost rank", "rank": 1, "host": "n2", "error": "a\nb\nc"},
            Verdict.BAD,
            "exit code 76: lost rank, rank 1, host n2, a ... c",
        ),
        ({"format": 2, "code": 0}, Verdict.UNKNOWN, "has format 2, this version reads 1"),
        ({"format": 1, "code": 9}, Verdict.UNKNOWN, "has code 9, this version knows 0, 1, 2, 3, 75, 76"),
        ({"format": 1, "code": [1]}, Verdict.UNKNOWN, "ending.json has code [1]"),
        ([], Verdict.UNKNOWN, "must be a JSON object"),
    ],
)
def test_how_the_last_start_ended_is_said(settings: Config, ending: object, verdict: Verdict, value: str) -> None:
    run = Path(settings.run.folder)
    run.mkdir()
    (run / "ending.json").write_text(json.dumps(ending))
    finding = leftovers(settings)["last start"]
    assert finding.verdict is verdict
    assert finding.value == value or (verdict is Verdict.UNKNOWN and value in finding.value)
    assert bool(finding.way_out) is (verdict is Verdict.BAD)


@pytest.fixture
def other_training(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """A process that looks like training, and the port at which it listens."""
    script = tmp_path / "launch" / "train.py"
    script.parent.mkdir()
    script.write_text(
        "import socket; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, script, "run.name=other"],
        env={**os.environ, "SLURM_JOB_ID": "17"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process.pid, int(process.stdout.readline())
        process.communicate("\n")


def test_processes_of_training_are_found_with_their_ports(other_training: tuple[int, int]) -> None:
    pid, port = other_training
    finding = by_name(check_leftovers(Subject(), lambda: [p for p in training_processes() if p.pid == pid]))[
        "other training"
    ]
    assert finding.verdict is Verdict.BAD
    assert f"process {pid} (python" in finding.value
    assert f", job 17) holds port {port}" in finding.value
    assert finding.way_out.endswith(f"kill {pid}")


def test_ports_and_gpus_of_a_process_are_those_of_its_open_files(tmp_path: Path) -> None:
    process = tmp_path / "42"
    (process / "fd").mkdir(parents=True)
    opened = ["socket:[777]", "/dev/nvidia10", "/dev/nvidia2", "/dev/nvidiactl", "/tmp/file"]
    for number, target in enumerate(opened):
        (process / "fd" / str(number)).symlink_to(target)
    (process / "fd" / "9").touch()  # not a link: as if closed in the meantime
    (tmp_path / "net").mkdir()
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    line = "   0: 00000000:733C 00000000:0000 {} 00000000:00000000 00:00000000 00000000     0        0 {} 1\n"
    (tmp_path / "net" / "tcp").write_text(head + line.format("0A", 777) + line.format("01", 888) + "cut off\n")
    assert held_gpus(42, tmp_path) == ["2", "10"]
    assert listening_ports(42, tmp_path) == [0x733C]
    assert listeners(0x733C, tmp_path) == {42}
    assert listeners(0x733D, tmp_path) == set()
    assert held_gpus(43, tmp_path) == []
