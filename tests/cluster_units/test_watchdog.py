"""The watchdog of one process: limits, clock, phases, what it writes, and what happens where it cannot."""

import re
import threading
import time

import pytest
import torch.distributed as dist

from dcscale.cluster.ending import Ending
from dcscale.cluster.hang_report import describe_main_thread, write_report
from dcscale.cluster.heartbeats import Alarm, Heartbeats
from dcscale.cluster.limits import AwakeClock, Limits
from dcscale.cluster.verdict import Answer, Status
from dcscale.cluster.watchdog import Unwatched, Watchdog
from dcscale.config import ParallelConfig

QUICK = Limits(start=60, step=0.3, pause=60, lost=1, beat=0.05, answer=0.2)


# -- limits and clock --------------------------------------------------------------------------------------------------


def test_the_limits_of_a_run():
    limits = Limits.from_config(ParallelConfig(start_timeout_minutes=2, pause_timeout_minutes=3), world_size=16)
    assert (limits.start, limits.step, limits.pause, limits.lost, limits.beat) == (120, None, 180, 30, 2)
    many = Limits.from_config(ParallelConfig(), world_size=1000)
    assert (many.beat, many.lost) == (5, 30)
    more = Limits.from_config(ParallelConfig(), world_size=8000)
    assert (more.beat, more.lost) == (40, 200)


@pytest.mark.parametrize(("hang_seconds", "lost"), [(5.0, 10), (15.0, 15), (600.0, 30)])
def test_hang_seconds_also_shortens_the_wait_for_heartbeats(hang_seconds, lost):
    limits = Limits.from_config(ParallelConfig(hang_seconds=hang_seconds), world_size=2)
    assert (limits.step, limits.lost) == (hang_seconds, lost)


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [([], 600), ([40.0], 400), ([40.0, 2.0], 30), ([40.0, 5.0, 5.04, 90.0], 50), ([0.1] * 64, 30)],
)
def test_the_limit_of_a_step_is_ten_medians_but_at_least_30_s(seconds, limit):
    assert Limits(start=600, step=None, pause=1800).of_step(seconds) == limit


def test_hang_seconds_is_the_limit_of_a_step_after_the_first():
    limits = Limits(start=600, step=7, pause=1800)
    assert (limits.of_step([]), limits.of_step([40.0])) == (600, 7)


def test_time_in_which_the_process_was_stopped_does_not_count():
    # From 4 s to 100 s the process is stopped.
    clock = AwakeClock(longest=5, clock=iter([0.0, 1.0, 1.0, 4.0, 4.0, 100.0, 100.0, 100.0, 101.5]).__next__)
    clock.tick()
    clock.tick()
    assert clock.now() == 9
    clock.tick()
    assert clock.now() == 10.5


# -- one process -------------------------------------------------------------------------------------------------------


def never():
    raise AssertionError("a single process needs no store")


@pytest.fixture
def start(tmp_path):
    """Starts watchdogs of single processes; returns them with the codes with which they ended the process."""
    (tmp_path / "checkpoints").mkdir()
    opened = []

    def start(limits=QUICK, **arguments):
        codes = []
        ending = Ending(codes.append, seconds=60)
        ending.hold(tmp_path, "")
        timeouts = []
        values = {"rank": 0, "hosts": ["n0"], "open_store": never, "set_timeouts": timeouts.append, **arguments}
        opened.append(Watchdog(limits=limits, ending=ending, **values))
        return opened[-1], ending, codes, timeouts

    yield start
    for watchdog in opened:
        watchdog.close()


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_single_process_that_hangs_ends_itself(start, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "for-torchrun.json"))
    watchdog, ending, codes, _ = start()
    watchdog.step_done(4, 0.1)
    with watchdog.phase("step"):
        wait_for(lambda: codes)
    assert codes == [76]
    reason = ending.read()["error"]
    assert re.fullmatch(
        r"rank 0 \(\S+, pid \d+\) hangs outside of collectives: step 5, phase step, for 0 s, at "
        r"test_watchdog.py:\d+ in wait_for",
        reason,
    )
    (folder,) = (tmp_path / "hangs").iterdir()
    assert (
        capsys.readouterr().err == f"error: {reason}\n  limit of phase step: 0 s (parallel.hang_seconds)\n"
        f"  stacks: {folder}; exit code 76 (try again: the same command resumes)\n"
    )
    assert "test_a_single_process_that_hangs_ends_itself" in (folder / "rank-0.txt").read_text()
    assert reason in (tmp_path / "for-torchrun.json").read_text()


