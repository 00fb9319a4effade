"""tools/doctor.py as a user starts it, how checks are run, and what becomes of their findings."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dcscale.doctor.findings import Finding, Verdict, exit_code, report, summary, table, worst_first
from dcscale.doctor.local import CHECKS, Check, Subject, checks_table, run_checks
from dcscale.testing.runs import tiny_settings

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "doctor.py"


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """The tool in this process, on a machine without a launcher."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_"))]:
        monkeypatch.delenv(name)
    spec = importlib.util.spec_from_file_location("doctor_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_a_machine_and_a_run_that_are_in_order_give_exit_code_0(
    main: Callable, tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcscale.doctor.local.checks.training_processes", list)
    with_port(monkeypatch)
    settings = tiny_settings(tmp_path / "run", shards)
    assert main([*settings, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bad"] == 0
    names = {finding["check"] for finding in found["findings"]}
    assert names >= {"settings", "packages", "disk space", "write speed", "port", "verified shards", "start"}
    assert not (tmp_path / "run").exists()
    assert names - {"settings"} <= {name for check in CHECKS for name in check.findings}


def with_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another port than 29500, which other tests may use."""
    from dcscale.parallel import free_port

    monkeypatch.setenv("MASTER_PORT", str(free_port()))


def test_what_is_planted_is_found_together(tmp_path: Path, shards: Path, small_disk) -> None:
    """Port and lease held, disk full, a corrupt shard, an old package, little shared memory and few open files."""
    run, own = small_disk.folder / "run", Path(shutil.copytree(shards, tmp_path / "own"))
    shard = next((own / "validation").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    package = tmp_path / "packages" / "omegaconf-2.3.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: omegaconf\nVersion: 2.3.0\n")
    planter = (
        "import socket; from pathlib import Path; from dcscale.lease import Lease\n"
        f"s = socket.create_server(('', 0)); lease = Lease(Path({str(run)!r}), ''); lease.acquire()\n"
        "print(s.getsockname()[1], flush=True); input(); lease.release()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", planter], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        port = process.stdout.readline().strip()
        small_disk.fill()
        variables = {**os.environ, "MASTER_PORT": port, "PYTHONPATH": f"{package.parent}:{ROOT}"}
        plant = 'mount -t tmpfs -o size=256k tmpfs /dev/shm && ulimit -n 250 && exec "$@"'
        command = ["unshare", "--mount", "bash", "-c", plant, "bash", sys.executable, str(TOOL)]
        command += [*tiny_settings(run, own), "--json"]
        done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=120)
        process.communicate("\n")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)["findings"]
    bad = {finding["check"]: finding for finding in found if finding["verdict"] == "bad"}
    planted = {"port", "lease", "disk space", "disk write", "verified shards", "packages", "/dev/shm", "open files"}
    assert planted == set(bad) - {"other training", "host memory", "swap"}  # of other tests and programs
    assert f"process {process.pid}" in bad["port"]["value"]
    assert f"process {process.pid}" in bad["lease"]["value"]
    assert str(shard) in bad["verified shards"]["value"]
    assert "omegaconf is 2.3.0, at least 2.4 is needed" in bad["packages"]["value"]
    assert bad["disk space"]["value"] == "0 bytes free of 256 KiB"
    assert bad["/dev/shm"]["value"] == "256 KiB free of 256 KiB"
    assert bad["open files"]["value"] == "250"
    assert all(finding["way_out"] and finding["node"] for finding in bad.values())


def test_wrong_settings_are_findings_and_the_machine_is_checked_all_the_same(
    main: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Subject] = []

    def run(subject: Subject) -> tuple[list[Finding], bool]:
        seen.append(subject)
        return [subject.good("python", "3.11", "3.10")], False

    monkeypatch.setattr("dcscale.doctor.local.run_checks", run)
    assert main(["model.heads=7", "data.train=x", "validation.interval=0", "--quick"]) == 1
    output = capsys.readouterr().out
    assert "settings" in output
    assert "model.heads = 7 (command line)" in output
    assert "rule: must divide model.dim = 768" in output
    assert "1 bad, 0 unknown, 1 good" in output
    assert (seen[0].config, seen[0].quick) == (None, True)
    assert main(["missing.yaml"]) == 1
    assert "there is no such file" in capsys.readouterr().out


def test_without_a_config_only_the_machine_is_checked(main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcscale.doctor.local.run_checks", lambda subject: ([], subject.config is not None))
    assert main([]) == 0


def test_wrong_usage_gives_exit_code_2(main: Callable, capsys: pytest.CaptureFixture) -> None:
    for arguments in (["--frobnicate"], ["--wait", "0"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
    assert "must be a number above 0" in capsys.readouterr().err


def test_a_launcher_that_is_set_up_wrongly_is_a_finding(
    main: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as error:
        main(["--nodes"])
    assert error.value.code == 1
    output = capsys.readouterr().out
    assert output.startswith("bad  ranks")
    assert "WORLD_SIZE" in output


@pytest.mark.parametrize("arguments", [["--help"], ["--frobnicate"]])
def test_help_and_wrong_usage_import_nothing_that_takes_long(arguments: list[str]) -> None:
    code = (
        "import runpy, sys, atexit\n"
        "atexit.register(lambda: print(sorted({'torch', 'omegaconf', 'numpy', 'tqdm'} & set(sys.modules))))\n"
        f"sys.argv = ['doctor.py', *{arguments}]; runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == (0 if arguments == ["--help"] else 2)
    assert done.stdout.endswith("[]\n")


def test_checks_of_the_machine_are_imported_without_torch() -> None:
    code = "import sys, dcscale.doctor.local; print({'torch', 'omegaconf'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"


def test_a_machine_without_torch_is_checked_as_far_as_possible(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    variables = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, str(TOOL), "data.train=x", "--json"],
        env=variables,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    found = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["torch"]["verdict"] == Verdict.BAD.value
    assert "libcudart.so.13" in found["torch"]["value"]
    assert found["python"]["verdict"] == found["host memory"]["verdict"] == Verdict.GOOD.value


def test_ctrl_c_ends_it_while_a_driver_hangs(tmp_path: Path) -> None:
    hanging = tmp_path / "nvidia-smi"
    hanging.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\nexec sleep 30\n")
    hanging.chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen([sys.executable, TOOL, "--quick"], env=variables, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "asked").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, b"")


def test_the_page_lists_the_checks() -> None:
    lines = checks_table().splitlines()
    assert len(lines) == len(CHECKS) + 2
    assert all(line.count("|") == 5 for line in lines)


# -- how checks are run ---------------------------------------------------------------------------------------------


def check(look, name: str = "group", **options) -> Check:
    return Check(name, ("first",), "", "", look, **{"seconds": 5, "waits": False, **options})


def test_a_check_that_hangs_is_a_finding_beside_what_it_has_found() -> None:
    released = threading.Event()

    def hang(subject: Subject) -> Iterator[Finding]:
        yield subject.good("first", "value", "rule")
        released.wait()

    start = time.monotonic()
    try:
        found, hangs = run_checks(
            Subject(), [check(hang, seconds=0.2, hanging=Verdict.BAD), check(hang, "b", seconds=0.2)]
        )
    finally:
        released.set()
    assert hangs
    assert time.monotonic() - start < 4
    assert [finding.verdict for finding in found] == [Verdict.GOOD, Verdict.BAD, Verdict.GOOD, Verdict.UNKNOWN]
    assert found[1].value == "group: no answer in 0.2 s"


def test_a_check_that_fails_is_unknown_and_says_why() -> None:
    def fail(subject: Subject) -> list[Finding]:
        raise KeyError("missing")

    (finding,), hangs = run_checks(Subject(), [check(fail)])
    assert not hangs
    assert (finding.check, finding.verdict) == ("first", Verdict.UNKNOWN)
    assert finding.value == "the check failed: KeyError: 'missing'"


def test_checks_wait_until_it_is_known_how_many_ranks_there_are() -> None:
    def ranks(subject: Subject) -> list[Finding]:
        return [subject.good("first", f"{subject.ranks} {subject.local_ranks} {subject.nodes}", "")]

    (finding,), _ = run_checks(Subject(place=lambda: (16, 8, 2)), [check(ranks, waits=True)])
    assert finding.value == "16 8 2"


def test_imports_that_hang_are_a_finding_and_the_rest_is_checked() -> None:
    released = threading.Event()
    asked = Subject(place=lambda: released.wait() and (1, 1, 1))
    good = check(lambda subject: [subject.good("first", "value", "rule")], waits=True)
    try:
        found, hangs = run_checks(asked, [good], import_seconds=0.2)
    finally:
        released.set()
    assert hangs
    assert [(finding.check, finding.verdict) for finding in found] == [("torch", Verdict.BAD), ("first", Verdict.GOOD)]


def test_the_quick_part_leaves_checks_out() -> None:
    def look(subject: Subject) -> list[Finding]:
        return [subject.good("first", "value", "rule")]

    checks = [check(look), check(look, "slow", quick=False)]
    for quick, count in ((False, 2), (True, 1)):
        found, _ = run_checks(Subject(quick=quick), checks)
        assert len(found) == count


# -- findings -------------------------------------------------------------------------------------------------------

FINDINGS = [
    Finding("memory", Verdict.GOOD, "n1", "17 GiB", "at least 4 GiB"),
    Finding("GPUs", Verdict.UNKNOWN, "n1", "no nvidia-smi", "8"),
    Finding("port", Verdict.BAD, "node-2", "29500 \x1b[31mtaken", "free", "choose another"),
]


def test_the_table_has_bad_findings_first_with_rule_and_way_out() -> None:
    assert table(FINDINGS) == [
        "bad      port    node-2  29500 \\x1b[31mtaken",
        "                         rule: free",
        "                         way out: choose another",
        "unknown  GPUs    n1      no nvidia-smi",
        "                         rule: 8",
        "good     memory  n1      17 GiB",
    ]
    assert table([]) == []
    assert table([dataclasses.replace(FINDINGS[0], value="a\ud800")]) == ["good  memory  n1  a\\ud800"]
    long = dataclasses.replace(FINDINGS[0], value="word " * 100)
    assert max(map(len, table([long], width=80))) <= 80


def test_the_summary_names_nodes_and_the_exit_code_follows_from_bad_findings() -> None:
    assert summary(FINDINGS, 1.25) == "1 bad, 1 unknown, 1 good, in 1.2 s; bad on node-2"
    assert summary(FINDINGS[:2], 1.25) == "0 bad, 1 unknown, 1 good, in 1.2 s"
    assert (exit_code(FINDINGS), exit_code(FINDINGS[:2])) == (1, 0)
    assert [finding.check for finding in worst_first(FINDINGS)] == ["port", "GPUs", "memory"]


def test_the_report_is_json() -> None:
    found = json.loads(json.dumps(report(FINDINGS, 1.25)))
    assert (found["format"], found["bad"], found["unknown"], found["good"]) == (1, 1, 1, 1)
    assert found["findings"][0] == {
        "check": "port",
        "verdict": "bad",
        "node": "node-2",
        "value": "29500 \x1b[31mtaken",
        "rule": "free",
        "way_out": "choose another",
    }
