"""Signals that stop a run, taken from the first moment of a process on: nothing here needs torch."""

import signal
import time
from types import FrameType
from typing import Final, Self

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
SAME_S: Final = (
    2.0  # a SIGINT that follows another so soon is the same wish: a key that bounces, or sent to group and leader
)


class StopRequest:
    """``requested`` becomes the name of SIGTERM, SIGINT or SIGUSR2 once one arrives; a context manager.

    The step in progress is finished and saved. A SIGINT two seconds or more after that interrupts at once.
    """

    def __init__(self, *, ends: bool = False) -> None:
        """No signal yet. ``ends``: the process ends afterwards, and no signal may change its exit code any more."""
        self.requested: str | None = None
        self._ends, self._since = ends, 0.0

    def __enter__(self) -> Self:
        """Install the handlers; a job's supervisor has held the signals back until now."""
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        """Put the former handlers back, or ignore the signals."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self._ends else handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._since = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since >= SAME_S:
            raise KeyboardInterrupt
