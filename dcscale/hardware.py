"""Peak rates and names of devices, and the peak memory of this process."""

from __future__ import annotations

import resource

import torch

PEAK_TFLOPS_BF16 = {
    "A100-SXM4-40GB": 312.0,
    "A100-SXM4-80GB": 312.0,
    "H100 80GB HBM3": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
}
"""Dense bf16 peak in TFLOP/s of an SXM device (NVIDIA's data sheets), by its name without the prefix "NVIDIA "."""


def peak_tflops(device: torch.device, precision: str, configured: float | None) -> float | None:
    """Peak of one device in TFLOP/s: ``configured`` if given, else looked up for bf16 on a known GPU, else None."""
    if configured is not None or device.type != "cuda" or precision != "bf16":
        return configured
    # Match the full name: names of PCIe and NVL boards and MIG slices contain the chip's name, but have a lower peak.
    return PEAK_TFLOPS_BF16.get(torch.cuda.get_device_name(device).removeprefix("NVIDIA "))


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated tensors on a GPU, resident pages on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30  # Linux counts KiB


def device_name(device: torch.device) -> str:
    """The name of the GPU, or "CPU" with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} threads"
