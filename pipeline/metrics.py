"""What training says while it runs: meters that leave numbers on the device, progress, and the process's log."""

import functools
import logging
import math
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.progress import Progress as Bar
    from torch import Tensor
    from torch import device as Device  # noqa: N812

TERMINAL_EVERY_S = 0.1
PLAIN_EVERY_S = 15.0


class Meter:
    """Collects the device scalars of steps and fetches them with one transfer a log interval.

    ``rows`` holds the last interval's steps one by one: the scalars, the interval's ``images_per_s``, the ``data_wait``
    share, and ``time``, when the host had issued the step.
    """

    def __init__(self, gather: "Callable[[list[float]], list[list[float]]] | None" = None) -> None:
        """Starts the clock. ``gather`` gives all ranks' numbers, of which the log has the means."""
        self.rows: list[dict[str, float]] = []
        self._gather = gather
        self._steps: list[tuple[dict[str, Tensor], float]] = []
        self._restart()

    def _restart(self) -> None:
        self._steps, self._images, self._waited, self._since = [], 0, 0.0, time.perf_counter()

    def add(self, logs: "dict[str, Tensor]", num_images: int, data_wait_s: float) -> None:
        """Take a step's scalars (of one device), its images over all ranks and its wait for data; blocks on nothing."""
        # A copy: an engine may write the next step's numbers into the same tensors.
        self._steps.append(({name: value.detach().clone() for name, value in logs.items()}, time.time()))
        self._images += num_images
        self._waited += data_wait_s

    def flush(self) -> dict[str, float]:
        """Means over the interval, ``images_per_s`` and ``data_wait`` (share of the time); restarts the clock.

        Without a step in between it returns {} and only restarts the clock, as after a pause that is not training.
        """
        self.rows = [{**row, "time": at} for row, (_, at) in zip(self._fetch(), self._steps, strict=True)]
        if self._steps:
            elapsed = max(time.perf_counter() - self._since, 1e-9)
            speed = {"images_per_s": self._images / elapsed, "data_wait": min(self._waited / elapsed, 1.0)}
            self.rows = [row | speed for row in self.rows]
        self._restart()
        names = dict.fromkeys(name for row in self.rows for name in row if name != "time")
        columns = {name: [row[name] for row in self.rows if name in row] for name in names}
        return {name: sum(column) / len(column) for name, column in columns.items()}

    def _fetch(self) -> list[dict[str, float]]:
        import torch

        scalars = [value.float().reshape(()) for logs, _ in self._steps for value in logs.values()]
        numbers = torch.stack(scalars).tolist() if scalars else []
        names = [name for logs, _ in self._steps for name in logs]
        if self._gather is not None and numbers:
            numbers = [_mean(name, of_ranks) for name, *of_ranks in zip(names, *self._gather(numbers), strict=True)]
        each = iter(numbers)
        return [{name: next(each) for name in logs} for logs, _ in self._steps]


def _mean(name: str, values: list[float]) -> float:
    """A monitor's NaN says that one rank had nothing to show; the loss's would be a fault, and stays."""
    seen = values if name == "loss" else [value for value in values if not math.isnan(value)] or values
    return sum(seen) / len(seen)


def device_name(device: "Device") -> str:
    """What computes, such as ``NVIDIA H100 80GB HBM3``, or ``cpu``."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_gib(device: "Device") -> float:
    """The most memory that this process has had, in GiB: what torch allocated on a GPU, on the CPU all that was resident."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@functools.cache
def _console() -> "Console":
    """One for all bars: bars on consoles of their own would overwrite each other."""
    from rich.console import Console

    return Console(stderr=True)


class Progress:
    """How far long work is, on stderr: a bar on a terminal, else a line at most every 15 s, and the last.

    A context manager; ``update`` is cheap enough for every step and serves as a ``progress(done, total)`` callback.
    """

    def __init__(self, title: str, total: int | None, unit: str, *, shown: bool = True) -> None:
        """``total`` may come with an update; ``unit`` names one of what is counted, for the rate. Silent unless ``shown``."""
        self._title, self._total, self._unit = title, total, unit
        self._done, self._text, self._shown, self._shown_at = 0, "", "", 0.0
        self._first: tuple[float, int] | None = None
        self._quiet = not shown
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        """Opens the bar where stderr is a terminal."""
        if sys.stderr.isatty() and not self._quiet:
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            title, tail = "{task.description}", "{task.fields[tail]}"
            columns = (TextColumn(title, markup=False), BarColumn(), TextColumn(tail, markup=False))
            self._bar = Bar(*columns, console=_console(), auto_refresh=False)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, tail="")
        return self

    def update(self, done: int, total: int | None = None, text: str = "") -> None:
        """``done`` of ``total`` units are finished; ``text`` stays until the next one, such as ``loss 0.43``."""
        if self._quiet:
            return
        now = time.monotonic()
        self._first = self._first or (now, done)  # work that an earlier process did says nothing about the rate
        self._done, self._total, self._text = done, total or self._total, text or self._text
        if now - self._shown_at >= (TERMINAL_EVERY_S if self._bar else PLAIN_EVERY_S):
            self._shown_at = now
            self._show(now)

    def _tail(self, now: float) -> str:
        done, total = self._done, self._total
        since, done_then = self._first or (now, done)
        rate = (done - done_then) / max(now - since, 1e-9)
        parts = [f"{done}/{total}", f"{100 * done // total} %"] if total else [f"{done}"]
        if self._text:
            parts.append(self._text)
        if rate > 0:
            parts.append(f"{rate:.{0 if rate >= 100 else 1}f} {self._unit}/s")
            if total and done < total:
                parts.append(f"ETA {_clock((total - done) / rate)}")
        return "  ".join(parts)

    def _show(self, now: float) -> None:
        tail = self._tail(now)
        if self._bar:
            self._bar.update(self._task, completed=self._done, total=self._total, tail=tail, refresh=True)
        elif f"{self._done} {self._text}" != self._shown:
            self._shown = f"{self._done} {self._text}"
            sys.stderr.write(f"{self._title}  {tail}\n")
            sys.stderr.flush()

    def __exit__(self, *error: object) -> None:
        """Shows the last state and closes the bar."""
        if self._first:
            self._show(time.monotonic())
        if self._bar:
            self._bar.stop()


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at that moment: while a bar is shown it stands above the bar."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        """StreamHandler's constructor sets it; there is nothing to keep."""


def setup_logging(run_dir: Path | None, rank: int = 0) -> None:
    """Send the logger ``patchmill`` to stderr and, with a run folder, to its ``log.txt``; the last call counts.

    Of a ``rank`` other than 0 only warnings are shown, with its number.
    """
    logger = logging.getLogger("patchmill")
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    logger.setLevel(logging.WARNING if rank else logging.INFO)
    logger.propagate = False
    handlers: list[logging.Handler] = [_Stderr()]
    if run_dir is not None:
        handlers.append(logging.FileHandler(run_dir / "log.txt"))
    speaker = f"rank {rank}: " if rank else ""
    for handler in handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {speaker}%(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
