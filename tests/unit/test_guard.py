"""Signals become a flag, handlers are put back, and skipped steps in a row are counted."""

import os
import signal
from collections.abc import Iterator

import pytest

from pipeline.guard import SIGNALS, NonFinite, NonFiniteGuard, StopRequest


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """Whatever a test does, the process's handlers come back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR2"])
def test_a_signal_sets_the_flag_and_the_handlers_are_put_back(name: str) -> None:
    heard = []
    number = signal.Signals[name]
    signal.signal(number, lambda *_: heard.append("outer"))
    before = {n: signal.getsignal(n) for n in SIGNALS}
    with StopRequest() as stop:
        assert stop.requested is None
        send(number)
        assert stop.requested == name and heard == []
    assert {n: signal.getsignal(n) for n in SIGNALS} == before
    send(number)
    assert heard == ["outer"]


def test_default_and_ignored_handlers_come_back_too() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


def test_a_second_interrupt_interrupts_at_once_and_leaves_no_handler_behind() -> None:
    before = {n: signal.getsignal(n) for n in SIGNALS}
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        send(signal.SIGINT)
        assert stop.requested == "SIGINT"
        send(signal.SIGINT)
    assert {n: signal.getsignal(n) for n in SIGNALS} == before


def test_repeated_termination_does_not_interrupt() -> None:
    with StopRequest() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR2):
            send(number)
        assert stop.requested == "SIGUSR2"


def test_handlers_come_back_when_the_body_raises() -> None:
    before = {n: signal.getsignal(n) for n in SIGNALS}
    with pytest.raises(RuntimeError, match="body"), StopRequest():
        raise RuntimeError("body")
    assert {n: signal.getsignal(n) for n in SIGNALS} == before


def test_steps_in_a_row_are_counted_and_a_good_one_resets() -> None:
    guard = NonFiniteGuard(3)
    for step, skipped in enumerate([True, True, False, True, True], start=1):
        guard.observe(step, skipped)
    assert guard.streak == 2
    with pytest.raises(NonFinite) as raised:
        guard.observe(6, True)
    message = str(raised.value)
    assert "3 steps in a row" in message and "step 6" in message and "step 3" in message
    assert "optim.base_lr" in message and "optim.clip" in message


def test_the_streak_of_a_checkpoint_goes_on() -> None:
    guard = NonFiniteGuard(3, streak=2)
    with pytest.raises(NonFinite):
        guard.observe(11, True)
    guard = NonFiniteGuard(3, streak=2)
    guard.observe(11, False)
    assert guard.streak == 0


def test_a_limit_of_one_stops_at_the_first() -> None:
    NonFiniteGuard(1).observe(1, False)
    with pytest.raises(NonFinite, match="1 steps in a row"):
        NonFiniteGuard(1).observe(2, True)
