"""What keeps a run safe: a signal becomes a flag that is read at a step's end, and steps that are not finite are counted."""

import logging
import signal
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

from pipeline.launch import World

log = logging.getLogger("patchmill")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class NonFinite(RuntimeError):  # noqa: N818  it says what happened
    """Too many steps in a row had a loss or gradient that is not finite."""


class StopRequest:
    """``requested`` becomes the name of SIGTERM, SIGINT or SIGUSR2 once one arrives; a context manager.

    The step in progress is finished and saved. A SIGINT after that interrupts at once.
    """

    def __init__(self) -> None:
        """No signal yet."""
        self.requested: str | None = None

    def __enter__(self) -> Self:
        """Install the handlers."""
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Put the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name


class NonFiniteGuard:
    """Counts skipped steps in a row on the host, from values that are read at log steps only."""

    def __init__(self, limit: int, streak: int = 0) -> None:
        """``limit`` in a row stop the run; ``streak`` comes from a checkpoint."""
        self.limit, self.streak = limit, streak

    def observe(self, step: int, skipped: bool) -> None:
        """Take one step's verdict, in order. Raises NonFinite at the limit."""
        self.streak = self.streak + 1 if skipped else 0
        if self.streak >= self.limit:
            raise NonFinite(
                f"the gradient was not finite in {self.streak} steps in a row, the last one step {step}; the weights are "
                f"those of step {step - self.streak}. Lower optim.base_lr, set optim.clip, or look at the data."
            )


class Agreement:
    """Whether any rank wants to stop: asked at every step by all, answered one step late, so that nobody waits."""

    def __init__(self, world: World) -> None:
        """Makes a group of its own: the messages of a step must not meet those of a save."""
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._asked: tuple[torch.Tensor, dist.Work] | None = None

    def __call__(self, wanted: bool) -> bool:
        """Ask; the answer of the question before, alone at once."""
        if self._group is None:
            return wanted
        answer = False
        if self._asked is not None:
            told, work = self._asked
            work.wait()
            answer = bool(told.item())
        told = torch.tensor([int(wanted)])
        self._asked = told, dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer
