"""Compose attention by fused Triton kernels, for NVIDIA GPUs."""
