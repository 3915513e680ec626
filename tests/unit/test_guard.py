"""Signals become a flag, handlers are put back, and skipped steps in a row are counted."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

from pipeline.guard import LONG, PHASES, Heartbeat, NonFinite, NonFiniteGuard, Stragglers, verdict
from pipeline.launch import World
from pipeline.stop import SAME_S, SIGNALS, StopRequest
from pipeline.watches import Watch


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


def test_a_later_interrupt_interrupts_at_once_and_leaves_no_handler_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {n: signal.getsignal(n) for n in SIGNALS}
    now = time.monotonic()
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        send(signal.SIGINT)
        send(signal.SIGINT)  # the key bounces
        assert stop.requested == "SIGINT"
        monkeypatch.setattr(time, "monotonic", lambda: now + SAME_S + 1)
        send(signal.SIGINT)
    assert {n: signal.getsignal(n) for n in SIGNALS} == before


def test_a_process_that_ends_takes_no_signal_any_more() -> None:
    with StopRequest(ends=True):
        send(signal.SIGTERM)
    for number in SIGNALS:
        send(number)
        assert signal.getsignal(number) is signal.SIG_IGN


def test_repeated_termination_does_not_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        send(signal.SIGINT)
        now = time.monotonic() + SAME_S + 1
        monkeypatch.setattr(time, "monotonic", lambda: now)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR2):
            send(number)
        assert stop.requested == "SIGINT"


def test_handlers_come_back_when_the_body_raises() -> None:
    before = {n: signal.getsignal(n) for n in SIGNALS}
    with pytest.raises(RuntimeError, match="body"), StopRequest():
        raise RuntimeError("body")
    assert {n: signal.getsignal(n) for n in SIGNALS} == before


def observe(guard: NonFiniteGuard, first: int, *skipped: bool) -> None:
    guard.observe(list(enumerate(skipped, first)))


def test_steps_in_a_row_are_counted_and_a_good_one_resets() -> None:
    guard = NonFiniteGuard(3)
    observe(guard, 1, True, True, False, True, True)
    assert guard.streak == 2
    with pytest.raises(NonFinite, match="not finite in 3 steps in a row, 4 to 6") as raised:
        observe(guard, 6, True)
    assert (raised.value.first, raised.value.last) == (4, 6)


def test_all_steps_of_a_streak_that_is_seen_late_belong_to_it() -> None:
    with pytest.raises(NonFinite) as raised:
        observe(NonFiniteGuard(2), 10, False, True, True, True, True, False, True)
    assert (raised.value.first, raised.value.last) == (11, 14)


def test_the_streak_of_a_checkpoint_goes_on() -> None:
    with pytest.raises(NonFinite):
        observe(NonFiniteGuard(3, streak=2), 11, True)
    guard = NonFiniteGuard(3, streak=2)
    observe(guard, 11, False)
    assert guard.streak == 0


def test_a_limit_of_one_stops_at_the_first() -> None:
    observe(NonFiniteGuard(1), 1, False)
    with pytest.raises(NonFinite, match="1 steps in a row, 2 to 2"):
        observe(NonFiniteGuard(1), 2, True)


def test_where_a_process_was_last_is_there_when_it_has_ended(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, World(), 300.0, 300.0, print) as heart:
        heart.beat("end", 12)
    found = json.loads((tmp_path / "ranks" / "rank-00000.json").read_text())
    assert (found["phase"], found["step"]) == ("end", 12)


def record(rank: int, phase: str, step: int) -> dict[str, object]:
    return {"rank": rank, "host": f"n{rank}", "phase": phase, "step": step}


@pytest.mark.parametrize(
    "records, lost, said",
    [
        ([("compute", 7), ("data", 7), ("compute", 7)], [], "rank 1 on n1 hangs in phase data of step 8: no"),
        ([("compute", 7), ("log", 6), ("compute", 7)], [], "rank 1 on n1 hangs in phase log of step 7: no"),
        (
            [("data", 6), ("compute", 7), ("compute", 7)],
            [2],
            "rank 2 on n2 does not answer (stopped, or its host is gone)",
        ),
        ([("compute", 7), ("compute", 7)], [], "all ranks hang in phase compute of step 8, none is behind"),
        ([("data", 3)], [], "rank 0 on n0 hangs in phase data of step 4: no progress for 30 s"),
    ],
)
def test_the_verdict_names_the_rank_that_keeps_the_others_waiting(records, lost, said) -> None:
    assert verdict([record(rank, *place) for rank, place in enumerate(records)], lost, 30.0).startswith(said)


def test_a_process_that_hangs_ends_also_where_nothing_can_be_written_and_blames_no_other(tmp_path) -> None:
    code = """
