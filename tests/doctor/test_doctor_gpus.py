"""GPUs and clocks, by recorded outputs of the tools: see recorded/README.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from dcscale.doctor.findings import Finding, Verdict
from dcscale.doctor.local.gpus import check_gpus, parse_nvlink, parse_topology
from dcscale.doctor.local.host import check_clock
from dcscale.doctor.local.subject import CommandError, Subject
from dcscale.doctor.local.versions import check_versions, driver_cuda

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> str:
    return (RECORDED / name).read_text()


def outputs(machine: str, changes: Mapping[str, tuple[str, str]] = {}) -> Callable[..., str]:
    """Answers as the tools of a machine would; ``changes`` replace a text in the output of a query."""

    def run(*command: str, seconds: float, variables: Mapping[str, str]) -> str:
        query = command[1].partition("=")[0].strip("-")
        suffix = "csv" if query.startswith("query") else "txt"
        path = RECORDED / f"{machine}-{query}.{suffix}"
        if not path.exists():
            raise CommandError(f"{command[0]} failed with exit code 2: no such option")
        text = path.read_text()
        if query in changes:
            assert changes[query][0] in text
            text = text.replace(*changes[query], 1)
        return text

    return run


def found(machine: str, changes: Mapping[str, tuple[str, str]] = {}, ranks: int = 8) -> dict[str, Finding]:
    subject = Subject(local_ranks=ranks, ranks=ranks, node="n1", variables={})
    return {finding.check: finding for finding in check_gpus(subject, outputs(machine, changes))}


def test_a_healthy_machine_has_only_good_findings() -> None:
    findings = found("h100x8")
    assert {finding.verdict for finding in findings.values()} == {Verdict.GOOD}
    assert findings["GPUs"].value == "8 x NVIDIA H100 80GB HBM3, driver 580.95.05"
    assert findings["GPU peer links"].value == "pairs by path: NV18 28"
    assert findings["NVLink"].value == "18 active links of 26.562 GB/s on each of 8 GPUs"


LINE = "2, 00000000:52:00.0, NVIDIA H100 80GB HBM3, 580.95.05, 81559, 4, 29, 0, 0x0000000000000001, 345, 1980, 68.44"


@pytest.mark.parametrize(
    ("check", "query", "before", "after", "value"),
    [
        ("GPU memory", "query-gpu", "81559, 4, 29", "81559, 70211, 29", "GPU 2 70,211 of 81,559 MiB in use"),
        ("GPU ECC", "query-gpu", "29, 0, 0x", "29, 3, 0x", "GPU 2 3 uncorrected errors since the driver was loaded"),
        ("GPU memory rows", "query-remapped-rows", "52:00.0, 0", "52:00.0, 1", "GPU 2 row remapping pending"),
        ("GPU memory rows", "query-remapped-rows", "52:00.0, 0, 0", "52:00.0, 0, 1", "GPU 2 row remapping failed"),
        (
            "GPU clocks",
            "query-gpu",
            "0x0000000000000001, 345, 1980, 68.44",
            "0x0000000000000068, 210, 1980, 68.44",
            "GPU 2 210 of 1980 MHz, hardware slowdown, thermal slowdown, hardware thermal slowdown",
        ),
        ("GPU power", "query-gpu", "68.44, 700.00", "68.44, 400.00", "GPU 2 68.44 W drawn, limit 400 of 700 W"),
        ("GPU temperature", "query-gpu", "4, 29, 0", "4, 91, 0", "GPU 2 91 °C"),
        ("GPU PCIe link", "query-gpu", "68.44, 700.00, 700.00, 16", "68.44, 700.00, 700.00, 8", "GPU 2 x8 of x16"),
        ("GPUs", "query-gpu", LINE + ", 700.00, 700.00, 16, 16\n", "", "7 x NVIDIA H100 80GB HBM3, driver 580.95.05"),
        (
            "NVLink",
            "nvlink",
            "\t Link 7: 26.562 GB/s\n",
            "\t Link 7: <inactive>\n",
            "GPU 0 has 17 x 26.562 GB/s; others 18 x 26.562 GB/s",
        ),
        ("NVLink", "nvlink", "26.562", "12.500", "GPU 0 has 18 x 12.5 GB/s; others 18 x 26.562 GB/s"),
    ],
)
def test_a_planted_defect_is_bad_and_names_the_gpu(check: str, query: str, before: str, after: str, value: str) -> None:
    findings = found("h100x8", {query: (before, after)})
    bad = [finding for finding in findings.values() if finding.verdict is Verdict.BAD]
    assert [(finding.check, finding.value) for finding in bad] == [(check, value)]
    assert bad[0].node == "n1"
    assert bad[0].way_out


def test_a_path_without_nvlink_is_bad() -> None:
    finding = found("h100x8", {"topo": ("GPU5\tNV18\tNV18", "GPU5\tNV18\tSYS")})["GPU peer links"]
    assert finding.verdict is Verdict.BAD
    assert finding.value.startswith("GPU5: GPU0 NV18, GPU1 SYS, GPU2 NV18")


def test_gpus_without_nvlink_and_ecc_are_not_bad_but_unknown() -> None:
    findings = found("rtx4090x2", ranks=2)
    assert {name for name, finding in findings.items() if finding.verdict is Verdict.UNKNOWN} == {
        *("GPU ECC", "GPU memory rows", "NVLink"),
    }
    assert findings["GPU memory"].value == "GPU 1 18,211 of 24,564 MiB in use"
    assert findings["GPU clocks"].verdict is Verdict.GOOD  # a power cap under load is how GPUs work
    assert findings["GPU peer links"].value == "pairs by path: SYS 1"


def test_different_gpus_are_bad() -> None:
    changes = {"query-gpu": ("NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL")}
    finding = found("h100x8", changes)["GPUs"]
    assert finding.verdict is Verdict.BAD
    assert finding.value.startswith("1 x NVIDIA H100 NVL, 7 x NVIDIA H100 80GB HBM3")


def test_fields_that_an_older_nvidia_smi_does_not_know_are_asked_by_their_old_name_or_left_out() -> None:
    asked = []

    def run(*command: str, seconds: float, variables: Mapping[str, str]) -> str:
        if not command[1].startswith("--query-gpu"):
            raise CommandError("nvidia-smi failed")
        fields = command[1].partition("=")[2].split(",")
        asked.append(fields)
        for name in ("clocks_event_reasons.active", "pcie.link.width.max"):
            if name in fields:
                raise CommandError(f'nvidia-smi failed with exit code 2: Field "{name}" is not a valid field to query.')
        line = recorded("h100x8-query-gpu.csv").splitlines()[0].split(", ")
        return ", ".join(line[: len(fields)]) + "\n"

    findings = {finding.check: finding for finding in check_gpus(Subject(variables={}), run)}
    assert "clocks_throttle_reasons.active" in asked[-1]
    assert findings["GPU clocks"].verdict is Verdict.GOOD
    assert findings["GPU PCIe link"].verdict is Verdict.UNKNOWN


def failing(error: CommandError) -> Callable[..., str]:
    def run(*command: str, **options: object) -> str:
        raise error

    return run


def test_a_driver_that_fails_is_bad_and_a_machine_without_gpus_unknown() -> None:
    subject = Subject(variables={})
    message = (
        "nvidia-smi failed with exit code 9: NVIDIA-SMI has failed because it couldn't communicate with the driver"
    )
    (bad,) = check_gpus(subject, failing(CommandError(message)))
    assert (bad.verdict, bad.value) == (Verdict.BAD, message)
    (unknown,) = check_gpus(subject, failing(CommandError("nvidia-smi is not installed", missing=True)))
    assert unknown.verdict is Verdict.UNKNOWN
    assert "nvidia-smi is not installed" in unknown.value


def test_gpus_without_nvidia_smi_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcscale.doctor.local.gpus.visible_gpus", lambda variables: 4)
    missing = failing(CommandError("nvidia-smi is not installed", missing=True))
    (finding,) = check_gpus(Subject(variables={}), missing)
    assert (finding.verdict, finding.value) == (Verdict.UNKNOWN, "4 in /dev, but nvidia-smi is not installed")


@pytest.mark.parametrize("query", ["topo", "nvlink"])
@pytest.mark.parametrize("answer", ["nothing that is known", None])
def test_links_that_nvidia_smi_does_not_tell_are_unknown(query: str, answer: str | None) -> None:
    healthy = outputs("h100x8")

    def run(*command: str, **options: object) -> str:
        if command[1] != query:
            return healthy(*command, **options)
        if answer is None:
            raise CommandError("nvidia-smi gave no answer in 8 s")
        return answer

    findings = check_gpus(Subject(local_ranks=8, variables={}), run)
    unknown = [finding.check for finding in findings if finding.verdict is Verdict.UNKNOWN]
    assert unknown == [{"topo": "GPU peer links", "nvlink": "NVLink"}[query]]


def test_values_that_are_not_available_are_unknown() -> None:
    line = ", ".join(["0", "00000000:01:00.0", "NVIDIA A10", "550.54.15", *["[N/A]"] * 12])
    findings = list(check_gpus(Subject(variables={}), lambda *command, **options: line))
    assert findings[0].verdict is Verdict.GOOD
    assert {finding.verdict for finding in findings[1:]} == {Verdict.UNKNOWN}


def test_an_nvidia_smi_that_hangs_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "nvidia-smi"
    stub.write_text("#!/bin/sh\nexec sleep 600\n")
    stub.chmod(0o755)
    monkeypatch.setattr("dcscale.doctor.local.gpus._SECONDS", 0.2)
    (bad,) = check_gpus(Subject(variables={"PATH": f"{tmp_path}:/usr/bin:/bin"}))
    assert (bad.verdict, bad.value) == (Verdict.BAD, "nvidia-smi gave no answer in 0.2 s")
    assert "dmesg" in bad.way_out


def test_output_that_is_not_understood_is_a_finding() -> None:
    (bad,) = check_gpus(Subject(variables={}), lambda *command, **options: "Unable to determine the device handle\n")
    assert bad.value.startswith("nvidia-smi printed 1 values for")
    assert parse_topology("nothing") == {}
    assert parse_nvlink("nothing") == {}


def test_the_drivers_cuda_is_read_from_the_head_of_nvidia_smi() -> None:
    assert driver_cuda(recorded("nvidia-smi.txt")) == "13.0"
    assert driver_cuda("no such line") is None


def cuda_finding() -> Finding:
    return next(finding for finding in check_versions(Subject()) if finding.check == "CUDA")


@pytest.mark.parametrize("answer", ["no version", None])
def test_a_driver_that_does_not_tell_its_cuda_leaves_it_unknown(
    monkeypatch: pytest.MonkeyPatch, answer: str | None
) -> None:
    run = failing(CommandError("nvidia-smi is not installed")) if answer is None else lambda *c, **options: answer
    monkeypatch.setattr("dcscale.doctor.local.versions.torch_cuda", lambda: "13.0")
    monkeypatch.setattr("dcscale.doctor.local.versions.run_command", run)
    assert cuda_finding().verdict is Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("built", "driver", "verdict"),
    [("13.0", "13.0", Verdict.GOOD), ("12.8", "13.0", Verdict.GOOD), ("13.0", "12.4", Verdict.BAD)],
)
def test_torchs_cuda_is_compared_with_the_drivers(
    monkeypatch: pytest.MonkeyPatch, built: str, driver: str, verdict: Verdict
) -> None:
    text = recorded("nvidia-smi.txt").replace("CUDA Version: 13.0", f"CUDA Version: {driver}")
    monkeypatch.setattr("dcscale.doctor.local.versions.torch_cuda", lambda: built)
    monkeypatch.setattr("dcscale.doctor.local.versions.run_command", lambda *command, **options: text)
    finding = cuda_finding()
    assert finding.verdict is verdict
    assert finding.value == f"torch has {built}, the driver supports {driver}"


# -- the clock ------------------------------------------------------------------------------------------------------


def clock(answers: Mapping[str, str], nodes: int = 2) -> Finding:
    def run(*command: str, seconds: float, variables: Mapping[str, str]) -> str:
        if command[0] not in answers:
            raise CommandError(f"{command[0]} is not installed", missing=True)
        return answers[command[0]]

    (finding,) = check_clock(Subject(nodes=nodes, variables={}), run)
    return finding


def test_a_clock_that_chrony_keeps_is_good() -> None:
    finding = clock({"chronyc": recorded("chronyc-tracking.txt")})
    assert (finding.verdict, finding.value) == (Verdict.GOOD, "chronyc: 0.000005 s slow, normal")


def test_a_clock_that_is_off_or_alone_is_bad_between_several_nodes() -> None:
    text = recorded("chronyc-tracking.txt").replace("0.000004521 seconds slow", "42.5 seconds fast")
    finding = clock({"chronyc": text})
    assert (finding.verdict, finding.value) == (Verdict.BAD, "chronyc: 42.500000 s fast, normal")
    assert clock({"chronyc": recorded("chronyc-tracking-alone.txt")}).verdict is Verdict.BAD


def test_timedatectl_is_asked_where_there_is_no_chrony() -> None:
    assert clock({"timedatectl": "NTP=yes\nNTPSynchronized=yes\n"}).verdict is Verdict.GOOD
    finding = clock({"timedatectl": "NTP=no\nNTPSynchronized=no\n"})
    assert (finding.verdict, finding.value) == (Verdict.BAD, "timedatectl: not synchronised, no time service runs")


@pytest.mark.parametrize("synchronised", [True, False])
def test_without_tools_the_kernel_is_asked(monkeypatch: pytest.MonkeyPatch, synchronised: bool) -> None:
    monkeypatch.setattr("dcscale.doctor.local.host.kernel_keeps_time", lambda: synchronised)
    finding = clock({"chronyc": "506 Cannot talk to daemon"})
    assert finding.verdict is (Verdict.GOOD if synchronised else Verdict.UNKNOWN)
    if not synchronised:
        assert "timedatectl is not installed" in finding.value