@pytest.mark.parametrize(
    ("phase", "steps", "setting"),
    [("start", 0, "start_timeout_minutes"), ("step", 0, "start_timeout_minutes"), ("validation", 1, "pause_timeout_")],
)
def test_the_setting_of_the_limit_is_named(start, capsys, phase, steps, setting):
    watchdog, _, codes, _ = start(Limits(start=0.2, step=60, pause=0.2, lost=1, beat=0.05, answer=0.2))
    for step in range(steps):
        watchdog.step_done(step, 0.1)
    with watchdog.phase(phase):
        wait_for(lambda: codes)
    assert f"\n  limit of phase {phase}: 0 s (parallel.{setting}" in capsys.readouterr().err


def test_other_phases_have_other_limits(start):
    watchdog, _, codes, _ = start()
    with watchdog.phase("step"):  # the first one has the limit of the start
        time.sleep(0.5)
    watchdog.step_done(1, 0.1)
    for phase in ("data", "saving"):
        with watchdog.phase(phase):
            time.sleep(0.5)
    time.sleep(0.5)  # between phases
    assert codes == []


def test_a_phase_in_a_step_stops_the_clock_of_the_step(start):
    watchdog, _, codes, _ = start()
    watchdog.step_done(1, 0.1)
    with watchdog.phase("step"):
        with watchdog.phase("rollback"):
            time.sleep(0.6)
        assert codes == []
        wait_for(lambda: codes)


def test_process_groups_wait_20_s_longer_than_the_watchdog_and_are_set_only_on_a_change(start):
    watchdog, _, _, timeouts = start(Limits(start=600, step=None, pause=1800, lost=1))
    for step, seconds in enumerate((40.0, 40.0), start=1):
        with watchdog.phase("data"), watchdog.phase("data"):
            pass
        with watchdog.phase("step"):
            pass
        watchdog.step_done(step, seconds)
        wait_for(lambda: watchdog._step_limit == 400)
    assert timeouts == [1820, 620, 1820, 420, 1820]


def test_what_cannot_be_written_is_reported(start, tmp_path, capsys):
    watchdog, _, codes, _ = start()
    (tmp_path / "hangs").write_text("in the way")
    watchdog.step_done(1, 0.1)
    with watchdog.phase("step"):
        wait_for(lambda: codes)
    assert codes == [76]
    assert re.search(r"warning    \S+/rank-0.txt could not be written: Not a directory", capsys.readouterr().err)


def test_after_close_nothing_is_watched(start):
    watchdog, _, codes, _ = start()
    watchdog.step_done(1, 0.1)
    watchdog.close()
    assert not [t for t in threading.enumerate() if t.name in ("dcscale-watchdog", "dcscale-heartbeat")]
    with watchdog.phase("step"):
        time.sleep(0.5)
    assert codes == []


def test_a_run_without_an_ending_is_not_watched():
    watchdog = Unwatched()
    with watchdog.phase("step"):
        watchdog.step_done(1, 0.1)
    watchdog.close()


# -- a store that does not answer --------------------------------------------------------------------------------------


def no_answer():
    raise dist.DistNetworkError("connection refused")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_reaches_nobody_ends_by_itself(start, rank):
    limits = Limits(start=60, step=60, pause=60, lost=0.5, beat=0.05, answer=0.1)
    watchdog, ending, codes, _ = start(limits, rank=rank, hosts=["n0", "n1"], open_store=no_answer)
    watchdog.step_done(1, 0.1)
    wait_for(lambda: codes)
    assert codes == [76]
    assert ending.read()["rank"] == 0
    texts = [
        "does not reach the store of the run for 1 s, so it ends by itself",
        "does not answer: no heartbeat for 1 s, or the network to it is cut; so rank 1 ends itself",
    ]
    assert texts[rank] in ending.read()["error"]


def test_while_a_rank_may_be_silent_none_counts_as_lost(start):
    began = time.monotonic()
    limits = Limits(start=60, step=60, pause=60, lost=0.2, beat=0.05, answer=0.1)
    watchdog, _, codes, _ = start(limits, rank=1, hosts=["n0", "n1"], open_store=no_answer)
    watchdog.step_done(1, 0.1)
    watchdog.patient = True
    wait_for(lambda: codes)
    assert time.monotonic() - began > 10 * limits.lost


def test_without_a_store_rank_0_is_the_lost_one(start):
    watchdog, *_ = start(Limits(start=60, step=60, pause=60), rank=1, hosts=["n0", "n1", "n2"], open_store=no_answer)
    assert watchdog.lost_ranks(0.1) == {0: "n0"}
    watchdog.close()
    assert watchdog.lost_ranks(0.1) == {}


