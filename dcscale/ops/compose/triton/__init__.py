"""Compose attention with fused Triton kernels, for NVIDIA GPUs."""
