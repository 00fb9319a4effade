"""The kernels, compiled ahead of time for several GPUs, fit into registers and shared memory."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

CAPABILITIES = ["80", "90", "100"]
RANKS = ["2", "4"]
MAX_SHARED_BYTES = 48 * 1024
"""The default limit on every architecture; four such programs fit on one multiprocessor."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Compiled in another process, because this one may use Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    command = [sys.executable, "-m", "dcscale.testing.triton_aot", *CAPABILITIES, "--ranks", *RANKS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_fit(report, capability, rank, record_property):
    kernels = report["kernels"][f"sm_{capability}, rank {rank}"]
    record_property("resources", f"triton {report['triton']}, ptxas {report['assembler']}: {kernels}")
    assert len(kernels) == 7
    for name, used in kernels.items():
        assert used["spilled"] == 0, name
        assert 16 <= used["registers"] <= 255, name
        assert used["shared"] <= MAX_SHARED_BYTES, name
