"""How processes start together: the store for other threads, timeouts of all groups, ranks with different configs."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils.groups import _clone_world_group

from dcscale.config import Config
from dcscale.parallel import (
    DisagreementError,
    current_rendezvous,
    discover,
    new_store_client,
    set_timeouts,
    start_distributed,
    stop_distributed,
)
from dcscale.testing.distributed import run_distributed

pytestmark = pytest.mark.distributed


def start_and_time_out():
    """What another thread read from the store, seconds until rank 0 gave up on rank 1 by group, hosts."""
    os.environ.pop("TORCH_FR_BUFFER_SIZE", None)
    environment = discover()
    start_distributed(environment, 1)
    start_distributed(environment, 1)  # a second trainer of this process uses the same group
    store, hosts = current_rendezvous().store, current_rendezvous().hosts
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit(lambda: new_store_client(30).get("of rank 1"))
        if environment.rank == 1:
            store.set("of rank 1", "read by a thread")
        text = read.result(30)
    total = torch.ones(1)
    dist.all_reduce(total)
    groups = [dist.group.WORLD, dist.new_group(backend="gloo"), _clone_world_group()]
    set_timeouts(0.5)
    waited = []
    if environment.rank == 0:
        for group in groups:
            start = time.monotonic()
            with pytest.raises(RuntimeError, match=r"(?i)timed out"):
                dist.all_reduce(torch.ones(1), group=group)
            waited.append(time.monotonic() - start)
        store.set("done", "")
    store.get("done")
    buffer_size = os.environ["TORCH_FR_BUFFER_SIZE"]
    return text, total.item(), waited, hosts, buffer_size


def test_start_store_and_timeouts():
    results = run_distributed(start_and_time_out, 2)
    for text, total, _, hosts, buffer_size in results:
        assert (text, total, buffer_size) == (b"read by a thread", 2, "2000")
        assert len(hosts) == 2
    waited = results[0][2]
    assert len(waited) == 3
    # Without set_timeouts, it would be a minute in the first group, and half an hour in the others.
    assert all(0.4 < seconds < 20 for seconds in waited)


def start_with_different_configs():
    environment, config = discover(), Config()
    config.model.dim = 64 * (environment.rank + 1)
    try:
        start_distributed(environment, 1, config)
    except DisagreementError as error:
        return str(error), dist.is_initialized()
    finally:
        stop_distributed()


def test_ranks_with_different_configs_do_not_start():
    first, second = run_distributed(start_with_different_configs, 2)
    assert first == second
    message, initialized = first
    assert "\n  model.dim is 128 on rank 1 (" in message
    assert message.count("\n") == 2
    assert not initialized
