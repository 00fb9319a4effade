"""Print which kernels take the time of a forward and backward pass of compose attention, with and without a window."""

import torch
from torch.profiler import ProfilerActivity, profile

from dcscale.ops import ComposeWeights, compose_attention

B, T, H, D, R = 1, 4096, 32, 128, 2
PASSES = 5


def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
    return (std * torch.randn(B, T, *shape, device="cuda", dtype=torch.bfloat16)).requires_grad_()


def weights() -> ComposeWeights:
    q1, k1 = normal(R, H), normal(R, H)
    q2, k2 = normal(R, H, std=0.1), normal(R, H, std=0.1)
    return ComposeWeights(q1=q1, q2=q2, qg=normal(H, std=0.1), k1=k1, k2=k2, kg=normal(H, std=0.1))


def arguments() -> tuple:
    """q, k, v and the weights of both stages."""
    return *(normal(H, D) for _ in range(3)), weights(), weights()


def passes(count: int, window: int | None) -> None:
    q, k, v, pre, post = arguments()
    for _ in range(count):
        compose_attention(q, k, v, pre, post, window=window, backend="triton").sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    for window in (None, 256):
        passes(3, window)  # compiles the kernels and fills torch's caches
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            passes(PASSES, window)
        print(f"window {window}: peak {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB; times of {PASSES} passes")
        print(found.key_averages().table(sort_by="cuda_time_total", row_limit=15, max_name_column_width=60))
