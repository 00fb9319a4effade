"""What devices can do at most, and what this process has used of one."""

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
"""Dense bf16 peak in TFLOP/s of one whole SXM device (NVIDIA's data sheets), by its name without "NVIDIA"."""


def peak_tflops(device: torch.device, precision: str, configured: float | None) -> float | None:
    """Peak of one device in TFLOP/s: as configured, or looked up for bf16 on a known GPU, else None."""
    if configured is not None or device.type != "cuda" or precision != "bf16":
        return configured
    # The full name must match: PCIe and NVL boards and MIG slices contain the chip's name, and have a lower peak.
    return PEAK_TFLOPS_BF16.get(torch.cuda.get_device_name(device).removeprefix("NVIDIA "))


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated tensors on a GPU, resident pages on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30  # Linux counts KiB


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} threads"
