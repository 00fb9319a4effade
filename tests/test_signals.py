"""Stop signals: they end a process before training, and only request a stop during it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dcscale.signals import LOST_LAUNCHER, STOP_SIGNALS, StopSignals


def wait_for(condition, seconds=10):
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "timed out"
        time.sleep(0.01)


@pytest.fixture
def ended():
    """The names with which the process would have been ended."""
    return []


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_before_training_ends_the_process_and_handlers_are_restored(number, ended):
    before = [signal.getsignal(n) for n in STOP_SIGNALS], signal.set_wakeup_fd(-1)
    with StopSignals(ended.append) as signals:
        os.kill(os.getpid(), number)
        wait_for(lambda: ended)
        assert signals.received is None
    assert ended == [signal.Signals(number).name]
    assert ([signal.getsignal(n) for n in STOP_SIGNALS], signal.set_wakeup_fd(-1)) == before
    assert "dcscale-stop" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_in_training_is_known_at_once_and_ends_nothing(number, ended):
    with StopSignals(ended.append) as signals, signals.deferred(lambda: None):
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == signal.Signals(number).name
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.Signals(number).name, "the first one counts"
    assert ended == []


def test_a_second_interrupt_ends_the_process(ended):
    with StopSignals(ended.append) as signals, signals.deferred(lambda: None):
        for _ in range(2):
            assert ended == []
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received == "SIGINT"
    assert ended == ["SIGINT"]


def test_a_second_interrupt_ends_the_process_also_after_another_signal(ended):
    with StopSignals(ended.append) as signals, signals.deferred(lambda: None):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert (signals.received, ended) == ("SIGTERM", [])
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGTERM"
    assert ended == ["SIGINT"]


def test_the_callback_is_called_once_from_a_thread(ended):
    called = []
    with StopSignals(ended.append) as signals:
        with signals.deferred(lambda: called.append("too late")):
            pass
        with signals.deferred(lambda: called.append(threading.current_thread().name)):
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_for(lambda: called)
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
    assert called == ["dcscale-stop"]


def test_an_ignored_signal_does_nothing(ended):
    with StopSignals(ended.append) as signals:
        signals.ignore()
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        assert signals.received is None
    assert ended == []


def test_a_hangup_that_nohup_ignores_stays_ignored(ended):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(ended.append) as signals, signals.deferred(lambda: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_noticed_while_the_main_thread_is_in_c(ended):
    """Python's own handlers would only run after the 20 s."""
    with StopSignals(ended.append):
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # so that another thread has to take it
        try:
            waits_in_c = threading.Lock()
            waits_in_c.acquire()
            threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            threading.Thread(target=lambda: (wait_for(lambda: ended), waits_in_c.release())).start()
            assert waits_in_c.acquire(timeout=20)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    assert ended == ["SIGTERM"]


def test_a_process_whose_launcher_dies_before_training_ends():
    """The launcher is a shell here, whose child has another parent when it is gone."""
    child = (
        "import os, time; from dcscale.signals import StopSignals\n"
        "def end(name):\n    print(name, flush=True); os._exit(0)\n"
        "with StopSignals(end, poll_seconds=0.05):\n    print('ready', flush=True); time.sleep(30)"
    )
    launcher = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(30)"
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "1"}
    process = subprocess.Popen([sys.executable, "-c", launcher], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert process.stdout.readline() == f"{LOST_LAUNCHER}\n"
    process.communicate()
