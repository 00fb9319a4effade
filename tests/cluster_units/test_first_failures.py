"""Which exit code an error has, and which rank says what when several fail."""

import errno
import json
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from dcscale.checkpoint import CheckpointError
from dcscale.cluster.ending import ENDING, Ending, ExitCode
from dcscale.cluster.failures import Failures, exit_code
from dcscale.config import ConfigError
from dcscale.data import DataError
from dcscale.data.storage import UnreadableError
from dcscale.lease import LeaseHeldError, LeaseLostError
from dcscale.parallel import Environment, LaunchError, RankError
from dcscale.parallel.agreement import DisagreementError
from dcscale.parallel.rendezvous import ArrivalError
from dcscale.train import REFUSALS
from dcscale.train.optimizer import RuleError

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.77.0.2]:34251"
GLOO += ". This is typically caused by a remote worker crashing. Check the logs"
CLOSED = "Connection closed by peer [10.77.0.2]:34251"


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError([]), 2),
        (LaunchError("SLURM_PROCID is 'x'"), 2),
        (DisagreementError("rank 1 has another model.dim"), 2),
        (DataError("no such folder"), 2),
        (CheckpointError("is corrupt"), 2),
        (RuleError("matches nothing"), 2),
        (RankError("rank 1: DataError"), 2),
        (LeaseLostError("was taken over"), 2),
        (caused(LeaseLostError("was taken over"), OSError(errno.ESTALE, "stale")), 2),
        (FloatingPointError("gradient norm nan"), 3),
        (LeaseHeldError("is held"), 76),
        (ArrivalError("rank 1 is missing"), 76),
        (RuntimeError(GLOO), 76),
        (RuntimeError("[../gloo/unbound_buffer.cc:83] Timed out waiting 30000ms for recv operation to complete"), 76),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), 76),
        (dist.DistNetworkError("The client socket has timed out"), 76),
        (DataError("data worker 17 died", retry=True), 76),
        (UnreadableError("http://x/a.tar", "503; stopped after 9 attempts", retry=True), 76),
        (caused(DataError("the data of step 3 could not be read"), UnreadableError("a", "503", retry=True)), 76),
        (OSError(errno.ENOSPC, "No space left on device"), 76),
        (caused(CheckpointError("was not written"), OSError(errno.EIO, "Input/output error")), 76),
        (caused(CheckpointError("cannot be used"), PermissionError(errno.EACCES, "no permission")), 2),
        (RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc:454] op.preamble.length <= op.nbytes"), 1),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 1),
        (FileNotFoundError(errno.ENOENT, "no such file"), 1),
        (KeyError("x"), 1),
    ],
)
def test_the_code_of_an_error(error, code):
    assert exit_code(error, REFUSALS) == code


class ExitError(BaseException):
    """Stands for the end of the process."""


def leave(code):
    raise ExitError(code)


@pytest.fixture
def run(tmp_path):
    """A run folder with a run in it."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return tmp_path / "run"


class Ranks:
    """Several ranks of a run, as threads, with what each says on the terminal."""

    def __init__(self, size, run=None, store=None, lost=None):
        self.store, self.said, self.codes, self.endings = store, {}, {}, []
        for rank in range(size):
            ending = Ending(leave, seconds=1e6)
            ending.know(Environment(rank, rank, size, size, torch.device("cpu")))
            ending.host = f"n{rank}"
            ending.lost_ranks = lambda seconds: lost or {}
            ending.error = lambda text, rank=rank: self.said.setdefault(rank, []).append(text)
            if run is not None:
                ending.hold(run, "")
            self.endings.append(ending)

    def open(self, seconds):
        if self.store is None:
            raise dist.DistNetworkError("no answer")
        return self.store

    def fail(self, rank, error, **seconds):
        ending = self.endings[rank]
        seconds = {"words_seconds": 0.2, "yield_seconds": 0.1, "hear_seconds": 0.1, **seconds}
        hosts = [other.host for other in self.endings]
        failures = Failures(ending, REFUSALS, open_store=self.open, hosts=lambda: hosts, **seconds)
        try:
            with failures:
                raise error
        except ExitError as ended:
            self.codes[rank] = ended.args[0]

    def fail_together(self, errors, **seconds):
        threads = [threading.Thread(target=self.fail, args=(r, e), kwargs=seconds) for r, e in errors.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def test_the_rank_that_failed_first_speaks_and_all_have_its_code(run, capsys):
    ranks = Ranks(3, run, dist.HashStore())
    ranks.fail(1, FloatingPointError("step 4: nan"))
    ranks.fail_together({0: RuntimeError(GLOO), 2: RuntimeError(GLOO)})
    assert ranks.codes == {0: 3, 1: 3, 2: 3}
    (said,) = ranks.said.pop(1)
    assert ranks.said == {}
    first, second = said.splitlines()
    assert first == "error: step 4: nan"
    assert second.startswith("  rank 1 (n1); FloatingPointError")
    assert second.endswith("; exit code 3 (training diverged)")
    # Without logs only rank 0 prints its line to the terminal.
    assert capsys.readouterr().err == "rank 0 (n0) ends because of rank 1 (n1): step 4: nan\n"
    written = json.loads((run / ENDING).read_text())
    assert (written["code"], written["rank"], written["reason"]) == (3, 1, "FloatingPointError")


@pytest.mark.parametrize(
    ("named", "rank", "host", "because"), [(1, 1, "n1", " because of rank 1 (n1)"), (-1, None, None, "")]
)
def test_an_error_that_all_ranks_raise_together_is_the_fault_of_the_rank_that_it_names(
    run, capsys, named, rank, host, because
):
    error = FloatingPointError("step 4: nan on rank 1")
    error.rank = named
    ranks = Ranks(2, run, dist.HashStore())
    ranks.endings[1].log = SimpleNamespace(path="rank-1.log", write=lambda text: None)
    ranks.fail_together(
        {number: caused(DataError("after a checkpoint"), error) for number in range(2)}, yield_seconds=30
    )
    assert list(ranks.said) == [0]
    where = "" if host is None else f"on rank {rank} ({host}); "
    assert ranks.said[0][0].splitlines()[1].startswith(f"  {where}noticed by rank 0")
    written = json.loads((run / ENDING).read_text())
    assert (written["rank"], written["host"]) == (rank, host)
    assert capsys.readouterr().err == f"rank 1 (n1) ends{because}: after a checkpoint\n"


def test_rank_0_keeps_the_store_until_the_others_have_heard(run):
    ranks = Ranks(3, run, dist.HashStore())
    first = threading.Thread(target=ranks.fail, args=(0, DataError("a")), kwargs={"hear_seconds": 30})
    first.start()
    ranks.fail(1, DataError("a"), yield_seconds=30)
    first.join(0.3)
    assert ranks.codes == {1: 2}  # rank 0 still waits for rank 2
    ranks.fail(2, DataError("a"), yield_seconds=30)
    first.join(30)
    assert ranks.codes == {0: 2, 1: 2, 2: 2}
    assert list(ranks.said) == [0]


@pytest.mark.parametrize(("kind", "code"), [(ArrivalError, 76), (DisagreementError, 2)])
def test_what_rank_0_has_told_the_others_is_said_by_rank_0(kind, code):
    ranks = Ranks(3)  # without a store: the ranks may not have met
    for rank in range(3):
        ranks.fail(rank, kind("rank 3 (n3) did not arrive", from_rank0=rank > 0))
    assert ranks.codes == {0: code, 1: code, 2: code}
    assert list(ranks.said) == [0]


def test_if_rank_0_is_missing_rank_1_says_so():
    ranks = Ranks(3)
    for rank in (1, 2):
        ranks.fail(rank, ArrivalError("rank 0 at n0:29500 does not answer"))
    assert ranks.codes == {1: 76, 2: 76}
    assert list(ranks.said) == [1]
    assert ranks.said[1][0].startswith("error: rank 0 at n0:29500 does not answer\n  rank 1 (n1); ArrivalError")


def test_an_error_that_all_ranks_raise_is_said_by_rank_0(run):
    ranks = Ranks(3, run, dist.HashStore())
    ranks.fail_together({rank: DataError("the data of step 3 could not be read: rank 1: a") for rank in range(3)})
    assert ranks.codes == {0: 2, 1: 2, 2: 2}
    assert ranks.said == {0: ["error: the data of step 3 could not be read: rank 1: a"]}


def test_a_refusal_of_another_rank_names_it():
    ranks = Ranks(2, None, dist.HashStore())
    ranks.fail_together({0: RankError("rank 1: DataError: a"), 1: DataError("a", retry=True)})
    assert ranks.codes == {0: 76, 1: 76}
    (said,) = ranks.said[1]
    assert said.startswith("error: a\n  rank 1 (n1); DataError")
    assert said.endswith("; exit code 76 (try again: the same command resumes)")


def test_a_killed_rank_is_named_by_those_that_lost_it(run):
    ranks = Ranks(3, run, dist.HashStore(), lost={1: "n1"})
    ranks.fail_together({0: RuntimeError(GLOO), 2: RuntimeError(GLOO)})
    assert ranks.codes == {0: 76, 2: 76}
    ((said,),) = ranks.said.values()
    assert said.startswith(f"error: lost rank 1 (n1): {CLOSED}\n  noticed by rank ")
    written = json.loads((run / ENDING).read_text())
    assert (written["code"], written["reason"], written["rank"], written["host"]) == (76, "lost rank", 1, "n1")


def test_only_one_rank_reads_all_heartbeats_to_name_a_lost_rank(run):
    ranks = Ranks(8, run, dist.HashStore())
    asked = []
    for rank, ending in enumerate(ranks.endings):
        ending.lost_ranks = lambda seconds, rank=rank: (asked.append(rank), {5: "n5"})[1]
    ranks.fail_together({rank: RuntimeError(GLOO) for rank in range(8) if rank != 5}, words_seconds=10)
    assert len(asked) == 1 == len(ranks.said)
    assert set(ranks.codes.values()) == {76}
    assert json.loads((run / ENDING).read_text())["rank"] == 5


def test_a_rank_that_was_to_name_the_lost_one_and_is_lost_itself(run):
    store = dist.HashStore()
    store.compare_set("dcscale/first_failure/namer", "", "1")
    ranks = Ranks(3, run, store, lost={1: "n1"})
    ranks.fail(0, RuntimeError(GLOO))
    assert ranks.codes == {0: 76}
    assert ranks.said[0][0].startswith(f"error: lost rank 1 (n1): {CLOSED}\n  noticed by rank 0")


def test_a_lost_rank_that_nobody_knows(run):
    ranks = Ranks(2, run, dist.HashStore())
    ranks.fail(0, RuntimeError(GLOO))
    assert ranks.said[0][0].startswith(f"error: lost another rank: {CLOSED}\n  noticed by rank 0")
    written = json.loads((run / ENDING).read_text())
    assert (written["rank"], written["host"]) == (None, None)


def test_without_a_store_the_run_folder_says_what_happened(run):
    """The store has gone with rank 0."""
    ranks = Ranks(3, run)
    ranks.fail(0, TypeError("a bug"))
    ranks.fail_together({1: RuntimeError(GLOO), 2: RuntimeError(GLOO)})
    assert ranks.codes == {0: 1, 1: 1, 2: 1}
    assert list(ranks.said) == [0]
    assert ranks.said[0][0].startswith("error: TypeError: a bug\n  rank 0 (n0); TypeError")
    assert ranks.said[0][1].startswith("Traceback (most recent call last):")


def test_without_a_store_and_without_words_one_rank_speaks(run):
    ranks = Ranks(3, run)
    ranks.fail_together({1: RuntimeError(GLOO), 2: RuntimeError(GLOO)})
    assert ranks.codes == {1: 76, 2: 76}
    assert sum(map(len, ranks.said.values())) == 1


def test_before_the_ranks_have_met_the_first_of_each_node_speaks():
    ranks = Ranks(2)
    ranks.fail_together({0: ConfigError([]), 1: ConfigError([])})
    assert ranks.codes == {0: 2, 1: 2}
    assert list(ranks.said) == [0]


def test_a_lost_peer_after_a_stop_signal_is_a_stop_if_no_step_is_lost(run):
    for checkpoint, code in (("step-00000004", ExitCode.RESUME), ("step-00000002", ExitCode.RETRY)):
        ranks = Ranks(1)
        (ending,) = ranks.endings
        ending.progress = lambda checkpoint=checkpoint: (4, Path(checkpoint))
        with ending.signals, ending.signals.deferred(lambda: None):
            os.kill(os.getpid(), signal.SIGTERM)
            ranks.fail(0, RuntimeError(GLOO))
        assert ranks.codes == {0: code}


def test_a_lost_lease_writes_nothing_more_into_the_run_folder(run):
    ranks = Ranks(1, run)
    ranks.endings[0].before_exit = lambda: (run / "flushed").touch()
    ranks.fail(0, LeaseLostError("was taken over by process 7 on n3"))
    assert ranks.codes == {0: 2}
    assert ranks.said[0] == ["error: was taken over by process 7 on n3"]
    assert [path.name for path in run.iterdir()] == ["checkpoints"]


def test_the_place_is_in_our_code_and_the_log_has_the_traceback(run):
    (ending,) = Ranks(1, run).endings
    ending.log = log = Log(run / "logs" / "rank-0.log")
    del ending.error
    with pytest.raises(ExitError, match="1"), Failures(ending, REFUSALS):
        ending.know(None)
    assert "error: AttributeError: 'NoneType'" in log.errors[0]
    assert "; AttributeError at dcscale/cluster/ending.py:" in log.errors[0]
    assert f" in know; log {log.path}; exit code 1 (an error of the program)" in log.errors[0]
    assert log.errors[1].startswith("Traceback (most recent call last):")
    assert log.lines == []


class Log:
    """What is used of RankLog."""

    def __init__(self, path):
        self.path, self.lines, self.errors = path, [], []
        self.write, self.error = self.lines.append, self.errors.append


def test_torchrun_shows_the_same_message_for_every_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    ranks = Ranks(2, None, dist.HashStore())
    ranks.fail_together({1: TypeError("a bug")})
    ranks.fail(0, RuntimeError(GLOO))  # the file of rank 0 by now
    failure = ProcessFailure(0, os.getpid(), 1, str(tmp_path / "error.json"))
    assert failure.message["extraInfo"]["py_callstack"].startswith("error: TypeError: a bug\n  rank 1 (n1)")


@pytest.mark.parametrize("store", [None, dist.HashStore()])
def test_a_rank_whose_collectives_are_wrong_says_so_before_others_name_the_rank_that_gloo_aborted(run, capsys, store):
    ranks = Ranks(3, run, store, lost={0: "n0"})
    ranks.endings[1].deviation = lambda: "left out all_reduce 7 of group 0 (4) of a step before"
    ranks.fail_together({1: RuntimeError(GLOO), 2: RuntimeError(GLOO)})
    assert ranks.codes == {1: 76, 2: 76}
    assert list(ranks.said) == [1]
    assert ranks.said[1][0].startswith(
        "error: rank 1 (n1) left out all_reduce 7 of group 0 (4) of a step before, so the"
    )
    assert (ranks.endings[2].read()["rank"], ranks.endings[2].read()["reason"]) == (1, "collectives do not match")


def test_an_error_of_the_program_on_all_ranks_has_one_traceback(run):
    ranks = Ranks(3, run, dist.HashStore())
    ranks.fail_together({rank: TypeError("a bug") for rank in range(3)})
    assert ranks.codes == {0: 1, 1: 1, 2: 1}
    assert list(ranks.said) == [0]
    assert len(ranks.said[0]) == 2