@pytest.fixture
def rank_0():
    """A rank 0 that shows signs of life, and nothing else; returns its store and what it can say."""
    store, stop = dist.HashStore(), threading.Event()
    heartbeats = Heartbeats(0, ["n0", "n1"], lambda: store, time.monotonic)

    def live():
        while not stop.wait(0.02):
            heartbeats.beat(Status(0, "n0", 1, "", 1, "step", 0.0, {}), all_ranks=True)

    thread = threading.Thread(target=live)
    thread.start()
    yield store, heartbeats
    stop.set()
    thread.join()


def test_a_rank_that_nobody_ends_ends_itself(start, rank_0):
    store, _ = rank_0
    limits = Limits(start=60, step=0.1, pause=60, lost=0.5, beat=0.05, answer=0.1)
    watchdog, ending, codes, _ = start(limits, rank=1, hosts=["n0", "n1"], open_store=lambda: store)
    watchdog.step_done(1, 0.1)
    with watchdog.phase("step"):
        wait_for(lambda: codes)
    assert codes == [76]
    assert ending.read()["rank"] == 1
    assert re.search(
        r"rank 1 .* hangs: step 2, phase step, for 1 s, and rank 0 has not ended it", ending.read()["error"]
    )


def test_an_alarm_without_a_verdict_ends_the_rank_too(start, rank_0):
    store, _ = rank_0
    first = Heartbeats(0, ["n0", "n1"], lambda: store, time.monotonic)
    first.raise_alarm(Alarm(0, "2026-11-26", {}, [1], []))
    assert first.raise_alarm(Alarm(1, "later", {}, [], [])).by == 0
    _, ending, codes, _ = start(rank=1, hosts=["n0", "n1"], open_store=lambda: store)
    wait_for(lambda: codes)
    assert codes == [76]
    assert ending.read()["error"] == "rank 0 suspected a hang and then fell silent"
    assert first.answers({})[1].status.phase == "start"


def test_lost_ranks_waits_until_all_have_shown_signs_of_life(start, rank_0):
    store, heartbeats = rank_0
    watchdog, *_ = start(
        Limits(start=60, step=60, pause=60, beat=0.1), rank=1, hosts=["n0", "n1"], open_store=lambda: store
    )
    began = time.monotonic()
    assert watchdog.lost_ranks(20.0) == {}
    assert time.monotonic() - began < 10
    wait_for(lambda: heartbeats.statuses[1].ending)  # so that others, which ask later, do not miss it


def test_a_connection_that_broke_is_made_again():
    stores = [dist.HashStore(), dist.HashStore()]
    opened = []

    def open_store():
        opened.append(stores[len(opened)])
        return opened[-1]

    heartbeats = Heartbeats(0, ["n0", "n1"], open_store, time.monotonic)
    own = Status(0, "n0", 1, "", 3, "step", 0.5, {"0": 7})
    heartbeats.beat(own, all_ranks=True)
    heartbeats._store = Broken()
    with pytest.raises(dist.DistNetworkError):
        heartbeats.beat(own, all_ranks=True)
    heartbeats.beat(own, all_ranks=True)
    assert opened == stores


class Broken:
    def set(self, key, value):
        raise dist.DistNetworkError("Broken pipe")


# -- the report --------------------------------------------------------------------------------------------------------


def test_where_the_main_thread_is_names_our_line_and_the_library_it_is_in():
    places = []
    reader = threading.Thread(target=lambda: places.append(describe_main_thread()))
    reader.start()
    reader.join()
    assert re.fullmatch(
        r"threading.py:\d+ in \w+, called from test_watchdog.py:\d+ in test_where_the_main_thread_is_\w+", places[0]
    )


def test_a_report_has_the_stacks_of_all_threads(tmp_path):
    status = Status(3, "n3", 33, "", 5, "step", 31.24, {})
    answer = Answer(status, "x.py:1 in f", None, None, None, "left out a", {})
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="reader")
    thread.start()
    write_report(tmp_path / "a" / "rank-3.txt", answer, [])
    stop.set()
    thread.join()
    text = (tmp_path / "a" / "rank-3.txt").read_text()
    assert text.startswith(
        "rank 3 (n3, pid 33): step 6, phase step, for 31.2 s\nwaits in: no collective\n"
        "compared with the steps before: left out a\n\nthread MainThread:\n"
    )
    assert "\nthread reader:\n" in text
