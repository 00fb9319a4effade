"""Runs one forward and backward pass of compose attention for Nsight Compute, which then reads counters of its kernels.

    ncu --profile-from-start off ... python3 one_pass.py [WINDOW]

The passes that compile kernels are not profiled. Scratch memory is enough for one chunk, so that each kernel runs once.
"""

import sys

import torch
from profile_step import arguments

from dcscale.ops import compose_attention

window = int(sys.argv[1]) if len(sys.argv) > 1 else None
q, k, v, pre, post = arguments()
for profiled in (False, True):
    if profiled:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
    compose_attention(q, k, v, pre, post, window=window, backend="triton", scratch_bytes=2**35).sum().backward()
torch.cuda.synchronize()
torch.cuda.cudart().cudaProfilerStop()
