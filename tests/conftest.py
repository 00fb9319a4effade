"""Without a GPU, Triton's kernels are interpreted. Triton reads this once, when the first module imports it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
