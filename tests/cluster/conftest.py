"""A SLURM of two nodes for the tests of this folder; they are skipped where none can be started, but fail in CI."""

import os

import pytest
from nodes import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    reason = missing()
    if reason is not None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no SLURM: {reason}")
    with Cluster(tmp_path_factory.mktemp("cluster") / "slurm", f"p{os.getpid()}n", kill_wait=10) as cluster:
        yield cluster
