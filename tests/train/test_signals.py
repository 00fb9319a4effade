"""A signal asks; it does not interrupt."""

import os
import signal

import pytest

from dcscale.train.signals import STOP_SIGNALS, StopSignals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_handlers_are_put_back(number):
    before = [signal.getsignal(n) for n in STOP_SIGNALS]
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == signal.Signals(number).name
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == before


def test_a_second_interrupt_is_immediate():
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