import sys, time
from pathlib import Path
from pipeline.guard import Heartbeat
from pipeline.launch import World
folder = Path(sys.argv[1])
def tell(reason):
    print(reason, flush=True)
    raise OSError("no space left")
with Heartbeat(folder, World(), 1.0, 1.5, tell) as heart:
    heart.beat("compute", 5)
    (folder / "ranks").rename(folder / "gone")  # at once: its thread writes there meanwhile
    (folder / "ranks").touch()
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=120, capture_output=True, text=True)
    assert done.returncode == 1
    assert "hangs in phase" in done.stdout and "does not answer" not in done.stdout


def test_after_a_new_start_the_first_steps_have_time_again(tmp_path) -> None:
    heart = Heartbeat(tmp_path, World(), 1.0, 2.0, print)
    for phase, step, first in (
        ("start", 0, None),
        ("data", 3, 3),
        ("compute", 9, 3),
        ("start", 9, None),
        ("data", 2, 2),
    ):
        heart.beat(phase, step)
        assert heart._first == first


def test_a_process_that_hangs_says_where_writes_its_stacks_and_ends(tmp_path) -> None:
    code = """
import sys, time
from pathlib import Path
from pipeline.guard import Heartbeat
from pipeline.launch import World
folder = Path(sys.argv[1])
with Heartbeat(folder, World(), 1.0, 2.0, lambda reason: (folder / "reason").write_text(reason)) as heart:
    for step in range(6):
        heart.beat("data", step)
        time.sleep(0.3)
    heart.beat("compute", 6)
    time.sleep(1.25)
    heart.beat("save", 6)
    time.sleep(1.6)
    heart.beat("compute", 7)
    def here_it_stands(): time.sleep(60)
    here_it_stands()
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=120)
    assert done.returncode == 1
    assert "hangs in phase compute of step 8: no progress for" in (tmp_path / "reason").read_text()
    assert "here_it_stands" in (tmp_path / "ranks" / "rank-00000.stacks.txt").read_text()


def test_a_rank_that_is_slow_three_times_in_a_row_is_named() -> None:
    judge = Stragglers(World(0, 4), torch.device("cpu"))._judge
    slow = [("a", 1.0, 0.0), ("b", 1.1, 0.02), ("c", 1.9, 0.0), ("d", 1.0, 0.5)]
    even = [(host, 1.0, 0.1) for host in "abcd"]
    assert [list(judge(rows)) for rows in (slow, slow, even, slow, slow)] == [[]] * 5
    computes, waits = judge(slow)
    assert computes == "rank 2 on c computes 1.8 times slower than the median rank, in 3 log intervals in a row"
    assert waits == "rank 3 on d waits for data 50% of the time, the median rank 1%, in 3 log intervals in a row"


def test_all_that_is_looked_at_while_training_may_take_long_and_has_its_place_in_a_step() -> None:
    names = {watch.name for watch in get_args(Watch)}
    assert names == {"held-out loss", "accuracy", "online signals"} and names <= set(LONG) <= set(PHASES)
    assert "in phase accuracy of step 8" in verdict([record(0, "accuracy", 7)], [], 30)
