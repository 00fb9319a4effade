"""Throughput and utilization in a record, compared with values worked out by hand."""

from types import SimpleNamespace

import pytest
import torch

from dcscale.hardware import peak_tflops
from dcscale.train.hooks.progress import Throughput
from dcscale.train.trainer import Timings

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("A100-SXM4-40GB", 312.0),  # drivers before 470
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA B200", 2250.0),
        # PCIe and NVL boards of the same chips, MIG slices, and unknown devices
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_is_looked_up_by_the_full_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(GPU, "bf16", None) == peak


def test_a_configured_peak_wins_and_fp32_and_cpu_have_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_tflops(GPU, "bf16", 500.0) == 500.0
    assert peak_tflops(GPU, "fp32", 60.0) == 60.0
    assert peak_tflops(GPU, "fp32", None) is None
    assert peak_tflops(CPU, "bf16", None) is None
    assert peak_tflops(CPU, "fp32", 2.0) == 2.0


def record_of(peak):
    """The record of 4 steps on 4000 tokens in 8 seconds, 2 of them waiting for data, on 2 devices."""
    timings = Timings()
    for tokens in (1000, 1500, 0, 1500):
        timings.add(2.0, 0.5, tokens)
    trainer = SimpleNamespace(
        pop_timings=lambda: timings,
        environment=SimpleNamespace(world_size=2, device=CPU),
    )
    record = {"step": 4}
    Throughput(flops_per_token=6e9, peak=peak).add_to_record(trainer, record)
    return record


def test_the_arithmetic():
    record = record_of(peak=10.0)
    assert record.pop("memory_gib") > 0.01  # this process has torch in its memory
    assert record == {
        "step": 4,
        "tokens_per_second": 500.0,  # 4000 / 8
        "tflops_per_device": pytest.approx(1.5),  # 500 * 6e9 / 2 / 1e12
        "mfu": pytest.approx(0.15),
        "step_seconds": 2.0,
        "data_wait": 0.25,
    }


def test_without_a_peak_there_is_no_mfu():
    record = record_of(peak=None)
    assert record["mfu"] is None
    assert record["tflops_per_device"] == pytest.approx(1.5)
