"""How ranks find each other, with threads as ranks; whom they name if they do not."""

import contextlib
import json
import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import DistNetworkError, HashStore, PrefixStore, TCPStore

from dcscale.parallel import ArrivalError, Environment, LaunchError, free_port, new_store_client
from dcscale.parallel.launchers import Launch
from dcscale.parallel.rendezvous import Rendezvous, current_rendezvous, join, launch_line, name_ranks

HOST = socket.gethostname()
SECOND = 1 / 60  # in minutes


def environment(rank, world_size, port, hosts=(), serves_store=True):
    launch = Launch("srun", "job 17, step 0", ("127.0.0.1", port), serves_store, "dcscale/17", tuple(hosts))
    return Environment(rank, rank, world_size, world_size, torch.device("cpu"), launch)


class Ranks:
    """Threads that call :func:`join`, and what they print, by rank."""

    def __init__(self, world_size, port=None, hosts=(), serves_store=True):
        self.arguments = (world_size, port or free_port(), hosts, serves_store)
        self.lines = {rank: [] for rank in range(world_size)}

    def join(self, seconds_by_rank, notice_seconds=60.0, answer_seconds=30.0):
        """The rendezvous, or the text of the ArrivalError, of each of these ranks."""

        def call(rank, seconds):
            try:
                return join(
                    environment(rank, *self.arguments),
                    seconds * SECOND,
                    self.lines[rank].append,
                    notice_seconds=notice_seconds,
                    answer_seconds=answer_seconds,
                )
            except ArrivalError as error:
                return str(error)

        with ThreadPoolExecutor(len(seconds_by_rank)) as threads:
            return list(threads.map(call, seconds_by_rank, seconds_by_rank.values()))

    @property
    def address(self):
        return f"127.0.0.1:{self.arguments[1]}"


