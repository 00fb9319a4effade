"""What the environment of all tests is.

Without a GPU, Triton's kernels are interpreted. Triton reads this once, when the first module imports it.
The servers that tests start are on this machine, behind no proxy.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1"
