"""Signals request a stop; they do not interrupt."""

import os
import signal
import threading
import time

import pytest

from dcscale.train.signals import STOP_SIGNALS, StopSignals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_handlers_are_restored(number):
    before = [signal.getsignal(n) for n in STOP_SIGNALS]
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == signal.Signals(number).name
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == before


def test_the_callback_is_called_once_from_a_thread():
    called = []
    with StopSignals() as signals:
        with signals.call_on_stop(lambda: called.append(threading.current_thread().name)):
            assert threading.active_count() > 1
        assert called == []
        with signals.call_on_stop(lambda: called.append(threading.current_thread().name)):
            os.kill(os.getpid(), signal.SIGUSR1)
            stop = time.monotonic() + 10
            while not called and time.monotonic() < stop:
                time.sleep(0.01)
    assert called == ["dcscale-stop"]
    assert "dcscale-stop" not in [thread.name for thread in threading.enumerate()]


def test_a_second_interrupt_is_immediate():
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