def start_agent():
    """A store that a launcher serves."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def agent():
    return start_agent()


def test_ranks_meet_and_know_all_hosts():
    ranks = Ranks(3)
    met = ranks.join({0: 30, 1: 30, 2: 30})
    assert [rendezvous.hosts for rendezvous in met] == [(HOST,) * 3] * 3
    assert ranks.lines == {0: [], 1: [], 2: []}
    met[0].store.set("key", "of rank 0")
    assert met[2].store.get("key") == b"of rank 0"
    # The prefix keeps other users of the same server apart.
    assert met[1].store.underlying_store.check(["dcscale/17/key"])


def test_another_thread_gets_a_connection_of_its_own():
    """The connection of the main thread is busy as long as a call on it waits."""
    rendezvous, other = Ranks(2).join({0: 30, 1: 30})
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(rendezvous.store.wait, ["key"], timedelta(seconds=30))
        client = rendezvous.new_store_client(5)
        assert client.timeout == timedelta(seconds=5)
        assert not client.check(["key"])
        other.new_store_client(5).set("key", "value")
        waiting.result(30)
        assert client.get("key") == b"value"


def test_a_store_that_is_gone_is_noticed_at_once():
    gone = Rendezvous(HashStore(), ("n0", "n1"), ("127.0.0.1", free_port()), "prefix")
    began = time.monotonic()
    with pytest.raises(DistNetworkError, match=r"the store at 127.0.0.1:\d+ does not answer: Connection refused"):
        gone.new_store_client(30)
    assert time.monotonic() - began < 10


def test_rank_0_may_be_the_last():
    ranks = Ranks(2)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(ranks.join, {1: 30})
        time.sleep(0.3)
        [last] = ranks.join({0: 30})
        [rendezvous] = first.result(30)
    assert rendezvous.hosts == last.hosts


def test_a_single_process_is_not_reached_from_elsewhere():
    alone = Environment(0, 0, 1, 1, torch.device("cpu"))
    rendezvous = join(alone, 1, print)
    host, port = rendezvous.address
    assert (host, rendezvous.hosts) == ("127.0.0.1", (HOST,))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    rendezvous.new_store_client(5).set("key", "value")
    assert rendezvous.store.get("key") == b"value"


def test_missing_ranks_are_named_by_host_on_all_that_arrived():
    ranks = Ranks(4, hosts=[HOST, HOST, "n2", "n2"])
    errors = ranks.join({0: 1.0, 1: 30}, notice_seconds=0.4)
    pattern = r"ranks 2-3 \(n2\) did not arrive at rank 0 at 127.0.0.1:\d+ within 0.0166667 minutes "
    assert all(re.match(pattern + r"\(parallel.start_timeout_minutes\)", error) for error in errors)
    assert len(set(errors)) == 1
    first, second = ranks.lines[0]
    assert re.match(r"waiting    for ranks 2-3 \(n2\): 0 s so far; the start fails after 0.0166667 minutes", first)
    assert second.startswith("waiting    for ranks 2-3 (n2): 1 s so far")
    assert ranks.lines[1] == []


def test_a_rank_whose_own_time_is_over_names_the_missing_ones_too(agent):
    ranks = Ranks(3, agent.port, serves_store=False)
    [error] = ranks.join({1: 0.3})
    assert error.startswith(f"ranks 0, 2 did not arrive at the store of torchrun at {ranks.address} within")


def test_hosts_are_not_named_where_ranks_are_not_where_they_should_be():
    ranks = Ranks(3, hosts=["n1", "n1", "n2"])  # this host has another name
    [error] = ranks.join({0: 0.2})
    assert error.startswith("ranks 1-2 did not arrive")


def test_without_rank_0_the_others_say_so():
    ranks = Ranks(3)
    errors = ranks.join({1: 0.7, 2: 0.7}, notice_seconds=0.3)
    start = f"rank 0 at {ranks.address} does not answer after 0.0116667 minutes"
    assert all(error.startswith(start) and "Connection refused" in error for error in errors)
    server = re.escape(f"rank 0 at {ranks.address}")
    assert ranks.lines[1]
    assert all(re.match(rf"waiting    for {server}: Connection refused; \d s", line) for line in ranks.lines[1])
    assert ranks.lines[2] == []  # one rank is enough


def test_a_taken_port_is_one_line_with_the_way_out():
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        [error] = Ranks(2, port).join({0: 30})
    assert re.fullmatch(
        rf"port {port} of 127.0.0.1, where the ranks .*: address already in use; set MASTER_PORT.*", error
    )


def test_a_program_that_does_not_answer_is_no_store():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ranks = Ranks(2, silent.getsockname()[1])
        [error] = ranks.join({1: 30}, answer_seconds=0.3)
    assert error.startswith(f"rank 0 at {ranks.address} is no torch store: no answer in 0.3 s; another program")


def test_a_program_that_answers_otherwise_is_no_store():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        ranks = Ranks(2, server.getsockname()[1])
        [error] = ranks.join({1: 1})
        server.shutdown(socket.SHUT_RDWR)
    assert error.startswith(f"rank 0 at {ranks.address} is no torch store: ")


def test_ranks_meet_at_the_store_of_torchrun(agent):
    met = Ranks(2, agent.port, serves_store=False).join({0: 30, 1: 30})
    assert [rendezvous.address[1] for rendezvous in met] == [agent.port] * 2


def test_a_missing_store_of_torchrun_is_named():
    [error] = Ranks(2, serves_store=False).join({0: 0.1})
    assert error.startswith("the store of torchrun at 127.0.0.1:")


def test_two_processes_of_the_same_rank_are_refused(agent):
    """As when two runs use the same port, or a job script sets RANK once for all tasks."""
    PrefixStore("dcscale/17", agent).set("arrived/1", json.dumps({"host": "n7", "pid": 4}))
    [error] = Ranks(2, agent.port, serves_store=False).join({1: 30})
    assert re.match(
        rf"two processes are rank 1: process 4 on n7 arrived at .* before process {os.getpid()} on {HOST}; check RANK",
        error,
    )


def test_a_rank_that_rank_0_does_not_know_is_refused():
    few, many = Ranks(1), Ranks(3)
    many.arguments = (3, *few.arguments[1:])
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(few.join, {0: 30})
        with pytest.raises(
            LaunchError, match="this is rank 2 of 3, but rank 0 waited for 1 ranks only; start all with"
        ):
            many.join({2: 30})
        first.result(30)


def test_a_store_that_is_lost_meanwhile_is_named():
    agent = start_agent()
    ranks = Ranks(3, agent.port, serves_store=False)
    with ThreadPoolExecutor(1) as threads:
        joined = threads.submit(ranks.join, {1: 30})
        while not agent.check(["dcscale/17/arrived/1"]):
            time.sleep(0.01)
        del agent
        [error] = joined.result(30)
    server = f"the store of torchrun at {ranks.address}"
    assert error.startswith(f"lost the connection to {server} while waiting for all ranks: ")


def test_clients_of_the_store_need_a_rendezvous():
    with pytest.raises(RuntimeError, match="the ranks have not met: call start_distributed first"):
        new_store_client(1)
    with pytest.raises(RuntimeError, match="the ranks have not met"):
        current_rendezvous()


@pytest.mark.parametrize(
    ("ranks", "hosts", "text"),
    [
        ([1], (), "rank 1"),
        ([1], ["n1", "n2"], "rank 1 (n2)"),
        ([1, 2, 3], ["n1", "n1", "n2", "n2"], "ranks 1 (n1), 2-3 (n2)"),
        ([0, 2, 4, 5, 6], (), "ranks 0, 2, 4-6"),
        ([0, 2, 4, 6, 8, 9], (), "ranks 0, 2, 4 and 3 others"),
        ([0, 2, 4, 6], (), "ranks 0, 2, 4 and 1 other"),
    ],
)
def test_ranks_are_named_briefly(ranks, hosts, text):
    assert name_ranks(ranks, hosts, most=3) == text


@pytest.mark.parametrize(
    ("hosts", "text"),
    [
        (["n1"], "srun, job 17, step 0: 1 rank on n1"),
        (["n1", "n1", "n2", "n2"], "srun, job 17, step 0: 4 ranks on n1, n2"),
        ([f"n{i}" for i in range(12)], "srun, job 17, step 0: 12 ranks on 12 hosts: n0, n1, ..., n11"),
    ],
)
def test_the_log_names_launcher_job_and_hosts(hosts, text):
    assert launch_line(environment(0, len(hosts), 1), hosts, most=4) == f"launch     {text}"


def test_a_start_by_hand_has_no_job():
    assert launch_line(Environment(0, 0, 1, 1, torch.device("cpu")), ["n1"]) == "launch     python: 1 rank on n1"
