"""What the environment of all tests is, and the tiny data that many of them share."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it once, when the first module imports it
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1"  # servers that tests start are on this machine


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Folder with ``train`` and ``validation`` shards of bytes, a few dozen sequences of 32; only to be read."""
    from dcscale.testing.runs import make_shards

    return make_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="session")
def quick_interpreter():
    """Halves the time of interpreted Triton kernels."""
    from dcscale.testing.staged import quicken_interpreter

    quicken_interpreter()
